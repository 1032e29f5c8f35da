"""What other programs call."""

import json

import pytest
import torch
from safetensors.torch import save_file

from mmsora.apis import Inferencer, build_model
from mmsora.apis.build import config_of
from mmsora.models import CachedText, LatentDiffusion
from mmsora.registry import RUNNERS
from mmsora.utils.checkpoint import load_checkpoint, save_checkpoint
from mmsora.utils.user_error import UserError


@pytest.fixture(scope="module")
def checkpoint(tiny_run):
    return tiny_run / "iter_6"


@pytest.fixture(scope="module")
def inferencer(checkpoint):
    return Inferencer(checkpoint)


def close_in_grey(one, other):
    """Equal but where rounding errors of another batch size cross a boundary of a grey value."""
    return (one.int() - other.int()).abs().max() <= 1 and (one == other).float().mean() > 0.98


def test_videos_of_labels(inferencer):
    videos = inferencer(labels=[3, 7], seed=0)
    assert videos.dtype == torch.uint8
    assert videos.shape == (2, 1, 2, 8, 8)
    assert videos.device.type == "cpu"
    assert not inferencer.model.training
    torch.manual_seed(123)
    assert torch.equal(inferencer(labels=[3, 7], seed=0), videos)
    assert not close_in_grey(inferencer(labels=[3, 7], seed=1), videos)


def test_the_same_sample_whatever_the_batch_size(inferencer):
    done = []
    videos = inferencer(labels=[3, 7, 3, 1, 9], batch_size=5)
    assert close_in_grey(
        inferencer(labels=[3, 7, 3, 1, 9], batch_size=2, progress=done.append), videos
    )
    assert close_in_grey(inferencer(labels=[3], batch_size=1), videos[:1])
    assert done == [2, 4, 5]
    assert not close_in_grey(videos[0], videos[2])  # one label, two samples


def test_labels_are_repeated_and_cut(inferencer):
    assert torch.equal(inferencer(labels=[3, 7], num_samples=3), inferencer(labels=[3, 7, 3]))
    assert torch.equal(inferencer(labels=[3, 7], num_samples=1), inferencer(labels=[3]))
    every = inferencer(labels=[*range(10), 0, 1])
    assert torch.equal(inferencer(num_samples=12), every)
    assert torch.equal(inferencer(), inferencer(labels=range(10)))


def test_the_average_is_taken_unless_the_weights_are_asked_for(checkpoint, inferencer):
    content = load_checkpoint(checkpoint)
    raw = Inferencer(checkpoint, use_ema=False)
    for model, key in ((inferencer.model, "ema"), (raw.model, "state_dict")):
        name = "head.weight" if key == "ema" else "denoiser.head.weight"
        assert torch.equal(model.denoiser.head.weight, content[key][name])
    assert not close_in_grey(raw(labels=[3, 7]), inferencer(labels=[3, 7]))


def test_another_config_than_the_checkpoints_own(checkpoint, inferencer):
    cfg = config_of(load_checkpoint(checkpoint), checkpoint)
    assert torch.equal(Inferencer(checkpoint, cfg)([3]), inferencer([3]))
    cfg.model.diffusion.solver = {"type": "Heun"}
    assert not torch.equal(Inferencer(checkpoint, cfg)([3]), inferencer([3]))
    with pytest.raises(UserError, match=r"another architecture.*denoiser\."):
        Inferencer(checkpoint, "latte_moving_digits")


@pytest.mark.parametrize("label", [-1, 10])
def test_a_label_out_of_range_is_refused(inferencer, label):
    message = f"label {label} is out of range: the model knows 10 classes, 0 to 9"
    with pytest.raises(UserError, match=message):
        inferencer(labels=[3, label])


def test_an_unconditional_model_takes_no_labels(tiny_config):
    cfg = tiny_config(
        {
            "model.conditioner": None,
            "model.denoiser.num_classes": 0,
            "train_cfg.max_iters": 1,
        }
    )
    RUNNERS.build(cfg).train()
    inferencer = Inferencer(f"{cfg.work_dir}/iter_1")
    assert inferencer(num_samples=3).shape == (3, 1, 2, 8, 8)
    assert inferencer().shape == (1, 1, 2, 8, 8)
    with pytest.raises(UserError, match="unconditional: it takes no labels"):
        inferencer(labels=[3])


def test_checkpoints_that_are_none(tmp_path, checkpoint):
    content = load_checkpoint(checkpoint)
    with pytest.raises(UserError, match=r"nothing.pth does not exist"):
        Inferencer(tmp_path / "nothing.pth")
    del content["meta"]["cfg"]
    save_checkpoint(content, tmp_path / "no_config.pth")
    with pytest.raises(UserError, match=r"no_config.pth holds no config; name one: CONFIG"):
        Inferencer(tmp_path / "no_config.pth")
    save_checkpoint({"meta": load_checkpoint(checkpoint)["meta"]}, tmp_path / "no_weights.pth")
    with pytest.raises(UserError, match=r"no_weights.pth holds no weights of a denoiser"):
        Inferencer(tmp_path / "no_weights.pth")


def test_build_model(checkpoint, tiny_config):
    untrained = build_model("latte_moving_digits", device="cpu")
    assert isinstance(untrained, LatentDiffusion)
    assert not untrained.training
    assert not untrained.denoiser.head.weight.any()
    trained = build_model(tiny_config(), checkpoint)
    ema = load_checkpoint(checkpoint)["ema"]
    assert all(torch.equal(v, ema[k]) for k, v in trained.denoiser.state_dict().items())


def test_what_a_part_has_against_its_config_is_one_line(tiny_config):
    cfg = tiny_config({"model.denoiser.size": (2, 9, 9)})
    with pytest.raises(UserError, match="is not divisible by patch") as e:
        build_model(cfg)
    assert "\n" not in str(e.value)
    assert "Latte" in str(e.value)


def test_a_model_of_texts_takes_prompts(tiny_config, tmp_path, inferencer, fill_weights):
    texts = {"": 0, "a fox": 1, "a cat": 2}
    states = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0))
    content = {"states": states, "mask": torch.ones(3, 5, dtype=torch.bool)}
    save_file(content, tmp_path / "texts.safetensors", {"texts": json.dumps(list(texts))})
    cfg = tiny_config({"model.denoiser.num_classes": 0})
    cfg.model.denoiser.text = (5, 6)
    encoder = dict(type=CachedText, file=str(tmp_path / "texts.safetensors"), length=5, width=6)
    cfg.model.conditioner = dict(type="TextConditioner", encoder=encoder)
    model = build_model(cfg)
    fill_weights(model.denoiser)
    save_checkpoint({"meta": {}, "state_dict": model.state_dict()}, tmp_path / "text.pth")
    told = Inferencer(tmp_path / "text.pth", cfg)
    videos = told(prompts=["a fox", "a cat"])
    assert videos.shape == (2, 1, 2, 8, 8)
    assert torch.equal(told(prompts=["a fox", "a cat"], num_samples=3)[:2], videos)
    assert close_in_grey(told(prompts=["a fox"]), videos[:1])
    assert not close_in_grey(told(prompts=["a cat"]), videos[:1])
    with pytest.raises(UserError, match="told texts: it takes no labels, give prompts"):
        told(labels=[3])
    with pytest.raises(UserError, match="told texts: give prompts"):
        told(num_samples=2)
    with pytest.raises(UserError, match="takes no text: remove the prompts"):
        inferencer(prompts=["a fox"])
