"""A row of the table: what was done, how fast on each side, what the machine could do, and which goals that meets.

    Row.of("decode, batch 1, context 128", "tokens/s", times, work=1, peers=["transformers"],
           ceiling=Ceiling("memory reads", probe="memory", amount=1e9, need=1.7e9),
           goals=[Goal("share", 0.7), Goal("times", 1.1, against="transformers")])

Rates and ratios are medians over the rounds that count (bench/timing.py).
"""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from bench.timing import Times


@dataclass(frozen=True)
class Ceiling:
    """What the machine allows: a call needs `need` (bytes or operations), and side `probe` does `amount` a call."""

    kind: Literal["memory reads", "GEMM", "disk reads"]
    probe: str
    amount: float
    need: float


@dataclass(frozen=True)
class Goal:
    """share: of the ceiling, at least; times: faster than `against`, at least; at least, at most: the row's own number.

    value and met are None until the row is measured, and stay so where the peer is missing.
    """

    kind: Literal["share", "times", "at least", "at most"]
    bound: float
    against: str = ""
    value: float | None = None
    met: bool | None = None

    def judged(self, value: float | None) -> "Goal":
        met = None
        if value is not None:
            met = value <= self.bound if self.kind == "at most" else value >= self.bound
        return replace(self, value=value, met=met)

    def __str__(self) -> str:
        if self.kind == "share":
            return f"≥ {self.bound:.0%} of ceiling"
        if self.kind == "times":
            return f"≥ {self.bound:g}x {self.against}"
        return f"{'≥' if self.kind == 'at least' else '≤'} {number(self.bound)}"

    @property
    def told(self) -> str:
        """The value as people read it, and whether that is enough."""
        if self.value is None:
            return "not measured"
        shown = f"{self.value:.0%}" if self.kind == "share" else number(self.value)
        return f"{shown}{'x' if self.kind == 'times' else ''}, {'met' if self.met else 'NOT met'}"


@dataclass(frozen=True)
class Row:
    """rates: unit of each side; `ours` first. times: how many times faster ours is than each peer.

    seconds, others: every round's, as measured (bench/timing.py).
    """

    what: str
    unit: str
    rates: dict[str, float]
    times: dict[str, float] = field(default_factory=dict)
    ceiling: dict[str, Any] | None = None
    goals: tuple[Goal, ...] = ()
    rounds: int = 1
    disturbed: int = 0
    note: str = ""
    group: str = ""
    seconds: dict[str, list[float]] = field(default_factory=dict)
    others: list[float | None] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        what: str,
        unit: str,
        times: Times,
        work: float,
        ours: str = "ours",
        peers: Sequence[str] = (),
        ceiling: Ceiling | None = None,
        goals: Sequence[Goal] = (),
        note: str = "",
        works: dict[str, float] | None = None,
    ) -> "Row":
        """work: units in one call. works: of the sides that do more or less in a call. Absent peers are left out.

        A unit that is a time ("s", "ms") is shown as it is: less is better.
        """
        if "ours" in peers:
            raise ValueError(f"a peer of {ours!r} cannot be called 'ours': the column has that name")
        present = [name for name in (ours, *peers) if name in times.seconds]
        each = {name: (works or {}).get(name, work) for name in present}
        scale = {"s": 1.0, "ms": 1e3}.get(unit)
        rates = {
            ("ours" if n == ours else n): times.median(n) * scale if scale else each[n] / times.median(n)
            for n in present
        }
        faster = {n: times.ratio(n, ours) * each[ours] / each[n] for n in present if n != ours}
        allowed, share = None, None
        if ceiling is not None:
            pairs = [(times.seconds[ceiling.probe][n], times.seconds[ours][n]) for n in times.kept]
            ideal = [ceiling.need * probe / ceiling.amount for probe, _ in pairs]  # seconds of a perfect call
            share = statistics.median(best / own for best, (_, own) in zip(ideal, pairs, strict=True))
            allowed = {
                "kind": ceiling.kind,
                "per second": statistics.median(ceiling.amount / probe for probe, _ in pairs),
                "rate": each[ours] / statistics.median(ideal),
                "share": share,
            }
        values = {"share": share, "at least": rates["ours"], "at most": rates["ours"]}
        found = [faster.get(goal.against) if goal.kind == "times" else values[goal.kind] for goal in goals]
        judged = [goal.judged(value) for goal, value in zip(goals, found, strict=True)]
        counted = (len(times.others), len(times.disturbed))
        seconds = {side: list(each) for side, each in times.seconds.items()}
        return cls(
            what,
            unit,
            rates,
            faster,
            allowed,
            tuple(judged),
            *counted,
            note,
            seconds=seconds,
            others=list(times.others),
        )

    @classmethod
    def single(cls, what: str, unit: str, value: float, goals: Sequence[Goal] = (), note: str = "") -> "Row":
        """A number that is not a speed. Goals of kind "at least" and "at most" only."""
        return cls(what, unit, {"ours": value}, goals=tuple(goal.judged(value) for goal in goals), note=note)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "Row":
        return cls(**raw | {"goals": tuple(Goal(**goal) for goal in raw["goals"])})


def number(value: float) -> str:
    """Three digits that count."""
    if value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.3g}"


COLUMNS = ("what", "unit", "ours", "others, and how many times faster ours is", "of ceiling", "goal", "found", "rounds")


def cells(row: Row) -> list[tuple[str, ...]]:
    """A line for each peer or goal, whichever are more."""
    peers = []
    for name, rate in row.rates.items():
        if name != "ours":
            peers.append(f"{name} {number(rate)}" + (f" ({row.times[name]:.2f}x)" if name in row.times else ""))
    ceiling = "" if row.ceiling is None else f"{row.ceiling['share']:.0%} of {number(row.ceiling['rate'])}"
    rounds = f"{row.rounds}" + (f", {row.disturbed} disturbed" if row.disturbed else "")
    lines: list[tuple[str, ...]] = []
    for index in range(max(1, len(peers), len(row.goals))):
        first = (row.what, row.unit, number(row.rates["ours"])) if index == 0 else ("", "", "")
        peer = peers[index] if index < len(peers) else ""
        goal = (str(row.goals[index]), row.goals[index].told) if index < len(row.goals) else ("", "")
        lines.append((*first, peer, ceiling if index == 0 else "", *goal, rounds if index == 0 else ""))
    return lines


def markdown(rows: Sequence[Row]) -> str:
    """A table for each group."""
    parts = []
    for group in dict.fromkeys(row.group for row in rows):
        chosen = [row for row in rows if row.group == group]
        parts += [f"## {group}", "", "| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
        notes = list(dict.fromkeys(row.note for row in chosen if row.note))
        for row in chosen:
            merged = ["<br>".join(part for part in column if part) for column in zip(*cells(row), strict=True)]
            if row.note:
                merged[0] += f" [{notes.index(row.note) + 1}]"
            parts.append("| " + " | ".join(merged) + " |")
        parts += ["", *(f"[{n}] {note}  " for n, note in enumerate(notes, 1)), ""]
    return "\n".join(parts)
