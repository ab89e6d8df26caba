"""From files: rows of the groups load and media.

    load    a checkpoint from the disk, in bfloat16 and with INT4 experts     beside plain reads of the same files
            import, first token, help: each a fresh process
    media   a clip -> 2 frames a second, resized, in patches                  beside decord's plain path
            a photo of 4000x3000 -> patches                                   beside Pillow's plain path

A cold read: the pages of a file are dropped from memory before each one (posix_fadvise), so the disk must give them.
"""

import io
import json
import os
import queue
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import lm.config
from bench import shapes
from bench.rows import Ceiling, Goal, Row
from bench.settings import Settings
from bench.timing import Side, take_turns
from moonvit.config import MediaConfig
from moonvit.image import plan_resize, see_image
from moonvit.video import read_video, sample_indices
from train.memory import keep_memory

_READERS = 4  # threads that read a file

# ---- load ------------------------------------------------------------------------------------------------------------

_LOADER = """
import json, sys, time
import torch
from fusion.model import Kimi
from bench.machine import peak_growth
torch.set_num_threads(int(sys.argv[2]))
began = time.perf_counter()
peak = peak_growth(lambda: globals().update(kimi=Kimi.from_pretrained(sys.argv[1])))
print(json.dumps({"seconds": time.perf_counter() - began, "peak": peak * 2**20}))
"""


def load_rows(settings: Settings) -> Iterator[Row]:
    """Checkpoints and starts."""
    config = shapes.tiny()
    if not settings.tiny:
        config = replace(lm.config.moonlight(), num_hidden_layers=3, vocab_size=32_768)
    plain = shapes.random_model(config)
    with tempfile.TemporaryDirectory(dir=settings.folder, prefix="moonkit-bench-") as folder:
        for name, kimi in (("bfloat16", plain), ("INT4 experts", shapes.in_int4(plain, "experts"))):
            path = Path(folder) / name.replace(" ", "-")
            settings.note(f"writing a checkpoint, {name}, into {path} ...")
            kimi.save_pretrained(path)
            yield from _load(name, path, settings)
    yield from start_rows(settings)


