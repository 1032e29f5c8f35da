"""The model: losses and samples that depend on the sample alone, and what does not fit."""

import pytest
import torch
from mmengine.logging import MessageHub
from mmengine.registry import init_default_scope
from torch import nn

from mmsora.diffusion import UniformTimes, Weighting
from mmsora.models import VAE, latent_diffusion
from mmsora.registry import DENOISERS, MODELS
from mmsora.structures.video_sample import VideoSample
from mmsora.utils.checkpoint import load_checkpoint, save_checkpoint
from mmsora.utils.config_check import check_config
from mmsora.utils.draws import Draws
from mmsora.utils.user_error import UserError

INDICES = [5, 17, 2, 900]
LABELS = [3, 7, 0, 9]


@pytest.fixture
def build(tiny_config, fill_weights):
    """Call it with changes to get a model whose every weight matters."""

    def make(changes=None):
        init_default_scope("mmsora")
        return fill_weights(MODELS.build(tiny_config(changes).model)).eval()

    return make


def unconditional(changes=None):
    return {"model.conditioner": None, "model.denoiser.num_classes": 0, **(changes or {})}


def annotations(indices=INDICES, labels=LABELS):
    return [VideoSample(index=i, label=y) for i, y in zip(indices, labels, strict=True)]


def clips(count=4):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 1, 2, 8, 8, generator=generator) * 2 - 1


def losses(model, rows, seed=0, step=3):
    samples = [annotations()[row] for row in rows]
    draws = Draws(seed, [sample.index for sample in samples], step)
    loss = model.loss(clips()[rows], samples, draws)
    assert set(loss) == {"loss_diffusion"}
    return loss["loss_diffusion"]


def close_in_grey(one, other):
    """Equal but where rounding errors of another batch size cross a boundary of a grey value."""
    return (one.int() - other.int()).abs().max() <= 1 and (one == other).float().mean() > 0.98


# The loss


@pytest.mark.parametrize("changes", [{"model.conditioner.drop_prob": 0.5}, unconditional()])
def test_a_loss_depends_on_its_sample_and_not_on_the_batch(build, changes):
    model = build(changes)
    batch = losses(model, [0, 1, 2, 3])
    assert batch.shape == (4,)
    assert batch.min() > 0.1
    alone = torch.cat([losses(model, [row]) for row in range(4)])
    torch.testing.assert_close(alone, batch)
    torch.testing.assert_close(losses(model, [3, 1]), batch[[3, 1]])


def test_a_loss_depends_on_seed_index_step_and_label(build):
    model = build()
    loss = losses(model, [0])
    assert torch.equal(losses(model, [0]), loss)
    others = [losses(model, [0], seed=1), losses(model, [0], step=4)]
    inputs, draws = clips()[:1], Draws(0, INDICES[:1], 3)
    others.append(model.loss(inputs, annotations()[:1], Draws(0, [6], 3))["loss_diffusion"])
    others.append(model.loss(inputs, annotations([5], [4]), draws)["loss_diffusion"])
    assert all(abs(other - loss) > 1e-3 for other in others)


def test_a_dropped_label_is_the_null_label(build):
    always, never = (build({"model.conditioner.drop_prob": p}) for p in (1.0, 0.0))
    told = []
    for model in (always, never):
        model.denoiser.register_forward_hook(
            lambda module, args, kwargs, output: told.append(kwargs["label"].tolist()),
            with_kwargs=True,
        )
        losses(model, [0, 1])
    assert told == [[10, 10], [3, 7]]


