"""Clips of your own: 16 frames of 480 x 832 pixels, every second frame, from a list with captions.

The list is ``data/own/metadata.csv`` with the columns ``path`` and ``text``, or any of those that
docs/en/data.md shows. Nothing is mirrored: captions speak of left and right.
"""

from mmengine.dataset import pseudo_collate

from mmsora.datasets import (
    AnnotatedVideos,
    DecodeVideo,
    EpochSampler,
    PackVideo,
    ResizeCrop,
    SampleFrames,
)

train_dataloader = dict(
    batch_size=1,  # on each process
    num_workers=8,
    pin_memory=True,
    dataset=dict(
        type=AnnotatedVideos,
        data_root="data/own",
        pipeline=[
            dict(type=SampleFrames, num_frames=16, stride=2, short="skip"),
            dict(type=DecodeVideo),
            dict(type=ResizeCrop, size=(480, 832), resampling="bilinear"),
            dict(type=PackVideo),
        ],
        on_error="skip",
    ),
    sampler=dict(type=EpochSampler),
    collate_fn=dict(type=pseudo_collate),
)
