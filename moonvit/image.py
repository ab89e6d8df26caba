"""One image of any kind becomes patches.

    path, bytes, PIL, array, tensor, data URL -- load_image --> RGB -- plan_resize, resize, pad --> cut_patches
    the same in one call                      -- see_image(source), or exact=False for large photos in a hurry

Pixel for pixel the released pipeline (media_utils.py of Kimi-K2.5): no upscaling, PIL bicubic, zero padding right and
below to a multiple of 28, x / 255, minus mean, times 1 / std. One deviation: 16-bit images are scaled to 8 bits, where
the released code saturates them to white.
"""

import base64
import binascii
import logging
import math
import struct
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from moonvit.config import MediaConfig
from moonvit.packing import PackedPatches

log = logging.getLogger(__name__)

ImageSource = str | Path | bytes | Image.Image | NDArray[Any] | Tensor
MAX_PIXELS = 2**27  # 134 million: refused before decoding, so that a small file cannot fill the memory
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "AVIF", "JPEG2000", "TGA", "MPO", "DIB")
_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    EOFError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)  # what Pillow's readers raise on files that lie


# ---- loading ---------------------------------------------------------------------------------------------------------


def load_image(source: ImageSource, *, upright: bool = False, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An RGB image, decoded.

    source: path, bytes, PIL image, array or tensor ((h, w), (h, w, 1|3|4) or tensor (3, h, w); uint8, uint16, bool, or
    floats in 0..1), or a base64 data URL. Nothing is ever fetched from a network.
    Results: alpha is dropped, not composited; palette, grey and CMYK go through PIL's convert; of an animation the
    first frame; 16 bits become 8. EXIF orientation is ignored, as in the released code, unless `upright`.
    Raises FileNotFoundError, or a one-line ValueError that names the source.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source, "PIL image", upright)
    if isinstance(source, Tensor | np.ndarray):
        return Image.fromarray(_array(source))
    opened, name = _open(source, max_pixels)
    with opened, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on files that it reads all the same
        if opened.format in ("JPEG", "PNG") and opened.mode == "RGB" and not upright:
            return _decoded(opened, name)
        return _to_rgb(opened, name, upright)


def _open(source: Any, max_pixels: int) -> tuple[Image.Image, str]:
    data, name = read_source(source, "image")
    file: Any = BytesIO(data) if isinstance(data, bytes) else data
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # our own limit on pixels follows
        try:
            image = Image.open(file, formats=_FORMATS)
        except _BROKEN as error:
            raise ValueError(f"{name}: not an image that can be read ({_reason(error)})") from None
    if image.width * image.height > max_pixels:
        size = f"{image.width}x{image.height}"
        image.close()
        raise ValueError(f"{name}: {size} pixels are more than the limit of {max_pixels:,} (decompression bomb?)")
    return image, name


def read_source(source: Any, kind: str) -> tuple[bytes | Path, str]:
    """Path or bytes of a source, and a short name for messages. kind: "image" or "video"."""
    if isinstance(source, bytes | bytearray | memoryview):
        if not source:
            raise ValueError(f"{kind} bytes are empty")
        return bytes(source), f"{kind} of {len(source):,} bytes"
    if isinstance(source, str):
        if source.startswith("data:"):
            return _data_url(source, kind), f"{kind} data URL"
        if source.startswith(("http://", "https://", "ftp://")):
            raise ValueError(f"{source[:80]}: nothing is fetched from a network; download it and give the path")
        source = source.removeprefix("file://")
    if not isinstance(source, str | Path):
        raise ValueError(f"{kind} must be a path, bytes, a data URL or pixels, got {type(source).__name__}")
    path = Path(source)
    name = str(source)[:200]
    if "\0" in str(source) or "\n" in name:
        raise ValueError(f"{kind} path {name[:60]!r} holds control characters")
    try:
        if path.is_dir():
            raise ValueError(f"{name}: is a folder, not a{'n' if kind == 'image' else ''} {kind}")
        if not path.is_file():
            raise FileNotFoundError(f"no such {kind}: {name}")
        if path.stat().st_size == 0:
            raise ValueError(f"{name}: the file is empty")
    except PermissionError:
        raise ValueError(f"{name}: no permission to read it") from None
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{name}: {error.strerror}") from None
    return path, name


