"""StableCascade's configs say what is published of it, and where temporal layers stand."""

import pytest
import torch
from mmengine.registry import init_default_scope

from mmsora import diffusion as D
from mmsora.registry import CONDITIONERS, MODELS, SCHEDULERS
from mmsora.utils.config_check import apply_choice, check_config
from mmsora.utils.config_names import load_config

init_default_scope("mmsora")
PUBLISHED = {  # millions of weights of the image network
    "stage_c_3b6_image": 3589.10,
    "stage_c_1b_video": 1030.79,
    "stage_c_1b_lora": 1030.79,
    "stage_b_1b5_image": 1562.94,
    "stage_b_700m_video": 699.47,
}
each_config = pytest.mark.parametrize("name", PUBLISHED)


def built(name):
    with torch.device("meta"):
        return MODELS.build(load_config(name).model)


def millions(parameters):
    return sum(parameter.numel() for parameter in parameters) / 1e6


@each_config
def test_the_network_is_the_published_one_and_the_rest_is_trained(name):
    denoiser = built(name).denoiser
    image = getattr(denoiser, "image", denoiser)
    trained = {key for key, value in denoiser.named_parameters() if value.requires_grad}
    if name.endswith("lora"):
        with denoiser.bare() as base:
            assert millions(base.parameters()) == pytest.approx(PUBLISHED[name], abs=0.005)
        assert trained == {key for key in denoiser.state_dict() if "lora_" in key}
        assert len(trained) == 2 * 4 * 32  # two thin matrices of q, k, v and out, 32 attentions
        return
    assert millions(image.parameters()) == pytest.approx(PUBLISHED[name], abs=0.005)
    prefix = "temporal." if name.endswith("video") else ""
    assert trained == {key for key, _ in denoiser.named_parameters() if key.startswith(prefix)}


@pytest.mark.parametrize(("name", "attentions"), [("stage_c_1b_video", 32)])
def test_a_temporal_layer_follows_every_attention_of_stage_c(name, attentions):
    denoiser = built(name).denoiser
    kinds = {type(denoiser.image.get_submodule(place)).__name__ for place in denoiser.places}
    assert kinds == {"SDCascadeAttnBlock"}
    every = [part for part in denoiser.image.modules() if type(part).__name__ in kinds]
    assert len(denoiser.places) == len(every) == attentions


def test_in_stage_b_they_are_at_the_two_coarsest_levels():
    denoiser = built("stage_b_700m_video").denoiser
    levels = {place.rsplit(".", 1)[0] for place in denoiser.places}
    assert levels == {"down_blocks.2", "down_blocks.3", "up_blocks.0", "up_blocks.1"}
    every = [part for part in denoiser.image.modules() if "AttnBlock" in type(part).__name__]
    assert len(denoiser.places) == len(every) == 36


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("stage_c_1b_video", dict(text=(77, 1280), text_pooled=(1280,))),
        ("stage_b_700m_video", dict(text_pooled=(1280,), effnet=(16, 16, 15, 26))),
    ],
)
def test_clips_of_480_by_832_pass_through_the_video_models(name, told):
    model = built(name)
    size = model.vae.latent_size((16, 480, 832))
    assert size == model.denoiser.size
    with torch.device("meta"), torch.no_grad():
        cond = {key: torch.empty(2, *shape) for key, shape in told.items()}
        x = torch.empty(2, model.denoiser.in_channels, *size)
        assert model.denoiser(x, torch.empty(2), **cond).shape == x.shape


@each_config
def test_it_is_sampled_as_published(name):
    process = built(name).diffusion
    settings = process.grid.num_steps, process.guidance.scale, process.guidance.rescale
    assert settings == ((20, 4.0, 0.7) if "stage_c" in name else (10, 1.1, 0.7))
    assert getattr(process.grid, "shift", 1) == (2 if "stage_c" in name else 1)


@each_config
def test_its_process_is_trained_as_published(name):
    cfg = load_config(name)
    process = SCHEDULERS.build(cfg.model.diffusion)
    assert type(process.path) is D.CosinePath
    assert process.path.log_shift == 0  # the shift is of sampling alone
    parts = process.prediction, process.train_times, process.solver
    assert [type(part) for part in parts] == [D.NoisePrediction, D.UniformTimes, D.Ancestral]
    weighting, noise = process.loss_function.weighting, process.train_noise
    assert type(weighting) is D.Adaptive
    assert (len(weighting.means), weighting.decay) == (300, 0.99)
    assert (weighting.edges[0], weighting.edges[-1]) == (-10, 10)
    if name == "stage_b_700m_video":  # frames that have noise of their own flicker
        assert (type(noise), noise.share) == (D.SharedNoise, 1)
        noise = noise.noise
    assert type(noise) is (D.PyramidNoise if "stage_b" in name else D.TrainNoise)
    if "stage_b" in name:
        assert (noise.decay, noise.largest) == (0.75, 16)
    assert cfg.optim_wrapper.optimizer.lr == 1e-4
    assert cfg.optim_wrapper.clip_grad.max_norm == 1


@each_config
def test_conditions_are_dropped_as_often_as_published(name):
    with torch.device("meta"):
        conditioner = CONDITIONERS.build(load_config(name).model.conditioner)
    parts = list(getattr(conditioner, "parts", {"text": conditioner}).values())
    rates = {type(part).__name__: part.drop_prob for part in parts}
    published = {
        "PooledTextConditioner": 0.05, "ImageConditioner": 0.9, "LatentConditioner": 0.1,
    }  # fmt: skip
    assert rates == {kind: published[kind] for kind in rates}
    assert ("LatentConditioner" in rates) == ("stage_b" in name)
    smallest = [part.smallest for part in parts if hasattr(part, "smallest")]
    assert smallest == {"stage_b_1b5_image": [0.5], "stage_b_700m_video": [1]}.get(name, [])


@each_config
def test_it_says_what_the_weights_may_be_used_for(name):
    text = load_config(name).filename
    with open(text, encoding="utf-8") as file:
        assert "non-commercial research alone" in " ".join(file.read().split())


@pytest.mark.parametrize("name", ["stage_c_1b_video", "stage_c_1b_lora"])
def test_the_layout_of_one_card_trains_on_cached_latents(name):
    cfg = load_config(name)
    updates = cfg.train_cfg.max_iters
    apply_choice(cfg, "layouts", "1x4090")
    check_config(cfg)
    parts = cfg.optim_wrapper.get("accumulative_counts", 1)
    assert cfg.train_dataloader.batch_size * parts == 16
    assert cfg.train_cfg.max_iters == updates * parts
    assert cfg.train_dataloader.dataset == dict(
        type="CachedLatents", data_root=cfg.train_dataloader.dataset.data_root
    )


def test_a_stage_b_names_its_stage_c():
    for name in ("stage_b_1b5_image", "stage_b_700m_video"):
        first = load_config(load_config(name).prior)
        assert (
            first.model.vae.type == load_config(name).model.conditioner.parts.effnet.encoder.type
        )
