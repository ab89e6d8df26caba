"""Decodes one clip in a process of its own: a hostile file can crash, hang or fill this process, not the caller's.

Started by moonvit/video.py. Imports no torch, so that it starts quickly.

    argv[1]   JSON: path or byte count, backend, memory limit
    stdin     the clip's bytes when it has no path, then one JSON line: which frames, at which sizes
    stdout    one JSON line (frames, fps, width, height) or {"error"}; then per frame one status byte and its pixels
"""

import json
import math
import os
import sys
from collections.abc import Iterator
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

    def frames(self, indices: list[int]) -> Iterator[np.ndarray]:
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

    def frames(self, indices: list[int]) -> Iterator[np.ndarray]:
        wanted = iter(indices)
        target = next(wanted, None)
        with self.av.open(_plain(self.open_file())) as container:
            for number, frame in enumerate(self._decode(container)):
                while target == number:
                    yield frame.to_ndarray(format="rgb24")
                    target = next(wanted, None)
                if target is None:
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
        height, width, _ = first.shape
        say({"frames": reader.count, "fps": reader.fps, "width": width, "height": height, "note": note})
        line = sys.stdin.buffer.readline()
        if not line:
            return  # the caller refused
        plan = json.loads(line)
        sizes = plan["sizes"]
        for frame, (new_width, new_height) in zip(reader.frames(plan["indices"]), sizes, strict=False):
            if frame.shape[:2] != (new_height, new_width):
                image = Image.fromarray(frame).resize((new_width, new_height), Image.Resampling.BICUBIC)
                frame = np.asarray(image)
            out.write(b"\1")
            out.write(np.ascontiguousarray(frame).tobytes())
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
