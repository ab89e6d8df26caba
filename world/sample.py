"""What every family of the world makes: a conversation about pictures, clips, programs or sums, with exact answers.

    sample("picture", index=7, split="train", seed=0)   ->   Sample
        media   one picture, shown before the first question
        turns   question, answer, what it tests, the composition that decides its split, how an answer is checked

A sample is a pure function of (family, index, split, seed, level): nothing is downloaded, nothing is stored, and a
training run resumes by remembering a number.

Splits are by composition, not by seed. Whatever a turn combines (colour and shape, phrasing and attribute, the
primitives of a program, the operands of a sum) is a composition; `held_out` sorts every composition by its hash into
those that training may see and those that it never sees.

    train     compositions that are not held out
    seen      the same compositions, other seeds: how well the model learned what it was taught
    heldout   every turn's composition is held out: what the model card reports
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal
from zlib import crc32

import numpy as np

Split = Literal["train", "seen", "heldout"]
HELD_OUT_PERCENT = 12

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class Image:
    """One picture: uint8 (height, width, 3), RGB."""

    pixels: Pixels

    def __post_init__(self) -> None:
        if self.pixels.dtype != np.uint8 or self.pixels.ndim != 3 or self.pixels.shape[2] != 3:
            raise ValueError(f"a picture is uint8 (height, width, 3), got {self.pixels.dtype} {self.pixels.shape}")


@dataclass(frozen=True)
class Clip:
    """Frames in order: uint8 (frames, height, width, 3), RGB, `fps` of them per second. Every frame is shown."""

    frames: Pixels
    fps: float = 2.0

    def __post_init__(self) -> None:
        if self.frames.dtype != np.uint8 or self.frames.ndim != 4 or self.frames.shape[3] != 3:
            raise ValueError(f"a clip is uint8 (frames, height, width, 3), got {self.frames.dtype} {self.frames.shape}")
        if not self.fps > 0:
            raise ValueError(f"fps must be positive, got {self.fps}")


@dataclass(frozen=True)
class Check:
    """How an answer is checked. `data` is plain JSON; world.check says what each kind reads from it.

    exact      the same text, case and outer white space aside      number   the same number; data: tolerance
    box        intersection over union with data["box"] >= 0.5      point    inside data["box"]
    program    data["tests"] pass                                   output   the printed text, white space aside
    svg        the drawing, rendered, equals data's                  constraint   data["constraints"] all hold
    caption    every fact of data["facts"] is named, no other
    """

    kind: Literal["exact", "number", "box", "point", "program", "output", "svg", "constraint", "caption"] = "exact"
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Turn:
    """One question and its answer.

    tests: what it tests, "picture/count/colour". composition: what must be new for it to be held out. thinking: the
    worked thought before the answer, often empty. choices: the possible answers where they are few (for chance).
    steps: tool rounds between question and answer, as OpenAI-style messages (assistant with tool_calls, then tool).
    """

    question: str
    answer: str
    tests: str
    composition: str
    thinking: str = ""
    check: Check = Check()
    choices: tuple[str, ...] = ()
    steps: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Sample:
    """A conversation with exact answers; see the module."""

    family: str
    turns: tuple[Turn, ...]
    media: tuple[Image | Clip, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    system: str | None = None
    level: int = 1
    split: Split = "train"
    seed: int = 0
    index: int = 0

    def __post_init__(self) -> None:
        if not self.turns:
            raise ValueError(f"{self.family}: a sample needs at least one turn")
        if any(not turn.question or not turn.answer for turn in self.turns):
            raise ValueError(f"{self.family}: every turn needs a question and an answer")

    def messages(self) -> list[dict[str, Any]]:
        """The whole conversation with its answers, OpenAI-style; media are arrays inside the first user message."""
        out: list[dict[str, Any]] = [{"role": "system", "content": self.system}] if self.system else []
        for number, turn in enumerate(self.turns):
            out.append(self._ask(turn, with_media=number == 0))
            out += [dict(step) for step in turn.steps]
            out.append({"role": "assistant", "content": turn.answer, "reasoning_content": turn.thinking})
        return out

    def ask(self, number: int = 0) -> list[dict[str, Any]]:
        """One turn asked alone, as a first question: the messages up to its answer (tool rounds left out)."""
        out: list[dict[str, Any]] = [{"role": "system", "content": self.system}] if self.system else []
        return [*out, self._ask(self.turns[number], with_media=True)]

    def _ask(self, turn: Turn, with_media: bool) -> dict[str, Any]:
        if not self.media or not with_media:
            return {"role": "user", "content": turn.question}
        parts: list[dict[str, Any]] = []
        for medium in self.media:
            if isinstance(medium, Image):
                parts.append({"type": "image", "image": medium.pixels})
            else:
                parts.append({"type": "video", "video": medium})
        return {"role": "user", "content": [*parts, {"type": "text", "text": turn.question}]}


Maker = Callable[[random.Random, Split, int], Sample]
"""(rng, split, level) to a sample. Draws from `rng` alone; `sample` fills in seed and index."""


@lru_cache(maxsize=200_000)
def held_out(composition: str) -> bool:
    """Whether training never sees this composition: a fixed share of all, by hash, the same on every machine."""
    return crc32(b"moonkit/" + composition.encode()) % 100 < HELD_OUT_PERCENT


def belongs(composition: str, split: Split) -> bool:
    """Whether a turn with this composition may be in this split."""
    return held_out(composition) == (split == "heldout")


def rng_of(*parts: object) -> random.Random:
    """A generator seeded by names and numbers, the same on every machine and Python."""
    return random.Random("/".join(map(str, parts)))
