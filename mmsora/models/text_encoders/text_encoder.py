"""What a frozen encoder of texts is to the rest of the toolbox."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from mmsora.utils.feature_store import checksum

__all__ = ["TextEncoder"]


class TextEncoder(nn.Module):
    """From texts to a state for each token. It is frozen; weights arrive in ``init_weights``.

    Args:
        length: Tokens that every text is cut or padded to.
        width: Width of the states.
    """

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.length, self.width = length, width

    def init_weights(self) -> None:
        """Load pretrained weights. Building reads no file."""

    def train(self, mode: bool = True) -> "TextEncoder":
        """Stay in eval mode: the encoder is frozen."""
        return super().train(False)

    def identity(self) -> dict[str, Any]:
        """What states depend on, in plain values; ``source`` is where the weights come from.

        A cache of embeddings keeps it with ``fingerprint``, and is taken by no other encoder.
        """
        return {"type": type(self).__name__, "length": self.length, "width": self.width}

    def fingerprint(self) -> str:
        """A hash of the weights, and of what else was read, that states depend on."""
        return checksum(self.state_dict())

    @abstractmethod
    def forward(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Encode.

        Args:
            texts: B texts; ``""`` is what a network hears when nothing is said.

        Returns:
            States (B, length, width) in float32, and which tokens are the text's own, (B, length)
            in bool.
        """
