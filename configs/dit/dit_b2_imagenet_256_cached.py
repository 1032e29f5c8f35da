"""DiT-B/2 on latents of ImageNet that are computed once (arXiv:2212.09748).

    python tools/extract_features.py dit_s2_imagenet_256 --out data/imagenet_256_latents
    python tools/train.py configs/dit/dit_b2_imagenet_256_cached.py

Recipe: that of dit_xl2_imagenet_256.py, for the 400,000 iterations of the paper's comparison; the
loss is the one of training on the images. The VAE is read only to decode samples.
Hardware: one GPU of 48 GB, of 24 GB with --cfg-options activation_checkpointing.mode=selective, or
more with train_dataloader.batch_size=32 on each of 8; unmeasured.
Expected: FID 43.5 without guidance (the paper); we measured none. By arithmetic (0.14 TFLOP an
image for three passes of the network, 40 % of the peak): 12 hours on 8 A100 become 4 without
the VAE; unmeasured.
"""

from mmengine.config import read_base
from torch.optim import AdamW

from mmsora.engine import AutocastOptimWrapper, DenoiserEMAHook, SampleHook
from mmsora.models import DiT, FrameVAE, LabelConditioner, LatentDiffusion

with read_base():
    from .._base_.datasets.imagenet_256_cached import *
    from .._base_.default_runtime import *
    from .._base_.diffusion.iddpm import *

diffusion.guidance.channels = 3
depth, width, heads = 12, 768, 12
model = dict(
    type=LatentDiffusion,
    vae=dict(type=FrameVAE, pretrained="stabilityai/sd-vae-ft-ema"),
    conditioner=dict(type=LabelConditioner, num_classes=num_classes, drop_prob=0.1),
    denoiser=dict(
        type=DiT,
        in_channels=4,
        out_channels=8,  # mean and variance
        size=(1, 32, 32),
        patch=2,
        width=width,
        depth=depth,
        heads=heads,
        num_classes=num_classes,
    ),
    diffusion=diffusion,
)

train_cfg = dict(by_epoch=False, max_iters=400_000)
train_dataloader.batch_size = 256
optim_wrapper = dict(
    type=AutocastOptimWrapper,
    precision="bf16",
    optimizer=dict(type=AdamW, lr=1e-4, weight_decay=0.0, fused=True),
)
auto_scale_lr = dict(base_batch_size=256, enable=False)
default_hooks.checkpoint.interval = 50_000
custom_hooks = [
    dict(type=DenoiserEMAHook, decay=0.9999, warmup=False),
    dict(type=SampleHook, interval=20_000, labels=[207, 360, 387, 974, 88, 979, 417, 279]),
]