def _data_url(url: str, kind: str) -> bytes:
    head, comma, body = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise ValueError(f"{kind} data URL must look like data:{kind}/...;base64,..., got {url[:40]!r}")
    if not head.startswith(f"data:{kind}/") and not head.startswith("data:application/octet-stream"):
        raise ValueError(f"{kind} data URL has type {head[5:-7]!r}")
    try:
        data = base64.b64decode("".join(body.split()), validate=True)  # a space after the comma is common
    except binascii.Error as error:
        raise ValueError(f"{kind} data URL is not valid base64: {error}") from None
    if not data:
        raise ValueError(f"{kind} data URL is empty")
    return data


def _decoded(image: Image.Image, name: str) -> Image.Image:
    """A file of ours that is RGB already: convert would copy it."""
    try:
        _note_orientation(image, name)
        image.load()
    except _BROKEN as error:
        raise ValueError(f"{name}: cannot be decoded ({_reason(error)})") from None
    return image


def _note_orientation(image: Image.Image, name: str) -> None:
    turned = image.getexif().get(0x0112, 1) if hasattr(image, "getexif") else 1
    if turned not in (0, 1):
        log.info("%s: EXIF orientation %s is ignored, as the released code does (upright=True turns it)", name, turned)


def _to_rgb(image: Image.Image, name: str, upright: bool) -> Image.Image:
    try:
        if image.width < 1 or image.height < 1:
            raise ValueError(f"{name}: has no pixels ({image.width}x{image.height})")
        if upright:
            image = ImageOps.exif_transpose(image)
        else:
            _note_orientation(image, name)
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            return Image.fromarray(_array(np.asarray(image), name))
        return image.convert("RGB")
    except _BROKEN as error:
        if isinstance(error, ValueError) and str(error).startswith(name):
            raise
        raise ValueError(f"{name}: cannot be decoded ({_reason(error)})") from None


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 120 else text[:117] + "..."


def _array(source: Any, name: str = "") -> NDArray[np.uint8]:
    """Pixels of any supported dtype and layout as uint8 (h, w, 3)."""
    pixels = (
        source.detach().cpu().float().numpy() if isinstance(source, Tensor) and source.is_floating_point() else source
    )
    pixels = np.asarray(pixels)
    name = name or f"image array {pixels.dtype} {pixels.shape}"
    if (
        isinstance(source, Tensor)
        and pixels.ndim == 3
        and pixels.shape[0] in (1, 3, 4)
        and pixels.shape[2] not in (1, 3, 4)
    ):
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4) or 0 in pixels.shape:
        raise ValueError(f"{name}: expected (h, w), (h, w, 1|3|4) or a tensor (3, h, w)")
    if pixels.shape[0] * pixels.shape[1] > MAX_PIXELS:
        raise ValueError(f"{name}: more than the limit of {MAX_PIXELS:,} pixels")
    pixels = pixels[..., :3]  # alpha is dropped
    if pixels.dtype == bool:
        pixels = pixels * np.uint8(255)
    elif np.issubdtype(pixels.dtype, np.floating):
        if not np.isfinite(pixels).all():
            raise ValueError(f"{name}: holds NaN or infinity")
        low, high = float(pixels.min()), float(pixels.max())
        if low < 0 or high > 255:
            raise ValueError(f"{name}: floats must lie in 0..1 (or 0..255), got {low:.3g}..{high:.3g}")
        pixels = (pixels * 255 if high <= 1 else pixels).round().astype(np.uint8)
    elif np.issubdtype(pixels.dtype, np.integer):
        low, high = int(pixels.min()), int(pixels.max())
        if low < 0 or high > 65_535:
            raise ValueError(f"{name}: integers must lie in 0..255 or 0..65535, got {low}..{high}")
        wide = pixels.dtype == np.uint16 or high > 255
        pixels = (pixels >> 8 if wide else pixels).astype(np.uint8)
    else:
        raise ValueError(f"{name}: dtype {pixels.dtype} is not pixels")
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))


