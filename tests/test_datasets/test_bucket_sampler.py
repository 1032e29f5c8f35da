"""One size at a step on all processes, each clip once in each epoch, wherever a run stops."""

import json
import time
from collections import Counter
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mmengine.dataset import DefaultSampler
from mmengine.runner import Runner

from mmsora.datasets import (
    BucketBatchSampler,
    BucketCrop,
    BucketFrames,
    BucketPlan,
    Buckets,
    DecodeVideo,
    PackVideo,
    bucket_sampler,
)
from mmsora.datasets.file_dataset import FileDataset
from mmsora.utils.user_error import UserError

TABLES = json.loads((Path(__file__).parents[1] / "data/buckets.json").read_text())
SIZES = [(1, 64), (4, 64), (8, 64), (8, 128)]
BUCKETS = Buckets(SIZES, ratios=[1.0])

# The numbers of clips of the four sizes: from none to some batches.
counts = st.lists(st.integers(0, 40), min_size=4, max_size=4).filter(any)
worlds = st.sampled_from([1, 2, 4])
each_case = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@pytest.fixture
def log(monkeypatch):
    """What was logged so far."""
    lines = []
    monkeypatch.setattr(bucket_sampler, "print_log", lambda line, **_: lines.append(line))
    return lines


class Clips:
    """Clips of the sizes of ``SIZES``, so many of each, shuffled."""

    takes_epochs = True

    def __init__(self, of_each):
        shapes = [(t, s, s) for n, (t, s) in zip(of_each, SIZES, strict=True) for _ in range(n)]
        self.shapes = np.random.default_rng(0).permutation(np.array(shapes))

    def __len__(self):
        return len(self.shapes)


class Job:
    """The samplers of all processes of a job."""

    def __init__(self, clips, world=1, batch_size=2, seed=5, **options):
        self.clips = clips
        buckets = options.pop("buckets", BUCKETS)
        self.ranks = []
        for rank in range(world):
            with mock.patch.object(bucket_sampler, "data_info", lambda r=rank: (r, world)):
                source = SimpleNamespace(dataset=clips, seed=seed)
                self.ranks.append(BucketBatchSampler(source, batch_size, buckets, **options))

    def take(self, steps):
        """For each step the batches of all processes."""
        return list(islice(zip(*self.ranks, strict=True), steps))

    def state(self, taken):
        """As it comes out of a checkpoint, equal on all processes."""
        states = [json.dumps(rank.state_dict(taken)) for rank in self.ranks]
        assert len(set(states)) == 1
        return json.loads(states[0])

    def load(self, state):
        for rank in self.ranks:
            rank.load_state_dict(state)
        return self

    def steps_to(self, epoch):
        return int(self.ranks[0]._plan.steps(epoch).sum())

    def whole_batch(self):
        """Clips of all processes at a step, by size."""
        sizes = self.ranks[0].batch_sizes * len(self.ranks)
        return dict(zip(BUCKETS.shapes, sizes.tolist(), strict=True))


def numbers(steps):
    return [int(number) for step in steps for batch in step for number in batch]


def check_lines(clips, given):
    """What came of each size is a beginning of its line: no clip twice, no epoch with gaps."""
    assert len(set(given)) == len(given)
    came = Counter(divmod(number, len(clips)) for number in given)
    for shape in BUCKETS.shapes:
        members = {i for i, known in enumerate(clips.shapes.tolist()) if tuple(known) == shape}
        mine = [epoch for epoch, clip in came if clip in members]
        for epoch in range(max(mine, default=0)):
            assert mine.count(epoch) == len(members)


def check_epochs(job, given, epochs):
    """Each clip came once in each epoch but for less than a batch, which is of the last."""
    clips, held = job.clips, job.whole_batch()
    check_lines(clips, given)
    assert max(given, default=0) < epochs * len(clips)
    missing = set(range(epochs * len(clips))) - set(given)
    by_size = Counter(tuple(clips.shapes[number % len(clips)].tolist()) for number in missing)
    assert all(count < held[shape] for shape, count in by_size.items())


@each_case
@given(counts, worlds, st.integers(1, 3), st.integers(0, 2**40))
def test_all_processes_have_one_size_and_as_many_clips(of_each, world, batch_size, seed):
    job = Job(Clips(of_each), world, batch_size, seed)
    for step in job.take(30):
        assert len({index.size for batch in step for index in batch}) == 1
        (size,) = {len(batch) for batch in step}
        shape = step[0][0].size
        assert size * world == job.whole_batch()[shape]
        assert size * shape[0] * shape[1] * shape[2] <= batch_size * 8 * 128 * 128
        for batch in step:
            for index in batch:
                assert tuple(job.clips.shapes[index % len(job.clips)]) == index.size


