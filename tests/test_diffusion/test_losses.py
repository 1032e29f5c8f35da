"""Losses against numbers written down when the authors' code was run, and what they train."""

import math

import pytest
import torch

from mmsora import diffusion as D
from tests.stubs import At

LEVELS = torch.tensor([0.0, 350.0, 999.0], dtype=torch.float64)
SIT_TIMES = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)  # from noise to data

# iDDPM's bound and squared errors of the stub, whose output is read as noise or as data.
IDDPM = {
    "noise": (
        D.NoisePrediction(),
        [2.8246307, 0.0027127315, 0.0095567945],
        [1.5234702, 0.37792492, 0.6491518],
    ),
    "data": (
        D.SamplePrediction(),
        [26.547611, 0.0021117984, 8.051357e-07],
        [0.08871267, 0.74470174, 1.3595843],
    ),
}
RESCALED_KL = [2824.6309, 2.7127316, 9.5567942]
VIDEOS = [2.8376069, 0.0040666247], [1.548803, 0.39303967]

PATHS = {"Linear": D.LinearPath, "GVP": D.TrigPath, "VP": D.VPPath}
READ_AS = {
    "velocity": D.VelocityPrediction(sign=-1),
    "score": D.ScorePrediction(),
    "noise": D.NoisePrediction(),
}
WEIGHED = {
    None: None,
    "velocity": D.VelocityWeighting(),
    "likelihood": D.LikelihoodWeighting(),
}
SIT = {
    ("Linear", "velocity", None): [3.577321, 2.844624, 1.732878],
    ("Linear", "score", None): [2.588446, 1.418687, 0.9778638],
    ("Linear", "score", "velocity"): [258.8445, 5.674746, 1.207239],
    ("Linear", "score", "likelihood"): [28.76051, 5.674746, 10.86515],
    ("Linear", "noise", None): [0.1044267, 0.7598313, 1.585793],
    ("Linear", "noise", "likelihood"): [1.160297, 3.039325, 17.61992],
    ("GVP", "velocity", None): [2.894848, 3.492811, 2.6975],
    ("GVP", "score", None): [2.876989, 1.771074, 0.9846387],
    ("GVP", "score", "likelihood"): [29.24864, 5.563993, 10.01024],
    ("GVP", "noise", None): [0.1006821, 0.7187145, 1.554562],
    ("GVP", "noise", "velocity"): [10.15143, 3.546714, 3.931949],
    ("GVP", "noise", "likelihood"): [1.023575, 2.257908, 15.80431],
    ("VP", "velocity", None): [0.5528965, 3.342449, 9.654081],
    ("VP", "score", None): [2.924736, 2.692654, 1.05184],
    ("VP", "score", "velocity"): [237.2355, 73.82837, 11.07462],
    ("VP", "score", "likelihood"): [26.34485, 14.69221, 10.59772],
    ("VP", "noise", None): [0.08644798, 0.2963219, 1.447752],
    ("VP", "noise", "velocity"): [7.012094, 8.124681, 15.24311],
}


def column(clock, x):
    return clock.to(x).reshape(-1, *[1] * (x.ndim - 1))


def stub(x, clock):
    t = column(clock, x) / 1000
    return torch.cat([torch.sin(x + t), torch.cos(2 * x - t)], dim=1)


class Given:
    """Draws whose noise is given."""

    def __init__(self, noise):
        self.noise = noise

    def normal(self, name, like):
        return self.noise


def process(loss, prediction=None, path=None, t=LEVELS):
    return D.Diffusion(
        path or D.DiscretePath(), prediction or D.LearnedRange(D.NoisePrediction()), At(t),
        D.Euler(), D.SpacedGrid(2), D.ClassifierFree(1.0), loss,
    )  # fmt: skip


@pytest.fixture
def images(filled):
    """Data and noise, (3, 4, 1, 8, 8)."""
    return [filled(name, (3, 4, 8, 8)).unsqueeze(2) for name in ("x0", "noise")]


def losses(images, loss, prediction=None, network=stub, **parts):
    x0, noise = images
    return process(loss, prediction, **parts).loss(network, x0, {}, Given(noise))


# iDDPM's


@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("read_as", IDDPM)
def test_hybrid(images, read_as, rescaled):
    """Over 1000 levels the rescaled loss is the plain one."""
    mean, bound, squares = IDDPM[read_as]
    actual = losses(images, D.Hybrid(rescaled=rescaled), D.LearnedRange(mean))
    expected = [a + b for a, b in zip(squares, bound, strict=True)]
    assert actual.dtype == torch.float32
    assert actual.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("read_as", IDDPM)
def test_squares_alone(images, read_as):
    mean, _, squares = IDDPM[read_as]
    actual = losses(images, D.MSE(), mean, lambda x, clock: stub(x, clock)[:, :4])
    assert actual.tolist() == pytest.approx(squares, rel=1e-5)
    assert losses(images, D.MSE(), D.LearnedRange(mean)).tolist() == actual.tolist()


@pytest.mark.parametrize("read_as", IDDPM)
def test_the_bound_alone(images, read_as):
    mean, bound, _ = IDDPM[read_as]
    actual = losses(images, D.KL(), D.LearnedRange(mean))
    assert actual.dtype == torch.float32
    assert actual.tolist() == pytest.approx(bound, rel=1e-5, abs=1e-8)


