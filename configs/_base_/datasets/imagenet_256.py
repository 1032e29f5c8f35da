"""ImageNet at 256 x 256 pixels, cropped as ADM and DiT crop it, as videos of one frame.

The images lie in ``data/imagenet/train/<class>/*.JPEG``. 32 on each of 8 processes are DiT's batch
of 256.
"""

from mmengine.dataset import pseudo_collate

from mmsora.datasets import (
    ADMCenterCrop,
    EpochSampler,
    ImageNetFolder,
    LoadImage,
    PackVideo,
    RandomFlip,
)

num_classes = 1000

train_dataloader = dict(
    batch_size=32,  # on each process
    num_workers=8,
    pin_memory=True,
    dataset=dict(
        type=ImageNetFolder,
        data_root="data/imagenet",
        split="train",
        pipeline=[
            dict(type=LoadImage),
            dict(type=ADMCenterCrop, size=256),
            dict(type=RandomFlip),
            dict(type=PackVideo),
        ],
    ),
    sampler=dict(type=EpochSampler),
    collate_fn=dict(type=pseudo_collate),
)
