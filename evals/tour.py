"""moonkit tour: fresh questions about a picture, a clip, a program and a sum, answered by the model in the box.

    moonkit tour                 four questions that nobody has asked before, the answers, the truth
    moonkit tour --seed 5        four others
    moonkit tour --stages        then walk the picture and the clip through every stage of the model, with shapes

Questions come from the held-out compositions of `world`: combinations that training never saw. Nothing is downloaded.
"""

import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import tyro

from world.sample import Clip, Image, Pixels, Sample, Turn

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from fusion.model import Kimi

FAMILIES = (("picture", "a picture"), ("clip", "a clip"), ("function", "a program"), ("sum", "a sum"))


@dataclass(frozen=True)
class Tour:
    """Fresh questions about a picture, a clip, a program and a sum; the model's thoughts and answers; the truth."""

    seed: int = 0
    """Another seed, other questions."""
    model: str = "nano"
    """The model in the box, or a folder or hub id of a checkpoint."""
    level: int = 1
    """Difficulty of the questions, 1 to 3."""
    max_new_tokens: int = 200
    """Longest reply, thinking included."""
    stages: bool = False
    """Afterwards, walk a photo and a clip through every stage of the model (as `moonkit stages`)."""


def main() -> None:
    """The verb."""
    arguments = tyro.cli(Tour, prog="moonkit tour")
    if arguments.level not in (1, 2, 3):
        raise ValueError(f"--level must be 1, 2 or 3, got {arguments.level}")
    from rich.console import Console

    console = Console(highlight=False)
    started = time.perf_counter()
    from fusion.model import Kimi

    kimi = Kimi.from_pretrained(arguments.model)
    if kimi.config.vision is None or kimi.tokenizer is None:
        raise ValueError(f"the tour needs a model that sees and has a tokenizer; {arguments.model} is text-only")
    count = sum(parameter.numel() for parameter in kimi.parameters())
    console.print(
        f"[bold]moonkit tour[/]: {arguments.model}, {count / 1e6:.1f}M parameters, ready in "
        f"{time.perf_counter() - started:.1f} s; questions of seed {arguments.seed}, combinations held out of training"
    )
    right = 0
    for family, what in FAMILIES:
        right += ask(kimi, family, what, arguments, console)
    console.print(
        f"\n[bold]{right} of {len(FAMILIES)} right[/] in {time.perf_counter() - started:.1f} s. "
        "How often it is right, family by family: moonkit score"
    )
    if arguments.stages:
        from fusion.stages import Stages, walk

        console.print()
        walk(Stages(model=arguments.model), console)
    else:
        console.print("Next: moonkit tour --seed 1, moonkit stages, moonkit ask --help, moonkit pretrain --help")


def ask(kimi: "Kimi", family: str, what: str, arguments: Tour, console: "Console") -> bool:
    """One question: shown, asked, checked. True when the answer is right."""
    from fusion.generate import show
    from world import sample
    from world.check import check

    made = sample(family, arguments.seed, split="heldout", seed=arguments.seed, level=arguments.level)
    number = arguments.seed % len(made.turns)
    turn = made.turns[number]
    console.print(f"\n[bold cyan]{what}[/]  [dim]{turn.tests}[/]")
    for line in preview(made, console.width):
        console.print(line)
    console.print(f"  {turn.question}", style="bold", markup=False)
    console.print("  ", end="")
    events = kimi.stream(made.ask(number), max_new_tokens=arguments.max_new_tokens)
    reply, _ = show(events, console)
    good, where = run(turn, reply.text) if turn.check.kind == "program" else (check(turn, reply.text), "")
    console.print(f"  {verdict(turn, good, where)}", soft_wrap=True)
    return good


def run(turn: Turn, reply: str) -> tuple[bool, str]:
    """Whether a program passes its unit tests, and where it ran: in a sandbox, or, where this machine has none, in a
    child process with limits."""
    from agent.sandbox import SandboxError, backend
    from world.check import check

    try:
        name = backend("auto").name
    except SandboxError:
        return check(turn, reply), "in a child process, this machine has no sandbox"
    from evals.graders import grade
    from evals.loaders import program_task

    given = grade(program_task(turn), reply)
    if given.score is None:
        raise ValueError(f"the sandbox {name} failed: {given.evidence}; moonkit sandbox check says what works here")
    return given.score == 1, f"in a sandbox ({name})"


def verdict(turn: Turn, good: bool, where: str = "") -> str:
    """A tick or a cross, and what was right."""
    from rich.markup import escape

    mark = "[bold green]✓[/]" if good else "[bold red]✗[/]"
    if turn.check.kind == "program":
        tests = len(turn.check.data.get("tests", ()))
        return f"{mark} {'all' if good else 'not all'} {tests} unit tests pass {where}" + (
            "" if good else f"; a right program: {escape(repr(turn.answer))}"
        )
    return f"{mark} truth: {escape(turn.answer)}"


def preview(made: Sample, width: int) -> list["Text"]:
    """The media as coloured half blocks, at most `width` columns; nothing when there are none or no colour is shown."""
    if not sys.stdout.isatty():
        return [_note(medium) for medium in made.media]
    lines: list[Text] = []
    for medium in made.media:
        if isinstance(medium, Image):
            lines += _blocks([medium.pixels], min(width - 4, 44))
        else:
            frames = [medium.frames[i] for i in range(min(len(medium.frames), 4))]
            lines += _blocks(frames, max(8, min(22, (width - 4) // len(frames) - 2)))
        lines.append(_note(medium))
    return lines


def _note(medium: Image | Clip) -> "Text":
    from rich.text import Text

    if isinstance(medium, Image):
        height, width = medium.pixels.shape[:2]
        return Text(f"  {width}x{height} pixels", style="dim")
    count, height, width = medium.frames.shape[:3]
    return Text(f"  {count} frames of {width}x{height} pixels", style="dim")


def _blocks(pictures: list[Pixels], columns: int) -> list["Text"]:
    """Pictures side by side; one character shows two pixels, one above the other."""
    import numpy as np
    from PIL import Image as PIL
    from rich.text import Text

    small = []
    for pixels in pictures:
        rows = max(2, round(pixels.shape[0] * columns / pixels.shape[1]) // 2 * 2)
        small.append(np.asarray(PIL.fromarray(pixels).resize((columns, rows), PIL.Resampling.BILINEAR)))
    lines = []
    for y in range(0, small[0].shape[0], 2):
        line = Text("  ")
        for picture in small:
            for x in range(columns):
                (r, g, b), (s, h, c) = picture[y, x].tolist(), picture[y + 1, x].tolist()
                line.append("▀", style=f"rgb({r},{g},{b}) on rgb({s},{h},{c})")
            line.append("  ")
        lines.append(line)
    return lines


if __name__ == "__main__":
    main()
