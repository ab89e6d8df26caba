"""The model in the box: 11.6M parameters that see, count, read, add and write small programs.

    make nano                 all parts and the fine-tuning; after a kill, the same command continues

    moonkit pretrain recipes/nano.py --minutes 10                   the first part, cut to ten minutes: 62 % of single
                                                                    things, 41 % of programs, 27 % of sums
    moonkit pretrain recipes/nano.py --part run --out runs/nano-run
    moonkit pretrain recipes/nano.py --part letters --model runs/nano-run/model --out runs/nano-letters
                                                                    and so anneal, spelling, moments, sharpen, finish,
                                                                    names, settle
    moonkit sft recipes/nano.py --model runs/nano-settle/model --out runs/nano-sft

Measured on two cores of an Intel Xeon with AVX-512 (float32 at 204 to 340 GFLOP/s): 5 h 2 min, the last 80 minutes of
them beside other work. Held-out programs 100 %, sums 94 %, clips 87.5 % (one frame: 27 %), reading 87.5 %, pictures
88 %. All scores: docs/nano.md.

Pictures, clips, programs and sums are learned together from the first step; each part adds what the one before was too
young for. The shape is `fusion.config.nano`: MoonViT-3D of 5 layers and 128 dimensions, MLA, one dense layer and four
of 48 experts, top 4, with one shared. Data is made as it is read (world/), nothing is downloaded, and whatever the
world holds out by composition is never trained on.

    python -m recipes.nano tokenizer --out fusion/assets/nano     the tokenizer: 2,048 ids, every digit its own
    python -m recipes.nano ship runs/nano-run ... runs/nano-sft --out FOLDER     (all runs, in order of training)
                                                                  the last model, experts in 4 bits, and all logs
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from train.corpus import open_corpus
from train.data import Mixture, Source
from train.loop import BatchSize, Optimization, Run
from train.schedule import wsd
from train.sft import short

PLAIN = 0.75  # of the samples are pages of text, the rest conversations: half the tokens for the same answers


def _source(name: str, group: str, weight: float, families: dict[str, float], after: float = 0) -> Source:
    return Source(name, group, weight, families, levels=(1, 2), plain=PLAIN, after=round(after))


FIGURES = {"digits": 0.3, "chart": 0.2, "clock": 0.1, "gauge": 0.1, "grid": 0.15, "table": 0.1, "printout": 0.05}
CODE = {"function": 0.65, "output": 0.15, "repair": 0.1, "drawing": 0.1}
WORDS = {"word": 0.25, "sort": 0.15, "date": 0.1, "logic": 0.2, "follow": 0.1, "tool": 0.1, "proxy": 0.1}
LIBRARY = Source("library", "library", 0.01, corpus="python", window=1500)

# Token shares of the sources. Text has its share from the first step on, and so have pictures: at first of single
# things, then of letters, where forms are learned in 20 tokens each; what shows many of them comes in later.
MIXTURE = Mixture(
    (
        Source("single things", "vision", 0.05, {"thing": 1.0}, plain=1.0),
        _source("things", "vision", 0.05, {"thing": 1.0}, after=0.5e6),
        Source("single glyphs", "vision", 0.05, {"glyph": 1.0}, plain=1.0, after=1_000_000),
        _source("glyphs", "vision", 0.05, {"glyph": 1.0}, after=1.8e6),
        _source("captions", "vision", 0.12, {"caption": 0.9, "point": 0.1}, after=1.2e6),
        _source("scenes", "vision", 0.18, {"picture": 1.0}, after=1.8e6),
        _source("reading", "vision", 0.08, {"reading": 1.0}, after=2.4e6),
        _source("stories", "clip", 0.08, {"story": 1.0}, after=1.6e6),
        _source("clips", "clip", 0.14, {"clip": 1.0}, after=2.2e6),
        _source("figures", "vision", 0.04, FIGURES, after=2.8e6),
        _source("code", "code", 0.04, CODE),
        _source("sums", "text", 0.08, {"sum": 1.0}),
        _source("text", "text", 0.03, WORDS),
        LIBRARY,
    )
)

# Things are told apart by now; letters are not, so they have a quarter of the tokens until words come in.
LETTERS = Mixture(
    (
        _source("things", "vision", 0.03, {"thing": 1.0}),
        _source("captions", "vision", 0.13, {"caption": 0.9, "point": 0.1}),
        _source("scenes", "vision", 0.20, {"picture": 1.0}),
        _source("glyphs", "signs", 0.12, {"glyph": 1.0}),
        _source("reading", "signs", 0.10, {"reading": 1.0}, after=0.6e6),
        _source("figures", "signs", 0.04, FIGURES, after=1.2e6),
        _source("stories", "clip", 0.07, {"story": 1.0}),
        _source("clips", "clip", 0.14, {"clip": 1.0}),
        _source("code", "code", 0.05, CODE),
        _source("sums", "text", 0.08, {"sum": 1.0}),
        _source("text", "text", 0.03, WORDS),
        LIBRARY,
    )
)

# Nor is motion: at first the clips are of one shape that does one thing.
MOTION = Mixture(
    (
        _source("things", "vision", 0.02, {"thing": 1.0}),
        _source("captions", "vision", 0.10, {"caption": 0.9, "point": 0.1}),
        _source("scenes", "vision", 0.20, {"picture": 1.0}),
        _source("glyphs", "signs", 0.07, {"glyph": 1.0}),
        _source("reading", "signs", 0.09, {"reading": 1.0}),
        _source("figures", "signs", 0.03, FIGURES),
        _source("motion", "clip", 0.09, {"motion": 1.0}),
        _source("stories", "clip", 0.08, {"story": 1.0}, after=0.8e6),
        _source("clips", "clip", 0.19, {"clip": 1.0}, after=0.8e6),
        _source("code", "code", 0.03, CODE),
        _source("sums", "text", 0.06, {"sum": 1.0}),
        _source("text", "text", 0.03, WORDS),
        LIBRARY,
    )
)

# What is left of reading: letters in an order that no memory can help with.
WORDS_OF_NOBODY = Mixture(
    (
        _source("things", "vision", 0.01, {"thing": 1.0}),
        _source("captions", "vision", 0.07, {"caption": 0.9, "point": 0.1}),
        _source("scenes", "vision", 0.20, {"picture": 1.0}),
        _source("glyphs", "signs", 0.05, {"glyph": 1.0}),
        _source("invented words", "signs", 0.12, {"spelling": 1.0}),
        _source("reading", "signs", 0.09, {"reading": 1.0}, after=1.2e6),
        _source("figures", "signs", 0.03, FIGURES, after=4e6),
        _source("motion", "clip", 0.10, {"motion": 1.0}),
        _source("stories", "clip", 0.05, {"story": 1.0}, after=4e6),
        _source("clips", "clip", 0.16, {"clip": 1.0}, after=1.5e6),
        _source("code", "code", 0.03, CODE),
        _source("sums", "text", 0.05, {"sum": 1.0}),
        _source("text", "text", 0.03, WORDS),
        LIBRARY,
    )
)

# What is left of clips: which way along its line a shape goes is what comes after what. A tower that has not been asked
# for it sees which states there were, and not their order; order is learned like letters, from many at once.
MOMENTS = Mixture(
    (
        Source("moments", "clip", 0.50, {"moments": 1.0}, levels=(1, 1), plain=1.0),
        _source("captions", "vision", 0.05, {"caption": 0.9, "point": 0.1}),
        _source("scenes", "vision", 0.16, {"picture": 1.0}),
        _source("invented words", "signs", 0.06, {"spelling": 1.0}),
        _source("reading", "signs", 0.08, {"reading": 1.0}),
        _source("code", "code", 0.04, CODE),
        _source("sums", "text", 0.06, {"sum": 1.0}),
        _source("text", "text", 0.04, WORDS),
        LIBRARY,
    )
)

# Motion first, with what is needed to see it, then whole clips.
SHARPEN = Mixture(
    (
        _source("captions", "vision", 0.06, {"caption": 0.9, "point": 0.1}),
        _source("scenes", "vision", 0.25, {"picture": 1.0}),
        _source("glyphs", "signs", 0.03, {"glyph": 1.0}),
        _source("invented words", "signs", 0.06, {"spelling": 1.0}),
        _source("reading", "signs", 0.13, {"reading": 1.0}),
        _source("figures", "signs", 0.02, FIGURES),
        _source("moments", "clip", 0.05, {"moments": 1.0}),
        _source("motion", "clip", 0.09, {"motion": 1.0}),
        _source("stories", "clip", 0.04, {"story": 1.0}, after=2e6),
        _source("clips", "clip", 0.17, {"clip": 1.0}, after=1.2e6),
        _source("code", "code", 0.03, CODE),
        _source("sums", "text", 0.04, {"sum": 1.0}),
        _source("text", "text", 0.02, WORDS),
        LIBRARY,
    )
)

# Everything, in the shares that are to be good at the end.
ALL = Mixture(
    (
        _source("things", "vision", 0.02, {"thing": 1.0}),
        _source("captions", "vision", 0.05, {"caption": 0.9, "point": 0.1}),
        _source("scenes", "vision", 0.25, {"picture": 1.0}),
        _source("glyphs", "signs", 0.02, {"glyph": 1.0}),
        _source("invented words", "signs", 0.05, {"spelling": 1.0}),
        _source("reading", "signs", 0.15, {"reading": 1.0}),
        _source("figures", "signs", 0.02, FIGURES),
        _source("moments", "clip", 0.03, {"moments": 1.0}),
        _source("motion", "clip", 0.06, {"motion": 1.0}),
        _source("stories", "clip", 0.03, {"story": 1.0}),
        _source("clips", "clip", 0.19, {"clip": 1.0}),
        _source("code", "code", 0.03, CODE),
        _source("sums", "text", 0.06, {"sum": 1.0}),
        _source("text", "text", 0.03, WORDS),
        LIBRARY,
    )
)

# What is seen is right by now, what is made of it not always: "red: star 2, diamond 7." and then the wrong side, where
# the question names a red star, which training has not; `t e n t` and then "test". Both are learned from words alone.
NAMES = Mixture(
    (
        _source("told scenes", "told", 0.30, {"told": 1.0}),
        _source("letters joined", "told", 0.05, {"join": 1.0}),
        _source("sums", "text", 0.03, {"sum": 1.0}),
        _source("text", "text", 0.03, WORDS),
        _source("things", "vision", 0.01, {"thing": 1.0}),
        _source("captions", "vision", 0.03, {"caption": 0.9, "point": 0.1}),
        _source("scenes", "vision", 0.23, {"picture": 1.0}),
        _source("invented words", "signs", 0.03, {"spelling": 1.0}),
        _source("reading", "signs", 0.10, {"reading": 1.0}),
        _source("figures", "signs", 0.01, FIGURES),
        _source("moments", "clip", 0.02, {"moments": 1.0}),
        _source("motion", "clip", 0.02, {"motion": 1.0}),
        _source("clips", "clip", 0.10, {"clip": 1.0}),
        _source("code", "code", 0.03, CODE),
        LIBRARY,
    )
)

# Everything once more, with a little of what words taught.
SETTLE = Mixture(
    (
        _source("told scenes", "told", 0.11, {"told": 1.0}),
        _source("letters joined", "told", 0.02, {"join": 1.0}),
        _source("things", "vision", 0.01, {"thing": 1.0}),
        _source("captions", "vision", 0.03, {"caption": 0.9, "point": 0.1}),
        _source("scenes", "vision", 0.34, {"picture": 1.0}),
        _source("glyphs", "signs", 0.01, {"glyph": 1.0}),
        _source("invented words", "signs", 0.03, {"spelling": 1.0}),
        _source("reading", "signs", 0.13, {"reading": 1.0}),
        _source("figures", "signs", 0.01, FIGURES),
        _source("moments", "clip", 0.02, {"moments": 1.0}),
        _source("motion", "clip", 0.02, {"motion": 1.0}),
        _source("stories", "clip", 0.01, {"story": 1.0}),
        _source("clips", "clip", 0.14, {"clip": 1.0}),
        _source("code", "code", 0.03, CODE),
        _source("sums", "text", 0.05, {"sum": 1.0}),
        _source("text", "text", 0.03, WORDS),
        LIBRARY,
    )
)

# small steps: until forms are told apart, what counts is how many there are, not how large they are
BATCH = BatchSize(lanes=2, lanes_per_micro_batch=2, patch_budget=2048)
OPTIMIZATION = Optimization(weight_decay=0.05, tau=30.0, router_speed=3e-3)
PEAK, LATE, FINISH, SEQUENCE = 4e-3, 3e-3, 0.0019, 2048


def run() -> Run:
    """Joint pre-training at a constant rate, from random weights."""
    return Run(
        model="nano",
        mixture=MIXTURE,
        schedule=wsd(PEAK, tokens=7.5e6, warmup=240e3, decay=0, sequence=SEQUENCE),
        batch=BATCH,
        optimization=OPTIMIZATION,
        seed=1,
    )


def letters() -> Run:
    """The second part, at the same rate: `--model` names the first part's model."""
    return replace(run(), mixture=LETTERS, schedule=wsd(PEAK, 4.6e6, warmup=120e3, decay=0, sequence=SEQUENCE), seed=5)


