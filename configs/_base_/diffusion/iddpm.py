"""iDDPM as DiT and Latte train and sample it: noise, learned variance, 250 ancestral steps."""

from mmsora.diffusion import (
    Ancestral,
    ClassifierFree,
    Diffusion,
    DiscretePath,
    Hybrid,
    LearnedRange,
    NoisePrediction,
    SpacedGrid,
    UniformTimes,
)

diffusion = dict(
    type=Diffusion,
    path=dict(type=DiscretePath, betas="linear", num_levels=1000),
    prediction=dict(type=LearnedRange, mean=dict(type=NoisePrediction)),
    train_times=dict(type=UniformTimes),
    solver=dict(type=Ancestral),
    grid=dict(type=SpacedGrid, num_steps=250),
    guidance=dict(type=ClassifierFree, scale=4.0),
    loss=dict(type=Hybrid),
)
