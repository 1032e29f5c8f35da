"""Embeddings that were made before, so that no encoder is needed."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmsora.models.text_encoders.text_encoder import TextEncoder
from mmsora.registry import TEXT_ENCODERS
from mmsora.utils.atomic import atomic_path
from mmsora.utils.feature_store import checksum
from mmsora.utils.user_error import UserError

__all__ = ["CachedText", "save_texts"]


@TEXT_ENCODERS.register_module()
class CachedText(TextEncoder):
    """Knows the texts of one file, as :func:`save_texts` writes it, and no other.

    For training on samples with a ``text_embedding`` of their own it needs no text but the empty
    one; prompts to sample are to be in the file too.

    Args:
        file: A safetensors file.
        length: Tokens of a text.
        width: Width of the states.
    """

    states: Tensor
    mask: Tensor

    def __init__(self, file: str, length: int = 77, width: int = 768) -> None:
        super().__init__(length, width)
        self.file = file
        self.register_buffer("states", torch.zeros(0, length, width), persistent=False)
        self.register_buffer("mask", torch.zeros(0, length, dtype=torch.bool), persistent=False)
        self._places: dict[str, int] = {}

    def init_weights(self) -> None:
        """Read the file.

        Raises:
            UserError: It is missing, no such file, of another size or without the empty text.
        """
        if not Path(self.file).is_file():
            raise UserError(
                f"there is no file {self.file} of texts' embeddings; write it with "
                "mmsora.models.save_texts, or set model.conditioner.encoder.file"
            )
        try:
            with safe_open(self.file, "pt") as content:
                texts = json.loads((content.metadata() or {})["texts"])
                states, mask = content.get_tensor("states"), content.get_tensor("mask")
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise UserError(f"{self.file} holds no embeddings of texts: {error}") from error
        if states.shape[1:] != (self.length, self.width):
            raise UserError(
                f"{self.file} holds embeddings of {states.shape[1]} tokens and "
                f"{states.shape[2]} channels, the config says length={self.length} and "
                f"width={self.width}"
            )
        if "" not in texts:
            raise UserError(f"{self.file} lacks the empty text, which stands for none")
        self._places = {text: place for place, text in enumerate(texts)}
        self.states = states.float().to(self.states.device)
        self.mask = mask.to(self.mask.device)

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "source": self.file}

    def fingerprint(self) -> str:
        known = torch.tensor(list(json.dumps(list(self._places)).encode()), dtype=torch.uint8)
        return checksum({"states": self.states, "mask": self.mask, "texts": known})

    def forward(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        missing = [text for text in texts if text not in self._places]
        if missing:
            raise UserError(
                f"{self.file} has no embedding of {missing[0]!r}; take one of its "
                f"{len(self._places)} texts, or a text encoder in place of CachedText"
            )
        places = [self._places[text] for text in texts]
        return self.states[places], self.mask[places]


@torch.no_grad()
def save_texts(encoder: TextEncoder, texts: Sequence[str], file: str | Path) -> None:
    """Write the embeddings of texts, and of the empty one, for :class:`CachedText`.

    Args:
        encoder: With its weights.
        texts: Any texts; of equal ones there is one embedding.
        file: Where to; it is whole or not there.
    """
    known = list(dict.fromkeys(["", *texts]))
    made = [encoder([text]) for text in known]
    content = {
        "states": torch.cat([states for states, _ in made]).cpu(),
        "mask": torch.cat([mask for _, mask in made]).cpu(),
    }
    with atomic_path(Path(file)) as temporary:
        save_file(content, temporary, {"texts": json.dumps(known)})