def anneal() -> Run:
    """The third part, in which the rate decays: `--model` names the second part's model."""
    schedule = wsd(PEAK, 8.6e6, warmup=120e3, decay=6.5e6, end=1e-4, sequence=SEQUENCE)
    return replace(run(), mixture=MOTION, schedule=schedule, seed=7)


def spelling() -> Run:
    """The fourth part, at a lower rate: `--model` names the third part's model."""
    schedule = wsd(LATE, 5.05e6, warmup=120e3, decay=0, sequence=SEQUENCE)
    return replace(run(), mixture=WORDS_OF_NOBODY, schedule=schedule, seed=11)


def moments() -> Run:
    """The fifth part: `--model` names the fourth part's model."""
    schedule = wsd(LATE, 3e6, warmup=60e3, decay=0, sequence=SEQUENCE)
    return replace(run(), mixture=MOMENTS, schedule=schedule, seed=13)


def sharpen() -> Run:
    """The sixth part, in which the rate begins to decay again: `--model` names the fifth part's model."""
    schedule = wsd(LATE, 9.2e6, warmup=60e3, decay=5.2e6, end=FINISH, sequence=SEQUENCE)
    return replace(run(), mixture=SHARPEN, schedule=schedule, seed=17)


def finish() -> Run:
    """The seventh part, in which it decays: `--model` names the sixth part's model."""
    schedule = wsd(FINISH, 7.5e6, warmup=60e3, decay=7.4e6, end=1e-4, sequence=SEQUENCE)
    return replace(run(), mixture=ALL, schedule=schedule, seed=19)


