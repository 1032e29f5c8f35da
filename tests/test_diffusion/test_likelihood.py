"""Likelihoods against densities that are known, and against SiT's own figures."""

import math

import pytest
import torch

from mmsora import diffusion as D
from mmsora.utils.draws import Draws

MEAN, STD = 0.5, 0.3
EULER = (
    [-485.564, -444.811, -484.0461],
    (-0.02847534, 0.871696, 24.17003),
    [0.1662524, 0.001948074, -0.3146365, 1.664038, -0.8442953, -1.650929, -0.9939564, -0.7735408],
)
DOPRI5 = (
    [-493.1049, -452.5184, -489.4285],
    (-0.02799993, 0.8554597, 23.71989),
    [0.1677188, 0.002128577, -0.3020523, 1.648167, -0.7943896, -1.63433, -0.9473299, -0.7241745],
)


class Signs:
    """SiT's probes: torch's own generator after ``manual_seed(0)``, in the order of the calls."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)
        self.names = []

    def normal(self, name, like):
        self.names.append(name)
        return torch.randint(2, like.shape, generator=self.generator).to(like) * 2 - 1


class Ideal(D.Prediction):
    """Knows that the data are normal, with this mean and covariance, and needs no network."""

    def __init__(self, mean, covariance):
        self.mean, self.covariance = mean, covariance

    def target(self, path, x0, noise, level):
        return x0

    def estimate(self, path, x, output, level):
        _, alpha, sigma = level
        flat = x.flatten(1)
        spread = alpha**2 * self.covariance + sigma**2 * torch.eye(flat.shape[1]).to(flat)
        residual = torch.linalg.solve(spread, (flat - alpha * self.mean).T).T
        x0 = self.mean + alpha * residual @ self.covariance
        return D.Estimate(x0.reshape(x.shape), (sigma * residual).reshape(x.shape))


def process(path, prediction, steps, grid=None):
    parts = D.UniformTimes(), D.Euler(), grid or D.SpacedGrid(steps), D.ClassifierFree(1.0)
    return D.Diffusion(path, prediction, *parts, D.MSE())


def silent(x, clock):
    assert clock.isfinite().all()
    return torch.zeros_like(x)


def stub(x, clock):
    t = clock.to(x).reshape(-1, *[1] * (x.ndim - 1))
    return torch.tanh(x) * (1 - t) + torch.sin(3 * x) / 2


def sit_process(steps=19):
    return process(D.LinearPath(1.0, reverse_clock=True), D.VelocityPrediction(sign=-1), steps)


@pytest.fixture
def images(filled):
    return filled("x1", (3, 4, 8, 8)).unsqueeze(2)


@pytest.fixture
def correlated():
    """Six numbers a sample that depend on one another, their distribution, and a batch."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(6, 6, generator=generator, dtype=torch.float64) / 2
    covariance = root @ root.T + 0.05 * torch.eye(6, dtype=torch.float64)
    mean = torch.linspace(-1, 1, 6, dtype=torch.float64)
    normal = torch.distributions.MultivariateNormal(mean, covariance)
    x0 = mean + torch.randn(4, 6, generator=generator, dtype=torch.float64) @ root.T
    return Ideal(mean, covariance), normal, x0.reshape(4, 1, 1, 2, 3)


