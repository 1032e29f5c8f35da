"""Sizes are what a VAE and a patch can take; each clip gets the best that it has pixels for."""

import copy
import math
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.dataset import BaseDataset

from mmsora.datasets import BucketCrop, BucketFrames, BucketIndex, Buckets, shapes_of
from mmsora.registry import TASK_UTILS
from mmsora.utils.draws import Draws
from mmsora.utils.user_error import UserError
from mmsora.utils.video_io import MediaError

SIZES = [(1, 256), (1, 512), (17, 256), (33, 256), (17, 512)]
BUCKETS = Buckets(SIZES, factor=(4, 16, 32))


def bucket_of(*shape, buckets=BUCKETS):
    return buckets.shapes[buckets.assign(np.array([shape]))[0]]


def test_sizes_are_multiples_of_about_the_same_area():
    assert len(BUCKETS.shapes) == len(set(BUCKETS.shapes)) == 5 * 5
    for frames, height, width in BUCKETS.shapes:
        assert (height % 16, width % 32, frames % 4) == (0, 0, 1)
        assert any(frames == t and 0.88 < height * width / side**2 < 1.14 for t, side in SIZES)
    assert (17, 256, 256) in BUCKETS.shapes
    assert (17, 384, 672) in BUCKETS.shapes
    assert (17, 688, 384) in BUCKETS.shapes


def test_tokens_count_a_first_frame_of_its_own():
    tokens = dict(zip(BUCKETS.shapes, BUCKETS.tokens.tolist(), strict=True))
    assert tokens[1, 256, 256] == 16 * 8
    assert tokens[17, 256, 256] == 5 * 16 * 8
    assert tokens[17, 384, 672] == 5 * 24 * 21
    whole = Buckets([(16, 64)], ratios=[1], factor=(2, 8, 8))
    assert whole.tokens.tolist() == [8 * 8 * 8]


def test_a_clip_gets_the_size_that_keeps_most_of_it():
    assert bucket_of(300, 1080, 1920) == (17, 384, 672)
    assert bucket_of(300, 1920, 1080) == (17, 688, 384)
    assert bucket_of(300, 360, 640) == (33, 192, 352)
    assert bucket_of(32, 360, 640) == (17, 192, 352)
    assert bucket_of(16, 512, 512) == (1, 512, 512)
    assert bucket_of(16, 511, 512) == (1, 256, 256)
    assert bucket_of(33, 100, 100) == (33, 256, 256)  # enlarged
    assert bucket_of(1, 100, 400) == (1, 192, 352)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.tuples(*[st.integers(1, limit) for limit in (70, 900, 900)]), min_size=1),
    st.integers(1, 3),
)
def test_each_clip_has_the_pixels_that_its_bucket_wants(clips, stride):
    buckets = Buckets(SIZES, stride=stride)
    found = buckets.assign(np.array(clips))
    for (frames, height, width), number in zip(clips, found.tolist(), strict=True):
        t, rows, columns = buckets.shapes[number]
        assert (t - 1) * stride < frames
        side = 512 if rows * columns > 400**2 else 256
        fits = [
            pair
            for pair in SIZES
            if (pair[0] - 1) * stride < frames and pair[1] ** 2 <= height * width
        ]
        if fits:
            assert t * side**2 == max(count * other**2 for count, other in fits)
        else:
            assert side == 256
            assert t == max(count for count in (1, 17, 33) if (count - 1) * stride < frames)
        plane = [shape[1:] for shape in buckets.shapes if abs(shape[1] * shape[2] - side**2) < 2e4]
        distance = [abs(math.log(w / h * height / width)) for h, w in plane]
        assert abs(math.log(columns / rows * height / width)) <= min(distance) + 1e-9


