"""Stages of a cascade, one after the other: ``Inferencer(..., prior=...)`` and ``infer.py``."""

import json
import shlex

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmsora.apis import Inferencer, build_model
from mmsora.models import LatentDiffusion
from mmsora.models.text_encoders.cached_text import save_texts
from mmsora.models.vaes.cascade_networks import EfficientNetEncoder, Previewer, StageA
from mmsora.structures.video_sample import VideoSample
from mmsora.utils.user_error import UserError
from mmsora.utils.video_io import read_video

COMPRESSOR = dict(parts=[[True, 1, 1, 4, 1], [True, 2, 2, 4, 1], [True, 2, 2, 6, 1]], width=8)
STAGE_A = dict(width=4, depth=1, channels=4, codes=1)
DIFFUSION = dict(
    type="Diffusion",
    path=dict(type="CosinePath"),
    prediction=dict(type="NoisePrediction"),
    train_times=dict(type="UniformTimes"),
    solver=dict(type="Ancestral"),
    grid=dict(type="ShiftedSNRGrid", num_steps=2),
    guidance=dict(type="ClassifierFree", scale=2.0, rescale=0.7),
    loss=dict(type="MSE"),
)
LABEL = dict(type="LabelConditioner", num_classes=5, drop_prob=0.1)


def compressor(folder):
    files = {name: str(folder / f"{name}.safetensors") for name in ("encoder", "previewer")}
    return dict(
        type="CascadeCompressor",
        pretrained=files["encoder"],
        previewer=files["previewer"],
        config=COMPRESSOR | dict(channels=3),
        preview_width=8,
    )


def stage(denoiser, vae, told, **changes):
    conditions = dict(width=8, pooled=6, numbers=["sca"], tokens=2) | changes.pop("conditions", {})
    image = dict(type="StableCascade", conditions=conditions, **denoiser)
    return dict(
        type="LatentDiffusion",
        denoiser=dict(
            type="ImageToVideo", image=image, after={"up_blocks[.]0[.]2": 8},
            layout="(b t) c h w", frames=2, layer=dict(heads=2),
        ),
        diffusion=DIFFUSION,
        vae=vae,
        conditioner=told,
    )  # fmt: skip


def stages(folder, told, **options):
    """Stage C and B of clips of 2 frames of 16 x 24 pixels."""
    told_b = dict(
        type="SeveralConditioner",
        parts=dict(
            said=told,
            effnet=dict(
                type="LatentConditioner", encoder=compressor(folder), channels=3, name="effnet"
            ),
        ),
    )
    stage_a = dict(type="CascadeStageA", pretrained=str(folder / "a.safetensors"), config=STAGE_A)
    c = dict(
        in_channels=3, out_channels=3, size=(1, 2, 3), levels=[dict(width=8, depth=1, heads=2)]
    )
    b = dict(
        in_channels=4, out_channels=4, size=(1, 4, 6), strided=True,
        levels=[dict(width=4, depth=1), dict(width=8, depth=1, heads=2)],
    )  # fmt: skip
    return {
        "c": stage(c | options, compressor(folder), told),
        "b": stage(b | options, stage_a, told_b, conditions=dict(effnet=3)),
    }


def written(folder, models, fill_weights):
    """Configs and weights of the stages, as a user would have them."""
    from mmengine.config import Config

    save_file(fill_weights(StageA(**STAGE_A)).state_dict(), folder / "a.safetensors")
    encoder = fill_weights(EfficientNetEncoder(**COMPRESSOR, channels=3))
    save_file(encoder.state_dict(), folder / "encoder.safetensors")
    save_file(fill_weights(Previewer(3, 8)).state_dict(), folder / "previewer.safetensors")
    for name, model in models.items():
        lines = [f"model = {model!r}", 'default_scope = "mmsora"']
        lines += [f"prior = {str(folder / 'c.py')!r}"] if name == "b" else []
        (folder / f"{name}.py").write_text("\n".join(lines) + "\n")
        built = build_model(Config.fromfile(folder / f"{name}.py"))
        weights = fill_weights(built.denoiser).state_dict()
        save_file(weights, folder / f"{name}.safetensors")
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory, fill_weights):
    folder = tmp_path_factory.mktemp("cascade")
    return written(folder, stages(folder, LABEL, num_classes=5), fill_weights)


