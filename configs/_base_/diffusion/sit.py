"""SiT's process: a straight path and its velocity.

SiT's networks count time from noise to data, and so does the velocity that they output. It samples
by the midpoint rule in 24 network calls, which ``tools/benchmark.py samplers`` chose; the paper's
250 stochastic steps are the sampler ``paper``, and ``fine`` takes twice the default.
"""

from mmsora.diffusion import (
    MSE,
    ClassifierFree,
    Diffusion,
    LinearPath,
    Midpoint,
    SpacedGrid,
    UniformTimes,
    VelocityPrediction,
)

diffusion = dict(
    type=Diffusion,
    path=dict(type=LinearPath, clock_scale=1.0, reverse_clock=True),
    prediction=dict(type=VelocityPrediction, sign=-1),
    train_times=dict(type=UniformTimes),
    solver=dict(type=Midpoint),
    grid=dict(type=SpacedGrid, num_steps=12),
    guidance=dict(type=ClassifierFree, scale=4.0),
    loss=dict(type=MSE),
)
samplers = {
    "paper": {
        "model.diffusion.solver": dict(type="EulerMaruyama", diffusion="sigma", last_step="mean"),
        "model.diffusion.grid": dict(type="SpacedGrid", num_steps=250, last_step=0.04),
    },
    "fine": {
        "model.diffusion.solver": dict(type="Midpoint"),
        "model.diffusion.grid": dict(type="SpacedGrid", num_steps=25),
    },
}
