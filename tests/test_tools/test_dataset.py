"""``tools/dataset.py``: what it says of files of every state, and what it shows."""

import json
import subprocess
import sys
import tarfile
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mmsora.visualization  # noqa: F401
from mmsora.utils.video_io import write_image, write_video

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def dataset(tool):
    return tool("dataset")


def clip(count, height=32, width=48, start=0):
    ramp = np.arange(start, start + count, dtype=np.uint8).reshape(-1, 1, 1, 1)
    return np.zeros((count, height, width, 3), np.uint8) + 4 * ramp


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Two videos, an image, a caption, a broken file, one that is no medium, and a hidden one."""
    root = tmp_path_factory.mktemp("tree")
    write_video(root / "a.mp4", clip(20), 10)
    write_video(root / "sub/b.gif", clip(5, 24, 16), 5)
    Image.fromarray(clip(1)[0]).save(root / "sub/c.jpg")
    (root / "a.txt").write_text("a <b>grey</b>\nramp")
    (root / "sub/broken.mp4").write_bytes((root / "a.mp4").read_bytes()[:900])
    (root / "sub/notes.md").write_text("no medium")
    (root / "sub/.hidden.mp4").write_bytes(b"")
    return root


@pytest.fixture
def probe(dataset, tmp_path, capsys):
    """Call it with arguments to get the report, the list, the page and what was printed."""

    def call(*arguments):
        out = tmp_path / "out"
        dataset.main(["probe", *map(str, arguments), "--out", str(out), "--workers", "2"])
        report = json.loads((out / "report.json").read_text())
        listed = out / "files.jsonl"
        lines = listed.read_text().splitlines() if listed.exists() else []
        page = (out / "report.html").read_text()
        return report, [json.loads(line) for line in lines], page, capsys.readouterr().out

    return call


@pytest.fixture
def fails(dataset, capsys, tmp_path):
    """The one line on stderr."""

    def call(*arguments):
        with pytest.raises(SystemExit) as caught:
            dataset.main([*map(str, arguments), "--out", str(tmp_path / "out")])
        assert caught.value.code == 2
        return capsys.readouterr().err

    return call


def test_help_imports_no_torch():
    for command in ("probe", "browse"):
        code = (
            "import sys, runpy; sys.argv = ['dataset', '%s', '--help']\n"
            "try: runpy.run_path('tools/dataset.py', run_name='__main__')\n"
            "except SystemExit: pass\n"
            "print(*{'torch', 'mmengine', 'cv2', 'numpy'} & set(sys.modules))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code % command], cwd=ROOT, capture_output=True, text=True
        )
        assert done.stdout.splitlines()[-1] == "", done.stderr


def test_a_folder(probe, tree):
    report, listed, _, printed = probe(tree)
    counts = [report[name] for name in ("files", "videos", "images", "frame_folders")]
    assert counts == [4, 2, 1, 0]
    (broken,) = report["unreadable"]
    assert broken["path"] == "sub/broken.mp4"
    assert "cut" in broken["cause"]
    assert report["sizes"] == {"32 x 48": 2, "24 x 16": 1}
    assert sorted(report["codecs"]) == ["gif", "h264 yuv420p", "jpeg"]
    assert report["fps"] == {"10": 1, "5": 1}
    assert [report["frames"][key] for key in ("least", "median", "most")] == [1, 5, 20]
    assert sum(report["frames"]["histogram"].values()) == 3
    assert report["hours"] == pytest.approx(3 / 3600)
    assert sum(report["seconds"]["histogram"].values()) == 2
    files = [tree / name for name in ("a.mp4", "sub/b.gif", "sub/c.jpg")]
    assert report["bytes"] == sum(path.stat().st_size for path in files)
    assert report["captions"]["entries_with"] == 1
    assert report["captions"]["entries_without"] == 3
    assert report["captions"]["words"]["most"] == 3
    assert report["classes"] is None
    assert [entry["path"] for entry in listed] == ["a.mp4", "sub/b.gif", "sub/c.jpg"]
    assert listed[0]["text"] == "a <b>grey</b> ramp"
    assert "3 of 4 files can be read" in printed
    assert "unreadable: sub/broken.mp4: " in printed


def test_the_page_is_whole_and_alone(probe, tree):
    page = probe(tree)[2]
    tags, texts = [], []

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attrs):
            tags.append((tag, dict(attrs)))

        def handle_data(self, data):
            texts.append(data)

    Parser().feed(page)
    assert "a <b>grey</b> ramp" in texts  # a caption is text, never markup
    assert not [tag for tag, _ in tags if tag in ("b", "script", "link", "img", "iframe")]
    assert not [attrs for _, attrs in tags if attrs.keys() & {"src", "href"}]
    assert any("sub/broken.mp4" in text for text in texts)
    widths = [attrs["style"] for tag, attrs in tags if tag == "div"]
    assert "width:100.0%" in widths


def test_what_it_lists_can_be_trained_on(probe, tree):
    from mmsora.datasets import AnnotatedVideos, shapes_of

    probe(tree)
    listed = probe(tree)[1]
    (tree / "found.jsonl").write_text("\n".join(map(json.dumps, listed)))
    again = AnnotatedVideos(str(tree), ann_file="found.jsonl")
    assert shapes_of(again).tolist() == [[20, 32, 48], [5, 24, 16], [1, 32, 48]]


def test_damage_inside_a_file_is_found_by_decoding(probe, tmp_path):
    write_video(
        tmp_path / "tree/a.mp4",
        np.random.default_rng(0).integers(0, 256, (30, 32, 48, 3), dtype=np.uint8),
        10,
    )
    path = tmp_path / "tree/a.mp4"
    content = bytearray(path.read_bytes())
    middle = content.index(b"mdat") + len(content) // 2
    content[middle : middle + 2000] = bytes(2000)
    path.write_bytes(content)
    assert not probe(tmp_path / "tree")[0]["unreadable"]
    assert probe(tmp_path / "tree", "--decode")[0]["unreadable"]


def test_a_list_that_is_wrong(probe, tmp_path):
    root = tmp_path / "tree"
    write_video(root / "a.mp4", clip(20), 10)
    write_video(root / "b.mp4", clip(20), 10)
    (root / "clips.csv").write_text(
        "path,text,label,num_frames,height,width\n"
        "a.mp4,x,3,20,32,48\nb.mp4,x y,3,21,32,48\ngone.mp4,x,1,4,4,4\n"
    )
    report, listed, _, printed = probe(root, "--ann-file", "clips.csv")
    (wrong,) = report["wrong_in_list"]
    assert (wrong["path"], wrong["list"]["num_frames"], wrong["file"]["num_frames"]) == (
        "b.mp4",
        21,
        20,
    )
    (gone,) = report["unreadable"]
    assert gone == {"path": "gone.mp4", "cause": "No such file or directory"}
    assert report["classes"]["number"] == 2
    assert report["captions"]["most_frequent"] == {"x": 2, "x y": 1}
    assert listed[1]["num_frames"] == 20
    assert "another size than the file for 1" in printed


def test_buckets(probe, tree):
    report = probe(tree, "--sizes", "1x16", "16x32")[0]
    full = {name: count for name, count in report["buckets"].items() if count}
    assert full == {"16 x 32 x 48": 1, "1 x 16 x 16": 2}
    report = probe(tree, "--sizes", "4x16")[0]
    assert report["buckets"]["too few frames"] == 1  # the image


def test_cuts_and_crops_are_what_is_counted(probe, tmp_path):
    root = tmp_path / "tree"
    write_video(root / "a.mp4", clip(20), 10)
    entry = {"path": "a.mp4", "text": "x", "cut": [2, 8], "crop": [0, 16, 0, 32]}
    (root / "metadata.json").write_text(json.dumps([entry]))
    report = probe(root, "--sizes", "4x16", "8x16")[0]
    assert report["frames"]["most"] == 6
    assert not report["wrong_in_list"]
    assert [name for name, count in report["buckets"].items() if count][0].startswith("4 x ")


def test_tars_and_folders_of_frames_of_a_config(probe, tmp_path):
    for number in range(3):
        write_image(tmp_path / f"frames/x/{number}.png", clip(1, 16, 24)[0])
    write_video(tmp_path / "a.mp4", clip(6), 10)
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards/0.tar", "w") as tar:
        tar.add(tmp_path / "a.mp4", "a.mp4")
    report, listed, _, _ = probe(tmp_path / "shards")
    assert (report["videos"], report["frames"]["most"], listed) == (1, 6, [])
    options = "--cfg-options", "train_dataloader.dataset.type=FrameFolderVideos"
    report, listed, _, _ = probe(
        "latte_s2_own_clips", *options, f"train_dataloader.dataset.data_root={tmp_path}/frames"
    )
    assert (report["frame_folders"], report["frames"]["most"], listed) == (1, 3, [])
    assert report["sizes"] == {"16 x 24": 1}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["probe", "nowhere"], "nowhere"),
        (["probe", "latte_moving_digits"], "MovingDigits are no files"),
        (["probe", "latte_moving_digits", "--ann-file", "x.csv"], "--ann-file is for folders"),
        (["browse", "latte_moving_digits", "--start", "99999999"], "--start 99999999: the last"),
        (["browse", "latte_moving_digits", "--epoch", "1"], "MovingDigits is the same every"),
        (["browse", "latte_moving_digits", "-n", "0"], "--num-samples must be at least 1, got 0"),
        (["probe", ".", "--cfg-options", "a=1"], "--cfg-options is for configs"),
        (["probe", ".", "--sizes", "17"], "expected TxSIDE"),
    ],
)
def test_mistakes_are_one_line(fails, arguments, words):
    assert words in fails(*arguments)


def test_an_empty_folder(fails, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no .avi" in fails("probe", tmp_path / "empty")


SMALL = [
    "train_dataloader.dataset.pipeline.0.num_frames=4",
    "train_dataloader.dataset.pipeline.0.stride=1",
    "train_dataloader.dataset.pipeline.2.size=16",
]


@pytest.fixture
def own(tmp_path):
    """Videos of which the second is too short."""
    root = tmp_path / "own"
    for number, count in enumerate((20, 2, 30)):
        write_video(root / f"{number}.mkv", clip(count, 16, 16, 20 * number), 10)
    rows = "".join(f"{number}.mkv,caption {number}\n" for number in range(3))
    (root / "metadata.csv").write_text("path,text\n" + rows)
    return root


def test_browse_shows_what_the_model_sees(dataset, own, tmp_path, capsys, monkeypatch):
    module = sys.modules["mmsora.visualization.contact_sheet"]
    drawn = []
    real = module.contact_sheet

    def contact_sheet(clips, titles=None, columns=None, scale=1):
        drawn.append((clips, titles))
        return real(clips, titles, columns, scale)

    monkeypatch.setattr(module, "contact_sheet", contact_sheet)
    options = ["--cfg-options", f"train_dataloader.dataset.data_root={own}", *SMALL]
    out = tmp_path / "sheets"
    arguments = ["browse", "latte_s2_own_clips", "--out", str(out), "--frames", "3"]
    dataset.main([*arguments, *options])
    ((clips, titles),) = drawn
    assert clips.shape == (3, 3, 3, 16, 16)
    assert titles[0] == "0 caption 0 | 0.mkv"
    assert titles[1].startswith("1 (cannot be used")
    assert titles[1].endswith("caption 2 | 2.mkv")
    first = clips[:, 0, :, 0, 0].astype(int)
    assert (first[0] - first[0, 0]).tolist() == [0, 4, 12]  # frames 0, 1 and 3 of four
    assert Image.open(out / "4x16x16.png").size[0] > 100
    assert "3 clips of 4 x 16 x 16" in capsys.readouterr().out
    dataset.main([*arguments, "--epoch", "1", "--start", "2", *options])
    assert drawn[1][1] == ["5 caption 2 | 2.mkv"]
    dataset.main([*arguments, "--epoch", "1", "--start", "2", *options])
    np.testing.assert_array_equal(drawn[1][0], drawn[2][0])
    assert not np.array_equal(drawn[1][0][0], clips[2])  # another start than in epoch 0


def test_browse_generated_data(dataset, tmp_path):
    dataset.main(["browse", "latte_moving_digits", "-n", "2", "--out", str(tmp_path)])
    (sheet,) = tmp_path.glob("*.png")
    assert sheet.name.count("x") == 2


def test_browse_buckets(dataset, own, tmp_path):
    (own / "metadata.csv").write_text(
        "path,text,num_frames,height,width\n0.mkv,a,20,16,16\n1.mkv,b,2,16,16\n2.mkv,c,30,16,16\n"
    )
    config = tmp_path / "bucketed.py"
    config.write_text(
        f"""
