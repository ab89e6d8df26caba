"""Today's graders on the replies of a finished run; no model is loaded, nothing is generated.

moonkit eval regrade RUN             RUN-regraded, and each score beside the old one

RUN/samples.jsonl -- Replay, an lm-eval model that knows every answer --> the same evaluator --> a new run folder
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import LM

from evals.media import digest
from evals.record import Result, Run, Settings, document_digest, install_code_eval, read_record, replace_text
from evals.requests import Answer, Options, Question, Rendered, Said, media_of
from evals.store import Store
from evals.tasks import Tasks

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance


class Replay(LM):
    """Gives a run's replies again: a model whose every answer is known."""

    MULTIMODAL = True

    def __init__(self, rows: Sequence[Mapping[str, Any]], record: Mapping[str, Any], folder: Path) -> None:
        super().__init__()
        self.record, self.folder = record, folder
        self.known = {(row["task"], row["doc_id"], row["repeat"]): row for row in rows}
        self.name, self.label = str(record["model"]["path"]), str(record["model"]["name"])
        self.identity = {k: v for k, v in record["model"].items() if k.endswith("sha256")}
        self.parameters = record["model"]["parameters"]
        self.frames = self.pixels = None
        self.seed = record["seeds"]["replies"]
        self.heard: Callable[[Any, int, Question, Answer], str | None] | None = None
        self.store = Store(folder / "store") if (folder / "store").is_dir() else None

    @property
    def tokenizer_name(self) -> str:
        return "replay"

    def chat_template(self, chat_template: bool | str = False) -> str:
        return ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> Rendered:
        return Rendered("", chat_history, add_generation_prompt)

    def _row(self, request: "Instance", repeat: int) -> Mapping[str, Any]:
        place = int(request.doc_id or 0)
        picked = self.record["settings"][str(request.task_name)].get("samples")
        if picked:  # lm-eval counts those that were picked anew
            place = sorted(picked)[place]
        row = self.known.get((str(request.task_name), place, repeat))
        where = f"{request.task_name}, row {request.doc_id}, repeat {repeat}"
        if row is None:
            raise ValueError(f"{where}: {self.folder} has no reply to it; was it run with other settings?")
        now = document_digest(request.doc, request)
        if row.get("document_sha256") != now:
            raise ValueError(f"{where}: the data has changed since the run, so its reply answers another question")
        return row

    def generate_until(self, requests: list["Instance"], disable_tqdm: bool = False) -> list[str]:
        times: dict[int, int] = defaultdict(int)
        replies: list[str] = []
        for request in requests:
            repeat, times[id(request)] = times[id(request)], times[id(request)] + 1
            row = self._row(request, repeat)
            finish = str(row["finish_reason"])
            error = row["evidence"].get("error") if isinstance(row["evidence"].get("error"), str) else None
            answer = Answer(row["reply"], row["thinking"], finish, row["tokens"], row["seconds"] or 0.0, error)
            media = media_of(request)
            digests = tuple(digest(medium) for medium in media)
            said = row.get("parameters") or {}
            options = Options(int(said.get("max_tokens", 0)), said.get("temperature", 0.0), said.get("top_p", 1.0))
            key = str(row["key"])
            if self.heard is not None:
                self.heard(request, repeat, Question(request, "", media, digests, options, key, 0, repeat), answer)
            replies.append(Said(row["reply"], finish))
        return replies

    def loglikelihood(self, requests: list["Instance"], disable_tqdm: bool = False) -> Any:
        return [tuple(self._row(request, 0)["responses"][request.idx][0]) for request in requests]

    def loglikelihood_rolling(self, requests: list["Instance"], disable_tqdm: bool = False) -> Any:
        return [self._row(request, 0)["responses"][request.idx][0] for request in requests]


def regrade(folder: str | Path, out: str | Path | None = None) -> tuple[Result, dict[str, Any]]:
    """Grade the replies of a run again, into a folder of their own; the new result, and the old record.

    Raises ValueError for a run that has not finished, and when its data or settings are not those of today.
    """
    folder = Path(folder)
    record = read_record(folder)
    if record is None:
        raise ValueError(f"{folder} is no run folder: it has no run.json")
    if record.get("finished") is None or not (folder / "samples.jsonl").is_file():
        raise ValueError(f"{folder} has not finished; the same command goes on with it: {record.get('command')}")
    asked = record["asked"]
    if asked.get("form") == "agent":
        from evals import agents

        return agents.regrade(folder, out)
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    more = {k: v for k, v in asked["more"].items() if k not in ("apply_chat_template", "cache_requests", "use_cache")}
    profiles = {s["profile"] for s in record["settings"].values() if s["profile"]}
    install_code_eval()
    manager = Tasks(include_path=asked.get("include_path"), profile=next(iter(profiles), None))
    loaded = manager.load(asked["tasks"])
    for name, task in loaded["tasks"].items():
        task.set_config("repeats", record["settings"][name]["repeats"])
    target = Path(out) if out is not None else folder.with_name(f"{folder.name}-regraded")
    run = Run(Settings(target, None, command=f"moonkit eval regrade {folder}", regraded_from=record["id"]))
    chat = any(s["chat_template"] for s in record["settings"].values())
    results = run.simple_evaluate(
        model=Replay(rows, record, folder),
        tasks=asked["tasks"],
        task_manager=manager,
        apply_chat_template=chat,
        **more,
    )
    prompts = {(row["task"], row["doc_id"], row["repeat"]): row["prompt"] for row in rows}
    for row in run.rows:
        row["prompt"] = prompts[row["task"], row["doc_id"], row["repeat"]]
    lines = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in run.rows)
    replace_text(target / "samples.jsonl", lines)
    return run.result(results), record


def main(options: Sequence[str]) -> None:
    """The verb's part."""
    parser = argparse.ArgumentParser("moonkit eval regrade", description="Today's graders on a run's replies.")
    parser.add_argument("run", type=Path, help="a finished run's folder")
    parser.add_argument("--out", type=Path, help="where to; default: RUN-regraded")
    arguments = parser.parse_args(list(options))
    result, old = regrade(arguments.run, arguments.out)
    for name, task in result.record["tasks"].items():
        before = old["tasks"][name]["results"].get(task["metric"])
        now = task["results"].get(task["metric"])
        print(f"{name:<32}{task['metric']:<28} was {_shown(before)}, is {_shown(now)}  (n={task['n']})")
    print(f"written to {result.folder}")


def _shown(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else "-"
