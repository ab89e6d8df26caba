"""Clips to chunks: sampling, timestamps, decoding in a child; broken files give one clear line and never hang.

pytest tests/moonvit/test_video.py
"""

import base64
import os
import shutil
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from moonvit.config import MediaConfig
from moonvit.video import read_video, sample_indices, timestamp_text

CHILD = Path(__file__).parents[2] / "moonvit" / "decode_child.py"


def level(index: int) -> int:
    return 20 + (index * 13) % 200


def make_clip(
    path: Path, frames: int = 30, fps: Fraction | int = 10, size: tuple[int, int] = (64, 48), times: Any = None
) -> Path:
    """A clip whose frame i is a flat grey of level(i). times: presentation times in ms, for a variable rate."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps))
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.options = {"crf": "10", "preset": "ultrafast"}
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for index in range(frames):
            frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), level(index), np.uint8), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[index], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def make_sound(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44_100, layout="mono")
        for index in range(40):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 44_100, index * 1024
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def seen(video: Any) -> list[int]:
    """The grey level of every sampled frame."""
    return [int(np.median(frame[:20, :20])) for chunk in video.chunks for frame in chunk.frames]


def close(found: list[int], indices: list[int]) -> bool:
    return len(found) == len(indices) and all(abs(a - level(i)) <= 3 for a, i in zip(found, indices, strict=True))


# ---- sampling and stamps, from the released split_video_chunks -------------------------------------------------------


def test_golden_sampling() -> None:
    found = sample_indices(300, 30.0, 2.0)
    assert len(found) == 20 and found[:10] == [0, 16, 31, 47, 63, 79, 94, 110, 126, 142] and found[-1] == 299
    assert sample_indices(6, 1.5, 2.0) == [0, 1, 2, 3, 4, 5], "slower than 2 frames per second: all of them"
    assert sample_indices(1, 25.0, 2.0) == [0]
    assert sample_indices(5, 25.0, 2.0) == [0], "never none"
    assert [timestamp_text(i / 30) for i in found[::4][:4]] == [
        "00:00:00.000",
        "00:00:02.100",
        "00:00:04.200",
        "00:00:06.299",
    ]


@given(st.integers(1, 100_000), st.floats(0.1, 240), st.floats(0.1, 30))
def test_sampling_covers_the_clip_in_order(frames: int, fps: float, wanted: float) -> None:
    found = sample_indices(frames, fps, wanted)
    assert found[0] == 0 and (len(found) == 1 or found[-1] == frames - 1)
    assert sorted(set(found)) == found
    assert len(found) <= frames


@pytest.mark.parametrize(
    ("seconds", "mode", "text"),
    [
        (0.5, "hh:mm:ss.fff", "00:00:00.500"),
        (1.9999, "hh:mm:ss.fff", "00:00:01.999"),
        (2.3, "hh:mm:ss.fff", "00:00:02.299"),
        (3600.25, "hh:mm:ss.fff", "01:00:00.250"),
        (86_400.25, "hh:mm:ss.fff", "00:00:00.250"),
        (61.5, "mm:ss.fff", "01:01.500"),
        (61.5, "mm:ss", "01:01"),
    ],
)
def test_golden_timestamps(seconds: float, mode: str, text: str) -> None:
    assert timestamp_text(seconds, mode) == text


# width, height, grid of one frame, tokens of one chunk: from the released navit_resize_video
@pytest.mark.parametrize(
    ("width", "height", "grid", "tokens"),
    [
        (320, 240, (18, 24), 108),
        (640, 360, (26, 46), 299),
        (640, 480, (36, 46), 414),
        (1280, 720, (50, 86), 1075),
        (1920, 1080, (48, 86), 1032),
        (1080, 1920, (86, 48), 1032),
    ],
)
def test_golden_frame_sizes(width: int, height: int, grid: tuple[int, int], tokens: int) -> None:
    video = read_video(np.zeros((2, height, width, 3), np.uint8), fps=2)
    packed = video.chunks[0].patches()
    assert (packed.grid_thw.tolist(), packed.tokens) == ([[2, *grid]], [tokens])


# ---- decoding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "decord", "av"])
def test_the_right_frames_are_seen(tmp_path: Path, backend: Any) -> None:
    path = make_clip(tmp_path / "a clip ü.mp4", frames=95, fps=10)
    indices = sample_indices(95, 10, 2)
    for source in (path, str(path), path.read_bytes()):
        video = read_video(source, backend=backend)
        assert (video.fps, video.num_frames) == (10, 95)
        assert close(seen(video), indices)
    assert [len(chunk.frames) for chunk in video.chunks] == [4, 4, 4, 4, 3]
    assert [chunk.timestamp for chunk in video.chunks] == [indices[i] / 10 for i in range(0, 19, 4)]


def test_data_url_and_frames_are_the_same_clip(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "a.mp4", frames=20, fps=4)
    url = "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()
    assert seen(read_video(url)) == seen(read_video(path))
    frames = np.stack([np.full((48, 64, 3), level(i), np.uint8) for i in range(20)])
    images = [Image.fromarray(frame) for frame in frames]
    for source in (frames, torch.from_numpy(frames), images, tuple(images)):
        assert seen(read_video(source, fps=4)) == [level(i) for i in sample_indices(20, 4, 2)]


def test_slower_than_the_sampling_rate(tmp_path: Path) -> None:
    video = read_video(make_clip(tmp_path / "slow.mp4", frames=6, fps=Fraction(3, 2)))
    assert close(seen(video), list(range(6))) and video.chunks[1].timestamp == pytest.approx(4 / 1.5)


def test_one_frame(tmp_path: Path) -> None:
    video = read_video(make_clip(tmp_path / "one.mp4", frames=1, fps=25))
    assert close(seen(video), [0]) and video.chunks[0].patches().grid_thw.tolist() == [[1, 4, 6]]


@pytest.mark.parametrize("backend", ["auto", "av"])
def test_variable_frame_rate(tmp_path: Path, backend: Any) -> None:
    """Ten frames a second, then one: sampled by frame number and stamped with the average rate, as released."""
    times = [100 * i for i in range(20)] + [2000 + 1000 * i for i in range(6)]
    video = read_video(make_clip(tmp_path / "vfr.mp4", frames=26, fps=10, times=times), backend=backend)
    assert video.num_frames == 26 and 2 < video.fps < 6
    assert close(seen(video), sample_indices(26, video.fps, 2))


@pytest.mark.parametrize("name", ["flower.mp4", "flower.webm", "friday.mp4", "nasa_13013.mp4"])
def test_both_decoders_see_the_same_real_clip(data: Path, name: str) -> None:
    config = MediaConfig(in_patch_limit_each_frame=256)
    path = data / "media_cc0" / name
    one, two, auto = (read_video(path, config, backend=b) for b in ("decord", "av", "auto"))
    assert auto.num_frames == one.num_frames
    assert (one.num_frames, len(one.chunks)) == (two.num_frames, len(two.chunks))
    for a, b in zip(one.chunks, two.chunks, strict=True):
        assert a.timestamp == pytest.approx(b.timestamp)
        assert abs(a.frames.astype(int) - b.frames.astype(int)).mean() < 1


def moving(path: Path, codec: str, size: tuple[int, int], **options: str) -> Path:
    """Noise that moves, so that frames are built upon each other."""
    still = np.random.default_rng(0).integers(0, 256, (size[1] // 4, size[0] // 4, 3), dtype=np.uint8)
    still = still.repeat(4, 0).repeat(4, 1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.options = *size, "yuv420p", options
        for index in range(45):
            picture = np.ascontiguousarray(np.roll(still, 3 * index, 1))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("name", "codec", "size", "options"),
    [
        ("b-frames.mp4", "libx264", (200, 120), {"bf": "3", "g": "20"}),
        ("open.mkv", "libx264", (100, 76), {"x264-params": "open-gop=1:keyint=12:bframes=3"}),
        ("plain.mp4", "libx264", (64, 48), {"preset": "ultrafast"}),
        ("nine.webm", "libvpx-vp9", (120, 64), {"deadline": "realtime", "cpu-used": "8"}),
        ("four.mp4", "mpeg4", (64, 48), {}),
    ],
)
def test_skipping_frames_changes_no_pixel(tmp_path: Path, name: str, codec: str, size: Any, options: Any) -> None:
    path = moving(tmp_path / name, codec, size, **options)
    for limit in (4096, 6):
        config = MediaConfig(in_patch_limit_each_frame=limit)
        # of open groups of pictures decord returns other frames than a decoder that reads from the start
        quick, plain = read_video(path, config), read_video(path, config, backend="av" if "open" in name else "decord")
        assert (quick.fps, quick.num_frames) == (plain.fps, plain.num_frames)
        for a, b in zip(quick.chunks, plain.chunks, strict=True):
            assert np.array_equal(a.frames, b.frames)


def test_the_index_of_a_whole_clip_is_used_and_half_of_the_frames_are_not_decoded(tmp_path: Path) -> None:
    code = (
        f"import runpy, sys; child = runpy.run_path({str(CHILD)!r}); reader, note = child['choose']('auto', lambda: "
        "sys.argv[1]); print(type(reader).__name__, note, 'decord' in sys.modules)"
    )
    whole = moving(tmp_path / "whole.mkv", "libx264", (64, 48), bf="3")
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * 6 // 10])
    for path, expected in ((whole, "Sparse  False"), (cut, "True")):
        out = subprocess.run([sys.executable, "-P", "-c", code, str(path)], capture_output=True, text=True, check=True)
        assert expected in out.stdout and ("Sparse" in out.stdout) == (path == whole)


@pytest.mark.parametrize("name", ["flower.mp4", "friday.mp4", "nasa_13013.mp4"])
def test_in_a_hurry_frames_are_the_same_and_pixels_close(data: Path, name: str) -> None:
    config = MediaConfig(in_patch_limit_each_frame=256)
    exact, quick = (read_video(data / "media_cc0" / name, config, exact=e) for e in (True, False))
    for a, b in zip(exact.chunks, quick.chunks, strict=True):
        assert a.frames.shape == b.frames.shape and a.timestamp == b.timestamp
        difference = abs(a.frames.astype(int) - b.frames)
        assert difference.mean() < 2 and np.percentile(difference, 99) < 20


def test_a_cut_file_gives_what_is_there(tmp_path: Path) -> None:
    """A recording that was interrupted: the frames that are left, or one line; never repeated frames as if whole."""
    whole = make_clip(tmp_path / "whole.mkv", frames=100, fps=10, size=(160, 120)).read_bytes()
    path = tmp_path / "cut.mkv"
    path.write_bytes(whole[: len(whole) * 6 // 10])
    video = read_video(path)
    assert 20 < video.num_frames < 90
    assert close(seen(video), sample_indices(video.num_frames, video.fps, 2))


def test_a_long_clip_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "long.mp4", frames=60, fps=2)
    with pytest.raises(ValueError, match=r"samples to 60 frames \(2 per second\), over max_frames=50; raise"):
        read_video(path, max_frames=50)
    assert len(seen(read_video(path, max_frames=60))) == 60


# ---- hostile ---------------------------------------------------------------------------------------------------------


def hostile(folder: Path, name: str) -> Path:
    path = folder / f"{name}.mp4"
    good = make_clip(folder / "good.mp4", frames=40, fps=10, size=(160, 120)).read_bytes()
    if name == "audio only":
        return make_sound(folder / "sound.mp4")
    if name == "no index (cut mp4)":
        path.write_bytes(good[: len(good) // 2])
    elif name == "text":
        path.write_bytes(b"hello " * 100)
    elif name == "zeros":
        path.write_bytes(b"\0" * 10_000)
    elif name == "header only":
        path.write_bytes(good[:40])
    elif name == "noise":
        path.write_bytes(np.random.default_rng(0).bytes(50_000))
    elif name == "a picture":
        Image.new("RGB", (9, 9)).save(path, "PNG")
    elif name == "html":
        path.write_bytes(b"<!DOCTYPE html><html><body>not found</body></html>")
    elif name == "playlist":  # must not make the decoder open other files or addresses
        path.write_bytes(b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n")
    elif name == "concat script":
        path.write_bytes(b"ffconcat version 1.0\nfile '/etc/passwd'\n")
    return path


@pytest.mark.parametrize(
    "name",
    ["audio only", "no index (cut mp4)", "text", "zeros", "header only", "noise", "html", "playlist", "concat script"],
)
@pytest.mark.parametrize("backend", ["auto", "av"])
def test_hostile_clips_give_one_clear_line(tmp_path: Path, name: str, backend: Any, capfd: Any) -> None:
    path = hostile(tmp_path, name)
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"cannot be decoded|decoder") as caught:
        read_video(path, backend=backend, timeout=60)
    assert time.monotonic() - started < 30
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert capfd.readouterr() == ("", ""), "what decoders print must not come through"


def test_damaged_in_the_middle_still_answers(tmp_path: Path, capfd: Any) -> None:
    good = bytearray(make_clip(tmp_path / "good.mp4", frames=60, fps=10, size=(160, 120)).read_bytes())
    start = good.index(b"mdat") + 4
    middle = start + (len(good) - start) // 3
    good[middle : middle + 300] = b"\xff" * 300
    (tmp_path / "bad.mp4").write_bytes(good)
    try:
        assert read_video(tmp_path / "bad.mp4").chunks
    except ValueError as error:
        assert "bad.mp4" in str(error)
    assert capfd.readouterr() == ("", "")


def test_random_damage_never_crashes_or_hangs(tmp_path: Path) -> None:
    good = make_clip(tmp_path / "good.mp4", frames=20, fps=10).read_bytes()
    draw = np.random.default_rng(1)
    for _ in range(6):
        bad = bytearray(good)
        for at in draw.integers(0, len(bad), 20):
            bad[at] = draw.integers(0, 256)
        started = time.monotonic()
        try:
            read_video(bytes(bad), timeout=30)
        except ValueError as error:
            assert "\n" not in str(error)
        assert time.monotonic() - started < 25


def test_time_limit(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "a.mp4", frames=10)
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"a\.mp4: decoding took longer than 0\.01 s"):
        read_video(path, timeout=0.01)
    assert time.monotonic() - started < 5
    if shutil.which("ps"):
        children = subprocess.run(["ps", "-o", "args", "--ppid", str(os.getpid())], capture_output=True).stdout
        assert b"decode_child" not in children


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS")
def test_memory_limit(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "wide.mp4", frames=2, size=(1920, 1080))
    with pytest.raises(ValueError, match=r"wide\.mp4: "):
        read_video(path, memory_limit=120 * 2**20)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("http://example.com/a.mp4", {}, "nothing is fetched"),
        ("", {}, "folder|no such video"),
        (b"", {}, "empty"),
        (None, {}, "must be a path"),
        (5, {}, "must be a path"),
        ("data:video/mp4;base64,!!", {}, "not valid base64"),
        ("data:image/png;base64,AAAA", {}, "has type"),
        (np.zeros((4, 8, 8, 3), np.uint8), {}, "need a frame rate"),
        (np.zeros((4, 8, 8, 3), np.uint8), {"fps": 0}, "need a frame rate"),
        (np.zeros((4, 8, 8, 3), np.uint8), {"fps": float("nan")}, "need a frame rate"),
        (np.zeros((8, 8, 3), np.uint8), {"fps": 2}, r"must be \(t, h, w, 3\)"),
        ([], {"fps": 2}, "no frames"),
        (["gone.png"], {"fps": 2}, "no such image"),
        (b"x" * 100, {"max_frames": 0}, "at least 1"),
    ],
)
def test_hostile_arguments(source: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_video(source, **options)


def test_the_decoder_process_imports_no_torch() -> None:
    """It must start quickly, and fit its memory limit."""
    code = f"import sys, runpy; sys.argv = ['x', '{{}}']; runpy.run_path({str(CHILD)!r}); print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
