"""Clips of your own: 16 frames of 256 x 256 pixels, every third frame, from a list with captions.

The list is ``data/own/metadata.csv`` with the columns ``path`` and ``text``, or any of those that
docs/en/data.md shows. ``dataset.type`` takes the other layouts of that page: the pipeline reads
videos, images, folders of frames and members of tar files alike.
"""

from mmengine.dataset import pseudo_collate

from mmsora.datasets import (
    AnnotatedVideos,
    DecodeVideo,
    EpochSampler,
    PackVideo,
    RandomFlip,
    ResizeCrop,
    SampleFrames,
)

train_dataloader = dict(
    batch_size=5,  # on each process
    num_workers=8,
    pin_memory=True,
    dataset=dict(
        type=AnnotatedVideos,
        data_root="data/own",
        pipeline=[
            dict(type=SampleFrames, num_frames=16, stride=3, short="skip"),
            dict(type=DecodeVideo),
            dict(type=ResizeCrop, size=256, resampling="bilinear"),
            dict(type=RandomFlip),
            dict(type=PackVideo),
        ],
        on_error="skip",
    ),
    sampler=dict(type=EpochSampler),
    collate_fn=dict(type=pseudo_collate),
)