def load(folder, name, **options):
    return Inferencer(folder / f"{name}.safetensors", folder / f"{name}.py", **options)


@pytest.fixture(scope="module")
def cascade(files):
    return load(files, "b", prior=load(files, "c"))


def by_hand(folder, labels, seed, size=None):
    """Stage C samples latents, stage B makes videos of them."""
    c, b = (build_model(str(folder / f"{name}.py")) for name in "cb")
    for name, model in (("c", c), ("b", b)):
        from mmsora.utils.checkpoint import load_denoiser

        load_denoiser(model.denoiser, folder / f"{name}.safetensors")
    samples = [VideoSample(index=i, label=label) for i, label in enumerate(labels)]
    for sample, latent in zip(samples, c.sample_latents(samples, seed, size), strict=True):
        sample.latent = latent
    return b.predict(samples, seed, size)


def close_in_grey(one, other):
    return (one.int() - other.int()).abs().max() <= 1 and (one == other).float().mean() > 0.98


def test_the_first_stages_latents_are_what_the_second_decodes(files, cascade):
    videos = cascade(labels=[3, 1, 4], seed=7)
    assert videos.shape == (3, 3, 2, 16, 24)
    assert torch.equal(videos, by_hand(files, [3, 1, 4], seed=7))
    assert not close_in_grey(videos, cascade(labels=[3, 1, 4], seed=8))
    assert close_in_grey(cascade(labels=[3, 1, 4], seed=7, batch_size=1), videos)
    other = [VideoSample(index=0, label=3, latent=torch.randn(3, 2, 2, 3))]
    assert not close_in_grey(cascade.model.predict(other, 7), videos[:1])


def test_another_size_is_that_of_both_stages(files, cascade):
    videos = cascade(labels=[3, 1], num_frames=3, size=(24, 16))
    assert videos.shape == (2, 3, 3, 24, 16)
    assert torch.equal(videos, by_hand(files, [3, 1], 0, (3, 24, 16)))
    assert cascade(labels=[2], num_frames=1).shape == (1, 3, 1, 16, 24)


def test_the_first_stage_is_asked_what_there_is(cascade):
    assert cascade.count(None, None) == 5
    assert cascade(num_samples=2).shape[0] == 2
    with pytest.raises(UserError, match="label 5 is out of range: the model knows 5 classes"):
        cascade(labels=[5])
    with pytest.raises(UserError, match="takes no text: remove the prompts"):
        cascade(prompts=["a fox"])


def test_the_stages_take_turns_on_the_device(cascade, monkeypatch):
    """The one that waits is on the CPU."""
    told, names = [], {id(cascade.model): "b", id(cascade.prior.model): "c"}

    def noted(call):
        def wrapper(self, *args, **kwargs):
            what = args[0] if call.__name__ == "to" else "samples"
            told.append((names[id(self)], what))
            return call(self, *args, **kwargs)

        return wrapper

    for name in ("to", "sample_latents"):
        monkeypatch.setattr(LatentDiffusion, name, noted(getattr(LatentDiffusion, name)))
    monkeypatch.setattr(cascade, "device", torch.device("cpu", 0))  # the same, by another name
    monkeypatch.setattr(cascade.prior, "device", torch.device("cpu", 0))
    cascade(labels=[3, 1], batch_size=1)
    here = torch.device("cpu", 0)
    assert told == [
        ("b", "cpu"), ("c", here), ("c", "samples"), ("c", "samples"),
        ("c", "cpu"), ("b", here), ("b", "samples"), ("b", "samples"),
    ]  # fmt: skip


