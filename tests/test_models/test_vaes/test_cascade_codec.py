"""Stage A against diffusers' Paella; compressor and previewer against plain forwards."""

import warnings

import pytest
import torch
from mmengine.registry import init_default_scope
from safetensors.torch import save_file
from torch.nn import functional as F

from mmsora.models.vaes import (
    CascadeCompressor,
    CascadeStageA,
    EfficientNetEncoder,
    Previewer,
    StageA,
)
from mmsora.registry import VAES
from mmsora.utils.draws import Draws
from mmsora.utils.user_error import UserError

SMALL_A = dict(width=16, depth=2, channels=4, codes=8)
# Fused or not, expansion, stride, channels and blocks.
PARTS = [[True, 1, 1, 4, 2], [True, 3, 2, 6, 2], [False, 2, 2, 6, 2], [False, 3, 1, 10, 1]]
SMALL_NET = dict(parts=PARTS, width=12, channels=5)
V2_S = [
    [True, 1, 1, 24, 2], [True, 4, 2, 48, 4], [True, 4, 2, 64, 4],
    [False, 4, 2, 128, 6], [False, 6, 1, 160, 9], [False, 6, 2, 256, 15],
]  # fmt: skip


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(network):
    """Zero nowhere; statistics of the norms are those of no batch."""
    generator = torch.Generator().manual_seed(0)
    for name, value in network.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5, generator=generator)
        elif value.dtype == torch.float32:
            fan_in = value[0].numel() if value.ndim > 1 else 4
            value.normal_(0, fan_in**-0.5, generator=generator)
    return network.eval()


def clips(size=(24, 40)):
    return torch.rand(2, 3, 3, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def by_hand(function, x):
    """One frame at a time."""
    each = [torch.cat([function(frame[None]) for frame in clip.unbind(1)]) for clip in x]
    return torch.stack(each).transpose(1, 2)


def counted(network):
    """Millions of parameters, and keys."""
    millions = sum(p.numel() for p in network.parameters()) / 1e6
    return round(millions, 3), len(network.state_dict())


def shapes(network):
    return {key: tuple(value.shape) for key, value in network.state_dict().items()}


# Stage A


@pytest.fixture(scope="module")
def paella():
    """A tiny one of diffusers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers.pipelines.stable_cascade.pipeline_stable_cascade import PaellaVQModel
    return filled(
        PaellaVQModel(bottleneck_blocks=2, embed_dim=16, num_vq_embeddings=8, scale_factor=0.43)
    )


@pytest.fixture(scope="module")
def file_a(paella, tmp_path_factory):
    """Its weights under diffusers' names."""
    path = tmp_path_factory.mktemp("a") / "stage_a.safetensors"
    save_file(paella.state_dict(), path)
    return str(path)


def stage_a(file, **changes):
    vae = CascadeStageA(file, SMALL_A, **changes)
    vae.init_weights()
    return vae


@torch.no_grad()
def test_stage_a_is_paella_at_its_own_scale(paella, file_a):
    vae, images = stage_a(file_a), (clips()[:, :, 0] + 1) / 2
    expected = paella.encode(images).latents / 0.43
    latent = vae.encode(images[:, :, None] * 2 - 1)
    assert expected.std() > 0.1
    torch.testing.assert_close(latent[:, :, 0], expected, atol=1e-5, rtol=1e-5)  # of 2 x - 1
    assert torch.equal(vae.model.encode(images) / 0.43, expected)
    z = drawn(2, 4, 3, 5)
    assert torch.equal(vae.model.decode(z), paella.decode(z).sample)
    assert torch.equal(vae.decode(z[:, :, None])[:, :, 0], paella.decode(z * 0.43).sample * 2 - 1)


@torch.no_grad()
def test_stage_a_frame_by_frame_in_chunks(file_a):
    vae = stage_a(file_a, scale=0.5)
    latent = vae.encode(clips())
    assert latent.shape == (2, 4, 3, 6, 10)
    assert vae.latent_size((3, 24, 40)) == latent.shape[2:]
    torch.testing.assert_close(
        latent, by_hand(lambda x: vae.model.encode((x + 1) / 2) * 2, clips())
    )
    video = vae.decode(latent)
    assert video.shape == clips().shape
    torch.testing.assert_close(video, by_hand(lambda z: vae.model.decode(z / 2) * 2 - 1, latent))
    small, sizes = stage_a(file_a, scale=0.5, chunk=4), []
    for part in (small.model.in_block, small.model.up_blocks):
        part.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    torch.testing.assert_close(small.encode(clips()), latent)
    torch.testing.assert_close(small.decode(latent), video)
    assert sizes == [4, 2, 4, 2]


def stage_a_shapes():
    """By what is written of the architecture."""
    found = {}

    def weight(name, *shape, bias=None):
        found[f"{name}.weight"], found[f"{name}.bias"] = shape, (bias or shape[0],)

    def mixing(name, width):
        found[f"{name}.gammas"] = (6,)
        weight(f"{name}.depthwise.1", width, 1, 3, 3)
        weight(f"{name}.channelwise.0", 4 * width, width)
        weight(f"{name}.channelwise.2", width, 4 * width)

    weight("in_block.1", 192, 12, 1, 1)
    mixing("down_blocks.0", 192)
    weight("down_blocks.1", 384, 192, 4, 4)
    mixing("down_blocks.2", 384)
    found["down_blocks.3.0.weight"] = (4, 384, 1, 1)
    weight("down_blocks.3.1", 4)
    found |= {f"down_blocks.3.1.running_{name}": (4,) for name in ("mean", "var")}
    found["down_blocks.3.1.num_batches_tracked"] = ()
    found["vquantizer.codebook.weight"] = (8192, 4)
    weight("up_blocks.0.0", 384, 4, 1, 1)
    for i in range(12):
        mixing(f"up_blocks.{i + 1}", 384)
    weight("up_blocks.13", 384, 192, 4, 4, bias=192)
    mixing("up_blocks.14", 192)
    weight("out_block.0", 12, 192, 1, 1)
    return found


def test_stage_a_has_the_published_weights():
    with torch.device("meta"):
        network = StageA()
    assert counted(network) == (18.407, 122)
    assert shapes(network) == stage_a_shapes()


def test_stage_a_starts_as_the_authors_do():
    torch.manual_seed(0)
    block = StageA(**SMALL_A | {"width": 128}).up_blocks[1]
    assert block.gammas.abs().max() == 0  # the identity
    for layer, fans in (
        (block.depthwise[1], 9 + 9 * 128),
        (block.channelwise[0], 5 * 128),
        (block.channelwise[2], 5 * 128),
    ):
        bound = (6 / fans) ** 0.5
        assert 0.9 * bound < layer.weight.abs().max() <= bound
        assert layer.bias.abs().max() == 0


# The compressor


def batch_normed(w, name, x, eps):
    mean, var = w[f"{name}.running_mean"], w[f"{name}.running_var"]
    x = (x - mean[:, None, None]) / (var[:, None, None] + eps).sqrt()
    if f"{name}.weight" not in w:
        return x
    return x * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]


