"""The page of a run, from a directory made by hand."""

import json
import re
import shutil
import subprocess
import time

import numpy as np
import pytest

from mmsora.utils.user_error import UserError
from mmsora.utils.video_io import write_video
from mmsora.visualization.run_report import MOST_SAMPLES, SAMPLE_BYTES, write_run_report

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
CONFIG = "model = dict(note='</script><b>')\n"
RUN = {
    "command": "train.py latte --seed 1",
    "started": "2026-01-01 00:00:00",
    "environment": {"torch": "torch 2.6 <cpu>"},
    "max_iters": 2000,
    "status": "training",
    "iteration": 1200,
    "eta": 3723.4,
    "updated": "2026-01-01 01:00:00",
}
BUCKETS = {f"loss/t_{i / 10:.1f}-{(i + 1) / 10:.1f}": 1.0 - i / 20 for i in range(10)}
VALIDATION = {"val/loss": 0.25, "val/loss_ema": 0.2, "val/loss_ema/t_0.45": 0.1}


@pytest.fixture
def work_dir(tmp_path):
    """A run of 1200 iterations with samples of four frames at every 400."""
    folder = tmp_path / "my_run"
    data = folder / "20260101_000000/vis_data"
    data.mkdir(parents=True)
    (data / "config.py").write_text(CONFIG)
    (data / "run.json").write_text(json.dumps(RUN))
    lines = [
        {"lr": 1e-4, "base_lr": 1e-4, "loss": 1 / s, "loss_diffusion": 1 / s, "grad_norm": 2 + s}
        | {"samples/s": 50.0, "tokens/s": 6400.0, "TFLOP/s": 210.5, "mfu": 0.4567, "time": 0.1}
        | {"data_wait": 0.3, "memory": 1000.0, "iter": 10 * s, "step": 10 * s}
        for s in range(1, 121)
    ]
    lines.append(BUCKETS | {"iter": 1200, "step": 1200})
    lines.append(VALIDATION | {"</script>": 20.0, "time": 1.0, "data_time": 1.0, "step": 1200})
    (data / "scalars.json").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    frames = np.random.default_rng(0).integers(0, 256, (16, 64, 96, 3), dtype=np.uint8)
    for step in (400, 800, 1200):
        write_video(folder / f"samples/iter_{step:06d}.mp4", frames, fps=8)
    (folder / "samples/iter_best.mp4").write_bytes(b"no step")
    return folder


def page_of(work_dir):
    page = write_run_report(work_dir).read_text()
    return page, json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])


def test_the_page_has_everything_and_loads_nothing(work_dir):
    page, data = page_of(work_dir)
    assert not re.search(
        r'(src|href)="(?!data:)|@import|url\(|https?://(?!www\.w3\.org/2000)', page
    )
    assert page.count("<script") == 2  # the config's is text
    assert "note=&#x27;&lt;/script&gt;&lt;b&gt;" in page
    for text in ("my_run", ">training<", "iteration 1,200 of 2,000", "1:02:03 left"):
        assert text in page
    for text in ("train.py latte --seed 1", "torch 2.6 &lt;cpu&gt;", "<b>45.7%</b>MFU"):
        assert text in page
    assert "30% of the time goes by waiting for data" in page
    assert [chart["title"] for chart in data["charts"]] == [
        "Loss",
        "</script>",
        "Loss by time, from data (0) to noise (1)",
        "Validation loss",
        "Validation loss of the average by time",
        "Gradient norm",
        "Learning rate",
        "Samples a second",
        "TFLOP/s of a process",
        "Model FLOP utilisation",
        "Time spent waiting for data",
        "Seconds an iteration",
        "Memory, MiB",
    ]
    lines = {chart["title"]: chart["lines"] for chart in data["charts"]}
    assert list(lines["Loss"]) == ["loss"]  # its only part is all of it
    assert lines["Loss"]["loss"][0][-1] == 1200
    assert lines["Loss"]["loss"][1][1] == 0.5
    assert list(lines["Loss by time, from data (0) to noise (1)"]) == sorted(BUCKETS)
    assert [sample["step"] for sample in data["samples"]] == [400, 800, 1200]


def test_parts_of_a_loss_are_shown_when_there_are_several(work_dir):
    path = next(work_dir.glob("*/vis_data/scalars.json"))
    path.write_text('{"loss": 3, "loss_a": 1, "loss_b": 2, "iter": 1, "step": 1}\n')
    assert list(page_of(work_dir)[1]["charts"][0]["lines"]) == ["loss", "loss_a", "loss_b"]


