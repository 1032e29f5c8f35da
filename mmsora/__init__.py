"""MMSora: a toolbox for video diffusion."""

from mmsora.version import __version__

__all__ = ["__version__"]
