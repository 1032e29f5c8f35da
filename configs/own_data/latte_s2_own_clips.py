"""A small Latte on clips of your own, in whatever layout they are, without classes or captions.

Lay the clips out as docs/en/data.md says, the plainest way being ``data/own/metadata.csv`` with
the columns path and text. Then:

    python tools/train.py configs/own_data/latte_s2_own_clips.py

Other layouts by the class that reads them and the folder, as that page lists them:

    --cfg-options train_dataloader.dataset.type=TarVideos
        train_dataloader.dataset.data_root=data/shards

Recipe: our own: rectified flow, 16 frames of 256 x 256 pixels, AdamW at 1e-4, EMA 0.9999, 100,000
updates of 20 clips, for one GPU. Hardware: one GPU; unmeasured. Expected: unmeasured.
"""

from mmengine.config import read_base
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
from mmsora.models import FrameVAE, LatentDiffusion, Latte, VideoPreprocessor

with read_base():
    from .._base_.datasets.captioned_16x256 import *
    from .._base_.default_runtime import *

train_dataloader.update(batch_size=20)
model = dict(
    type=LatentDiffusion,
    data_preprocessor=dict(type=VideoPreprocessor),
    vae=dict(type=FrameVAE, pretrained="stabilityai/sd-vae-ft-ema"),
    denoiser=dict(
        type=Latte,
        in_channels=4,
        out_channels=4,
        size=(16, 32, 32),
        patch=2,
        width=384,
        depth=12,
        heads=6,
    ),
    diffusion=dict(
        type=Diffusion,
        path=dict(type=LinearPath),
        prediction=dict(type=VelocityPrediction),
        train_times=dict(type=LogitNormalTimes),
        solver=dict(type=Euler),
        grid=dict(type=SpacedGrid, num_steps=50),
        guidance=dict(type=ClassifierFree, scale=1.0),
        loss=dict(type=MSE),
    ),
)

train_cfg = dict(by_epoch=False, max_iters=100_000)
optim_wrapper = dict(
    type=AutocastOptimWrapper,
    precision="bf16",
    optimizer=dict(type=AdamW, lr=1e-4, weight_decay=0.0, fused=True),
    clip_grad=dict(max_norm=1.0),
)
default_hooks.checkpoint.interval = 5000
custom_hooks = [
    dict(type=DenoiserEMAHook, decay=0.9999),
    dict(type=SampleHook, interval=5000, num_samples=4),
]
