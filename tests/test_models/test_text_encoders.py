"""CLIP's text encoder from a local folder, texts from a file, and what a denoiser is told."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
)

from mmsora.models import CachedText, CLIPText, CLIPTextPooled, TextConditioner, save_texts
from mmsora.registry import CONDITIONERS, MODELS
from mmsora.structures.video_sample import VideoSample
from mmsora.utils.draws import Draws
from mmsora.utils.user_error import UserError

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = [
    "<|startoftext|>",
    "<|endoftext|>",
    *LETTERS,
    *(f"{c}</w>" for c in LETTERS),
    "ca",
    "cat</w>",
]
LENGTH, WIDTH = 9, 24
SIZE = dict(length=LENGTH, width=WIDTH)
CAPTIONS = ["a cat", "", "the quick brown fox jumps", "Cat  A"]


def config(**changes):
    return CLIPTextConfig(
        **dict(
            vocab_size=len(WORDS), hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=3, max_position_embeddings=LENGTH, bos_token_id=0, eos_token_id=1,
            pad_token_id=1,
        )
        | changes
    )  # fmt: skip


def save_tokenizer(path, words=WORDS):
    (path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (path / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """Random weights, 24 wide, for nine tokens of letters."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("clip")
    model = CLIPTextModel(config())
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(path)
    save_tokenizer(path)
    return path


@pytest.fixture
def clip(clip_folder):
    made = CLIPText(str(clip_folder), **SIZE)
    assert not list(made.parameters())  # building read nothing
    made.init_weights()
    return made


def tokens(text):
    """By hand: one word "cat", else letters; cut to nine with the end kept."""
    found = []
    for word in text.lower().split():
        parts = ["cat</w>"] if word == "cat" else [*word[:-1], f"{word[-1]}</w>"]
        found += [WORDS.index(part) for part in parts]
    return [0, *found[: LENGTH - 2], 1]


@torch.no_grad()
def test_states_are_those_of_transformers_for_tokens_made_by_hand(clip, clip_folder):
    theirs = CLIPTextModel.from_pretrained(clip_folder).eval()
    states, mask = clip(CAPTIONS)
    assert (states.shape, states.dtype) == ((4, LENGTH, WIDTH), torch.float32)
    assert (mask.shape, mask.dtype) == ((4, LENGTH), torch.bool)
    for i, text in enumerate(CAPTIONS):
        own = tokens(text)
        padded = torch.tensor([own + [1] * (LENGTH - len(own))])
        torch.testing.assert_close(states[i], theirs(padded).last_hidden_state[0])
        assert mask[i].tolist() == [place < len(own) for place in range(LENGTH)]
        alone, _ = clip([text])
        torch.testing.assert_close(alone[0], states[i])
    assert mask.sum(1).tolist() == [4, 2, 9, 4]
    assert not torch.equal(states[0], states[3])


@torch.no_grad()
def test_a_file_of_the_whole_clip_will_do(clip, clip_folder, tmp_path):
    whole = CLIPModel(CLIPConfig(
        text_config=config().to_dict(), projection_dim=8,
        vision_config=dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                           num_attention_heads=2, image_size=8, patch_size=4),
    ))  # fmt: skip
    whole.text_model.load_state_dict(clip.model.state_dict())
    whole.save_pretrained(tmp_path)
    other = CLIPText(str(tmp_path), tokenizer=str(clip_folder), **SIZE)
    other.init_weights()
    torch.testing.assert_close(other(CAPTIONS), clip(CAPTIONS))


def test_fewer_tokens_than_it_could_take(clip_folder):
    short = CLIPText(str(clip_folder), length=5, width=WIDTH)
    short.init_weights()
    assert short(["the quick"])[0].shape == (1, 5, WIDTH)


def test_it_is_frozen_and_stays_in_eval_mode(clip):
    clip.train()
    assert not any(module.training for module in clip.modules())
    assert not any(weight.requires_grad for weight in clip.parameters())
    assert not clip(["a cat"])[0].requires_grad


