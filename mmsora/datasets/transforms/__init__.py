"""Transforms: the steps of a dataset's pipeline. A new one is a file here: it is found by looking.

A transform gets and returns the dict ``results`` of one sample. Datasets of files put in ``path``,
``label``, ``index`` (the sample's global number), ``draws`` (its random numbers) and
``test_mode``; ``frames`` is uint8 (T, H, W, 3), RGB. None instead of a dict refuses the sample,
and ``results["refused"]`` may say why.
"""

from mmsora.utils.discovery import exports

_found = exports(__name__, __path__)
globals().update(_found)
__all__ = sorted(_found)
