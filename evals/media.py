"""The pictures and clips of a question: what they are called, how they are kept, how they travel.

doc_to_image -> [PIL image, Video, ...]      the text holds one "<image>" for each, in order
  digest(medium)           sha256 of what is seen: equal pixels, equal name
  keep(medium, folder)     folder/<digest>.png, once; of a clip a strip of up to eight frames
  source(medium, ...)      what fusion reads: the image, the clip's path, or frames with their rate
  data_urls(medium)        for an endpoint

Video("clip.mp4", max_frames=128)     or     Video(frames=images, fps=2.0)
"""

import base64
import hashlib
import mimetypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from moonvit.config import MediaConfig
from moonvit.video import read_video

PLACE = "<image>"
STRIP = 8  # frames in the picture that is kept of a clip


@dataclass(frozen=True)
class Video:
    """A clip in a document: a file, or frames with their rate.

    fps: of a file, frames looked at per second, None for the model's own rate; of frames, the rate they have.
    max_frames: at most so many are looked at, evenly spread; None for no limit but the model's. pixels: frames are cut
    down to about pixels x pixels; None for the model's own limit.
    """

    path: str | Path | None = None
    frames: tuple[Image.Image, ...] | None = None
    fps: float | None = None
    max_frames: int | None = None
    pixels: int | None = None

    def __post_init__(self) -> None:
        if (self.path is None) == (self.frames is None):
            raise ValueError("a Video is a path or frames, one of them")
        if self.frames is not None and (not self.frames or not self.fps):
            raise ValueError(f"frames need their rate: Video(frames=..., fps=...), got fps={self.fps}")
        if self.fps is not None and not self.fps > 0:
            raise ValueError(f"fps must be positive, got {self.fps}")
        if self.max_frames is not None and self.max_frames < 1:
            raise ValueError(f"max_frames must be at least 1, got {self.max_frames}")


@dataclass(frozen=True)
class Clip:
    """A clip as fusion.prompt reads it: a path, or frames with their rate.

    sample_fps: frames looked at per second. frame_patches: most patches of a frame.
    """

    frames: Any
    fps: float | None = None
    sample_fps: float | None = None
    frame_patches: int | None = None


Medium = Image.Image | Video


def check(media: Sequence[Any]) -> tuple[Medium, ...]:
    """The same media. Raises ValueError for anything else than PIL images and Videos."""
    for number, medium in enumerate(media):
        if not isinstance(medium, Image.Image | Video):
            raise ValueError(f"medium {number} is a {type(medium).__name__}; doc_to_image gives PIL images and Videos")
    return tuple(media)


def digest(medium: Medium) -> str:
    """sha256 of the pixels (images, frames) or of the file with what is read of it."""
    if isinstance(medium, Image.Image):
        sum_ = hashlib.sha256(f"{medium.mode} {medium.size}".encode())
        sum_.update(medium.tobytes())
        if medium.mode == "P":
            sum_.update(bytes(medium.getpalette() or []))
        return sum_.hexdigest()
    if medium.path is not None:
        path = Path(medium.path)
        if not path.is_file():
            raise FileNotFoundError(f"no such video: {path}")
        stat = path.stat()
        what = _file_digest(str(path), stat.st_size, stat.st_mtime_ns)
    else:
        what = " ".join(digest(frame) for frame in medium.frames or ())
    return hashlib.sha256(f"video {what} {medium.fps} {medium.max_frames} {medium.pixels}".encode()).hexdigest()


@lru_cache(maxsize=10_000)
def _file_digest(path: str, size: int, changed: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def keep(medium: Medium, folder: Path, name: str | None = None) -> str:
    """Write a medium as PNG unless it is there; its name under the run folder, media/<digest>.png."""
    name = name or digest(medium)
    path = folder / f"{name}.png"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        image = medium if isinstance(medium, Image.Image) else strip(medium)
        if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
            image = image.convert("RGB")
        part = path.with_suffix(f".{id(medium):x}.part")
        image.save(part, "PNG")
        part.replace(path)
    return f"{folder.name}/{name}.png"


def strip(video: Video, height: int = 160) -> Image.Image:
    """Up to eight frames of a clip, side by side."""
    frames = [
        frame.resize((max(1, round(frame.width * height / frame.height)), height)) for frame in look(video, STRIP)
    ]
    sheet = Image.new("RGB", (sum(frame.width for frame in frames), height))
    left = 0
    for frame in frames:
        sheet.paste(frame, (left, 0))
        left += frame.width
    return sheet


def source(medium: Medium, frames: int | None = None, rate: float = 2.0) -> Any:
    """What fusion.prompt takes. frames: the most frames of a clip; rate: what the model looks at per second."""
    if isinstance(medium, Image.Image):
        return medium
    limits = [limit for limit in (frames, medium.max_frames) if limit is not None]
    most = min(limits) if limits else None
    if medium.frames is not None:
        length = len(medium.frames) / float(medium.fps or 1)
        pace = rate
    else:
        length, pace = _seconds(str(medium.path)), medium.fps or rate
    if most is not None and length * pace > most:
        pace = most / length
    patches = None if medium.pixels is None else max(4, (medium.pixels // 14) ** 2)
    if medium.frames is not None:
        return Clip(list(medium.frames), medium.fps, pace, patches)
    return Clip(str(medium.path), None, pace, patches)


def look(video: Video, most: int) -> list[Image.Image]:
    """At most so many frames of a clip, evenly spread, as RGB images."""
    if video.frames is not None:
        step = max(1, -(-len(video.frames) // most))
        return [frame.convert("RGB") for frame in video.frames[::step]]
    found = source(video, most)
    # the model's own reader: a child process decodes, so that a broken file cannot take this one along
    read = read_video(found.frames, MediaConfig(sample_fps=found.sample_fps), max_frames=10_000)
    return [Image.fromarray(frame) for chunk in read.chunks for frame in chunk.frames][:most]


def _seconds(path: str) -> float:
    import av

    try:
        with av.open(path) as container:
            stream = container.streams.video[0]
            if stream.duration and stream.time_base:
                return float(stream.duration * stream.time_base)
            return (container.duration or 0) / 1e6
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"{path}: cannot be decoded ({error})") from None


def data_urls(medium: Medium, frames: int | None = None) -> list[dict[str, Any]]:
    """Parts of an OpenAI-style message: an image, a video file, or a clip's frames as images."""
    if isinstance(medium, Video):
        if medium.path is not None and frames is None and medium.max_frames is None:
            kind = mimetypes.guess_type(str(medium.path))[0] or "video/mp4"
            return [{"type": "video_url", "video_url": {"url": _url(Path(medium.path).read_bytes(), kind)}}]
        return [part for frame in look(medium, frames or medium.max_frames or 64) for part in data_urls(frame)]
    packed = BytesIO()
    (medium if medium.mode in ("L", "RGB", "RGBA") else medium.convert("RGB")).save(packed, "PNG")
    return [{"type": "image_url", "image_url": {"url": _url(packed.getvalue(), "image/png")}}]


def _url(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
