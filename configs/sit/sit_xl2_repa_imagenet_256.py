"""REPA: SiT-XL/2 whose inner states resemble DINOv2's (Yu et al. 2024, arXiv:2410.06940).

    bash tools/dist_train.sh configs/sit/sit_xl2_repa_imagenet_256.py 8 --layout 8xa100
    python tools/infer.py configs/sit/sit_xl2_repa_imagenet_256.py --checkpoint last.pt

The weights of facebook/dinov2-base lie in ``data/dinov2-base``, for training alone; nothing is
downloaded. Any transformer takes ``model.alignment``, videos frame by frame.

Recipe: the public code's: SiT with time and velocity from data to noise, the states after block 8
against the patch tokens at 224 pixels, weight 0.5, gradients clipped at 1.0, no flips, batch 256,
AdamW at 1e-4, EMA 0.9999; guidance 1.8 where t is at most 0.7. Departures: bfloat16 where theirs
is float16; images are encoded as they are loaded.
Hardware: 8 A100, or a layout below. Expected: FID 7.9 without guidance after 400,000 iterations
(others measured 11.1) and 5.9 after 4 million, then 1.42 with it, IS 305.7 (README). We measured
none. Layouts, by arithmetic (1.04 TFLOP an image with VAE and DINOv2, 40 % of the peak;
unmeasured), for 400,000 updates: 8xa100 1.2 days, 2xa100 6.1, 4xa6000 6.2, 1x4090 23.
"""

from mmengine.config import read_base
from torch.optim import AdamW

from mmsora.datasets import ADMCenterCrop, LoadImage, PackVideo
from mmsora.engine import AutocastOptimWrapper, DenoiserEMAHook, SampleHook
from mmsora.models import (
    DINOv2,
    DiT,
    FrameVAE,
    LabelConditioner,
    LatentDiffusion,
    RepresentationAlignment,
    VideoPreprocessor,
)

with read_base():
    from .._base_.datasets.imagenet_256 import *
    from .._base_.default_runtime import *
    from .._base_.diffusion.sit import *

train_dataloader.dataset.pipeline = [
    dict(type=LoadImage),
    dict(type=ADMCenterCrop, size=256),
    dict(type=PackVideo),
]
diffusion.path.reverse_clock = False
diffusion.prediction.sign = 1
diffusion.guidance.update(scale=1.8, interval=(0.0, 0.7))
encoder = dict(type=DINOv2, folder="data/dinov2-base", width=768)
latent = dict(in_channels=4, out_channels=4, size=(1, 32, 32))
sizes = dict(patch=2, width=1152, depth=28, heads=16)
model = dict(
    type=LatentDiffusion,
    data_preprocessor=dict(type=VideoPreprocessor),
    vae=dict(type=FrameVAE, pretrained="stabilityai/sd-vae-ft-mse"),
    conditioner=dict(type=LabelConditioner, num_classes=1000, drop_prob=0.1),
    denoiser=dict(type=DiT, num_classes=1000, **latent, **sizes),
    diffusion=diffusion,
    alignment=dict(type=RepresentationAlignment, encoder=encoder, block=8, weight=0.5),
)

train_cfg = dict(by_epoch=False, max_iters=4_000_000)
optim_wrapper = dict(
    type=AutocastOptimWrapper,
    precision="bf16",
    optimizer=dict(type=AdamW, lr=1e-4, weight_decay=0.0, fused=True),
    clip_grad=dict(max_norm=1.0),
)
auto_scale_lr = dict(base_batch_size=256, enable=False)
default_hooks.checkpoint.interval = 50_000
custom_hooks = [
    dict(type=DenoiserEMAHook, decay=0.9999, warmup=False),
    dict(type=SampleHook, interval=10_000, labels=[207, 360, 387, 974, 88, 979, 417, 279]),
]

recompute = dict(mode="full")
in_parts = {"train_dataloader.batch_size": 16, "activation_checkpointing": recompute}
parts, iterations = "optim_wrapper.accumulative_counts", "train_cfg.max_iters"
layouts = {
    "8xa100": {"train_dataloader.batch_size": 32},
    "4xa6000": {**in_parts, parts: 4, iterations: 16_000_000},  # iterations are micro-batches
    "2xa100": {"train_dataloader.batch_size": 128, "activation_checkpointing": recompute},
    "1x4090": {**in_parts, parts: 16, iterations: 64_000_000},
}
