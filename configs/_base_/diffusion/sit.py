"""SiT's process: a straight path, its velocity, and 250 steps of its stochastic sampler.

SiT's networks count time from noise to data, and so does the velocity that they output.
"""

from mmsora.diffusion import (
    MSE,
    ClassifierFree,
    Diffusion,
    EulerMaruyama,
    LinearPath,
    SpacedGrid,
    UniformTimes,
    VelocityPrediction,
)

diffusion = dict(
    type=Diffusion,
    path=dict(type=LinearPath, clock_scale=1.0, reverse_clock=True),
    prediction=dict(type=VelocityPrediction, sign=-1),
    train_times=dict(type=UniformTimes),
    solver=dict(type=EulerMaruyama, diffusion="sigma", last_step="mean"),
    grid=dict(type=SpacedGrid, num_steps=250, last_step=0.04),
    guidance=dict(type=ClassifierFree, scale=4.0),
    loss=dict(type=MSE),
)
