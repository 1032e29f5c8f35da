"""Networks, and the model that puts them together."""

from mmsora.utils.discovery import exports

_found: dict[str, object] = {}
for _package in ("alignments", "conditioners", "denoisers", "text_encoders", "vaes"):
    _found |= exports(f"{__name__}.{_package}", [f"{__path__[0]}/{_package}"])
_found |= exports(__name__, __path__)
globals().update(_found)
__all__ = sorted(_found)
