"""Images to patches: sizes, pixels, every kind of source; what is broken gives one clear line.

pytest tests/moonvit/test_image.py
"""

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from moonvit.config import MediaConfig, tiny
from moonvit.encoder import MoonViT
from moonvit.image import _levels, image_patches, load_image, plan_resize, see_image

# width, height, resized, padding right and below, grid (rows, columns), tokens: from the released navit_resize_image
SIZES = [
    (1, 1, (1, 1), (27, 27), (2, 2), 1),
    (29, 28, (29, 28), (27, 0), (2, 4), 2),
    (224, 224, (224, 224), (0, 0), (16, 16), 64),
    (384, 384, (384, 384), (8, 8), (28, 28), 196),
    (640, 480, (640, 480), (4, 24), (36, 46), 414),
    (896, 896, (896, 896), (0, 0), (64, 64), 1024),
    (1280, 720, (1280, 720), (8, 8), (52, 92), 1196),
    (1920, 1080, (1920, 1080), (12, 12), (78, 138), 2691),
    (2560, 1440, (2404, 1352), (4, 20), (98, 172), 4214),
    (3840, 2160, (2392, 1345), (16, 27), (98, 172), 4214),
    (4096, 4096, (1795, 1795), (25, 25), (130, 130), 4225),
    (7168, 448, (7168, 448), (0, 0), (32, 512), 4096),
    (7169, 100, (7168, 99), (0, 13), (8, 512), 1024),
    (20_000, 50, (7168, 17), (0, 11), (2, 512), 256),
    (10_000, 1, (7168, 1), (0, 27), (2, 512), 256),
]


@pytest.mark.parametrize(("width", "height", "resized", "padding", "grid", "tokens"), SIZES)
def test_golden_sizes(width: int, height: int, resized: Any, padding: Any, grid: Any, tokens: int) -> None:
    plan = plan_resize(width, height, MediaConfig(), 16_384)
    assert ((plan.width, plan.height), (plan.pad_right, plan.pad_bottom)) == (resized, padding)
    assert (plan.grid, plan.tokens) == (grid, tokens)


@given(st.integers(1, 30_000), st.integers(1, 30_000), st.sampled_from([4096, 16_384]))
def test_any_size_gives_a_grid_the_tower_takes(width: int, height: int, limit: int) -> None:
    plan = plan_resize(width, height, MediaConfig(), limit)
    assert plan.width <= width and plan.height <= height, "never larger than it is"
    assert plan.grid[0] % 2 == 0 == plan.grid[1] % 2 and max(plan.grid) <= 512
    # the limit counts whole patches before padding: 17,784 and 5,352 are the worst cases that exist
    assert plan.grid[0] * plan.grid[1] <= {16_384: 17_784, 4096: 5_352}[limit]


def reference_patches(image: Image.Image) -> torch.Tensor:
    """The released steps one by one, in float64 and with loops: resize, pad, scale, normalise, cut."""
    config = MediaConfig()
    plan = plan_resize(image.width, image.height, config, config.in_patch_limit)
    image = image.convert("RGB").resize((plan.width, plan.height), Image.Resampling.BICUBIC)
    canvas = np.zeros((plan.height + plan.pad_bottom, plan.width + plan.pad_right, 3), np.uint8)
    canvas[: plan.height, : plan.width] = np.asarray(image)
    scaled = (canvas / 255.0).astype(np.float32)
    scaled = (scaled - np.array([0.5] * 3, np.float32)) * np.array([2.0] * 3, np.float32)
    rows, columns = plan.grid
    cut = [scaled[14 * r : 14 * r + 14, 14 * c : 14 * c + 14] for r in range(rows) for c in range(columns)]
    return torch.from_numpy(np.stack(cut).transpose(0, 3, 1, 2))


