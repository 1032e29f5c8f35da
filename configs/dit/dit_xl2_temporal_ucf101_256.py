"""ImageNet's DiT-XL/2 as a video model: temporal layers behind every second block, on UCF-101.

Put ``DiT-XL-2-256x256.pt`` of the authors into ``data/``. Then:

    python tools/prepare/ucf101.py --root data/ucf101
    bash tools/dist_train.sh configs/dit/dit_xl2_temporal_ucf101_256.py 8
    python tools/infer.py configs/dit/dit_xl2_temporal_ucf101_256.py --checkpoint CKPT --labels 3

The label table is new, for 101 classes; the log says so. Temporal layers alone:
``--cfg-options model.denoiser.train_image=False optim_wrapper.paramwise_cfg=None``.

Recipe: our own, untried: AdamW at 1e-4, a tenth of that for the image model, 50,000 iterations of
40 clips. Hardware: 8 A100, 5 clips a GPU, as for ``latte_ucf``. Expected: unmeasured.
"""

from mmengine.config import read_base
from torch.optim import AdamW

from mmsora.engine import AutocastOptimWrapper, DenoiserEMAHook, SampleHook
from mmsora.models import (
    DiT,
    FrameVAE,
    ImageToVideo,
    LabelConditioner,
    LatentDiffusion,
    VideoPreprocessor,
)

with read_base():
    from .._base_.datasets.ucf101_16x256 import *
    from .._base_.default_runtime import *
    from .._base_.diffusion.iddpm import *

load_from = "data/DiT-XL-2-256x256.pt"

model = dict(
    type=LatentDiffusion,
    data_preprocessor=dict(type=VideoPreprocessor),
    vae=dict(type=FrameVAE, pretrained="stabilityai/sd-vae-ft-ema"),
    conditioner=dict(type=LabelConditioner, num_classes=101, drop_prob=0.1),
    denoiser=dict(
        type=ImageToVideo,
        image=dict(
            type=DiT,
            in_channels=4,
            out_channels=8,  # mean and variance
            size=(1, 32, 32),
            patch=2,
            width=1152,
            depth=28,
            heads=16,
            num_classes=101,
        ),
        after={"blocks[.][0-9]*[13579]": 1152},
        layout="(b t) 1 n c",  # of tokens
        frames=16,
        layer=dict(heads=16, kernel=3),
        train_image=True,
    ),
    diffusion=diffusion,
)

train_cfg = dict(by_epoch=False, max_iters=50_000)
optim_wrapper = dict(
    type=AutocastOptimWrapper,
    precision="bf16",
    optimizer=dict(type=AdamW, lr=1e-4, weight_decay=0.0, fused=True),
    paramwise_cfg=dict(
        custom_keys={
            "denoiser.image.embed_label": dict(lr_mult=1.0),
            "denoiser.image": dict(lr_mult=0.1),
        }
    ),
    clip_grad=dict(max_norm=1.0),
)
custom_hooks = [
    dict(type=DenoiserEMAHook, decay=0.9999),
    dict(type=SampleHook, interval=5000, labels=[0, 25, 50, 75, 100]),
]
