"""moonkit eval report: what one or more runs have shown, as a table, a plot and a page with every sample.

    moonkit eval report runs/nano                    report.md, .json, .png, .svg and .html in the run's folder
    moonkit eval report runs/a runs/b --out both     the second beside the first: paired differences on common items

    RUN/run.json        model, settings, versions, seeds, isolation         read_run        summarize, paired
    RUN/samples.jsonl   one graded answer per line                    -->   Run, Run  -->   Report  -->  table, files
    RUN/media/*.png     pictures, named by their digest

What is damaged costs a sentence, not the report: a line that is cut short, a row without a score, a picture that is
missing. The page loads nothing from anywhere; what a model wrote is shown as text and nothing else (report_page.py).
"""

import json
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from evals.statistics import INFRA_SHARE, Estimate, Paired, TaskSummary, lost, paired, solved, summarize, truncated

FILES = ("report.md", "report.json", "report.png", "report.svg", "report.html")
PICTURES = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"RIFF": "webp"}  # by their first bytes

State = Literal["right", "partly", "wrong", "scored", "unscored", "silent", "truncated", "infra"]


@dataclass
class Run:
    """One run folder, as far as it could be read. problems: what could not, a sentence each."""

    folder: Path
    info: dict[str, Any]
    rows: list[dict[str, Any]]
    problems: list[str] = field(default_factory=list)
    label: str = ""

    @property
    def tasks(self) -> dict[str, list[dict[str, Any]]]:
        """Rows by task, in the order of run.json, then of the samples."""
        order = [name for name in self.info["tasks"] if isinstance(name, str)]
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in order}
        for row in self.rows:
            found.setdefault(row["task"], []).append(row)
        return {name: rows for name, rows in found.items() if rows}


@dataclass(frozen=True)
class Report:
    """summaries: by run, then task. differences: every run less the first, by task; labels are the runs' names."""

    runs: tuple[Run, ...]
    summaries: tuple[dict[str, TaskSummary], ...]
    differences: tuple[tuple[str, Paired], ...]
    infra_share: float


# ---- reading


def read_run(folder: Path) -> Run:
    """A run folder. Raises ValueError where there is neither run.json nor samples.jsonl to read."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no run folder: {'a file' if folder.exists() else 'it does not exist'}")
    samples = folder / "samples.jsonl"
    if not (folder / "run.json").exists() and not samples.exists():
        raise ValueError(f"{folder} is no run folder: it has neither run.json nor samples.jsonl")
    problems: list[str] = []
    info = _read_info(folder / "run.json", problems)
    rows = _read_rows(samples, problems)
    run = Run(folder, info, rows, problems)
    counts = {name: len({row["item_id"] for row in group}) for name, group in run.tasks.items()}
    for name, about in info["tasks"].items():
        wanted = about.get("n") if isinstance(about, Mapping) else None
        if isinstance(wanted, int) and counts.get(name, 0) < wanted:
            problems.append(f"Task {name} is not finished: {counts.get(name, 0)} of {wanted} items have an answer.")
    if info and not info.get("finished") and not any("run.json" in p for p in problems):
        problems.append("The run has not finished, or was killed: run.json names no end.")
    return run


def _read_info(path: Path, problems: list[str]) -> dict[str, Any]:
    info: Any = {}
    try:
        info = _whole(json.loads(path.read_text(encoding="utf-8", errors="replace")))
    except FileNotFoundError:
        problems.append("run.json is missing: settings, versions and seeds are not known.")
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"run.json cannot be read ({error}): settings, versions and seeds are not known.")
    if not isinstance(info, dict):
        problems.append(f"run.json holds a {type(info).__name__}, wanted an object: settings are not known.")
        info = {}
    if not isinstance(info.get("tasks", {}), dict):
        problems.append("run.json names its tasks in a form that is not known: their settings are left out.")
        info["tasks"] = {}
    info.setdefault("tasks", {})
    return info


def _read_rows(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    if not path.is_file():
        problems.append("samples.jsonl is missing: it is written when a run ends, so this one was stopped before.")
        return []
    kept: dict[tuple[str, str, int], dict[str, Any]] = {}
    broken: list[str] = []
    again = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = _row(_whole(json.loads(line)))
            except (ValueError, RecursionError) as error:
                # the writer ends every line: one without an end was being written
                cut = not line.endswith(b"\n")
                broken.append(f"line {number} is cut short" if cut else f"line {number}: {str(error)[:120]}")
                continue
            key = row["task"], row["item_id"], row["repeat"]
            again += key in kept
            kept.pop(key, None)
            kept[key] = row
    if broken:
        more = f", and {len(broken) - 5} more" if len(broken) > 5 else ""
        rows = "1 line" if len(broken) == 1 else f"{len(broken)} lines"
        problems.append(f"samples.jsonl: {rows} could not be read and are left out ({'; '.join(broken[:5])}{more}).")
    if again:
        problems.append(f"samples.jsonl: {again} answers are there more than once; the last of each counts.")
    return list(kept.values())


def _whole(value: Any) -> Any:
    """The same JSON without halves of characters, which JSON can say and UTF-8 cannot."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "replace").decode()
    if isinstance(value, list):
        return [_whole(one) for one in value]
    if isinstance(value, dict):
        return {_whole(key): _whole(one) for key, one in value.items()}
    return value


