"""Class labels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmsora.models.conditioners.conditioner import Conditioner
from mmsora.registry import CONDITIONERS
from mmsora.structures.video_sample import VideoSample
from mmsora.utils.user_error import UserError

__all__ = ["LabelConditioner"]


@CONDITIONERS.register_module()
class LabelConditioner(Conditioner):
    """Gives ``label=``, (B,), and ``image_label=``; ``num_classes`` stands for none.

    Args:
        num_classes: Number of classes.
        drop_prob: Probability that training replaces a label by none.
    """

    def __init__(self, num_classes: int, drop_prob: float = 0.1) -> None:
        super().__init__(drop_prob)
        self.num_classes = num_classes

    def encode(self, samples: Sequence[VideoSample]) -> dict[str, Tensor]:
        labels = [sample.get("label") for sample in samples]
        for label in labels:
            if label is None:
                raise UserError(
                    "a clip, or an image beside one, has no label, which a class-conditional "
                    "model needs: take a dataset of class folders, or one whose images have "
                    "classes"
                )
            if not 0 <= label < self.num_classes:
                raise ValueError(
                    f"label {label} is out of range: the model knows {self.num_classes} classes, "
                    f"0 to {self.num_classes - 1}"
                )
        return {"label": torch.tensor(labels)}

    def null(self, batch: int) -> dict[str, Tensor]:
        return {"label": torch.full((batch,), self.num_classes)}
