"""Lists of captioned clips, in the formats and by the names that others use."""

import csv
import json

import numpy as np
import pytest
from mmengine.registry import init_default_scope
from PIL import Image

from mmsora.datasets import records
from mmsora.datasets.buckets import shapes_of
from mmsora.registry import DATASETS
from mmsora.utils.user_error import UserError
from mmsora.utils.video_io import write_video

PIPELINE = [
    dict(type="SampleFrames", num_frames=2),
    dict(type="DecodeVideo"),
    dict(type="PackVideo"),
]
TEXTS = ["a museum, at night", 'sea "and" sand', "forêt 森"]


@pytest.fixture(autouse=True)
def scope():
    init_default_scope("mmsora")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Three clips videos/{0,1,2}.gif of 6 frames of the grey levels 10 n + t."""
    root = tmp_path_factory.mktemp("clips")
    for number in range(3):
        frames = 10 * number + np.arange(6, dtype=np.uint8).reshape(6, 1, 1)
        write_video(root / f"videos/{number}.gif", np.broadcast_to(frames, (6, 16, 24)), 8)
    return root


@pytest.fixture
def root(clips, tmp_path):
    (tmp_path / "videos").symlink_to(clips / "videos")
    return tmp_path


def build(root, **arguments):
    cfg = dict(type="AnnotatedVideos", data_root=str(root), pipeline=PIPELINE)
    return DATASETS.build(cfg | arguments)


def rows(path="path", text="text", **more):
    return [
        {path: f"videos/{number}.gif", text: caption} | more
        for number, caption in enumerate(TEXTS)
    ]


def write_csv(path, entries, delimiter=","):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(entries[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(entries)


def write_json(path, entries):
    path.write_text(json.dumps(entries), encoding="utf-8")


def write_jsonl(path, entries):
    lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    path.write_text(lines + "\n", encoding="utf-8")


def write_parquet(path, entries):
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="Parquet needs pyarrow")
    parquet.write_table(pyarrow.Table.from_pylist(entries), path)


WRITERS = {
    "csv": write_csv,
    "tsv": lambda path, entries: write_csv(path, entries, "\t"),
    "json": write_json,
    "jsonl": write_jsonl,
    "parquet": write_parquet,
}


def texts(dataset):
    return [item["data_samples"].text for item in dataset]


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("path", "text"),  # Open-Sora, Pixabay100
        ("path", "cap"),  # Open-Sora-Plan
        ("file_name", "caption"),  # Hugging Face, finetrainers
        ("video", "prompt"),
        ("video_path", "caption"),
    ],
)
def test_formats_and_names(root, kind, path, text):
    WRITERS[kind](root / f"metadata.{kind}", rows(path, text))
    dataset = build(root, test_mode=True)
    assert texts(dataset) == TEXTS
    for number, item in enumerate(dataset):
        assert item["data_samples"].path == f"{root}/videos/{number}.gif"
        assert item["inputs"][0, :, 0, 0].tolist() == [10 * number, 10 * number + 1]


@pytest.mark.parametrize("kind", WRITERS)
def test_other_files_and_names_can_be_given(root, kind):
    (root / "lists").mkdir()
    entries = rows("clip", "long", prompt="short", label=7)
    WRITERS[kind](root / f"lists/mine.{kind}", entries)
    dataset = build(
        root, ann_file=f"lists/mine.{kind}", columns=dict(path="clip", text="long", label=None)
    )
    assert texts(dataset) == TEXTS
    assert "label" not in dataset[0]["data_samples"]
    assert texts(build(root, ann_file=f"lists/mine.{kind}", columns=dict(path="clip")))[0] == (
        "short"
    )


def test_the_columns_of_open_sora(root):
    entries = rows(num_frames=6, height=16, width=24, aspect_ratio=0.67, resolution=384, fps=8)
    write_csv(root / "train.csv", entries)
    assert shapes_of(build(root, ann_file="train.csv")).tolist() == [[6, 16, 24]] * 3
    entries[1]["height"] = ""
    write_csv(root / "train.csv", entries)
    dataset = build(root, ann_file="train.csv")
    with pytest.raises(UserError, match="1.gif: .* height=None"):
        shapes_of(dataset)
    assert len(dataset) == 3


def test_the_lists_of_open_sora_plan(root):
    size = {"height": 16, "width": 24}
    one = [
        {"path": "0.gif", "cap": ["first", "second"], "resolution": size, "num_frames": 6},
        {"path": "1.gif", "cap": "alone", "resolution": size, "num_frames": 6, "cut": [2, 5]},
    ]
    two = [{"path": "videos/2.gif", "cap": ["x"], "crop": [4, 12, 0, 6], "num_frames": 6}]
    write_json(root / "one.json", one)
    write_json(root / "two.json", two)
    (root / "merge_data.txt").write_text(f"{root}/videos,one.json\n,two.json\n")
    dataset = build(root)
    assert shapes_of(dataset).tolist() == [[6, 16, 24], [3, 16, 24], [6, 6, 8]]
    assert {dataset[3 * epoch]["data_samples"].text for epoch in range(30)} == {"first", "second"}
    starts = {int(dataset[1 + 3 * epoch]["inputs"][0, 0, 0, 0]) for epoch in range(30)}
    assert starts == {12, 13}  # of frames 2, 3 and 4
    assert dataset[2]["inputs"].shape == (3, 2, 6, 8)
    whole = build(root, pipeline=PIPELINE[1:])
    assert whole[1]["inputs"][0, :, 0, 0].tolist() == [12, 13, 14]


def test_captions_are_drawn_and_the_first_in_test_mode(root):
    write_json(root / "metadata.json", [{"path": "videos/0.gif", "text": ["a", "b", "c"]}])
    assert {build(root)[epoch]["data_samples"].text for epoch in range(40)} == {"a", "b", "c"}
    assert {build(root, test_mode=True)[n]["data_samples"].text for n in range(40)} == {"a"}


@pytest.mark.parametrize(
    "names", [("prompts.txt", "videos.txt"), ("caption.txt", "video.txt"), ("prompt.txt",) * 2]
)
def test_lines_of_two_files(root, names):
    prompts, videos = names
    (root / videos).write_text("".join(f"videos/{n}.gif\n" for n in range(3)))
    if prompts == videos:
        with pytest.raises(UserError, match=r"prompt.txt: has no videos.txt beside it"):
            build(root)
        return
    (root / prompts).write_text("\n".join(TEXTS), encoding="utf-8")
    assert texts(build(root)) == TEXTS
    (root / prompts).write_text("one\ntwo\n")
    with pytest.raises(UserError, match=f"{prompts}: 2 lines, .*{videos} has 3"):
        build(root)


def test_pairs(clips, tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    for number, name in enumerate(["a/x", "a/b/y", "z"]):
        (tmp_path / f"{name}.gif").symlink_to(clips / f"videos/{number}.gif")
        (tmp_path / f"{name}.txt").write_text(TEXTS[number] + "\n", encoding="utf-8")
    (tmp_path / "alone.gif").symlink_to(clips / "videos/0.gif")
    (tmp_path / "readme.txt").write_text("of no clip")
    dataset = build(tmp_path)
    assert {item["data_samples"].path: item["data_samples"].text for item in dataset} == {
        f"{tmp_path}/{name}.gif": text
        for name, text in zip(["a/x", "a/b/y", "z"], TEXTS, strict=True)
    }


def test_images_are_videos_of_one_frame(tmp_path):
    Image.fromarray(np.full((16, 24, 3), 90, np.uint8)).save(tmp_path / "a.jpg")
    Image.fromarray(np.full((16, 24, 3), 80, np.uint8)).save(tmp_path / "b.png")
    entries = [{"file_name": "a.jpg", "text": "a"}, {"file_name": "b.png", "text": "b"}]
    write_jsonl(tmp_path / "metadata.jsonl", entries)
    dataset = build(tmp_path, pipeline=[dict(type="SampleFrames", num_frames=1), *PIPELINE[1:]])
    assert [item["inputs"].shape for item in dataset] == [(3, 1, 16, 24)] * 2
    assert [int(item["inputs"].float().mean().round()) for item in dataset] == [90, 80]


def test_a_list_without_captions(root):
    write_csv(root / "metadata.csv", [{"path": "videos/0.gif", "label": 4}])
    (item,) = build(root)
    assert "text" not in item["data_samples"]
    assert item["data_samples"].label == 4


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("metadata.csv", "", "metadata.csv: an empty list"),
        (
            "metadata.csv",
            "a,b\n1,2\n",
            "none of the columns a, b is known to .*columns.path",
        ),
        ("metadata.csv", "path,text\nx.mp4\n", "row 2 has fewer cells"),
        ("metadata.csv", "path,text\nx.mp4,a,b\n", "row 2 has more cells"),
        ("metadata.csv", "path,text\n,a\n", "entry 0: has no path"),
        ("metadata.csv", "path,height\nx.mp4,tall\n", "entry 0: height is 'tall', not a whole"),
        ("metadata.json", '[{"path": "x", "cut": [1]}]', r"cut is \[1\], not 2 whole numbers"),
        (
            "metadata.json",
            '{"path": "x"}',
            "a list of objects is needed, got a dict",
        ),
        ("metadata.json", "[1]", "entry 0 is a int; a list of objects"),
        ("metadata.json", "[", "metadata.json: not valid JSON"),
        ("metadata.jsonl", '{"path": "x"}\n{', "metadata.jsonl: not valid JSONL"),
        ("merge_data.txt", "folder list.json", "a line is FOLDER,LIST"),
        ("merge_data.txt", "folder,list.json", "list.json: No such file"),
        ("readme.md", "", "no list .metadata.csv, .* and no pairs such as a.mp4 and a.txt"),
    ],
)
def test_lists_that_make_no_sense(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=words) as caught:
        build(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_wrong_arguments(root):
    write_csv(root / "metadata.csv", rows())
    with pytest.raises(UserError, match="columns.text='captoin', but there are path, text"):
        build(root, columns=dict(text="captoin"))
    with pytest.raises(ValueError, match="'caption' is none of them"):
        build(root, columns=dict(caption="text"))
    with pytest.raises(UserError, match="missing.csv: No such file"):
        build(root, ann_file="missing.csv")
    with pytest.raises(UserError, match=r"list.xls: a list ends in .csv, .tsv"):
        build(root, ann_file="list.xls")
    with pytest.raises(UserError, match="missing: no such folder"):
        build(root / "missing")
    write_json(root / "metadata.json", rows())
    with pytest.raises(UserError, match=r"has metadata.csv and metadata.json; say which"):
        build(root)


@pytest.mark.parametrize("error", [ImportError, OSError, RuntimeError])
def test_parquet_without_pyarrow(root, monkeypatch, error):
    (root / "metadata.parquet").touch()

    def fail(name):
        raise error("broken")

    monkeypatch.setattr(records.importlib, "import_module", fail)
    with pytest.raises(UserError, match="metadata.parquet: Parquet needs pyarrow: pip install"):
        build(root)


def test_a_broken_parquet_file(root):
    pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    (root / "metadata.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="metadata.parquet: not valid PARQUET"):
        build(root)
