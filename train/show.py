"""moonkit data show: what is trained on, token by token, with the loss mask in colour.

    moonkit data show --recipe recipes/nano.py -n 9                a recipe's documents, source by source
    moonkit data show --recipe recipes/nano.py --source clips --index 40
    moonkit data show --family picture --picture out.png           one family of the world, its pictures as a sheet
    moonkit data show --corpus chats.jsonl                         your own data, as a run would read it

Green is learned, grey is only read; neighbouring tokens differ in shade. Without colour, learned text stands in «».
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated

import tyro
from PIL import Image, ImageDraw
from rich.console import Console
from rich.text import Text

import world
from fusion.config import PRESETS, KimiConfig
from lm.tokenizer import Tokenizer
from train.data import Documents, Encoded, Encoder, Mixture, Skip, Source
from world.sample import Sample, Split

SHADES = {True: ("green", "bright_green"), False: ("grey50", "grey66")}


@dataclass(frozen=True)
class Show:
    """Prints documents as training reads them. Nothing is trained."""

    recipe: Annotated[Path | None, tyro.conf.arg(metavar="RECIPE.py")] = None
    """Take the mixture of this recipe."""
    part: Annotated[str, tyro.conf.arg(metavar="FUNCTION")] = "run"
    """The recipe's function that returns the Run; sft, for instance."""
    source: str | None = None
    """Only this source of the recipe."""
    family: str | None = None
    """This family of the world, without a recipe."""
    corpus: Annotated[str | None, tyro.conf.arg(metavar="FILE|FOLDER|python|hf:NAME")] = None
    """This corpus, without a recipe."""
    split: Split = "train"
    """train, seen or heldout."""
    index: int = 0
    """Number of the first document, in each source."""
    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 3
    """How many documents; sources take turns."""
    level: int | None = None
    """Difficulty; left out, the recipe's, or 1."""
    seed: int | None = None
    """Of the data; left out, the recipe's, so that its own documents are shown, or 0."""
    model: Annotated[str, tyro.conf.arg(metavar="nano|tiny|FOLDER")] = "nano"
    """Whose tokenizer and picture sizes."""
    picture: Annotated[Path | None, tyro.conf.arg(metavar="PNG")] = None
    """Save what the model sees of the shown documents as one contact sheet."""


def chosen_mixture(options: Show) -> tuple[Mixture, int]:
    """The sources that the options ask for, and the seed. Raises ValueError for options that contradict each other."""
    asked = [name for name in ("recipe", "family", "corpus") if getattr(options, name) is not None]
    if len(asked) > 1:
        raise ValueError(f"--{asked[0]} and --{asked[1]} exclude each other")
    for name, value in (("source", options.source), ("part", options.part if options.part != "run" else None)):
        if value is not None and options.recipe is None:
            raise ValueError(f"--{name} names a {name} of a recipe: give --recipe too")
    level, seed = options.level or 1, 0
    if options.recipe is not None:
        from train.pretrain import load_recipe

        run = load_recipe(options.recipe, options.part)
        sources, seed = run.mixture.sources, run.seed
        if options.source is not None:
            names = [source.name for source in sources]
            if options.source not in names:
                near = get_close_matches(options.source, names, 3, 0.4) or names
                raise ValueError(f"{options.recipe} has no source {options.source!r}; known: {', '.join(near)}")
            sources = tuple(source for source in sources if source.name == options.source)
        if options.level is not None:
            sources = tuple(replace(source, levels=(level, level)) for source in sources)
    elif options.family is not None:
        group = world.group_of(options.family)
        sources = (Source(options.family, group, 1.0, {options.family: 1.0}, levels=(level, level)),)
    elif options.corpus is not None:
        sources = (Source(options.corpus, "text", 1.0, corpus=options.corpus),)
    else:
        sources = tuple(
            Source(family, world.group_of(family), 1.0, {family: 1.0}, levels=(level, level)) for family in world.MAKERS
        )
    return Mixture(sources, options.split), seed if options.seed is None else options.seed


def tokenizer_and_config(model: str) -> tuple[Tokenizer, KimiConfig]:
    """Of a preset that ships with a tokenizer, or of a checkpoint folder."""
    from fusion.checkpoint import bundled_tokenizer, read_config

    if model in ("nano", "tiny"):
        return bundled_tokenizer(model), PRESETS[model]()
    folder = Path(model)
    if not folder.is_dir():
        raise FileNotFoundError(f"{model!r} is neither nano, tiny nor a folder with a checkpoint")
    return Tokenizer.from_folder(folder), read_config(folder)


def tokens_in_colour(document: Encoded, tokenizer: Tokenizer, pad: int, colour: bool = True) -> Text:
    """The document's tokens; a run of <|media_pad|> is one word with its length."""
    out = Text()
    was_learned = False
    for number, (token, count, learned) in enumerate(_runs(document, pad)):
        mark = "" if colour or learned == was_learned else "«" if learned else "»"
        out.append(mark)
        was_learned = learned
        if token == pad:
            out.append(f"[{count} vision token{'s' if count > 1 else ''}]", "cyan")
            continue
        text = tokenizer.decode_bytes([token]).decode("utf-8", "backslashreplace")
        style = SHADES[learned][number % 2]
        if tokenizer.is_special(token):
            style = f"bold {style}"
        out.append(text.replace("\r", "\\r").replace("\n", "↵\n").replace("\t", "→   "), style)
    out.append("»" if was_learned and not colour else "")
    return out


