"""Latte-XL/2 on clips of UCF-101 and eight single frames beside each (arXiv:2401.03048, 3.4).

    bash tools/dist_train.sh configs/latte/latte_ucf_joint.py 8
    python tools/infer.py configs/latte/latte_ucf_joint.py --checkpoint iter_150000 --labels 3

The frames are of other clips, with labels of their own; spatial blocks see them, temporal ones do
not. Images of any class folders serve as well: put them in ``train_dataloader.dataset.images``.
Without classes, as on SkyTimelapse: ``--cfg-options model.conditioner=None
model.denoiser.num_classes=0``, with that dataset.

Recipe: the paper's joint training and its released ucf101_img_train.yaml: AdamW at 1e-4, 4 clips
and 32 images on each of 8 GPUs, EMA 0.9999, gradients clipped at 0.1 from iteration 100,000 on.
Departures: bfloat16 where theirs is TF32; an epoch is one of the clips, not of the frames.
Hardware: 8 A100; 27 h for 150,000 iterations by arithmetic (20.5 TFLOP a clip with its images,
40 % of the peak; unmeasured). With less memory: ``activation_checkpointing`` as in latte_ucf.
Expected: FVD 333.61, where clips alone give 477.97 (the paper's table 2); we measured none.
"""

from mmengine.config import read_base
from torch.optim import AdamW

from mmsora.datasets import (
    ClassFolderVideos,
    DecodeVideo,
    JointImages,
    PackVideo,
    ResizeCrop,
    SampleFrames,
)
from mmsora.engine import AutocastOptimWrapper, DenoiserEMAHook, SampleHook
from mmsora.models import FrameVAE, LabelConditioner, LatentDiffusion, Latte, VideoPreprocessor

with read_base():
    from .._base_.datasets.ucf101_16x256 import *
    from .._base_.default_runtime import *
    from .._base_.diffusion.iddpm import *

images = dict(
    type=ClassFolderVideos,
    data_root="data/ucf101/UCF-101",
    pipeline=[
        dict(type=SampleFrames, num_frames=1),
        dict(type=DecodeVideo),
        dict(type=ResizeCrop, size=256, resampling="bilinear"),
        dict(type=PackVideo),
    ],
)
clips = train_dataloader.dataset
train_dataloader.dataset = dict(type=JointImages, num_images=8, videos=clips, images=images)
train_dataloader.batch_size = 4

diffusion.guidance.scale = 7.0
model = dict(
    type=LatentDiffusion,
    data_preprocessor=dict(type=VideoPreprocessor),
    vae=dict(type=FrameVAE, pretrained="stabilityai/sd-vae-ft-mse"),
    conditioner=dict(type=LabelConditioner, num_classes=101, drop_prob=0.1),
    denoiser=dict(
        type=Latte,
        in_channels=4,
        out_channels=8,  # mean and variance
        size=(16, 32, 32),  # of a clip
        patch=2,
        width=1152,
        depth=28,
        heads=16,
        num_classes=101,
    ),
    diffusion=diffusion,
)

train_cfg = dict(by_epoch=False, max_iters=1_000_000)
optim_wrapper = dict(
    type=AutocastOptimWrapper,
    precision="bf16",
    optimizer=dict(type=AdamW, lr=1e-4, weight_decay=0.0, fused=True),
    clip_grad=dict(max_norm=0.1),
    clip_from=100_000,
)
auto_scale_lr = dict(base_batch_size=32, enable=False)
default_hooks.checkpoint.interval = 10_000
custom_hooks = [
    dict(type=DenoiserEMAHook, decay=0.9999, warmup=False),
    dict(type=SampleHook, interval=10_000, labels=[0, 25, 50, 75, 100]),
]
