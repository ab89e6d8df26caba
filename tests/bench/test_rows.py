"""Ratios, ceilings and goals from given times; which rounds count: pytest tests/bench/test_rows.py"""

import json
import math
from collections.abc import Iterator

import pytest

import bench.timing
from bench.rows import Ceiling, Goal, Row, cells, markdown, number
from bench.timing import Times, take_turns

# round 2 is disturbed: everything takes ten times as long
TIMES = Times(
    {
        "ours": [0.10, 0.20, 1.50, 0.10],
        "theirs": [0.20, 0.50, 2.00, 0.30],
        "memory": [0.01, 0.02, 0.90, 0.01],
    },
    [0.02, 0.00, 0.80, None],
)


def test_disturbed_rounds_do_not_count() -> None:
    assert TIMES.disturbed == [2] and TIMES.kept == [0, 1, 3]
    assert TIMES.median("theirs") == 0.30
    assert TIMES.ratio("theirs", "ours") == pytest.approx(2.5)  # of 2, 2.5 and 3: rounds, not medians of medians


def test_all_count_where_too_few_were_quiet() -> None:
    noisy = Times({"ours": [1.0, 2.0, 3.0]}, [0.5, 0.0, 0.2])
    assert noisy.disturbed == [0, 2] and noisy.kept == [0, 1, 2]
    assert Times({"ours": [1.0]}, [0.0]).kept == [0] == Times({"ours": [1.0]}, [0.9]).kept


@pytest.mark.parametrize(
    ("seconds", "others"), [({}, []), ({"ours": []}, []), ({"a": [1.0], "b": []}, [0.0]), ({"a": [1.0]}, [0.0, 0.0])]
)
def test_times_must_be_whole(seconds: dict[str, list[float]], others: list[float | None]) -> None:
    with pytest.raises(ValueError, match="every side needs a time"):
        Times(seconds, others)


def test_a_row() -> None:
    row = Row.of(
        "decode",
        "tokens/s",
        TIMES,
        work=2,
        peers=["theirs", "missing"],
        ceiling=Ceiling("memory reads", "memory", amount=1e9, need=8e9),  # a perfect call takes eight probes
        goals=[
            Goal("share", 0.79),
            Goal("share", 0.81),
            Goal("times", 2.49, "theirs"),
            Goal("times", 2.6, "theirs"),
            Goal("times", 1.0, "missing"),
            Goal("at least", 19.9),
            Goal("at most", 19.9),
        ],
    )
    assert row.rates == {"ours": pytest.approx(20), "theirs": pytest.approx(2 / 0.3)}
    assert row.times == {"theirs": pytest.approx(2.5)}
    assert row.ceiling is not None
    assert row.ceiling["share"] == pytest.approx(0.8)
    assert row.ceiling["per second"] == pytest.approx(1e11) and row.ceiling["rate"] == pytest.approx(25)
    assert [goal.met for goal in row.goals] == [True, False, True, False, None, True, False]
    assert [goal.value for goal in row.goals][4] is None and row.goals[4].told == "not measured"
    assert (row.rounds, row.disturbed) == (4, 1)
    assert Row.from_dict(json.loads(json.dumps(row.to_dict()))) == row


def test_sides_that_do_more_or_less_in_a_call() -> None:
    row = Row.of("vision", "patches/s", TIMES, 100, peers=["theirs"], works={"theirs": 50})
    assert row.rates["theirs"] == pytest.approx(50 / 0.3) and row.times["theirs"] == pytest.approx(5.0)


def test_another_side_may_be_ours() -> None:
    times = Times({"INT4": [1.0, 2.0], "bfloat16": [2.0, 4.0]}, [0.0, 0.0])
    row = Row.of("int4", "tokens/s", times, 1, ours="INT4", peers=["bfloat16"], goals=[Goal("times", 2.1, "bfloat16")])
    assert row.rates == {"ours": pytest.approx(1 / 1.5), "bfloat16": pytest.approx(1 / 3)}
    assert row.times == {"bfloat16": pytest.approx(2.0)} and row.goals[0].met is False


