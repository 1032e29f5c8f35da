"""Pictures of your own with captions, cropped to 768 x 768 pixels, as videos of one frame.

The list is ``data/images/metadata.csv`` with the columns ``path`` and ``text``, or any of those
that docs/en/data.md shows.
"""

from mmengine.dataset import pseudo_collate

from mmsora.datasets import AnnotatedVideos, EpochSampler, LoadImage, PackVideo, ResizeCrop

train_dataloader = dict(
    batch_size=16,  # on each process
    num_workers=8,
    pin_memory=True,
    dataset=dict(
        type=AnnotatedVideos,
        data_root="data/images",
        pipeline=[
            dict(type=LoadImage),
            dict(type=ResizeCrop, size=768, resampling="bicubic"),
            dict(type=PackVideo),
        ],
        on_error="skip",
    ),
    sampler=dict(type=EpochSampler),
    collate_fn=dict(type=pseudo_collate),
)
