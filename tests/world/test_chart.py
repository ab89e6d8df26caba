"""Charts, clocks, gauges, boards, tables, programs: answers worked out again, pictures measured, splits apart.

pytest tests/world/test_chart.py
"""

import contextlib
import io
import math
import re
from collections import Counter
from functools import lru_cache
from typing import Any

import numpy as np
import pytest

from world import chart
from world.chart import MAKERS, PHRASES, paint_chart, paint_clock, paint_gauge, paint_grid, paint_program, paint_table
from world.sample import Image, Sample, Split, Turn, held_out, rng_of
from world.scene import COLOURS
from world.words import WORDS

SPLITS: tuple[Split, ...] = ("train", "seen", "heldout")


@lru_cache(maxsize=32)
def samples(family: str, split: Split = "train") -> tuple[Sample, ...]:
    return tuple(MAKERS[family](rng_of(family, split, index), split, 1 + index % 3) for index in range(150))


def turns(family: str) -> list[tuple[Turn, str, str]]:
    """(turn, kind, what is shown) of the family, in training and held out."""
    found = []
    for split in ("train", "heldout"):
        for sample in samples(family, split):
            for turn in sample.turns:
                assert turn.tests.startswith(f"{family}/")
                assert not turn.choices or turn.answer in turn.choices
                found.append((turn, turn.tests.split("/")[1], turn.composition.split("|", 1)[1]))
    return found


def pixels(sample: Sample) -> Any:
    (picture,) = sample.media
    assert isinstance(picture, Image)
    return picture.pixels


# ---- all families


@pytest.mark.parametrize("family", MAKERS)
def test_no_composition_is_on_both_sides(family: str) -> None:
    shown = {split: {turn.composition for s in samples(family, split) for turn in s.turns} for split in SPLITS}
    assert not (shown["train"] | shown["seen"]) & shown["heldout"]
    for split in SPLITS:
        assert {held_out(composition) for composition in shown[split]} == {split == "heldout"}


@pytest.mark.parametrize("family", MAKERS)
def test_the_same_seed_gives_the_same_sample(family: str) -> None:
    for level in (1, 2, 3):
        a, b, c = (MAKERS[family](rng_of("again", seed), "train", level) for seed in (1, 1, 3))
        assert a.turns == b.turns and np.array_equal(pixels(a), pixels(b))
        assert not np.array_equal(pixels(a), pixels(c))
    sides = [pixels(s).shape[:2] for split in SPLITS for s in samples(family, split)]
    assert min(map(min, sides)) >= 50 and max(map(max, sides)) <= 224


@pytest.mark.parametrize("family", MAKERS)
def test_an_unknown_level_is_an_error(family: str) -> None:
    with pytest.raises(ValueError, match=f"{family} has levels 1 to 3, got 4"):
        MAKERS[family](rng_of("level"), "train", 4)


def test_every_kind_is_asked_and_yes_is_not_the_rule() -> None:
    found = [turn for family in MAKERS for turn, _, _ in turns(family)]
    assert {turn.tests.split("/")[1] for turn in found} == set(PHRASES)
    for kind in ("chart/higher", "clock/is", "gauge/above"):
        answers = Counter(turn.answer for turn in found if turn.tests == kind)
        assert 0.35 < answers["yes"] / answers.total() < 0.65, (kind, answers)
    won = Counter(turn.answer for turn in found if turn.tests == "grid/won")
    assert min(won[side] for side in ("x", "o", "nobody")) > 0.2 * won.total(), won


def test_other_pictures_show_no_text_that_reading_holds_out() -> None:
    for family in ("table", "printout", "chart"):
        for _, _, shown in turns(family):
            for text in re.findall(r"\d+|[a-z]+", shown):
                if text in WORDS or (text.isdigit() and len(text) > 1):
                    assert not held_out(f"text|{text}"), (family, shown)
    for turn, kind, _ in turns("table"):
        if kind in ("most", "least"):
            assert not any(held_out(f"text|{word}") for word in turn.choices)
    assert not any(held_out(f"text|{text}") for text in ("10", "12", *chart.SHORT_WORDS))


# ---- charts


