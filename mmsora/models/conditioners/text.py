"""Captions."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from mmsora.models.conditioners.conditioner import Conditioner
from mmsora.models.text_encoders.text_encoder import TextEncoder
from mmsora.registry import CONDITIONERS, TEXT_ENCODERS
from mmsora.structures.video_sample import VideoSample
from mmsora.utils.made_by import check_maker
from mmsora.utils.user_error import UserError

__all__ = ["TextConditioner"]

EMBEDDED_BY_ANOTHER = (
    "the embeddings in the cache were made by another text encoder than model.conditioner.encoder"
)


@CONDITIONERS.register_module()
class TextConditioner(Conditioner):
    """Gives ``text=``, (B, tokens, channels), and ``image_text=``; the empty text stands for none.

    The embeddings are the samples' ``text_embedding`` where they have one, as from a cache, and
    made of their ``text`` where not.

    Args:
        encoder: Config of a :class:`TextEncoder`.
        drop_prob: Probability that training replaces a text by none.
    """

    takes_text = True
    encoder: TextEncoder

    def __init__(self, encoder: dict, drop_prob: float = 0.1) -> None:
        super().__init__(drop_prob)
        self._encoder_config = deepcopy(encoder)
        self.encoder = self._build_encoder()
        self._known: dict[str, Tensor] | None = None  # in place of the encoder
        self._null: Tensor | None = None

    def _build_encoder(self) -> TextEncoder:
        return TEXT_ENCODERS.build(deepcopy(self._encoder_config)).requires_grad_(False)

    def init_weights(self) -> None:
        """Load the encoder's weights, unless embeddings stand in for it."""
        if self._known is None:
            self.encoder.init_weights()

    def train_on_embeddings(self, made_by: dict[str, Any], known: Mapping[str, Tensor]) -> None:
        """Do without the encoder: training gets embeddings that are cached.

        Args:
            made_by: The encoder that made them, by its ``identity`` and, as ``weights``, its
                ``fingerprint``.
            known: The embeddings of ``""`` and of the texts that are sampled meanwhile, each
                (tokens, channels).

        Raises:
            UserError: This model's encoder is another.
        """
        check_maker(made_by, self.encoder.identity(), self._build_encoder, EMBEDDED_BY_ANOTHER)
        self._known = {**(self._known or {}), **known}

    def encode(self, samples: Sequence[VideoSample]) -> dict[str, Tensor]:
        embeddings = [sample.get("text_embedding") for sample in samples]
        missing = [i for i, embedding in enumerate(embeddings) if embedding is None]
        texts = [samples[i].get("text") for i in missing]
        if None in texts:
            raise UserError(
                "a clip, or an image beside one, has neither text nor text_embedding, which a "
                "model of texts needs: take a dataset with captions"
            )
        if texts:
            for i, state in zip(missing, self._states(texts), strict=True):
                embeddings[i] = state
        place = self._empty() if texts else embeddings[0]
        return {"text": torch.stack([made.to(place) for made in embeddings])}

    def null(self, batch: int) -> dict[str, Tensor]:
        return {"text": self._empty().expand(batch, -1, -1)}

    def _empty(self) -> Tensor:
        """The embedding of the empty text, made once."""
        if self._null is None:
            self._null = self._states([""])[0]
        return self._null

    def _states(self, texts: Sequence[str]) -> Sequence[Tensor]:
        if self._known is None:
            return self.encoder(texts)[0]
        for text in texts:
            if text not in self._known:
                raise UserError(
                    f"the cache has no embedding of {text!r}; run tools/extract_features.py "
                    "again on a config whose SampleHook has it among its prompts"
                )
        return [self._known[text] for text in texts]
