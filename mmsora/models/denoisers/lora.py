"""Low-rank additions to a trained denoiser (Hu et al. 2021, arXiv:2106.09685)."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from mmsora.registry import DENOISERS
from mmsora.utils.user_error import UserError

__all__ = ["LoRA"]

ADDITION = "default"  # peft's name of it


@DENOISERS.register_module()
class LoRA(nn.Module):
    """A frozen denoiser, to chosen layers of which peft adds ``alpha / rank`` times a product of
    two thin matrices. They alone are trained; to begin with they add nothing.

    Args:
        denoiser: Config of the denoiser. Files of its weights are loaded as without additions.
        modules: Names of its linear layers and convolutions, as a regular expression that matches
            them whole.
        rank: Inner width of the product.
        alpha: Strength of the additions.
    """

    def __init__(self, denoiser: dict, modules: str, rank: int = 4, alpha: float = 1.0) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        self.base: nn.Module = DENOISERS.build(denoiser)
        _check_layers(self.base, modules)
        peft = _peft()
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=modules)
        peft.inject_adapter_in_model(config, self.base, ADDITION)  # freezes all else

    def __getattr__(self, name: str) -> Any:
        """What else is asked of a denoiser, the one within answers."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or name == "base":
                raise
            return getattr(self.base, name)

    def forward(self, x: Tensor, clock: Tensor, **cond: Any) -> Tensor:
        """Predict.

        Args:
            x: Noisy latents, (B, in_channels, T, H, W).
            clock: What the diffusion process tells of its time, (B,).
            **cond: What the denoiser is told.

        Returns:
            (B, out_channels, T, H, W).
        """
        return self.base(x, clock, **cond)

    @contextmanager
    def bare(self) -> Iterator[nn.Module]:
        """Within the block the denoiser is without additions, and weights have its own names."""
        layers = self._layers()
        for name, layer in layers.items():
            self._put(name, layer.base_layer)
        try:
            yield self.base
        finally:
            for name, layer in layers.items():
                self._put(name, layer)

    def merged(self) -> dict[str, Tensor]:
        """A state dict of the denoiser alone, with the additions in its weights."""
        added = {
            f"{name}.weight": layer.get_delta_weight(ADDITION)
            for name, layer in self._layers().items()
        }
        with self.bare() as base:
            state = base.state_dict()
        return {key: value + added[key] if key in added else value for key, value in state.items()}

    def _layers(self) -> dict[str, Any]:
        """peft's layers by the names of those that they stand for."""
        kind = _peft().tuners.lora.LoraLayer
        return {name: part for name, part in self.base.named_modules() if isinstance(part, kind)}

    def _put(self, name: str, layer: nn.Module) -> None:
        parent, _, child = name.rpartition(".")
        setattr(self.base.get_submodule(parent), child, layer)


def _check_layers(denoiser: nn.Module, modules: str) -> None:
    names = [name for name, _ in denoiser.named_modules() if name]
    found = [name for name in names if re.fullmatch(modules, name)]
    if not found:
        raise ValueError(
            f"modules={modules!r} matches no module of {type(denoiser).__name__}; there are "
            f"{', '.join(names[:3])}, ..., {names[-1]}"
        )
    for name in found:
        part = denoiser.get_submodule(name)
        if not isinstance(part, nn.Linear | nn.Conv2d):
            raise ValueError(
                f"modules={modules!r} matches {name}, a {type(part).__name__}; additions are to "
                "linear layers and convolutions"
            )


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise UserError("LoRA needs peft: pip install peft") from error
    return peft