def test_texts_reach_both_stages(tmp_path, fill_weights):
    class Words:
        length, width = 4, 6

        def __call__(self, texts):
            draw = torch.Generator().manual_seed(5)
            states = {text: torch.randn(4, 6, generator=draw) for text in ("", "fox", "owl")}
            return torch.stack([states[t] for t in texts]), torch.ones(len(texts), 4).bool()

    file = str(tmp_path / "texts.safetensors")
    save_texts(Words(), ["", "fox", "owl"], file)
    told = dict(
        type="PooledTextConditioner",
        encoder=dict(type="CachedText", file=file, length=4, width=6),
        states=False,
    )
    written(tmp_path, stages(tmp_path, told), fill_weights)
    cascade = load(tmp_path, "b", prior=load(tmp_path, "c"))
    videos = cascade(prompts=["fox", "owl"])
    assert videos.shape == (2, 3, 2, 16, 24)
    assert close_in_grey(cascade(prompts=["fox"]), videos[:1])
    assert not close_in_grey(cascade(prompts=["owl"]), videos[:1])
    with pytest.raises(UserError, match="told texts: give prompts"):
        cascade(num_samples=1)


def test_mistakes_are_named(files):
    with pytest.raises(UserError, match=r"c\.safetensors has no LatentConditioner"):
        load(files, "c", prior=load(files, "c"))
    with pytest.raises(UserError, match="give the stage before by --prior CHECKPOINT"):
        load(files, "b")(labels=[3])


def changed(files, folder, name, size=None, is_image=False, **network):
    """A stage made for another size, or of images, with the same weights."""
    from mmengine.config import Config

    cfg = Config.fromfile(files / f"{name}.py")
    cfg.model.denoiser.image.update(network)
    if size is not None:
        cfg.model.denoiser.update(frames=size[0])
        cfg.model.denoiser.image.update(size=(1, *size[1:]))
    if is_image:
        cfg.model.denoiser = cfg.model.denoiser.image
    cfg.dump(folder / f"{name}.py")
    weights = load_file(files / f"{name}.safetensors")
    if is_image:
        start = "image."
        weights = {k.removeprefix(start): v for k, v in weights.items() if k.startswith(start)}
    save_file(weights, folder / f"{name}.safetensors")
    return load(folder, name)


@pytest.mark.parametrize(("c", "frames"), [((3, 2, 3), 3), ((1, 2, 3), 1)])
def test_the_prior_says_how_many_frames_and_the_last_stage_how_large(
    files, tmp_path, cascade, c, frames
):
    prior = changed(files, tmp_path, "c", size=c)
    videos = load(files, "b", prior=prior)(labels=[3, 1], seed=7)
    assert videos.shape == (2, 3, frames, 16, 24)
    asked = cascade(labels=[3, 1], seed=7, num_frames=frames, size=(16, 24))
    assert torch.equal(videos, asked)
    larger = load(files, "b", prior=prior)(labels=[3], size=(24, 32))
    assert larger.shape == (1, 3, frames, 24, 32)
    assert load(files, "b", prior=prior)(labels=[3], num_frames=4).shape == (1, 3, 4, 16, 24)


@pytest.mark.parametrize(
    ("made_for", "size", "expected"),
    [
        ((2, 2, 3), None, (2, 2, 3)),
        ((2, 2, 3), (24, 32), (2, 3, 4)),
        ((2, 1, 1), None, (2, 1, 1)),  # of a coarser grain: 8 x 8 pixels beside 16 x 24
        ((2, 4, 6), None, (2, 4, 6)),
        ((2, 4, 6), (8, 40), (2, 2, 10)),
        ((2, 2, 3), (12, 20), (2, 2, 2)),  # the nearest that it has latents of
    ],
)
def test_latents_of_the_first_stage_are_in_proportion(
    files, tmp_path, monkeypatch, made_for, size, expected
):
    prior, found = changed(files, tmp_path, "c", size=made_for), []
    cascade = load(files, "b", prior=prior)
    sample = prior.model.sample_latents

    def noted(*words):
        latents = sample(*words)
        found.append(tuple(latents.shape[2:]))
        return latents

    monkeypatch.setattr(prior.model, "sample_latents", noted)
    videos = cascade(labels=[3], size=size)
    assert videos.shape[2:] == (2, *(size or (16, 24)))
    assert found == [expected]