def silu(x):
    return x / (1 + torch.exp(-x))


def layer(w, name, x, stride=1, active=True):
    weight = w[f"{name}.0.weight"]
    groups = len(weight) if weight.shape[1] == 1 and len(weight) > 1 else 1
    x = F.conv2d(x, weight, None, stride, weight.shape[-1] // 2, groups=groups)
    x = batch_normed(w, f"{name}.1", x, 1e-3)
    return silu(x) if active else x


def squeezed(w, name, x):
    weights = {part: w[f"{name}.{part}.weight"][:, :, 0, 0] for part in ("fc1", "fc2")}
    of_all = silu(x.mean((2, 3)) @ weights["fc1"].T + w[f"{name}.fc1.bias"])
    how_much = of_all @ weights["fc2"].T + w[f"{name}.fc2.bias"]
    return x / (1 + torch.exp(-how_much))[:, :, None, None]


def efficient_net(w, parts, x):
    """EfficientNetV2 up to its last convolution, then the projection: one table, no classes."""
    x = layer(w, "backbone.0", x, 2)
    for i, (fused, expansion, stride, outside, depth) in enumerate(parts, 1):
        for j in range(depth):
            name, step = f"backbone.{i}.{j}.block", 1 if j else stride
            if fused and expansion == 1:
                h = layer(w, f"{name}.0", x, step)
            elif fused:
                h = layer(w, f"{name}.1", layer(w, f"{name}.0", x, step), active=False)
            else:
                h = layer(w, f"{name}.1", layer(w, f"{name}.0", x), step)
                h = layer(w, f"{name}.3", squeezed(w, f"{name}.2", h), active=False)
            x = h + x if step == 1 and x.shape[1] == outside else h
    x = layer(w, f"backbone.{len(parts) + 1}", x)
    x = torch.einsum("nihw,oi->nohw", x, w["mapper.0.weight"][:, :, 0, 0])
    return batch_normed(w, "mapper.1", x, 1e-5)


def encoder_shapes():
    """Of EfficientNetV2-S, by the paper's table, and the projection."""
    found = {}

    def norm(name, channels, affine=True):
        names = ["running_mean", "running_var", *(["weight", "bias"] if affine else [])]
        found.update({f"{name}.{part}": (channels,) for part in names})
        found[f"{name}.num_batches_tracked"] = ()

    def convolution(name, outside, inside, kernel):
        found[f"{name}.0.weight"] = (outside, inside, kernel, kernel)
        norm(f"{name}.1", outside)

    convolution("backbone.0", 24, 3, 3)
    inside = 24
    for i, (fused, expansion, _, outside, depth) in enumerate(V2_S, 1):
        for j in range(depth):
            name, wide = f"backbone.{i}.{j}.block", inside * expansion
            if fused and expansion == 1:
                convolution(f"{name}.0", outside, inside, 3)
            elif fused:
                convolution(f"{name}.0", wide, inside, 3)
                convolution(f"{name}.1", outside, wide, 1)
            else:
                convolution(f"{name}.0", wide, inside, 1)
                convolution(f"{name}.1", wide, 1, 3)
                found[f"{name}.2.fc1.weight"] = (inside // 4, wide, 1, 1)
                found[f"{name}.2.fc1.bias"] = (inside // 4,)
                found[f"{name}.2.fc2.weight"] = (wide, inside // 4, 1, 1)
                found[f"{name}.2.fc2.bias"] = (wide,)
                convolution(f"{name}.3", outside, wide, 1)
            inside = outside
    convolution("backbone.7", 1280, 256, 1)
    found["mapper.0.weight"] = (16, 1280, 1, 1)
    norm("mapper.1", 16, affine=False)
    return found


def previewer_shapes():
    found, width = {}, [16, 512, 512, 256, 256, 128, 128, 128, 128]
    is_larger = [False, False, True, False, True, False, True, False]
    for i, larger in enumerate(is_larger):
        inside, outside, kernel = width[i], width[i + 1], 2 if larger else 3 if i else 1
        order = (inside, outside) if larger else (outside, inside)
        found[f"blocks.{3 * i}.weight"] = (*order, kernel, kernel)
        for name in ("weight", "bias", "running_mean", "running_var"):
            found[f"blocks.{3 * i + 2}.{name}"] = (outside,)
        found[f"blocks.{3 * i + 2}.num_batches_tracked"] = ()
        found[f"blocks.{3 * i}.bias"] = (outside,)
    return found | {"blocks.24.weight": (3, 128, 1, 1), "blocks.24.bias": (3,)}


def test_compressor_and_previewer_have_the_published_weights():
    with torch.device("meta"):
        encoder, previewer = EfficientNetEncoder(), Previewer()
        latent = encoder.eval()(torch.empty(2, 3, 480, 832))
        assert latent.shape == (2, 16, 15, 26)
        assert previewer.eval()(latent).shape == (2, 3, 120, 208)
    assert counted(encoder) == (20.198, 784)
    assert counted(previewer) == (3.98, 58)
    assert shapes(encoder) == encoder_shapes()
    assert shapes(previewer) == previewer_shapes()


@torch.no_grad()
def test_the_published_encoder_is_the_paper_s():
    network = filled(EfficientNetEncoder()).double()
    x = drawn(2, 3, 33, 70).double()
    out = network(x)
    assert out.shape == (2, 16, 2, 3)
    expected = efficient_net(network.state_dict(), V2_S, x)
    scale = expected.abs().max()
    torch.testing.assert_close(out / scale, expected / scale, atol=1e-10, rtol=1e-10)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Of a tiny encoder and previewer."""
    folder = tmp_path_factory.mktemp("compressor")
    save_file(filled(EfficientNetEncoder(**SMALL_NET)).state_dict(), folder / "effnet.safetensors")
    state = {"state_dict": filled(Previewer(5, 8)).state_dict()}
    torch.save(state, folder / "previewer.pt")
    return str(folder / "effnet.safetensors"), str(folder / "previewer.pt")


def compressor(files, **changes):
    vae = CascadeCompressor(*files, SMALL_NET, 8, **changes)
    vae.init_weights()
    return vae


@torch.no_grad()
def test_the_compressor_frame_by_frame(files):
    vae, video = compressor(files, chunk=4), clips((25, 40))
    latent = vae.encode(video, Draws(0, [1, 2]))
    assert vae.latent_size((3, 25, 40)) == latent.shape[2:] == (3, 4, 5)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    weights = vae.encoder.state_dict()

    def latents(frame):
        image = ((frame[0] + 1) / 2).permute(1, 2, 0)
        return efficient_net(weights, PARTS, ((image - mean) / std).permute(2, 0, 1)[None])

    torch.testing.assert_close(latent, by_hand(latents, video), atol=1e-4, rtol=1e-4)
    assert latent.std() > 0.01


@torch.no_grad()
def test_the_preview(files):
    vae, latent = compressor(files), drawn(2, 5, 3, 2, 4)
    w = vae.previewer.state_dict()

    def preview(x):
        for i in range(8):
            name = f"blocks.{3 * i}"
            if i in (2, 4, 6):
                x = F.conv_transpose2d(x, w[f"{name}.weight"], w[f"{name}.bias"], stride=2)
            else:
                x = F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], padding=1 if i else 0)
            x = 0.5 * x * (1 + torch.erf(x / 2**0.5))
            x = batch_normed(w, f"blocks.{3 * i + 2}", x, 1e-5)
        return F.conv2d(x, w["blocks.24.weight"], w["blocks.24.bias"]) * 2 - 1

    video = vae.decode(latent)
    assert video.shape == (2, 3, 3, 16, 32)
    torch.testing.assert_close(video, by_hand(preview, latent), atol=1e-4, rtol=1e-4)


# As VAEs


def test_they_are_frozen_and_read_nothing_when_built(files, file_a):
    init_default_scope("mmsora")
    for config in (
        dict(type="CascadeStageA", pretrained="missing.safetensors", config=SMALL_A),
        dict(type="CascadeCompressor", pretrained="missing.safetensors", config=SMALL_NET),
    ):
        vae = VAES.build(config)
        with pytest.raises(UserError, match=r"missing\.safetensors does not exist"):
            vae.init_weights()
    for vae in (stage_a(file_a), compressor(files)):
        vae.train()
        assert not any(module.training for module in vae.modules())
        assert not any(p.requires_grad for p in vae.parameters())
        mean, std = vae.moments(clips())
        assert torch.equal(mean, vae.encode(clips()))
        assert std is None


def test_who_they_are(files, file_a):
    vae, other = stage_a(file_a), stage_a(file_a, scale=0.5, chunk=3)
    assert vae.fingerprint() == other.fingerprint() != CascadeStageA("x", SMALL_A).fingerprint()
    mine, theirs = vae.identity(), other.identity()
    assert {key for key in mine if mine[key] != theirs[key]} == {"scale"}
    vae, blind = compressor(files), compressor(files[:1] + (None,))
    assert vae.fingerprint() == blind.fingerprint()
    assert vae.fingerprint() != CascadeCompressor("x", None, SMALL_NET).fingerprint()
    assert vae.identity() == blind.identity()
    assert vae.identity()["config"] == SMALL_NET


def test_mistakes_are_told_in_one_line(files, file_a):
    with pytest.raises(ValueError, match="size 24x42 is not divisible by 4"):
        stage_a(file_a).latent_size((1, 24, 42))
    with pytest.raises(UserError, match=r"set model\.vae\.previewer"):
        compressor(files[:1] + (None,)).decode(drawn(1, 5, 1, 2, 2))
    with pytest.raises(UserError, match="is of another architecture than the config's StageA"):
        CascadeStageA(file_a, SMALL_A | {"width": 8}).init_weights()
    with pytest.raises(UserError, match="another architecture than the config's EfficientNet"):
        CascadeCompressor(file_a, None, SMALL_NET).init_weights()
    with pytest.raises(UserError, match="another architecture than the config's Previewer"):
        CascadeCompressor(files[0], file_a, SMALL_NET, 8).init_weights()


def test_the_codebook_is_carried_along(paella, file_a):
    """So that a file of ours has every key of theirs."""
    weights = stage_a(file_a).model.state_dict()
    codes = weights["vquantizer.codebook.weight"]
    assert torch.equal(codes, paella.state_dict()["vquantizer.embedding.weight"])
    assert torch.equal(StageA.from_public(weights)["vquantizer.codebook.weight"], codes)