def test_clips_too_short_for_all_sizes():
    sizes, clips = [(9, 64), (17, 64)], np.array([[17, 64, 64], [16, 64, 64], [8, 64, 64]])
    assert Buckets(sizes, ratios=[1]).assign(clips[:2]).tolist() == [1, 0]
    with pytest.raises(UserError, match="1 of 3 clips .* sample 2: 8 with stride 1, 9 are needed"):
        Buckets(sizes).assign(clips)
    with pytest.raises(UserError, match="2 of 3 clips .* sample 1: 8 with stride 2, 9 are needed"):
        Buckets(sizes, stride=2).assign(clips)
    assert Buckets(sizes, ratios=[1], short="skip").assign(clips).tolist() == [1, 0, -1]
    assert Buckets(sizes, ratios=[1], short="loop").assign(clips).tolist() == [1, 0, 0]


def test_arguments_that_cannot_be():
    with pytest.raises(ValueError, match="18 frames .* must be a multiple of 5, or one more"):
        Buckets([(15, 64), (16, 64), (18, 64)], factor=(5, 8, 8))
    for arguments in ({"sizes": []}, {"sizes": SIZES, "ratios": [0.5]}):
        with pytest.raises(ValueError, match="ratios are long side over short side"):
            Buckets(**arguments)
    with pytest.raises(ValueError, match="one of raise, skip, loop, got 'drop'"):
        Buckets(SIZES, short="drop")
    with pytest.raises(UserError, match=r"sample 1 .* \[ *5 +0 +64\]"):
        BUCKETS.assign(np.array([[5, 64, 64], [5, 0, 64]]))


def test_it_is_built_by_name():
    assert TASK_UTILS.build({"type": "Buckets", "sizes": SIZES}).shapes == Buckets(SIZES).shapes


class Listed(BaseDataset):
    def load_data_list(self):
        return self.metainfo["rows"]


def test_sizes_come_from_the_list_of_a_dataset():
    rows = [
        {"path": "a.mp4", "num_frames": 20, "height": "360", "width": 640},
        {"path": "b.mp4", "num_frames": 1, "height": 64, "width": 32},
    ]
    assert shapes_of(Listed(metainfo={"rows": rows})).tolist() == [[20, 360, 640], [1, 64, 32]]
    del rows[1]["height"]
    with pytest.raises(UserError, match=r"b\.mp4: .* num_frames=1, height=None, width=32"):
        shapes_of(Listed(metainfo={"rows": rows}))


def test_an_index_is_a_number_that_keeps_its_size():
    index = BucketIndex(12, (17, 64, 32))
    assert index == 12
    assert divmod(index, 5) == (2, 2)
    for other in (pickle.loads(pickle.dumps(index)), copy.deepcopy(index)):
        assert other == 12
        assert other.size == (17, 64, 32)


def sample(**known):
    return {"path": "a.mp4", "test_mode": False, "draws": Draws(0, [3]), **known}


def test_frames_and_crop_follow_the_bucket(videos):
    path = str(videos / "a" / "v_1.avi")  # 12 frames
    results = BucketFrames(stride=2).transform(sample(path=path, bucket=(5, 16, 48)))
    assert np.diff(results["frame_indices"]).tolist() == [2] * 4
    with pytest.raises(MediaError, match="12 frames, 13 are needed"):
        BucketFrames(stride=2).transform(sample(path=path, bucket=(7, 16, 48)))
    skipping = BucketFrames(stride=2, short="skip")
    assert skipping.transform(sample(path=path, bucket=(7, 16, 48))) is None
    frames = np.zeros((5, 24, 32, 3), np.uint8)
    results = BucketCrop().transform(sample(frames=frames, bucket=(5, 16, 48)))
    assert results["frames"].shape == (5, 16, 48, 3)


def test_transforms_say_what_is_wrong():
    for transform in (BucketFrames(), BucketCrop()):
        with pytest.raises(UserError, match=r"a\.mp4: came without a bucket; .*BucketBatchSampl"):
            transform.transform(sample())
    with pytest.raises(ValueError, match="resampling must be one of"):
        BucketCrop("cubic")
    with pytest.raises(ValueError, match="rule must be one of"):
        BucketFrames(rule="random")