def names() -> Run:
    """The eighth part, at a constant rate again: `--model` names the seventh part's model."""
    schedule = wsd(2e-3, 4e6, warmup=120e3, decay=0, sequence=SEQUENCE)
    return replace(run(), mixture=NAMES, schedule=schedule, seed=23)


def settle() -> Run:
    """The last part, in which it decays to its end: `--model` names the eighth part's model."""
    schedule = wsd(2e-3, 6e6, warmup=60e3, decay=5.9e6, end=5e-5, sequence=SEQUENCE)
    return replace(run(), mixture=SETTLE, schedule=schedule, seed=29)


ZERO_VISION = Mixture(
    (
        Source("image operations", "tool", 0.30, {"proxy": 0.7, "tool": 0.3}, levels=(1, 2)),
        Source("code", "code", 0.35, {"function": 0.7, "output": 0.15, "repair": 0.15}, levels=(1, 2)),
        Source("sums", "text", 0.20, {"sum": 1.0}, levels=(1, 2)),
        Source(
            "text",
            "text",
            0.15,
            {"word": 0.3, "sort": 0.2, "date": 0.1, "logic": 0.25, "follow": 0.15},
            levels=(1, 2),
        ),
    )
)
"""Text alone: what an image holds is found by python calls, no picture is seen (Kimi K2.5 report, section 2.2)."""


