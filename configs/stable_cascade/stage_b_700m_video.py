"""StableCascade's stage B, 700 million parameters, as a video model: temporal layers alone.

Frames share their noise and see one another at the two coarsest levels. Files as for
``stage_c_1b_video``, and the authors' ``stage_b_lite.safetensors`` and ``stage_a.safetensors``,
licensed for non-commercial research alone. How films are sampled: docs/en/stable_cascade.md.

    python tools/extract_features.py stage_b_700m_video --out data/own_stage_b --dtype float16
    python tools/train.py configs/stable_cascade/stage_b_700m_video.py --layout 1x4090

Recipe: our own, untried: AdamW at 1e-4, 20,000 updates of 16 clips, stage B frozen. Hardware: an
RTX 4090, 14.9 GB and 61 hours by the arithmetic of ``tools/estimate.py``, or without the layout 8
A100, 25.3 GB each and 4.3 hours. Expected: unmeasured.
"""

from mmengine.config import read_base
from torch.optim import AdamW

from mmsora.diffusion import SharedNoise
from mmsora.engine import AutocastOptimWrapper, DenoiserEMAHook
from mmsora.models import (
    CascadeCompressor,
    CascadeStageA,
    CLIPTextPooled,
    ImageToVideo,
    LatentConditioner,
    LatentDiffusion,
    PooledTextConditioner,
    SeveralConditioner,
    StableCascade,
    VideoPreprocessor,
)

with read_base():
    from .._base_.datasets.captioned_16x480x832 import *
    from .._base_.default_runtime import *
    from .._base_.diffusion.stable_cascade_b import *

prior, files = "stage_c_1b_video", "data/stable_cascade/"
load_from = files + "stage_b_lite.safetensors"
diffusion.train_noise = dict(type=SharedNoise, noise=diffusion.train_noise)
attention = "2|5|8|11|14|17|20|23|26|29|32|35|38|41"  # blocks
encoder = dict(type=CLIPTextPooled, folder="data/clip_bigg")
captions = dict(type=PooledTextConditioner, encoder=encoder, drop_prob=0.05, states=False)
compressor = dict(type=CascadeCompressor, pretrained=files + "effnet_encoder.safetensors")
effnet = dict(type=LatentConditioner, encoder=compressor, channels=16, name="effnet")
coarse = [dict(width=1152, depth=n, heads=18, repeat=2, dropout=0.1) for n in (14, 4)]
image = dict(
    type=StableCascade,
    in_channels=4,
    out_channels=4,
    size=(1, 120, 208),
    levels=[dict(width=320, depth=2, repeat=2), dict(width=576, depth=4, repeat=2), *coarse],
    conditions=dict(width=1280, pooled=1280, effnet=16, pixels=3),
    patch=2,
    strided=True,
)
model = dict(
    type=LatentDiffusion,
    data_preprocessor=dict(type=VideoPreprocessor),
    vae=dict(type=CascadeStageA, pretrained=files + "stage_a.safetensors"),
    conditioner=dict(type=SeveralConditioner, parts=dict(text=captions, effnet=effnet)),
    denoiser=dict(
        type=ImageToVideo,
        image=image,
        after={f"(down_blocks[.][23]|up_blocks[.][01])[.]({attention})": 1152},
        layout="(b t) c h w",
        frames=16,
        layer=dict(heads=18, kernel=3),
    ),
    diffusion=diffusion,
)

train_cfg = dict(by_epoch=False, max_iters=20_000)
train_dataloader.batch_size = 2
optim_wrapper = dict(
    type=AutocastOptimWrapper,
    precision="bf16",
    optimizer=dict(type=AdamW, lr=1e-4, fused=True),
    clip_grad=dict(max_norm=1.0),
)
activation_checkpointing = dict(mode="full")
custom_hooks = [dict(type=DenoiserEMAHook, decay=0.999)]
layouts = {
    "1x4090": {
        "train_dataloader.batch_size": 1,
        "train_dataloader.dataset": dict(type="CachedLatents", data_root="data/own_stage_b"),
        "optim_wrapper.accumulative_counts": 16,
        "train_cfg.max_iters": 320_000,  # iterations are micro-batches
    }
}
