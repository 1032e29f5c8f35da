"""What other programs call: build a model, sample from it."""

from mmsora.apis.build import build_model
from mmsora.apis.inferencer import Inferencer

__all__ = ["Inferencer", "build_model"]
