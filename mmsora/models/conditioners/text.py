"""Captions."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmsora.models.conditioners.conditioner import Conditioner
from mmsora.models.text_encoders.text_encoder import TextEncoder
from mmsora.registry import CONDITIONERS, TEXT_ENCODERS
from mmsora.structures.video_sample import VideoSample
from mmsora.utils.user_error import UserError

__all__ = ["TextConditioner"]


@CONDITIONERS.register_module()
class TextConditioner(Conditioner):
    """Gives ``text=``, (B, tokens, channels), and ``image_text=``; the empty text stands for none.

    The embeddings are the samples' ``text_embedding`` where they have one, as from a cache, and
    made of their ``text`` where not.

    Args:
        encoder: Config of a :class:`TextEncoder`.
        drop_prob: Probability that training replaces a text by none.
    """

    encoder: TextEncoder

    def __init__(self, encoder: dict, drop_prob: float = 0.1) -> None:
        super().__init__(drop_prob)
        self.encoder = TEXT_ENCODERS.build(encoder)
        self.encoder.requires_grad_(False)
        self._null: Tensor | None = None

    def init_weights(self) -> None:
        """Load the encoder's weights."""
        self.encoder.init_weights()

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
            states, _ = self.encoder(texts)
            for i, state in zip(missing, states, strict=True):
                embeddings[i] = state
        place = self._empty() if texts else embeddings[0]
        return {"text": torch.stack([made.to(place) for made in embeddings])}

    def null(self, batch: int) -> dict[str, Tensor]:
        return {"text": self._empty().expand(batch, -1, -1)}

    def _empty(self) -> Tensor:
        """The embedding of the empty text, made once."""
        if self._null is None:
            self._null = self.encoder([""])[0][0]
        return self._null