def test_what_is_no_clip_of_texts_is_refused(clip_folder, tmp_path):
    def refused(match, folder=clip_folder, **changes):
        with pytest.raises(UserError, match=match):
            CLIPText(str(folder), **SIZE | changes).init_weights()

    refused("there is no folder nowhere; put CLIP's weights", "nowhere")
    refused("there is no folder nothing; put CLIP's weights", tokenizer="nothing")
    refused("no CLIPTextModel can be read from .*model.safetensors", tmp_path)
    refused("has width 24, the config says 768; set model.conditioner.encoder.width", width=768)
    refused("takes 9 tokens, the config says 77; set model.conditioner.encoder.len", length=77)
    (tmp_path / "config.json").write_text((clip_folder / "config.json").read_text())
    weights = load_file(clip_folder / "model.safetensors")
    key = next(key for key in weights if key.endswith("layers.1.mlp.fc1.bias"))
    lacking = {k: v for k, v in weights.items() if k != key}
    for found, fault in (
        (lacking, "missing encoder.layers.1.mlp.fc1.bias"),
        (weights | {"adapter.weight": torch.zeros(1)}, "unknown adapter.weight"),
    ):
        save_file(found, tmp_path / "model.safetensors", {"format": "pt"})
        refused(f"holds no CLIP of texts: .*{fault}", tmp_path)


