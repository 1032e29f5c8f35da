"""``tools/prepare``: unpacking, what is said of whole and of broken trees, and cleaning."""

import csv
import io
import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmsora.utils.unpack import unpack
from mmsora.utils.user_error import UserError
from mmsora.utils.video_io import write_image, write_video

ROOT = Path(__file__).parents[2]
TOOLS = sorted(path.stem for path in (ROOT / "tools/prepare").glob("*.py"))
NOISE = np.random.default_rng(0)


@pytest.mark.parametrize("name", TOOLS)
def test_help_imports_no_torch(name):
    code = (
        f"import sys, runpy; sys.argv = ['x', '--help']\n"
        f"try: runpy.run_path('tools/prepare/{name}.py', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print(*{'torch', 'mmengine', 'cv2', 'numpy', 'scenedetect'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "", done.stderr


@pytest.fixture
def run(tool, capsys):
    """Call it with a tool and arguments to get its exit code and what it printed."""

    def call(name, *arguments):
        code = tool(f"prepare/{name}").main([str(argument) for argument in arguments])
        return code, capsys.readouterr().out

    return call


@pytest.fixture
def fails(tool, capsys):
    """The one line on stderr."""

    def call(name, *arguments):
        with pytest.raises(SystemExit) as caught:
            tool(f"prepare/{name}").main([str(argument) for argument in arguments])
        assert caught.value.code == 2
        return capsys.readouterr().err

    return call


# Unpacking


def tarred(files, mode="w"):
    """A tar file with these contents by name."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


FILES = {"a/1.txt": NOISE.bytes(5000), "a/b/2.txt": b"two", "empty": b""}


def unpacked(folder):
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.mark.parametrize("parts", [1, 3])
def test_tar_files_in_parts(tmp_path, parts):
    content = tarred(FILES, "w:gz")
    cuts = np.linspace(0, len(content), parts + 1).astype(int)
    paths = [tmp_path / f"x.tar.gz.{number:05d}" for number in range(parts)]
    for path, begin, end in zip(paths, cuts, cuts[1:], strict=False):
        path.write_bytes(content[begin:end])
    assert unpack(paths, tmp_path / "out") == 3
    assert unpacked(tmp_path / "out") == FILES


def test_tar_files_in_tar_files(tmp_path):
    (tmp_path / "x.tar").write_bytes(tarred({"n01.tar": tarred(FILES), "3": b"three"}))
    unpack([tmp_path / "x.tar"], tmp_path / "out")
    assert unpacked(tmp_path / "out") == {
        **{f"n01/{k}": v for k, v in FILES.items()},
        "3": b"three",
    }


def test_what_is_there_stays_and_what_is_cut_short_is_made_anew(tmp_path):
    (tmp_path / "x.tar").write_bytes(tarred(FILES))
    unpack([tmp_path / "x.tar"], tmp_path / "out")
    kept, cut = tmp_path / "out/a/b/2.txt", tmp_path / "out/a/1.txt"
    kept.write_bytes(b"TWO")
    cut.write_bytes(b"short")
    unpack([tmp_path / "x.tar"], tmp_path / "out")
    assert unpacked(tmp_path / "out") == {**FILES, "a/b/2.txt": b"TWO"}


def test_an_archive_that_ends_early(tmp_path):
    (tmp_path / "x.tar").write_bytes(tarred(FILES)[:3000])
    with pytest.raises(UserError, match="not a whole zip or tar file"):
        unpack([tmp_path / "x.tar"], tmp_path / "out")
    assert unpacked(tmp_path / "out") == {}  # no piece of a file, hidden or not


@pytest.mark.parametrize("name", ["../x", "/x"])
def test_names_that_lead_out(tmp_path, name):
    (tmp_path / "x.tar").write_bytes(tarred({name: b""}))
    with pytest.raises(UserError, match="leads out of"):
        unpack([tmp_path / "x.tar"], tmp_path / "out")


def test_links_are_left_out(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        info = tarfile.TarInfo("link")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    assert unpack([tmp_path / "x.tar"], tmp_path / "out") == 0


# Folders of frames


def frames(folder, count, size=(36, 64), skip=()):
    for number in set(range(count)) - set(skip):
        pixels = np.full((*size, 3), number, np.uint8)
        write_image(folder / f"{folder.name}_{number:08d}.png", pixels)


def test_skytimelapse(run, tmp_path):
    source = tmp_path / "source"
    frames(source / "sky_timelapse/sky_train/x/x_1", 50)
    frames(source / "sky_timelapse/sky_train/x/x_2", 49)
    frames(source / "sky_timelapse/sky_train/y/y_1", 50, skip=(20, 21))
    with zipfile.ZipFile(tmp_path / "sky.zip", "w") as archive:
        for path in source.rglob("*.png"):
            archive.write(path, path.relative_to(source))
        archive.writestr("sky_timelapse/readme.txt", "left out")
    root = tmp_path / "sky"
    code, printed = run("skytimelapse", "--root", root, "--archive", tmp_path / "sky.zip")
    assert code == 0
    assert not list(root.rglob("*.txt"))
    for words in (
        "sky_train: 3 clips",
        "48 to 50 in a clip",
        "pixels    36 x 64",
        "2 clips have 49 frames or more",
        "warning: 1 clips miss frames by their numbers, the first is y/y_1",
        "3 of 3 can be read",
    ):
        assert words in printed
    broken = root / "sky_train/x/x_1/x_1_00000007.png"
    broken.write_bytes(broken.read_bytes()[:40])
    assert run("skytimelapse", "--root", root)[0] == 0  # not looked at
    code, printed = run("skytimelapse", "--root", root, "--decode")
    assert code == 1
    assert "unreadable: x/x_1: " in printed


def test_taichi(run, tmp_path):
    frames(tmp_path / "frames/train/a", 3, (256, 256))
    code, printed = run("taichi", "--root", tmp_path)
    assert (code, "warning" in printed) == (0, False)
    assert "frames/train: 1 clips" in printed
    frames(tmp_path / "frames/test/b", 3, (20, 20))
    code, printed = run("taichi", "--root", tmp_path)
    assert "warning: frames/test: Latte does not resize" in printed


@pytest.mark.parametrize("name", ["skytimelapse", "taichi", "faceforensics"])
def test_no_tree_is_one_line(fails, tmp_path, name):
    assert "no such folder; unpack the dataset" in fails(name, "--root", tmp_path / "nowhere")


# Videos


def video(path, count, level=0):
    write_video(path, np.full((count, 32, 48, 3), level, np.uint8), 10)


def test_faceforensics(run, tmp_path):
    video(tmp_path / "train/videos/a.mp4", 16)
    video(tmp_path / "train/videos/b.mp4", 15)
    code, printed = run("faceforensics", "--root", tmp_path)
    assert code == 0
    assert "warning: videos/b.mp4: fewer than 16 frames" in printed
    assert "a.mp4: fewer" not in printed
    (tmp_path / "train/videos/c.mp4").write_bytes(b"")
    code, printed = run("faceforensics", "--root", tmp_path)
    assert code == 1
    assert "unreadable: videos/c.mp4: an empty file" in printed


def test_pixabay100(run, fails, tmp_path):
    assert "metadata.json" in fails("pixabay100", "--root", tmp_path)
    video(tmp_path / "videos/a (1080p).mp4", 4)
    names = ("a (1080p)", "b (Original)")
    entries = [{"path": f"videos/{name}.mp4", "text": "x, y"} for name in names]
    (tmp_path / "metadata.json").write_text(json.dumps(entries))
    code, printed = run("pixabay100", "--root", tmp_path)
    assert code == 1
    assert "1 of 2 videos are still to be downloaded" in printed
    assert "warning: Pixabay100 has 100 clips, the list names 2" in printed
    assert "unreadable: videos/b (Original).mp4: " in printed


# ImageNet


def jpeg(level):
    file = io.BytesIO()
    Image.fromarray(np.full((8, 9, 3), level, np.uint8)).save(file, "jpeg")
    return file.getvalue()


def labels(root, split):
    from mmsora.datasets import ImageNetFolder

    images = ImageNetFolder(str(root), split=split)
    infos = (images.get_data_info(number) for number in range(len(images)))
    return {info["path"]: info["label"] for info in infos}


def test_imagenet_of_its_own_site(run, tmp_path):
    classes = {f"{wnid}.tar": tarred({f"{wnid}_1.JPEG": jpeg(9)}) for wnid in ("n02", "n01")}
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(tarred(classes))
    (tmp_path / "ILSVRC2012_img_val.tar").write_bytes(tarred({"v_1.JPEG": jpeg(1)}))
    lists = {"./val.txt": b"v_1.JPEG 1\n", "synsets.txt": b"n01\n"}
    (tmp_path / "caffe_ilsvrc12.tar.gz").write_bytes(tarred(lists, "w:gz"))
    archives = sorted(tmp_path.glob("*.tar*"))
    root = tmp_path / "imagenet"
    code, printed = run("imagenet", "--root", root, "--archives", *archives)
    assert code == 0
    assert labels(root, "train") == {"train/n01/n01_1.JPEG": 0, "train/n02/n02_1.JPEG": 1}
    assert labels(root, "val") == {"val/v_1.JPEG": 1}
    assert sorted(path.name for path in (root / "meta").iterdir()) == ["val.txt"]
    assert "train: 2 images in 2 classes" in printed
    assert "warning: ImageNet-1K has 1,281,167 images there" in printed


def test_imagenet_of_opendatalab(run, fails, tmp_path):
    files = {
        "ImageNet-1K/train/n01/a.JPEG": jpeg(9),
        "ImageNet-1K/val/v.JPEG": jpeg(1),
        "ImageNet-1K/test/t.JPEG": jpeg(2),
        "ImageNet-1K/meta/val.txt": b"v.JPEG 0\n",
    }
    content = tarred(files, "w:gz")
    parts = [tmp_path / f"ImageNet-1K.tar.gz.0000{number}" for number in (0, 1)]
    parts[0].write_bytes(content[:300])
    parts[1].write_bytes(content[300:])
    root = tmp_path / "imagenet"
    code, printed = run("imagenet", "--root", root, "--archives", *reversed(parts), "--decode")
    assert code == 0
    assert labels(root, "val") == {"val/v.JPEG": 0}
    assert not (root / "test").exists()
    (root / "train/n01/a.JPEG").write_bytes(jpeg(9)[:100])
    code, printed = run("imagenet", "--root", root, "--decode")
    assert code == 1
    assert "unreadable: train/n01/a.JPEG: " in printed
    assert "no such file" in fails("imagenet", "--root", root, "--archives", tmp_path / "none")


# Cleaning


def moving(count, seed, height=64, width=96):
    """A blurred scene of its own, panning."""
    noise = np.random.default_rng(seed).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    large = Image.fromarray(noise).resize((2 * width, height), Image.Resampling.BICUBIC)
    picture = np.asarray(large)
    return np.stack([picture[:, t : t + width] for t in range(count)])


@pytest.fixture(scope="module")
def mess(tmp_path_factory):
    """Videos with something wrong with each but the first."""
    root = tmp_path_factory.mktemp("mess")
    good = moving(40, 0)
    write_video(root / "a.mkv", good, 10)
    write_video(root / "b_copy.mp4", good, 10)
    write_video(
        root / "c_cuts.mkv", np.concatenate([moving(20, 1), moving(10, 7), moving(20, 2)]), 10
    )
    write_video(root / "c_turns.mkv", np.concatenate([good[:20], good[20:0:-1]]), 10)
    write_video(root / "d_dark.mkv", good // 32, 10)
    write_video(root / "e_bright.mkv", 255 - moving(20, 3) // 32, 10)
    write_video(root / "f_static.mkv", np.repeat(moving(1, 4), 20, axis=0), 10)
    write_video(root / "g_small.mkv", moving(20, 5, 32, 48), 10)
    write_video(root / "h_short.mkv", moving(15, 6), 10)
    (root / "i_broken.mkv").write_bytes((root / "a.mkv").read_bytes()[:3000])
    write_image(root / "image.png", good[0])
    texts = "".join(f"{path.name},about {path.stem}\n" for path in sorted(root.iterdir()))
    (root / "metadata.csv").write_text("path,text\n" + texts)
    return root


@pytest.fixture
def clean(run, mess, tmp_path):
    """Call it with options to get the rows of the list and the entries of what is kept."""

    def call(*options, root=mess):
        out = tmp_path / "clean.csv"
        run("clean_videos", root, "--out", out, "--workers", 2, *options)
        with out.open(newline="") as file:
            rows = list(csv.DictReader(file))
        lines = out.with_suffix(".jsonl").read_text().splitlines()
        return rows, [json.loads(line) for line in lines]

    return call


def test_what_is_kept_and_why_not(clean, mess):
    pytest.importorskip("scenedetect", reason="scenes need PySceneDetect")
    before = {path: path.read_bytes() for path in mess.iterdir()}
    rows, kept = clean("--min-side", 64)
    assert list(rows[0]) == [
        "path",
        "start",
        "end",
        "num_frames",
        "height",
        "width",
        "fps",
        "kept",
        "reason",
    ]
    told = [(r["path"], r["start"], r["end"], r["kept"], r["reason"].split(":")[0]) for r in rows]
    assert told == [
        ("a.mkv", "0", "40", "1", ""),
        ("b_copy.mp4", "0", "40", "0", "duplicate"),
        ("c_cuts.mkv", "0", "20", "1", ""),
        ("c_cuts.mkv", "20", "30", "0", "short"),
        ("c_cuts.mkv", "30", "50", "1", ""),
        ("c_turns.mkv", "0", "40", "1", ""),  # begins as a.mkv does, and ends otherwise
        ("d_dark.mkv", "0", "40", "0", "dark"),
        ("e_bright.mkv", "0", "20", "0", "bright"),
        ("f_static.mkv", "0", "20", "0", "static"),
        ("g_small.mkv", "0", "20", "0", "small"),
        ("h_short.mkv", "0", "15", "0", "short"),
        ("i_broken.mkv", "0", "0", "0", "unreadable"),
    ]
    assert rows[1]["reason"] == "duplicate: a.mkv 0-40"
    assert (rows[0]["num_frames"], rows[0]["height"], rows[0]["width"]) == ("40", "64", "96")
    assert float(rows[0]["fps"]) == 10
    assert [(one["path"], one["cut"], one["text"]) for one in kept] == [
        ("a.mkv", [0, 40], "about a"),
        ("c_cuts.mkv", [0, 20], "about c_cuts"),
        ("c_cuts.mkv", [30, 50], "about c_cuts"),
        ("c_turns.mkv", [0, 40], "about c_turns"),
    ]
    assert {path: path.read_bytes() for path in mess.iterdir()} == before


def test_what_is_kept_can_be_trained_on(clean, mess, tmp_path):
    pytest.importorskip("scenedetect", reason="scenes need PySceneDetect")
    from mmsora.datasets import AnnotatedVideos, DecodeVideo, shapes_of

    clean("--min-side", 64)
    listed = str(tmp_path / "clean.jsonl")
    scenes = AnnotatedVideos(str(mess), [DecodeVideo()], ann_file=listed)
    assert shapes_of(scenes).tolist() == [[40, 64, 96], [20, 64, 96], [20, 64, 96], [40, 64, 96]]
    np.testing.assert_array_equal(scenes[2]["frames"], moving(20, 2))


def test_limits(clean, monkeypatch):
    monkeypatch.setitem(sys.modules, "scenedetect", None)  # not needed
    rows, kept = clean("--no-scenes", "--min-side", 32, "--min-frames", 1, "--duplicates", -1)
    assert [one["path"][0] for one in kept] == list("abccgh")
    assert kept[2]["cut"] == [0, 50]
    limits = "--brightness", 0, 255, "--min-motion", 0, "--min-seconds", 2, "--max-seconds", 3.9
    rows, kept = clean("--no-scenes", "--min-side", 32, *limits)
    assert [one["path"][0] for one in kept] == list("efg")
    assert {r["path"][0]: r["reason"] for r in rows}["a"] == "long: 4.00 s"
    assert {r["path"][0]: r["reason"] for r in rows}["h"] == "short: 15 frames"


def test_scenes_need_pyscenedetect(fails, mess, monkeypatch):
    monkeypatch.setitem(sys.modules, "scenedetect", None)
    assert "pip install scenedetect, or --no-scenes" in fails("clean_videos", mess)
    assert not (mess / "clean.csv").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--duplicates", "12"], "from -1 to 11"),
        (["--out", "list.txt"], "must end in .csv"),
        (["--workers", "0"], "at least 1"),
        (["--ann-file", "gone.csv"], "gone.csv"),
    ],
)
def test_mistakes(fails, mess, options, words):
    assert words in fails("clean_videos", mess, *options)


def test_near_duplicates_are_found_by_bands(tool):
    known = tool("prepare/clean_videos").Known(8)
    first = NOISE.bytes(24)
    assert known.same(first, "first") == ""
    number = int.from_bytes(first, "big")
    flips = [1 << (16 * n) for n in range(9)]
    near = (number ^ sum(flips[:8])).to_bytes(24, "big")
    far = (number ^ sum(flips)).to_bytes(24, "big")
    assert known.same(near, "near") == "first"
    assert known.same(far, "far") == ""
    assert tool("prepare/clean_videos").Known(-1).same(first, "x") == ""