def test_the_seed_and_the_step_come_from_the_message_hub(build):
    model = build()
    hub = MessageHub.get_instance("test_latent_diffusion")  # the newest one is the current one
    with pytest.raises(RuntimeError, match="no seed or iteration in MMEngine's MessageHub"):
        model(clips(), annotations(), mode="loss")
    hub.update_info("seed", 0)
    with pytest.raises(RuntimeError, match=r"call loss\(inputs, data_samples, Draws"):
        model(clips(), annotations(), mode="loss")
    hub.update_info("iter", 3)
    loss = model(clips(), annotations(), mode="loss")["loss_diffusion"]
    assert torch.equal(loss, losses(model, [0, 1, 2, 3]))
    hub.update_info("iter", 4)
    assert not torch.equal(model(clips(), annotations(), mode="loss")["loss_diffusion"], loss)


def test_every_weight_of_the_denoiser_learns(build):
    model = build({"model.conditioner.drop_prob": 0.5})
    losses(model, [0, 1, 2, 3]).mean().backward()
    assert all(weight.grad.abs().max() > 0 for weight in model.denoiser.parameters())


# Sampling


def test_a_sample_does_not_depend_on_the_batch(build):
    model = build()
    batch = model.predict(annotations(), seed=1)
    assert batch.dtype == torch.uint8
    assert batch.shape == (4, 1, 2, 8, 8)
    alone = torch.cat([model.predict([sample], seed=1) for sample in annotations()])
    assert close_in_grey(alone, batch)
    assert not close_in_grey(batch[:1], batch[1:2])


def test_a_sample_depends_on_seed_index_and_label(build):
    model = build()
    (sample,) = model.predict(annotations([5], [3]), seed=0)
    assert torch.equal(model.predict(annotations([5], [3]), seed=0)[0], sample)
    for samples, seed in (([5], [3]), 1), (([6], [3]), 0), (([5], [4]), 0):
        assert not close_in_grey(model.predict(annotations(*samples), seed)[0], sample)


def test_an_unconditional_model_needs_no_labels(build):
    model = build(unconditional())
    samples = [VideoSample(index=i) for i in INDICES]
    videos = model.predict(samples)
    assert videos.shape == (4, 1, 2, 8, 8)
    assert close_in_grey(model.predict(samples[2:3]), videos[2:3])
    assert torch.equal(model(clips(), samples, mode="predict"), videos)


@pytest.mark.parametrize(("scale", "calls"), [(1.0, 3), (2.0, 6)])
def test_guidance_asks_for_the_label_and_for_none(build, scale, calls):
    model = build({"model.diffusion.guidance.scale": scale})
    told = []
    model.denoiser.register_forward_hook(
        lambda module, args, kwargs, output: told.append(tuple(kwargs["label"].tolist())),
        with_kwargs=True,
    )
    model.predict(annotations([0, 1], [3, 7]))
    assert len(told) == calls
    assert set(told) == ({(3, 7), (10, 10)} if scale != 1 else {(3, 7)})


def test_latents_become_grey_values_that_are_rounded_and_clipped(build):
    model = build()
    greys = torch.arange(256.0)
    between = torch.cat([greys, greys[:-1] + 0.4, greys[1:] - 0.4, torch.tensor([-999, 999])])
    latent = between / 127.5 - 1
    model.diffusion.sample = lambda *args: latent.reshape(1, 1, 1, 1, -1)
    expected = torch.cat([greys, greys[:-1], greys[1:], torch.tensor([0.0, 255])])
    assert torch.equal(model.predict(annotations([0], [0])).flatten().float(), expected)


def test_modes_of_forward(build):
    model = build()
    assert torch.equal(model(clips(), annotations()), clips())  # IdentityVAE
    assert torch.equal(model(clips(), annotations(), mode="predict"), model.predict(annotations()))
    with pytest.raises(ValueError, match="mode must be 'loss', 'predict' or 'tensor', got 'los'"):
        model(clips(), annotations(), mode="los")


# What does not fit


@pytest.mark.parametrize(
    ("changes", "told", "known"),
    [
        ({"model.denoiser.num_classes": 5}, 10, 5),
        ({"model.conditioner": None}, 0, 10),
        ({"model.denoiser.num_classes": 0}, 10, 0),
    ],
)
def test_conditioner_and_denoiser_know_the_same_classes(build, changes, told, known):
    message = f"conditioner has num_classes={told} and the denoiser num_classes={known}"
    with pytest.raises(ValueError, match=message):
        build(changes)


