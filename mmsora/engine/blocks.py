"""The blocks that a denoiser is made of: the units of recomputation and of sharding."""

from collections.abc import Iterator

from torch import nn

__all__ = ["blocks_of"]


def blocks_of(denoiser: nn.Module) -> list[tuple[str, nn.Module]]:
    """What the outermost lists of modules hold, such as the blocks of a transformer.

    A list within a list, as the levels of a UNet often are, is gone through; a list within a block
    is the block's own affair. A single layer, as ``nn.Linear``, is no block.

    Args:
        denoiser: The network, or any module.

    Returns:
        Name within the network and module of each block, in the order in which they were made.
    """
    return list(_blocks_in(denoiser, "", is_entry=False))


def _blocks_in(module: nn.Module, name: str, is_entry: bool) -> Iterator[tuple[str, nn.Module]]:
    is_list = isinstance(module, nn.ModuleList)
    if is_entry and not is_list:
        if any(True for _ in module.children()):
            yield name, module
        return
    for key, child in module.named_children():
        yield from _blocks_in(child, f"{name}.{key}" if name else key, is_entry=is_list)
