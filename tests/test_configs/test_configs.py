"""Every config can be read in one sitting, and builds."""

import ast
import difflib
import itertools
import re
from pathlib import Path

import pytest
import torch
from mmengine.registry import init_default_scope

from mmsora.registry import DATASETS, MODELS
from mmsora.utils.config_check import check_config, config_dict, config_from_dict
from mmsora.utils.config_names import config_names, load_config
from mmsora.utils.user_error import UserError

ROOT = Path(__file__).parents[2] / "configs"
BASES = sorted((ROOT / "_base_").rglob("*.py"))
CONFIGS = sorted(set(ROOT.rglob("*.py")) - set(BASES))
MAX_LINES = 90


def name(path):
    return str(path.relative_to(ROOT))


each_file = pytest.mark.parametrize("path", BASES + CONFIGS, ids=name)
each_config = pytest.mark.parametrize("path", CONFIGS, ids=name)


def bases_of(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    blocks = [node for node in tree.body if isinstance(node, ast.With)]
    return [line.module for block in blocks for line in block.body]


def test_there_are_configs_and_their_names_are_unique():
    assert len(BASES) >= 2
    assert len(config_names()) == len(CONFIGS) >= 1


@each_file
def test_a_file_is_at_most_a_page_and_says_what_it_is(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= MAX_LINES
    assert ast.get_docstring(ast.parse(text)), "say what it reproduces, and how"


@each_file
def test_one_dialect_and_no_place_of_one_machine(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"^_base_\b", text, re.MULTILINE)
    code = text.replace(ast.get_docstring(ast.parse(text), clean=False), "")
    assert "_delete_" not in code, "the base was the wrong base"
    assert not re.search(r"""["'](/|~|[A-Za-z]:\\\\)""", text), "an absolute path"


@pytest.mark.parametrize("path", BASES, ids=name)
def test_bases_have_no_bases(path):
    assert not bases_of(path)


@each_config
def test_a_config_is_at_most_four_files_and_says_how_to_run_it(path):
    assert len(bases_of(path)) <= 3
    assert all("_base_." in module for module in bases_of(path))
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert f"configs/{name(path)}" in text
    for word in ("Recipe:", "Hardware:", "Expected:"):
        assert word in text


def test_no_two_experiments_are_nearly_the_same():
    """A variant of a few lines is a command with --cfg-options, not a file."""
    texts = {path: path.read_text(encoding="utf-8").splitlines() for path in CONFIGS}
    for one, other in itertools.combinations(CONFIGS, 2):
        ratio = difflib.SequenceMatcher(None, texts[one], texts[other], autojunk=False).ratio()
        assert ratio < 0.9, f"{name(one)} and {name(other)}"


@each_config
def test_everything_that_is_said_is_taken(path):
    cfg = load_config(path)
    check_config(cfg)
    check_config(config_from_dict(config_dict(cfg)))


@each_config
def test_the_model_builds_without_memory_network_or_gpu(path):
    cfg = load_config(path)
    init_default_scope("mmsora")
    with torch.device("meta"):
        model = MODELS.build(cfg.model)
    assert sum(p.numel() for p in model.denoiser.parameters()) > 0
    assert all(p.is_meta for p in model.denoiser.parameters())


@each_config
def test_model_and_data_fit_each_other(path):
    """By shapes alone."""
    cfg = load_config(path)
    init_default_scope("mmsora")
    try:
        sample = DATASETS.build(cfg.train_dataloader.dataset)[0]
    except (FileNotFoundError, UserError):
        pytest.skip("needs its data")
    with torch.device("meta"):
        model = MODELS.build(cfg.model)
        latent = sample["inputs"][None].float().to("meta")
        latent = latent[:, 0] if latent.ndim == 6 else model.vae.encode(latent)  # from a cache
    assert latent.shape[1:] == (model.denoiser.in_channels, *model.denoiser.size)


@each_config
def test_the_schedule_ends_with_the_training(path):
    cfg = load_config(path)
    ends = [part.end for part in cfg.get("param_scheduler") or () if "end" in part]
    assert max(ends, default=cfg.train_cfg.max_iters) == cfg.train_cfg.max_iters
