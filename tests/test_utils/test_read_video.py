"""The reader gives exactly the frames asked for, whatever the file, or one error."""

import io
import os
import pickle
import tempfile
from contextlib import suppress
from fractions import Fraction
from functools import cache
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import VideoReformatter
from PIL import Image

from mmsora.utils.video_io import (
    MediaError,
    probe_video,
    pyav_reader,
    read_image,
    read_video,
    reading,
    write_video,
)
from mmsora.utils.video_io.media import Index, Media, VideoInfo

CLIPS = Path(__file__).parents[2].parent / "shared/data/clips"
GIFS = CLIPS.parent / "captioned_gifs"
HEIGHT, WIDTH = 32, 48


def numbered(frames):
    """Frames that all differ: a bright bar moves over a pattern that brightens."""
    t, y, x = np.ogrid[:frames, :HEIGHT, :WIDTH]
    clip = (40 + 3 * (t % 20) + y + x).astype(np.uint8) + np.zeros((1, HEIGHT, WIDTH), np.uint8)
    for frame, pixels in enumerate(clip):
        pixels[:, (3 * frame) % WIDTH :][:, :3] = 250
        pixels[: 4 + 4 * (frame // 16 % 4)] = 10
    return np.stack([clip] * 3, axis=-1)


def encode(path, frames, times=None, codec="libx264", degrees=0, pixels="yuv420p", **options):
    """Writes frames at the given times (in 1/600 s), 24 of them a second by default."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=24, options={**options})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixels
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 600)
        if degrees:
            stream.set_display_rotation(degrees)  # counter-clockwise, to be applied when shown
        for number, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = int(times[number]), Fraction(1, 600)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def decoded(path):
    """What a decode from start to end gives, without the reader."""
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack(frames)


def patterns(total):
    """Ways to ask for frames."""
    rng = np.random.default_rng(0)
    yield "first", [0]
    yield "last", [total - 1]
    yield "none", []
    yield "every", list(range(total))
    yield "backwards", list(range(total))[::-3]
    yield "stride", list(range(total // 3, total, 3))
    yield "repeated", [total // 2, 0, total // 2, total // 2]
    yield "far apart", [0, total // 2, total - 1]
    for number in range(6):
        yield f"random {number}", rng.integers(0, total, 5).tolist()


def check(path, truth):
    """Holds every pattern against the frames of a sequential decode."""
    assert probe_video(path).frames == len(truth)
    assert probe_video(path)[2:4] == truth.shape[1:3]
    np.testing.assert_array_equal(read_video(path), truth)
    for name, indices in patterns(len(truth)):
        read = read_video(path, indices)
        assert read.shape == (len(indices), *truth.shape[1:]), name
        assert read.dtype == np.uint8
        np.testing.assert_array_equal(read, truth[indices], err_msg=name)


def h264(**options):
    return lambda path: encode(path, numbered(60), **{"crf": "10", "g": "12", **options})


def vfr(path):
    steps = np.random.default_rng(0).choice([10, 20, 25, 40, 170], 60)
    encode(path, numbered(60), np.cumsum(steps), crf="10", g="12", bf="2")


def edit_list(path, first=7):
    """An mp4 whose edit list hides the frames before number 7, which is no keyframe."""
    source = path.with_name(f"whole{path.suffix}")
    encode(source, numbered(60), crf="10", g="12", bf="2")
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        step = round(1 / 24 / old.streams.video[0].time_base)
        for packet in old.demux(video=0):
            if packet.dts is not None:
                packet.pts -= first * step
                packet.dts -= first * step
                packet.stream = stream
                new.mux(packet)


def av1(path):
    """In a process of its own: its encoder was seen to abort, and would take the tests along."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            options = {"preset": "13", "svtav1-params": "lp=1"}
            encode(path, numbered(20), codec="libsvtav1", **options)
            status = 0
        finally:
            os._exit(status)
    if os.waitpid(child, 0)[1]:
        pytest.skip("the AV1 encoder failed on this machine")


HEVC = "keyint=12:bframes=3:open-gop=1:log-level=none"
FILES = {
    "constant rate": ("clip.mp4", h264(bf="0")),
    "b-frames": ("clip.mp4", h264(bf="3")),
    "open groups": ("clip.mp4", h264(bf="3", **{"x264-params": "open-gop=1:scenecut=0"})),
    "one keyframe": ("clip.mp4", h264(g="600", bf="2")),
    "all keyframes": ("clip.mp4", h264(g="1")),
    "matroska": ("clip.mkv", h264(bf="2")),
    "quicktime": ("clip.mov", h264(bf="2")),
    "transport stream": ("clip.ts", h264(bf="2")),
    "variable rate": ("clip.mp4", vfr),
    "variable rate matroska": ("clip.mkv", vfr),
    "edit list": ("clip.mp4", edit_list),
    "mpeg4 avi": ("clip.avi", lambda path: encode(path, numbered(60), codec="mpeg4", g="12")),
    "mpeg4 avi with b-frames": (
        "clip.avi",
        lambda path: encode(path, numbered(60), codec="mpeg4", g="12", bf="2"),
    ),
    "h264 avi": ("clip.avi", h264(bf="2")),
    "vp9": (
        "clip.webm",
        lambda path: encode(path, numbered(40), codec="libvpx-vp9", g="12", **{"cpu-used": "8"}),
    ),
    "vp8": ("clip.webm", lambda path: encode(path, numbered(40), codec="libvpx", g="12")),
    "interlaced": ("clip.mp4", h264(flags="+ildct+ilme", bf="2")),
    "hevc": (
        "clip.mp4",
        lambda path: encode(path, numbered(40), codec="libx265", **{"x265-params": HEVC}),
    ),
    "av1": ("clip.mp4", av1),
    "gif": ("clip.gif", lambda path: write_video(path, numbered(60), 10)),
    "10 bits": ("clip.mp4", h264(pixels="yuv420p10le", bf="2")),
    "odd size": (
        "clip.mp4",
        lambda path: encode(path, numbered(40)[:, :31, :45], pixels="yuv444p", g="12"),
    ),
    "lossless matroska": ("clip.mkv", lambda path: write_video(path, numbered(30), 10)),
    "written webm": ("clip.webm", lambda path: write_video(path, numbered(30)[:, :31, :45], 10)),
    "animated png": ("clip.png", lambda path: write_video(path, numbered(20), 10)),
    "three frames": ("clip.mp4", lambda path: encode(path, numbered(3), crf="10")),
    "one frame": ("clip.mp4", lambda path: encode(path, numbered(1), crf="10")),
}


@pytest.mark.parametrize("kind", FILES)
def test_frames_are_those_of_a_sequential_decode(tmp_path, kind):
    name, write = FILES[kind]
    write(tmp_path / name)
    check(tmp_path / name, decoded(tmp_path / name))


@pytest.mark.parametrize("kind", ["b-frames", "open groups", "variable rate", "edit list"])
def test_timed_files_are_sought(tmp_path, kind, monkeypatch):
    """And not decoded from the start each time, which would be as right."""
    name, write = FILES[kind]
    write(tmp_path / name)
    truth = decoded(tmp_path / name)
    monkeypatch.setattr(pyav_reader, "_by_decoding", lambda *args: None)
    for indices in ([len(truth) - 1], [30, 5, 33], list(range(20, 50, 3))):
        np.testing.assert_array_equal(read_video(tmp_path / name, indices), truth[indices])


@pytest.mark.parametrize("kind", ["vp8", "interlaced", "mpeg4 avi", "transport stream"])
def test_files_whose_packets_may_be_no_frames_are_counted(tmp_path, kind):
    name, write = FILES[kind]
    write(tmp_path / name)
    assert pyav_reader.scan(Media(tmp_path / name)).times is None


def test_wrong_seeks_are_noticed(tmp_path, monkeypatch):
    encode(tmp_path / "clip.mp4", numbered(60), crf="10", g="12", bf="2")
    truth, sound = decoded(tmp_path / "clip.mp4"), pyav_reader._runs

    def too_late(keys, numbers):
        return [(seek_to + 12 * 512, key, run) for seek_to, key, run in sound(keys, numbers)]

    monkeypatch.setattr(pyav_reader, "_runs", too_late)
    for indices in ([5], [20, 3], [40, 59]):
        np.testing.assert_array_equal(read_video(tmp_path / "clip.mp4", indices), truth[indices])


def test_only_distant_frames_are_sought():
    keys = np.array([[0, -2, 0], [120, 118, 12], [240, 238, 24], [360, 358, 36]])
    runs = pyav_reader._runs
    assert runs(keys, [0, 4, 13, 30]) == [(-2, 0, [0, 4, 13]), (238, 24, [30])]
    expected = [(-2, 0, [5, 12]), (238, 24, [24]), (358, 36, [40])]
    assert runs(keys, [5, 12, 24, 40]) == expected


def test_an_edit_list_hides_frames(tmp_path):
    edit_list(tmp_path / "clip.mp4")
    whole = decoded(tmp_path / "whole.mp4")
    assert probe_video(tmp_path / "clip.mp4").frames == len(whole) - 7
    np.testing.assert_array_equal(read_video(tmp_path / "clip.mp4", [0, 20]), whole[[7, 27]])


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotated_films_are_read_upright(tmp_path, degrees):
    upright = numbered(40)
    lying = np.rot90(upright, -degrees // 90, axes=(1, 2))
    encode(tmp_path / "clip.mp4", lying, degrees=degrees, crf="1", g="12")
    truth = np.rot90(decoded(tmp_path / "clip.mp4"), degrees // 90, axes=(1, 2))
    check(tmp_path / "clip.mp4", truth)
    assert probe_video(tmp_path / "clip.mp4")[2:4] == (HEIGHT, WIDTH)
    assert np.abs(read_video(tmp_path / "clip.mp4", [30])[0] - upright[30].astype(int)).mean() < 8


@pytest.mark.parametrize("name", ["art-museum", "lagos", "man-on-the-cloud", "suv-in-the-dust"])
def test_real_clips(name):
    path = CLIPS / f"{name}.mp4"
    if not path.exists():
        pytest.skip(f"no {path.name} beside the repository")
    thumbnails, times, converter = [], [], VideoReformatter()
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            times.append(frame.time)
            rgb = converter.reformat(frame, format="rgb24")  # much faster than frame.to_ndarray
            thumbnails.append(rgb.to_ndarray()[::8, ::8].copy())
    truth, info = np.stack(thumbnails), probe_video(path)
    assert info.frames == len(truth)
    assert info.fps == pytest.approx((len(times) - 1) / (times[-1] - times[0]))
    assert info.duration == pytest.approx(info.frames / info.fps)
    starts = np.random.default_rng(1).integers(0, len(truth) - 46, 3)
    for start in starts:
        indices = start + 3 * np.arange(16)
        np.testing.assert_array_equal(read_video(path, indices)[:, ::8, ::8], truth[indices])
    few = np.random.default_rng(2).integers(0, len(truth), 6)
    np.testing.assert_array_equal(read_video(path, few)[:, ::8, ::8], truth[few])


def test_the_rate_of_a_variable_rate_film_is_the_mean(tmp_path):
    encode(tmp_path / "clip.mp4", numbered(5), [0, 10, 20, 100, 200], crf="10")
    info = probe_video(tmp_path / "clip.mp4")
    assert info.frames == 5
    assert info.fps == pytest.approx(4 * 600 / 200, rel=1e-3)
    assert info.duration == pytest.approx(5 * 200 / 600 / 4, rel=1e-3)


def test_a_file_is_indexed_once_and_again_when_it_changes(tmp_path, monkeypatch):
    path, calls, real = tmp_path / "clip.mp4", [], pyav_reader.scan
    monkeypatch.setattr(pyav_reader, "scan", lambda media: calls.append(media) or real(media))
    encode(path, numbered(4), crf="10")
    assert probe_video(path).frames == 4
    assert len(read_video(path, [0, 3])) == 2
    assert len(calls) == 1
    encode(path, numbered(9), crf="10")
    assert probe_video(path).frames == 9
    assert len(calls) == 2


@pytest.mark.parametrize("name", ["clip.mp4", "clip.avi"])
def test_frames_that_are_not_there(tmp_path, name):
    codec = {"clip.mp4": "libx264", "clip.avi": "mpeg4"}[name]
    encode(tmp_path / name, numbered(12), codec=codec)
    with pytest.raises(MediaError, match=r"clip\.\w+: no frame 12, the video has 12 frames"):
        read_video(tmp_path / name, [3, 12])
    with pytest.raises(ValueError, match="counted from 0, got -1"):
        read_video(tmp_path / name, [3, -1])
    with pytest.raises(TypeError):
        read_video(tmp_path / name, [0.5])


def write_audio(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def cut(share, name="whole.mp4", **options):
    """A file that ends early; its index stands at its beginning, or none at all."""

    def write(path):
        noise = np.random.default_rng(0).integers(0, 256, (30, 64, 64, 3), np.uint8)
        if options:
            encode(path.with_name(name), noise, **options)
        else:
            write_video(path.with_name(name), noise, 8)
        content = path.with_name(name).read_bytes()
        path.write_bytes(content[: int(len(content) * share)])

    return write


def zeroed(path):
    cut(1)(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) * 2 // 3] = bytes(len(content) // 6)
    path.write_bytes(content)


DAMAGES = {
    "missing": lambda path: None,
    "empty": lambda path: path.write_bytes(b""),
    "html": lambda path: path.write_text("<html>not found</html>" * 100),
    "folder": lambda path: path.mkdir(),
    "audio": write_audio,
    "truncated": cut(0.5),
    "truncated at the end": cut(0.99),
    "truncated before its index": cut(0.9, crf="18"),
    "truncated avi": cut(0.7, "whole.avi", codec="mpeg4"),
    "zeroed": zeroed,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("read", [read_video, lambda path: read_video(path, range(30))])
def test_damaged_files_are_one_error(tmp_path, damage, read):
    path = tmp_path / "clip.mp4"
    DAMAGES[damage](path)
    with pytest.raises(MediaError) as caught:
        read(path)
    assert caught.value.path == path
    assert str(caught.value) == f"{path}: {caught.value.cause}"
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.avi", "clip.mkv", "clip.webm", "clip.gif"])
def test_no_cut_file_passes_for_a_shorter_film(tmp_path, name):
    """Wherever it was cut: FFmpeg says nothing of a cut between two frames, nor of any in mkv."""
    codec = {"clip.avi": "mpeg4", "clip.webm": "libvpx"}.get(name, "libx264")
    if name in ("clip.mp4", "clip.gif"):  # the index of this mp4 stands at its beginning
        write_video(tmp_path / name, numbered(30), 10)
    else:
        encode(tmp_path / name, numbered(30), codec=codec)
    content = (tmp_path / name).read_bytes()
    with av.open(io.BytesIO(content)) as container:
        ends = [packet.pos + packet.size for packet in container.demux(video=0) if packet.size]
    assert len(read_video(content)) == 30
    for end in ends[:-1:7]:
        for cut in (end - 2, end, end + 1):
            with pytest.raises(MediaError):
                read_video(content[:cut], [0], name=name)


def test_no_cut_webp_passes(tmp_path):
    first, *others = map(Image.fromarray, numbered(12))
    first.save(tmp_path / "clip.webp", save_all=True, append_images=others, lossless=True)
    content = (tmp_path / "clip.webp").read_bytes()
    np.testing.assert_array_equal(read_video(content), numbered(12))
    for share in (0.2, 0.5, 0.99):
        with pytest.raises(MediaError, match="the file is cut"):
            read_video(content[: int(share * len(content))])


def test_sizes_that_were_not_known_are_no_cut(tmp_path):
    encode(tmp_path / "clip.avi", numbered(5), codec="mpeg4")
    content = bytearray((tmp_path / "clip.avi").read_bytes())
    content[4:8] = b"\xff" * 4
    assert len(read_video(bytes(content))) == 5
    encode(tmp_path / "clip.mkv", numbered(5))
    content = bytearray((tmp_path / "clip.mkv").read_bytes())
    place = content.index(b"\x18\x53\x80\x67") + 4
    content[place : place + 8] = b"\x01" + b"\xff" * 7
    assert len(read_video(bytes(content))) == 5


@pytest.mark.parametrize("damage", range(60))
def test_flipped_bits(tmp_path, damage):
    """Frames are as in a full sequential decode, or there is one error."""
    rng, path = np.random.default_rng(damage), tmp_path / "clip.mp4"
    content = flippable()
    for place in rng.integers(len(content) // 20, len(content), rng.choice([1, 3, 20])):
        content[place] ^= 1 << rng.integers(8)
    path.write_bytes(content)
    truth = []
    with suppress(av.FFmpegError, ValueError, IndexError), av.open(str(path)) as container:
        truth.extend(f.to_ndarray(format="rgb24") for f in container.decode(video=0))
    for indices in ([0, 3], [30, 33, 36], [55, 50]):
        with suppress(MediaError):
            read = read_video(path, indices)
            assert len(read) == len(indices)
            if max(indices) < len(truth):
                np.testing.assert_array_equal(read, np.stack(truth)[indices])


@cache
def _flippable():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        encode(path, numbered(60), crf="10", g="12", bf="2")
        return path.read_bytes()


def flippable():
    return bytearray(_flippable())


@pytest.mark.parametrize("kind", ["b-frames", "edit list", "mpeg4 avi", "gif", "10 bits", "vp9"])
def test_bytes_are_read_as_files_are(tmp_path, kind):
    name, write = FILES[kind]
    write(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    assert probe_video(content) == probe_video(tmp_path / name)
    for indices in (None, [7, 3, 30]):
        read = read_video(content, indices)
        np.testing.assert_array_equal(read, read_video(tmp_path / name, indices))
    with pytest.raises(MediaError, match=r"^shard\.tar/a\.mp4: "):
        read_video(content[:-30], name="shard.tar/a.mp4")
    with pytest.raises(MediaError, match="^a file in memory: an empty file"):
        probe_video(b"")


def test_transparent_pictures_stand_on_white(tmp_path):
    """As FFmpeg shows them, for all kinds of disposal."""
    images = []
    for step in range(6):
        pixels = np.zeros((20, 30, 4), np.uint8)
        pixels[step : step + 8, 2 * step : 2 * step + 9] = [255, 40 * step, 0, 255]
        images.append(Image.fromarray(pixels))
    for disposal in range(4):
        path, moving = tmp_path / f"{disposal}.gif", {"save_all": True, "duration": 100}
        images[0].save(path, append_images=images[1:], disposal=disposal, **moving)
        read = read_video(path)
        np.testing.assert_array_equal(read, decoded(path))
        assert read[0, -1, -1].tolist() == [255, 255, 255]
    assert probe_video(path).fps == 10


@pytest.mark.skipif(not GIFS.is_dir(), reason=f"the GIFs are not in {GIFS}")
def test_real_gifs():
    for path in sorted(GIFS.glob("*.gif")):
        truth = decoded(path)
        np.testing.assert_array_equal(read_video(path), truth)
        np.testing.assert_array_equal(read_video(path, [40, 3, 62]), truth[[40, 3, 62]])


def test_unreadable_notes_do_not_matter(tmp_path):
    """PyAV alone raises a UnicodeDecodeError."""
    encode(tmp_path / "clip.avi", numbered(5), codec="mpeg4")
    content = (tmp_path / "clip.avi").read_bytes().replace(b"Lavf", b"L\xccvf")
    assert len(read_video(content)) == 5


def test_a_codec_that_nobody_knows(tmp_path):
    encode(tmp_path / "clip.mkv", numbered(5))
    content = (tmp_path / "clip.mkv").read_bytes().replace(b"V_MPEG4/ISO/AVC", b"V_MPEG9/ISO/AVC")
    with pytest.raises(MediaError, match="a codec"):
        read_video(content)


def test_files_that_must_be_counted_are_decoded_once(tmp_path, monkeypatch):
    encode(tmp_path / "clip.avi", numbered(50), codec="mpeg4")
    truth, opened, real = decoded(tmp_path / "clip.avi"), [], av.open
    monkeypatch.setattr(av, "open", lambda *args, **more: opened.append(1) or real(*args, **more))
    assert probe_video(tmp_path / "clip.avi").frames == 50
    assert len(opened) == 2
    np.testing.assert_array_equal(read_video(tmp_path / "clip.avi", [3, 40]), truth[[3, 40]])
    assert len(opened) == 2
    np.testing.assert_array_equal(read_video(tmp_path / "clip.avi", [7]), truth[[7]])
    assert len(opened) == 3
    assert pyav_reader._decoded.kept == ((), [])
    monkeypatch.setattr(pyav_reader, "KEPT_BYTES", 40 * HEIGHT * WIDTH)
    (tmp_path / "clip.avi").touch()
    probe_video(tmp_path / "clip.avi")
    assert pyav_reader._decoded.kept == ((), [])


def test_indices_are_remembered_up_to_a_size(monkeypatch):
    indices = reading._Indices()
    one = Index(VideoInfo(9, 1, 1, 1, 9), np.zeros(900, np.int64))
    monkeypatch.setattr(reading, "REMEMBERED_BYTES", 3 * one.nbytes)
    for number in (0, 1, 2, 2, 0, 3):
        indices.put((number,), one)
        indices.get((0,))
    assert set(indices.held) == {(0,), (2,), (3,)}  # 1 was asked for least recently
    assert indices.nbytes == 3 * one.nbytes == sum(each.nbytes for each in indices.held.values())


def test_a_thousand_opens_take_no_memory(tmp_path):
    """Of files that differ, so that each one is indexed."""
    for name, codec in (("a.mp4", "libx264"), ("a.avi", "mpeg4")):
        encode(tmp_path / name, numbered(20), codec=codec)
    write_video(tmp_path / "a.gif", numbered(10), 10)

    def read(times):
        for number in range(times):
            path = tmp_path / ("a.mp4", "a.avi", "a.gif")[number % 3]
            read_video(path.read_bytes() + number.to_bytes(2, "big"), [9, 3])

    resource = pytest.importorskip("resource")
    read(150)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    read(1000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000


def test_a_text_file_is_no_film(tmp_path):
    (tmp_path / "notes.txt").write_text("to be filmed\n" * 50)
    with pytest.raises(MediaError):
        read_video(tmp_path / "notes.txt")


def test_frames_before_the_damage_can_be_read(tmp_path):
    zeroed(tmp_path / "clip.mp4")
    first = read_video(tmp_path / "clip.mp4", [0, 3])
    np.testing.assert_array_equal(first, decoded(tmp_path / "whole.mp4")[[0, 3]])


def test_images(tmp_path):
    pixels = numbered(1)[0]
    for name, mode in (("a.png", "RGB"), ("b.png", "L"), ("c.jpg", "CMYK"), ("d.png", "P")):
        Image.fromarray(pixels).convert(mode).save(tmp_path / name)
        read = read_image(tmp_path / name)
        assert (read.shape, read.dtype) == (pixels.shape, np.uint8)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), pixels)


@pytest.mark.parametrize("content", [None, b"", b"text" * 100, "half"])
def test_damaged_images_are_one_error(tmp_path, content):
    path = tmp_path / "image.jpg"
    if content == "half":
        Image.fromarray(numbered(1)[0]).save(path)
        content = path.read_bytes()[: path.stat().st_size // 2]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(MediaError) as caught:
        read_image(path)
    assert str(caught.value).count(str(path)) == 1
