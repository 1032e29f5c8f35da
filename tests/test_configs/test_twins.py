"""SiT's configs are DiT's but for the process and the channels that it learns."""

import pytest

from mmsora.registry import SCHEDULERS
from mmsora.utils.config_check import apply_choice, check_config, config_dict
from mmsora.utils.config_names import load_config


@pytest.mark.parametrize("size", ["s2", "xl2"])
def test_sit_differs_from_dit_in_the_process_and_the_output_channels_alone(size):
    dit, sit = (config_dict(load_config(f"{name}_{size}_imagenet_256")) for name in ("dit", "sit"))
    for cfg in (dit, sit):
        assert cfg["model"]["diffusion"] == cfg.pop("diffusion")
        assert cfg.pop("samplers")["paper"]["model.diffusion.grid"]["num_steps"] == 250
    assert dit["model"].pop("diffusion") != sit["model"].pop("diffusion")
    channels = [cfg["model"]["denoiser"].pop("out_channels") for cfg in (dit, sit)]
    assert channels == [8, 4]
    assert dit == sit


@pytest.mark.parametrize("name", ["sit_s2", "sit_xl2", "sit_xl2_repa"])
@pytest.mark.parametrize("layout", ["8xa100", "4xa6000", "2xa100", "1x4090"])
def test_a_layout_keeps_the_batch_and_the_number_of_updates(name, layout):
    cfg = load_config(f"{name}_imagenet_256")
    updates = cfg.train_cfg.max_iters
    apply_choice(cfg, "layouts", layout)
    parts = cfg.optim_wrapper.get("accumulative_counts", 1)
    assert cfg.train_dataloader.batch_size * parts * int(layout[0]) == 256
    assert cfg.train_cfg.max_iters == updates * parts


@pytest.mark.parametrize("name", ["dit_xl2_imagenet_512", "latte_ucf", "sit_xl2_imagenet_256"])
@pytest.mark.parametrize("sampler", ["paper", "fine"])
def test_named_samplers_fit(name, sampler):
    cfg = load_config(name)
    calls = cfg.model.diffusion.grid.num_steps
    apply_choice(cfg, "samplers", sampler)
    check_config(cfg)
    assert cfg.model.diffusion.grid.num_steps > calls
    SCHEDULERS.build(cfg.model.diffusion)
