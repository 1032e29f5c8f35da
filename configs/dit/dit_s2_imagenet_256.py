"""DiT-S/2 on ImageNet at 256 x 256 pixels: the smallest of DiT's twelve (arXiv:2212.09748).

    bash tools/dist_train.sh configs/dit/dit_s2_imagenet_256.py 8

Recipe: that of dit_xl2_imagenet_256.py, for the 400,000 iterations of the paper's comparison.
Other sizes by --cfg-options model.denoiser.width=768 model.denoiser.heads=12 (B); L is 1024 wide,
24 deep, with 16 heads; patch 4 or 8.
Hardware: one GPU or more; the batch is for 8. Expected: FID 68.4 without guidance after 400,000
iterations (the paper; its users report about 80). We measured none. Layouts, by arithmetic (0.31
TFLOP an image, most of it the VAE's, 40 % of the peak; unmeasured): 8xa100 9 hours, 2xa100 and
4xa6000 35, 1x4090 133.
"""

from mmengine.config import read_base
from torch.optim import AdamW

from mmsora.engine import AutocastOptimWrapper, DenoiserEMAHook, SampleHook
from mmsora.models import DiT, FrameVAE, LabelConditioner, LatentDiffusion, VideoPreprocessor

with read_base():
    from .._base_.datasets.imagenet_256 import *
    from .._base_.default_runtime import *
    from .._base_.diffusion.iddpm import *

diffusion.guidance.channels = 3
model = dict(
    type=LatentDiffusion,
    data_preprocessor=dict(type=VideoPreprocessor),
    vae=dict(type=FrameVAE, pretrained="stabilityai/sd-vae-ft-ema"),
    conditioner=dict(type=LabelConditioner, num_classes=1000, drop_prob=0.1),
    denoiser=dict(
        type=DiT,
        in_channels=4,
        out_channels=8,  # mean and variance
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
