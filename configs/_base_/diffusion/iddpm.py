"""iDDPM as DiT and Latte train it: noise and a learned variance on a table of levels.

It samples by UniPC in 25 network calls, which ``tools/benchmark.py samplers`` chose; the papers'
250 ancestral steps are the sampler ``paper``, and ``fine`` takes twice the default.
"""

from mmsora.diffusion import (
    ClassifierFree,
    Diffusion,
    DiscretePath,
    Hybrid,
    LearnedRange,
    LogSNRGrid,
    NoisePrediction,
    UniformTimes,
    UniPC,
)

diffusion = dict(
    type=Diffusion,
    path=dict(type=DiscretePath, betas="linear", num_levels=1000),
    prediction=dict(type=LearnedRange, mean=dict(type=NoisePrediction)),
    train_times=dict(type=UniformTimes),
    solver=dict(type=UniPC),
    grid=dict(type=LogSNRGrid, num_steps=25, ratio_min=0.02),
    guidance=dict(type=ClassifierFree, scale=4.0),
    loss=dict(type=Hybrid),
)
samplers = {
    "paper": {
        "model.diffusion.solver": dict(type="Ancestral"),
        "model.diffusion.grid": dict(type="SpacedGrid", num_steps=250),
    },
    "fine": {
        "model.diffusion.solver": dict(type="UniPC"),
        "model.diffusion.grid": dict(type="LogSNRGrid", num_steps=50),
    },
}
