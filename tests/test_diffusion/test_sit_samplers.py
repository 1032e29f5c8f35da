"""SiT's samplers against numbers written down when the authors' code was run.

A stub stands for the network. SiT counts time from noise to data, and so do its numbers; all
start from the same noise, of images as one frame.
"""

import math

import pytest
import torch

from mmsora import diffusion as D
from mmsora.diffusion.sde import diffusion_rate
from mmsora.utils.draws import Draws

PATHS = {"Linear": D.LinearPath, "GVP": D.TrigPath, "VP": D.VPPath}
PREDICTIONS = {
    "velocity": D.VelocityPrediction(sign=-1),
    "noise": D.NoisePrediction(),
    "score": D.ScorePrediction(),
}
SDES = {"Euler": D.EulerMaruyama, "Heun": D.StochasticHeun}
CALLS = {"euler": 49, "heun2": 98, "midpoint": 98, "rk4": 196}

# Mean, deviation, norm and eight places.
FLOWS = {
    "Linear, velocity, euler, 50": (0.1286546, 1.182593, 26.9169, [
        -1.157865, -1.422002, 1.225482, 1.207722, -1.166135, 0.7848142, -1.248694, -1.060346,
    ]),
    "Linear, velocity, heun2, 50": (0.1279718, 1.176393, 26.77578, [
        -1.151886, -1.414086, 1.219738, 1.201937, -1.160188, 0.7850266, -1.242954, -1.054451,
    ]),
    "Linear, velocity, midpoint, 50": (0.1279735, 1.176411, 26.77617, [
        -1.151898, -1.414073, 1.219738, 1.201939, -1.160198, 0.7851525, -1.242952, -1.054497,
    ]),
    "Linear, velocity, rk4, 50": (0.1279761, 1.176429, 26.7766, [
        -1.151945, -1.414087, 1.219782, 1.201984, -1.160245, 0.7851673, -1.242993, -1.054529,
    ]),
    "Linear, velocity, dopri5, 50": (0.1280455, 1.176966, 26.78884, [
        -1.153087, -1.414001, 1.220131, 1.202455, -1.161262, 0.7855451, -1.243273, -1.05632,
    ]),
    "Linear, velocity, dopri5, 250": (0.1280455, 1.176966, 26.78884, [
        -1.153087, -1.414001, 1.220131, 1.202455, -1.161262, 0.7855451, -1.243273, -1.05632,
    ]),
    "GVP, velocity, euler, 50": (0.1286546, 1.182593, 26.9169, [
        -1.157865, -1.422002, 1.225482, 1.207722, -1.166135, 0.7848142, -1.248694, -1.060346,
    ]),
    "VP, velocity, euler, 50": (0.1286743, 1.182764, 26.92079, [
        -1.158016, -1.422439, 1.225726, 1.207942, -1.166297, 0.7844495, -1.248967, -1.060352,
    ]),
    "VP, velocity, dopri5, 50": (0.1280661, 1.177147, 26.79296, [
        -1.153245, -1.414444, 1.220379, 1.20268, -1.161431, 0.7851875, -1.24355, -1.056335,
    ]),
    "Linear, score, euler, 50": (178.3015, 1619.89, 36875.3, [
        -1798.753, -1891.373, 1846.519, 1846.734, -1814.275, 651.1007, -1842.979, -1495.729,
    ]),
    "Linear, noise, euler, 50": (27.65439, 573.9833, 13002.83, [
        71.43277, -1002.599, 253.6198, 149.3846, 43.04994, -189.9348, -402.0285, 357.2969,
    ]),
    "Linear, noise, dopri5, 50": (24.35932, 321.4827, 7295.176, [
        -0.0002405813, -557.7276, 282.3622, 214.9308, -0.0003238799, 1.783029e-05,
        -342.2917, -6.066928e-05,
    ]),
    "GVP, score, euler, 50": (116.6566, 1058.996, 24107.29, [
        -1175.518, -1235.315, 1206.64, 1207.003, -1186.83, 426.5524, -1203.671, -978.3108,
    ]),
    "GVP, score, dopri5, 50": (122.5553, 1133.364, 25794.6, [
        -1069.308, -1492.996, 1209.474, 1163.339, -1080.729, 639.0655, -1238.867, -878.7679,
    ]),
    "GVP, noise, euler, 50": (18.03901, 374.4911, 8483.591, [
        46.34086, -653.5762, 165.2403, 97.23694, 27.78011, -123.6681, -261.9558, 232.9846,
    ]),
    "GVP, noise, dopri5, 50": (15.53966, 204.7644, 4646.612, [
        -9.909731e-05, -355.8887, 180.7341, 135.2538, -0.0001334072, 7.344529e-06,
        -216.3503, -2.499047e-05,
    ]),
    "VP, score, euler, 50": (22.20369, 204.5875, 4656.469, [
        -195.7318, -270.2183, 220.3682, 211.2662, -198.8818, 105.3613, -228.2014, -157.4772,
    ]),
    "VP, score, dopri5, 50": (27.41239, 255.8536, 5822.441, [
        -237.4907, -349.7556, 271.6087, 270.063, -237.5009, 135.4169, -279.2747, -192.9656,
    ]),
    "VP, noise, euler, 50": (3.837886, 49.93494, 1133.231, [
        -0.002163003, -85.01023, 46.18427, 36.76975, -0.00348611, 7.636126e-05, -55.19172,
        -0.0003331391,
    ]),
    "VP, noise, dopri5, 50": (4.792801, 59.31831, 1346.594, [
        -0.002941427, -89.22363, 61.00124, 47.46617, -0.004281037, 0.0001790189, -64.13983,
        -0.0006729114,
    ]),
}  # fmt: skip
REVERSED = (0.06861079, 0.8240915, 18.71158, [
    -0.2065973, -1.495657, 0.5199282, 0.4000182, -0.2279617, 0.02462653, -0.718812, -0.0858263,
])  # fmt: skip

