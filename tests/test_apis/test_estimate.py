"""Bytes equal those of real runs, and advice is worth what it says."""

import json
import sys
from pathlib import Path

import pytest
import torch
from mmengine.registry import init_default_scope

from mmsora.apis.estimate import advise, changed, estimate, fits, refuse_what_cannot_fit
from mmsora.apis.estimate.frozen import outline_encoders
from mmsora.apis.estimate.state import optimizer_bytes
from mmsora.apis.estimate.step import cost_of, setup_of
from mmsora.apis.estimate.total import _largest, largest_batch
from mmsora.models import CLIPText, DINOv2
from mmsora.utils.config_check import apply_choice
from mmsora.utils.config_names import load_config
from mmsora.utils.gpus import GPUS
from mmsora.utils.user_error import UserError
from tests.conftest import tiny
from tests.ranks import start_ranks
from tests.test_apis.estimate_worker import CHANGES, count

PARTS = ("weights", "gradients", "optimizer", "averages")
MODES = ("ddp", "zero1", "zero2", "zero3")
init_default_scope("mmsora")


@pytest.fixture(scope="module")
def small():
    """DiT-S/2 on latents from a cache, two blocks of it."""
    cfg = load_config("dit_b2_imagenet_256_cached")
    return changed(cfg, {"model.denoiser.depth": 2, "train_dataloader.batch_size": 8})


# Bytes that stay


