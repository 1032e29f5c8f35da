"""Linear layers, initialised where they are made."""

from torch import nn

__all__ = ["linear"]


def linear(
    in_features: int, out_features: int, std: float | None = None, bias: bool = True
) -> nn.Linear:
    """A linear layer with zero bias, Xavier-uniform unless told otherwise.

    Args:
        in_features: Input width.
        out_features: Output width.
        std: Standard deviation of normal weights; 0 makes the layer zero.
        bias: Whether there is a bias.

    Returns:
        The layer.
    """
    layer = nn.Linear(in_features, out_features, bias)
    if bias:
        nn.init.zeros_(layer.bias)
    if std is None:
        nn.init.xavier_uniform_(layer.weight)
    elif std == 0:
        nn.init.zeros_(layer.weight)
    else:
        nn.init.normal_(layer.weight, std=std)
    return layer
