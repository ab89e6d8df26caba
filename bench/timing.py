"""Seconds of several sides that take turns, and how much of the machine others used meanwhile.

    times = take_turns({"ours": f, "transformers": g, "memory": probe}, rounds=5)
    times.ratio("transformers", "ours")          how many times longer theirs takes: the median over rounds

          round 1           round 2           round 3
    ours theirs probe  ours theirs probe  ours theirs probe        a machine that slows down slows all three

A round in which other processes had more than a tenth of the machine is marked and repeated while the budget lasts;
medians are over the quiet rounds when at least two are, over all of them otherwise.
"""

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

LIMIT = 0.10  # share of the machine that others may use in a quiet round
_SHORT = 0.05  # seconds: shorter calls are repeated, a clock tick of the system is 0.01
Side = Callable[[], float | None]
"""What is timed. A side that measures itself, in another process, returns its seconds."""


@dataclass(frozen=True)
class Times:
    """seconds[side][round], and the share of the machine that others used in each round (None: unknown here)."""

    seconds: Mapping[str, Sequence[float]]
    others: Sequence[float | None]

    def __post_init__(self) -> None:
        lengths = {side: len(each) for side, each in self.seconds.items()}
        if not lengths or set(lengths.values()) != {len(self.others)} or not self.others:
            raise ValueError(f"every side needs a time for each of {len(self.others)} rounds, got {lengths}")

    @property
    def disturbed(self) -> list[int]:
        """Rounds in which others used too much of the machine."""
        return [n for n, share in enumerate(self.others) if share is not None and share > LIMIT]

    @property
    def kept(self) -> list[int]:
        """Rounds that count."""
        quiet = [n for n in range(len(self.others)) if n not in set(self.disturbed)]
        return quiet if len(quiet) >= min(2, len(self.others)) else list(range(len(self.others)))

    def median(self, side: str) -> float:
        return statistics.median(self.seconds[side][n] for n in self.kept)

    def ratio(self, side: str, to: str) -> float:
        """Median over rounds of the seconds of `side` over those of `to`."""
        return statistics.median(self.seconds[side][n] / self.seconds[to][n] for n in self.kept)


def take_turns(
    sides: Mapping[str, Side], rounds: int, budget: float = 60.0, processes: Sequence[int] = (), warm_up: bool = True
) -> Times:
    """Every side once a round, after a warm-up. `processes`: ids of other processes that work for a side.

    Ends after `rounds` quiet rounds, after twice as many, or when `budget` seconds are over and a round is done.
    """
    began = time.perf_counter()
    repeats = dict.fromkeys(sides, 1)
    for name, side in sides.items():
        for _ in range(2 if warm_up else 0):
            started = time.perf_counter()
            side()
            once = time.perf_counter() - started
            repeats[name] = max(1, min(1000, int(_SHORT / max(once, 1e-7))))
            if once > 1:
                break
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    others: list[float | None] = []
    quiet = 0
    while quiet < rounds and len(others) < 2 * rounds:
        before, own, started = _busy(), _used(processes), time.perf_counter()
        for name, side in sides.items():
            seconds[name].append(_once(side, repeats[name]))
        wall = time.perf_counter() - started
        after = _busy()
        share = None
        if before is not None and after is not None:
            share = max(0.0, after - before - (_used(processes) - own)) / (wall * (os.cpu_count() or 1))
        others.append(share)
        quiet += share is None or share <= LIMIT
        if time.perf_counter() - began > budget:
            break
    return Times(seconds, others)


def _once(side: Side, repeats: int) -> float:
    started = time.perf_counter()
    told = [side() for _ in range(repeats)]
    taken = (time.perf_counter() - started) / repeats
    measured = [each for each in told if each is not None]
    return sum(measured) / len(measured) if measured else taken


def _busy() -> float | None:
    """CPU seconds that all processes of the machine have used since it started; None where it does not say."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, _, _, irq, softirq, steal = map(int, stat.read_text().split("\n", 1)[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _used(processes: Sequence[int]) -> float:
    """CPU seconds of this process, of its children that have ended, and of `processes`."""
    own = os.times()
    total = own.user + own.system + own.children_user + own.children_system
    for process in processes:
        stat = Path(f"/proc/{process}/stat")
        if stat.exists():
            fields = stat.read_text().rsplit(")", 1)[1].split()
            total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total
