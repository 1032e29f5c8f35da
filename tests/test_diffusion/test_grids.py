"""Where the grids stop."""

import math

import diffusers
import numpy as np
import pytest
import torch

from mmsora import diffusion as D

# Numpy's, of diffusers' code.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

TABLE, LINEAR = D.DiscretePath(), D.LinearPath()
PATHS = {
    "table": TABLE,
    "zero terminal SNR": D.DiscretePath(zero_terminal_snr=True),
    "linear": LINEAR,
    "linear, cut": D.LinearPath(span=(0.001, 0.999)),
    "trigonometric": D.TrigPath(),
    "VP": D.VPPath(),
    "VE": D.VEPath(),
    "cosine": D.CosinePath(),
    "shifted": D.ShiftedPath(D.LinearPath(), shift=3.0),
}
GRIDS = {
    "spaced": D.SpacedGrid(7),
    "trailing": D.TrailingGrid(7),
    "karras": D.KarrasGrid(7),
    "log-SNR": D.LogSNRGrid(7),
}
FLOW_GRIDS = {"shifted": D.ShiftedGrid(7, 3.0), "linear-quadratic": D.LinearQuadraticGrid(7)}


def ratio(path, times):
    alpha, sigma = path.coefficients(times)
    return sigma / alpha


@pytest.mark.parametrize("grid_name", [*GRIDS, *FLOW_GRIDS])
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_every_grid_falls_from_noise_to_clean_data(path, grid_name):
    grid = {**GRIDS, **FLOW_GRIDS}[grid_name]
    if path.num_levels is not None and grid_name in FLOW_GRIDS:
        with pytest.raises(ValueError, match="is a table"):
            grid(path)
        return
    times = grid(path)
    assert (times.dtype, times.device.type) == (torch.float64, "cpu")
    assert len(times) == grid.num_steps + 1 == 8
    assert times[0] == path.t_noise
    assert times[-1] == path.t_clean
    assert (times.diff() < -1e-6 * path.t_noise).all()


# Even steps


def iddpm(levels, counts):
    """The levels that iDDPM's ``space_timesteps`` keeps of each section."""
    size, extra = divmod(levels, len(counts))
    kept, start = [], 0
    for i, count in enumerate(counts):
        width = size + (i < extra)
        stride = 1 if count <= 1 else (width - 1) / (count - 1)
        position = 0.0
        for _ in range(count):
            kept.append(start + round(position))
            position += stride
        start += width
    return kept


@pytest.mark.parametrize("levels", [70, 100, 1000])
@pytest.mark.parametrize("counts", [[10, 15, 20], [1, 2, 3], [5, 4, 1, 2, 9, 3, 3], [25], (4, 1)])
def test_sections_are_those_of_iddpm(levels, counts):
    grid = D.SpacedGrid(counts)
    times = grid(D.DiscretePath(num_levels=levels))
    assert times.tolist() == [*reversed(iddpm(levels, counts)), -1]
    assert grid.num_steps == sum(counts)


def test_sections_as_written_out():
    """Three sections of 334, 333 and 333 levels."""
    assert D.SpacedGrid([2, 3, 1])(TABLE).tolist() == [667, 666, 500, 334, 333, 0, -1]


@pytest.mark.parametrize("path", [PATHS["trigonometric"], PATHS["linear, cut"]])
def test_even_steps_are_the_path_s(path):
    times = D.SpacedGrid(4)(path)
    assert times.tolist() == pytest.approx(
        [path.t_noise + i / 4 * (path.t_clean - path.t_noise) for i in range(5)]
    )


def test_even_steps_of_a_shifted_path_are_shifted():
    even = [1, 0.75, 0.5, 0.25, 0]
    assert D.SpacedGrid(4)(PATHS["shifted"]).tolist() == pytest.approx(
        [3 * t / (1 + 2 * t) for t in even]
    )


def test_the_intervals_of_sit():
    """Times count from data here and from noise there: ``linspace(t0, t1, points)``."""
    ode = 1 - np.linspace(0.001, 0.999, 50)  # score and noise prediction
    assert D.SpacedGrid(49, span=(0.999, 0.001))(LINEAR).tolist() == pytest.approx(ode.tolist())
    sde = 1 - np.linspace(0, 0.96, 50)
    grid = D.SpacedGrid(50, last_step=0.04)
    assert grid(LINEAR).tolist() == pytest.approx([*sde, 0])
    score = 1 - np.linspace(0.001, 0.96, 50)
    grid = D.SpacedGrid(50, span=(0.999, 0), last_step=0.04)
    assert grid(LINEAR).tolist() == pytest.approx([*score, 0])


def test_an_interval_may_run_backwards():
    grid = D.SpacedGrid(3, span=(0.1, 0.9), last_step=0.2)
    assert grid(LINEAR).tolist() == pytest.approx([0.1, 0.4, 0.7, 0.9])


