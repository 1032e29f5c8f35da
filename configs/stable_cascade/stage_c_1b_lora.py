"""Low-rank additions to the attention of StableCascade's stage C, on captioned pictures of yours.

The authors' ``stage_c_lite.safetensors``, ``effnet_encoder.safetensors`` and
``previewer.safetensors`` lie in ``data/stable_cascade/``, CLIP ViT-bigG/14 in
``data/clip_bigg/``. The weights are licensed for non-commercial research alone.

    python tools/extract_features.py stage_c_1b_lora --out data/image_latents --dtype float16
    python tools/train.py configs/stable_cascade/stage_c_1b_lora.py --layout 1x4090

The layout trains on the extracted latents and reads neither pictures nor CLIP.

Recipe: the authors': rank 4, alpha 1, queries, keys, values and outputs of every attention, AdamW
at 1e-4. Departures: no new words; 10,000 updates of 16 pictures. Hardware: the layout takes
9.7 GB and 2.2 hours on an RTX 4090 by the arithmetic of ``tools/estimate.py``.
Expected: unmeasured.
"""

from mmengine.config import read_base
from torch.optim import AdamW

from mmsora.engine import AutocastOptimWrapper, SampleHook
from mmsora.models import (
    CascadeCompressor,
    CLIPTextPooled,
    LatentDiffusion,
    LoRA,
    PooledTextConditioner,
    StableCascade,
    VideoPreprocessor,
)

with read_base():
    from .._base_.datasets.captioned_images_768 import *
    from .._base_.default_runtime import *
    from .._base_.diffusion.stable_cascade_c import *

files = "data/stable_cascade/"
load_from = files + "stage_c_lite.safetensors"
width, heads, depths = 1536, 24, (4, 12)
model = dict(
    type=LatentDiffusion,
    data_preprocessor=dict(type=VideoPreprocessor),
    vae=dict(
        type=CascadeCompressor,
        pretrained=files + "effnet_encoder.safetensors",
        previewer=files + "previewer.safetensors",
    ),
    conditioner=dict(
        type=PooledTextConditioner,
        encoder=dict(type=CLIPTextPooled, folder="data/clip_bigg"),
        drop_prob=0.05,
    ),
    denoiser=dict(
        type=LoRA,
        denoiser=dict(
            type=StableCascade,
            in_channels=16,
            out_channels=16,
            size=(1, 24, 24),
            levels=[dict(width=width, depth=d, heads=heads, dropout=0.1) for d in depths],
            conditions=dict(
                width=width, pooled=1280, text=1280, image=768, numbers=("sca", "crp")
            ),
        ),
        modules=".*[.]attention[.]to_(q|k|v|out[.]0)",
        rank=4,
        alpha=1.0,
    ),
    diffusion=diffusion,
)

train_cfg = dict(by_epoch=False, max_iters=10_000)
optim_wrapper = dict(
    type=AutocastOptimWrapper,
    precision="bf16",
    optimizer=dict(type=AdamW, lr=1e-4, fused=True),
    clip_grad=dict(max_norm=1.0),
)
activation_checkpointing = dict(mode="full")
custom_hooks = [dict(type=SampleHook, interval=1000, prompts=["a red fox in the snow"])]
layouts = {
    "1x4090": {
        "train_dataloader.dataset": dict(type="CachedLatents", data_root="data/image_latents"),
    }
}