def _load(name: str, folder: Path, settings: Settings) -> Iterator[Row]:
    files = sorted(folder.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    peaks: list[float] = []

    def load() -> float:
        drop_pages(files)
        seconds, peak = _loaded(folder, settings.threads)
        peaks.append(peak)
        return seconds

    def reads() -> float:
        drop_pages(files)
        return read_all(files)

    # a short call is repeated, and these are not: once a round is a gigabyte
    times = take_turns({"ours": load, "disk": reads}, settings.rounds, settings.budget / 2, warm_up=False)
    yield Row.of(
        f"{name}, {size / 1e9:.2f} GB from the disk",
        "GB/s",
        times,
        size / 1e9,
        ceiling=Ceiling("disk reads", "disk", size, size),
        goals=[Goal("share", 0.6)],
        note="a fresh process for each load, timed from the call on; pages dropped before each",
    )
    yield Row.single(
        f"{name}, peak memory of loading over the files' size",
        "times",
        max(peaks) / size,
        [Goal("at most", 1.15)],
        note="resident memory with the mapped pages of the files, beyond that of the process before",
    )


def _loaded(folder: Path, threads: int) -> tuple[float, float]:
    """Seconds and peak bytes of loading in a process of its own."""
    command = [sys.executable, "-c", _LOADER, str(folder), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=_root())
    if done.returncode:
        raise RuntimeError(f"loading {folder.name} failed: {done.stderr.strip().splitlines()[-1:]}")
    told = json.loads(done.stdout.splitlines()[-1])
    return told["seconds"], told["peak"]


def drop_pages(files: list[Path]) -> None:
    """Let the system forget what it holds of these files, where it can be told to."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)  # pages that are not written yet stay
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def read_all(files: list[Path], block: int = 2**23) -> float:
    """Seconds of reading files from end to end, by a few threads: a disk gives more to several than to one."""
    buffers: queue.SimpleQueue[bytearray] = queue.SimpleQueue()
    for _ in range(_READERS):
        buffers.put(bytearray(block))
    handles = [os.open(file, os.O_RDONLY) for file in files]

    def read(piece: tuple[int, int]) -> None:
        buffer = buffers.get()
        os.preadv(piece[0], [buffer], piece[1])
        buffers.put(buffer)

    pieces = [(h, at) for h, file in zip(handles, files, strict=True) for at in range(0, file.stat().st_size, block)]
    try:
        began = time.perf_counter()
        with ThreadPoolExecutor(_READERS) as pool:
            for _ in pool.map(read, pieces):
                pass
        return time.perf_counter() - began
    finally:
        for handle in handles:
            os.close(handle)


def start_rows(settings: Settings) -> Iterator[Row]:
    """How long people wait before anything happens."""
    model = "untrained:tiny" if settings.tiny else "nano"
    ask = [sys.executable, "-m", "moonkit", "ask", "--model", model, "--max-new-tokens", "1", "What is 2 + 2?"]
    commands = (
        ("import fusion", [sys.executable, "-c", "import fusion"], 1.5),
        ("nano to its first token", ask, 3.0),
        ("moonkit --help", [sys.executable, "-m", "moonkit", "--help"], 1.0),
    )
    for what, command, most in commands:
        times = take_turns({"ours": _process(command)}, settings.rounds, settings.budget / 4)
        yield Row.of(what, "s", times, 1, goals=[Goal("at most", most)], note="a fresh process, from call to exit")


def _process(command: list[str]) -> Callable[[], float]:
    def run() -> float:
        began = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, cwd=_root())
        if done.returncode:
            raise RuntimeError(f"{' '.join(command[1:4])} failed: {done.stderr.strip().splitlines()[-1:]}")
        return time.perf_counter() - began

    return run


def _root() -> Path:
    return Path(__file__).parents[1]


# ---- media -----------------------------------------------------------------------------------------------------------

_PHOTO_LIMIT = 3072  # patches: 896x672, what models of this family are often given


def media_rows(settings: Settings) -> Iterator[Row]:
    """A clip and a photo."""
    torch.set_num_threads(settings.threads)
    keep_memory()
    size, frames = ((64, 48), 30) if settings.tiny else ((1280, 720), 600)
    with tempfile.TemporaryDirectory(prefix="moonkit-bench-") as folder:
        clip = Path(folder) / "clip.mp4"
        write_clip(clip, *size, frames)
        config = MediaConfig(in_patch_limit_each_frame=1024)
        sides: dict[str, Side] = {"ours": lambda: our_clip(clip, config)}
        try:
            import decord  # noqa: F401

            sides["decord, plain"] = lambda: plain_clip(clip, config)
        except ImportError as missing:
            settings.note(f"decord is not installed ({missing}): our side only")
        count = len(sample_indices(frames, 30, config.sample_fps))
        yield Row.of(
            f"clip {size[0]}x{size[1]}, {frames} frames, {count} sampled, to patches",
            "ms",
            take_turns(sides, settings.rounds, settings.budget),
            1,
            peers=["decord, plain"],
            goals=[Goal("times", 1.3, "decord, plain")],
            note="H.264, a key frame every 60; ours decodes in a child process under time and memory limits",
        )
    width, height = (400, 300) if settings.tiny else (4000, 3000)
    data = photo(width, height)
    config = MediaConfig(in_patch_limit=_PHOTO_LIMIT)
    plan = plan_resize(width, height, config, config.in_patch_limit)
    times = take_turns(
        {
            "exact": lambda: _drop(see_image(data, config)),
            "not exact": lambda: _drop(see_image(data, config, exact=False)),
            "Pillow, plain": lambda: _drop(plain_photo(data, config)),
        },
        settings.rounds,
        settings.budget,
    )
    for side, goals in (("exact", []), ("not exact", [Goal("times", 3.0, "Pillow, plain")])):
        yield Row.of(
            f"photo {width}x{height} to {plan.width}x{plan.height} patches, {side}",
            "ms",
            times,
            1,
            ours=side,
            peers=["Pillow, plain"],
            goals=goals,
            note="JPEG of quality 90. Exact, the default: all pixels decoded and resized as the released code does, as "
            "the plain path does too. Not exact: at most 1 of 255 levels away",
        )


def our_clip(clip: Path, config: MediaConfig) -> None:
    for chunk in read_video(clip, config).chunks:
        chunk.patches(config)


def plain_clip(clip: Path, config: MediaConfig) -> None:
    """As most code has it: all sampled frames at full size, then Pillow frame by frame, then patches."""
    import decord

    reader = decord.VideoReader(str(clip))
    indices = sample_indices(len(reader), reader.get_avg_fps(), config.sample_fps)
    frames = reader.get_batch(indices).asnumpy()
    limit = config.in_patch_limit_each_frame or config.in_patch_limit
    for start in range(0, len(frames), config.temporal_merge_kernel_size):
        group = frames[start : start + config.temporal_merge_kernel_size]
        _patches([Image.fromarray(frame) for frame in group], config, limit)


def plain_photo(data: bytes, config: MediaConfig) -> torch.Tensor:
    """Pillow from bytes to pixels, numpy from pixels to patches."""
    return _patches([Image.open(io.BytesIO(data)).convert("RGB")], config, config.in_patch_limit)


def _patches(images: list[Image.Image], config: MediaConfig, limit: int) -> torch.Tensor:
    """float32 (patches, 3, size, size) by plain arithmetic."""
    plan = plan_resize(*images[0].size, config, limit)
    padding = ((0, 0), (0, plan.pad_bottom), (0, plan.pad_right), (0, 0))
    resized = [np.asarray(each.resize((plan.width, plan.height), Image.Resampling.BICUBIC)) for each in images]
    pixels = np.pad(np.stack(resized), padding).astype(np.float32) / 255.0
    mean, std = (np.array(each, np.float32) for each in (config.image_mean, config.image_std))
    pixels = (pixels - mean) / std
    rows, columns = plan.grid
    cells = pixels.reshape(len(images), rows, plan.patch_size, columns, plan.patch_size, 3)
    return torch.from_numpy(cells.transpose(0, 1, 3, 5, 2, 4).reshape(-1, 3, plan.patch_size, plan.patch_size).copy())


def photo(width: int, height: int) -> bytes:
    """A JPEG with the smooth shapes and the grain of a photo."""
    draw = np.random.default_rng(0)
    coarse = Image.fromarray(draw.integers(0, 255, (height // 50, width // 50, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    grain = draw.integers(-6, 7, (height, width, 1), dtype=np.int16)
    file = io.BytesIO()
    Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def write_clip(path: Path, width: int, height: int, frames: int) -> None:
    """H.264 at 30 frames a second: a window that moves over a smooth picture."""
    import av

    draw = np.random.default_rng(0)
    coarse = Image.fromarray(draw.integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8))
    wide = np.asarray(coarse.resize((width + 64, height + 64), Image.Resampling.BICUBIC))
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"preset": "veryfast", "crf": "23", "g": "60"}
        for number in range(frames):
            x, y = 2 * number % 64, number % 64
            window = np.ascontiguousarray(wide[y : y + height, x : x + width])
            for packet in stream.encode(av.VideoFrame.from_ndarray(window, format="rgb24")):
                file.mux(packet)
        for packet in stream.encode():
            file.mux(packet)


def _drop(result: object) -> None:
    """A side that returns nothing is timed from outside."""