def test_chart_answers_follow_from_the_values() -> None:
    """Lettered charts: names are places, so every answer follows from the composition."""
    checked = Counter[str]()
    for turn, kind, shown in turns("chart"):
        values = [int(value) for value in shown.split(",")]
        at = [ord(name) - ord("a") for name in re.findall(r"\b(?:bar|point|from|to) ([a-e])\b", turn.question)]
        named = turn.answer if turn.answer in tuple("abcde") else None
        if kind == "count":
            assert int(turn.answer) == len(values)
        elif kind in ("highest", "lowest") and named:
            extreme = max(values) if kind == "highest" else min(values)
            assert [i for i, v in enumerate(values) if v == extreme] == [ord(named) - ord("a")]
        elif kind == "has" and named:
            (value,) = re.findall(r"\d", turn.question)
            assert [i for i, v in enumerate(values) if v == int(value)] == [ord(named) - ord("a")]
        elif kind == "value" and at:
            assert int(turn.answer) == values[at[0]]
        elif kind == "higher" and at:
            assert turn.answer == ("yes" if values[at[0]] > values[at[1]] else "no")
        elif kind == "difference":
            if at:
                assert int(turn.answer) == values[at[0]] - values[at[1]]
            a, b, c = map(int, re.fullmatch(r"(\d) - (\d) = (\d)\.", turn.thinking).groups())  # type: ignore[union-attr]
            assert a - b == c == int(turn.answer) > 0 and {a, b} <= set(values)
        elif kind == "trend":
            assert len(at) == 2 and at[1] == at[0] + 1
            assert turn.answer == ("up" if values[at[1]] > values[at[0]] else "down")
        else:
            continue
        checked[kind] += 1
    assert set(checked) == {"count", "highest", "lowest", "has", "value", "higher", "difference", "trend"}
    assert min(checked.values()) >= 15, checked


def test_coloured_bars_are_as_high_as_the_answers_say() -> None:
    """Heights of the named colours in pixels, against the unit that the whole picture agrees on."""
    checked = 0
    for sample in samples("chart"):
        values = [int(v) for v in sample.turns[0].composition.split("|")[1].split(",")]
        for turn in sample.turns:
            names = [word for word in re.findall(r"\w+", turn.question) if word in COLOURS]
            if sample.level == 3 or turn.tests not in ("chart/value", "chart/difference", "chart/higher") or not names:
                continue
            seen = pixels(sample).astype(int)
            masks = {name: (np.abs(seen - COLOURS[name]).max(axis=-1) < 3) for name in COLOURS}
            heights = {n: np.ptp(np.flatnonzero(m.any(axis=1))) + 1 for n, m in masks.items() if m.sum() > 60}
            assert len(heights) == len(values)
            unit = max(heights.values()) / max(values)
            measured = [round(heights[name] / unit) for name in names]
            assert sorted(round(h / unit) for h in heights.values()) == sorted(values)
            if turn.tests == "chart/value":
                assert int(turn.answer) == measured[0]
            elif turn.tests == "chart/difference":
                assert int(turn.answer) == measured[0] - measured[1]
            else:
                assert turn.answer == ("yes" if measured[0] > measured[1] else "no")
            checked += 1
    assert checked >= 20


@pytest.mark.parametrize("kind", ("bar", "point"))
@pytest.mark.parametrize("values", ([1, 9, 4], [3, 3, 8, 2]))
def test_bars_and_lines_stand_at_their_values(kind: str, values: list[int]) -> None:
    """The highest pixel of the only colour of the picture, in the column of every letter, is the value's."""
    for seed in range(6):
        seen = paint_chart(rng_of(seed), 2, kind, list("abcde"[: len(values)]), values).astype(int)
        colourful = np.ptp(seen, axis=-1) > 60  # all else is gray
        columns = np.flatnonzero(colourful.any(axis=0))
        first, last = columns[0], columns[-1]
        half = (last - first) / (2 * len(values)) if kind == "bar" else 3.2
        if kind == "bar":
            gaps = np.flatnonzero(np.diff(columns) > 1)
            starts, ends = [first, *columns[gaps + 1]], [*columns[gaps], last]
            middles = [(a + b) / 2 for a, b in zip(starts, ends, strict=True)]
        else:
            middles = list(np.linspace(first + half, last - half, len(values)))
        assert len(middles) == len(values)
        rows = []
        for x in middles:
            found = np.flatnonzero(colourful[:, round(x) - 1 : round(x) + 2].any(axis=1))
            # a point's line may run on above it: its disc is where the column is thickest around the dot's middle
            rows.append(found[0] if kind == "bar" else found[0] + 3)
        tall = np.array(rows, float)
        unit = (tall[int(np.argmin(values))] - tall[int(np.argmax(values))]) / (max(values) - min(values))
        above = (tall[int(np.argmin(values))] - tall) / unit + min(values)
        assert np.abs(above - values).max() < 0.45, (values, above)
        assert 8 < unit < 12


