"""One optimizer step: precision, accumulation, clipping, and the norm that is logged."""

import pytest
import torch
from mmengine.hooks import Hook
from torch import nn

from mmsora.engine import AutocastOptimWrapper
from mmsora.registry import RUNNERS
from mmsora.utils.checkpoint import load_checkpoint

LR = 0.5


def wrapper(weights, **kwargs):
    return AutocastOptimWrapper(torch.optim.SGD(weights, lr=LR), **kwargs)


def gradient_step(scale=1.0, **kwargs):
    """A step with the gradient (3, 4) times scale; the weights after it."""
    weight = nn.Parameter(torch.zeros(2))
    optim_wrapper = wrapper([weight], **kwargs)
    optim_wrapper.update_params((weight * scale * torch.tensor([3.0, 4.0])).sum())
    return optim_wrapper, weight.detach()


@pytest.mark.parametrize("precision", ["off", "bf16", "fp16"])
def test_the_forward_pass_runs_in_the_precision_and_weights_stay_float32(precision):
    layer = nn.Linear(4, 4)
    optim_wrapper = wrapper(layer.parameters(), precision=precision)
    with optim_wrapper.optim_context(layer):
        inside = layer(torch.ones(1, 4))
    with optim_wrapper.autocast():
        assert layer(torch.ones(1, 4)).dtype == inside.dtype
    dtypes = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    assert inside.dtype == dtypes[precision]
    before = layer.weight.detach().clone()
    optim_wrapper.update_params(inside.float().mean())
    assert layer.weight.dtype == torch.float32
    torch.testing.assert_close(layer.weight, before - LR / 4)  # whatever the scale was


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="precision must be one of off, bf16, fp16; got 'fp8'"):
        gradient_step(precision="fp8")


@pytest.mark.parametrize(
    ("clip_grad", "message"),
    [
        ({"type": "size", "max_norm": 1}, "clip_grad.type must be norm or value, got 'size'"),
        ({"max_norm": 1, "foreach": True}, "of type norm takes max_norm and norm_type; got"),
        ({"norm_type": 1}, "of type norm takes max_norm and norm_type; got norm_type"),
        ({"type": "value", "max_norm": 1}, "of type value takes clip_value; got max_norm"),
        ({"max_norm": "big"}, "clip_grad.max_norm must be a number above 0, got 'big'"),
    ],
)
def test_clipping_that_would_do_nothing_is_refused(clip_grad, message):
    with pytest.raises(ValueError, match=message):
        gradient_step(clip_grad=clip_grad)


@pytest.mark.parametrize("precision", ["off", "fp16"])
def test_gradients_are_clipped_to_a_value_and_the_norm_is_logged(precision):
    clip_grad = {"type": "value", "clip_value": 3.5}
    optim_wrapper, clipped = gradient_step(-1.0, clip_grad=clip_grad, precision=precision)
    torch.testing.assert_close(clipped, LR * torch.tensor([3.0, 3.5]))
    assert optim_wrapper.message_hub.get_scalar("train/grad_norm").current() == pytest.approx(5)


@pytest.mark.parametrize(("norm_type", "norm"), [(1, 7), (float("inf"), 4)])
def test_the_norm_may_be_another(norm_type, norm):
    optim_wrapper, clipped = gradient_step(clip_grad={"max_norm": 1, "norm_type": norm_type})
    torch.testing.assert_close(clipped, -LR * torch.tensor([3.0, 4.0]) / norm)
    logged = optim_wrapper.message_hub.get_scalar("train/grad_norm").current()
    assert logged == pytest.approx(norm)


@pytest.mark.parametrize("precision", ["off", "fp16"])
def test_gradients_are_clipped_to_the_norm_and_never_enlarged(precision):
    _, clipped = gradient_step(clip_grad={"max_norm": 1.0}, precision=precision)
    torch.testing.assert_close(clipped, -LR * torch.tensor([0.6, 0.8]))
    for clip_grad in (None, {"max_norm": 6.0}):
        _, free = gradient_step(clip_grad=clip_grad, precision=precision)
        torch.testing.assert_close(free, -LR * torch.tensor([3.0, 4.0]))


@pytest.mark.parametrize("clip_grad", [None, {"max_norm": 1.0}])
@pytest.mark.parametrize("precision", ["off", "bf16", "fp16"])
def test_the_norm_is_logged_unscaled_and_before_clipping(clip_grad, precision):
    optim_wrapper, _ = gradient_step(clip_grad=clip_grad, precision=precision)
    assert optim_wrapper.message_hub.get_scalar("train/grad_norm").current() == pytest.approx(5)


