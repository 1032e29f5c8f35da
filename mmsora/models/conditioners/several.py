"""Several conditions at once."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mmsora.models.conditioners.conditioner import Conditioner
from mmsora.registry import CONDITIONERS
from mmsora.structures.video_sample import VideoSample
from mmsora.utils.draws import Draws

__all__ = ["SeveralConditioner"]


@CONDITIONERS.register_module()
class SeveralConditioner(Conditioner):
    """What several conditioners say. Each drops its own, and now and then all is dropped.

    Args:
        parts: Their configs by name. No two may say the same thing.
        drop_prob: Probability that training takes everything away, besides what each part drops.
    """

    def __init__(self, parts: Mapping[str, dict], drop_prob: float = 0.0) -> None:
        super().__init__(drop_prob)
        self.parts = nn.ModuleDict(
            {name: CONDITIONERS.build(part) for name, part in parts.items()}
        )

    @property
    def _parts(self) -> dict[str, Conditioner]:
        return dict(self.parts.items())  # type: ignore[arg-type]

    @property
    def takes_text(self) -> bool:
        """Whether a part is told texts."""
        return any(getattr(part, "takes_text", False) for part in self._parts.values())

    @property
    def num_classes(self) -> int:
        """Of the part that is told labels, or 0."""
        return max(getattr(part, "num_classes", 0) for part in self._parts.values())

    @property
    def encoder(self) -> nn.Module:
        """Of the part that is told texts."""
        return self._text.encoder

    def train_on_embeddings(self, made_by: dict[str, Any], known: Mapping[str, Tensor]) -> None:
        """As the part that is told texts does."""
        self._text.train_on_embeddings(made_by, known)

    @property
    def _text(self) -> Any:
        return next(p for p in self._parts.values() if getattr(p, "takes_text", False))

    def init_weights(self) -> None:
        """Those of the parts."""
        for part in self._parts.values():
            part.init_weights()

    def encode(self, samples: Sequence[VideoSample]) -> dict[str, Tensor]:
        return self._merged({name: part.encode(samples) for name, part in self._parts.items()})

    def null(self, batch: int) -> dict[str, Tensor]:
        return self._merged({name: part.null(batch) for name, part in self._parts.items()})

    def _told(
        self, samples: Sequence[VideoSample], draws: Draws | None, name: str
    ) -> dict[str, Tensor]:
        told = {
            key: part._told(samples, draws, f"{name}: {key}") for key, part in self._parts.items()
        }
        return self._dropped(self._merged(told), draws, name)

    @staticmethod
    def _merged(told: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        merged: dict[str, Tensor] = {}
        for part in told.values():
            for key, value in part.items():
                if key in merged:
                    raise ValueError(f"two of the parts {', '.join(told)} say {key}; remove one")
                merged[key] = value
        return merged
