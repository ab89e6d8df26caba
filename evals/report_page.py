"""The report as one page: every sample with its pictures, prompt, thoughts, answer, gold and verdict.

    Report  -->  tables and whiskers, as HTML          -->  report.html    opens without a server and without a network
            -->  samples, 100 to a packed chunk        -->
            -->  pictures: inside, or beside in media/

All that a model wrote is hostile. It reaches the page as packed JSON in base64, which cannot end a script element; it
is unpacked in the browser and only ever set as the text of an element. A Content-Security-Policy allows this one script
and this one style by their digests, pictures from beside the page, and nothing from anywhere else.

A page of 10,000 samples opens at once because only the chunks that are looked at, or searched, are unpacked.
"""

import base64
import gzip
import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from evals.report import (
    COLUMNS,
    DIFFERENCES,
    NOTES,
    Report,
    Run,
    cells,
    difference_cells,
    isolation,
    metric,
    picture,
    provenance,
    remarks,
    state_of,
    unit_of,
)
from evals.statistics import Estimate, truncated

ASSETS = Path(__file__).parent / "assets"
CHUNK = 100  # samples that are unpacked together
STATES = ("right", "partly", "wrong", "scored", "unscored", "silent", "truncated", "infra")
LONGEST_TURN = 8_000  # characters of one text of a transcript
LONGEST = 200_000  # characters of one text that the page holds; report.json's run folder has the rest


def write_page(report: Report, path: Path, media_limit: int) -> None:
    """Write the page, and the pictures beside it where they are more than `media_limit` bytes."""
    tasks = list(dict.fromkeys(name for summaries in report.summaries for name in summaries))
    rows = _in_order(report, tasks)
    named = dict.fromkeys((run, name) for run, row in rows for name in row["media"])
    found = {(run, name): picture(report.runs[run].folder, name) for run, name in named}
    files = {name: file for (_, name), file in found.items() if file is not None}
    inside = sum(file.stat().st_size for file in files.values()) <= media_limit
    sources = _inside(files) if inside else _beside(files, path.parent)
    index, chunks = _data(report, tasks, rows, {key for key, file in found.items() if file is not None})
    data = {"tasks": tasks, "runs": [run.label for run in report.runs], "states": STATES, "chunk": CHUNK}
    data |= {"columns": index, "media": sources}
    path.write_text(_page(report, data, chunks), encoding="utf-8")


def _in_order(report: Report, tasks: Sequence[str]) -> list[tuple[int, dict[str, Any]]]:
    """(number of the run, row): task by task, and the answers of all runs to one question together."""
    at = {name: number for number, name in enumerate(tasks)}
    first: dict[tuple[str, str], int] = {}
    rows = [(number, row) for number, run in enumerate(report.runs) for row in run.rows]
    for place, (_, row) in enumerate(rows):
        first.setdefault((row["task"], row["item_id"]), place)
    return sorted(rows, key=lambda r: (at[r[1]["task"]], first[r[1]["task"], r[1]["item_id"]], r[1]["repeat"], r[0]))


def _inside(files: Mapping[str, Path]) -> dict[str, str]:
    out = {}
    for name, file in files.items():
        kind = {"jpg": "jpeg"}.get(file.suffix[1:], file.suffix[1:])
        out[name] = f"data:image/{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"
    return out


def _beside(files: Mapping[str, Path], folder: Path) -> dict[str, str]:
    for name, file in files.items():
        target = folder / name
        if not target.exists() or not target.samefile(file):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    return {name: name for name in files}


