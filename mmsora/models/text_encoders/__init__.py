"""Text encoders: frozen networks from captions to states. A new one is a file here."""

from mmsora.utils.discovery import exports

_found = exports(__name__, __path__)
globals().update(_found)
__all__ = sorted(_found)