@pytest.mark.parametrize("steps", [1, 3, 7, 18, 25, 50, 250, 999, 1000])
def test_trailing_is_that_of_diffusers(steps):
    scheduler = diffusers.DDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    assert D.TrailingGrid(steps)(TABLE).tolist() == [*scheduler.timesteps.tolist(), -1]


# By the ratio of noise to data


@pytest.mark.parametrize("steps", [1, 2, 18])
def test_karras_is_that_of_diffusers_on_the_path_of_edm(steps):
    scheduler = diffusers.EDMEulerScheduler()
    scheduler.set_timesteps(steps)
    times = D.KarrasGrid(steps)(D.VEPath())
    assert times.tolist() == pytest.approx(scheduler.sigmas.tolist(), rel=1e-6)


def test_karras_has_its_arguments():
    scheduler = diffusers.EDMEulerScheduler(sigma_min=0.1, sigma_max=50, rho=3)
    scheduler.set_timesteps(9)
    times = D.KarrasGrid(9, ratio_min=0.1, ratio_max=50, rho=3)(D.VEPath())
    assert times.tolist() == pytest.approx(scheduler.sigmas.tolist(), rel=1e-6)


@pytest.mark.parametrize(
    ("grid", "option"), [(D.KarrasGrid, "use_karras_sigmas"), (D.LogSNRGrid, "use_lu_lambdas")]
)
def test_grids_of_a_table_are_those_of_diffusers(grid, option):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_start=1e-4, beta_end=0.02, **{option: True}
    )
    scheduler.set_timesteps(12)
    times = grid(12)(TABLE)
    assert ratio(TABLE, times).tolist() == pytest.approx(scheduler.sigmas.tolist(), rel=1e-4)
    assert times[:-1].round().tolist() == scheduler.timesteps.tolist()


@pytest.mark.parametrize("name", ["linear", "trigonometric", "VP", "shifted", "cosine", "VE"])
def test_ratios_are_met_on_any_path(name):
    path = PATHS[name]
    root = np.linspace(20 ** (1 / 7), 0.05 ** (1 / 7), 6) ** 7
    times = D.KarrasGrid(6, ratio_min=0.05, ratio_max=20)(path)
    assert ratio(path, times[:-1]).tolist() == pytest.approx(root.tolist(), rel=1e-6)
    times = D.LogSNRGrid(6, ratio_min=0.05, ratio_max=20)(path)
    logs = np.linspace(math.log(20), math.log(0.05), 6)
    assert ratio(path, times[:-1]).log().tolist() == pytest.approx(logs.tolist(), abs=1e-6)


@pytest.mark.parametrize("grid", [D.KarrasGrid, D.LogSNRGrid])
def test_where_a_ratio_is_infinite_the_grid_starts_there(grid):
    """And goes on as if it had come from 80."""
    within, whole = grid(6, ratio_min=0.002, ratio_max=80.0)(LINEAR), grid(6)(LINEAR)
    assert whole[0] == 1
    assert within[0] == pytest.approx(80 / 81)
    assert whole[1:].tolist() == within[1:].tolist()


@pytest.mark.parametrize("grid", [D.KarrasGrid, D.LogSNRGrid])
def test_a_path_that_ends_at_some_noise_ends_the_grid(grid):
    path = PATHS["linear, cut"]
    whole = ratio(path, grid(6)(path))
    within = ratio(path, grid(7, ratio_min=0.001 / 0.999, ratio_max=999.0)(LINEAR))
    assert whole.tolist() == pytest.approx(within[:-1].tolist(), rel=1e-6)


# Flows


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_shifted_is_that_of_diffusers(shift):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 16, 16))
    assert D.ShiftedGrid(16, shift)(LINEAR).tolist() == pytest.approx(scheduler.sigmas.tolist())


def published_linear_quadratic(steps, threshold, linear):
    """The coefficients of the published code, of Mochi and LTX-Video."""
    quadratic, difference = steps - linear, linear - threshold * steps
    square = difference / (linear * quadratic**2)
    slope = threshold / linear - 2 * difference / quadratic**2
    first = [threshold / linear * i for i in range(linear)]
    rest = [square * i**2 + slope * i + square * linear**2 for i in range(linear, steps)]
    return [1 - progress for progress in [*first, *rest, 1]]