def _runs(document: Encoded, pad: int) -> Iterator[tuple[int, int, bool]]:
    """(token, how many in a row, learned); only pads are counted together, and only those of one item."""
    ids, mask = document.ids.tolist(), document.loss_mask.tolist()
    at = 0
    while at < len(ids):
        end = at + 1
        while ids[at] == pad and end < len(ids) and ids[end] == pad:
            end += 1
        yield ids[at], end - at, mask[at]
        at = end


def headline(document: Encoded, pad: int) -> str:
    """Counts of one document."""
    vision = int((document.ids == pad).sum())
    learned = int(document.loss_mask[1:].sum())
    parts = [f"{len(document)} tokens: {len(document) - vision} text, {vision} vision; {learned} learned"]
    if document.frames:
        shapes = (frame.shape for frame in document.frames)
        sizes = ", ".join(f"{t}x{h}x{w}" if t > 1 else f"{h}x{w}" for t, h, w, _ in shapes)
        items = f"{len(document.frames)} item{'s' * (len(document.frames) > 1)}"
        parts.append(f"{document.patches} patches in {items} ({sizes} pixels)")
    return "; ".join(parts)


def tested(sample: Sample) -> Iterator[str]:
    """What each turn tests and the composition that decides its split."""
    for number, turn in enumerate(sample.turns, 1):
        yield f"turn {number} tests {turn.tests}, composition {turn.composition}"


def contact_sheet(rows: list[tuple[str, Encoded]], scale: int = 2, gap: int = 8) -> Image.Image:
    """One row of pictures per document, under its name: as the model sees them, padding included; clips frame by frame.

    Raises ValueError when no document has pictures.
    """
    shown = [
        (name, [frame for item in document.frames for frame in item]) for name, document in rows if document.frames
    ]
    if not shown:
        raise ValueError("none of the shown documents has a picture, so there is nothing to save")
    label = 14
    heights = [label + scale * max(frame.shape[0] for frame in frames) + gap for _, frames in shown]
    widths = [sum(scale * frame.shape[1] + gap for frame in frames) for _, frames in shown]
    sheet = Image.new("RGB", (max(400, *widths) + gap, sum(heights) + gap), (128, 128, 128))
    draw = ImageDraw.Draw(sheet)
    y = gap
    for (name, frames), height in zip(shown, heights, strict=True):
        draw.text((gap, y), name, (255, 255, 255))
        x = gap
        for frame in frames:
            rows_, columns, _ = frame.shape
            large = Image.fromarray(frame).resize((scale * columns, scale * rows_), Image.Resampling.NEAREST)
            sheet.paste(large, (x, y + label))
            x += scale * columns + gap
        y += height
    return sheet


def show(options: Show, console: Console) -> None:
    """Print the documents, and save their pictures when asked."""
    if options.n < 1 or options.index < 0 or (options.level is not None and options.level < 1):
        raise ValueError(f"-n and --level are at least 1 and --index at least 0, got {options}")
    mixture, seed = chosen_mixture(options)
    tokenizer, config = tokenizer_and_config(options.model)
    documents, encoder = Documents(mixture, seed), Encoder(tokenizer, config)
    pad = config.media_placeholder_token_id
    kept: list[tuple[str, Encoded]] = []
    shares = mixture.shares
    colour = console.color_system is not None
    for number in range(options.n):
        turn, place = divmod(number, len(mixture.sources))
        source, index = mixture.sources[place], options.index + turn
        share = f", {shares[source.name]:.0%} of all tokens" if len(shares) > 1 else ""
        console.rule(Text(f"{documents.describe(source.name, index)}: {source.group}{share}"), align="left")
        try:
            made = documents.get(source.name, index)
            document = encoder.encode(made, source.name, source.group, documents.plain(source.name, index))
        except Skip as skip:
            console.print(Text(f"skipped, {skip.reason}: {skip}", "red"))
            continue
        console.print(Text(headline(document, pad), "bold"))
        if isinstance(made, Sample):
            for line in tested(made):
                console.print(Text(line, "magenta"))
        console.print(tokens_in_colour(document, tokenizer, pad, colour), soft_wrap=True)
        kept.append((f"{source.name} {index}", document))
    if options.picture is not None:
        contact_sheet(kept).save(options.picture, "PNG")
        console.print(f"pictures saved to {options.picture}", markup=False)


def main() -> None:
    """The verb; its only word is `show`."""
    words = sys.argv[1:]
    if words[:1] not in (["show"], ["--help"], ["-h"]):
        got = f", got {words[0]!r}" if words else ""
        raise ValueError(f"the verb data needs a word{got}: moonkit data show [options]")
    arguments = words[1:] if words[0] == "show" else words
    show(tyro.cli(Show, prog="moonkit data show", args=arguments, description=__doc__), Console(highlight=False))


if __name__ == "__main__":
    main()