# Mean, norm and four places.
DIFFUSIONS = {
    "Linear, Euler, sigma, mean": (0.007866174, 19.63104, [
        -1.10769, -0.0887918, 1.07802, -0.699013,
    ]),
    "Linear, Euler, sigma, euler": (0.008511606, 20.31346, [
        -1.1597, -0.0872661, 1.12673, -0.708861,
    ]),
    "Linear, Euler, sigma, none": (0.007230937, 19.67142, [
        -1.12672, -0.134186, 1.09158, -0.69796,
    ]),
    "Linear, Euler, linear, mean": (0.007866174, 19.63104, [
        -1.10769, -0.0887918, 1.07802, -0.699013,
    ]),
    "Linear, Euler, decreasing, mean": (0.03025922, 25.41918, [
        -1.3963, -0.893529, 1.35492, -0.936626,
    ]),
    "Linear, Heun, sigma, mean": (0.007686772, 19.56042, [
        -1.09776, -0.118036, 1.07238, -0.702433,
    ]),
    "Linear, Heun, linear, mean": (0.007686772, 19.56042, [
        -1.09776, -0.118036, 1.07238, -0.702433,
    ]),
    "Linear, Heun, decreasing, mean": (0.03071727, 25.43991, [
        -1.38643, -0.90339, 1.35205, -0.936252,
    ]),
    "GVP, Euler, sigma, mean": (0.01145141, 27.52216, [-1.68185, 0.110327, 1.67365, -0.804464]),
    "GVP, Euler, sigma, tweedie": (0.01128135, 27.51713, [-1.69339, 0.106498, 1.68531, -0.795115]),
    "GVP, Euler, sigma, euler": (0.01130329, 27.57149, [-1.69676, 0.106701, 1.68867, -0.796667]),
    "GVP, Euler, sigma, none": (0.009658077, 27.55847, [-1.69508, 0.0175856, 1.68834, -0.805326]),
    "GVP, Euler, linear, mean": (0.02380216, 27.69197, [-1.67378, -0.376087, 1.6246, -0.8602]),
    "GVP, Euler, decreasing, mean": (0.03726407, 28.02655, [
        -1.52951, -0.993125, 1.44635, -0.980744,
    ]),
    "GVP, Heun, linear, mean": (0.02425226, 27.70883, [-1.65447, -0.401021, 1.61769, -0.862957]),
    "GVP, Heun, decreasing, mean": (0.03779039, 28.05137, [
        -1.51654, -1.00053, 1.44425, -0.979298,
    ]),
    "VP, Euler, sigma, mean": (-0.00238018, 25.91707, [-1.67144, 0.855935, 1.69184, -0.561781]),
    "VP, Euler, sigma, tweedie": (-0.002340103, 25.80111, [
        -1.66755, 0.849779, 1.68777, -0.555281,
    ]),
    "VP, Euler, sigma, euler": (-0.002344879, 26.0569, [-1.68632, 0.856746, 1.70668, -0.55829]),
    "VP, Euler, sigma, none": (-0.004210768, 26.05355, [-1.70495, 0.812185, 1.74183, -0.562533]),
    "VP, Euler, linear, mean": (0.02089314, 27.00415, [-1.69313, -0.296967, 1.63719, -0.804104]),
    "VP, Euler, sbdm, mean": (-0.0597657, 24.20387, [-1.13944, 2.45358, 1.1393, 0.715137]),
    "VP, Heun, sigma, mean": (-0.002190535, 25.84525, [-1.64996, 0.842063, 1.67954, -0.570171]),
    "VP, Heun, linear, mean": (0.02115528, 27.00979, [-1.67607, -0.318337, 1.63285, -0.806389]),
    "VP, Heun, sbdm, mean": (-0.06100454, 23.8529, [-1.12962, 2.35502, 1.12014, 0.71174]),
    "VP, Heun, decreasing, mean": (0.03670244, 27.73314, [
        -1.50946, -0.996634, 1.43508, -0.965493,
    ]),
}  # fmt: skip

