"""The process of StableCascade's stage B (arXiv:2306.00637): that of stage C but for noise of many
scales in training, less guidance, and 10 even steps.
"""

from mmsora.diffusion import (
    MSE,
    Adaptive,
    Ancestral,
    ClassifierFree,
    CosinePath,
    Diffusion,
    NoisePrediction,
    PyramidNoise,
    SpacedGrid,
    UniformTimes,
)

diffusion = dict(
    type=Diffusion,
    path=dict(type=CosinePath),
    prediction=dict(type=NoisePrediction),
    train_times=dict(type=UniformTimes),
    solver=dict(type=Ancestral),
    grid=dict(type=SpacedGrid, num_steps=10),
    guidance=dict(type=ClassifierFree, scale=1.1, rescale=0.7),
    loss=dict(type=MSE, weighting=dict(type=Adaptive)),
    train_noise=dict(type=PyramidNoise, decay=0.75, largest=16),
)