train_dataloader = dict(
    num_workers=0, batch_size=1,
    sampler=dict(type="EpochSampler"),
    batch_sampler=dict(
        type="BucketBatchSampler",
        buckets=dict(type="Buckets", sizes=[(1, 16), (8, 16)], ratios=[1.0], factor=(1, 8, 8)),
    ),
    dataset=dict(
        type="AnnotatedVideos", data_root={str(own)!r},
        pipeline=[dict(type="BucketFrames"), dict(type="DecodeVideo"),
                  dict(type="BucketCrop"), dict(type="PackVideo")],
    ),
)
"""
    )
    dataset.main(["browse", str(config), "--out", str(tmp_path / "sheets")])
    names = sorted(path.name for path in (tmp_path / "sheets").iterdir())
    assert names == ["1x16x16.png", "8x16x16.png"]
    dataset.main(["probe", str(config), "--out", str(tmp_path / "report")])
    report = json.loads((tmp_path / "report/report.json").read_text())
    assert report["buckets"] == {"1 x 16 x 16": 1, "8 x 16 x 16": 2}


def test_latents_are_not_shown(dataset, fails, monkeypatch):
    import torch

    from mmsora.datasets import MovingDigits
    from mmsora.structures.video_sample import VideoSample

    item = {"inputs": torch.zeros(4, 1, 2, 2), "data_samples": VideoSample(index=0)}
    monkeypatch.setattr(MovingDigits, "__getitem__", lambda *_: item)
    assert "browse the config that the cache" in fails("browse", "latte_moving_digits")