def test_weights_that_are_cut_off_are_refused(clip_folder, tmp_path):
    (tmp_path / "config.json").write_text((clip_folder / "config.json").read_text())
    whole = (clip_folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(UserError, match="no CLIPTextModel can be read from"):
        CLIPText(str(tmp_path), **SIZE).init_weights()


@pytest.mark.parametrize("fault", ["no vocab.json", "no merges.txt", "fewer", "more", "broken"])
def test_a_tokenizer_that_is_not_that_of_the_weights_is_refused(clip_folder, tmp_path, fault):
    """Without its files transformers makes one that knows nothing, and says nothing."""
    known = [word for word in WORDS if fault != "fewer" or word != "q</w>"]
    known += ["zz"] if fault == "more" else []
    save_tokenizer(tmp_path, known[: 40 if fault == "broken" else None])
    (tmp_path / fault.removeprefix("no ")).unlink(missing_ok=True)
    made = CLIPText(str(clip_folder), tokenizer=str(tmp_path), **SIZE)
    with pytest.raises(UserError, match="tokenizer in .* knows|no CLIPTokenizer can be read"):
        made.init_weights()


def test_without_transformers_it_says_so(clip_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        UserError, match="CLIPTextModel needs transformers: pip install transformers"
    ):
        CLIPText(str(clip_folder), **SIZE).init_weights()


# With the embedding of the whole text behind the states


@pytest.fixture(scope="module")
def pooled_folder(tmp_path_factory):
    """As the other, with a projection."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("pooled")
    model = CLIPTextModelWithProjection(config(projection_dim=WIDTH))
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(path)
    save_tokenizer(path)
    return path


POOLED = dict(length=LENGTH + 1, width=WIDTH)


@torch.no_grad()
def test_pooled_states_are_those_before_the_last_norm_and_the_projected_end(pooled_folder):
    made = CLIPTextPooled(str(pooled_folder), **POOLED)
    made.init_weights()
    states, mask = made(CAPTIONS)
    assert (states.shape, states.dtype) == ((4, LENGTH + 1, WIDTH), torch.float32)
    theirs = CLIPTextModelWithProjection.from_pretrained(pooled_folder).eval()
    norm = theirs.text_model.final_layer_norm
    for i, text in enumerate(CAPTIONS):
        own = tokens(text)
        padding = LENGTH - len(own)
        told = dict(
            input_ids=torch.tensor([own + [1] * padding]),
            attention_mask=torch.tensor([[1] * len(own) + [0] * padding]),
        )
        out = theirs(**told)
        torch.testing.assert_close(norm(states[i, :-1]), out.last_hidden_state[0])
        assert not torch.allclose(states[i, :-1], out.last_hidden_state[0], atol=0.1)
        torch.testing.assert_close(states[i, -1], out.text_embeds[0])
        end = out.last_hidden_state[0, len(own) - 1]
        torch.testing.assert_close(states[i, -1], theirs.text_projection(end))
        assert mask[i].tolist() == [True] * len(own) + [False] * padding + [True]


def test_what_has_no_projection_of_the_right_width_is_refused(
    clip_folder, pooled_folder, tmp_path
):
    def refused(match, folder, **changes):
        with pytest.raises(UserError, match=match):
            CLIPTextPooled(str(folder), **POOLED | changes).init_weights()

    refused("holds no CLIP of texts: missing text_projection.weight", clip_folder)
    refused("takes 9 tokens, the config says 77", pooled_folder, length=78)
    CLIPTextModelWithProjection(config(projection_dim=8)).save_pretrained(tmp_path)
    refused("projects texts to 8 channels and its states have 24", tmp_path)
    plain = CLIPText(str(pooled_folder), **SIZE)
    plain.init_weights()  # which leaves the projection


@pytest.mark.parametrize("states", [True, False])
def test_pooled_texts_are_told_apart_and_dropped_together(pooled_folder, states):
    encoder = dict(type="CLIPTextPooled", folder=str(pooled_folder), **POOLED)
    made = CONDITIONERS.build(
        dict(type="PooledTextConditioner", encoder=encoder, drop_prob=0.5, states=states)
    )
    made.init_weights()
    told = made(samples(), Draws(0, range(32)))
    dropped = Draws(0, range(32)).uniform("drop condition") < 0.5
    own = made.encoder([sample.text for sample in samples()])[0]
    heard = torch.where(dropped[:, None, None], made.encoder([""])[0], own)
    torch.testing.assert_close(told["text_pooled"], heard[:, -1])
    assert set(told) == set(made.null(3)) == {"text", "text_pooled"} - {"" if states else "text"}
    if states:
        torch.testing.assert_close(told["text"], heard[:, :-1])
        assert made.null(3)["text"].shape == (3, LENGTH, WIDTH)
    assert made.null(3)["text_pooled"].shape == (3, WIDTH)


# From a file


@pytest.fixture
def cache(clip, tmp_path):
    file = tmp_path / "texts.safetensors"
    save_texts(clip, ["a cat", "a fox", "a cat"], file)
    return file


def test_texts_of_a_file_are_those_of_the_encoder(clip, cache):
    made = CachedText(str(cache), **SIZE)
    made.init_weights()
    known = ["a fox", "", "a cat", "a fox"]
    torch.testing.assert_close(made(known), clip(known))
    assert len(load_file(cache)["states"]) == 3
    assert not made.state_dict()
    with pytest.raises(UserError, match="has no embedding of 'a dog'; take one of its 3 texts"):
        made(["a cat", "a dog"])


def test_files_that_do_not_fit_are_refused(cache, tmp_path):
    def refused(match, file=cache, **changes):
        with pytest.raises(UserError, match=match):
            CachedText(str(file), **SIZE | changes).init_weights()

    refused("there is no file nowhere", "nowhere")
    refused("9 tokens and 24 channels, the config says length=77 and width=24", length=77)
    refused("9 tokens and 24 channels, the config says length=9 and width=8", width=8)
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"nothing")
    refused("other.safetensors holds no embeddings of texts", other)
    states = dict(states=torch.zeros(1, LENGTH, WIDTH), mask=torch.zeros(1, LENGTH))
    save_file(states, other)
    refused("other.safetensors holds no embeddings of texts", other)
    save_file(states, other, {"texts": json.dumps(["a cat"])})
    refused("other.safetensors lacks the empty text", other)


# As a condition


@pytest.fixture
def conditioner(clip_folder):
    encoder = dict(type="CLIPText", folder=str(clip_folder), **SIZE)
    made = CONDITIONERS.build(dict(type="TextConditioner", encoder=encoder, drop_prob=0.5))
    made.init_weights()
    return made


def samples(count=32):
    return [VideoSample(index=i, text=CAPTIONS[i % 3] or "fox") for i in range(count)]


def test_texts_are_dropped_for_the_empty_one(conditioner, clip):
    told = conditioner(samples(), Draws(0, range(32)))
    assert set(told) == {"text"}
    empty, own = clip([""])[0], clip([sample.text for sample in samples()])[0]
    dropped = Draws(0, range(32)).uniform("drop condition") < 0.5
    assert 5 < dropped.sum() < 27
    torch.testing.assert_close(told["text"][dropped], empty.expand(int(dropped.sum()), -1, -1))
    torch.testing.assert_close(told["text"][~dropped], own[~dropped])
    torch.testing.assert_close(conditioner(samples())["text"], own)
    torch.testing.assert_close(conditioner.null(3)["text"], empty.expand(3, -1, -1))


def test_texts_of_images_are_dropped_one_by_one(conditioner, clip):
    made = samples()
    for sample in made:
        sample.num_images, sample.image_texts = 2, ["cat", f"{LETTERS[sample.index % 26]} x"]
    draws = Draws(0, range(32))
    told = conditioner(made, draws)
    assert told["image_text"].shape == (32, 2, LENGTH, WIDTH)
    for i in range(2):
        own = clip([sample.image_texts[i] for sample in made])[0]
        dropped = draws.uniform(f"drop condition of image {i}") < 0.5
        expected = torch.where(dropped[:, None, None], clip([""])[0], own)
        torch.testing.assert_close(told["image_text"][:, i], expected)


def test_embeddings_of_a_cache_need_no_encoder(clip, cache):
    """But for the one of the empty text, which a file has."""
    made = TextConditioner(dict(type="CachedText", file=str(cache), **SIZE), 0.5)
    made.init_weights()
    cached = [VideoSample(index=i, text_embedding=clip([f"x {i}"])[0][0]) for i in range(16)]
    for i, sample in enumerate(cached):
        sample.num_images, sample.image_text_embeddings = 1, [clip([f"y {i}"])[0][0].half()]
    told = made(cached, Draws(0, range(16)))
    dropped = Draws(0, range(16)).uniform("drop condition") < 0.5
    own = torch.stack([sample.text_embedding for sample in cached])
    torch.testing.assert_close(
        told["text"], torch.where(dropped[:, None, None], clip([""])[0], own)
    )
    assert told["image_text"].shape == (16, 1, LENGTH, WIDTH)
    mixed = [VideoSample(text="a fox"), VideoSample(text_embedding=own[3])]
    torch.testing.assert_close(made(mixed)["text"], torch.stack([clip(["a fox"])[0][0], own[3]]))


def test_a_sample_without_a_text_is_refused(conditioner):
    with pytest.raises(UserError, match="neither text nor text_embedding"):
        conditioner([VideoSample(index=0, text="a"), VideoSample(index=1)])
    no_image = VideoSample(index=0, text="a", num_images=1)
    with pytest.raises(UserError, match="neither text nor text_embedding"):
        conditioner([no_image])


# In a model


def model(clip_folder, scale=3.0):
    encoder = dict(type="CLIPText", folder=str(clip_folder), **SIZE)
    return MODELS.build(dict(
        type="mmsora.LatentDiffusion",
        denoiser=dict(type="Latte", in_channels=3, out_channels=3, size=(2, 4, 8), patch=2,
                      width=12, depth=2, heads=2, text=(LENGTH, WIDTH)),
        conditioner=dict(type="TextConditioner", encoder=encoder),
        diffusion=dict(
            type="Diffusion", path=dict(type="LinearPath"),
            prediction=dict(type="VelocityPrediction"), train_times=dict(type="UniformTimes"),
            solver=dict(type="Euler"), grid=dict(type="SpacedGrid", num_steps=2),
            guidance=dict(type="ClassifierFree", scale=scale), loss=dict(type="MSE"),
        ),
        vae=dict(type="IdentityVAE"),
    ))  # fmt: skip


def test_a_model_of_texts_trains_and_samples(clip_folder, fill_weights):
    made = model(clip_folder)
    made.init_weights()
    fill_weights(made.denoiser)
    assert not [key for key in made.state_dict() if "conditioner" in key]
    videos, told = torch.rand(2, 3, 2, 4, 8), samples(2)
    loss = made.loss(videos, told, Draws(0, [0, 1]))["loss_diffusion"]
    loss.mean().backward()
    assert made.denoiser.embed_text.weight.grad.abs().max() > 0
    assert all(weight.grad is None for weight in made.conditioner.parameters())
    sample = made.predict(told)
    other = made.predict([VideoSample(index=i, text="fox") for i in range(2)])
    assert (sample != other).any()
    plain = model(clip_folder, scale=1.0)
    plain.init_weights()
    plain.denoiser.load_state_dict(made.denoiser.state_dict())
    assert (plain.predict(told) != sample).any()  # guidance away from the empty text
