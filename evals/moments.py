"""Parts of videos: frames that are decoded when they are looked at, not when a question is listed.

Moments(path, start=2.0, end=7.5, rate=2.0, most=128, pixels=896)   ->   a sequence of 11 PIL images

path is a video, or a folder of frames in order (three a second, as TVQA's are kept)
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, overload

from PIL import Image as PIL

FOLDER_RATE = 3.0  # frames per second in a folder of frames


class Moments(Sequence[PIL.Image]):
    """Evenly spread frames from `start` to `end` (seconds; None: to the end), at most `most`, at `rate` per second.

    pixels: the longer side is cut down to it. Raises ValueError that names the file when it is decoded.
    """

    def __init__(
        self, path: Path, start: float | None, end: float | None, rate: float, most: int | None, pixels: int | None
    ) -> None:
        self.path, self.start, self.pixels = path, start or 0.0, pixels
        self.end = end if end is not None else _length(path)
        wanted = max(1, round((self.end - self.start) * rate))
        self.planned = min(wanted, most or wanted)
        self.fps = self.planned / max(self.end - self.start, 1e-3)

    def __len__(self) -> int:
        return self.planned

    def _frames(self) -> tuple[PIL.Image, ...]:
        step = (self.end - self.start) / self.planned
        times = tuple(self.start + step * (number + 0.5) for number in range(self.planned))
        return _decoded(self.path, times, self.pixels)

    def __iter__(self) -> Iterator[PIL.Image]:
        return iter(self._frames())

    @overload
    def __getitem__(self, at: int) -> PIL.Image: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[PIL.Image, ...]: ...
    def __getitem__(self, at: int | slice) -> Any:
        return self._frames()[at]


def _length(path: Path) -> float:
    if path.is_dir():
        return len(_files(path)) / FOLDER_RATE
    import av

    try:
        with av.open(str(path)) as container:
            return float(container.duration or 0) / av.time_base
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"{path}: cannot be decoded: {error}") from None


def _files(path: Path) -> list[Path]:
    return sorted(one for one in path.iterdir() if one.suffix.lower() in (".jpg", ".jpeg", ".png"))


@lru_cache(maxsize=2)
def _decoded(path: Path, times: tuple[float, ...], pixels: int | None) -> tuple[PIL.Image, ...]:
    found = _from_folder(path, times) if path.is_dir() else _from_video(path, times)
    if len(found) != len(times):
        raise ValueError(f"{path}: ends before {times[0]:g} s, where the question's part begins")
    if pixels is not None:
        for frame in found:
            frame.thumbnail((pixels, pixels))
    return tuple(found)


def _from_folder(path: Path, times: Sequence[float]) -> list[PIL.Image]:
    files = _files(path)
    if not files:
        raise ValueError(f"{path}: holds no frames")
    return [PIL.open(files[min(len(files) - 1, int(time * FOLDER_RATE))]).convert("RGB") for time in times]


def _from_video(path: Path, times: Sequence[float]) -> list[PIL.Image]:
    """For each time the last frame that does not begin after it; the clip's last frame where it is shorter."""
    import av

    found: list[PIL.Image] = []
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            container.seek(max(0, int((times[0] - 1) * av.time_base)))
            last = None
            for frame in container.decode(stream):
                while last is not None and len(found) < len(times) and frame.time > times[len(found)]:
                    found.append(last.to_image())
                if len(found) == len(times):
                    break
                last = frame
            while last is not None and len(found) < len(times) and (found or last.time + 1 >= times[0]):
                found.append(last.to_image())
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"{path}: cannot be decoded: {error}") from None
    return [frame.convert("RGB") for frame in found]
