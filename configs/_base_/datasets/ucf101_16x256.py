"""UCF-101: 16 frames of 256 x 256 pixels from each of 13,320 clips, taken as Latte takes them.

All clips, train and test, as usual for training generators; a list of UCF-101's own makes a split:
``train_dataloader.dataset.split_file=data/ucf101/ucfTrainTestlist/trainlist01.txt``. What to
download to where, and whether all is there: ``python tools/prepare/ucf101.py``.
"""

from mmengine.dataset import pseudo_collate

from mmsora.datasets import (
    ClassFolderVideos,
    DecodeVideo,
    EpochSampler,
    PackVideo,
    RandomFlip,
    ResizeCrop,
    SampleFrames,
)

num_classes = 101

train_dataloader = dict(
    batch_size=5,  # on each process
    num_workers=8,
    pin_memory=True,
    dataset=dict(
        type=ClassFolderVideos,
        data_root="data/ucf101/UCF-101",
        pipeline=[
            dict(type=SampleFrames, num_frames=16, stride=3, rule="linspace"),  # of 48 frames
            dict(type=DecodeVideo),
            dict(type=ResizeCrop, size=256, resampling="bilinear"),
            dict(type=RandomFlip),
            dict(type=PackVideo),
        ],
    ),
    sampler=dict(type=EpochSampler),
    collate_fn=dict(type=pseudo_collate),
)