# At SiT's times 0.1, 0.25, 0.5, 0.75 and 0.9.
OF_TIME = {
    "constant": [1, 1, 1, 1, 1],
    "linear": [0.9, 0.75, 0.5, 0.25, 0.10000002],
    "decreasing": [0.95165533, 0.72855341, 0.24999997, 0.021446612, 0.00059886702],
    "increasing-decreasing": [0.095491506, 0.49999997, 1.0, 0.49999997, 0.095491529],
}
RATES = {
    "Linear": {
        "sbdm": [8.999999, 3.0, 1.0, 0.33333334, 0.11111114],
        "sigma": [0.89999998, 0.75, 0.5, 0.25, 0.10000002],
    },
    "GVP": {
        "sbdm": [9.9176188, 3.7922375, 1.5707963, 0.6506452, 0.24878974],
        "sigma": [0.98768836, 0.9238795, 0.70710677, 0.38268343, 0.15643449],
    },
    "VP": {
        "sbdm": [9.0050001, 7.5124998, 5.0250001, 2.5374999, 1.0450002],
        "sigma": [0.99985558, 0.99827778, 0.95965415, 0.69015962, 0.32205257],
    },
}


class Stub:
    """``tanh(x) (1 - t) + sin(3 x) / 2``, and the clocks it was told."""

    def __init__(self):
        self.clocks = []

    def __call__(self, x, clock):
        self.clocks.append(clock[0].item())
        t = clock.to(x).reshape(-1, *[1] * (x.ndim - 1))
        return torch.tanh(x) * (1 - t) + torch.sin(3 * x) / 2