def test_one_process_holds_what_was_estimated(tmp_path):
    cfg = tiny(tmp_path, CHANGES)
    found, parts = count(cfg), estimate(cfg).parts
    assert {name: parts[name] for name in PARTS} == found
    assert found["averages"] == 2 * found["gradients"] < 2 * found["weights"]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    worker = Path(__file__).with_name("estimate_worker.py")
    processes = start_ranks([sys.executable, worker, ",".join(MODES), folder], 2, folder)
    try:
        codes = [process.wait(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0, 0], (folder / "rank_0.txt").read_text()[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("mode", MODES)
def test_the_process_that_holds_most_holds_what_was_estimated(mode, two_processes, tmp_path):
    parts = estimate(tiny(tmp_path, {**CHANGES, "parallel": {"mode": mode}}), 2).parts
    most = {name: max(rank[mode][name] for rank in two_processes) for name in PARTS}
    assert {name: parts[name] for name in PARTS} == most


@pytest.mark.parametrize(
    ("optimizer", "bytes_a_number"),
    [
        ({"type": "AdamW", "lr": 0.1, "fused": True}, 8),
        ({"type": "Adam", "lr": 0.1, "amsgrad": True}, 12),
        ({"type": "SGD", "lr": 0.1, "momentum": 0.9}, 4),
        ({"type": "SGD", "lr": 0.1}, 0),
        ({"type": "AdamW8bit", "lr": 0.1}, 2 + 8 / 256),
    ],
    ids=lambda value: value["type"] if isinstance(value, dict) else None,
)
def test_the_state_of_an_optimizer(optimizer, bytes_a_number):
    weight = torch.empty(256, 32, device="meta")
    found, _ = optimizer_bytes(optimizer, [weight])
    steps = 4 if "Adam" in optimizer["type"] and "8" not in optimizer["type"] else 0
    assert found == bytes_a_number * weight.numel() + steps


def test_small_weights_have_32_bits_of_state_each():
    found, _ = optimizer_bytes({"type": "AdamW8bit"}, [torch.empty(5, 3, device="meta")])
    assert found == 8 * 15


def test_an_optimizer_that_is_not_fused_needs_more_for_its_update():
    weights = [torch.empty(64, 64, device="meta")]
    fused = optimizer_bytes({"type": "AdamW", "fused": True}, weights)
    assert fused[1] == 0 < optimizer_bytes({"type": "AdamW"}, weights)[1]


# Frozen encoders


@pytest.mark.parametrize("encoder", [DINOv2("nowhere", width=384), CLIPText("nowhere", width=512)])
def test_encoders_are_as_large_as_those_of_transformers(encoder):
    import transformers

    with torch.device("meta"):
        outline_encoders(encoder, without_text=False)
        if isinstance(encoder, DINOv2):
            sizes = transformers.Dinov2Config(
                hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518,
                patch_size=14,
            )  # fmt: skip
            real = transformers.Dinov2Model(sizes)
        else:
            sizes = transformers.CLIPTextConfig(
                hidden_size=512, intermediate_size=2048, num_hidden_layers=12,
                num_attention_heads=8, vocab_size=49408,
            )  # fmt: skip
            real = transformers.CLIPTextModel(sizes)
    ours = sum(weight.numel() for weight in encoder.parameters())
    assert ours == sum(weight.numel() for weight in real.parameters())


def test_an_encoder_of_no_known_size_is_told():
    with pytest.raises(UserError, match="no DINOv2 of width 100 .* 384, 768, 1024, 1536"):
        outline_encoders(DINOv2("nowhere", width=100), without_text=False)


# Work


def test_work_grows_with_the_batch_and_recomputing_adds_a_forward_pass_of_the_blocks(small):
    one = cost_of(setup_of(changed(small, {"train_dataloader.batch_size": 1})))
    setup = setup_of(small)
    eight, again = cost_of(setup), cost_of(setup._replace(recompute='{"mode": "full"}'))
    assert eight.flops == 8 * one.flops
    assert eight.backward == pytest.approx(2 * eight.forward, rel=1e-3)
    assert again.backward == pytest.approx(3 * eight.forward, rel=0.01)
    assert again.activations < 0.75 * eight.activations
    selective = cost_of(setup._replace(recompute='{"mode": "selective"}'))
    assert selective.backward == eight.backward
    assert again.activations < selective.activations < eight.activations


def test_a_video_model_pays_for_its_vae_and_one_on_cached_latents_does_not(small):
    assert estimate(small).parts["frozen parts"] == 0 == estimate(small).cost.frozen
    cfg = changed(load_config("latte_ucf_joint"), {"train_dataloader.batch_size": 1})
    cfg = changed(cfg, {"model.denoiser.depth": 2, "model.denoiser.width": 64})
    found = estimate(cfg)
    assert found.parts["frozen parts"] == 4 * 83_653_863
    assert found.cost.frozen == pytest.approx(24 * 272.7e9, rel=1e-3)  # 16 frames and 8 images


def test_sequence_parallelism_shares_work_and_activations(small):
    whole = estimate(changed(small, {"parallel.mode": "zero1"}), 4)
    shared = estimate(changed(small, {"parallel.mode": "zero1", "parallel.sequence": 2}), 4)
    assert shared.flops == whole.flops / 2
    assert shared.parts["activations"] == whole.parts["activations"] // 2
    assert (whole.global_batch, shared.global_batch) == (32, 16)


def test_time_is_work_over_a_share_of_the_peak(small):
    found, gpu = estimate(small), GPUS["a100-80"]
    assert found.seconds(gpu, 0.5) == found.cost.flops / (312e12 * 0.5)
    assert found.hours(gpu, 0.5) == 400_000 * found.seconds(gpu, 0.5) / 3600
    full = estimate(changed(small, {"optim_wrapper.precision": "off"}))
    assert full.seconds(gpu, 0.5) == found.cost.flops / (19.5e12 * 0.5)


# Advice


@pytest.mark.parametrize("limit", [0, 1, 99, 100, 101, 5_000, 10**9])
@pytest.mark.parametrize(
    "size", [lambda n: 100 * n, lambda n: max(400, 30 * n), lambda n: 90 + n * n]
)
def test_the_largest_number_that_fits_is_found(size, limit):
    assert _largest(size, limit, 300) == max(
        (n for n in range(1, 301) if size(n) <= limit), default=0
    )


def test_the_largest_batch_fits_and_one_more_does_not(small):
    limit = 3 * 2**30
    most = largest_batch(small, limit)
    assert fits(changed(small, {"train_dataloader.batch_size": most}), limit)
    assert not fits(changed(small, {"train_dataloader.batch_size": most + 1}), limit)


@pytest.mark.parametrize("processes", [1, 2])
def test_advice_fits_and_nothing_of_it_can_be_left_out(small, processes):
    cfg = changed(small, {"optim_wrapper.precision": "off", "train_dataloader.batch_size": 64})
    limit = int(estimate(cfg, processes).total * 0.55)
    same, smaller = advise(cfg, limit, processes)
    for one in (same, smaller):
        assert one.estimate.total == estimate(changed(cfg, one.options), processes).total <= limit
        assert one.text.startswith("--cfg-options ")
        for key in one.options:
            alone = "parallel.offload" not in one.options or key != "parallel.mode"
            if alone and key.startswith(("activation", "parallel", "optim_wrapper.precision")):
                fewer = {k: v for k, v in one.options.items() if k != key}
                assert estimate(changed(cfg, fewer), processes).total > limit
    assert same.estimate.batch == 64
    assert smaller.estimate.batch * smaller.options["optim_wrapper.accumulative_counts"] == 64
    assert smaller.estimate.global_batch == same.estimate.global_batch


def test_where_weights_alone_are_too_many_more_gpus_are_advised(small):
    cfg = changed(small, {"model.denoiser.depth": 6, "train_dataloader.batch_size": 1})
    limit = int(1.45 * 2**30)
    (one,) = advise(changed(cfg, {"optim_wrapper.optimizer.fused": False}), limit)
    assert one.processes >= 1
    assert one.options["parallel.mode"] == "zero3"


def test_what_cannot_fit_is_refused_with_what_would(small):
    cfg = changed(small, {"train_dataloader.batch_size": 64})
    needed = estimate(cfg)
    refuse_what_cannot_fit(cfg, needed.total)
    refuse_what_cannot_fit(cfg, needed.total - needed.parts["slack"])  # closely: a warning
    with pytest.raises(UserError) as caught:
        refuse_what_cannot_fit(cfg, int(0.8 * (needed.total - needed.parts["slack"])))
    text = str(caught.value)
    assert "\n" not in text
    assert "activations" in text
    assert "--skip-fit-check" in text
    assert "--cfg-options train_dataloader.batch_size=" in text


def test_a_network_that_cannot_be_estimated_may_train(small):
    cfg = changed(small, {})
    cfg.model.denoiser.type = "NoSuchNetwork"
    with pytest.raises(UserError):
        estimate(cfg)
    refuse_what_cannot_fit(cfg, 1)


def test_a_config_without_a_size_of_its_batches_is_told(small):
    cfg = changed(small, {})
    del cfg.train_dataloader["batch_size"]
    with pytest.raises(UserError, match=r"train_dataloader\.batch_size is not set"):
        estimate(cfg)


def test_images_beside_cached_clips_come_with_what_is_seen_in_them():
    cfg = load_config("stage_b_700m_video")
    apply_choice(cfg, "layouts", "1x4090")
    setup = setup_of(cfg)
    more = cost_of(setup._replace(images=2)).forward / cost_of(setup).forward
    assert 1 < more < 18 / 16  # images pass by the temporal layers