def sft() -> Run:
    """Zero-vision SFT of the pre-trained model: `--model` names it. The tower and the projector rest."""
    return Run(
        model="nano",
        mixture=ZERO_VISION,
        schedule=short(0.6e6, peak=3e-4, sequence=SEQUENCE),
        batch=BatchSize(lanes=4, lanes_per_micro_batch=4, patch_budget=2048),
        optimization=replace(OPTIMIZATION, router_speed=0.0),
        frozen=("vision_tower.", "mm_projector."),
        seed=2,
    )


def texts(characters: int = 3_000_000) -> Iterator[str]:
    """What the tokenizer is made from: the words of the training split, family by family, and library code."""
    import world

    families = [(family, source) for source in MIXTURE.sources for family in source.families]
    for family, source in families:
        left, index = characters * source.weight * source.families[family], 0
        while left > 0:
            sample = world.sample(family, index, "train", seed=2, level=1 + index % 3)
            for turn in sample.turns:
                text = "\n".join((turn.question, turn.thinking, turn.answer, *(str(step) for step in turn.steps)))
                left -= len(text)
                yield text
            index += 1
    library = open_corpus("python", seed=2)
    for index in range(400):
        yield str(library.row(index))
    # role names stand alone in every turn, and must be one token each
    yield from ("user assistant system tool tool_declare image video functions".split()) * 2000


