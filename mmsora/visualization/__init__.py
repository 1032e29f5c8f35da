"""Pictures of clips, to be looked at. A new kind is a file here: it is found by looking."""

from mmsora.utils.discovery import exports

_found = exports(__name__, __path__)
globals().update(_found)
__all__ = sorted(_found)
