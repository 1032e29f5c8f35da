"""The readers that stand in for PyAV, and how one is chosen."""

import sys
from contextlib import suppress
from types import ModuleType, SimpleNamespace

import av
import cv2
import numpy as np
import pytest
import torch

from mmsora.utils.user_error import UserError
from mmsora.utils.video_io import (
    MediaError,
    opencv_reader,
    probe_video,
    read_video,
    reading,
    write_video,
)

HEIGHT, WIDTH = 32, 48
TORCHCODEC = "mmsora.utils.video_io.torchcodec_reader"


def numbered(frames):
    t, y, x = np.ogrid[:frames, :HEIGHT, :WIDTH]
    clip = (40 + 3 * t + y + x).astype(np.uint8)
    for frame, pixels in enumerate(clip):
        pixels[:, (3 * frame) % WIDTH :][:, :3] = 250
    return np.stack([clip] * 3, axis=-1)


def encode(path, frames, codec="libx264", degrees=0, **options):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=24, options={"g": "12", **options})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        if degrees:
            stream.set_display_rotation(degrees)
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.fixture
def truth(tmp_path):
    """Writes a film and gives its frames as PyAV reads them."""

    def make(name, codec, **options):
        encode(tmp_path / name, numbered(40), codec, **options)
        return read_video(tmp_path / name)

    return make


@pytest.fixture
def opencv(monkeypatch):
    def use():
        monkeypatch.setenv(reading.VARIABLE, "opencv")

    return use


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("clip.mp4", "libx264", {"bf": "2"}),
        ("clip.mkv", "libx264", {"bf": "2"}),
        ("clip.avi", "mpeg4", {"bf": "2"}),
        ("clip.avi", "mpeg4", {}),
        ("clip.webm", "libvpx", {}),
        ("clip.mp4", "libx264", {"degrees": 90}),
    ],
)
def test_opencv_gives_the_same_frames(tmp_path, truth, opencv, name, codec, options):
    expected, info = truth(name, codec, **options), probe_video(tmp_path / name)
    opencv()
    found = probe_video(tmp_path / name)
    assert (found.frames, found[2:4]) == (info.frames, info[2:4])
    assert found.fps == pytest.approx(info.fps, rel=0.01)
    for indices in (None, [39, 0, 7, 7], [5]):
        read = read_video(tmp_path / name, indices)
        wanted = expected if indices is None else expected[indices]
        assert read.shape == wanted.shape
        assert np.abs(read.astype(int) - wanted).max() <= 2  # roundings differ
    content = (tmp_path / name).read_bytes()
    np.testing.assert_array_equal(read_video(content, [5]), read)


def test_opencv_never_seeks(tmp_path, truth, opencv, monkeypatch):
    truth("clip.mp4", "libx264")
    opencv()

    class Capture:
        def __init__(self, *args):
            self.real = cv2.VideoCapture(*args)

        def __getattr__(self, name):
            assert name != "set"
            return getattr(self.real, name)

    monkeypatch.setattr(
        opencv_reader, "cv2", SimpleNamespace(**vars(cv2) | {"VideoCapture": Capture})
    )
    assert len(read_video(tmp_path / "clip.mp4", [30])) == 1


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>" * 100])
def test_what_opencv_cannot_read_is_one_error(tmp_path, opencv, content):
    opencv()
    (tmp_path / "clip.mp4").write_bytes(content)
    with pytest.raises(MediaError, match=r"clip\.mp4: (an empty file|OpenCV can)"):
        read_video(tmp_path / "clip.mp4")


def test_opencv_without_pixels_is_an_error(tmp_path, truth, opencv):
    """OpenCV 5 gives what its memory held for interlaced frames, and no error."""
    truth("clip.mp4", "libx264", flags="+ildct+ilme")
    opencv()
    with suppress(MediaError):
        read = read_video(tmp_path / "clip.mp4")  # another version of OpenCV
        assert np.abs(read.astype(int) - numbered(40)).mean() < 16


def test_a_film_in_which_nothing_moves_is_an_error(tmp_path, opencv):
    encode(tmp_path / "clip.mp4", np.zeros_like(numbered(5)))
    opencv()
    with pytest.raises(
        MediaError, match="the same picture for all frames; PyAV may: pip install av"
    ):
        read_video(tmp_path / "clip.mp4")