@pytest.mark.parametrize(
    ("solver", "golden"),
    [
        (D.RungeKutta("euler"), EULER),
        (D.DormandPrince(), DOPRI5),
        (D.DormandPrince(overshoot=True), DOPRI5),
    ],
)
def test_as_sit_finds_it(images, solver, golden):
    """The test's context records gradients, in which SiT's own code fails."""
    assert torch.is_grad_enabled()
    found = D.log_likelihood(sit_process(), stub, images, {}, Signs(), solver)
    tolerance = 1e-5 if golden is EULER else 1e-3
    log_p, (mean, std, norm), values = golden
    assert found.log_p.tolist() == pytest.approx(log_p, rel=1e-4)
    z = found.noise
    assert z.shape == images.shape
    count = z.numel()
    places = [0, 1, count // 7, count // 3, count // 2, 2 * count // 3, count - 2, count - 1]
    assert z.flatten()[places].tolist() == pytest.approx(values, rel=tolerance, abs=tolerance)
    statistics = z.mean().item(), z.std(correction=0).item(), z.norm().item()
    assert statistics == pytest.approx((mean, std, norm), rel=tolerance, abs=1e-5)


def test_the_density_of_noise(images):
    """Where nothing moves, data have the density of noise."""
    path = D.VEPath(sigma_min=1e-9, sigma_max=1.0)
    diffusion = process(path, Ideal(0.0, None), 1, lambda path: torch.tensor([1.0, 1.0]).double())
    diffusion.prediction.estimate = lambda path, x, output, level: D.Estimate(x, x)
    found = D.log_likelihood(diffusion, lambda x, clock: x, images, {}, Signs())
    expected = [-356.8835144042969, -358.69110107421875, -379.944091796875]
    assert found.log_p.tolist() == pytest.approx(expected, rel=1e-6)
    assert torch.equal(found.noise, images)


SOLVERS = {
    "rk4": (D.RungeKutta("rk4"), 60),
    "heun2": (D.RungeKutta("heun2"), 250),
    "dopri5": (D.DormandPrince(1e-6, 1e-8), 1),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_a_normal_density(name):
    """One number a sample: then any probe is exact."""
    solver, steps = SOLVERS[name]
    x0 = torch.tensor([0.5, 0.8, 0.0, -0.1, 2.0]).reshape(5, 1, 1, 1, 1)
    ideal = Ideal(torch.tensor([MEAN]), torch.tensor([[STD**2]]))
    diffusion, draws = process(D.LinearPath(), ideal, steps), Draws(0, range(5))
    found = D.log_likelihood(diffusion, silent, x0, {}, draws, solver)
    exact = torch.distributions.Normal(MEAN, STD).log_prob(x0.flatten())
    assert exact[:2].tolist() == pytest.approx([0.2850343, -0.2149657])
    assert found.log_p.tolist() == pytest.approx(exact.tolist(), abs=1e-3)
    noise = (x0 - MEAN) / STD
    torch.testing.assert_close(found.noise, noise, rtol=0, atol=2e-3)


PATHS = {
    "linear": (D.LinearPath(), None, 1e-4),
    "trig": (D.TrigPath(), None, 1e-4),
    "vp": (D.VPPath(span=(1e-4, 1.0)), None, 0.02),  # whose noise still holds some data
    "ve": (D.VEPath(sigma_max=3e3), torch.linspace(3e3**0.25, 0, 80).double() ** 4, 2e-3),
}


@pytest.mark.parametrize("name", PATHS)
def test_a_correlated_density_by_the_exact_trace(correlated, name):
    path, times, tolerance = PATHS[name]
    ideal, normal, x0 = correlated
    grid = None if times is None else lambda path: times
    found = D.log_likelihood(
        process(path, ideal, 80, grid), silent, x0, {}, None, D.RungeKutta("rk4"), trace="exact"
    )
    exact = normal.log_prob(x0.flatten(1))
    torch.testing.assert_close(found.log_p, exact, rtol=0, atol=tolerance)
    assert found.log_p.dtype == torch.float64


@pytest.mark.parametrize("trace", ["fresh", "fixed"])
def test_probes_are_right_on_average(correlated, trace):
    ideal, normal, x0 = correlated
    many = x0[:1].expand(600, -1, -1, -1, -1)
    parts = process(D.LinearPath(), ideal, 25), silent, many, {}, Draws(0, range(600))
    log_p = D.log_likelihood(*parts, trace=trace).log_p
    exact = normal.log_prob(x0[:1].flatten(1)).item()
    error = log_p.std().item() / len(many) ** 0.5
    assert 0 < error < 0.1
    assert log_p.mean().item() == pytest.approx(exact, abs=4 * error + 0.01)
    if trace == "fresh":  # many draws are averaged
        fixed = D.log_likelihood(*parts, trace="fixed").log_p
        assert log_p.std() < 0.5 * fixed.std()


def test_probes_are_drawn_by_name(images):
    names = {"fresh": [f"likelihood/{i}" for i in range(6)], "fixed": ["likelihood"] * 6}
    for trace, expected in names.items():
        draws = Signs()
        D.log_likelihood(sit_process(3), stub, images, {}, draws, trace=trace)
        assert draws.names == expected


def test_sampling_makes_the_data_again_of_the_noise(images):
    diffusion = sit_process(40)
    diffusion.solver = D.RungeKutta("rk4")
    found = D.log_likelihood(diffusion, stub, images, {}, Signs(), diffusion.solver)
    back = diffusion.sample(stub, found.noise, {}, None, Signs())
    torch.testing.assert_close(back, images, rtol=0, atol=1e-4)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.mix = torch.nn.Conv3d(3, 3, 3, padding=1)
            self.frozen = torch.nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, x, clock, label):
        clock, label = (value.to(x).reshape(-1, 1, 1, 1, 1) for value in (clock / 1000, label))
        return self.frozen * torch.tanh(self.mix(x)) * clock + label


def measured(indices=(3, 8), rows=slice(None), grad=True, solver=None):
    x0 = torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0))[rows]
    label = torch.tensor([0.3, -0.7])[rows]
    diffusion, net = process(D.LinearPath(), D.VelocityPrediction(), 4), Net()
    draws = Draws(0, indices)
    with torch.set_grad_enabled(grad):
        found = D.log_likelihood(diffusion, net, x0, {"label": label}, draws, solver)
    assert not x0.requires_grad
    return found, net


