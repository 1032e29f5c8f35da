"""A resumed run goes on in the middle of its data, and loads nothing that came before."""

import numpy as np
import pytest
import torch

from mmsora.datasets.file_dataset import FileDataset
from mmsora.registry import DATASETS, RUNNERS, TRANSFORMS
from mmsora.structures.video_sample import VideoSample

MADE = []


@DATASETS.register_module()
class Noise(FileDataset):
    """Clips of two sizes that are not in files."""

    shapes = np.array([(2, 8, 8), (2, 8, 16)] * 9)

    def load_data_list(self):
        return [{"path": str(number)} for number in range(len(self.shapes))]


@TRANSFORMS.register_module()
class Make:
    def __call__(self, results):
        MADE.append(results["index"])
        size = results.get("bucket", (2, 8, 8))
        numbers = results["draws"].normal("pixels", torch.empty(1, 1, *size))[0]
        clip = (numbers * 40 + 128).clamp(0, 255).to(torch.uint8)
        sample = VideoSample(index=results["index"], label=results["index"] % 3)
        return {"inputs": clip, "data_samples": sample}


SIZES = {"type": "Buckets", "sizes": [(2, 8)], "ratios": [1.0, 2.0], "factor": (1, 4, 4)}
LOADERS = {
    "epochs": {"sampler": {"type": "EpochSampler"}},
    "buckets": {
        "sampler": {"type": "DefaultSampler"},
        "batch_sampler": {"type": "BucketBatchSampler", "buckets": SIZES},
    },
}


def train(make, work_dir, kind, iters, load_from=None, workers=0):
    """The runner, and the numbers of the samples that were made."""
    MADE.clear()
    cfg = make({"train_cfg.max_iters": iters, "default_hooks.checkpoint.interval": 4}, work_dir)
    loader = cfg.train_dataloader
    loader.pop("sampler")
    loader.update({**LOADERS[kind], "num_workers": workers, "batch_size": 2})
    loader.persistent_workers = workers > 0
    loader.dataset = {"type": "Noise", "data_root": "x", "pipeline": [{"type": "Make"}]}
    cfg.pop("randomness")  # its seed is known to the checkpoint alone
    cfg.resume, cfg.load_from = load_from is not None, load_from and str(load_from)
    runner = RUNNERS.build(cfg)
    runner.train()
    return runner, list(MADE)


def test_another_sampler_begins_anew(tiny_config, tmp_path):
    work_dir = tmp_path / "run"
    train(tiny_config, work_dir, "epochs", 4)
    _, made = train(tiny_config, work_dir, "buckets", 6, work_dir / "iter_4")
    assert len(made) == 4
    log = "".join(path.read_text() for path in work_dir.glob("*/*.log"))
    assert "the sampler is another one: the data begin anew" in log


@pytest.mark.parametrize(("kind", "workers"), [("epochs", 0), ("buckets", 0)])
def test_it_loads_what_comes_and_nothing_else(tiny_config, tmp_path, kind, workers):
    work_dir = tmp_path / "run"
    straight, made = train(tiny_config, work_dir, kind, 12, None, workers)
    _, second = train(tiny_config, work_dir, kind, 8, work_dir / "iter_4", workers)
    resumed, third = train(tiny_config, work_dir, kind, 12, work_dir / "iter_8", workers)
    if not workers:
        assert len(made) == 24
        assert (second, third) == (made[8:16], made[16:])
    pairs = zip(straight.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
