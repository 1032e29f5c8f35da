"""From clips to a batch."""

import torch

from mmsora.models import VideoPreprocessor
from mmsora.structures.video_sample import VideoSample


def test_every_grey_value_survives_the_way_to_the_model_and_back():
    clip = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    batch = VideoPreprocessor()({"inputs": [clip], "data_samples": [None]})["inputs"]
    assert batch.dtype == torch.float32
    assert batch.min() == -1
    assert batch.max() == 1
    grey = (batch[0] * 127.5 + 128).clamp(0, 255).to(torch.uint8)  # as LatentDiffusion decodes
    assert torch.equal(grey, clip)


def test_a_list_and_a_stack_give_the_same_batch_and_annotations_travel_along():
    clips = torch.randint(0, 256, (3, 1, 2, 4, 5), dtype=torch.uint8)
    samples = [VideoSample(index=i) for i in range(3)]
    outputs = [
        VideoPreprocessor()({"inputs": inputs, "data_samples": samples}, training)
        for inputs in (clips, list(clips))
        for training in (True, False)
    ]
    for output in outputs:
        assert set(output) == {"inputs", "data_samples"}
        assert output["inputs"].shape == (3, 1, 2, 4, 5)
        assert torch.equal(output["inputs"], outputs[0]["inputs"])
        assert output["data_samples"] is samples


def test_clips_go_to_the_device_of_the_model():
    model = torch.nn.Sequential()
    model.add_module("preprocessor", VideoPreprocessor())
    model.preprocessor.to("meta")
    clip = torch.zeros(1, 2, 4, 4, dtype=torch.uint8)
    batch = model.preprocessor({"inputs": [clip], "data_samples": [None]})
    assert batch["inputs"].device.type == "meta"


def test_cached_latents_keep_their_values():
    latents = [torch.randn(2, 4, 3, 5, 6).half() for _ in range(3)]
    for inputs in (latents, torch.stack(latents)):
        batch = VideoPreprocessor()({"inputs": inputs, "data_samples": [None] * 3})["inputs"]
        assert batch.dtype == torch.float32
        assert torch.equal(batch, torch.stack(latents).float())