class Scaling(VAE):
    """A VAE with a weight."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def encode(self, video, draws=None):
        return video * self.scale

    def decode(self, latent):
        return latent / self.scale

    def init_weights(self):
        self.scale.data.fill_(3.0)


def test_the_vae_reads_its_weights_late_and_never_learns(build):
    model = build({"model.vae": {"type": Scaling}})
    model.init_weights()
    assert model.vae.scale == 3
    assert torch.equal(model(clips(), annotations()), 3 * clips())
    losses(model, [0]).sum().backward()
    assert model.vae.scale.grad is None
    assert not model.vae.scale.requires_grad


# A weaker network


@pytest.fixture
def weak(tiny_config, fill_weights, tmp_path):
    """A file of weights, and what makes the tiny config guide by them."""
    init_default_scope("mmsora")
    denoiser = {**tiny_config().model.denoiser, "depth": 4, "width": 8}
    weights = fill_weights(DENOISERS.build(denoiser)).state_dict()
    save_checkpoint({"meta": {}, "ema": weights, "state_dict": {}}, tmp_path / "weak.pth")
    return {
        "model.weak": dict(denoiser=denoiser, checkpoint=str(tmp_path / "weak.pth")),
        "model.diffusion.guidance": dict(type="Autoguidance", scale=2.0),
    }


def test_the_weaker_network_guides(build, weak):
    model, plain = build(weak), build()
    model.init_weights()
    told = []
    for name in ("denoiser", "weak"):
        getattr(model, name).register_forward_hook(
            lambda module, args, kwargs, out, name=name: told.append((name, args, kwargs, out)),
            with_kwargs=True,
        )
    video = model.predict(annotations([0, 1], [3, 7]))
    assert [call[0] for call in told] == ["denoiser", "weak"] * 3
    for (_, args, kwargs, _), (_, other_args, other_kwargs, _) in pairs(told):
        assert all(map(torch.equal, args, other_args))
        assert kwargs["label"].tolist() == other_kwargs["label"].tolist() == [3, 7]
    assert not close_in_grey(video, plain.predict(annotations([0, 1], [3, 7])))


def pairs(calls):
    return zip(calls[::2], calls[1::2], strict=True)


def test_it_is_frozen_read_late_and_not_saved(build, weak, tiny_config, tmp_path):
    init_default_scope("mmsora")
    model = MODELS.build(tiny_config(weak).model).train()
    weights = load_checkpoint(tmp_path / "weak.pth")["ema"]
    assert not torch.equal(model.weak.head.weight, weights["head.weight"])
    model.init_weights()
    assert all(torch.equal(value, weights[key]) for key, value in model.weak.state_dict().items())
    assert model.denoiser.training
    assert not model.weak.training
    assert not any(weight.requires_grad for weight in model.weak.parameters())
    assert model.state_dict().keys() == build().state_dict().keys()
    assert losses(model, [0, 1]).shape == (2,)


@pytest.mark.parametrize(("changes", "message"), [
    ({"num_classes": 5}, "weak denoiser has num_classes=5 and the denoiser num_classes=10"),
    ({"out_channels": 2}, "weak denoiser has out_channels=2 and the denoiser out_channels=1"),
])  # fmt: skip
def test_the_weaker_network_is_told_and_says_the_same(build, weak, changes, message):
    weak["model.weak"]["denoiser"].update(changes)
    with pytest.raises(ValueError, match=message):
        build(weak)


def test_the_weaker_network_needs_its_weights(build, weak, tiny_config):
    del weak["model.weak"]["checkpoint"]
    with pytest.raises(ValueError, match=r"weak is dict\(denoiser=.*, checkpoint=FILE\); got den"):
        build(weak)
    weak["model.weak"] |= {"checkpoint": "x.pth", "chekpoint": "y.pth"}
    with pytest.raises(UserError, match="model.weak.chekpoint.* did you mean 'checkpoint'"):
        check_config(tiny_config(weak))


def test_a_weaker_network_of_other_classes_is_refused(build, weak, tmp_path):
    content = load_checkpoint(tmp_path / "weak.pth")
    content["ema"]["embed_label.weight"] = content["ema"]["embed_label.weight"][:5]
    save_checkpoint(content, tmp_path / "weak.pth")
    with pytest.raises(UserError, match=r"weak\.pth has no labels for num_classes=10"):
        build(weak).init_weights()


def test_a_model_without_a_row_for_none_may_have_a_weaker_one(build, weak):
    """Its guidance takes no condition away."""
    model = build(weak)
    model.denoiser.knows_null = False
    assert model.predict(annotations()).shape == (4, 1, 2, 8, 8)


# Parts of the process that learn or remember


class Learned(Weighting, nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("seen", torch.zeros(()))

    def __call__(self, path, prediction, t, errors):
        self.seen += len(errors)
        return errors * self.scale


class Remembering(UniformTimes, nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("last", torch.zeros(()))


def test_what_learns_in_the_process_is_trained_moved_and_saved(build):
    changes = {
        "model.diffusion.loss": dict(type="MSE", weighting=dict(type=Learned)),
        "model.diffusion.train_times": dict(type=Remembering),
    }
    model, plain = build(changes), build({"model.diffusion.train_times": dict(type=UniformTimes)})
    weighting = model.diffusion.loss_function.weighting
    weighting.scale.data.fill_(2.0)  # after the fill
    assert dict(model.named_parameters())["diffusion_state.weighting.scale"] is weighting.scale
    torch.testing.assert_close(losses(model, [0, 1]), 2 * losses(plain, [0, 1]))
    losses(model, [0]).mean().backward()
    assert weighting.scale.grad > 0
    state = model.state_dict()
    assert state["diffusion_state.weighting.seen"] == 3
    assert "diffusion_state.train_times.last" in state
    assert not [key for key in plain.state_dict() if "diffusion_state" in key]
    model.double()
    assert weighting.seen.dtype == torch.float64  # it goes where the model goes


def test_a_sample_knows_its_place_in_the_batch_of_all_processes(build, monkeypatch):
    model, given = build(), []
    hub = MessageHub.get_instance("test_places")
    hub.update_info("seed", 0)
    hub.update_info("iter", 3)
    monkeypatch.setattr(latent_diffusion, "data_info", lambda: (1, 3))
    model.loss = lambda inputs, samples, draws: given.append(draws) or {}
    model(clips(), annotations(), mode="loss")
    expected = Draws(0, INDICES, 3, places=[1, 4, 7, 10], total=12)
    assert torch.equal(given[0].stratified("times"), expected.stratified("times"))
    other = Draws(0, INDICES, 3, places=[0, 3, 6, 9], total=12)
    assert not torch.equal(given[0].stratified("times"), other.stratified("times"))


def test_a_stand_in_counts_for_nothing(build):
    """A sample of weight 0 changes neither the loss of the others nor any gradient."""
    model, hub = build(), MessageHub.get_instance("test_stand_ins")
    hub.update_info("seed", 0)
    hub.update_info("iter", 3)
    found = []
    for other in (clips()[1], -clips()[1]):
        samples = annotations()
        samples[1].weight = 0.0
        inputs = clips()
        inputs[1] = other
        loss = model(inputs, samples, mode="loss")["loss_diffusion"]
        assert loss[1] == 0
        assert (loss[[0, 2, 3]] > 0).all()
        model.zero_grad()
        loss.mean().backward()
        gradients = [p.grad for p in model.denoiser.parameters() if p.grad is not None]
        found.append(torch.cat([gradient.flatten() for gradient in gradients]))
    torch.testing.assert_close(*found)
