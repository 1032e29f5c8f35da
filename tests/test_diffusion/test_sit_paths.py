"""The paths of SiT against numbers written down when the authors' code was run.

SiT counts time from noise (0) to data (1), so rates change their sign.
"""

import math

import pytest
import torch

from mmsora import diffusion as D
from tests.stubs import At

KINDS = {"Linear": D.LinearPath, "GVP": D.TrigPath, "VP": D.VPPath}
TIMES = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], dtype=torch.float64)
BATCH = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)

COEFFICIENTS = {
    "Linear": dict(
        alpha=[0.1, 0.25, 0.5, 0.75, 0.89999998], d_alpha=[1.0] * 5,
        sigma=[0.89999998, 0.75, 0.5, 0.25, 0.10000002], d_sigma=[-1.0] * 5,
        d_log=[10.0, 4.0, 2.0, 1.3333334, 1.1111112],
        diffusion=[8.999999, 3.0, 1.0, 0.33333334, 0.11111114],
    ),
    "GVP": dict(
        alpha=[0.15643448, 0.38268346, 0.70710677, 0.92387956, 0.98768836],
        d_alpha=[1.5514573, 1.4512266, 1.1107208, 0.60111773, 0.24572673],
        sigma=[0.98768836, 0.9238795, 0.70710677, 0.38268343, 0.15643449],
        d_sigma=[-0.2457267, -0.60111779, -1.1107208, -1.4512267, -1.5514573],
        d_log=[9.9176178, 3.7922378, 1.5707964, 0.6506452, 0.24878973],
        diffusion=[9.9176188, 3.7922375, 1.5707963, 0.6506452, 0.24878974],
    ),
    "VP": dict(
        alpha=[0.016996464, 0.058663517, 0.28118289, 0.72365719, 0.94672179],
        d_alpha=[0.15305316, 0.44070965, 1.4129441, 1.8362801, 0.98932445],
        sigma=[0.99985558, 0.99827778, 0.95965415, 0.69015962, 0.32205257],
        d_sigma=[-0.0026017383, -0.025898183, -0.41399881, -1.9254057, -2.9082675],
        d_log=[9.0050001, 7.5124998, 5.0250001, 2.5374999, 1.0450002],
        diffusion=[9.0050001, 7.5124998, 5.0250001, 2.5374999, 1.0450002],
    ),
}  # fmt: skip
LOSSES = {
    ("Linear", "velocity"): [3.577321, 2.844624, 1.732878],
    ("Linear", "score"): [2.588446, 1.418687, 0.9778638],
    ("Linear", "noise"): [0.1044267, 0.7598313, 1.585793],
    ("GVP", "velocity"): [2.894848, 3.492811, 2.6975],
    ("GVP", "score"): [2.876989, 1.771074, 0.9846387],
    ("GVP", "noise"): [0.1006821, 0.7187145, 1.554562],
    ("VP", "velocity"): [0.5528965, 3.342449, 9.654081],
    ("VP", "score"): [2.924736, 2.692654, 1.05184],
    ("VP", "noise"): [0.08644798, 0.2963219, 1.447752],
}
# Mean, deviation, norm and eight places.
NOISED = {
    ("Linear", "x"): (0.03048698, 0.8363571, 23.1932, [
        0.1711231, 0.6964433, -0.5352218, 0.2487781, -0.940896, -1.367931, -0.9706998, -0.9627792,
    ]),
    ("Linear", "velocity"): (-0.02615232, 1.477866, 40.96223, [
        0.6500102, -0.7563882, -0.4357023, 2.871642, -0.4065052, -2.873678, -2.185278, -1.602279,
    ]),
    ("GVP", "x"): (0.03046913, 0.9759217, 27.05871, [
        0.2231007, 0.7650316, -0.6306687, 0.3518254, -1.330628, -1.444324, -1.01877, -1.034207,
    ]),
    ("GVP", "velocity"): (-0.07039007, 1.605563, 44.5374, [
        1.14703, -0.1653727, -1.317938, 3.189592, -0.4515138, -2.297014, -1.837554, -1.019522,
    ]),
    ("VP", "x"): (0.04096508, 0.9856994, 27.34008, [
        0.1189583, 0.7722374, -0.5073423, -0.6654701, -1.029598, -1.174726, -0.8050872,
        -0.9088247,
    ]),
    ("VP", "velocity"): (0.03447701, 2.026254, 56.16133, [
        0.1154523, 0.0003932486, -0.1406553, 2.871678, -1.311234, -5.180999, -4.073312, -2.504869,
    ]),
}  # fmt: skip
CONVERSIONS = {
    ("Linear", "velocity", "score"): (1.19161, 4.340221, 124.7306, [
        -0.7562233, -0.004611468, 0.9485996, -2.551734, 1.687779, 10.38343, 9.325366, 9.239599,
    ]),
    ("Linear", "velocity", "noise"): (-0.2009724, 0.7632144, 21.87182, [
        0.6806009, 0.004150321, -0.8537396, 1.275867, -0.8438897, -1.038343, -0.9325368,
        -0.9239601,
    ]),
    ("Linear", "score", "velocity"): (-0.4231745, 9.453277, 262.2393, [
        14.35914, 1.195863, -15.89882, 4.186662, -2.888815, -1.915389, -1.353054, -1.272359,
    ]),
    ("GVP", "velocity", "score"): (0.6948321, 1.301445, 40.8851, [
        -0.6799735, -0.004054433, 0.8531281, -1.164186, 0.7618471, -1.100066, 0.04282951,
        0.2340503,
    ]),
    ("GVP", "velocity", "noise"): (-0.1808962, 0.5831199, 16.91963, [
        0.6716019, 0.004004516, -0.8426247, 0.8232034, -0.5387072, 0.1720883, -0.006700013,
        -0.03661354,
    ]),
    ("GVP", "score", "velocity"): (-0.3854254, 9.755457, 270.5621, [
        14.98994, 1.300497, -16.49792, 3.930231, -2.740516, -0.5823685, -0.3668255, -0.3344158,
    ]),
    ("VP", "velocity", "score"): (0.1842126, 0.8191358, 23.2675, [
        -0.6722552, -0.002874821, 0.8456056, -1.52192, 1.024643, 0.9993122, 0.9162976, 0.9113677,
    ]),
    ("VP", "score", "velocity"): (0.06794502, 10.02657, 277.8708, [
        13.61057, 1.180825, -14.97979, 12.57286, -8.766949, -2.446143, -1.54079, -1.404658,
    ]),
}  # fmt: skip
PREDICTIONS = {
    "velocity": D.VelocityPrediction(sign=-1),
    "score": D.ScorePrediction(),
    "noise": D.NoisePrediction(),
}