def test_a_stage_of_images_beside_one_of_videos(files, tmp_path, cascade):
    image_b, image_c = (changed(files, tmp_path, name, is_image=True) for name in "bc")
    image_b.prior = load(files, "c")
    films = image_b(labels=[3], seed=7)
    assert films.shape == (1, 3, 2, 16, 24)
    assert not close_in_grey(films, cascade(labels=[3], seed=7))
    assert load(files, "b", prior=image_c)(labels=[3]).shape == (1, 3, 1, 16, 24)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (dict(num_frames=0), "num_frames must be at least 1, got 0"),
        (dict(num_frames=-2), "num_frames must be at least 1, got -2"),
        (dict(size=(0, 24)), "size must be at least 1x1, got 0x24"),
        (
            dict(size=(4, 24)),
            "latents of 1x6: this StableCascade takes .* of 1, from 2 on; one of",
        ),
    ],
)
def test_a_size_that_no_film_has(cascade, words, message, monkeypatch):
    monkeypatch.setattr(LatentDiffusion, "sample_latents", None)  # nothing has been sampled
    with pytest.raises(UserError, match=message):
        cascade(labels=[3], **words)


@pytest.mark.parametrize(("strided", "smallest"), [(True, 16), (False, 8)])
def test_sizes_are_divisible_by_the_patch(
    files, tmp_path, fill_weights, cascade, strided, smallest
):
    """And by no more: levels below it are rounded."""
    from mmengine.config import Config

    cfg = Config.fromfile(files / "b.py")
    cfg.model.denoiser.image.update(patch=2, strided=strided)
    cfg.dump(tmp_path / "b.py")
    network = fill_weights(build_model(cfg).denoiser)
    save_file(network.state_dict(), tmp_path / "b.safetensors")
    patched = load(tmp_path, "b", prior=cascade.prior)
    for size in ((smallest, 24), (24, 40), (24, smallest)):
        assert patched(labels=[3], num_frames=1, size=size).shape[-2:] == size
    for size in ((28, 24), (24, 28)):
        latent = f"{size[0] // 4}x{size[1] // 4}"
        with pytest.raises(UserError, match=f"latents of {latent}: .* multiples of 2, from"):
            patched(labels=[3], size=size)
    for size in ((smallest - 8, 24), (24, smallest - 8)) if strided else ():
        with pytest.raises(UserError, match="multiples of 2, from 4 on; one .* is 4 x 4 pixels"):
            patched(labels=[3], size=size)
    with pytest.raises(UserError, match="not divisible by 4, as stage A needs"):
        patched(labels=[3], size=(24, 26))


@pytest.mark.parametrize("named", [False, True])
def test_the_command_samples_both_stages(files, cascade, tool, tmp_path, capsys, named):
    """The config of the first stage is the one that the second names, or another."""
    words = f"{files}/b.py --checkpoint {files}/b.safetensors --prior {files}/c.safetensors"
    words += f" --labels 3 1 --seed 7 --out {tmp_path} --device cpu --format png"
    words += f" --prior-config {files}/c.py" * named
    tool("infer").main(shlex.split(words))
    assert "2 videos in" in capsys.readouterr().out
    assert json.loads((tmp_path / "0001_label1_seed7.json").read_text())["label"] == 1
    assert len(list(tmp_path.glob("000*_seed7*.png"))) == 2


def run_infer(tool, capsys, words, out):
    """What it says, and its notes; None where it refuses."""
    capsys.readouterr()
    command = [str(w) for w in (*words, "--labels", 3, "--out", out, "--device", "cpu")]
    try:
        tool("infer").main([*command, "--format", "png"])
    except SystemExit:
        return capsys.readouterr().err, None
    return capsys.readouterr().out, json.loads((out / "0000_label3_seed0.json").read_text())


