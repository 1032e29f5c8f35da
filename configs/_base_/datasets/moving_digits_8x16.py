"""Moving digits: 8 frames of 16 x 16 pixels, drawn as they are asked for."""

from mmengine.dataset import InfiniteSampler, pseudo_collate

from mmsora.datasets import MovingDigits

num_classes = 10

train_dataloader = dict(
    batch_size=32,
    num_workers=0,  # a clip takes less time to draw than to send between processes
    dataset=dict(type=MovingDigits, split="train", length=10000, num_frames=8, frame_size=16),
    sampler=dict(type=InfiniteSampler, shuffle=True),
    collate_fn=dict(type=pseudo_collate),
)
