"""SiT-S/2 on ImageNet at 256 x 256 pixels: the smallest of SiT's sizes (arXiv:2401.08740).

    bash tools/dist_train.sh configs/sit/sit_s2_imagenet_256.py 8

DiT-S/2 with another process: only ``diffusion`` and ``out_channels`` differ.

Recipe: that of sit_xl2_imagenet_256.py, for the 400,000 iterations of the paper's comparison, with
its paths and predictions. Other sizes by --cfg-options: B is model.denoiser.width=768
model.denoiser.heads=12, L model.denoiser.width=1024 model.denoiser.depth=24
model.denoiser.heads=16.
Hardware: one GPU or more; the batch is for 8. Expected: FID 33.0 for SiT-B/2 without guidance
after 400,000 iterations (34.7 by the flow instead of the stochastic sampler, a user measured); for
S we know of none. We measured none. Layouts as for DiT-S/2: 8xa100 9 hours, 2xa100 and 4xa6000 35,
1x4090 133.
"""

from mmengine.config import read_base
from torch.optim import AdamW

from mmsora.engine import AutocastOptimWrapper, DenoiserEMAHook, SampleHook
from mmsora.models import DiT, FrameVAE, LabelConditioner, LatentDiffusion, VideoPreprocessor

with read_base():
    from .._base_.datasets.imagenet_256 import *
    from .._base_.default_runtime import *
    from .._base_.diffusion.sit import *

diffusion.guidance.channels = 3
model = dict(
    type=LatentDiffusion,
    data_preprocessor=dict(type=VideoPreprocessor),
    vae=dict(type=FrameVAE, pretrained="stabilityai/sd-vae-ft-ema"),
    conditioner=dict(type=LabelConditioner, num_classes=1000, drop_prob=0.1),
    denoiser=dict(
        type=DiT,
        in_channels=4,
        out_channels=4,
        size=(1, 32, 32),
        patch=2,
        width=384,
        depth=12,
        heads=6,
        num_classes=1000,
    ),
    diffusion=diffusion,
)

train_cfg = dict(by_epoch=False, max_iters=400_000)
optim_wrapper = dict(
    type=AutocastOptimWrapper,
    precision="bf16",
    optimizer=dict(type=AdamW, lr=1e-4, weight_decay=0.0, fused=True),
)
auto_scale_lr = dict(base_batch_size=256, enable=False)
default_hooks.checkpoint.interval = 50_000
custom_hooks = [
    dict(type=DenoiserEMAHook, decay=0.9999, warmup=False),
    dict(type=SampleHook, interval=10_000, labels=[207, 360, 387, 974, 88, 979, 417, 279]),
]

layouts = {
    "8xa100": {"train_dataloader.batch_size": 32},
    "4xa6000": {"train_dataloader.batch_size": 64},
    "2xa100": {"train_dataloader.batch_size": 128},
    "1x4090": {"train_dataloader.batch_size": 256},
}
