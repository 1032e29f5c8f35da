"""StableCascade's stage C, 3.6 billion parameters, on captioned pictures (arXiv:2306.00637).

Put the authors' ``stage_c.safetensors``, ``effnet_encoder.safetensors`` and
``previewer.safetensors`` into ``data/stable_cascade/``, CLIP ViT-bigG/14 and ViT-L/14 in
transformers' layout into ``data/clip_bigg/`` and ``data/clip_large/``. The weights are licensed
for non-commercial research alone.

    bash tools/dist_train.sh configs/stable_cascade/stage_c_3b6_image.py 32

``infer.py`` shows previews; with ``stage_b_1b5_image`` it makes pictures. From nothing:
``--cfg-options load_from=None``. The 1B is in ``stage_c_1b_lora`` and ``stage_c_1b_video``.

Recipe: the authors': AdamW at 1e-4, clipped at 1, batch 512, texts dropped 5 %, images seen 10 %,
adaptive weights; sampled in 20 steps, guidance 4, shift 2. Departures: no warm-up, which is one
update; squares of one size where theirs are buckets; ZeRO-3 for their FSDP.
Hardware: 32 A100, 19.0 GB each and 65 hours for 100,000 updates by the arithmetic of
``tools/estimate.py``. Expected: unmeasured; people's preference is all that is published.
"""

from mmengine.config import read_base
from torch.optim import AdamW

from mmsora.engine import AutocastOptimWrapper, SampleHook
from mmsora.models import (
    CascadeCompressor,
    CLIPImage,
    CLIPTextPooled,
    ImageConditioner,
    LatentDiffusion,
    PooledTextConditioner,
    SeveralConditioner,
    StableCascade,
    VideoPreprocessor,
)

with read_base():
    from .._base_.datasets.captioned_images_768 import *
    from .._base_.default_runtime import *
    from .._base_.diffusion.stable_cascade_c import *

load_from = "data/stable_cascade/stage_c.safetensors"
text_encoder = dict(type=CLIPTextPooled, folder="data/clip_bigg")
image_encoder = dict(type=CLIPImage, folder="data/clip_large")

model = dict(
    type=LatentDiffusion,
    data_preprocessor=dict(type=VideoPreprocessor),
    vae=dict(
        type=CascadeCompressor,
        pretrained="data/stable_cascade/effnet_encoder.safetensors",
        previewer="data/stable_cascade/previewer.safetensors",
    ),
    conditioner=dict(
        type=SeveralConditioner,
        parts=dict(
            text=dict(type=PooledTextConditioner, encoder=text_encoder, drop_prob=0.05),
            image=dict(type=ImageConditioner, encoder=image_encoder, drop_prob=0.9),
        ),
    ),
    denoiser=dict(
        type=StableCascade,
        in_channels=16,
        out_channels=16,
        size=(1, 24, 24),
        levels=[
            dict(width=2048, depth=8, heads=32, dropout=0.1),
            dict(width=2048, depth=24, heads=32, dropout=0.1),
        ],
        conditions=dict(width=2048, pooled=1280, text=1280, image=768, numbers=("sca", "crp")),
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
custom_hooks = [dict(type=SampleHook, interval=5000, prompts=["a red fox in the snow"])]
