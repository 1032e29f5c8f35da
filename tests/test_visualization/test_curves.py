"""Curves of a run: thinned without lying, resumed without a step back."""

import json
import math

import pytest

from mmsora.visualization.curves import MOST_POINTS, Curve, RunCurves


def write(work_dir, name, lines):
    path = work_dir / name / "vis_data/scalars.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(f"{json.dumps(line)}\n" for line in lines)
    return path


def line(step, **values):
    return {"iter": step, "step": step, **values}


def test_a_long_curve_keeps_its_mean_and_its_ends():
    curve, count = Curve(), 200_000
    for step in range(1, count + 1):
        curve.add(step, 100.0 if step == 77_777 else step / count)
    assert MOST_POINTS / 2 <= len(curve.points) <= MOST_POINTS
    assert sum(point[4] for point in curve.points) == count
    total = sum(point[1] * point[4] for point in curve.points)
    assert total == pytest.approx((count + 1) / 2 + 100 - 77_777 / count)
    assert max(point[3] for point in curve.points) == 100.0  # a spike stays to be seen
    assert curve.points[0][2] == 1 / count
    assert curve.points[-1][0] == count
    assert curve.last == 1.0
    steps = [point[0] for point in curve.points]
    assert steps == sorted(set(steps))


def test_what_is_not_finite_is_counted_and_not_drawn():
    curve = Curve()
    for step, value in enumerate((1.0, math.nan, math.inf, 2.0)):
        curve.add(step, value)
    assert [point[:2] for point in curve.points] == [(0, 1.0), (3, 2.0)]
    assert curve.broken == 2


def test_only_what_is_new_is_read_and_half_a_line_waits(tmp_path):
    path = write(tmp_path, "20260101_000000", [line(1, loss=3.0)])
    curves = RunCurves(tmp_path)
    curves.update()
    with path.open("a") as file:
        file.write('{"iter": 2, "step": 2, "loss": 2')
    curves.update()
    assert [point[:2] for point in curves.curves["loss"].points] == [(1, 3.0)]
    with path.open("a") as file:
        file.write('.5}\nnot json\n{"time": 1}\n')
    write(tmp_path, "20260101_000000", [line(3, loss=2.0)])
    curves.update()
    curves.update()
    points = [(1, 3.0), (2, 2.5), (3, 2.0)]
    assert [point[:2] for point in curves.curves["loss"].points] == points
    assert curves.step == 3


@pytest.mark.parametrize("at_once", [True, False])
def test_a_resumed_run_goes_on_where_it_began(tmp_path, at_once):
    write(tmp_path, "20260101_000000", [line(s, loss=float(s)) for s in (10, 20, 30, 40)])
    curves = RunCurves(tmp_path)
    if not at_once:
        curves.update()
    write(tmp_path, "20260102_000000", [line(s, loss=-float(s)) for s in (30, 40, 50)])
    curves.update()
    points = [(10, 10.0), (20, 20.0), (30, -30.0), (40, -40.0), (50, -50.0)]
    assert [point[:2] for point in curves.curves["loss"].points] == points


def test_validation_has_no_clock_of_training(tmp_path):
    val = {"step": 5, "val_loss": 0.5, "time": 9.0, "data_time": 9.0}
    write(tmp_path, "a", [line(5, loss=1.0, time=0.1, base_lr=1.0, note="x"), val])
    curves = RunCurves(tmp_path)
    curves.update()
    assert {name: curve.last for name, curve in curves.curves.items()} == {
        "loss": 1.0,
        "time": 0.1,
        "val_loss": 0.5,
    }