def test_the_whole_bound(images):
    actual = losses(images, D.KL(rescaled=True))
    assert actual.tolist() == pytest.approx(RESCALED_KL, rel=1e-5)


def test_videos(filled):
    videos = [filled(name, (2, 6, 4, 8, 8)).transpose(1, 2) for name in ("x5", "n5")]
    t, (bound, squares) = torch.tensor([0.0, 700.0], dtype=torch.float64), VIDEOS
    assert losses(videos, D.KL(), t=t).tolist() == pytest.approx(bound, rel=1e-5)
    assert losses(videos, D.MSE(), t=t).tolist() == pytest.approx(squares, rel=1e-5)


@pytest.mark.parametrize("levels", [50, 250])
def test_rescaled_losses_on_a_short_table(images, levels):
    """Fewer levels have larger terms; rescaled they weigh what 1000 of them do."""
    parts = dict(path=D.DiscretePath(num_levels=levels), t=LEVELS.clamp_max(levels - 1))
    squares, bound = losses(images, D.MSE(), **parts), losses(images, D.KL(), **parts)
    rescaled = losses(images, D.Hybrid(2.0, rescaled=True), **parts)
    torch.testing.assert_close(rescaled, squares + 2 * bound * levels / 1000)
    torch.testing.assert_close(losses(images, D.Hybrid(2.0), **parts), squares + 2 * bound)
    whole = losses(images, D.KL(rescaled=True), **parts)
    torch.testing.assert_close(whole, bound * levels)


def gradient(images, loss, prediction=None, outputs=8):
    x0, noise = images
    diffusion = process(loss, prediction)
    batch = diffusion.noised(x0, LEVELS, Given(noise))
    output = stub(batch.x, LEVELS)[:, :outputs].requires_grad_()
    loss(diffusion.path, diffusion.prediction, batch, output).sum().backward()
    return output.grad.split(4, dim=1)


def test_the_bound_of_hybrid_trains_the_variance_alone(images):
    """A weight on the bound that would show in the mean's gradient."""
    mean, variance = gradient(images, D.Hybrid(1000.0))
    only_mean, nothing = gradient(images, D.MSE())
    assert torch.equal(mean, only_mean)
    assert not nothing.any()
    assert (variance != 0).flatten(1).any(1).all()


def test_the_bound_alone_trains_the_mean_too(images):
    mean, variance = gradient(images, D.KL())
    assert (mean != 0).flatten(1).any(1).all()
    torch.testing.assert_close(variance, gradient(images, D.Hybrid())[1])


@pytest.mark.parametrize("variance", ["posterior", "forward"])
def test_the_bound_of_a_fixed_variance(images, variance):
    """DDPM's weight on errors of the noise (arXiv:2006.11239, equation 12)."""
    loss, mean = D.KL(variance=variance), D.NoisePrediction()
    actual = losses(images, loss, mean, lambda x, clock: stub(x, clock)[:, :4])[1:]
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    bar = (1 - betas).cumprod(0)
    t = LEVELS.long()[1:]
    beta, now, before = betas[t], bar[t], bar[t - 1]
    tilde = beta * (1 - before) / (1 - now)
    used = tilde if variance == "posterior" else beta
    weight = beta**2 / (2 * used * (1 - beta) * (1 - now))
    spread = 0.5 * ((used / tilde).log() - 1 + tilde / used)
    squares = torch.tensor(IDDPM["noise"][2][1:], dtype=torch.float64)
    expected = (weight * squares + spread) / math.log(2)
    assert actual.tolist() == pytest.approx(expected.tolist(), rel=1e-4)


def test_hybrid_weighs_the_squares_alone(images):
    plain, weighed = D.MSE(), D.MSE(weighting=D.P2(gamma=2.0))
    bound = losses(images, D.KL())
    both = losses(images, D.Hybrid(weighting=dict(type="P2", gamma=2.0)))
    torch.testing.assert_close(both, losses(images, weighed) + bound)
    assert not torch.allclose(losses(images, weighed), losses(images, plain))


def test_the_bound_refuses_what_it_has_no_terms_for(images):
    with pytest.raises(ValueError, match="LearnedRange needs an output of shape.*out_channels to"):
        losses(images, D.KL(), network=lambda x, clock: x)
    with pytest.raises(ValueError, match="NoisePrediction needs an output.*out_channels to 4"):
        losses(images, D.KL(), D.NoisePrediction())
    with pytest.raises(ValueError, match="'posterior' or 'forward', got 'learned'"):
        D.KL(variance="learned")
    with pytest.raises(ValueError, match="the variational bound needs"):
        losses(images, D.KL(), path=D.LinearPath(span=(0.0, 0.999)), t=SIT_TIMES)


# SiT's


@pytest.mark.parametrize(("path", "read_as", "weighed"), SIT, ids=str)
def test_sit(filled, path, read_as, weighed):
    images = [filled(name, (3, 4, 8, 8)).unsqueeze(2) for name in ("x1", "x0n")]
    span = (1e-5, 0.999) if read_as != "velocity" else (1e-5, 1.0)
    actual = losses(
        images,
        D.MSE(WEIGHED[weighed]),
        READ_AS[read_as],
        lambda x, clock: torch.sin(x + column(clock, x)),
        path=PATHS[path](clock_scale=1.0, span=span, reverse_clock=True),
        t=1 - SIT_TIMES,
    )
    assert actual.tolist() == pytest.approx(SIT[path, read_as, weighed], rel=1e-5)