def _row(values: Any) -> dict[str, Any]:
    """A row with every field in its place and of its type. Raises ValueError for what cannot be a graded answer."""
    if not isinstance(values, dict):
        raise ValueError(f"a row is an object, got {type(values).__name__}")
    task, item = values.get("task"), values.get("item_id", values.get("doc_id"))
    if not isinstance(task, str) or not task:
        raise ValueError("no task")
    if item is None or isinstance(item, dict | list):
        raise ValueError("no item_id")
    score = values.get("score")
    if score is not None and (not isinstance(score, bool | int | float) or not math.isfinite(score)):
        raise ValueError(f"score must be a number or null, got {str(score)[:40]!r}")
    status = str(values.get("status") or ("infra_error" if score is None else "graded"))
    if status == "infra_error":
        score = None
    tokens = values.get("tokens")
    counts = {k: v for k, v in tokens.items() if _is_count(v)} if isinstance(tokens, dict) else {}
    media = values.get("media")
    evidence = values.get("evidence")
    repeat: Any = values.get("repeat")
    return {
        "task": task,
        "doc_id": values.get("doc_id") if _is_count(values.get("doc_id")) else None,
        "item_id": str(item),
        "cluster": str(values.get("cluster") or item),
        "repeat": int(repeat) if _is_count(repeat) else 0,
        "prompt": _text(values.get("prompt")),
        "media": [one for one in media if isinstance(one, str)] if isinstance(media, list) else [],
        "reply": _text(values.get("reply")),
        "thinking": _text(values.get("thinking")),
        "gold": _text(values.get("gold")),
        "kind": str(values.get("kind") or ""),
        "score": None if score is None else float(score),
        "status": status,
        "evidence": evidence if isinstance(evidence, dict) else {} if evidence is None else {"evidence": evidence},
        "tokens": counts,
        "finish_reason": str(values.get("finish_reason") or ""),
        "seconds": values.get("seconds") if _is_count(values.get("seconds")) else None,
        "key": str(values.get("key") or ""),
        "more": {name: values[name] for name in ("tests", "metrics", "responses", "parameters") if values.get(name)},
        "transcript": _transcript(values.get("transcript")),
    }


def _transcript(turns: Any) -> list[dict[str, Any]]:
    """An agent's messages and calls (see evals/agents.py), with every field of its type."""
    out: list[dict[str, Any]] = []
    for turn in turns if isinstance(turns, list) else ():
        if not isinstance(turn, dict):
            continue
        if "shown" in turn:
            out.append({"shown": _text(turn["shown"])})
            continue
        listed = turn.get("calls")
        calls = [call for call in listed if isinstance(call, dict)] if isinstance(listed, list) else []
        made = [
            {name: _text(call.get(name)) for name in ("name", "arguments", "result")} | {"ok": call.get("ok") is True}
            for call in calls
        ]
        out.append({name: _text(turn.get(name)) for name in ("thinking", "text")} | {"calls": made})
        out[-1] |= {name: turn[name] for name in ("tokens", "seconds") if _is_count(turn.get(name))}
    return out


