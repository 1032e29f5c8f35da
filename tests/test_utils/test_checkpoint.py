"""Checkpoint files and what is said of those that are none."""

import os

import numpy as np
import pytest
import torch
from torch import nn

from mmsora.utils.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    load_weights,
    plain,
    save_checkpoint,
)
from mmsora.utils.checkpoint_folder import save_folder
from mmsora.utils.user_error import UserError


def test_plain_keeps_what_loads_without_code():
    weight = nn.Parameter(torch.ones(2))
    kept = {"a": [1, 2.5, "x", None, True], "b": (weight, b"y"), "c": {1: {}}}
    given = {**kept, "numpy": np.float64(1), "code": print, "list": [1, print, np.int64(3)]}
    result = plain(given)
    assert result.pop("list") == [1]
    assert result["a"] == kept["a"]
    assert result["c"] == kept["c"]
    assert isinstance(result["b"], tuple)
    assert not result["b"][0].requires_grad
    assert set(result) == set(kept)


def test_what_was_saved_is_read_and_no_code_is_run(tmp_path):
    path = tmp_path / "new" / "iter_1.pth"
    save_checkpoint({"state_dict": {"weight": torch.arange(3)}, "meta": {"iter": 1}}, path)
    content = load_checkpoint(path)
    assert content["meta"] == {"iter": 1}
    assert content["state_dict"]["weight"].tolist() == [0, 1, 2]
    assert [file.name for file in path.parent.iterdir()] == ["iter_1.pth"]

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"evil.pth cannot be read"):
        load_checkpoint(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "iter_1.pth"
    save_checkpoint({"meta": 1}, path)
    with pytest.raises((AttributeError, TypeError)):
        save_checkpoint({"meta": (item for item in ())}, path)
    assert load_checkpoint(path) == {"meta": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["iter_1.pth"]


def test_a_missing_checkpoint_is_told_with_the_newest_that_are_there(tmp_path):
    for age, name in enumerate(["iter_10", ".iter_11.tmp", "iter_9", "ema.pth", "iter_8", "x"]):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    message = r"iter_7 does not exist; there are ema.pth, iter_9, iter_10$"
    (tmp_path / "iter_8").unlink()
    with pytest.raises(UserError, match=message):
        load_checkpoint(tmp_path / "iter_7")
    with pytest.raises(UserError, match=r"nowhere.pth does not exist$"):
        load_checkpoint(tmp_path / "no" / "nowhere.pth")


def test_the_latest_checkpoint_goes_by_number_and_takes_no_half(tmp_path, capsys):
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "no") is None
    for name in ("iter_9", "iter_10", "iter_11", "best_loss_iter_12", "iter_x"):
        save_folder({"meta": {}, "ema": {"weight": torch.ones(2)}}, tmp_path / name)
    (tmp_path / "iter_10").rename(tmp_path / ".iter_13.tmp")
    (tmp_path / "iter_14").mkdir()
    (tmp_path / "iter_15").touch()
    assert latest_checkpoint(tmp_path) == tmp_path / "iter_11"
    told = capsys.readouterr().err
    assert "iter_14 is damaged; passed over" in told
    assert "iter_11" not in told
    (tmp_path / "iter_11/rest.pth").unlink()
    assert latest_checkpoint(tmp_path) == tmp_path / "iter_9"
    assert f"{tmp_path / 'iter_11'} is damaged; passed over" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"run is no checkpoint, it is a folder; its newest .*_9$"):
        load_checkpoint(tmp_path.rename(tmp_path.with_name("run")))


def test_weights_that_do_not_fit_are_named_and_nothing_is_loaded():
    layer = nn.Linear(2, 3)
    before = layer.weight.detach().clone()
    weights = {"weight": torch.ones(3, 4), "scale": torch.ones(1)}
    message = (
        r"x.pth is of another architecture than the config's Linear: missing bias; "
        r"unknown scale; weight is \(3, 4\) there and \(3, 2\) here$"
    )
    with pytest.raises(UserError, match=message):
        load_weights(layer, weights, "x.pth")
    with pytest.raises(UserError, match=r"missing bias"):
        load_weights(layer, {"weight": torch.ones(3, 2)}, "x.pth")
    assert torch.equal(layer.weight, before)
    load_weights(layer, {"weight": torch.ones(3, 2), "bias": torch.zeros(3)}, "x.pth")
    assert torch.equal(layer.weight, torch.ones(3, 2))
    with pytest.raises(UserError, match=r"and 2 more$"):
        load_weights(nn.Linear(1, 1), {str(i): torch.ones(1) for i in range(3)}, "x.pth")