@each_case
@given(counts, worlds, st.integers(1, 3), st.integers(1, 4))
@example([1, 3, 0, 40], 4, 3, 4)
def test_no_clip_is_lost_or_doubled(of_each, world, batch_size, epochs):
    job = Job(Clips(of_each), world, batch_size)
    check_epochs(job, numbers(job.take(job.steps_to(epochs))), epochs)


@each_case
@given(counts, worlds, st.integers(0, 60), st.integers(0, 60))
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(of_each, world, first, second):
    clips = Clips(of_each)
    straight = Job(clips, world).take(first + second + 20)
    resumed = Job(clips, world, seed=6).load(Job(clips, world).state(first))
    assert resumed.take(20) == straight[first : first + 20]
    again = Job(clips, world, seed=7).load(resumed.state(second))
    assert again.take(20) == straight[first + second :]
    sizes = [[index.size for index in batch] for step in again.take(20) for batch in step]
    assert sizes == [[i.size for i in batch] for step in straight[-20:] for batch in step]


@each_case
@given(
    counts,
    st.lists(st.tuples(worlds, st.integers(1, 3), st.integers(0, 25)), min_size=2, max_size=4),
)
@example([7, 0, 9, 40], [(4, 3, 3), (1, 1, 5), (2, 2, 3)])
def test_no_clip_is_lost_or_doubled_when_the_processes_change(of_each, parts):
    clips, given, state, total, epoch = Clips(of_each), [], None, 0, 0
    for world, batch_size, steps in parts:
        job = Job(clips, world, batch_size)
        if state is not None:
            job.load(state)
        given += numbers(job.take(steps))
        state, total = job.state(steps), total + steps
        assert state["step"] == total
        check_lines(clips, given)
        # A line with less clips than processes runs ahead of the epochs of another plan.
        plan = job.ranks[0]._plan
        epoch = max(epoch, plan.find(total)[0])
    for end in (epoch + 1, epoch + 2):
        rest = plan.start + job.steps_to(end) - total
        check_epochs(job, given + numbers(job.load(state).take(rest)), end)


def test_as_many_processes_with_as_much_budget_do_the_same():
    clips = Clips([200, 100, 100, 90])
    alone, four = Job(clips, 1, 4).take(60), Job(clips, 4, 1).take(60)
    for (whole,), parts in zip(alone, four, strict=True):
        assert whole == [number for turn in zip(*parts, strict=True) for number in turn]


def test_orders_go_by_seed_and_epoch():
    clips = Clips([0, 0, 40, 40])
    job, steps = Job(clips), Job(clips).steps_to(1)
    epochs = [job.take(3 * steps)[steps * e : steps * (e + 1)] for e in range(3)]
    sizes = [[step[0][0].size for step in epoch] for epoch in epochs]
    assert len({tuple(order) for order in sizes}) == 3
    assert len({tuple(n % 80 for n in numbers(epoch)) for epoch in epochs}) == 3
    assert Job(clips).take(3 * steps) == job.take(3 * steps)
    assert Job(clips, seed=6).take(steps) != epochs[0]
    assert len(job.ranks[0]) == steps
    line = numbers(Job(Clips([0, 0, 0, 40])).take(40))
    assert [number - 40 for number in line[40:]] != line[:40]


def test_other_clips_start_the_epoch_anew(log):
    job = Job(Clips([0, 0, 40, 40]))
    state = job.state(job.steps_to(3) + 1)
    grown = Job(Clips([0, 0, 41, 40])).load(state)
    assert log[-1] == "the clips or the buckets changed since; epoch 3 starts anew"
    steps = grown.steps_to(4)
    check_epochs(grown, list(range(3 * 81)) + numbers(grown.take(steps)), 4)
    assert grown.state(0)["step"] == state["step"]


@pytest.mark.parametrize("step", [0, 10**3, 10**12])
def test_resuming_walks_through_nothing(step):
    job = Job(Clips([100, 100, 100, 100]), 2)
    with mock.patch.object(
        BucketPlan, "epoch", autospec=True, side_effect=BucketPlan.epoch
    ) as used:
        job.load({**job.state(0), "step": step}).take(1)
    assert used.call_count == 2  # once on each process
    plan = job.ranks[0]._plan
    epoch = step / (plan.clips / plan.batches).sum()
    assert job.take(1)[0][0][0] // 400 == pytest.approx(epoch, abs=1.5, rel=1e-12)