def test_overflowing_fp16_gradients_change_nothing_and_lower_the_scale():
    optim_wrapper, weight = gradient_step(scale=float("inf"), precision="fp16")
    assert torch.equal(weight, torch.zeros(2))
    assert optim_wrapper.scaler.get_scale() == 2.0**15


def test_the_state_of_the_scaler_is_saved_and_precisions_may_change():
    optim_wrapper, _ = gradient_step(scale=float("inf"), precision="fp16")
    state = optim_wrapper.state_dict()
    assert state["loss_scaler"]["scale"] == 2.0**15
    resumed, _ = gradient_step(precision="fp16")
    resumed.load_state_dict(state)
    assert resumed.scaler.get_scale() == 2.0**15
    assert "loss_scaler" in state  # the caller's dict is as it was
    plain, _ = gradient_step()
    plain.load_state_dict(state)
    assert "loss_scaler" not in plain.state_dict()
    resumed.load_state_dict(plain.state_dict())


def test_micro_batches_make_the_step_of_the_whole_batch():
    torch.manual_seed(0)
    data, layers = torch.randn(8, 3), [nn.Linear(3, 1) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    for layer, size in zip(layers, (8, 2), strict=True):
        optim_wrapper = wrapper(
            layer.parameters(), accumulative_counts=8 // size, clip_grad={"max_norm": 0.1}
        )
        optim_wrapper.initialize_count_status(layer, 0, 8 // size)
        before = layer.weight.detach().clone()
        for part in data.split(size):
            assert torch.equal(layer.weight, before)
            with optim_wrapper.optim_context(layer):
                loss = layer(part).square().mean()
            optim_wrapper.update_params(loss)
    assert not torch.equal(layers[0].weight, before)
    torch.testing.assert_close(layers[1].weight, layers[0].weight)


@pytest.mark.parametrize("precision", ["off", "bf16", "fp16"])
def test_every_precision_trains_resumes_and_samples(tiny_config, scalars, precision):
    cfg = tiny_config(
        {"optim_wrapper.precision": precision, "default_hooks.checkpoint.interval": 3},
        samples=True,
    )
    runner = RUNNERS.build(cfg)
    dtypes = set()
    runner.model.denoiser.head.register_forward_hook(lambda *args: dtypes.add(args[2].dtype))
    runner.train()
    expected = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    assert dtypes == {expected[precision]}  # in training and in the SampleHook's samples
    state = load_checkpoint(f"{cfg.work_dir}/iter_3")
    assert bool(state["optim_wrapper"]["scaler"]) == (precision == "fp16")
    assert all(value.dtype == torch.float32 for value in state["state_dict"].values())
    losses = [line["loss"] for line in scalars(cfg.work_dir)]
    again = tiny_config({"optim_wrapper.precision": precision}, work_dir=f"{cfg.work_dir}_again")
    again.resume, again.load_from = True, f"{cfg.work_dir}/iter_3"
    RUNNERS.build(again).train()
    assert [line["loss"] for line in scalars(again.work_dir)] == losses[3:]


def test_the_logged_norm_is_that_of_all_gradients(tiny_config, scalars):
    norms = []

    class Measure(Hook):
        def before_train(self, runner):
            runner.optim_wrapper.optimizer.register_step_pre_hook(self.measure)

        def measure(self, optimizer, *args):
            (group,) = optimizer.param_groups
            squares = [weight.grad.double().square().sum() for weight in group["params"]]
            norms.append(float(torch.stack(squares).sum().sqrt()))

    cfg = tiny_config({"train_cfg.max_iters": 3})
    del cfg.optim_wrapper.clip_grad
    runner = RUNNERS.build(cfg)
    runner.register_hook(Measure())
    runner.train()
    assert [line["grad_norm"] for line in scalars(cfg.work_dir)] == pytest.approx(norms, rel=1e-5)
    assert min(norms) > 0.1


@pytest.mark.parametrize("frozen", [True, False])
def test_batch_norms_of_frozen_parts_are_no_matter_for_accumulation(monkeypatch, frozen):
    said = []
    monkeypatch.setattr(
        "mmengine.optim.optimizer.optimizer_wrapper.print_log", lambda line, **_: said.append(line)
    )
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2)))
    model[1].requires_grad_(not frozen)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    AutocastOptimWrapper(optimizer, accumulative_counts=2).initialize_count_status(model, 0, 4)
    assert bool(said) is not frozen
