"""Will it fit? What a config needs and how long it trains, found without a GPU."""

from mmsora.apis.estimate.advice import Advice, advise, fits, refuse_what_cannot_fit
from mmsora.apis.estimate.total import Estimate, changed, estimate, largest_batch

__all__ = [
    "Advice",
    "Estimate",
    "advise",
    "changed",
    "estimate",
    "fits",
    "largest_batch",
    "refuse_what_cannot_fit",
]