def test_the_config_of_the_first_stage(files, cascade, tool, tmp_path, capsys):
    """Asked for, else the checkpoint's own, else the one that the second stage names."""
    from mmengine.config import Config

    from mmsora.utils.checkpoint import save_checkpoint
    from mmsora.utils.config_check import config_dict

    cfg = Config.fromfile(files / "c.py")
    cfg.model.denoiser.frames = 3
    meta = {"cfg": json.dumps(config_dict(cfg))}
    state = cascade.prior.model.state_dict()
    own, raw = tmp_path / "own.pth", files / "c.safetensors"
    save_checkpoint({"meta": meta, "state_dict": state}, own)
    nameless = tmp_path / "nameless.py"
    lines = (files / "b.py").read_text().splitlines()
    nameless.write_text("\n".join(line for line in lines if not line.startswith("prior")))

    def run(config, prior, *words):
        words = [config, "--checkpoint", files / "b.safetensors", "--prior", prior, *words]
        return run_infer(tool, capsys, words, tmp_path / "out")

    def frames():
        return read_video(tmp_path / "out/0000_label3_seed0.png").shape[0]

    named, asked = str(files / "c.py"), ("--prior-config", files / "c.py")
    for arguments, noted, count in [
        ((files / "b.py", own), None, 3),
        ((nameless, own), None, 3),
        ((files / "b.py", own, *asked), named, 2),
        ((files / "b.py", raw), named, 2),
        ((nameless, raw, *asked), named, 2),
    ]:
        _, note = run(*arguments)
        assert note["prior_config"] == noted
        assert frames() == count
    said, note = run(nameless, raw)
    assert note is None
    assert said.count("\n") == 1
    assert said.startswith(f"error: checkpoint {raw} holds no config")
    assert "--prior-config CONFIG" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give the stage before by --prior CHECKPOINT"),
        (["--prior", "c", "--num-frames", 0], "num_frames must be at least 1, got 0"),
        (["--prior", "c", "--num-frames", -2], "num_frames must be at least 1, got -2"),
        (["--prior", "c", "--size", "24x26"], "size 24x26 is not divisible by 4"),
        (["--prior", "c", "--size", "0x24"], "size must be at least 1x1, got 0x24"),
    ],
)
def test_the_command_refuses_in_one_line(files, tool, tmp_path, capsys, words, message):
    words = [files / "c.safetensors" if word == "c" else word for word in words]
    words = [files / "b.py", "--checkpoint", files / "b.safetensors", *words]
    said, note = run_infer(tool, capsys, words, tmp_path / "out")
    assert note is None
    assert said.count("\n") == 1
    assert message in said


def test_a_config_of_the_first_stage_needs_its_weights(files, tool, capsys):
    words = f"{files}/b.py --checkpoint {files}/b.safetensors --prior-config {files}/c.py"
    with pytest.raises(SystemExit):
        tool("infer").main(shlex.split(words))
    assert "--prior-config needs --prior CHECKPOINT" in capsys.readouterr().err


# A picture as what is asked for


class MeanColour(torch.nn.Module):
    """Of a picture."""

    width = 3

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))

    def init_weights(self):
        pass

    def forward(self, image):
        return image.mean((1, 2))


