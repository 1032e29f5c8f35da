"""Conditions that are seen in the clip itself."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmsora.models.conditioners.conditioner import Conditioner, images_beside
from mmsora.structures.video_sample import OF_IMAGES, VideoSample
from mmsora.utils.draws import Draws
from mmsora.utils.made_by import check_maker

__all__ = ["LookingConditioner", "lookers"]


class LookingConditioner(Conditioner):
    """One that an encoder of its own shows the clips of training.

    What it sees stands in a field of the annotation, where a cache or the user may have put it
    before; then the encoder is not asked.

    Args:
        drop_prob: Probability that training takes a sample's condition away.
    """

    field: str  # of the annotation
    encoder: Any

    def __init__(self, drop_prob: float) -> None:
        super().__init__(drop_prob)
        self._is_told = False  # what it would see

    @abstractmethod
    def build_encoder(self) -> nn.Module:
        """The encoder, anew and without its weights."""

    @abstractmethod
    def see(
        self, videos: Tensor, samples: Sequence[VideoSample], draws: Draws | None = None
    ) -> Sequence[Tensor]:
        """What there is to see.

        Args:
            videos: (B, C, T, H, W) in [-1, 1].
            samples: Their annotations.
            draws: The batch's random numbers while training.

        Returns:
            Of each clip.
        """

    def identity(self) -> dict[str, Any]:
        """What is seen depends on this besides the encoder's weights; plain values."""
        return self.encoder.identity()

    def fingerprint(self) -> str:
        """A hash of the encoder's weights."""
        return self.encoder.fingerprint()

    def init_weights(self) -> None:
        """The encoder's, unless a cache stands in for it."""
        if not self._is_told:
            self.encoder.init_weights()

    @torch.no_grad()
    def look(
        self, videos: Tensor, samples: Sequence[VideoSample], draws: Draws | None = None
    ) -> None:
        """Give each sample what there is to see, unless it has that.

        Args:
            videos: (B, C, T, H, W) in [-1, 1].
            samples: Their annotations.
            draws: The batch's random numbers while training.
        """
        if all(sample.get(self.field) is not None for sample in samples):
            return
        for field, seen in self.see_all(videos, samples, draws).items():
            for sample, value in zip(samples, seen, strict=True):
                if sample.get(field) is None:
                    setattr(sample, field, value)

    def see_all(
        self, videos: Tensor, samples: Sequence[VideoSample], draws: Draws | None = None
    ) -> dict[str, Sequence[Tensor]]:
        """What there is to see in clips, and in the images beside them.

        Args:
            videos: (B, C, T, H, W) in [-1, 1].
            samples: Their annotations.
            draws: The batch's random numbers while training.

        Returns:
            Of each sample, by the fields that it goes to.
        """
        images = images_beside(samples)
        frames = videos.shape[2] - images
        seen = {self.field: self.see(videos[:, :, :frames], samples, draws)}
        if images:
            none = [VideoSample() for _ in samples]
            each = [
                self.see(frame[:, :, None], none, draws)
                for frame in videos[:, :, frames:].unbind(2)
            ]
            seen[OF_IMAGES[self.field]] = [torch.stack(own) for own in zip(*each, strict=True)]
        return seen

    def train_on_seen(self, made_by: dict[str, Any]) -> None:
        """Do without the encoder: training gets what it saw from a cache.

        Args:
            made_by: What saw it, by its ``identity`` and, as ``weights``, its ``fingerprint``.

        Raises:
            UserError: That was another.
        """
        check_maker(
            made_by,
            self.identity(),
            self.build_encoder,
            f"the cache's {self.field} was made by another encoder than model.conditioner's",
        )
        self._is_told = True


def lookers(conditioner: nn.Module | None) -> list[LookingConditioner]:
    """The parts of a conditioner that look at clips.

    Args:
        conditioner: It, or None.

    Returns:
        The parts, the conditioner itself among them.
    """
    parts = [] if conditioner is None else conditioner.modules()
    return [part for part in parts if isinstance(part, LookingConditioner)]