# ---- sizes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Resize:
    """Target of one image: resized to width x height, then padded right and below."""

    width: int
    height: int
    pad_right: int
    pad_bottom: int
    patch_size: int
    merge: int

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns in patches."""
        return (self.height + self.pad_bottom) // self.patch_size, (self.width + self.pad_right) // self.patch_size

    @property
    def tokens(self) -> int:
        rows, columns = self.grid
        return rows * columns // self.merge**2


def plan_resize(width: int, height: int, config: MediaConfig, limit: int) -> Resize:
    """Size at which an image of width x height is seen, under a limit of `limit` patches.

    Never larger than it is. The limit counts whole patches before padding, so the padded grid may exceed it a little:
    that is the released rule. Raises ValueError where the older Kimi-VL rule has no answer (a side of 512 patches).
    """
    if width < 1 or height < 1:
        raise ValueError(f"an image of {width}x{height} has no pixels")
    if config.fixed_output_tokens is not None:
        raise ValueError("fixed_output_tokens is not implemented: no released preprocessor_config.json sets it")
    patch, side = config.patch_size, config.patch_limit_on_one_side
    if config.rule == "kimi_vl":
        scale = 1.0
        if (width // patch) * (height // patch) > limit:
            scale = math.sqrt(limit / ((width // patch) * (height // patch)))
    else:
        area = max(1, width // patch) * max(1, height // patch)
        scale = min(1.0, math.sqrt(limit / area), side * patch / width, side * patch / height)
    new_width = min(max(1, int(width * scale)), side * patch)
    new_height = min(max(1, int(height * scale)), side * patch)
    if config.rule == "kimi_vl":
        new_width, new_height = max(1, int(width * scale)), max(1, int(height * scale))
    cell = patch * config.merge_kernel_size
    plan = Resize(new_width, new_height, -new_width % cell, -new_height % cell, patch, config.merge_kernel_size)
    if config.rule == "kimi_vl" and max(plan.grid) >= side:
        raise ValueError(
            f"an image of {width}x{height} gives {plan.grid[0]}x{plan.grid[1]} patches; "
            f"this model takes fewer than {side} a side"
        )
    return plan


# ---- patches ---------------------------------------------------------------------------------------------------------


def see_image(
    source: ImageSource, config: MediaConfig | None = None, *, exact: bool = True, upright: bool = False
) -> PackedPatches:
    """One image of any kind, decoded, resized and cut: one item, (1, rows, columns). Errors as `load_image`.

    exact=False decodes JPEG by simplejpeg (the same pixels as Pillow's) and resizes in uint8 by torch's antialiased
    bicubic filter, whose weights have fewer bits: at most 2 of 255 levels from the exact pixels. A photo that is made
    half as large or less is scaled inside of the JPEG decoder first: up to 22 levels, 1.5 to 3 on average (measured on
    grainy pictures).
    """
    config = config or MediaConfig()
    if exact:
        return image_patches(load_image(source, upright=upright), config)
    pixels, (width, height) = _decode_quickly(source, upright, config)
    plan = plan_resize(width, height, config, config.in_patch_limit)
    if pixels.shape[:2] != (plan.height, plan.width):
        planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]  # (1, 3, h, w), channels last in memory
        resized = F.interpolate(planes, size=(plan.height, plan.width), mode="bicubic", antialias=True)
        pixels = resized[0].permute(1, 2, 0).numpy()
    return cut_patches(_pad(pixels, plan)[None], config)


def _decode_quickly(
    source: ImageSource, upright: bool, config: MediaConfig
) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    """Pixels (h, w, 3) of full or reduced size, and the full width and height."""
    opened: tuple[Image.Image, str] | None = None
    if not isinstance(source, Image.Image | Tensor | np.ndarray):
        opened = _open(source, MAX_PIXELS)
        with opened[0] as image:
            plain = image.format == "JPEG" and image.mode == "RGB" and image.width * image.height > 2**16
            if upright and plain:
                plain = image.getexif().get(0x0112, 1) in (0, 1)
            size = image.size
    if opened is None or not plain:
        pixels = np.array(load_image(source, upright=upright))
        return pixels, (pixels.shape[1], pixels.shape[0])
    import simplejpeg

    plan = plan_resize(*size, config, config.in_patch_limit)
    small = 2 * plan.width <= size[0] and 2 * plan.height <= size[1]  # other ratios are not faster
    data, name = read_source(source, "image")
    whole = data if isinstance(data, bytes) else data.read_bytes()
    least = {"min_width": plan.width, "min_height": plan.height} if small else {}
    try:
        return simplejpeg.decode_jpeg(whole, **least), size
    except ValueError as error:
        raise ValueError(f"{name}: cannot be decoded ({_reason(error)})") from None


def image_patches(image: Image.Image, config: MediaConfig | None = None) -> PackedPatches:
    """One RGB image as one item, (1, rows, columns)."""
    config = config or MediaConfig()
    plan = plan_resize(image.width, image.height, config, config.in_patch_limit)
    return cut_patches(pad_frame(image, plan)[None], config)


def pad_frame(image: Image.Image, plan: Resize) -> NDArray[np.uint8]:
    """Resized with PIL's bicubic filter and zero-padded: uint8 (height, width, 3)."""
    if image.mode != "RGB":
        raise ValueError(f"expected an RGB image, got mode {image.mode}; load_image makes one")
    if image.size != (plan.width, plan.height):
        if image.width * image.height > _LARGE and _workers() > 1:
            image = _resize_in_strips(image, plan.width, plan.height, _workers())
        else:
            image = image.resize((plan.width, plan.height), Image.Resampling.BICUBIC)
    return _pad(np.asarray(image), plan)


def _pad(pixels: NDArray[np.uint8], plan: Resize) -> NDArray[np.uint8]:
    if not plan.pad_right and not plan.pad_bottom:
        return pixels
    padded = np.zeros((plan.height + plan.pad_bottom, plan.width + plan.pad_right, 3), np.uint8)
    padded[: plan.height, : plan.width] = pixels
    return padded


_LARGE = 2**21  # pixels from which threads repay their start


def _workers() -> int:
    return min(4, torch.get_num_threads())  # one in the workers of a data loader


def _in_threads(work: Callable[[int, int], None], length: int, workers: int) -> None:
    """work(start, stop) on equal parts of range(length). A pool of its own: one that outlives a fork would hang."""
    edges = [length * part // workers for part in range(workers + 1)]
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, edges[:-1], edges[1:]))