class Replayed:
    """Torch's own generator after ``manual_seed(0)``, in the order of the calls."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, name, like):
        return torch.randn(like.shape, generator=self.generator)


@pytest.fixture
def start(filled):
    return filled("z", (2, 4, 8, 8)).unsqueeze(2)


def sit_path(name, **options):
    return PATHS[name](clock_scale=1.0, reverse_clock=True, **options)


def process(path, solver, grid, prediction="velocity"):
    parts = PREDICTIONS[prediction], D.UniformTimes(), solver, grid, D.ClassifierFree(1.0)
    return D.Diffusion(path, *parts, D.MSE())


def eight_places(x):
    count = x.numel()
    places = [0, 1, count // 7, count // 3, count // 2, 2 * count // 3, count - 2, count - 1]
    return x.flatten()[places].tolist()


def assert_golden(x, golden, rel, abs):
    mean, std, norm, values = golden
    assert eight_places(x) == pytest.approx(values, rel=rel, abs=abs)
    assert x.mean().item() == pytest.approx(mean, rel=rel, abs=abs)
    assert x.std(correction=0).item() == pytest.approx(std, rel=rel, abs=abs)
    assert x.norm().item() == pytest.approx(norm, rel=rel)


# The flow


@pytest.mark.parametrize("name", FLOWS)
def test_flows(start, name):
    path, prediction, method, points = name.split(", ")
    span = (0.001, 1.0) if path == "VP" else (0.001, 0.999)
    options = {} if path != "VP" and prediction == "velocity" else {"span": span}
    if method == "dopri5":
        # Its steps go by errors, and these in float32 by the processor's rounding.
        solver, tolerance, start = D.DormandPrince(overshoot=True), 1e-3, start.double()
    else:
        solver, tolerance = D.RungeKutta(method), 1e-5
    diffusion = process(
        sit_path(path, **options), solver, D.SpacedGrid(int(points) - 1), prediction
    )
    stub = Stub()
    x = diffusion.sample(stub, start, {}, None, None)
    assert_golden(x, FLOWS[name], rel=tolerance, abs=tolerance)
    assert len(stub.clocks) == CALLS.get(method, len(stub.clocks))
    if prediction == "velocity" and method == "dopri5":
        assert len(stub.clocks) == 20


def test_data_flow_back_to_noise(start):
    times = torch.linspace(0, 1, 50, dtype=torch.float64)
    diffusion = process(sit_path("Linear"), D.RungeKutta("euler"), lambda path: times)
    assert_golden(diffusion.sample(Stub(), start, {}, None, None), REVERSED, rel=1e-5, abs=1e-5)


# The stochastic samplers


@pytest.mark.parametrize("form", [*OF_TIME, "sbdm", "sigma"])
@pytest.mark.parametrize("name", PATHS)
def test_diffusion_rates(name, form):
    t = 1 - torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], dtype=torch.float64)
    expected = (OF_TIME | RATES[name])[form]
    rates = diffusion_rate(form, sit_path(name), t)
    assert rates.tolist() == pytest.approx(expected, rel=2e-6, abs=1e-7)
    if form != "decreasing":
        assert torch.equal(diffusion_rate(form, sit_path(name), t, norm=0.5), 0.5 * rates)


def test_norm_of_decreasing():
    t = torch.tensor([0.1, 0.9], dtype=torch.float64)
    expected = [((0.5 * math.cos(math.pi * at) + 1) ** 2) / 4 for at in (0.9, 0.1)]
    rates = diffusion_rate("decreasing", sit_path("Linear"), t, norm=0.5)
    assert rates.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("name", DIFFUSIONS)
def test_diffusions(start, name):
    """With half the network calls that SiT makes: one where it asks for drift and score."""
    path, scheme, form, last = name.split(", ")
    if last == "none":
        grid = D.SpacedGrid(49, span=(1.0, 0.001 if path == "VP" else 0.0))
    else:
        grid = D.SpacedGrid(50, span=(1.0, 0.0), last_step=0.04)
    stub = Stub()
    diffusion = process(sit_path(path), SDES[scheme](form, last_step=last), grid)
    x = diffusion.sample(stub, start, {}, None, Replayed())
    mean, norm, values = DIFFUSIONS[name]
    assert x.flatten()[[0, 1, 255, 511]].tolist() == pytest.approx(values, rel=1e-4, abs=1e-5)
    assert x.mean().item() == pytest.approx(mean, rel=1e-4, abs=1e-6)
    assert x.norm().item() == pytest.approx(norm, rel=1e-5)
    theirs = 100 if scheme == "Euler" else 198
    assert len(stub.clocks) == (49 if last == "none" else theirs // 2)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("scheme", SDES)
@pytest.mark.parametrize("form", ["sbdm", "constant", "increasing-decreasing"])
def test_what_fails_in_sit(start, path, scheme, form):
    stub = Stub()
    grid = D.SpacedGrid(50, span=(1.0, 0.0), last_step=0.04)
    diffusion = process(sit_path(path), SDES[scheme](form), grid)
    x = diffusion.sample(stub, start, {}, None, Replayed())
    assert x.isfinite().all()
    assert 0.1 < x.std() < 10
    inside = form == "sbdm" and path != "VP"
    assert stub.clocks[0] == pytest.approx(1e-3 if inside else 0.0)


@pytest.mark.parametrize(("sampled", "ends"), [(None, (0.99, 0.01)), ((0.98, 0.03), (0.98, 0.03))])
def test_where_sampling_ends_is_said_apart_from_training(start, sampled, ends):
    """SiT forgets the one when it is told the other."""
    stub, path = Stub(), sit_path("Linear", span=(0.01, 0.99))
    diffusion = process(path, D.RungeKutta("heun2"), D.SpacedGrid(5, span=sampled))
    diffusion.sample(stub, start, {}, None, None)
    assert (1 - stub.clocks[0], 1 - stub.clocks[-1]) == pytest.approx(ends, abs=1e-6)
    times = diffusion.train_times(path, Draws(0, range(300)))
    assert 0.01 <= times.min() < 0.03
    assert 0.97 < times.max() < 0.99