def test_in_any_context_and_the_parameters_are_left_alone():
    (one, net), (other, _) = measured(grad=True), measured(grad=False)
    assert torch.equal(one.log_p, other.log_p)
    assert not one.log_p.requires_grad
    assert not one.noise.requires_grad
    assert [p.requires_grad for p in net.parameters()] == [False, True, True]
    assert all(p.grad is None for p in net.parameters())


def test_no_graph_is_kept():
    """It would hold the activations of all stages of a step, and of all steps."""
    rates = []

    class Watched(D.RungeKutta):
        def integrate(self, field, state, times):
            def watched(t, state):
                rates.extend(found := field(t, state))
                return found

            return super().integrate(watched, state, times)

    measured(solver=Watched("heun2"))
    assert len(rates) == 16
    assert not any(rate.requires_grad for rate in rates)
    x0 = torch.ones(3, 2, 1, 4, 5, requires_grad=True)
    found = D.log_likelihood(sit_process(2), stub, x0, {}, Signs())
    assert not found.log_p.requires_grad
    assert not found.noise.requires_grad


def test_the_path_is_that_of_the_size(images):
    class Sized(D.LinearPath):
        def for_size(self, size):
            assert tuple(size) == (1, 8, 8)
            return D.LinearPath(1.0, (0.01, 0.9), reverse_clock=True)

    sized, plain = sit_process(3), sit_process(3)
    sized.path = Sized()
    plain.path = D.LinearPath(1.0, (0.01, 0.9), reverse_clock=True)
    found = [D.log_likelihood(part, stub, images, {}, Signs()).log_p for part in (sized, plain)]
    assert torch.equal(*found)


def test_a_sample_is_the_same_alone_and_in_a_batch():
    both, alone = measured()[0], measured((8,), slice(1, 2))[0]
    torch.testing.assert_close(both.log_p[1:], alone.log_p)
    assert both.log_p.unique().numel() == 2


def test_guidance_has_no_part_in_it(images):
    guided = sit_process(3)
    guided.guidance = D.ClassifierFree(7.0)
    found = [
        D.log_likelihood(diffusion, stub, images, {}, Signs()).log_p
        for diffusion in (guided, sit_process(3))
    ]
    assert torch.equal(*found)


def test_bits():
    x0 = torch.zeros(3, 2, 4, 5, 6)
    log_p = torch.tensor([-240 * math.log(2), 0.0, 480 * math.log(2)])
    assert D.bits_per_dimension(log_p, x0).tolist() == pytest.approx([1, 0, -2])


def test_mistakes(images):
    table = process(D.DiscretePath(), D.VPrediction(), 5)
    with pytest.raises(ValueError, match="DiscretePath has 1000 levels; take the variational"):
        D.log_likelihood(table, stub, images, {}, Signs())
    with pytest.raises(ValueError, match="unknown trace 'exakt'; did you mean 'exact'"):
        D.log_likelihood(sit_process(), stub, images, {}, Signs(), trace="exakt")
