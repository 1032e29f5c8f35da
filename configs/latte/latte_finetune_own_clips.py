"""Fine-tune the public Latte-XL/2 of UCF-101 on clips of your own.

Lay the clips out as ``data/clips/<class>/<clip>.mp4`` and put ``ucf101.pt`` of the authors into
``data/``. Then, on one GPU or several:

    python tools/train.py configs/latte/latte_finetune_own_clips.py
    bash tools/dist_train.sh configs/latte/latte_finetune_own_clips.py 4

Other starts: ``--cfg-options load_from=DiT-XL-2-256x256.pt`` begins the temporal blocks anew from
ImageNet's DiT, and takes ``model.freeze=None``. The label table is new where the number of classes
differs, and tables of positions are resized where the size does; the log says what was not taken.

Recipe: our own, untried on these weights: AdamW at 2e-5, spatial attention frozen, 20,000
iterations. Hardware: one GPU with room for 674 M parameters; unmeasured. Expected: unmeasured.
"""

from mmengine.config import read_base
from torch.optim import AdamW

from mmsora.engine import AutocastOptimWrapper, DenoiserEMAHook, SampleHook
from mmsora.models import FrameVAE, LabelConditioner, LatentDiffusion, Latte, VideoPreprocessor

with read_base():
    from .._base_.datasets.ucf101_16x256 import *
    from .._base_.default_runtime import *
    from .._base_.diffusion.iddpm import *

num_classes = 4
load_from = "data/ucf101.pt"

train_dataloader.update(batch_size=1, num_workers=4)
train_dataloader.dataset.update(data_root="data/clips", on_error="skip")
model = dict(
    type=LatentDiffusion,
    data_preprocessor=dict(type=VideoPreprocessor),
    vae=dict(type=FrameVAE, pretrained="stabilityai/sd-vae-ft-ema"),
    conditioner=dict(type=LabelConditioner, num_classes=num_classes, drop_prob=0.1),
    denoiser=dict(
        type=Latte,
        in_channels=4,
        out_channels=8,  # mean and variance
        size=(16, 32, 32),
        patch=2,
        width=1152,
        depth=28,
        heads=16,
        num_classes=num_classes,
    ),
    diffusion=diffusion,
    freeze=r"blocks\.\d*[02468]\.attn",  # even blocks are the spatial ones
)

train_cfg = dict(by_epoch=False, max_iters=20_000)
optim_wrapper = dict(
    type=AutocastOptimWrapper,
    precision="bf16",
    optimizer=dict(type=AdamW, lr=2e-5, weight_decay=0.0, fused=True),
    clip_grad=dict(max_norm=0.1),
)
activation_checkpointing = dict(mode="full")
custom_hooks = [
    dict(type=DenoiserEMAHook, decay=0.999),
    dict(type=SampleHook, interval=1000, labels=list(range(num_classes))),
]
