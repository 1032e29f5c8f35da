"""StableCascade's stage B, 1.5 billion parameters, on captioned pictures (arXiv:2306.00637).

It makes stage A's latents of the compressor's, which stage C samples. The authors'
``stage_b.safetensors``, ``stage_a.safetensors`` and ``effnet_encoder.safetensors`` lie in
``data/stable_cascade/``, CLIP ViT-bigG/14 in ``data/clip_bigg/``. The weights are licensed for
non-commercial research alone.

    bash tools/dist_train.sh configs/stable_cascade/stage_b_1b5_image.py 16

Pictures of texts, both stages, one after the other on the GPU:
``python tools/infer.py stage_b_1b5_image --checkpoint data/stable_cascade/stage_b.safetensors
--prior data/stable_cascade/stage_c.safetensors --prompt "a red fox" --dtype bf16``

Recipe: the authors': AdamW at 1e-4, clipped at 1, batch 256, texts dropped 5 %, the compressor's
latents 10 % and of pictures shrunk by up to a half, pyramid noise, adaptive weights; sampled in 10
steps, guidance 1.1. Departures: no warm-up, which is one update; squares of one size where theirs
are buckets; ZeRO-3 for their FSDP.
Hardware: 16 A100 of 80 GB, 40.6 GB each and 99 hours by the arithmetic of ``tools/estimate.py``.
Expected: unmeasured; people's preference is all that is published.
"""

from mmengine.config import read_base
from torch.optim import AdamW

from mmsora.engine import AutocastOptimWrapper
from mmsora.models import (
    CascadeCompressor,
    CascadeStageA,
    CLIPTextPooled,
    LatentConditioner,
    LatentDiffusion,
    PooledTextConditioner,
    SeveralConditioner,
    StableCascade,
    VideoPreprocessor,
)

with read_base():
    from .._base_.datasets.captioned_images_768 import *
    from .._base_.default_runtime import *
    from .._base_.diffusion.stable_cascade_b import *

prior = "stage_c_3b6_image"
load_from = "data/stable_cascade/stage_b.safetensors"
train_dataloader.dataset.pipeline[1].size = 1024

files = "data/stable_cascade/"
text_encoder = dict(type=CLIPTextPooled, folder="data/clip_bigg")
compressor = dict(type=CascadeCompressor, pretrained=files + "effnet_encoder.safetensors")
parts = dict(
    text=dict(type=PooledTextConditioner, encoder=text_encoder, drop_prob=0.05, states=False),
    effnet=dict(
        type=LatentConditioner, encoder=compressor, channels=16, smallest=0.5, name="effnet"
    ),
)
model = dict(
    type=LatentDiffusion,
    data_preprocessor=dict(type=VideoPreprocessor),
    vae=dict(type=CascadeStageA, pretrained=files + "stage_a.safetensors"),
    conditioner=dict(type=SeveralConditioner, parts=parts),
    denoiser=dict(
        type=StableCascade,
        in_channels=4,
        out_channels=4,
        size=(1, 256, 256),
        levels=[
            dict(width=320, depth=2, repeat=2),
            dict(width=640, depth=6, repeat=2),
            dict(width=1280, depth=28, heads=20, repeat=3, dropout=0.1),
            dict(width=1280, depth=6, heads=20, repeat=3, dropout=0.1),
        ],
        conditions=dict(width=1280, pooled=1280, effnet=16, pixels=3),
        patch=2,
        strided=True,
    ),
    diffusion=diffusion,
)

train_cfg = dict(by_epoch=False, max_iters=100_000)
optim_wrapper = dict(
    type=AutocastOptimWrapper,
    precision="bf16",
    optimizer=dict(type=AdamW, lr=1e-4, fused=True),
    clip_grad=dict(max_norm=1.0),
)
parallel = dict(mode="zero3")
activation_checkpointing = dict(mode="full")