def test_videos_like_a_picture(tmp_path, fill_weights, tool, monkeypatch, cascade):
    from PIL import Image

    from mmsora.registry import MODELS

    MODELS.register_module(module=MeanColour, force=True)
    try:
        told = dict(type="ImageConditioner", encoder=dict(type="MeanColour"))
        both = dict(type="SeveralConditioner", parts=dict(label=LABEL, picture=told))
        c = dict(
            in_channels=3, out_channels=3, size=(1, 2, 3), num_classes=5,
            levels=[dict(width=8, depth=1, heads=2)],
        )  # fmt: skip
        models = {"c": stage(c, compressor(tmp_path), both, conditions=dict(image=3))}
        written(tmp_path, models, fill_weights)
        inferencer = load(tmp_path, "c")
        monkeypatch.setattr(inferencer.model.vae, "decode", lambda x: torch.tanh(x / x.std()))
        for name, colour in (("red", (200, 30, 10)), ("blue", (0, 90, 250))):
            Image.new("RGB", (9, 7), colour).save(tmp_path / f"{name}.png")
        red, blue = (inferencer(labels=[3], image=tmp_path / f"{n}.png") for n in ("red", "blue"))
        assert not close_in_grey(red, blue)
        assert not close_in_grey(red, inferencer(labels=[3]))
        sample = VideoSample(index=0, label=3)
        sample.image_embedding = torch.tensor([200, 30, 10]) / 127.5 - 1
        assert torch.equal(inferencer.model.predict([sample]), red)

        words = [tmp_path / "c.py", "--checkpoint", tmp_path / "c.safetensors", "--labels", 3]
        words += ["--image", tmp_path / "red.png", "--out", tmp_path / "out", "--format", "png"]
        tool("infer").main([str(word) for word in words])
        notes = json.loads(next((tmp_path / "out").glob("*.json")).read_text())
        assert notes["image"] == str(tmp_path / "red.png")
    finally:
        MODELS.module_dict.pop("MeanColour")
    with pytest.raises(
        UserError, match="the model is told no picture: it has no ImageConditioner"
    ):
        cascade(labels=[3], image=tmp_path / "red.png")


def test_a_picture_reaches_the_first_of_two_stages(tmp_path, fill_weights):
    from PIL import Image

    from mmsora.registry import MODELS

    MODELS.register_module(module=MeanColour, force=True)
    try:
        told = dict(type="ImageConditioner", encoder=dict(type="MeanColour"))
        both = dict(type="SeveralConditioner", parts=dict(label=LABEL, picture=told))
        models = stages(tmp_path, LABEL, num_classes=5)
        conditions = models["c"]["denoiser"]["image"]["conditions"]
        models["c"] |= dict(conditioner=both)
        conditions["image"] = 3
        written(tmp_path, models, fill_weights)
        prior = load(tmp_path, "c")
        cascade = load(tmp_path, "b", prior=prior)
    finally:
        MODELS.module_dict.pop("MeanColour")
    Image.new("RGB", (9, 7), (200, 30, 10)).save(tmp_path / "red.png")
    latents = []

    def predict(batch, seed, size):
        latents.extend(sample.latent for sample in batch)
        return torch.zeros(len(batch), 3, 2, 16, 24, dtype=torch.uint8)

    cascade.model.predict = predict
    cascade(labels=[3, 1], image=tmp_path / "red.png", seed=5)
    samples = [VideoSample(index=i, label=label) for i, label in enumerate((3, 1))]
    plain = prior.model.sample_latents(samples, 5)
    for sample in samples:
        sample.image_embedding = torch.tensor([200, 30, 10]) / 127.5 - 1
    told, scale = prior.model.sample_latents(samples, 5), plain.abs().max().item()
    torch.testing.assert_close(torch.stack(latents), told, rtol=0, atol=1e-4 * scale)
    assert (told - plain).abs().max() > 0.01 * scale


# Noise that frames share


def test_sampling_starts_and_goes_on_with_the_noise_that_frames_share(files):
    from mmengine.config import Config

    for kind in ("SharedNoise", "TrainNoise"):
        cfg, seen = Config.fromfile(files / "c.py"), []
        cfg.model.diffusion.train_noise = dict(type=kind)
        model = build_model(cfg)

        def solver(denoise, noise, path, grid, draws, seen=seen):
            seen.extend([noise, draws.normal("step 1", noise)])
            return noise

        model.diffusion.solver = solver
        model.sample_latents([VideoSample(index=i, label=i) for i in (1, 3)], 0, (4, 16, 24))
        for noise in seen:
            assert noise.shape == (2, 3, 4, 2, 3)
            is_shared = torch.equal(noise, noise[:, :, :1].expand_as(noise))
            assert is_shared == (kind == "SharedNoise")
            assert not torch.equal(noise[0], noise[1])