def test_no_peer_takes_our_name() -> None:
    with pytest.raises(ValueError, match="cannot be called 'ours'"):
        Row.of("x", "tokens/s", TIMES, 1, ours="theirs", peers=["ours"])


def test_a_time_is_shown_as_it_is() -> None:
    row = Row.of("start", "ms", TIMES, 1, peers=["theirs"], goals=[Goal("at most", 100), Goal("times", 2, "theirs")])
    assert row.rates == {"ours": pytest.approx(100), "theirs": pytest.approx(300)}
    assert [goal.met for goal in row.goals] == [True, True]


def test_a_number_of_its_own() -> None:
    assert [goal.met for goal in Row.single("memory", "times", 1.2, [Goal("at most", 1.15)]).goals] == [False]
    assert Row.single("memory", "times", math.nan, [Goal("at most", 1.15)]).goals[0].met is False


def test_what_people_read() -> None:
    goals = [Goal("share", 0.7), Goal("times", 2, "theirs"), Goal("times", 1.5, "llama.cpp")]
    ceiling = Ceiling("memory reads", "memory", 1e9, 8e9)
    row = Row.of("decode", "tokens/s", TIMES, 1, peers=["theirs"], ceiling=ceiling, goals=goals, note="a note")
    lines = cells(row)
    assert len(lines) == 3 and lines[0][:3] == ("decode", "tokens/s", "10") and lines[1][0] == ""
    assert lines[0][3:] == ("theirs 3.33 (2.50x)", "80% of 12.5", "≥ 70% of ceiling", "80%, met", "4, 1 disturbed")
    assert lines[2][5:7] == ("≥ 1.5x llama.cpp", "not measured")
    text = markdown([Row.from_dict(row.to_dict() | {"group": "decode"})])
    assert "## decode" in text and "| decode [1] |" in text and "[1] a note" in text
    assert text.count("|") % 9 == 0, "every line of the table has the same cells"
    assert [number(each) for each in (0, 0.01234, 12.345, 123.45, 12345.6)] == [
        "0",
        "0.0123",
        "12.3",
        "123.5",
        "12,346",
    ]


class Clock:
    """A machine: time passes only in sides, and others use what they are told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, others: Iterator[float]) -> None:
        self.now = self.own = self.busy = 0.0
        self.others = others
        monkeypatch.setattr("time.perf_counter", lambda: self.now)
        monkeypatch.setattr("os.cpu_count", lambda: 2)
        monkeypatch.setattr(bench.timing, "_busy", lambda: self.busy)
        monkeypatch.setattr(bench.timing, "_used", lambda processes: self.own)

    def side(self, seconds: float) -> None:
        self.now += seconds
        self.own += 2 * seconds
        self.busy += 2 * seconds + next(self.others) * 2 * seconds


def test_disturbed_rounds_are_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, iter([0.0, 0.0, 0.5, 0.0, *[0.0] * 9]))  # a warm-up; rounds 0, 1 (disturbed), 2, 3
    times = take_turns({"ours": lambda: clock.side(2.0)}, rounds=3)
    assert times.seconds["ours"] == [2.0] * 4 and times.disturbed == [1]
    assert times.others == [0.0, pytest.approx(0.5), 0.0, 0.0]


def test_no_more_than_twice_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, iter([0.9] * 99))
    assert len(take_turns({"ours": lambda: clock.side(2.0)}, rounds=3).others) == 6


def test_the_budget_ends_with_a_whole_round(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, iter([0.0] * 99))
    sides = {"ours": lambda: clock.side(10.0), "theirs": lambda: clock.side(30.0)}
    times = take_turns(sides, rounds=9, budget=100)
    assert times.seconds == {"ours": [10.0, 10.0], "theirs": [30.0, 30.0]}


def test_short_calls_are_repeated_and_told_seconds_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, iter([0.0] * 999))
    called = 0

    def short() -> None:
        nonlocal called
        called += 1
        clock.side(0.01)

    def elsewhere() -> float:
        clock.side(1.5)
        return 1.25

    times = take_turns({"ours": short, "theirs": elsewhere}, rounds=2)
    assert called == 2 + 2 * 5
    assert times.seconds["ours"] == pytest.approx([0.01, 0.01]) and times.seconds["theirs"] == [1.25, 1.25]