def make_tokenizer(folder: Path) -> None:
    """Train the tokenizer and write it."""
    from fusion.config import nano
    from lm.bpe import train_bpe
    from lm.tokenizer import NUM_SPECIAL, Tokenizer

    ranks = train_bpe(texts(), nano().text.vocab_size - NUM_SPECIAL, split_digits=True)
    tokenizer = Tokenizer(ranks)
    tokenizer.save(folder)
    print(f"{folder}: {tokenizer!r}")


def ship(runs: list[Path], folder: Path) -> None:
    """Write the last run's model with its experts in 4 bits, and how all runs went: configs, versions, thinned logs."""
    import json
    import shutil
    from tempfile import TemporaryDirectory

    from fusion.quantize import quantize

    for run_folder in runs:
        if not (run_folder / "log.jsonl").is_file():
            raise ValueError(f"{run_folder} is no run folder: it has no log.jsonl")
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as draft:
        packed, _ = quantize(str(runs[-1] / "model"), Path(draft) / "nano")
        for file in (Path(draft) / "nano").iterdir():
            shutil.copyfile(file, folder / file.name)  # what else is in the folder stays
    kept = ("step", "tokens", "seconds", "loss", "losses", "lr", "max_logit", "clipped", "load", "tokens_per_second")
    story = []
    for run_folder in runs:
        rows = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]
        steps = [row for row in rows if "loss" in row and "lr" in row]
        thin = [steps[i] for i in range(0, len(steps), max(1, len(steps) // 100))] + steps[-1:]
        versions = [json.loads(line) for line in (run_folder / "versions.jsonl").read_text().splitlines()]
        config = json.loads((run_folder / "config.json").read_text())
        if config.get("start"):
            config["start"] = "/".join(Path(config["start"]).parts[-2:])  # its place on one machine says nothing
        story.append(
            {
                "config": config,
                "versions": versions,
                "log": [{key: row[key] for key in kept if key in row} for row in thin],
            }
        )
    (folder / "training.json").write_text(json.dumps(story, separators=(",", ":")) + "\n", encoding="utf-8")
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder}: {packed:,} expert matrices in 4 bits, {size / 1e6:.2f} MB with the log of {len(runs)} runs")


def main() -> None:
    """python -m recipes.nano tokenizer | ship"""
    from argparse import ArgumentParser

    parser = ArgumentParser(prog="python -m recipes.nano", description="The parts of the nano model beside its runs.")
    parts = parser.add_subparsers(dest="part", required=True)
    tokenizer = parts.add_parser("tokenizer", help="train the tokenizer on the training split's words")
    tokenizer.add_argument("--out", type=Path, required=True)
    shipping = parts.add_parser("ship", help="pack a trained run for the box")
    shipping.add_argument("runs", type=Path, nargs="+", help="run folders, in the order they were trained")
    shipping.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.part == "tokenizer":
        make_tokenizer(arguments.out)
    else:
        ship(arguments.runs, arguments.out)


if __name__ == "__main__":
    main()