def _resize_in_strips(image: Image.Image, width: int, height: int, workers: int) -> Image.Image:
    """PIL's bicubic resize in threads, to the same bits: it too does all rows first, rounds, then all columns."""
    image.load()  # threads must not race to read the file
    wide = Image.new("RGB", (width, image.height))
    small = Image.new("RGB", (width, height))

    def rows(start: int, stop: int) -> None:
        strip = image.crop((0, start, image.width, stop))
        wide.paste(strip.resize((width, stop - start), Image.Resampling.BICUBIC), (0, start))

    def columns(start: int, stop: int) -> None:
        strip = wide.crop((start, 0, stop, wide.height))
        small.paste(strip.resize((stop - start, height), Image.Resampling.BICUBIC), (start, 0))

    _in_threads(rows, image.height, workers)
    _in_threads(columns, width, workers)
    return small


def cut_patches(frames: NDArray[np.uint8], config: MediaConfig) -> PackedPatches:
    """Frames of one item, uint8 (t, h, w, 3) with sides that are multiples of a cell, to normalised patches."""
    size = config.patch_size
    t, height, width, _ = frames.shape
    rows, columns = height // size, width // size
    cells = frames.reshape(t * rows, size, columns, size, 3)
    pixels = np.empty((t * rows, columns, 3, size, size), np.float32)
    levels = _levels(config.image_mean, config.image_std)
    same = bool((levels == levels[0]).all())

    def cut(start: int, stop: int) -> None:
        # row by row: its bytes stay in the cache between the transposition and the look-up
        for row in range(start, stop):
            line = np.ascontiguousarray(cells[row].transpose(1, 3, 0, 2))  # (columns, 3, size, size)
            if same:
                np.take(levels[0], line, out=pixels[row], mode="clip")  # "clip": without it, numpy copies `out`
            else:
                for channel in range(3):
                    pixels[row, :, channel] = levels[channel][line[:, channel]]

    workers = _workers() if frames.size > _LARGE else 1
    if workers > 1:
        _in_threads(cut, t * rows, workers)
    else:
        cut(0, t * rows)
    return PackedPatches(torch.from_numpy(pixels.reshape(-1, 3, size, size)), torch.tensor([[t, rows, columns]]))


@lru_cache(maxsize=8)
def _levels(mean: tuple[float, ...], std: tuple[float, ...]) -> NDArray[np.float32]:
    """The normalised value of each of the 256 levels, (3, 256): the released arithmetic, done once per level."""
    unit = (np.arange(256) / 255.0).astype(np.float32)
    means, scales = np.array(mean, np.float32), (1.0 / np.array(std)).astype(np.float32)
    return (unit[None] - means[:, None]) * scales[:, None]