def _is_count(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e15


def _text(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, indent=1)


def state_of(row: Mapping[str, Any], unit: bool = True) -> State:
    """One word for what became of an answer. unit: scores of the task lie between 0 and 1."""
    if row["score"] is None:
        return "infra" if lost(row) else "unscored"
    if not unit:
        return "scored"
    if solved(row):
        return "right"
    if truncated(row):
        return "truncated"
    if row["status"] == "silent":
        return "silent"
    return "partly" if row["score"] > 0 else "wrong"


def picture(folder: Path, name: str) -> Path | None:
    """The file of a row's medium; None unless it is a picture inside the run's media folder."""
    if not re.fullmatch(r"media/[A-Za-z0-9_-]{1,200}\.(png|jpe?g|gif|webp)", name):
        return None
    path, home = folder / name, (folder / "media").resolve()
    if not path.is_file() or path.resolve().parent != home:
        return None
    with path.open("rb") as file:
        start = file.read(4)
    return path if any(start.startswith(magic) for magic in PICTURES) else None


# ---- numbers


def make_report(folders: Sequence[Path], infra_share: float = INFRA_SHARE) -> Report:
    """Read the runs and count. Raises ValueError for a folder that is no run, or when none has an answer."""
    if not folders:
        raise ValueError("name at least one run folder")
    if not 0 <= infra_share <= 1:
        raise ValueError(f"the share of infra errors lies between 0 and 1, got {infra_share}")
    runs = tuple(read_run(folder) for folder in folders)
    _label(runs)
    if not any(run.rows for run in runs):
        said = " ".join(problem for run in runs for problem in run.problems)
        raise ValueError(f"there is no answer to report. {said}")
    summaries = tuple(
        {name: summarize(name, rows, infra_share=infra_share) for name, rows in run.tasks.items()} for run in runs
    )
    differences = []
    for run in runs[1:]:
        for name, rows in runs[0].tasks.items():
            made = paired(rows, run.tasks.get(name, ()), name)
            if made is not None:
                differences.append((run.label, made))
    return Report(runs, summaries, tuple(differences), infra_share)


def _label(runs: Sequence[Run]) -> None:
    """A name for each run that no other has: its id, its folder's name, or its path."""
    for run in runs:
        run.label = str(run.info.get("id") or run.folder.resolve().name)
    for way in (lambda run: run.folder.resolve().name, lambda run: str(run.folder.resolve())):
        labels = [run.label for run in runs]
        for run in runs:
            if labels.count(run.label) > 1:
                run.label = way(run)
    for number, run in enumerate(runs, 1):  # the same folder twice
        if [other.label for other in runs].count(run.label) > 1:
            run.label = f"{run.label} ({number})"


def isolation(run: Run, task: str | None = None) -> str:
    """What ran the code of a run's answers, or of a task's; "not stated" where run.json does not say."""
    about = run.info if task is None else run.info["tasks"].get(task)
    return str(about.get("isolation") or "not stated") if isinstance(about, Mapping) else "not stated"


# ---- words


def percent(value: float | None, unit: bool = True, digits: int = 1) -> str:
    """A score for a table: 0.756 is 75.6; a score beyond 0 to 1 is shown as it is."""
    if value is None:
        return "-"
    return f"{100 * value:.{digits}f}" if unit else f"{value:.4g}"


def span(made: Estimate | None, unit: bool = True) -> str:
    """An interval for a table."""
    if made is None or made.low is None or made.high is None:
        return "-"
    return f"{percent(made.low, unit)} to {percent(made.high, unit)}"


def signed(value: float | None, unit: bool = True) -> str:
    """A difference for a table."""
    return "-" if value is None else f"{100 * value:+.1f}" if unit else f"{value:+.4g}"


def count(made: Estimate | None) -> str:
    """Tokens for a table, with half the interval's width: 1,240 ± 85."""
    if made is None:
        return "-"
    return f"{made.value:,.0f}" if made.half is None else f"{made.value:,.0f} ± {made.half:,.0f}"


def tokens_span(made: Estimate | None) -> str:
    """Tokens for a table with the interval's ends, which are not symmetric for a ratio."""
    if made is None:
        return "-"
    if made.low is None or made.high is None:
        return f"{made.value:,.0f}"
    return f"{made.value:,.0f} ({made.low:,.0f} to {made.high:,.0f})"


def passes(summary: TaskSummary) -> str:
    """pass@k for a table, for every k but 1; "-" where there was one answer to each problem."""
    return ", ".join(f"@{k} {percent(made.value)}" for k, made in summary.pass_at.items() if k > 1) or "-"


def metric(run: Run, task: str) -> str:
    """The name of a task's score, with an arrow where less is better."""
    about = run.info["tasks"].get(task)
    if not isinstance(about, Mapping):
        return ""
    down = " ↓" if about.get("higher_is_better") is False else ""
    name = str(about.get("metric") or "").removesuffix(",none")
    return f"{'' if name == 'score' else name}{down}"


def remarks(summary: TaskSummary) -> list[str]:
    """What must be known beside a task's numbers."""
    said = []
    if not summary.valid:
        said.append(f"not valid: {summary.why}")
    if summary.score is None and summary.valid:
        said.append("its metric has no value for a single answer; lm-eval's own result is under tasks")
    if summary.silent:
        said.append(f"{summary.silent} empty")
    if summary.short and summary.repeats > 1:
        said.append(f"{summary.short} items with fewer than {summary.repeats} answers are not in pass@k")
    if summary.score is not None and summary.score.method == "none":
        said.append("one cluster: no interval")
    return said


COLUMNS = (
    "task",
    "n",
    "score",
    "95 % interval",
    "pass",
    "tokens per answer",
    "per solved task",
    "truncated",
    "infra",
    "code ran in",
)


def cells(run: Run, summary: TaskSummary) -> list[str]:
    """A task's line of the table, under COLUMNS."""
    n = f"{summary.items:,}" + (f" × {summary.repeats}" if summary.repeats > 1 else "")
    score = summary.score
    return [
        summary.name,
        n,
        percent(score.value if score else None, summary.unit) + ("" if summary.valid else " (!)"),
        span(score, summary.unit),
        passes(summary),
        count(summary.tokens_answer),
        tokens_span(summary.tokens_solved),
        str(summary.truncated),
        str(summary.infra_errors),
        isolation(run, summary.name).replace("nothing was run", "-").replace("not stated", "-")[:24],
    ]


DIFFERENCES = (
    "task",
    "n",
    "first",
    "this",
    "difference",
    "95 % interval",
    "p",
    "detectable",
    "better : worse",
    "tokens",
)


def difference_cells(made: Paired, unit: bool = True) -> list[str]:
    """A comparison's line of the table, under DIFFERENCES."""
    return [
        made.name,
        f"{made.n:,}",
        percent(made.first, unit),
        percent(made.second, unit),
        signed(made.difference.value, unit),
        "-"
        if made.difference.low is None
        else f"{signed(made.difference.low, unit)} to {signed(made.difference.high, unit)}",
        f"{made.p:.4f}" if made.p >= 0.0001 else "< 0.0001",
        percent(made.detectable, unit),
        f"{made.better} : {made.worse}",
        "-" if made.tokens is None else f"{made.tokens.value:+,.0f}",
    ]


def unit_of(report: Report, task: str) -> bool:
    """Whether all scores of a task lie between 0 and 1, in every run."""
    return all(summaries[task].unit for summaries in report.summaries if task in summaries)


# ---- writing


def print_report(report: Report, console: Console) -> None:
    """The tables, for people."""
    for run, summaries in zip(report.runs, report.summaries, strict=True):
        model = run.info.get("model")
        name = model.get("name") if isinstance(model, Mapping) else None
        table = Table(title=Text(f"{run.label}" + (f": {name}" if name else "")), title_justify="left")
        for number, column in enumerate(COLUMNS):
            table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
        for summary in summaries.values():
            table.add_row(*map(Text, cells(run, summary)), style=None if summary.valid else "red")
        console.print(table)
        for summary in summaries.values():
            for said in remarks(summary):
                console.print(Text(f"{summary.name}: {said}", "yellow"))
        console.print(Text(f"isolation: {isolation(run)}"))
        for problem in run.problems:
            console.print(Text(problem, "yellow"))
        console.print()
    for label in dict.fromkeys(label for label, _ in report.differences):
        table = Table(title=Text(f"{label} less {report.runs[0].label}, on common items"), title_justify="left")
        for number, column in enumerate(DIFFERENCES):
            table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
        for other, made in report.differences:
            if other == label:
                table.add_row(*map(Text, difference_cells(made, unit_of(report, made.name))))
        console.print(table)


def markdown(report: Report) -> Iterator[str]:
    """report.md, line by line."""
    yield "# Evaluation report"
    for run, summaries in zip(report.runs, report.summaries, strict=True):
        yield ""
        yield f"## {_md(run.label)}"
        yield ""
        yield from _md_table(COLUMNS, [cells(run, summary) for summary in summaries.values()])
        yield ""
        for summary in summaries.values():
            for said in remarks(summary):
                yield f"- {_md(summary.name)}: {_md(said)}"
        for problem in run.problems:
            yield f"- {_md(problem)}"
        yield ""
        yield f"Isolation: {_md(isolation(run))}."
        yield ""
        yield from _md_table(("setting", "value"), [[name, value] for name, value in provenance(run)])
    for label in dict.fromkeys(label for label, _ in report.differences):
        yield ""
        yield f"## {_md(label)} less {_md(report.runs[0].label)}"
        yield ""
        rows = [difference_cells(d, unit_of(report, d.name)) for other, d in report.differences if other == label]
        yield from _md_table(DIFFERENCES, rows)
    yield ""
    yield from NOTES


NOTES = (
    "Scores in percent, where they lie between 0 and 1. n: items, times answers to each. Intervals: 95 %, clustered;",
    "Wilson's where every cluster is one binary item. pass: unbiased pass@k. Per solved task: all tokens generated",
    "over the number of right answers. Truncated answers count as wrong; infra errors count as nothing. Differences",
    "are of items that both runs have; p: paired sign-flip test; detectable: what so many items would show in four",
    "cases of five.",
)


def _md(text: str) -> str:
    """Text for a cell: nothing in it is markup, and it stays on its line."""
    return re.sub(r"([\\`*_\[\]<>|#&!~])", r"\\\1", " ".join(str(text).split()))


def _md_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(map(_md, head))} |"
    yield f"| --- |{' ---: |' * (len(head) - 1)}"
    for row in rows:
        yield f"| {' | '.join(map(_md, row))} |"


