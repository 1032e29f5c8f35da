"""The mathematics of diffusion. Knows no network: anything ``network(x, clock, **cond)`` will do.

One equation carries every method: ``x_t = alpha x0 + sigma noise``, and one flow:
``dx = x0 d(alpha) + noise d(sigma)``.
"""

from mmsora.utils.discovery import exports

_found = exports(__name__, __path__)
globals().update(_found)
__all__ = sorted(_found)