def test_a_million_clips_are_planned_in_a_second():
    rng = np.random.default_rng(0)
    shapes = np.stack([rng.integers(1, high, 10**6) for high in (300, 1080, 1920)], 1)
    clips = Clips([1, 0, 0, 0])
    clips.shapes = shapes
    sizes = [(frames, side) for frames in (1, 17, 33, 65, 129) for side in (256, 512, 768)]
    begin = time.process_time()
    job = Job(clips, buckets=Buckets(sizes, factor=(4, 16, 16)))
    job.load({**job.state(0), "step": 12345}).take(1)
    seconds = time.process_time() - begin
    print(f"{seconds:.2f} s")
    assert seconds < 1.5


# Cost


def flops(frames, side):
    """Of one clip in the model of ``buckets.json``."""
    n, width, layers = (side // 16) ** 2 * (1 + (frames - 1) // 4) + 512, 3072, 57
    return n * 12 * width * width * 2 * layers + 4 * n * n * width * layers


def busy(costs):
    """How much of the time processes compute, when each step waits for the slowest."""
    costs = np.asarray(costs, dtype=float)
    return (costs.mean(axis=1) / costs.max(axis=1)).mean()


@pytest.mark.parametrize(
    ("stage", "theirs"), [("stage1", 0.795), ("stage2", 0.380), ("stage2_i2v", 0.532)]
)
def test_processes_wait_for_no_other(stage, theirs):
    """Open-Sora's sampler gives 8 processes batches of any 8 of its buckets."""
    table = [
        (int(frames), int(side[:-2]), batch)
        for side, row in TABLES[stage].items()
        for frames, (_, batch) in row.items()
    ]
    costs = np.array([batch * flops(frames, side) for frames, side, batch in table])
    drawn = np.random.default_rng(0).integers(len(costs), size=(20000, 8))
    assert busy(costs[drawn]) == pytest.approx(theirs, abs=0.003)

    clips = Clips([1, 0, 0, 0])
    clips.shapes = np.repeat([(frames, side, side) for frames, side, _ in table], 500, axis=0)
    buckets = Buckets([row[:2] for row in table], ratios=[1.0], factor=(4, 16, 16))
    job = Job(clips, 8, 2, buckets=buckets, text_tokens=512, width=3072)
    taken = [
        [sum(flops(index.size[0], index.size[1]) for index in batch) for batch in step]
        for step in job.take(job.steps_to(2))
    ]
    most = 2 * max(flops(frames, side) for frames, side, _ in table)
    print(f"{stage}: busy {busy(taken):.3f}, {np.mean(taken) / most:.3f} of the budget")
    assert busy(taken) >= 0.95
    assert 0.7 * most < np.mean(taken) <= np.max(taken) <= most * (1 + 1e-6)


def test_a_clip_costs_what_a_transformer_computes():
    clips, buckets = (
        Clips([9, 9, 9, 9]),
        Buckets([(1, 64), (129, 768)], ratios=[1.0], factor=(4, 16, 16)),
    )
    costs = Job(clips, buckets=buckets, text_tokens=512, width=3072).ranks[0].costs
    assert costs[1] / costs[0] == pytest.approx(flops(129, 768) / flops(1, 64))
    tokens = Job(clips, buckets=buckets, text_tokens=512).ranks[0].costs
    assert tokens.tolist() == [16 + 512, 33 * 48 * 48 + 512]


def test_the_budget_decides_the_batches(log):
    """Clips have 16, 64, 128 and 512 tokens."""
    many = Clips([1000] * 4)
    assert Job(many, 2, 3).ranks[0].batch_sizes.tolist() == [96, 24, 12, 3]
    assert Job(many, 2, budget=1535).ranks[0].batch_sizes.tolist() == [95, 23, 11, 2]
    few = Job(Clips([193, 47, 1, 0]), 2, 3).ranks[0]  # none twice at one step, if that can be
    assert few.batch_sizes.tolist() == [96, 23, 1, 1]
    assert few.describe().splitlines()[1:] == [
        "  1 x 64 x 64: 193 clips, batch 96",
        "  4 x 64 x 64: 47 clips, batch 23",
        "  8 x 64 x 64: 1 clips, batch 1",
    ]
    assert log[-1] == f"{few.describe()}\n  0 clips left out"
    assert len(few) == 2


def test_arguments_that_cannot_be():
    clips = Clips([3, 3, 3, 3])
    with pytest.raises(ValueError, match="budget = 500 does not pay for one clip of 8x128x128"):
        Job(clips, budget=500)
    with pytest.raises(UserError, match="none of 12 clips fits a bucket"):
        Job(clips, buckets=Buckets([(9, 64)], short="skip"))
    clips.takes_epochs = False
    with pytest.raises(ValueError, match="Clips takes no indices beyond its length"):
        Job(clips)


# Where it is used


class Files(FileDataset):
    def load_data_list(self):
        paths = sorted(path for path in Path(self.data_root).rglob("*.avi"))
        sizes = [(12, 24, 32), (12, 24, 32), (12, 24, 32), (8, 32, 24), (8, 32, 24), (8, 32, 24)]
        known = [dict(zip(("num_frames", "height", "width"), s, strict=True)) for s in sizes]
        return [{"path": str(p), "label": 0, **k} for p, k in zip(paths, known, strict=True)]


def loader(root, **changes):
    pipeline = [{"type": kind} for kind in (BucketFrames, DecodeVideo, BucketCrop, PackVideo)]
    sizes = {"sizes": [(4, 16), (8, 16)], "ratios": [4 / 3], "factor": (1, 4, 4)}
    return Runner.build_dataloader(
        {
            "dataset": Files(str(root), pipeline, on_error="skip"),
            "sampler": {"type": DefaultSampler},
            "batch_sampler": {"type": BucketBatchSampler, "buckets": {"type": Buckets, **sizes}},
            "batch_size": 2,
            **changes,
        },
        seed=3,
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_gives_clips_of_the_size_of_their_bucket(videos, workers):
    batches = list(islice(loader(videos, num_workers=workers), 5))
    for batch in batches:
        (shape,) = {tuple(clip.shape) for clip in batch["inputs"]}
        clips = {sample.index % 6 < 3 for sample in batch["data_samples"]}
        assert (shape, clips) in [((3, 8, 12, 20), {True}), ((3, 8, 20, 12), {False})]
    seen = [sample.index for batch in batches for sample in batch["data_samples"]]
    assert {type(index) for index in seen} == {int}
    assert len(set(seen)) == 10


def test_the_clip_that_stands_in_for_another_takes_its_size(videos, tmp_path):
    for number, path in enumerate(sorted(videos.rglob("*.avi"))):
        (tmp_path / path.name).write_bytes(path.read_bytes() if number != 2 else b"")
    batches = list(islice(loader(tmp_path), 6))
    shapes = {
        sample.index % 6: tuple(clip.shape)
        for batch in batches
        for clip, sample in zip(batch["inputs"], batch["data_samples"], strict=True)
    }
    assert shapes == dict.fromkeys(range(3), (3, 8, 12, 20)) | dict.fromkeys(
        range(3, 6), (3, 8, 20, 12)
    )


def one_of(rank, world, folder):
    """A process of a job: what all take is gathered, and checked by each."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    cases = []

    @settings(each_case, max_examples=25)
    @given(counts, st.integers(1, 3), st.integers(0, 30), worlds, st.integers(1, 3))
    def check(of_each, batch_size, stop, later, epochs):
        clips = Clips(of_each)
        source = DefaultSampler(clips)  # the processes agree on a seed
        whole = list(islice(BucketBatchSampler(source, batch_size, BUCKETS), stop + 10))
        state = BucketBatchSampler(source, batch_size, BUCKETS).state_dict(stop)
        resumed = BucketBatchSampler(DefaultSampler(clips), batch_size, BUCKETS)
        resumed.load_state_dict(state)
        mine = [[(int(index), index.size) for index in batch] for batch in whole]
        ranks = [None] * world
        torch.distributed.all_gather_object(ranks, (mine, state))
        assert [other for _, other in ranks] == [state] * world
        for step in zip(*(batches for batches, _ in ranks), strict=True):
            assert len({len(batch) for batch in step}) == 1
            assert len({size for batch in step for _, size in batch}) == 1
        assert list(islice(resumed, 10)) == whole[stop:]
        taken = [n for batches, _ in ranks for batch in batches[:stop] for n, _ in batch]
        end = resumed._plan.find(stop)[0] + epochs
        job = Job(clips, later, batch_size).load(state)
        rest = job.ranks[0]._plan.start + job.steps_to(end) - stop
        check_epochs(job, taken + numbers(job.take(rest)), end)
        cases.append(of_each)

    check()
    (folder / f"{rank}.json").write_text(json.dumps(cases))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
@pytest.mark.parametrize("world", [2, 4])
def test_real_processes_lose_and_double_no_clip(world, tmp_path):
    context = torch.multiprocessing.get_context("fork")
    workers = [
        context.Process(target=one_of, args=(rank, world, tmp_path)) for rank in range(world)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * world
    cases = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(world)]
    assert cases == cases[:1] * world
    assert len(cases[0]) >= 20
