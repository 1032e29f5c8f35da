"""Folders of frames are videos, sorted by the number at the end of a name."""

import numpy as np
import pytest
from mmengine.registry import init_default_scope
from PIL import Image

from mmsora.datasets.frame_folder import frame_files
from mmsora.registry import DATASETS
from mmsora.utils.user_error import UserError
from mmsora.utils.video_io import MediaError

PIPELINE = [
    dict(type="SampleFrames", num_frames=3, stride=4),
    dict(type="DecodeVideo"),
    dict(type="PackVideo"),
]


@pytest.fixture(autouse=True)
def scope():
    init_default_scope("mmsora")


def write(folder, count, level, kind="png", name="{}"):
    folder.mkdir(parents=True)
    for frame in range(count):
        pixels = np.full((6, 8, 3), level + frame, np.uint8)
        Image.fromarray(pixels).save(folder / f"{name.format(frame)}.{kind}")


@pytest.fixture
def sky(tmp_path):
    """SkyTimelapse's layout: videos of 12, 9 and 11 frames, the levels of which say which."""
    root = tmp_path / "sky_train"
    write(root / "b7/b7_1", 12, 0, name="b7_1_frame_{}")
    write(root / "a2/a2_2", 9, 100, name="a2_2_frame_{}")
    write(root / "a2/a2_1", 11, 200, name="a2_1_frame_{}")
    (root / "a2/notes.txt").write_text("no frame")
    (root / ".thumbs").mkdir()
    return root


def build(root, pipeline=PIPELINE, **arguments):
    cfg = dict(type="FrameFolderVideos", data_root=str(root), pipeline=pipeline)
    return DATASETS.build(cfg | arguments)


def levels(item):
    return item["inputs"][0, :, 0, 0].tolist()


def test_each_folder_of_images_is_a_video(sky):
    dataset = build(sky, test_mode=True)
    assert [item["data_samples"].path for item in dataset] == [
        str(sky / name) for name in ("a2/a2_1", "a2/a2_2", "b7/b7_1")
    ]
    # 10 comes after 9, and not after 1
    assert [levels(item) for item in dataset] == [[200, 204, 208], [100, 104, 108], [0, 4, 8]]


def test_starts_are_drawn(sky):
    dataset = build(sky)
    starts = {levels(dataset[2 + 3 * epoch])[0] for epoch in range(60)}
    assert starts == {0, 1, 2, 3}


def test_folders_with_few_frames_are_left_out(sky):
    assert [info["num_frames"] for info in map(build(sky).get_data_info, range(3))] == [11, 9, 12]
    assert len(build(sky, min_frames=11)) == 2
    with pytest.raises(UserError, match=f"{sky}: no folder in it has 13 frames"):
        build(sky, min_frames=13)
    with pytest.raises(ValueError, match="min_frames must be 1 or more, got 0"):
        build(sky, min_frames=0)


def test_frames_are_sorted_by_their_last_number(tmp_path):
    names = ["v2_10.jpg", "v2_9.jpg", "v10_2.JPG", "v2_011.png", "cover.jpg", "b.jpg"]
    for name in [*names, "frames.txt", "._v2_3.jpg"]:
        (tmp_path / name).touch()
    found = [path.rsplit("/", 1)[1] for path in frame_files(tmp_path)]
    assert found == ["b.jpg", "cover.jpg", "v10_2.JPG", "v2_9.jpg", "v2_10.jpg", "v2_011.png"]


def test_folders_that_are_no_videos(sky, tmp_path):
    with pytest.raises(UserError, match="missing: no such folder"):
        build(tmp_path / "missing")
    dataset = build(sky)
    for path in (sky / "a2/a2_2").iterdir():
        path.unlink()
    with pytest.raises(MediaError, match="a2/a2_2: no frames in it"):
        dataset[1]


def test_frames_of_two_sizes_are_refused(sky):
    Image.new("RGB", (6, 8)).save(sky / "a2/a2_2/a2_2_frame_4.png")
    with pytest.raises(MediaError, match="frame_4.png: 8 x 6 pixels, .*frame_0.png is 6 x 8"):
        build(sky, test_mode=True)[1]


def test_lattes_own_rule(sky):
    """Every fourth frame of a window of 12, which never ends with the last frame."""
    rule = [dict(type="SampleFrames", num_frames=2, stride=4, rule="slice"), *PIPELINE[1:]]
    dataset = build(sky, rule)
    clips = {tuple(levels(dataset[2 + 3 * epoch])) for epoch in range(60)}
    assert clips == {(0, 4), (1, 5), (2, 6), (3, 7)}  # of 8 that have room
