"""The commands of the README and the docs run as they are written, cut short."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs/en").rglob("*.md"))]

# Not run here, and why.
ELSEWHERE = {
    "source .venv/bin/activate": "the tests run in that environment",
    "pip install -c requirements/constraints.txt -e .": "tools/setup_env.sh installs so",
    "bash tools/quickstart.sh --setup-only": "the quickstart below does the same first",
    "PYTHONPATH=. mmsora train tiny_conv_moving_digits.py": "test_add_a_denoiser.py runs it",
    "PYTHONPATH=. mmsora infer --checkpoint work_dirs/tiny_conv_moving_digits/iter_4000 "
    "--labels 3 7": "test_add_a_denoiser.py runs it",
    "python tools/infer.py configs/latte_ucf.py --checkpoint ucf101.pt --labels 3": "needs the "
    "public weights; test_load_denoiser.py samples a small file of their format",
    "python tools/infer.py --checkpoint digits.safetensors --labels 3 7": "test_checkpoint.py "
    "samples from such a file",
    "python tools/checkpoint.py import DiT-XL-2-256x256.pt work_dirs/dit_xl2 --config "
    "dit_xl2_imagenet_256": "needs the public weights; test_checkpoint.py imports a small file of "
    "their format",
    "python tools/benchmark.py methods --budget 2000 --clips 50 --final-clips 200": "an hour; "
    "test_benchmark_methods.py runs it small",
    "python tools/benchmark.py samplers --plot samplers.png --out samplers.json": "a minute; "
    "test_benchmark_samplers.py runs it small",
    "python tools/benchmark.py cascade --plot docs/assets/cascade_digits.png": "a quarter of an "
    "hour; test_benchmark_cascade.py runs it small",
    "python tools/report.py work_dirs/latte_moving_digits": "test_report.py runs it",
    "bash tools/run_tests.sh": "it runs this test",
    "bash tools/run_tests.sh --slow": "it runs the slow tests",
}


def commands(page):
    """The lines of a page's bash blocks; a backslash joins two."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [" ".join(shlex.split(line, comments=True)) for line in lines if line.strip()]


ALL = list(dict.fromkeys(command for page in PAGES for command in commands(page) if command))
SMALL = [
    "train_cfg.max_iters=2",
    "model.denoiser.width=16",
    "model.denoiser.depth=2",
    "custom_hooks.1.labels=[3]",
    "model.diffusion.grid.num_steps=2",
]


def cut(words, work_dir, checkpoint):
    """The same command with few iterations, writing to a directory of the test's."""
    name = words[1] if words[0] in ("python", "bash") else " ".join(words[:2])
    if name in ("tools/train.py", "tools/dist_train.sh", "mmsora train"):
        if "--cfg-options" not in words:
            words = [*words, "--cfg-options"]
        at = words.index("--cfg-options") + 1
        return [*words[:at], *SMALL, *words[at:], "--work-dir", str(work_dir / "run")]
    if name in ("tools/infer.py", "mmsora infer"):
        words = [str(checkpoint) if "/iter_" in word else word for word in words]
        return [*words, "--steps", "2", "--out", str(work_dir / "samples")]
    if name == "tools/checkpoint.py":
        words = [str(checkpoint) if "/iter_" in word else word for word in words]
        if words[2] == "export":
            words[4] = str(work_dir / words[4])
        return words
    if name == "tools/quickstart.sh":
        few = ["--max-iters", "2", "--num-clips", "10", "--cfg-options", *SMALL[1:]]
        return [*words, "--work-dir", str(work_dir / "quick"), *few]
    if name == "mmsora dataset":
        return [*words, "--out", str(work_dir / "sheets")]
    if name == "mmsora copy-cfg":
        return [*words[:3], str(work_dir / words[3]), *words[4:]]
    return words


def test_what_is_not_run_is_still_written_somewhere():
    everywhere = set(ALL) | set(commands(ROOT / "CONTRIBUTING.md"))
    assert set(ELSEWHERE) - everywhere == {"bash tools/run_tests.sh --slow"}


@pytest.mark.parametrize("command", [c for c in ALL if c not in ELSEWHERE])
def test_command(command, tmp_path, tiny_run):
    words = cut(command.split(), tmp_path, tiny_run / "iter_6")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        words, cwd=ROOT, env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_both_languages_give_the_same_blocks(page):
    if page.parent == ROOT:
        twin = ROOT / "README_zh-CN.md"
    else:
        twin = ROOT / "docs/zh_cn" / page.relative_to(ROOT / "docs/en")
    block = re.compile(r"```(\w+)\n(.*?)```", flags=re.DOTALL)
    assert block.findall(twin.read_text()) == block.findall(page.read_text())
