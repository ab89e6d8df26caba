"""One clip becomes chunks of up to four frames, each with its timestamp.

    file -- decode (child process) -- sample at 2 frames/s -- groups of 4 -- resize, pad --> Video(chunks)

Sampling, grouping and timestamps as in the released split_video_chunks. The decoder there is not public: here PyAV
decodes whole, plain files by their index and skips frames that nobody needs; decord reads others, and PyAV from the
start what decord lacks or stumbles over.
"""

import contextlib
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from moonvit.config import MediaConfig
from moonvit.image import ImageSource, Resize, cut_patches, load_image, pad_frame, plan_resize, read_source
from moonvit.packing import PackedPatches

log = logging.getLogger(__name__)

VideoSource = str | Path | bytes | NDArray[Any] | Tensor | Sequence[ImageSource]
Backend = Literal["auto", "decord", "av"]


@dataclass(frozen=True)
class Chunk:
    """Up to four consecutive sampled frames that the tower sees together. frames: uint8 (t, h, w, 3), padded."""

    frames: NDArray[np.uint8]
    timestamp: float  # seconds, of the first frame
    plan: Resize  # of every frame

    def patches(self, config: MediaConfig | None = None) -> PackedPatches:
        """One item, (t, rows, columns)."""
        return cut_patches(self.frames, config or MediaConfig())


@dataclass(frozen=True)
class Video:
    """A sampled clip. fps, num_frames and size (width, height) are the file's."""

    chunks: tuple[Chunk, ...]
    fps: float
    num_frames: int
    size: tuple[int, int]


def sample_indices(num_frames: int, fps: float, sample_fps: float) -> list[int]:
    """Which frames are looked at: sample_fps per second, both ends included; all of them when the clip is slower."""
    if num_frames < 1 or not fps > 0:
        raise ValueError(f"a clip needs at least one frame and a frame rate, got {num_frames} frames at {fps}")
    count = max(round(num_frames * min(sample_fps, fps) / fps), 1)
    return np.linspace(0, num_frames - 1, count).round().astype(int).tolist()


def timestamp_text(seconds: float, mode: str = "hh:mm:ss.fff") -> str:
    """A chunk's stamp as the prompt spells it: milliseconds are cut, not rounded, and days wrap."""
    if seconds < 0:
        raise ValueError(f"a timestamp cannot be negative: {seconds}")
    whole = datetime.fromtimestamp(int(seconds) % 86_400, tz=UTC)
    if mode == "mm:ss":
        return whole.strftime("%M:%S")
    fraction = f".{int((seconds - int(seconds)) * 1000):03d}"
    if mode == "mm:ss.fff":
        return whole.strftime("%M:%S") + fraction
    if mode != "hh:mm:ss.fff":
        raise ValueError(f"unknown timestamp mode {mode!r}")
    return whole.strftime("%H:%M:%S") + fraction


def read_video(
    source: VideoSource,
    config: MediaConfig | None = None,
    *,
    fps: float | None = None,
    max_frames: int = 480,
    timeout: float = 120.0,
    memory_limit: int = 4 * 2**30,
    backend: Backend = "auto",
    exact: bool = True,
) -> Video:
    """Decode, sample and cut a clip.

    source: path, bytes, base64 data URL; or frames, as an array (t, h, w, 3) or a list of images, with `fps`.
    max_frames: a clip that samples to more is refused. timeout (seconds) and memory_limit (bytes) bound the decoder.
    exact=False lets FFmpeg resize as it converts to RGB, without Pillow's pass: the same frames, whose pixels differ by
    1 level of 255 on average, and by 2 to 20 in one pixel of a thousand (real clips, made smaller).
    A clip with variable frame rate is sampled by frame number and stamped with its average rate, as released.
    Raises FileNotFoundError, or a one-line ValueError that names the source.
    """
    config = config or MediaConfig()
    if not isinstance(max_frames, int) or max_frames < 1:
        raise ValueError(f"max_frames must be at least 1, got {max_frames!r}")
    if isinstance(source, np.ndarray | Tensor) or (isinstance(source, list | tuple) and not isinstance(source, str)):
        return _from_frames(source, config, fps, max_frames)
    data, name = read_source(source, "video")
    with _Decoder(data, name, timeout, memory_limit, backend) as decoder:
        about = decoder.about()
        if about["note"]:
            log.info("%s: decoded by PyAV (%s)", name, about["note"])
        indices = sample_indices(about["frames"], about["fps"], config.sample_fps)
        _check_count(name, len(indices), max_frames, config)
        groups = _groups(indices, config)
        plans = [_plan(about["width"], about["height"], len(group), config) for group in groups]
        chunks = [
            Chunk(frames, group[0] / about["fps"], plan)
            for frames, group, plan in zip(decoder.chunks(groups, plans, exact), groups, plans, strict=True)
        ]
    return Video(tuple(chunks), about["fps"], about["frames"], (about["width"], about["height"]))


