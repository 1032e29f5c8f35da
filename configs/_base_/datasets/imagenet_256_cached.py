"""ImageNet at 256 x 256 pixels, as latents that were computed before: training needs no VAE.

Made of the images of imagenet_256.py by ``tools/extract_features.py``. 32 on each of 8 processes
are DiT's batch of 256.
"""

from mmsora.datasets import CachedLatents, EpochSampler, stack_latents

num_classes = 1000

train_dataloader = dict(
    batch_size=32,  # on each process
    num_workers=4,
    pin_memory=True,
    dataset=dict(type=CachedLatents, data_root="data/imagenet_256_latents"),
    sampler=dict(type=EpochSampler),
    collate_fn=dict(type=stack_latents),
)
