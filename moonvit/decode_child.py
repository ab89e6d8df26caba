"""Decodes one clip in a process of its own: a hostile file can crash, hang or fill this process, not the caller's.

Started by moonvit/video.py. Imports no torch, so that it starts quickly.

    argv[1]   JSON: path or byte count, backend, memory limit
    stdin     the clip's bytes when it has no path, then one JSON line: which frames, at which sizes, padded to which
    stdout    one JSON line (frames, fps, width, height) or {"error"}; then per frame one status byte and its pixels

    decoder (this thread) -- frames that were asked for --> convert, resize, pad (threads) -- in order --> stdout
"""

import json
import math
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image


class Decord:
    """decord: random access, one thread (two are slower: they hand every frame over)."""

    def __init__(self, open_file: Any) -> None:
        import decord

        decord.logging.set_level(decord.logging.QUIET)
        self.reader = decord.VideoReader(open_file(), ctx=decord.cpu(0), num_threads=1)
        self.fps = float(self.reader.get_avg_fps())
        self.count = len(self.reader)

    def frames(self, indices: list[int]) -> Iterator[Any]:
        for index in indices:
            yield self.reader[index].asnumpy()


class Av:
    """PyAV: decodes from the start. Counts the frames that really decode; a damaged tail is left out."""

    def __init__(self, open_file: Any) -> None:
        import av

        self.av, self.open_file = av, open_file
        with av.open(_plain(open_file())) as container:
            stream = best_stream(container)
            rate = stream.average_rate or stream.guessed_rate
            self.fps = float(rate) if rate else 0.0
            self.count = sum(1 for _ in self._decode(container))

    def _decode(self, container: Any) -> Iterator[Any]:
        stream = best_stream(container)
        stream.thread_type = "AUTO"
        try:
            yield from container.decode(stream)
        except self.av.error.FFmpegError:
            return  # what came before is good

    def frames(self, indices: list[int]) -> Iterator[Any]:
        wanted = iter(indices)
        target = next(wanted, None)
        with self.av.open(_plain(self.open_file())) as container:
            for number, frame in enumerate(self._decode(container)):
                while target == number:
                    yield frame
                    target = next(wanted, None)
                if target is None:
                    return


class Unclear(ValueError):
    """A file whose index does not say for certain which frames it has."""


class Sparse:
    """PyAV by the file's own index: what nobody asked for, and no other frame is built upon, is not decoded.

    Only for files that are whole and plain (see `__init__`; Unclear for others), where decord gives the same frames to
    the last bit. In a usual H.264 clip half of the frames are skipped.
    """

    def __init__(self, open_file: Any) -> None:
        import av

        self.av, self.open_file = av, open_file
        with av.open(_plain(open_file())) as container:
            stream = best_stream(container)
            codec = stream.codec_context
            if codec.name not in ("h264", "hevc", "vp9", "libvpx-vp9") or codec.pix_fmt not in ("yuv420p", "yuvj420p"):
                raise Unclear(f"{codec.name} in {codec.pix_fmt}")
            if not stream.average_rate or codec.width % 2 or codec.height % 2:
                raise Unclear("its rate is unknown, or a side is odd")
            self.fps = float(stream.average_rate)
            packets = [packet for packet in container.demux(stream) if packet.size]
            times = [packet.pts for packet in packets]
            odd = any(packet.is_corrupt or packet.is_discard for packet in packets)
            if odd or not packets or None in times or len(set(times)) < len(times) or not packets[0].is_keyframe:
                raise Unclear("packets without a time, twice at one time, damaged, or none")
            # a file that was cut holds less than it says
            if stream.frames:
                whole = stream.frames == len(packets)
            else:
                ends = (max(times) * stream.time_base + 1 / stream.average_rate) if stream.time_base else 0
                says = (container.duration or 0) / av.time_base
                whole = abs(float(ends) - says) < 2 / self.fps + 0.1
            if not whole:
                raise Unclear("it is cut short")
            self.times = sorted(times)
        self.count = len(self.times)
        first = next(self.frames([0]))
        if first.rotation or (first.width, first.height) != (codec.width, codec.height):
            raise Unclear("it is turned or changes its size")

    def frames(self, indices: list[int]) -> Iterator[Any]:
        pending = deque(indices)
        try:
            for frame in self._decode([self.times[index] for index in indices]):
                yield frame
                pending.popleft()
        except self.av.error.FFmpegError:
            pass
        if pending:  # damage that the index does not show: decord may find a way around it
            rest = Decord(self.open_file)
            if rest.count != self.count:
                raise ValueError("a frame that its index promises cannot be decoded")
            yield from rest.frames(list(pending))

    def _decode(self, times: list[int]) -> Iterator[Any]:
        """The frames at these times; ends early at one that is missing or damaged."""
        wanted, pending = set(times), deque(times)
        with self.av.open(_plain(self.open_file())) as container:
            stream = best_stream(container)
            codec = stream.codec_context
            for packet in container.demux(stream):
                # frames that others are built upon are decoded all the same
                codec.skip_frame = "DEFAULT" if packet.pts in wanted or not packet.size else "NONREF"
                for frame in codec.decode(packet if packet.size else None):
                    if frame.pts is None or frame.pts > pending[0] or (frame.pts == pending[0] and frame.is_corrupt):
                        return
                    if frame.pts == pending[0]:
                        yield frame
                        pending.popleft()
                        if not pending:
                            return


