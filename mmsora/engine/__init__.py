"""The training system on top of MMEngine: runner, optimizer wrapper, hooks."""

from mmsora.utils.discovery import exports

_found = exports(f"{__name__}.hooks", [f"{__path__[0]}/hooks"])
_found |= exports(__name__, __path__)
globals().update(_found)
__all__ = sorted(_found)
