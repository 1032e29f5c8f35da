"""Parts of a diffusion process that do what a test says."""

import torch

from mmsora import diffusion as D


class At(D.Times):
    """Given times, or a given fraction of the way."""

    def __init__(self, t=None, fraction=None):
        self.t, self.fraction = t, fraction

    def __call__(self, path, draws):
        return self.quantile(path, self.fraction) if self.t is None else self.t

    def quantile(self, path, fraction):
        return path.time_at(torch.as_tensor(fraction, dtype=torch.float64))
