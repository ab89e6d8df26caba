"""Drawings of what a model saw, with PIL only: pictures cut into tokens, attention on them, and the experts' load.

    draw_patches   the picture as the model gets it, thin lines between patches, strong ones between tokens
    draw_heat      the same picture in grey, coloured by how much attention each token got, with a scale
    draw_experts   a row per layer and a square per expert, coloured by how often it was chosen, with a scale

In: a SeenItem or Look of fusion/look.py. Out: an RGB image at most 1,024 pixels wide, on a ground of its own, so that
it reads the same on a light and a dark page. Colours run from dark to light evenly (matplotlib's "inferno"), which
also holds for every kind of colour blindness and in grey print. `describe` says the same in words.

    draw_heat(seen.items[0], seen.attention(position)[0]).save("heat.png")
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from fusion.look import Look, SeenItem

_WIDTH, _HEIGHT = 1024, 1024  # most pixels of a drawing's width, and of one picture's height
_MARGIN = 16
_GROUND, _INK, _QUIET, _EDGE = (250, 249, 246), (28, 30, 34), (92, 97, 105), (203, 203, 198)
_FINE, _FINER = 6, 12  # pixels between strong and between thin lines below which they would hide the picture

# "inferno" at 17 even steps, from matplotlib's table (public domain, CC0)
_HEX = (
    "000004 0b0724 210c4a 3d0965 57106e 71196e 8a226a a32c61 bc3754 "
    "d24644 e45a31 f1731d f98e09 fcac11 f9cb35 f2ea69 fcffa4"
)
_INFERNO = np.array([tuple(bytes.fromhex(colour)) for colour in _HEX.split()], dtype=np.float64)


# ---- words -----------------------------------------------------------------------------------------------------------


def describe(item: "SeenItem") -> str:
    """What happened to a picture on its way to tokens, in one or two sentences: also a good alternative text."""
    rows, columns = item.grid
    cell_rows, cell_columns = item.cells
    patch = item.frames[0].width // columns
    size, small = f"{item.size[0]}×{item.size[1]}", f"{item.resized[0]}×{item.resized[1]}"
    if item.kind == "image":
        what = f"Image of {size} pixels"
    else:
        count = len(item.frames)
        what = f"Chunk at {item.stamp}: {count} frame{'s' * (count > 1)} of {size} pixels"
    kept = "kept at that size" if item.size == item.resized else f"resized to {small}"
    right, below = item.padding
    added = [f"{n} px of padding {where}" for n, where in ((right, "on the right"), (below, "below")) if n]
    frames = " Each token sees its square in every frame." if len(item.frames) > 1 else ""
    return (
        f"{what}, {kept}{', ' + ' and '.join(added) if added else ''}. {rows} rows and {columns} columns of patches, "
        f"{patch}×{patch} pixels each; {item.merge}×{item.merge} patches make one token: "
        f"{cell_rows} × {cell_columns} = {item.tokens:,} token{'s' * (item.tokens != 1)}.{frames}"
    )


def describe_heat(item: "SeenItem", weights: NDArray[np.floating]) -> str:
    """What `draw_heat` shows, in one or two sentences."""
    largest = float(np.max(weights))
    if not largest:
        return "None of this token's attention is here: a token sees only what stands before it."
    row, column = divmod(int(np.argmax(weights)), weights.shape[1])
    what = "picture" if item.kind == "image" else "chunk"
    return (
        f"{percent(float(np.sum(weights)))} of this token's attention is on this {what}. "
        f"The strongest square (framed, row {row + 1}, column {column + 1} of {weights.shape[0]}×{weights.shape[1]}) "
        f"gets {percent(largest)}; spread evenly, each would get {percent(float(np.mean(weights)))}."
    )


def describe_experts(look: "Look", load: Sequence[NDArray[np.floating]] | None = None) -> str:
    """What `draw_experts` shows, in two or three sentences."""
    table = np.stack(list(look.experts if load is None else load))  # (layers, experts)
    experts = table.shape[1]
    layer, expert = divmod(int(table.argmax()), experts)
    idle = int((table == 0).sum())
    return (
        f"Each row is a layer, each square one of its {experts} experts; every token chooses {look.chosen.shape[2]} of "
        f"them per layer. Busiest: expert {expert} of layer {look.expert_layers[layer]} with "
        f"{percent(float(table.max()))} of the layer's choices; spread evenly, each would get {percent(1 / experts)}. "
        + (f"{idle:,} of {table.size:,} were never chosen (darkest)." if idle else "Every expert was chosen.")
    )


def percent(share: float) -> str:
    """0.0213 as "2.1 %"."""
    if 0 < share < 5e-6:
        return "under 0.001 %"
    return f"{100 * share:.0f} %" if share >= 0.0995 else f"{100 * share:.2g} %"


# ---- drawings --------------------------------------------------------------------------------------------------------


def draw_patches(item: "SeenItem", words: bool = True) -> Image.Image:
    """The picture, or the frames of a chunk side by side, as the model gets them, with patch and token lines.

    words: False leaves out ground, legend and sentence, for a page that sets `describe` as text of its own.
    """
    blocks = _blocks(item)
    if words:
        return _panel(blocks)
    assert isinstance(blocks[0], Image.Image), "the picture comes first"
    return blocks[0]


def _blocks(item: "SeenItem") -> "list[Block]":
    pictures, scale = [], _scale(item)
    for frame in item.frames:
        picture = _resize(frame, scale)
        step = _draw_grid(picture, item)
        _hatch(picture, item)
        pictures.append(picture)
    blocks: list[Block] = [_side_by_side(pictures), describe(item)]
    squares = "a square of strong lines is one token" if step == 1 else f"a square is {step}×{step} tokens"
    patch = min(pictures[0].width / item.grid[1], pictures[0].height / item.grid[0])
    thin = ", thin lines are its patches" if patch >= _FINER else ""
    blocks.append((_swatch_of_lines(), f"{squares}{thin}"))
    if any(item.padding):
        blocks.append((_swatch_of_hatches(), "padding: black pixels that only fill up the last squares"))
    return blocks


def draw_items(items: Sequence["SeenItem"]) -> Image.Image:
    """`draw_patches` of several items, one below the other."""
    if not items:
        raise ValueError("there are no pictures to draw: the conversation is text only")
    return _panel([block for item in items for block in _blocks(item)])


def draw_heat(
    item: "SeenItem", weights: NDArray[np.floating], most: float | None = None, words: bool = True
) -> Image.Image:
    """Attention of one token over the squares of an item. weights (rows, columns): shares of all its attention.

    most: the share at the bright end of the scale; None is the largest of this item. Give chunks of one clip the same.
    words: False leaves out ground, scale and sentence, for a page that sets `describe_heat` as text of its own. Raises
    ValueError for weights of another shape, or that are no shares.
    """
    weights = np.asarray(weights, dtype=np.float64)
    if weights.shape != item.cells:
        raise ValueError(f"the item has {item.cells} rows and columns of tokens but the weights are {weights.shape}")
    if not (np.isfinite(weights).all() and weights.min() >= 0 and weights.sum() <= 1 + 1e-6):
        raise ValueError("weights must be shares of one token's attention: at least 0 and together at most 1")
    largest = float(weights.max())
    if most is not None and not most >= largest:
        raise ValueError(f"the bright end of the scale, {most}, is below the largest weight, {largest}")
    top = most or largest
    levels = weights / top if top else weights
    scale = _scale(item)
    row, column = divmod(int(weights.argmax()), weights.shape[1])
    pictures = []
    for frame in item.frames:
        picture = _resize(frame, scale)
        # nearest: a square has one weight, and smooth blobs would claim more detail than there is
        spread = Image.fromarray(levels.astype(np.float32)).resize(picture.size, Image.Resampling.NEAREST)
        picture = Image.fromarray(_tint(np.asarray(picture.convert("L"), np.float64), np.asarray(spread, np.float64)))
        _hatch(picture, item)
        if largest:
            across, down = picture.width / weights.shape[1], picture.height / weights.shape[0]
            box = (column * across, row * down, (column + 1) * across - 1, (row + 1) * down - 1)
            pen = ImageDraw.Draw(picture)
            pen.rectangle([round(v) for v in box], outline=(0, 0, 0), width=3)
            pen.rectangle([round(v) for v in box], outline=(255, 255, 255), width=1)
        pictures.append(picture)
    if not words:
        return _side_by_side(pictures)
    said = describe_heat(item, weights)
    if not largest:
        return _panel([_side_by_side(pictures), said])
    bar = _tint(np.full((14, 256), 128.0), np.tile(np.linspace(0, 1, 256), (14, 1)))
    ticks = [(0.0, "0"), (0.5, percent(top / 2)), (1.0, f"{percent(top)} of its attention")]
    return _panel([_side_by_side(pictures), _legend(bar, ticks), said])


def draw_experts(look: "Look", load: Sequence[NDArray[np.floating]] | None = None, words: bool = True) -> Image.Image:
    """How the choices of each layer spread over its experts. load: `look.load(...)` of some tokens; None is all.

    words: False leaves out scale and sentence, for a page that sets `describe_experts` as text of its own.
    Raises ValueError for a model without expert layers.
    """
    shares = list(look.experts if load is None else load)
    if not shares:
        raise ValueError("this model has no expert layers: every token runs through the same weights")
    table = np.stack(shares).astype(np.float64)  # (layers, experts)
    layers, experts = table.shape
    if len(look.expert_layers) != layers:
        raise ValueError(f"the model has {len(look.expert_layers)} expert layers but the load has {layers}")
    largest, even = float(table.max()), 1 / experts
    font = _font(15)
    left = round(max(font.getlength(f"layer {n}") for n in look.expert_layers)) + 10
    across = max(1, min(24, (_WIDTH - 2 * _MARGIN - left) // experts))
    down = max(5, min(24, 480 // layers))
    gap = int(min(across, down) >= 8)
    chart = Image.new("RGB", (left + across * experts, down * layers + 24), _GROUND)
    if chart.width > _WIDTH - 2 * _MARGIN:
        raise ValueError(f"{experts} experts do not fit into a drawing of {_WIDTH} pixels")
    cells = np.repeat(np.repeat(_colours(table / largest), down, 0), across, 1).round().astype(np.uint8)
    chart.paste(Image.fromarray(cells), (left, 0))
    pen = ImageDraw.Draw(chart)
    if gap:
        for n in range(1, experts):
            pen.line([(left + n * across, 0), (left + n * across, down * layers - 1)], fill=_GROUND)
        for n in range(1, layers):
            pen.line([(left, n * down), (chart.width, n * down)], fill=_GROUND)
    for n in range(0, layers, -(-18 // down)):
        pen.text((left - 8, (n + 0.5) * down), f"layer {look.expert_layers[n]}", _INK, font, anchor="rm")
    apart = next(n for n in (1, 2, 4, 8, 16, 32, 64, 128) if n * across >= 40 or n == 128)
    for n in range(0, experts, apart):
        pen.text((left + (n + 0.5) * across, down * layers + 4), str(n), _QUIET, font, anchor="ma")
    if not words:
        return chart
    bar = _colours(np.tile(np.linspace(0, 1, 256), (14, 1))).round().astype(np.uint8)
    ticks = [(0.0, "0"), (1.0, f"{percent(largest)} of the layer's choices")]
    if 0.12 < even / largest < 0.75:
        ticks.insert(1, (even / largest, f"even {percent(even)}"))
    return _panel([chart, _legend(bar, ticks), describe_experts(look, shares)])


# ---- pictures --------------------------------------------------------------------------------------------------------


def _scale(item: "SeenItem") -> float:
    """How much larger or smaller a frame is drawn: whole steps up, so that pixels stay squares."""
    across = min(len(item.frames), 4)
    width, height = item.frames[0].size
    room = (_WIDTH - 2 * _MARGIN - 6 * (across - 1)) // across
    fit = min(room / width, _HEIGHT / height)
    return fit if fit < 1 else float(max(1, int(min(fit, 640 / (across * max(width, height))))))


def _resize(frame: Image.Image, scale: float) -> Image.Image:
    if scale == 1:
        return frame.copy()
    size = (max(1, round(frame.width * scale)), max(1, round(frame.height * scale)))
    return frame.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def _draw_grid(picture: Image.Image, item: "SeenItem") -> int:
    """Patch and token lines; how many tokens lie between two strong lines, each way."""
    pen = ImageDraw.Draw(picture, "RGBA")
    rows, columns = item.grid
    across, down = picture.width / columns, picture.height / rows
    step = 1
    while min(across, down) * item.merge * step < _FINE:
        step *= 2
    if min(across, down) >= _FINER:
        for line in range(columns):
            _line(pen, round(line * across), picture.height, True, 95)
        for line in range(rows):
            _line(pen, round(line * down), picture.width, False, 95)
    for line in range(0, columns, item.merge * step):
        _line(pen, round(line * across), picture.height, True, 210)
    for line in range(0, rows, item.merge * step):
        _line(pen, round(line * down), picture.width, False, 210)
    return step


def _line(pen: ImageDraw.ImageDraw, at: int, length: int, upright: bool, strength: int) -> None:
    """A light line with a dark one beside it: one of the two shows on any picture."""
    for offset, shade in ((0, 255), (1, 0)):
        ends = [(at + offset, 0), (at + offset, length)] if upright else [(0, at + offset), (length, at + offset)]
        pen.line(ends, fill=(shade, shade, shade, strength if shade else strength * 2 // 3))


def _hatch(picture: Image.Image, item: "SeenItem") -> None:
    """Stripes over the padding, and its name where there is room."""
    width, height = item.frames[0].size
    inner = (
        round(item.resized[0] * picture.width / width),
        round(item.resized[1] * picture.height / height),
    )
    if inner == picture.size:
        return
    mask = Image.new("L", picture.size, 255)
    ImageDraw.Draw(mask).rectangle((0, 0, inner[0] - 1, inner[1] - 1), fill=0)
    picture.paste(_stripes(picture.size), (0, 0), mask)
    font = _font(13)
    below = picture.height - inner[1]
    if below >= 15 and picture.width >= 80:
        middle = (picture.width / 2, inner[1] + below / 2)
        pen = ImageDraw.Draw(picture)
        pen.rectangle([v + d for v, d in zip(middle * 2, (-32, -7, 32, 7), strict=True)], fill=(20, 20, 24))
        pen.text(middle, "padding", (255, 255, 255), font, anchor="mm")


def _stripes(size: tuple[int, int]) -> Image.Image:
    down, across = np.ogrid[: size[1], : size[0]]
    light = (down + across) % 8 < 3
    return Image.fromarray(np.where(light[..., None], (214, 214, 220), (40, 40, 48)).astype(np.uint8))


def _swatch_of_hatches() -> Image.Image:
    return _stripes((26, 16))


def _swatch_of_lines() -> Image.Image:
    swatch = Image.new("RGB", (26, 16), (128, 128, 128))
    pen = ImageDraw.Draw(swatch, "RGBA")
    for at in (0, 24):
        _line(pen, at, 16, True, 210)
    for at in (0, 14):
        _line(pen, at, 26, False, 210)
    return swatch


def _side_by_side(pictures: Sequence[Image.Image]) -> Image.Image:
    if len(pictures) == 1:
        return pictures[0]
    columns, gap = min(len(pictures), 4), 6
    rows = -(-len(pictures) // columns)
    width, height = pictures[0].size
    board = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), _GROUND)
    for number, picture in enumerate(pictures):
        row, column = divmod(number, columns)
        board.paste(picture, (column * (width + gap), row * (height + gap)))
    return board


# ---- colours ---------------------------------------------------------------------------------------------------------


def _colours(levels: NDArray[np.float64]) -> NDArray[np.float64]:
    """Levels 0..1 of any shape to inferno, (..., 3) of 0..255."""
    steps = np.arange(len(_INFERNO)) / (len(_INFERNO) - 1)
    return np.stack([np.interp(levels, steps, _INFERNO[:, channel]) for channel in range(3)], axis=-1)


def _tint(grey: NDArray[np.float64], levels: NDArray[np.float64]) -> NDArray[np.uint8]:
    """A grey picture (h, w) under the colours of levels (h, w): dark where little is, and its shapes still visible."""
    return (0.7 * _colours(levels) + 0.3 * grey[..., None]).round().astype(np.uint8)


# ---- the ground ------------------------------------------------------------------------------------------------------

Block = str | Image.Image | tuple[Image.Image, str]  # words, a picture, or a swatch with words


@lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _legend(bar: NDArray[np.uint8], ticks: Sequence[tuple[float, str]]) -> Image.Image:
    """A colour scale with words below it; each tick is a place 0..1 on the scale."""
    font, width = _font(15), 320
    board = Image.new("RGB", (width + 220, 42), _GROUND)
    board.paste(Image.fromarray(bar).resize((width, 16)), (0, 0))
    pen = ImageDraw.Draw(board)
    for place, words in ticks:
        x = round(place * (width - 1))
        pen.line([(x, 16), (x, 21)], fill=_INK)
        pen.text((x, 24), words, _INK, font, anchor="la" if place in (0, 1) else "ma")
    return board


def _wrap(words: str, width: int) -> list[str]:
    font, lines = _font(15), [""]
    for word in words.split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _panel(blocks: Sequence[Block]) -> Image.Image:
    """Blocks below one another on the ground, with a thin edge."""
    # Pillow's own font has no multiplication sign
    blocks = [
        block.replace("×", "x")
        if isinstance(block, str)
        else (block[0], block[1].replace("×", "x"))
        if isinstance(block, tuple)
        else block
        for block in blocks
    ]
    pictures = [block for block in blocks if isinstance(block, Image.Image)]
    inner = max(560, *(picture.width for picture in pictures))
    laid: list[tuple[int, Image.Image | None, list[str]]] = []
    top, line = _MARGIN, 20
    for block in blocks:
        if isinstance(block, Image.Image):
            laid.append((top, block, []))
            top += block.height + 12
        elif isinstance(block, tuple):
            laid.append((top, block[0], _wrap(block[1], inner - 40)))
            top += max(22, line * len(laid[-1][2])) + 4
        else:
            laid.append((top, None, _wrap(block, inner)))
            top += line * len(laid[-1][2]) + 8
    board = Image.new("RGB", (inner + 2 * _MARGIN, top + 4), _GROUND)
    pen = ImageDraw.Draw(board)
    pen.rectangle((0, 0, board.width - 1, board.height - 1), outline=_EDGE)
    for at, picture, lines in laid:
        if picture is not None:
            board.paste(picture, (_MARGIN, at))
        for number, words in enumerate(lines):
            left = _MARGIN + (picture.width + 10 if picture is not None else 0)
            pen.text((left, at + number * line), words, _INK, _font(15))
    return board
