"""StableCascade's stage C, 1 billion parameters, as a video model: temporal layers alone.

Clips with captions as docs/en/data.md shows, the authors' ``stage_c_lite.safetensors``,
``effnet_encoder.safetensors`` and ``previewer.safetensors`` in ``data/stable_cascade/``, CLIP
ViT-bigG/14 in ``data/clip_bigg/``. The weights are licensed for non-commercial research alone.

    python tools/extract_features.py stage_c_1b_video --out data/own_latents --dtype float16
    python tools/train.py configs/stable_cascade/stage_c_1b_video.py --layout 1x4090

The layout trains on the extracted latents, 12.5 kB a frame, and reads neither films nor CLIP;
without it training is on the films, here on 8 GPUs. Films are sampled with ``stage_b_700m_video``.

Recipe: our own, untried: a layer behind every attention of the frozen stage C, AdamW at 1e-4,
20,000 updates of 16 clips. Hardware: the layout takes 15.4 GB and 67 hours on an RTX 4090 by the
arithmetic of ``tools/estimate.py``. Expected: unmeasured.
"""

from mmengine.config import read_base
from torch.optim import AdamW

from mmsora.engine import AutocastOptimWrapper, DenoiserEMAHook, SampleHook
from mmsora.models import (
    CascadeCompressor,
    CLIPTextPooled,
    ImageToVideo,
    LatentDiffusion,
    PooledTextConditioner,
    StableCascade,
    VideoPreprocessor,
)

with read_base():
    from .._base_.datasets.captioned_16x480x832 import *
    from .._base_.default_runtime import *
    from .._base_.diffusion.stable_cascade_c import *

load_from = "data/stable_cascade/stage_c_lite.safetensors"
image = dict(
    type=StableCascade,
    in_channels=16,
    out_channels=16,
    size=(1, 15, 26),
    levels=[dict(width=1536, depth=depth, heads=24, dropout=0.1) for depth in (4, 12)],
    conditions=dict(width=1536, pooled=1280, text=1280, image=768, numbers=("sca", "crp")),
)
model = dict(
    type=LatentDiffusion,
    data_preprocessor=dict(type=VideoPreprocessor),
    vae=dict(
        type=CascadeCompressor,
        pretrained="data/stable_cascade/effnet_encoder.safetensors",
        previewer="data/stable_cascade/previewer.safetensors",
    ),
    conditioner=dict(
        type=PooledTextConditioner,
        encoder=dict(type=CLIPTextPooled, folder="data/clip_bigg"),
        drop_prob=0.05,
    ),
    denoiser=dict(
        type=ImageToVideo,
        image=image,
        after={"(down|up)_blocks[.][01][.](2|5|8|11|14|17|20|23|26|29|32|35)": 1536},
        layout="(b t) c h w",
        frames=16,
        layer=dict(heads=24, kernel=3),
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
custom_hooks = [
    dict(type=DenoiserEMAHook, decay=0.999),
    dict(type=SampleHook, interval=1000, prompts=["a red fox runs through the snow"]),
]
layouts = {
    "1x4090": {
        "train_dataloader.batch_size": 1,
        "train_dataloader.dataset": dict(type="CachedLatents", data_root="data/own_latents"),
        "optim_wrapper.accumulative_counts": 16,
        "train_cfg.max_iters": 320_000,  # iterations are micro-batches
    }
}