# ---- clocks


def test_clock_answers_follow_from_the_time() -> None:
    kinds = Counter[str]()
    for turn, kind, shown in turns("clock"):
        hour, minute = map(int, shown.split(":"))
        kinds[kind] += 1
        if kind == "time":
            assert turn.answer == shown
        elif kind == "long":
            assert int(turn.answer) == (minute // 5 or 12)
        elif kind == "is":
            (asked,) = re.findall(r"\d+:\d\d", turn.question)
            assert (turn.answer == "yes") == (asked == shown)
        else:
            later = hour % 12 + 1 if kind == "later" else (hour - 2) % 12 + 1
            assert turn.answer == f"{later}:{minute:02d}"
            assert turn.thinking == f"it is {shown}."
    assert set(kinds) == {"time", "long", "is", "later", "before"}


def test_clock_questions_name_no_time_of_the_other_split() -> None:
    for split in SPLITS:
        for sample in samples("clock", split):
            for turn in sample.turns:
                for time in re.findall(r"\d+:\d\d", turn.question):
                    assert held_out(f"clock|{time}") == (split == "heldout")


@pytest.mark.parametrize("minute", (0, 15, 30, 45))
def test_the_hands_point_where_the_time_says(minute: int) -> None:
    """Ink along rays from the middle: the long hand beyond the short one's end, the short hand before it."""
    for hour in range(1, 13):
        seen = paint_clock(rng_of("hands", hour), 100, 110, (56, 48), 36, hour, minute, 1).astype(float)
        away = np.abs(seen - np.median(seen, axis=(0, 1))).max(axis=-1)

        def ray(turn: float, near: float, far: float, away: Any = away) -> float:
            radii = np.linspace(near * 36, far * 36, 10)
            x, y = 56 + radii * math.sin(2 * math.pi * turn), 48 - radii * math.cos(2 * math.pi * turn)
            return float(away[np.round(y - 0.5).astype(int), np.round(x - 0.5).astype(int)].mean())

        outer = [ray(tick / 48, 0.58, 0.7) for tick in range(48)]
        assert int(np.argmax(outer)) == minute * 48 // 60, (hour, minute)
        inner = [ray(tick / 48, 0.25, 0.42) for tick in range(48)]
        expected = {minute * 48 // 60 % 48, (hour * 4 + minute // 15) % 48}
        assert min(inner[tick] for tick in expected) > 0.7 * max(inner), (hour, minute)
        far = [t for t in range(48) if all(min((t - e) % 48, (e - t) % 48) > 2 for e in expected)]
        assert max(inner[tick] for tick in far) < 0.5 * max(inner), (hour, minute)


# ---- gauges


def test_gauge_answers_follow_from_the_values() -> None:
    kinds = Counter[str]()
    for split in ("train", "heldout"):
        for sample in samples("gauge", split):
            _, _, colour, shown = sample.turns[0].composition.split("|")
            two = any("the gauge" not in turn.question and "on the" not in turn.question for turn in sample.turns)
            for turn in sample.turns:
                kind = turn.tests.split("/")[1]
                kinds[kind] += 1
                if kind not in ("shows", "above", "full"):
                    continue
                named = [word for word in re.findall(r"\w+", turn.question) if word in COLOURS]
                assert two or not named
                if named and named != [colour]:
                    continue
                if kind == "shows":
                    assert turn.answer == shown
                elif kind == "full":
                    assert int(turn.answer) == 10 - int(shown) and turn.thinking == f"10 - {shown} = {turn.answer}."
                else:
                    (bound,) = re.findall(r"\d+", turn.question)
                    assert turn.answer == ("yes" if int(shown) > int(bound) else "no")
    assert set(kinds) == {"shows", "above", "full", "highest", "higher"}


@pytest.mark.parametrize("style", ("round", "half", "bar"))
def test_the_needle_stands_at_the_value(style: str) -> None:
    """The coloured pixels: their far end's angle for a dial, their height for a bar; equal steps from 0 to 10."""
    found = []
    for value in range(11):
        seen = paint_gauge(rng_of("needle"), 1, style, ["red"], [value]).astype(int)
        rows, columns = np.nonzero(np.ptp(seen, axis=-1) > 90)
        if style == "bar":
            found.append(float(np.ptp(rows)))
            continue
        # the hub is the thickest part: most neighbours within 4 px
        near = ((rows[:, None] - rows) ** 2 + (columns[:, None] - columns) ** 2 <= 16).sum(axis=1)
        hub = np.array([rows[near >= near.max() - 2].mean(), columns[near >= near.max() - 2].mean()])
        far = np.argsort(-np.hypot(rows - hub[0], columns - hub[1]))[:6]
        dy, dx = rows[far].mean() - hub[0], columns[far].mean() - hub[1]
        found.append(math.degrees(math.atan2(dx, -dy)))
    steps = np.diff(found)
    wanted = {"round": 27.0, "half": 18.0}.get(style, float(np.mean(steps)))
    assert np.abs(steps - wanted).max() < (2 if style == "bar" else 6), steps
    assert np.ptp(found) > (50 if style == "bar" else 0.95 * 10 * wanted)


def test_two_gauges_are_compared_by_what_they_show() -> None:
    compared = 0
    for sample in samples("gauge"):
        values = {}
        for turn in sample.turns:
            named = [word for word in re.findall(r"\w+", turn.question) if word in COLOURS]
            if turn.tests == "gauge/shows" and named:
                values[named[0]] = int(turn.answer)
            if turn.tests == "gauge/full" and named:
                values[named[0]] = 10 - int(turn.answer)
        for turn in sample.turns:
            if len(values) < 2 or turn.tests not in ("gauge/highest", "gauge/higher"):
                continue
            named = [word for word in re.findall(r"\w+", turn.question) if word in COLOURS]
            if turn.tests == "gauge/highest":
                assert turn.answer == max(values, key=lambda name: values[name])
            else:
                assert turn.answer == ("yes" if values[named[0]] > values[named[1]] else "no")
            compared += 1
    assert compared >= 8


# ---- boards


PLACES = {
    "top left": 0, "top": 1, "top right": 2,
    "left": 3, "middle": 4, "right": 5,
    "bottom left": 6, "bottom": 7, "bottom right": 8,
}  # fmt: skip


def lines_of(board: str) -> dict[str, str]:
    """Every line of the board by name, said again here."""
    rows = [board[0:3], board[3:6], board[6:9]]
    columns = ["".join(row[i] for row in rows) for i in range(3)]
    return {
        "top row": rows[0],
        "middle row": rows[1],
        "bottom row": rows[2],
        "left column": columns[0],
        "middle column": columns[1],
        "right column": columns[2],
        "diagonal down": board[0] + board[4] + board[8],
        "diagonal up": board[6] + board[4] + board[2],
    }


def test_grid_answers_follow_from_the_board() -> None:
    for turn, kind, board in turns("grid"):
        assert len(board) == 9 and abs(board.count("x") - board.count("o")) <= 1
        won = {name: line[0] for name, line in lines_of(board).items() if line in ("xxx", "ooo")}
        assert len(won) <= 1
        if kind == "won":
            assert turn.answer == (next(iter(won.values())) if won else "nobody")
            assert turn.thinking in ("", f"{next(iter(won), 'no line')}.")
        elif kind == "line":
            assert [turn.answer] == list(won)
        elif kind == "at":
            (place,) = re.findall(r"at the ([a-z ]+)\?", turn.question)
            assert turn.answer == {"x": "x", "o": "o", "-": "empty"}[board[PLACES[place]]]
        elif kind == "empty":
            assert int(turn.answer) == board.count("-")
        else:
            (sign,) = re.findall(r"\b[xo]\b", turn.question)
            assert int(turn.answer) == board.count(sign)


def test_the_picture_is_that_of_the_board() -> None:
    """Level 1: a cross has ink in the middle of its cell, a ring around an empty middle, an empty cell none."""
    for number in range(24):
        rng = rng_of("board", number)
        board = "".join(rng.choice("xo-") for _ in range(9))
        seen = paint_grid(rng_of("paint", number), 1, board).astype(float)
        away = np.abs(seen - np.median(seen, axis=(0, 1))).max(axis=-1) > 40
        # the two lines each way cross the whole board: most ink of all rows and columns
        ys, xs = (sorted(np.argsort(-away.sum(axis=axis), kind="stable")[:4]) for axis in (1, 0))
        y1, y2, x1, x2 = (ys[0] + ys[1]) / 2, (ys[2] + ys[3]) / 2, (xs[0] + xs[1]) / 2, (xs[2] + xs[3]) / 2
        cell = ((y2 - y1) + (x2 - x1)) / 2
        read = ""
        for row in (-0.5, 0.5, 1.5):
            for column in (-0.5, 0.5, 1.5):
                y, x = y1 + row * cell + 0.5, x1 + column * cell + 0.5
                inside = away[int(y - cell * 0.38) : int(y + cell * 0.38), int(x - cell * 0.38) : int(x + cell * 0.38)]
                core = away[int(y) - 2 : int(y) + 3, int(x) - 2 : int(x) + 3]
                read += "-" if inside.sum() < 5 else "x" if core.sum() >= 4 else "o"
        assert read == board, number


# ---- tables


def test_table_answers_follow_from_the_cells() -> None:
    kinds = Counter[str]()
    for turn, kind, shown in turns("table"):
        cells = [[int(value) for value in row.split(",")] for row in shown.split(";")]
        flat = [value for row in cells for value in row]
        assert len(set(flat)) == len(flat) and 2 <= len(cells) <= 3
        kinds[kind] += 1
        numbers = [int(number) - 1 for number in re.findall(r"\d", turn.question)]
        if kind == "cell":
            assert int(turn.answer) == cells[numbers[0]][numbers[1]]
        elif kind == "row":
            assert [int(value) for value in turn.answer.split()] == cells[numbers[0]]
        elif kind == "sum":
            assert int(turn.answer) == sum(cells[numbers[0]])
            parts, total = turn.thinking.rstrip(".").split(" = ")
            assert [int(part) for part in parts.split(" + ")] == cells[numbers[0]] and total == turn.answer
        elif kind == "largest":
            assert int(turn.answer) == max(flat)
        elif kind == "smallest":
            assert int(turn.answer) == min(flat)
        elif kind == "named":
            letters = re.findall(r"\b([ab])\b", turn.question.replace("what is the value of", ""))
            column = [row["ab".index(letters[0]) if letters else 0] for row in cells]
            assert int(turn.answer) in column
        else:
            at = turn.choices.index(turn.answer)  # choices are the words from top to bottom
            assert cells[at] == [max(flat) if kind == "most" else min(flat)]
    assert set(kinds) == {"cell", "row", "sum", "largest", "smallest", "named", "most", "least"}


def test_a_cell_changes_only_its_own_place() -> None:
    """Two tables that differ in one number differ in one cell, which is where row and column say."""
    for row in range(3):
        for column in range(3):
            a = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
            b = [[0 if (r, c) == (row, column) else a[r][c] for c in range(3)] for r in range(3)]
            one, two = (paint_table(rng_of("cell"), 1, cells, []).astype(int) for cells in (a, b))
            rows, columns = np.nonzero(np.abs(one - two).max(axis=-1) > 20)
            height, width = one.shape[:2]
            assert [int(3 * rows.mean() / height), int(3 * columns.mean() / width)] == [row, column]
            assert np.ptp(rows) < height / 3 and np.ptp(columns) < width / 3
    # words stand left of the numbers, in order
    one, two = (paint_table(rng_of("words"), 1, [[1], [2]], words) for words in (["sun", "cat"], ["sun", "car"]))
    rows, columns = np.nonzero(np.abs(one.astype(int) - two).max(axis=-1) > 20)
    assert rows.mean() > one.shape[0] / 2 and columns.max() < one.shape[1] * 0.75


# ---- programs


def run(source: str) -> str:
    """What the program prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(source, "shown.py", "exec"), {})  # written by the maker under test, from fixed templates
    return printed.getvalue()


def test_programs_print_what_the_answers_say() -> None:
    for turn, kind, source in turns("printout"):
        lines = source.split("\n")
        if kind == "output":
            assert run(source).split() == turn.answer.split(), source
            for left, right in re.findall(r"(\d [-+*] \d|\d\d [-+*] \d) = (\d+)", turn.thinking):
                assert str(eval(left)) == right
        elif kind == "says":
            (row,) = re.findall(r"\d", turn.question)
            assert turn.answer == lines[int(row) - 1].strip()
        else:
            assert turn.answer == str(len(lines)) and 1 <= len(lines) <= 4


def test_a_line_of_the_picture_is_that_of_the_program() -> None:
    """Changing one line changes the picture in that line's share of the height."""
    lines = ["n = 2", "for i in range(3):", "    n = n + 2", "print(n)"]
    one = paint_program(rng_of("line"), 2, lines).astype(int)
    for number in range(4):
        other = list(lines)
        other[number] = (
            other[number].replace("n =", "n -").replace("range(3)", "range(8)").replace("print(n)", "print(o)")
        )
        two = paint_program(rng_of("line"), 2, other).astype(int)
        if two.shape != one.shape:
            continue
        rows = np.nonzero(np.abs(one - two).max(axis=(1, 2)) > 20)[0]
        assert len(rows) and int(4 * rows.mean() / one.shape[0]) == number
