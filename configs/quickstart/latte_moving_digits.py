"""A small Latte learns to draw moving digits: the quickstart.

Rectified flow on pixels, class-conditional, 1.9 M parameters.

    bash tools/quickstart.sh
    python tools/train.py configs/quickstart/latte_moving_digits.py

Recipe: our own. Hardware: any; two CPU cores will do. Expected: of 200 sampled clips at least 90 %
are read as the digit asked for. ``tools/quickstart.sh`` fits the iterations to its time budget
and writes what was reached to ``work_dirs/quickstart/report.json``.
"""

from mmengine.config import read_base
from mmengine.optim import CosineAnnealingLR, LinearLR
from torch.optim import AdamW

from mmsora.diffusion import (
    MSE,
    ClassifierFree,
    Diffusion,
    Euler,
    LinearPath,
    LogitNormalTimes,
    SpacedGrid,
    VelocityPrediction,
)
from mmsora.engine import AutocastOptimWrapper, DenoiserEMAHook, SampleHook
from mmsora.models import IdentityVAE, LabelConditioner, LatentDiffusion, Latte, VideoPreprocessor

with read_base():
    from .._base_.datasets.moving_digits_8x16 import *
    from .._base_.default_runtime import *

model = dict(
    type=LatentDiffusion,
    data_preprocessor=dict(type=VideoPreprocessor),
    vae=dict(type=IdentityVAE),
    conditioner=dict(type=LabelConditioner, num_classes=num_classes, drop_prob=0.1),
    denoiser=dict(
        type=Latte,
        in_channels=1,
        out_channels=1,
        size=(8, 16, 16),
        patch=4,
        width=128,
        depth=6,
        heads=4,
        num_classes=num_classes,
    ),
    diffusion=dict(
        type=Diffusion,
        path=dict(type=LinearPath),
        prediction=dict(type=VelocityPrediction),
        train_times=dict(type=LogitNormalTimes),
        solver=dict(type=Euler),
        grid=dict(type=SpacedGrid, num_steps=25),
        guidance=dict(type=ClassifierFree, scale=2.0),
        loss=dict(type=MSE),
    ),
)

max_iters = 4000
train_cfg = dict(by_epoch=False, max_iters=max_iters)
optim_wrapper = dict(
    type=AutocastOptimWrapper,
    precision="off",
    optimizer=dict(type=AdamW, lr=3e-3, betas=(0.9, 0.99), weight_decay=0.0, fused=True),
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = [
    dict(type=LinearLR, start_factor=0.01, by_epoch=False, begin=0, end=200),
    dict(type=CosineAnnealingLR, by_epoch=False, begin=200, end=max_iters, eta_min=1e-5),
]
custom_hooks = [
    dict(type=DenoiserEMAHook, decay=0.999),
    dict(type=SampleHook, interval=1000, labels=list(range(10))),
]
