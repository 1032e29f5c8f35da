"""SiT-XL/2 on ImageNet at 256 x 256 pixels (Ma et al. 2024, arXiv:2401.08740).

    bash tools/dist_train.sh configs/sit/sit_xl2_imagenet_256.py 8 --layout 8xa100
    python tools/infer.py configs/sit/sit_xl2_imagenet_256.py --checkpoint SiT-XL-2-256x256.pt

DiT-XL/2 with another process: only ``diffusion`` and ``out_channels`` differ.

Recipe: the paper's and its public code's: AdamW at 1e-4, batch 256, EMA 0.9999, no clipping,
7 million iterations, the linear path and its velocity, 250 Euler-Maruyama steps
(``--sampler paper``), guidance on three of the four channels (4.0 for pictures, 1.5 for the
figures). Departure: bfloat16 where theirs is TF32. Further paths and predictions, by --cfg-options
with ``model.diffusion.`` before each: path.type=TrigPath (GVP) or VPPath; path.span=0.001,0.999
prediction._delete_=True prediction.type=NoisePrediction or ScorePrediction.
Hardware: 8 A100, or a layout below. Expected: FID 2.06, IS 270.27 with guidance 1.5 (README);
without guidance FID 17.2 after 400,000 iterations and 8.3 in the end. We measured none.
Layouts as for DiT-XL/2, for 400,000 updates: 8xa100 1.2 days, 2xa100 4.7, 4xa6000 5.8, 1x4090 22.
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
        width=1152,
        depth=28,
        heads=16,
        num_classes=1000,
    ),
    diffusion=diffusion,
)

train_cfg = dict(by_epoch=False, max_iters=7_000_000)
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

recompute = dict(mode="full")
layouts = {
    "8xa100": {"train_dataloader.batch_size": 32},
    "4xa6000": {
        "train_dataloader.batch_size": 32,
        "optim_wrapper.accumulative_counts": 2,
        "train_cfg.max_iters": 14_000_000,  # iterations are micro-batches
        "activation_checkpointing": recompute,
    },
    "2xa100": {"train_dataloader.batch_size": 128},
    "1x4090": {
        "train_dataloader.batch_size": 16,
        "optim_wrapper.accumulative_counts": 16,
        "train_cfg.max_iters": 112_000_000,
        "activation_checkpointing": recompute,
    },
}