def best_stream(container: Any) -> Any:
    """The video stream that FFmpeg ranks first, as decord takes it (the largest, of several)."""
    stream = container.streams.best("video")
    if stream is None:
        raise ValueError("it has no video stream")
    return stream


def _plain(file: Any) -> Any:
    return str(file) if isinstance(file, str) else file


def packets(open_file: Any) -> int | None:
    """Video packets in the container, by PyAV, or None when it is missing or stumbles."""
    try:
        import av
    except ImportError:
        return None
    try:
        with av.open(_plain(open_file())) as container:
            return sum(1 for packet in container.demux(best_stream(container)) if packet.size)
    except av.error.FFmpegError:
        return None


def choose(backend: str, open_file: Any) -> tuple[Any, str]:
    """A reader, and why it is not decord when it is not."""
    if backend == "av":
        return Av(open_file), ""
    if backend == "auto":
        try:
            return Sparse(open_file), ""
        except (ImportError, OSError, ValueError, StopIteration):  # FFmpeg's errors are ValueErrors or OSErrors
            pass  # the slower readers say what is wrong with it, or read it all the same
    try:
        import decord
    except ImportError:
        if backend == "decord":
            raise
        return Av(open_file), "decord is not installed"
    if backend == "decord":
        return Decord(open_file), ""
    there = packets(open_file)
    try:
        reader = Decord(open_file)
        next(reader.frames([0]))
    except (RuntimeError, IndexError, decord.DECORDError):
        return Av(open_file), "decord cannot read it"
    if there is not None and there != reader.count:
        # a cut or damaged file: decord would answer with repeated frames, or not at all
        return Av(open_file), f"decord sees {reader.count} frames, the file holds {there}"
    return reader, ""


def prepare(frame: Any, size: tuple[int, int], padded: tuple[int, int], exact: bool) -> bytes:
    """RGB pixels of one frame, resized to (width, height) and padded with zeros right and below."""
    width, height = size
    if exact or isinstance(frame, np.ndarray):
        pixels = frame if isinstance(frame, np.ndarray) else frame.to_ndarray(format="rgb24")
        if pixels.shape[:2] != (height, width):
            pixels = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
    else:
        pixels = frame.to_ndarray(width=width, height=height, format="rgb24", interpolation="BICUBIC")
    if size == padded:
        return pixels.tobytes()
    canvas = np.zeros((padded[1], padded[0], 3), np.uint8)
    canvas[:height, :width] = pixels
    return canvas.tobytes()


def send(frames: Iterator[Any], plan: dict[str, Any], write: Callable[[bytes], Any]) -> None:
    """Write all frames in order, while the next ones are decoded."""
    workers = min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    waiting: deque[Future[bytes]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for frame, size, padded in zip(frames, plan["sizes"], plan["padded"], strict=False):
            if len(waiting) > workers:  # a few frames in memory, not the clip
                write(b"\1" + waiting.popleft().result())
            waiting.append(pool.submit(prepare, frame, tuple(size), tuple(padded), plan["exact"]))
        while waiting:
            write(b"\1" + waiting.popleft().result())


def main() -> None:
    request = json.loads(sys.argv[1])
    out = os.fdopen(os.dup(1), "wb")
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)  # decoders print what they like
    os.dup2(silence, 2)
    if request["memory"]:
        try:
            import resource

            resource.setrlimit(resource.RLIMIT_AS, (request["memory"], request["memory"]))
        except (ImportError, ValueError, OSError):
            pass  # not on this system; the time limit still holds

    def say(message: dict[str, Any]) -> None:
        out.write(json.dumps(message).encode() + b"\n")
        out.flush()

    try:
        data = sys.stdin.buffer.read(request["bytes"]) if request["path"] is None else b""
        reader, note = choose(request["backend"], lambda: BytesIO(data) if request["path"] is None else request["path"])
        first = next(iter(reader.frames([0])), None) if reader.count else None
        if first is None:
            say({"error": "no frame of it can be decoded"})
            return
        if not (math.isfinite(reader.fps) and reader.fps > 0):
            say({"error": "its frame rate is unknown"})
            return
        if isinstance(first, np.ndarray):
            height, width, _ = first.shape
        else:
            height, width = first.height, first.width
        say({"frames": reader.count, "fps": reader.fps, "width": width, "height": height, "note": note})
        line = sys.stdin.buffer.readline()
        if not line:
            return  # the caller refused
        plan = json.loads(line)
        send(reader.frames(plan["indices"]), plan, out.write)
        out.flush()
    except MemoryError:
        say({"error": f"decoding needs more than {request['memory'] / 2**30:.1f} GiB of memory"})
    except BrokenPipeError:
        os._exit(0)
    except Exception as error:  # noqa: BLE001 - the boundary to decoders: whatever they raise is the file's fault
        text = " ".join((getattr(error, "strerror", None) or str(error)).split())
        say({"error": (text[:160] if text.isprintable() else "") or type(error).__name__})


if __name__ == "__main__":
    main()