@pytest.mark.parametrize(("steps", "linear"), [(50, None), (50, 10), (9, None)])
def test_linear_quadratic_is_the_published_one(steps, linear):
    expected = published_linear_quadratic(steps, 0.025, linear or steps // 2)
    times = D.LinearQuadraticGrid(steps, 0.025, linear)(LINEAR)
    assert times.tolist() == pytest.approx(expected, abs=1e-12)


def test_linear_quadratic_starts_like_a_finer_grid():
    """Movie Gen: 25 steps of 1000, then ever longer ones."""
    times = D.LinearQuadraticGrid(50)(LINEAR)
    assert times[:26].tolist() == pytest.approx([1 - i / 1000 for i in range(26)])
    lengths = -times.diff()[25:]
    assert (lengths.diff() > 0).all()
    assert lengths.diff().tolist() == pytest.approx([lengths.diff()[0].item()] * 24)


@pytest.mark.parametrize("grid", [D.ShiftedGrid(7, 1.0), D.SpacedGrid(7), D.TrailingGrid(7)])
@pytest.mark.parametrize("name", ["linear, cut", "VP", "VE", "cosine"])
def test_fractions_are_the_path_s(grid, name):
    path = PATHS[name]
    inner = path.time_at(torch.linspace(1, 0, 8, dtype=torch.float64))[1:-1]
    assert grid(path)[1:-1].tolist() == pytest.approx(inner.tolist())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: D.SpacedGrid(0), "num_steps must be at least 1, got 0"),
        (lambda: D.SpacedGrid([]), "num_steps must be at least 1"),
        (lambda: D.SpacedGrid([3, 0]), "num_steps must be at least 1"),
        (lambda: D.SpacedGrid(3, "even"), "spacing must be .*'even'"),
        (lambda: D.SpacedGrid([3, 4], "leading"), "linspace"),
        (lambda: D.SpacedGrid([3, 4])(LINEAR), "LinearPath is none; give their sum, 7"),
        (lambda: D.SpacedGrid([40, 4])(D.DiscretePath(num_levels=60)), "40 steps .* 30 levels"),
        (lambda: D.SpacedGrid(4, span=(1, 0))(TABLE), "span and last_step .* DiscretePath"),
        (lambda: D.SpacedGrid(4, last_step=0.1)(TABLE), "span and last_step"),
        (lambda: D.SpacedGrid(4, last_step=0.0), "last_step must be positive"),
        (lambda: D.SpacedGrid(1, last_step=0.1), "two steps or more"),
        (lambda: D.TrailingGrid(0), "num_steps must be at least 1"),
        (lambda: D.TrailingGrid(1001)(TABLE), "1001 steps do not fit 1000 levels"),
        (lambda: D.KarrasGrid(0), "num_steps must be at least 1"),
        (lambda: D.KarrasGrid(9, rho=0), "rho must be positive, got 0"),
        (lambda: D.KarrasGrid(9, ratio_min=2, ratio_max=1), "ratio_min .* 2 and 1"),
        (lambda: D.LogSNRGrid(9, ratio_min=0), "ratio_min must be positive"),
        (lambda: D.LogSNRGrid(9, ratio_max=200)(D.VEPath()), "VEPath, 0 to 80; got 0.002 and 200"),
        (
            lambda: D.KarrasGrid(9, 1e-4)(PATHS["linear, cut"]),
            "0.001.* to 999; got 0.0001 and 999",
        ),
        (lambda: D.ShiftedGrid(9, 0), "shift must be positive, got 0"),
        (lambda: D.ShiftedGrid(9)(TABLE), "ShiftedGrid .* DiscretePath is a table"),
        (lambda: D.LinearQuadraticGrid(9)(TABLE), "LinearQuadraticGrid .* is a table"),
        (lambda: D.LinearQuadraticGrid(1), "num_steps must be at least 2"),
        (lambda: D.LinearQuadraticGrid(9, linear_steps=9), "linear_steps must be in 1 to 8"),
        (lambda: D.LinearQuadraticGrid(10, threshold=0.6), "threshold must be in 0 to 0.5"),
    ],
)
def test_impossible_grids_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("grid", [D.KarrasGrid, D.LogSNRGrid])
def test_no_two_stops_share_a_level(grid):
    """The path goes from a ratio of 0.02 to clean data at once."""
    path = D.CosinePath(shift=2.0)
    with pytest.raises(ValueError, match="ratio_min=0.01 is below the least noise of CosinePath"):
        grid(60, ratio_min=0.01)(path)
    assert len(grid(60)(path)) == 61


@pytest.mark.parametrize("grid", [D.KarrasGrid, D.LogSNRGrid])
@pytest.mark.parametrize("table", ["jsd", "scaled_linear", "squaredcos_cap_v2"])
def test_short_tables_that_end_in_pure_noise(grid, table):
    """Spaced from their last level that is not."""
    path = D.DiscretePath(table, 50, zero_terminal_snr=table != "jsd")
    times = grid(6)(path)
    assert (times.diff() < 0).all()
    assert (times[0], times[-1]) == (49, -1)


@pytest.mark.parametrize("wrong", [10.0, "ten"])
def test_a_number_of_steps_is_whole(wrong):
    with pytest.raises(ValueError, match=f"num_steps must be a whole number, got {wrong!r}"):
        D.SpacedGrid(wrong)
