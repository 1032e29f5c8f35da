"""What a frozen encoder of images is to the rest of the toolbox."""

from abc import abstractmethod

from torch import Tensor, nn

__all__ = ["ImageEncoder"]


class ImageEncoder(nn.Module):
    """From images to a grid of features. It is frozen; weights arrive in ``init_weights``.

    Args:
        width: Width of the features.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def init_weights(self) -> None:
        """Load pretrained weights. Building reads no file."""

    def train(self, mode: bool = True) -> "ImageEncoder":
        """Stay in eval mode: the encoder is frozen."""
        return super().train(False)

    @abstractmethod
    def forward(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Encode.

        Args:
            images: (N, C, H, W) in [-1, 1].
            grid: Rows and columns that would be best.

        Returns:
            (N, width, rows, columns), of any grid.
        """
