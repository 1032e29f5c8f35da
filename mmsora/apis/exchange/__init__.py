"""Checkpoints looked at, compared, and taken to other formats and back."""

from mmsora.apis.exchange.compare import Comparison, compare
from mmsora.apis.exchange.formats import (
    FORMATS,
    export_weights,
    import_weights,
    public_weights,
)
from mmsora.apis.exchange.overview import listing, overview, overview_lines
from mmsora.apis.exchange.stored import Stored

__all__ = [
    "FORMATS",
    "Comparison",
    "Stored",
    "compare",
    "export_weights",
    "import_weights",
    "listing",
    "overview",
    "overview_lines",
    "public_weights",
]