def _data(
    report: Report, tasks: Sequence[str], rows: Sequence[tuple[int, dict[str, Any]]], there: set[tuple[int, str]]
) -> tuple[dict[str, list[Any]], list[str]]:
    """Columns of what lists and filters need, and the packed chunks of the rest."""
    at = {name: number for number, name in enumerate(tasks)}
    units = {name: unit_of(report, name) for name in tasks}
    by_run: dict[tuple[str, str], dict[int, list[float]]] = {}
    for run, row in rows:
        if row["score"] is not None:
            by_run.setdefault((row["task"], row["item_id"]), {}).setdefault(run, []).append(row["score"])
    change = {}
    for key, scores in by_run.items():
        means = [sum(scores[run]) / len(scores[run]) for run in sorted(scores)]
        change[key] = 0 if len(means) < 2 or 0 not in scores else (means[-1] > means[0]) - (means[-1] < means[0])
    columns: dict[str, list[Any]] = {name: [] for name in ("task", "run", "item", "repeat", "score", "state", "cut")}
    columns |= {"change": [], "tokens": []}
    chunks: list[str] = []
    part: list[dict[str, Any]] = []
    for number, (run, row) in enumerate(rows, 1):
        columns["task"].append(at[row["task"]])
        columns["run"].append(run)
        columns["item"].append(row["item_id"])
        columns["repeat"].append(row["repeat"])
        columns["score"].append(row["score"])
        columns["state"].append(STATES.index(state_of(row, units[row["task"]])))
        columns["cut"].append(int(truncated(row)))
        columns["change"].append(change.get((row["task"], row["item_id"]), 0))
        columns["tokens"].append(row["tokens"].get("completion"))
        detail: dict[str, Any] = {name: _cut(row[name]) for name in ("prompt", "reply", "thinking", "gold")}
        detail |= {
            name: row[name] for name in ("kind", "status", "cluster", "finish_reason", "seconds", "tokens", "key")
        }
        detail["evidence"] = {str(name): _said(value) for name, value in row["evidence"].items()}
        detail["more"] = {name: _said(value) for name, value in row["more"].items()}
        if row["transcript"]:
            detail["transcript"] = _shortened(row["transcript"])
        detail["media"] = [name if (run, name) in there else None for name in row["media"]]
        part.append(detail)
        if len(part) == CHUNK or number == len(rows):
            text = json.dumps(part, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
            chunks.append(base64.b64encode(gzip.compress(text, 6, mtime=0)).decode())
            part = []
    return columns, chunks


def _cut(text: str) -> str:
    if len(text) <= LONGEST:
        return text
    return f"{text[: LONGEST // 2]}\n[... {len(text) - LONGEST:,} characters left out ...]\n{text[-LONGEST // 2 :]}"


def _shortened(turns: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A transcript for the page: head and tail of long texts; samples.jsonl has them whole."""

    def short(value: Any) -> Any:
        if isinstance(value, str) and len(value) > LONGEST_TURN:
            half = LONGEST_TURN // 2
            return f"{value[:half]}\n[... {len(value) - LONGEST_TURN:,} characters left out ...]\n{value[-half:]}"
        return value

    return [
        {name: [{k: short(v) for k, v in call.items()} for call in value] if name == "calls" else short(value)
         for name, value in turn.items()}
        for turn in turns
    ]  # fmt: skip


def _said(value: Any) -> str:
    return _cut(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


# ---- HTML


def _page(report: Report, data: Mapping[str, Any], chunks: Sequence[str]) -> str:
    style = (ASSETS / "report.css").read_text(encoding="utf-8")
    script = (ASSETS / "report.js").read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; script-src {_digest(script)}; style-src {_digest(style)}; img-src data: 'self' file:; "
        "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'"
    )
    labels = ", ".join(run.label for run in report.runs)
    return "\n".join(
        (
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark"><meta name="referrer" content="no-referrer">',
            f"<title>{escape(labels)} · evaluation report</title>",
            f"<style>{style}</style></head><body>",
            '<a class="skip" href="#samples">Skip to the samples</a>',
            *_header(report),
            "<main>",
            *_scores(report),
            *_differences(report),
            *_samples(report),
            *_settings(report),
            "</main>",
            HELP,
            # JSON in which no "<" is left cannot end the element it stands in
            f'<script type="application/json" id="data">{_json(data)}</script>',
            f'<script type="application/json" id="chunks">{_json(chunks)}</script>',
            f"<script>{script}</script>",
            "</body></html>\n",
        )
    )


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _header(report: Report) -> Iterable[str]:
    yield '<header><div class="title"><h1>Evaluation report</h1>'
    yield '<button type="button" id="theme" aria-label="Switch between dark and light">◐</button></div>'
    for run in report.runs:
        model = run.info.get("model")
        about = model if isinstance(model, Mapping) else {}
        parts = [
            about.get("name") or about.get("path"),
            _size(about.get("parameters")),
            str(run.info.get("finished") or run.info.get("created") or "")[:16].replace("T", " "),
            f"isolation: {isolation(run)}",
        ]
        said = " · ".join(escape(str(part)) for part in parts if part)
        yield f'<p class="run"><strong>{escape(run.label)}</strong> <span>{said}</span></p>'
    notes = [(run, problem) for run in report.runs for problem in run.problems]
    if notes:
        several = len(report.runs) > 1
        yield '<ul class="notes" aria-label="What could not be read">'
        yield from (f"<li>{escape(f'{run.label}: {said}' if several else said)}</li>" for run, said in notes)
        yield "</ul>"
    yield "</header>"


def _size(value: Any) -> str | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    for size, name in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3g} {name} parameters"
    return f"{value:,} parameters"


def _table(head: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]], name: str) -> Iterable[str]:
    """rows: (class of the row, cells as HTML). On a narrow screen a row becomes a card, so each cell has its label."""
    yield f'<table class="{name}"><thead><tr>'
    yield from (f'<th scope="col">{escape(column)}</th>' for column in head)
    yield "</tr></thead><tbody>"
    for kind, row in rows:
        yield f'<tr class="{kind}">' if kind else "<tr>"
        for number, (column, cell) in enumerate(zip(head, row, strict=True)):
            tag = 'th scope="row"' if number == 0 else "td"
            empty = ' class="none"' if cell == "-" else ""
            yield f'<{tag} data-label="{escape(column)}"{empty}>{cell}</{tag[:2]}>'
        yield "</tr>"
    yield "</tbody></table>"


def _scores(report: Report) -> Iterable[str]:
    yield '<section aria-labelledby="scores"><h2 id="scores">Scores</h2>'
    several = len(report.runs) > 1
    head = [COLUMNS[0], *(["run"] if several else []), "score", "", *COLUMNS[1:2], *COLUMNS[4:]]
    rows = []
    tasks = list(dict.fromkeys(name for summaries in report.summaries for name in summaries))
    for task in tasks:
        unit = unit_of(report, task)
        for number, (run, summaries) in enumerate(zip(report.runs, report.summaries, strict=True)):
            summary = summaries.get(task)
            if summary is None:
                continue
            name, n, value, interval, *rest = cells(run, summary)
            what = metric(run, task)
            shown = escape(name) + (f" <small>{escape(what)}</small>" if what else "")
            shown += "".join(f'<br><small class="remark">{escape(said)}</small>' for said in remarks(summary))
            value = f"<b>{escape(value)}</b>" + ("" if interval == "-" else f" <small>{escape(interval)}</small>")
            row = [shown, *([f'<span class="run{number % 4}">{escape(run.label)}</span>'] if several else [])]
            row += [value, _whisker(summary.score, 0, 1, number) if unit else "", *map(_cell, (n, *rest))]
            mine = [each for each, other in zip(report.runs, report.summaries, strict=True) if task in other]
            place = "again" if run is not mine[0] else "first" if len(mine) > 1 else ""
            rows.append((f"{place} {'' if summary.valid else 'invalid'}".strip(), row))
    yield from _table(head, rows, "scores")
    yield f'<p class="small">{escape(" ".join(NOTES))}</p></section>'


def _cell(text: str) -> str:
    """A number with its interval, if any, in small under it; nothing else is broken in two."""
    value, _, interval = text.partition(" (")
    value = escape(value).replace(" ", "&nbsp;").replace(",&nbsp;", ", ")
    return value + (f" <small>{escape(interval.removesuffix(')'))}</small>" if interval else "")


def _whisker(made: Estimate | None, least: float, most: float, number: int = 0) -> str:
    """A point with its interval on a scale from `least` to `most`, as a drawing of 160 by 18."""
    if made is None:
        return ""

    def x(value: float) -> str:
        return f"{4 + 152 * (min(max(value, least), most) - least) / (most - least):.1f}"

    parts = ['<line class="axis" x1="4" x2="156" y1="9" y2="9"/>']
    if least < 0 < most:
        parts.append(f'<line class="zero" x1="{x(0)}" x2="{x(0)}" y1="1" y2="17"/>')
    if made.low is not None and made.high is not None:
        parts.append(f'<line class="reach" x1="{x(made.low)}" x2="{x(made.high)}" y1="9" y2="9"/>')
    parts.append(f'<circle cx="{x(made.value)}" cy="9" r="4"/>')
    name = f'class="whisker run{number % 4}" aria-hidden="true" focusable="false"'
    return f'<svg {name} viewBox="0 0 160 18" preserveAspectRatio="xMinYMid">{"".join(parts)}</svg>'


def _differences(report: Report) -> Iterable[str]:
    for number, run in enumerate(report.runs[1:], 1):
        mine = [made for label, made in report.differences if label == run.label]
        yield f"<section><h2>{escape(run.label)} less {escape(report.runs[0].label)}</h2>"
        if not mine:
            yield "<p>The two runs have no item in common, so they cannot be compared item by item.</p></section>"
            continue
        ends = [abs(end) for d in mine for end in (d.difference.low, d.difference.high, d.difference.value) if end]
        reach = min(1.0, max([*ends, 0.05]))
        head = [*DIFFERENCES[:4], "difference", "", *DIFFERENCES[6:]]
        rows = []
        for made in mine:
            unit = unit_of(report, made.name)
            row = [escape(cell) for cell in difference_cells(made, unit)]
            row[0] += "".join(
                f'<br><small class="remark">{lost} items only in {where}</small>'
                for lost, where in ((made.only_first, "the first"), (made.only_second, "this one"))
                if lost
            )
            shown = f"<b>{row[4]}</b>" + ("" if row[5] == "-" else f" <small>{row[5]}</small>")
            drawn = _whisker(made.difference, -reach, reach, number) if unit else ""
            rows.append(("", [*row[:4], shown, drawn, *row[6:]]))
        yield from _table(head, rows, "differences")
        yield "</section>"


def _samples(report: Report) -> Iterable[str]:
    names = {
        "all": "All",
        "right": "Right",
        "partly": "Partly",
        "wrong": "Wrong",
        "cut": "Truncated",
        "silent": "Empty",
        "infra": "Infra error",
    }
    if len(report.runs) > 1:
        names |= {"better": "Got better", "worse": "Got worse"}
    yield '<section aria-labelledby="samples-title" id="samples" tabindex="-1"><h2 id="samples-title">Samples</h2>'
    yield "<noscript><p>The samples need JavaScript. Their numbers are in the tables, their texts in samples.jsonl.</p>"
    yield '</noscript><form id="filters" hidden><fieldset class="chips"><legend class="unseen">Verdict</legend>'
    for name, text in names.items():
        yield f'<label class="chip {name}"><input type="radio" name="show" value="{name}">'
        yield f'<span>{text} <small data-count="{name}"></small></span></label>'
    yield '</fieldset><div class="picks">'
    yield '<label>Task <select name="task"></select></label>'
    yield '<label id="pick-run">Run <select name="run"></select></label>'
    yield '<label class="search">Search <input type="search" name="q" autocomplete="off" spellcheck="false"'
    yield ' placeholder="words in prompt, answer, thoughts, gold, evidence"></label></div></form>'
    yield '<div class="bar" hidden><p id="found" role="status" aria-live="polite">Loading…</p>'
    yield '<div class="turn"><button type="button" id="earlier">← Earlier</button>'
    yield '<button type="button" id="later">Later →</button>'
    yield '<button type="button" id="thoughts" aria-pressed="false">Open thoughts</button>'
    yield '<button type="button" id="keys" aria-haspopup="dialog">Keys</button></div></div>'
    yield '<div id="list"></div><div class="bar" hidden><p id="found-below" aria-hidden="true"></p><div class="turn">'
    yield '<button type="button" id="earlier-below">← Earlier</button>'
    yield '<button type="button" id="later-below">Later →</button></div></div></section>'


def _settings(report: Report) -> Iterable[str]:
    yield '<section aria-labelledby="settings"><h2 id="settings">How it was run</h2>'
    for run in report.runs:
        yield f"<details{' open' if len(report.runs) == 1 else ''}><summary>{escape(run.label)}</summary>"
        yield from _guarantees(run)
        for group, pairs in _groups(run).items():
            yield f"<h3>{escape(group)}</h3><dl>"
            yield from (f"<div><dt>{escape(n)}</dt><dd>{escape(v)}</dd></div>" for n, v in pairs)
            yield "</dl>"
        yield "</details>"
    yield "</section>"


def _groups(run: Run) -> dict[str, list[tuple[str, str]]]:
    """What run.json says, in groups; settings and tasks with one line for each task."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for name, value in provenance(run):
        group, _, rest = name.partition(".")
        if group in ("guarantees", "isolation") or group.startswith("guarantees["):
            continue
        if group in ("settings", "tasks"):
            # names of tasks may have dots in them
            task = next((t for t in run.info.get(group, ()) if rest.startswith(f"{t}.")), rest)
            said = f"{rest[len(task) + 1 :]} {value}".strip()
            lines = dict(groups.get(group, ()))
            lines[task] = f"{lines[task]} · {said}" if task in lines else said
            groups[group] = list(lines.items())
        else:
            groups.setdefault(group if rest else "run", []).append((rest or name, value))
    return groups


def _guarantees(run: Run) -> Iterable[str]:
    yield f"<h3>sandbox</h3><p>Isolation: <b>{escape(isolation(run))}</b>.</p>"
    said = run.info.get("guarantees")
    if isinstance(said, Mapping):
        said = [f"{name}: {value}" for name, value in said.items()]
    if isinstance(said, list) and said:
        yield '<ul class="guarantees">'
        yield from (f"<li>{escape(one if isinstance(one, str) else json.dumps(one))}</li>" for one in said)
        yield "</ul>"


HELP = """<dialog id="help" aria-labelledby="help-title"><h2 id="help-title">Keys</h2>
<dl class="keys"><div><dt><kbd>j</kbd> <kbd>k</kbd></dt><dd>next, previous sample</dd></div>
<div><dt><kbd>n</kbd> <kbd>p</kbd></dt><dd>later, earlier page</dd></div>
<div><dt><kbd>/</kbd></dt><dd>search</dd></div>
<div><dt><kbd>a</kbd> <kbd>r</kbd> <kbd>w</kbd> <kbd>x</kbd> <kbd>i</kbd></dt>
<dd>all, right, wrong, truncated, infra errors</dd></div>
<div><dt><kbd>t</kbd></dt><dd>open or close thoughts</dd></div>
<div><dt><kbd>d</kbd></dt><dd>dark or light</dd></div>
<div><dt><kbd>?</kbd></dt><dd>these keys</dd></div></dl>
<form method="dialog"><button>Close</button></form></dialog>"""
