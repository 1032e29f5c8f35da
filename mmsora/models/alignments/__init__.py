"""What a denoiser's inner states are to resemble. A new encoder is a file here."""

from mmsora.utils.discovery import exports

_found = exports(__name__, __path__)
globals().update(_found)
__all__ = sorted(_found)