def test_a_cut_film_is_an_error_of_every_reader(tmp_path, opencv):
    write_video(tmp_path / "clip.mp4", numbered(40), 10)
    content = (tmp_path / "clip.mp4").read_bytes()
    opencv()
    with pytest.raises(MediaError, match="the file is cut"):
        read_video(content[: len(content) * 3 // 4])


def test_fewer_frames_than_were_counted(tmp_path, truth, opencv):
    truth("clip.mp4", "libx264")
    opencv()
    real = probe_video(tmp_path / "clip.mp4")
    media = reading.Media(tmp_path / "clip.mp4")
    reading._known.put(("opencv", *media.key()), reading.Index(real._replace(frames=60)))
    with pytest.raises(MediaError, match="of 60 frames only 40 can be decoded"):
        read_video(tmp_path / "clip.mp4", [3, 45])


@pytest.fixture
def unchosen():
    reading._working.cache_clear()
    yield
    reading._working.cache_clear()


@pytest.mark.parametrize("error", [ImportError("no av"), OSError("no .so"), RuntimeError("ABI")])
def test_opencv_is_chosen_where_pyav_is_missing(unchosen, monkeypatch, error):
    said = []

    def fail(name):
        if name.endswith("pyav_reader"):
            raise error
        return sys.modules[name]

    monkeypatch.delenv(reading.VARIABLE, raising=False)
    monkeypatch.setattr(reading, "import_module", fail)
    monkeypatch.setattr(reading, "print_log", lambda text, **more: said.append(text))
    assert [reading._reader(), reading._reader()] == ["opencv", "opencv"]
    assert len(said) == 1
    assert str(error) in said[0]
    assert "pip install av" in said[0]


def test_the_choice_of_a_reader(unchosen, monkeypatch):
    monkeypatch.delenv(reading.VARIABLE, raising=False)
    assert reading._reader() == "pyav"
    monkeypatch.setenv(reading.VARIABLE, "opencv")
    assert reading._reader() == "opencv"
    monkeypatch.setenv(reading.VARIABLE, "decord")
    with pytest.raises(UserError, match="MMSORA_VIDEO_READER.*torchcodec, got 'decord'"):
        reading._reader()


def test_a_missing_torchcodec_says_what_to_install(unchosen, monkeypatch):
    monkeypatch.setenv(reading.VARIABLE, "torchcodec")
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    monkeypatch.delitem(sys.modules, TORCHCODEC, raising=False)
    with pytest.raises(UserError, match="pip install torchcodec"):
        read_video("clip.mp4")


class FakeDecoder:
    """Behaves as TorchCodec's VideoDecoder does."""

    def __init__(self, source, *, dimension_order, num_ffmpeg_threads, seek_mode):
        assert (dimension_order, num_ffmpeg_threads, seek_mode) == ("NHWC", 1, "exact")
        self.frames = torch.from_numpy(numbered(40))
        if isinstance(source, bytes) and b"bad" in source:
            raise RuntimeError("Invalid data\nand a long explanation")
        self.metadata = SimpleNamespace(num_frames=40, average_fps=24.0)

    def __getitem__(self, number):
        return self.frames[number]

    def get_frames_at(self, indices):
        return SimpleNamespace(data=self.frames[indices])


@pytest.fixture
def torchcodec(unchosen, monkeypatch):
    package, decoders = ModuleType("torchcodec"), ModuleType("torchcodec.decoders")
    decoders.VideoDecoder = FakeDecoder
    monkeypatch.setitem(sys.modules, "torchcodec", package)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", decoders)
    monkeypatch.setenv(reading.VARIABLE, "torchcodec")
    monkeypatch.delitem(sys.modules, TORCHCODEC, raising=False)
    yield
    sys.modules.pop(TORCHCODEC, None)


def test_torchcodec(torchcodec):
    content = b"\x00\x00\x00\x08ftyp"
    assert probe_video(content) == (40, 24.0, HEIGHT, WIDTH, 40 / 24)
    indices = [39, 3, 3, *range(38)]
    np.testing.assert_array_equal(read_video(content, indices), numbered(40)[indices])
    with pytest.raises(MediaError, match=r"a\.mp4: Invalid data$"):
        read_video(content + b"bad", name="a.mp4")


def test_torchcodec_is_not_trusted_with_other_containers(torchcodec):
    with pytest.raises(MediaError, match="mp4, mov, mkv and webm alone"):
        read_video(b"RIFF\x04\x00\x00\x00AVI ")