def _check_count(name: str, count: int, max_frames: int, config: MediaConfig) -> None:
    if count > max_frames:
        raise ValueError(
            f"{name}: samples to {count:,} frames ({config.sample_fps:g} per second), over max_frames={max_frames}; "
            "raise max_frames, lower sample_fps or cut the clip"
        )


def _groups(indices: list[int], config: MediaConfig) -> list[list[int]]:
    size = config.temporal_merge_kernel_size
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def _plan(width: int, height: int, frames: int, config: MediaConfig) -> Resize:
    limit = config.in_patch_limit_each_frame or config.in_patch_limit
    if config.in_patch_limit_video is not None:
        limit = min(limit, max(1, round(config.in_patch_limit_video / frames)))  # per chunk, as released
    return plan_resize(width, height, config, limit)


def _from_frames(source: Any, config: MediaConfig, fps: float | None, max_frames: int) -> Video:
    if fps is None or not fps > 0:
        raise ValueError(f"frames need a frame rate: read_video(frames, fps=...), got fps={fps}")
    if len(source) == 0:
        raise ValueError("a clip of no frames")
    if isinstance(source, np.ndarray | Tensor) and source.ndim != 4:
        raise ValueError(f"frames must be (t, h, w, 3), got {tuple(source.shape)}")
    indices = sample_indices(len(source), fps, config.sample_fps)
    _check_count("frames", len(indices), max_frames, config)
    chunks, size = [], None
    for group in _groups(indices, config):
        images = [load_image(source[index]) for index in group]
        plan = _plan(*images[0].size, len(group), config)
        size = size or images[0].size
        chunks.append(Chunk(np.stack([pad_frame(image, plan) for image in images]), group[0] / fps, plan))
    assert size is not None, "a clip samples to at least one frame"
    return Video(tuple(chunks), float(fps), len(source), size)


class _Decoder:
    """The child process of one clip, under a time and a memory limit. Leaves no process and no file behind."""

    def __init__(self, data: bytes | Path, name: str, timeout: float, memory: int, backend: Backend) -> None:
        self.data, self.name, self.timeout = data, name, timeout
        path = str(data.resolve()) if isinstance(data, Path) else None
        size = len(data) if isinstance(data, bytes) else 0
        request = json.dumps({"path": path, "bytes": size, "backend": backend, "memory": memory})
        script = Path(__file__).with_name("decode_child.py")
        # -P: the script's own folder must not lie on the import path (it has modules with common names)
        command = [sys.executable, "-P", str(script), request]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )
        self.late = False
        self.timer = threading.Timer(timeout, self._expire)
        self.timer.daemon = True
        self.timer.start()

    def _expire(self) -> None:
        self.late = True
        self.process.kill()

    def __enter__(self) -> "_Decoder":
        return self

    def __exit__(self, *_: object) -> None:
        self.timer.cancel()
        self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # bytes that a dead child did not take
                    pipe.close()
        self.process.wait()

    def about(self) -> dict[str, Any]:
        """Frames, rate and size of the clip."""
        if isinstance(self.data, bytes):
            self._send(self.data)
        line = self._output().readline()
        if not line:
            raise self._failure()
        answer = json.loads(line)
        if "error" in answer:
            raise ValueError(f"{self.name}: cannot be decoded ({answer['error']})")
        return answer

    def chunks(self, groups: list[list[int]], plans: list[Resize], exact: bool) -> Iterator[NDArray[np.uint8]]:
        """The frames of each group, resized and padded as planned: uint8 (t, h, w, 3)."""
        every = [plan for plan, group in zip(plans, groups, strict=True) for _ in group]
        padded = [(plan.width + plan.pad_right, plan.height + plan.pad_bottom) for plan in every]
        request = {
            "indices": [index for group in groups for index in group],
            "sizes": [(plan.width, plan.height) for plan in every],
            "padded": padded,
            "exact": exact,
        }
        self._send(json.dumps(request).encode() + b"\n")
        for plan, group in zip(plans, groups, strict=True):
            shape = (plan.height + plan.pad_bottom, plan.width + plan.pad_right, 3)
            frames = np.empty((len(group), *shape), np.uint8)
            for frame in frames:
                self._read_into(frame)
            yield frames

    def _read_into(self, frame: NDArray[np.uint8]) -> None:
        status = self._output().read(1)
        if status == b"{":
            message = json.loads(b"{" + self._output().readline())
            raise ValueError(f"{self.name}: cannot be decoded ({message['error']})")
        if not status or self._output().readinto(frame.data.cast("B")) < frame.size:
            raise self._failure()

    def _output(self) -> Any:
        assert self.process.stdout is not None
        return self.process.stdout

    def _send(self, data: bytes) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(data)
            self.process.stdin.flush()
        except OSError:
            raise self._failure() from None

    def _failure(self) -> ValueError:
        if self.late:
            return ValueError(f"{self.name}: decoding took longer than {self.timeout:g} s")
        code = self.process.wait()
        if code < 0:
            return ValueError(f"{self.name}: the decoder crashed on it (signal {-code})")
        return ValueError(f"{self.name}: the decoder gave up before the last frame")