def noise(width: int, height: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


PICTURES: dict[str, Callable[[], Image.Image]] = {
    "RGB": lambda: Image.fromarray(noise(61, 47)),
    "RGBA": lambda: Image.fromarray(noise(61, 47, 4), "RGBA"),
    "LA": lambda: Image.fromarray(noise(61, 47, 4), "RGBA").convert("LA"),
    "L": lambda: Image.fromarray(noise(61, 47)[..., 0]),
    "P": lambda: Image.fromarray(noise(61, 47)).quantize(16),
    "1": lambda: Image.fromarray(noise(61, 47)[..., 0]).convert("1"),
    "CMYK": lambda: Image.fromarray(noise(61, 47)).convert("CMYK"),
    "YCbCr": lambda: Image.fromarray(noise(61, 47)).convert("YCbCr"),
    "HSV": lambda: Image.fromarray(noise(61, 47)).convert("HSV"),
    "1x1": lambda: Image.fromarray(noise(1, 1)),
    "20000x50": lambda: Image.fromarray(noise(20_000, 50)),
    "2500x1500": lambda: Image.fromarray(noise(2500, 1500)),
}


@pytest.mark.parametrize("kind", PICTURES)
def test_pixels_are_the_released_pipelines_bit_for_bit(kind: str) -> None:
    image = PICTURES[kind]()
    assert torch.equal(image_patches(load_image(image)).pixels, reference_patches(image))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_large_pictures_in_threads_are_the_released_pixels(threads: int) -> None:
    before = torch.get_num_threads()
    image = Image.fromarray(noise(2501, 1503))
    try:
        torch.set_num_threads(threads)
        assert torch.equal(image_patches(image).pixels, reference_patches(image))
    finally:
        torch.set_num_threads(before)


def test_every_channel_has_its_own_levels() -> None:
    config = MediaConfig(image_mean=(0.48, 0.46, 0.41), image_std=(0.27, 0.26, 0.28))
    pixels = noise(56, 28)
    found = image_patches(Image.fromarray(pixels), config).pixels  # (8, 3, 14, 14)
    levels = _levels(config.image_mean, config.image_std)
    for channel in range(3):
        assert np.array_equal(found[5, channel], levels[channel][pixels[14:28, 14:28, channel]])


def photo(width: int, height: int) -> Image.Image:
    """Smooth shapes and a little grain."""
    coarse = Image.fromarray(noise(width // 40, height // 40)).resize((width, height), Image.Resampling.BICUBIC)
    grain = np.random.default_rng(1).integers(-6, 7, (height, width, 1), dtype=np.int16)
    return Image.fromarray((np.asarray(coarse).astype(np.int16) + grain).clip(0, 255).astype(np.uint8))


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return png(photo(1201, 803), "JPEG", exif=exif)


FILES: dict[str, Callable[[], bytes]] = {
    "JPEG": lambda: png(photo(1201, 803), "JPEG", quality=90),
    "JPEG, all colours": lambda: png(photo(1201, 803), "JPEG", subsampling=0),
    "JPEG, progressive": lambda: png(photo(1201, 803), "JPEG", progressive=True),
    "JPEG, turned": turned,
    "JPEG, grey": lambda: png(photo(1201, 803).convert("L"), "JPEG"),
    "JPEG, CMYK": lambda: png(photo(1201, 803).convert("CMYK"), "JPEG"),
    "PNG": lambda: png(photo(1201, 803)),
    "PNG, alpha": lambda: png(photo(1201, 803).convert("RGBA")),
    "PNG, palette": lambda: png(photo(1201, 803).quantize(16)),
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("limit", [16_384, 3_000, 500])
def test_in_a_hurry_pixels_stay_close(kind: str, limit: int) -> None:
    data = FILES[kind]()
    config = MediaConfig(in_patch_limit=limit)
    exact = see_image(data, config)
    assert torch.equal(exact.pixels, image_patches(Image.open(io.BytesIO(data)).convert("RGB"), config).pixels)
    quick = see_image(data, config, exact=False)
    assert torch.equal(quick.grid_thw, exact.grid_thw)
    levels = (quick.pixels - exact.pixels).abs() * 127.5
    scaled = limit == 500 and kind.startswith("JPEG") and kind not in ("JPEG, grey", "JPEG, CMYK")
    assert levels.max() <= (25 if scaled else 2.01) and levels.mean() <= (4 if scaled else 0.02)
    if limit == 16_384:  # not resized: the same pixels
        assert levels.max() == 0
    upright = see_image(data, config, upright=True, exact=False)
    assert torch.equal(upright.grid_thw, see_image(data, config, upright=True).grid_thw)


def png(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def test_every_source_gives_the_same_pixels(tmp_path: Path) -> None:
    pixels = noise(40, 30)
    image = Image.fromarray(pixels)
    data = png(image)
    path = tmp_path / "ein Bild ü.png"
    path.write_bytes(data)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    sources: list[Any] = [
        path,
        str(path),
        f"file://{path}",
        data,
        bytearray(data),
        memoryview(data),
        image,
        pixels,
        pixels.astype(np.int64),
        pixels.astype(np.uint16) * 257,
        pixels / 255.0,
        pixels.astype(np.float32),
        torch.from_numpy(pixels),
        tensor,
        tensor / 255,
        (tensor / 255).double().requires_grad_(),
        "data:image/png;base64," + base64.b64encode(data).decode(),
        "data:image/png;base64, " + base64.encodebytes(data).decode(),  # wrapped lines, as mail programs do
    ]
    for source in sources:
        assert np.array_equal(np.asarray(load_image(source)), pixels), type(source)


def test_alpha_is_dropped_not_composited() -> None:
    clear = np.zeros((4, 4, 4), np.uint8)
    clear[..., 0] = 200  # red, and fully transparent
    assert np.asarray(load_image(png(Image.fromarray(clear, "RGBA"))))[0, 0].tolist() == [200, 0, 0]


def test_sixteen_bits_become_eight() -> None:
    ramp = np.arange(0, 65_536, 4096, dtype=np.uint16).reshape(4, 4)
    assert np.asarray(load_image(png(Image.fromarray(ramp))))[..., 0].flatten().tolist() == list(range(0, 256, 16))
    floats = (ramp / 65_536).astype(np.float32)
    tiff = np.asarray(load_image(png(Image.fromarray(floats), "TIFF")))
    assert abs(tiff[..., 1].astype(int) - (ramp >> 8)).max() <= 1


def test_exif_orientation_is_ignored_unless_asked() -> None:
    image = Image.fromarray(noise(40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    data = png(image, "JPEG", exif=exif, quality=100)
    assert load_image(data).size == (40, 20)
    assert load_image(data, upright=True).size == (20, 40)


def test_animations_give_their_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue")]
    data = png(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(load_image(data))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "TGA", "JPEG2000"])
def test_formats(form: str) -> None:
    smooth = np.broadcast_to(np.arange(64, dtype=np.uint8)[:, None, None] * 3, (64, 64, 3))
    found = np.asarray(load_image(png(Image.fromarray(smooth.copy()), form))).astype(int)
    assert abs(found - smooth).mean() < 4


# ---- hostile ---------------------------------------------------------------------------------------------------------

GOOD = png(Image.fromarray(noise(64, 64)))


def bomb() -> bytes:
    """A PNG header that promises 60,000 x 60,000 pixels."""
    import struct
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


HOSTILE: dict[str, tuple[Any, str]] = {
    "empty bytes": (b"", "empty"),
    "no image": (b"hello " * 50, "not an image"),
    "html": (b"<html><body>404</body></html>", "not an image"),
    "half a PNG": (GOOD[: len(GOOD) // 2], "cannot be decoded"),
    "PNG with damaged data": (GOOD[:200] + b"\0" * 200 + GOOD[400:], "cannot be decoded"),
    "PNG signature only": (GOOD[:8], "not an image"),
    "bomb": (bomb(), "exceeds limit of"),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not an image"),
    "PDF": (b"%PDF-1.4\n%%EOF", "not an image"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    "pickle": (b"\x80\x04\x95\x10\0\0\0\0\0\0\0\x8c\x04evil\x94.", "not an image"),
    "http": ("http://example.com/a.png", "nothing is fetched"),
    "https": ("https://example.com/a.png", "nothing is fetched"),
    "NUL in the path": ("a\0b.png", "control characters"),
    "newline in the path": ("a\nb.png", "control characters"),
    "very long path": ("x" * 5000, "image|name too long"),
    "data URL without base64": ("data:image/png,abc", "must look like"),
    "data URL with bad base64": ("data:image/png;base64,@@@@", "not valid base64"),
    "data URL with odd padding": ("data:image/png;base64,abc", "not valid base64"),
    "empty data URL": ("data:image/png;base64,", "empty"),
    "data URL of text": ("data:text/html;base64,AAAA", "has type"),
    "None": (None, "must be a path"),
    "number": (7, "must be a path"),
    "list": ([1, 2], "must be a path"),
    "dict": ({"url": "a.png"}, "must be a path"),
    "1-D array": (np.zeros(5), "expected"),
    "4-D array": (np.zeros((2, 5, 5, 3)), "expected"),
    "two channels": (np.zeros((5, 5, 2), np.uint8), "expected"),
    "no pixels": (np.zeros((0, 5, 3), np.uint8), "expected"),
    "NaN": (np.full((4, 4, 3), np.nan), "NaN"),
    "infinity": (torch.full((3, 4, 4), float("inf")), "NaN or infinity"),
    "negative": (np.full((4, 4, 3), -1), "must lie in"),
    "normalised floats": (np.linspace(-1, 1, 48).reshape(4, 4, 3), "must lie in"),
    "too large integers": (np.full((4, 4, 3), 70_000), "must lie in"),
    "complex": (np.zeros((4, 4, 3), complex), "is not pixels"),
    "strings": (np.array([["a", "b"], ["c", "d"]]), "is not pixels"),
    "objects": (np.array([[None, None]], dtype=object), "is not pixels"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_images_give_one_clear_line(name: str) -> None:
    source, message = HOSTILE[name]
    for load in (load_image, lambda source: see_image(source, exact=False)):
        with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
            load(source)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("exact", [True, False])
def test_half_a_photo_gives_one_clear_line(exact: bool) -> None:
    data = FILES["JPEG"]()
    with pytest.raises(ValueError, match="cannot be decoded") as caught:
        see_image(data[: len(data) // 2], exact=exact)
    assert "\n" not in str(caught.value)


def test_paths_that_are_no_images(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    for path, error, message in (
        (tmp_path / "gone.png", FileNotFoundError, "no such image"),
        (tmp_path, ValueError, "is a folder"),
        (tmp_path / "empty.png", ValueError, "file is empty"),
    ):
        with pytest.raises(error, match=message) as caught:
            load_image(path)
        assert str(path) in str(caught.value)


@given(st.binary(max_size=300), st.integers(0, 300), st.booleans())
def test_damaged_files_never_do_worse_than_a_value_error(junk: bytes, at: int, keep: bool) -> None:
    for good in (GOOD, JPEG, GIF, WEBP, TIFF):
        damaged = good[:at] + junk + (good[at + len(junk) :] if keep else b"")
        try:
            assert load_image(damaged).mode == "RGB"
        except ValueError as error:
            assert "\n" not in str(error)


JPEG, GIF, WEBP, TIFF = (png(Image.fromarray(noise(32, 32)), form) for form in ("JPEG", "GIF", "WEBP", "TIFF"))


def test_kimi_vl_rule() -> None:
    config = MediaConfig(in_patch_limit=4096, in_patch_limit_each_frame=None, rule="kimi_vl")
    assert plan_resize(640, 480, config, 4096).grid == (36, 46)
    assert plan_resize(1920, 1080, config, 4096).tokens <= 1100
    with pytest.raises(ValueError, match="fewer than 512 a side"):
        plan_resize(7168, 28, config, 4096)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({}, "neither media_proc_cfg"),
        ({"media_proc_cfg": {"in_patch_limit": 0}}, "must be positive"),
        ({"media_proc_cfg": {"sample_fps": -1}}, "must be positive"),
        ({"media_proc_cfg": {"shrink": 2}}, "unknown media_proc_cfg keys shrink"),
        ({"media_proc_cfg": {"timestamp_mode": "s"}}, "timestamp_mode"),
        ({"media_proc_cfg": {"image_mean": [0.5]}}, "three numbers"),
        ({"in_token_limit": 4096, "pad_input": False}, "centre crop"),
    ],
)
def test_preprocessor_configs_that_we_do_not_know_are_refused(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MediaConfig.from_dict(raw)


def test_encode_gives_one_tensor_per_image_whatever_shares_the_pack() -> None:
    torch.manual_seed(0)
    tower = MoonViT(tiny()).eval()
    images = [noise(50, 40), noise(28, 28), noise(200, 30)]
    together = tower.encode(images)
    assert [tuple(each.shape) for each in together] == [(4, 4, 64), (1, 4, 64), (16, 4, 64)]
    for image, features in zip(images, together, strict=True):
        torch.testing.assert_close(tower.encode([image], patch_budget=100)[0], features, rtol=1e-5, atol=1e-5)
    assert tower.encode([]) == []
