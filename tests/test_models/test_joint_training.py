"""Clips and independent images in one batch, and batches of images alone."""

import math

import pytest
import torch
from mmengine.registry import init_default_scope

from mmsora.datasets import MovingDigits
from mmsora.registry import DATASETS, MODELS, RUNNERS
from mmsora.structures.video_sample import VideoSample
from mmsora.utils.draws import Draws
from mmsora.utils.user_error import UserError


@DATASETS.register_module(force=True)
class EndlessDigits(MovingDigits):
    """Counts epochs, as a dataset of files does."""

    takes_epochs = True

    def __getitem__(self, index):
        return super().__getitem__(index % len(self))


UNCONDITIONAL = {"model.conditioner": None, "model.denoiser.num_classes": 0}
DIGITS = dict(type="EndlessDigits", split="train", length=40, frame_size=8)
JOINT = dict(
    type="JointImages", num_images=3, videos=DIGITS | dict(num_frames=2),
    images=DIGITS | dict(num_frames=1, seed=1),
)  # fmt: skip


@pytest.fixture
def build(tiny_config, fill_weights):
    """Call it with changes to get a model whose every weight matters."""

    def make(changes=None):
        init_default_scope("mmsora")
        changes = {"model.conditioner.drop_prob": 0.5} if changes is None else changes
        return fill_weights(MODELS.build(tiny_config(changes).model)).eval()

    return make


def batch(images=3):
    """Clips of two frames and so many images."""
    generator = torch.Generator().manual_seed(0)
    samples = [VideoSample(index=i, label=i, num_images=images) for i in range(4)]
    for sample in samples:
        sample.image_labels = [(sample.index + 2 + place) % 10 for place in range(images)]
    return torch.rand(4, 1, 2 + images, 8, 8, generator=generator) * 2 - 1, samples


def losses(model, inputs, samples, rows=(0, 1, 2, 3)):
    chosen = [samples[row] for row in rows]
    draws = Draws(0, [sample.index for sample in chosen], 3)
    return model.loss(inputs[list(rows)], chosen, draws)["loss_diffusion"]


@pytest.mark.parametrize("changes", [None, UNCONDITIONAL], ids=["classes", "none"])
def test_the_loss_is_that_of_clips_and_images(build, changes):
    """One time for a sample; the mean over its frames and its images."""
    model, (inputs, samples) = build(changes), batch()
    calls, forward = [], model.denoiser.forward

    def noted(x, clock, **told):
        calls.append((x, clock, told, forward(x, clock, **told)))
        return calls[-1][-1]

    model.denoiser.forward = noted
    loss = losses(model, inputs, samples)
    (x, clock, told, out), *more = calls
    assert not more
    assert (x.shape, clock.shape, out.shape) == (inputs.shape, (4,), inputs.shape)
    of_clip = {k: v for k, v in told.items() if not k.startswith("image") and k != "num_images"}
    clip = forward(x[:, :, :2], clock, **of_clip)
    torch.testing.assert_close(out[:, :, :2], clip)
    noise = Draws(0, range(4), 3).normal("noise", inputs)
    errors = (out - (noise - inputs)).square().mean((1, 3, 4))
    torch.testing.assert_close(loss, errors.mean(1))


@pytest.mark.parametrize("changes", [None, UNCONDITIONAL], ids=["classes", "none"])
def test_a_loss_does_not_depend_on_the_batch(build, changes):
    model, (inputs, samples) = build(changes), batch()
    whole = losses(model, inputs, samples)
    torch.testing.assert_close(losses(model, inputs, samples, [2, 0]), whole[[2, 0]])


def test_images_are_no_frames(build):
    """Nor is anything but the clip and the images' labels what a loss goes by."""
    model, (inputs, samples) = build(UNCONDITIONAL), batch()
    joint = losses(model, inputs, samples)
    for sample in samples:
        del sample.num_images
    assert (losses(model, inputs, samples) - joint).abs().min() > 1e-4


def test_labels_of_images_matter(build):
    model, (inputs, samples) = build({"model.conditioner.drop_prob": 0.0}), batch()
    loss = losses(model, inputs, samples)
    samples[1].image_labels = [0, 0, 0]
    changed = (losses(model, inputs, samples) - loss).abs() > 1e-5
    assert changed.tolist() == [False, True, False, False]


def test_a_network_without_a_place_for_images_is_refused(build):
    model = build({**UNCONDITIONAL, "model.denoiser.type": "DiT"})
    losses(model, *batch(0))
    with pytest.raises(UserError, match="has 3 images beside each clip, for which DiT has no"):
        losses(model, *batch())


def test_clips_with_more_and_fewer_images_are_refused(build):
    inputs, samples = batch()
    samples[2].num_images = 2
    with pytest.raises(UserError, match="equally many images beside them, got 2 and 3"):
        losses(build(UNCONDITIONAL), inputs, samples)


@pytest.mark.parametrize("changes", [{}, UNCONDITIONAL], ids=["classes", "none"])
def test_a_joint_run_trains_and_samples(tiny_config, scalars, changes):
    cfg = tiny_config({"train_dataloader.dataset": JOINT, **changes}, samples=not changes)
    runner = RUNNERS.build(cfg)
    seen, forward = [], runner.model.denoiser.forward

    def noted(x, clock, **told):
        if "num_images" in told:
            seen.append((tuple(x.shape), told["num_images"]))
        return forward(x, clock, **told)

    runner.model.denoiser.forward = noted
    runner.train()
    assert seen == [((4, 1, 5, 8, 8), 3)] * 6
    found = [row["loss"] for row in scalars(cfg.work_dir) if "loss" in row]
    assert len(found) == 6
    assert all(math.isfinite(loss) for loss in found)
    sample = runner.model.predict([VideoSample(index=0, label=1)])
    assert sample.shape == (1, 1, 2, 8, 8)


@pytest.mark.parametrize("kind", ["Latte", "DiT"])
def test_images_alone_are_clips_of_one_frame(build, kind):
    """As in a bucket of one frame: whatever length the network is made for."""
    model = build({"model.denoiser.type": kind, "model.conditioner.drop_prob": 0.0})
    inputs, samples = batch(0)
    loss = losses(model, inputs[:, :, :1], samples)
    assert loss.shape == (4,)
    loss.mean().backward()
    assert all(weight.grad is not None for weight in model.denoiser.parameters())
    with torch.no_grad():
        image = model.predict(samples[:2], size=(1, 8, 8))
    assert image.shape == (2, 1, 1, 8, 8)


def test_a_run_on_images_alone(tiny_config, scalars):
    cfg = tiny_config({"train_dataloader.dataset.num_frames": 1})
    assert cfg.model.denoiser.size[0] == 2
    RUNNERS.build(cfg).train()
    assert len([row for row in scalars(cfg.work_dir) if "loss" in row]) == 6
