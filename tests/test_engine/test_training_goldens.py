"""Three training steps of DiT, SiT and Latte against numbers written down with the authors' code.

AdamW at 1e-4, an average of 0.9999 without warm-up, label dropout off; times and noise are given.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mmsora import diffusion as D
from mmsora.engine import AutocastOptimWrapper, DenoiserEMAHook
from mmsora.registry import DENOISERS
from mmsora.utils.checkpoint import load_denoiser

GOLDENS = {
    "DiT": dict(
        case="dit_small", rows=10, images="x0", noise="nz", shape=(2, 4, 16, 16), clip=None,
        start=60348.2275, model=60348.214, ema=60348.2245,
        steps=[(2.073776, 3.41373), (1.997541, 2.90389), (1.95265, 2.69188)],
    ),
    "Latte": dict(
        case="latte_small_uncond", rows=None, images="v0", noise="vn", shape=(2, 6, 4, 16, 16),
        clip=0.1, start=None, model=60574.934, ema=60574.787,
        steps=[(2.2297, 3.94474), (2.093867, 3.46198), (2.014585, 3.30127)],
    ),
    "SiT": dict(
        case="dit_small", rows=10, images="x0", noise="nz", shape=(2, 4, 16, 16), clip=None,
        start=60348.2275, model=60348.527, ema=60348.2246,
        steps=[(2.891645, 2.88366), (2.917, 3.58093), (2.810966, 2.97727)],
    ),
}  # fmt: skip


class Given:
    """Draws with given fractions of the path and noise."""

    def __init__(self, fractions, noise):
        self.fractions, self.noise = torch.tensor(fractions, dtype=torch.float64), noise

    def uniform(self, name):
        return self.fractions

    def normal(self, name, like):
        return self.noise


def fractions(kind, step):
    """DiT's and Latte's are levels of a table, SiT's times run from noise to data."""
    if kind == "SiT":
        return [0.8 - 0.1 * step, 0.3 + 0.1 * step]
    return [(37.5 + step) / 1000, (801.5 - step) / 1000]


def process(kind="DiT"):
    if kind == "SiT":
        return D.Diffusion(
            D.LinearPath(clock_scale=1.0, reverse_clock=True), D.VelocityPrediction(sign=-1),
            D.UniformTimes(), D.Euler(), D.SpacedGrid(250), D.ClassifierFree(1.0), D.MSE(),
        )  # fmt: skip
    return D.Diffusion(
        D.DiscretePath(), D.LearnedRange(D.NoisePrediction()), D.UniformTimes(), D.Ancestral(),
        D.SpacedGrid(250), D.ClassifierFree(1.0), D.Hybrid(),
    )  # fmt: skip


def build(kind, weights):
    """SiT's code made eight channels and threw four away: ours has four, and these are let go."""
    sizes = dict(out_channels=4 if kind == "SiT" else 8, patch=2, width=96, depth=4, heads=4)
    frames, classes = (6, 0) if kind == "Latte" else (1, 10)
    model = DENOISERS.build(
        dict(
            type="Latte" if kind == "Latte" else "DiT", in_channels=4, size=(frames, 16, 16),
            num_classes=classes, **sizes,
        )
    ).eval()  # fmt: skip
    load_denoiser(model, weights)
    return model


def unused(kind, weights):
    """Sum of the absolute values that SiT's code kept and never moved."""
    if kind != "SiT":
        return 0.0
    rows = (weights[f"final_layer.linear.{name}"].double() for name in ("weight", "bias"))
    return sum(row.unflatten(0, (4, 8))[:, 4:].abs().sum().item() for row in rows)


def as_video(x):
    """Images are one frame; videos were (B, F, C, H, W)."""
    return x.unsqueeze(2) if x.ndim == 4 else x.transpose(1, 2)


def runner_of(model, optim_wrapper):
    """As much of a runner as the hook looks at."""
    return SimpleNamespace(
        model=SimpleNamespace(denoiser=model), optim_wrapper=optim_wrapper, iter=0, max_iters=100
    )


def total(model, average=None):
    """Sum of all absolute values: tables of positions count, the label for "none" does not."""
    state = {**model.state_dict(), **(average or {})}
    if "embed_label.weight" in state:
        state["embed_label.weight"] = state["embed_label.weight"][:-1]
    return sum(value.double().abs().sum().item() for value in state.values())


