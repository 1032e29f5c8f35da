"""VAEs: from video to latent and back. A new one is a file here: it is found by looking."""

from mmsora.utils.discovery import exports

_found = exports(__name__, __path__)
globals().update(_found)
__all__ = sorted(_found)