def sit(name, span=None):
    options = {} if span is None else {"span": span}
    return KINDS[name](clock_scale=1.0, reverse_clock=True, **options)


def stub(x, t):
    return torch.sin(x + t.to(x).reshape(-1, 1, 1, 1, 1))


class Given:
    """Draws whose noise is given."""

    def __init__(self, noise):
        self.noise = noise

    def normal(self, name, like):
        return self.noise


@pytest.fixture
def images(filled):
    """Data and noise, (3, 4, 1, 8, 8)."""
    return [filled(name, (3, 4, 8, 8)).unsqueeze(2) for name in ("x1", "x0n")]


def assert_golden(x, golden):
    mean, std, norm, values = golden
    count = x.numel()
    places = [0, 1, count // 7, count // 3, count // 2, 2 * count // 3, count - 2, count - 1]
    assert x.flatten()[places].tolist() == pytest.approx(values, rel=1e-5, abs=1e-6)
    assert x.mean().item() == pytest.approx(mean, rel=1e-5, abs=1e-6)
    assert x.std(correction=0).item() == pytest.approx(std, rel=1e-5)
    assert x.norm().item() == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_coefficients(name):
    golden, path, t = COEFFICIENTS[name], sit(name), 1 - TIMES
    (alpha, sigma), (d_alpha, d_sigma) = path.coefficients(t), path.rates(t)
    actual = dict(
        alpha=alpha, sigma=sigma, d_alpha=-d_alpha, d_sigma=-d_sigma, d_log=-d_alpha / alpha,
        diffusion=sigma * (d_sigma - sigma * d_alpha / alpha),
    )  # fmt: skip
    for key, value in actual.items():
        assert value.tolist() == pytest.approx(golden[key], rel=1e-6), key
    torch.testing.assert_close(path.clock(t), TIMES)


@pytest.mark.parametrize("name", KINDS)
def test_noised_data_and_their_velocity(name, images):
    x1, x0 = images
    path = sit(name)
    level = path.at(1 - BATCH, x1)
    assert_golden(level.alpha * x1 + level.sigma * x0, NOISED[name, "x"])
    velocity = PREDICTIONS["velocity"].target(path, x1, x0, level)
    assert_golden(velocity, NOISED[name, "velocity"])


@pytest.mark.parametrize(("name", "given", "wanted"), CONVERSIONS)
def test_conversions(name, given, wanted, images):
    """All by way of data and noise."""
    x, path = images[0], sit(name)
    level = path.at(1 - BATCH, x)
    estimate = PREDICTIONS[given].estimate(path, x, stub(x, BATCH), level)
    if wanted == "velocity":
        actual = PREDICTIONS["velocity"].target(path, *estimate[:2], level)
    else:
        actual = estimate.noise if wanted == "noise" else -estimate.noise / level.sigma
    assert_golden(actual, CONVERSIONS[name, given, wanted])


@pytest.mark.parametrize(("name", "prediction"), LOSSES)
def test_losses(name, prediction, images):
    x1, x0 = images
    span = None if name == "VP" or prediction == "velocity" else (0.001, 0.999)
    process = D.Diffusion(
        sit(name, span), PREDICTIONS[prediction], At(1 - BATCH), D.Euler(),
        D.SpacedGrid(2), D.ClassifierFree(1.0), D.MSE(),
    )  # fmt: skip
    loss = process.loss(stub, x1, {}, Given(x0))
    assert loss.tolist() == pytest.approx(LOSSES[name, prediction], rel=1e-5)


@pytest.mark.parametrize("prediction", ["score", "noise"])
def test_where_to_train(prediction):
    """SiT's intervals: all of the way, but not where data or noise cannot be recovered."""
    for name in "Linear", "GVP":
        assert (sit(name).t_clean, sit(name).t_noise) == (0, 1)
        with pytest.raises(ValueError, match=r"alpha = 0.*span=\(0, 0.999\)"):
            PREDICTIONS[prediction].check(sit(name))
        PREDICTIONS[prediction].check(sit(name, (0.001, 0.999)))
        PREDICTIONS["velocity"].check(sit(name))
    assert (sit("VP").t_clean, sit("VP").t_noise) == (1e-5, 1)
    for any_prediction in PREDICTIONS.values():
        any_prediction.check(sit("VP"))
    rates = sit("VP").rates(torch.tensor([1e-5, 1.0], dtype=torch.float64))
    assert all(math.isfinite(value) for rate in rates for value in rate.tolist())