def test_troubles_stand_on_the_page(work_dir):
    path = next(work_dir.glob("*/vis_data"))
    with (path / "scalars.json").open("a") as file:
        file.write('{"loss": NaN, "skipped": 3, "iter": 1201, "step": 1201}\n')
    (path / "run.json").write_text(json.dumps(RUN | {"status": "interrupted"}))
    page, _ = page_of(work_dir)
    assert "3 updates were skipped" in page
    assert "values of loss that were not finite: 1" in page
    assert "the run was interrupted and saved" in page
    assert " left" not in page.split("<header>")[1].split("</header>")[0]


def test_two_million_iterations_make_a_small_page_in_little_time(work_dir):
    data = next(work_dir.glob("*/vis_data"))
    with (data / "scalars.json").open("w") as file:
        for step in range(10, 2_000_001, 50):
            file.write(f'{{"loss": {1 / step}, "lr": 0.1, "iter": {step}, "step": {step}}}\n')
    for step in range(0, 2_000_000, 10_000):
        shutil.copy(
            work_dir / "samples/iter_000400.mp4", work_dir / f"samples/iter_{step:06d}.mp4"
        )
    start = time.perf_counter()
    page, content = page_of(work_dir)
    assert time.perf_counter() - start < 10
    assert len(page) < SAMPLE_BYTES * 4 / 3 + 500_000
    steps = [sample["step"] for sample in content["samples"]]
    assert 2 <= len(steps) <= MOST_SAMPLES
    assert (steps[0], steps[-1]) == (0, 1_990_000)
    assert content["charts"][0]["lines"]["loss"][0][-1] > 1_999_900


def test_samples_too_large_leave_the_last_one(work_dir):
    for path in (work_dir / "samples").glob("iter_0*.mp4"):
        path.write_bytes(bytes(SAMPLE_BYTES - 1))
    assert [sample["step"] for sample in page_of(work_dir)[1]["samples"]] == [1200]


def test_a_run_without_samples_and_one_that_has_just_begun(work_dir):
    shutil.rmtree(work_dir / "samples")
    assert "<video" not in page_of(work_dir)[0]
    next(work_dir.glob("*/vis_data/scalars.json")).unlink()
    assert page_of(work_dir)[1] == {"charts": [], "samples": []}


def test_a_directory_without_a_run(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        write_run_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_all_starts_of_a_run_are_told(work_dir):
    second = work_dir / "20260102_000000/vis_data"
    second.mkdir(parents=True)
    (second / "run.json").write_text(json.dumps(RUN | {"command": "train.py latte --resume"}))
    page, _ = page_of(work_dir)
    assert page.index("--seed 1") < page.index("--resume")


PROBE = """<script>
setTimeout(() => {
  const clip = document.getElementById("clip"), seen = new Set();
  const timer = setInterval(() => seen.add(clip.currentTime), 50);
  const area = document.querySelector(".chart svg").getBoundingClientRect();
  document.querySelector(".chart svg").dispatchEvent(new PointerEvent(
    "pointermove", { clientX: area.right - 10, clientY: area.top + 50 }));
  setTimeout(() => {
    clearInterval(timer);
    const paths = [...document.querySelectorAll(".chart path")].map((p) => p.getTotalLength());
    document.title = JSON.stringify({ moved: seen.size > 3, paths, width: clip.videoWidth,
      legend: document.querySelector(".legend").textContent });
  }, 1500);
}, 500);
</script></body>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_draws_the_curves_and_plays_the_samples(work_dir, tmp_path):
    page, data = page_of(work_dir)
    probe = tmp_path / "probe.html"
    probe.write_text(page.replace("</body>", PROBE))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'user'}"]
    network = ["--disable-background-networking", "--disable-component-update", "--no-first-run"]
    command = [CHROMIUM, *flags, *network, "--virtual-time-budget=4000", "--dump-dom", probe]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    told = json.loads(re.search(r"<title>(\{.*?\})</title>", result.stdout)[1])
    lines = [line for chart in data["charts"] for line in chart["lines"].values()]
    drawn = [length for length in told["paths"] if length > 300]
    assert len(drawn) >= sum(len(line[0]) > 1 for line in lines) == 9
    assert told["moved"]
    assert told["width"] == 96
    assert told["legend"].startswith("iteration 1,200")
