"""Captions as StableCascade is told them."""

from collections.abc import Sequence

from torch import Tensor

from mmsora.models.conditioners.text import TextConditioner
from mmsora.registry import CONDITIONERS
from mmsora.structures.video_sample import VideoSample

__all__ = ["PooledTextConditioner"]


@CONDITIONERS.register_module()
class PooledTextConditioner(TextConditioner):
    """Gives ``text=``, (B, tokens, channels), and ``text_pooled=``, (B, channels).

    The empty text stands for none. With embeddings and caches it is as :class:`TextConditioner`.

    Args:
        encoder: Config of a :class:`TextEncoder` whose last state is of the whole text, as
            :class:`CLIPTextPooled`.
        drop_prob: Probability that training replaces a text by none.
        states: Give the states of the tokens too; stage B is told the whole text alone.
    """

    def __init__(self, encoder: dict, drop_prob: float = 0.05, states: bool = True) -> None:
        super().__init__(encoder, drop_prob)
        self.states = states

    def encode(self, samples: Sequence[VideoSample]) -> dict[str, Tensor]:
        return self._parted(super().encode(samples))

    def null(self, batch: int) -> dict[str, Tensor]:
        return self._parted(super().null(batch))

    def _parted(self, told: dict[str, Tensor]) -> dict[str, Tensor]:
        states, pooled = told["text"][:, :-1], told["text"][:, -1]
        return {"text": states, "text_pooled": pooled} if self.states else {"text_pooled": pooled}