@pytest.mark.parametrize("kind", GOLDENS)
def test_three_steps(public_weights, filled, kind):
    golden = GOLDENS[kind]
    weights = public_weights(golden["case"], golden["rows"])
    model, diffusion, rest = build(kind, weights), process(kind), unused(kind, weights)
    if golden["start"]:
        assert total(model) + rest == pytest.approx(golden["start"], rel=1e-8)
    optim_wrapper = AutocastOptimWrapper(
        torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0),
        clip_grad=golden["clip"] and dict(max_norm=golden["clip"]),
    )
    ema, runner = DenoiserEMAHook(decay=0.9999, warmup=False), runner_of(model, optim_wrapper)
    ema.before_train(runner)
    cond = {} if kind == "Latte" else {"label": torch.tensor([3, 9])}

    for step, (expected_loss, expected_norm) in enumerate(golden["steps"]):
        x0, noise = (
            as_video(filled(f"{golden[name]}_{step}", golden["shape"]))
            for name in ("images", "noise")
        )
        with optim_wrapper.optim_context(model):
            losses = diffusion.loss(model, x0, cond, Given(fractions(kind, step), noise))
        assert losses.mean().item() == pytest.approx(expected_loss, rel=1e-4)
        optim_wrapper.update_params(losses.mean())
        norm = optim_wrapper.message_hub.get_scalar("train/grad_norm").current()
        assert norm == pytest.approx(expected_norm, rel=1e-4)
        ema.after_train_iter(runner, step)
        runner.iter += 1

    checkpoint = {}
    ema.before_save_checkpoint(runner, checkpoint)
    assert checkpoint["ema_steps"] == 3
    # Bounds that tell the average from the weights, and the weights from their start.
    assert total(model) + rest == pytest.approx(golden["model"], rel=0, abs=1e-3)
    average = total(model, checkpoint["ema"]) + rest
    assert average == pytest.approx(golden["ema"], rel=0, abs=5e-3)


def test_an_untrained_dit_costs_the_noise_and_the_bound(filled):
    torch.manual_seed(0)
    sizes = dict(size=(1, 16, 16), patch=2, width=96, depth=4, heads=4, num_classes=10)
    model = DENOISERS.build(dict(type="DiT", in_channels=4, out_channels=8, **sizes))
    x0, noise = (as_video(filled(f"{name}_0", (2, 4, 16, 16))) for name in ("x0", "nz"))
    cond = {"label": torch.tensor([3, 9])}
    losses = process().loss(model, x0, cond, Given(fractions("DiT", 0), noise))
    assert losses.tolist() == pytest.approx([1.050367, 1.015629], rel=1e-4)


@pytest.mark.parametrize(("accumulate", "clip_from"), [(1, 0), (1, 2), (2, 1), (2, 3)])
def test_clipping_starts_late(accumulate, clip_from):
    """``clip_from`` updates are measured only, however many micro-batches they are made of."""
    weight = nn.Parameter(torch.zeros(2))
    optim_wrapper = AutocastOptimWrapper(
        torch.optim.SGD([weight], lr=1.0), accumulative_counts=accumulate,
        clip_grad=dict(max_norm=0.1), clip_from=clip_from,
    )  # fmt: skip
    optim_wrapper.initialize_count_status(nn.Linear(1, 1), 0, 4 * accumulate)
    moves = []
    for _ in range(4):
        before = weight.detach().clone()
        for _ in range(accumulate):
            optim_wrapper.update_params((weight * torch.tensor([3.0, 4.0])).sum())
        moves.append((weight.detach() - before).norm().item())
        norm = optim_wrapper.message_hub.get_scalar("train/grad_norm").current()
        assert norm == pytest.approx(5.0)
    assert moves == pytest.approx([5.0] * clip_from + [0.1] * (4 - clip_from), rel=1e-4)


def test_late_clipping_counts_on_after_a_resume():
    weight = nn.Parameter(torch.zeros(2))
    optim_wrapper = AutocastOptimWrapper(
        torch.optim.SGD([weight], lr=1.0), clip_grad=dict(max_norm=0.1), clip_from=5
    )
    optim_wrapper.initialize_count_status(nn.Linear(1, 1), 4, 10)  # as a resumed runner does
    for expected in (5.0, 0.1):
        before = weight.detach().clone()
        optim_wrapper.update_params((weight * torch.tensor([3.0, 4.0])).sum())
        assert (weight.detach() - before).norm().item() == pytest.approx(expected, rel=1e-4)
