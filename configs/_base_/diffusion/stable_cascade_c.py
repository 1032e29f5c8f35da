"""The process of StableCascade's stage C (arXiv:2306.00637).

The squared cosine in continuous time, a prediction of the noise whose errors count alike at all
levels, guidance that goes back 70 % of the way to the conditional output's deviation, and 20 steps
of DDPM's sampler, moved towards noise.
"""

from mmsora.diffusion import (
    MSE,
    Adaptive,
    Ancestral,
    ClassifierFree,
    CosinePath,
    Diffusion,
    NoisePrediction,
    ShiftedSNRGrid,
    UniformTimes,
)

diffusion = dict(
    type=Diffusion,
    path=dict(type=CosinePath),
    prediction=dict(type=NoisePrediction),
    train_times=dict(type=UniformTimes),
    solver=dict(type=Ancestral),
    grid=dict(type=ShiftedSNRGrid, num_steps=20, shift=2.0),
    guidance=dict(type=ClassifierFree, scale=4.0, rescale=0.7),
    loss=dict(type=MSE, weighting=dict(type=Adaptive)),
)