def provenance(run: Run) -> list[tuple[str, str]]:
    """Everything that run.json says, flat: "model.weights_sha256" and its value."""
    return list(_flat(run.info, ""))


def _flat(value: Any, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and any(isinstance(one, Mapping | list) for one in value):
        for number, inner in enumerate(value):
            yield from _flat(inner, f"{name}[{number}]")
    elif isinstance(value, list):
        yield name, "; ".join(map(str, value))
    elif value not in ({}, None, ""):
        yield name, str(value)


def as_json(report: Report) -> dict[str, Any]:
    """report.json: all numbers, and the runs' own words about themselves."""
    runs = []
    for run, summaries in zip(report.runs, report.summaries, strict=True):
        runs.append(
            {
                "label": run.label,
                "run": run.info,
                "problems": run.problems,
                "isolation": isolation(run),
                "tasks": {
                    name: asdict(summary) | {"isolation": isolation(run, name)} for name, summary in summaries.items()
                },
            }
        )
    differences = [{"run": label, "against": report.runs[0].label, **asdict(d)} for label, d in report.differences]
    return {"runs": runs, "differences": differences, "infra_share": report.infra_share}


def draw(report: Report, paths: Sequence[Path]) -> bool:
    """The plot: scores with intervals, tokens per answer beside them. False, and no file, where there is nothing."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = list(dict.fromkeys(n for s in report.summaries for n, t in s.items() if t.score and unit_of(report, n)))
    if not tasks:
        return False
    runs = len(report.runs)
    longest = max(len(_short(name)) for name in tasks)
    figure, (left, right) = pyplot.subplots(
        1,
        2,
        figsize=(8.5 + 0.07 * min(longest, 30), 1.3 + (0.34 + 0.2 * (runs - 1)) * len(tasks)),
        sharey=True,
        gridspec_kw={"width_ratios": (2, 1)},
        layout="constrained",
    )
    for number, (run, summaries) in enumerate(zip(report.runs, report.summaries, strict=True)):
        shift = (number - (runs - 1) / 2) * (0.6 / runs)
        for axis, pick, factor in ((left, "score", 100.0), (right, "tokens_answer", 1.0)):
            points = []
            for at, name in enumerate(tasks):
                made = getattr(summaries.get(name), pick, None)
                if made is not None:
                    low, high = (made.value if end is None else end for end in (made.low, made.high))
                    points.append((factor * made.value, at + shift, factor * low, factor * high))
            if not points:
                continue
            x, y, low_, high_ = (list(column) for column in zip(*points, strict=True))
            reach = [[a - b for a, b in zip(x, low_, strict=True)], [b - a for a, b in zip(x, high_, strict=True)]]
            axis.errorbar(
                x, y, xerr=reach, fmt="o", markersize=4.5, capsize=2.5, color=f"C{number}", label=_short(run.label)
            )
    left.set_yticks(range(len(tasks)), [_short(name) for name in tasks])
    left.set_ylim(len(tasks) - 0.5, -0.5)
    left.set_xlim(-2, 102)
    left.set_xlabel("score, percent, with 95 % interval")
    right.set_xlabel("tokens per answer")
    right.set_xlim(left=0)
    for axis in (left, right):
        axis.grid(axis="x", alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    if runs > 1:
        figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=runs, frameon=False)
    with matplotlib.rc_context({"svg.hashsalt": "moonkit", "svg.fonttype": "none"}):
        for path in paths:
            figure.savefig(path, dpi=130, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)
    return True


def _short(text: str, most: int = 40) -> str:
    """For the plot: one line, and no dollar signs, which matplotlib would read as formulas."""
    text = " ".join(text.split()).replace("$", r"\$")
    return text if len(text) <= most else f"{text[: most - 1]}…"


def write_report(report: Report, out: Path, media_limit: int = 8 * 2**20) -> list[Path]:
    """All files, into `out`. media_limit: bytes of pictures that may be inside the page; more lie beside it."""
    from evals.report_page import write_page

    out.mkdir(parents=True, exist_ok=True)
    written = [out / "report.md", out / "report.json"]
    written[0].write_text("\n".join(markdown(report)) + "\n", encoding="utf-8")
    written[1].write_text(json.dumps(as_json(report), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    plots = [out / "report.png", out / "report.svg"]
    if draw(report, plots):
        written += plots
    written.append(out / "report.html")
    write_page(report, written[-1], media_limit)
    return written


# ---- the verb


@dataclass(frozen=True)
class Arguments:
    """Sum up one or more runs: a table here; Markdown, JSON, a plot and a page with every sample in files."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run folders. Of several, each is compared with the first."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Where the files go. Left out: the folder of the run, or ./report for several."""
    infra_share: float = INFRA_SHARE
    """A task with a larger share of answers lost to the machinery is marked as not valid."""
    media_limit: float = 8.0
    """MiB of pictures that are put into the page itself; if there are more, they lie beside it."""
    files: bool = True
    """Write the files; --no-files prints the table only."""


def main(argv: Sequence[str] | None = None) -> None:
    """The verb."""
    arguments = tyro.cli(Arguments, prog="moonkit eval report", args=argv, description=__doc__)
    report = make_report(arguments.runs, arguments.infra_share)
    # a pipe has no width of its own: without one, tables would be folded to 80 columns
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    print_report(report, console)
    if arguments.files:
        out = arguments.out or (arguments.runs[0] if len(arguments.runs) == 1 else Path("report"))
        for path in write_report(report, out, int(arguments.media_limit * 2**20)):
            console.print(Text(str(path)), soft_wrap=True)


if __name__ == "__main__":
    main()
