"""One run of lm-eval's evaluator, and the folder that it leaves.

    tasks, model --> simple_evaluate --> RUN/run.json       what was run, on what: hashes, settings, seeds, versions
                       |  ^              RUN/samples.jsonl  one row per graded sample
                       v  |              RUN/media/         what was shown, by digest
                     RUN/store           RUN/lm-eval.json   lm-eval's own results
                     every answer as it came

    Run(Settings(out=Path("runs/a"))).simple_evaluate(model="moonkit", tasks=[...], task_manager=Tasks())

run.json is there from the start, with finished null. The rows of a task that generates are in samples.jsonl as soon as
its last answer is there; when all is done, everything is written once more.
"""

import contextlib
import copy
import hashlib
import json
import logging
import math
import os
import platform
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import LM
from lm_eval.api.registry import get_aggregation

from evals.media import digest, keep
from evals.requests import Answer, Question, Said, media_of
from evals.store import Store
from evals.tasks import Tasks, suite_names

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

log = logging.getLogger(__name__)

RUNS = Path("runs") / "eval"
GRADED_LATER = ("repository",)  # too long to be graded between two answers
SLOW = 1.0  # seconds: a metric of lm-eval's that takes longer for one answer is not asked for the running score
GRADING = (ValueError, LookupError, ArithmeticError, RuntimeError, OSError)  # what others' metrics fail with


@dataclass(frozen=True)
class Result:
    """A finished run. scores: {task: {"metric,filter": value}} as lm-eval says them; results: all of lm-eval's."""

    folder: Path
    scores: dict[str, dict[str, float]]
    results: dict[str, Any] = field(repr=False)
    rows: list[dict[str, Any]] = field(repr=False)
    record: dict[str, Any] = field(repr=False)


@dataclass
class Settings:
    """What moonkit eval adds to lm-eval's flags."""

    out: Path | None = None
    store: Path | None = None
    profile: str | None = None
    repeats: int | None = None
    command: str = ""
    regraded_from: str | None = None


@dataclass
class Heard:
    """An answer, and how it was asked for."""

    key: str
    answer: Answer
    digests: tuple[str, ...]
    parameters: dict[str, Any]


@dataclass
class Run:
    """Wraps lm-eval's simple_evaluate: the model gets a store and an ear, what comes out goes to a folder."""

    settings: Settings
    manager: Tasks | None = None
    folder: Path | None = None
    heard: dict[tuple[str, int, int, int], Heard] = field(default_factory=dict)
    media: set[str] = field(default_factory=set)
    rows: list[dict[str, Any]] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)
    tasks: Mapping[str, Any] = field(default_factory=dict)
    isolations: dict[str, str] = field(default_factory=dict)  # of each task: what ran the code of its answers
    _sums: dict[str, list[float]] = field(default_factory=lambda: defaultdict(lambda: [0.0, 0.0]))
    _left: dict[str, int] = field(default_factory=dict)  # answers that a task still waits for
    _quick: dict[str, str | None] = field(default_factory=dict)  # the metric of a running score; None: there is none
    _early: set[str] = field(default_factory=set)  # tasks whose rows are in samples.jsonl already

    def simple_evaluate(
        self,
        model: str | LM,
        model_args: Any = None,
        tasks: Any = None,
        task_manager: Tasks | None = None,
        confirm_run_unsafe_code: bool = False,
        log_samples: bool = True,
        evaluation_tracker: Any = None,
        device: str | None = None,
        batch_size: Any = None,
        max_batch_size: int | None = None,
        **more: Any,
    ) -> Any:
        """As lm_eval.simple_evaluate."""
        from lm_eval.api.registry import get_model
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.utils import simple_parse_args_string

        assert task_manager is not None, "a run makes its own task manager"
        self.manager = task_manager
        loaded = task_manager.load(tasks)  # before the model: what is missing shows at once
        if not loaded["tasks"]:
            raise ValueError("no task was named: --tasks NAME (`moonkit eval list` shows ours)")
        named = isinstance(model, str)
        if isinstance(model, str):
            arguments = simple_parse_args_string(model_args) if isinstance(model_args, str) else dict(model_args or {})
            extra = {"batch_size": batch_size, "max_batch_size": max_batch_size, "device": device}
            lm = get_model(model).create_from_arg_obj(arguments, extra)
        else:
            lm = model
        ours = [name for name in loaded["tasks"] if name in suite_names()]
        if ours and task_manager.profile:
            from evals import suites

            log.info(suites.describe(ours, task_manager.profile))  # type: ignore[arg-type]
        self.tasks = loaded["tasks"]
        _check_choice(self.tasks, more.get("limit"), more.get("samples"))
        for name, task in self.tasks.items():
            if name not in suite_names():  # theirs remember, and know how a reply ended
                _grade_once(task)
        confirmed = self._allow(loaded["tasks"], confirm_run_unsafe_code)
        self._begin(model if named else type(model).__name__, lm, model_args, loaded["tasks"], more)
        assert self.folder is not None
        with self._listening(lm):
            results = simple_evaluate(
                model=lm,
                model_args=model_args,
                tasks=tasks,
                task_manager=task_manager,
                confirm_run_unsafe_code=confirmed,
                log_samples=True,
                evaluation_tracker=evaluation_tracker,
                **more,
            )
        if results is None:
            return None
        results["config"] |= {"model": model if named else type(model).__name__, "model_args": model_args}
        results["config"] |= {"batch_size": batch_size, "device": device}
        if evaluation_tracker is not None and named:
            evaluation_tracker.general_config_tracker.model_source = model
        self._end(loaded["tasks"], results)
        if not log_samples:
            results.pop("samples", None)
        return results

    @contextlib.contextmanager
    def _listening(self, lm: Any) -> Iterator[None]:
        """Our models keep their answers in the run's store, unless they have one, and tell of each."""
        if not hasattr(lm, "heard"):
            yield
            return
        own = lm.store
        if own is None and self.settings.store is not None:
            lm.store = Store(self.settings.store)
        lm.heard = self._hear
        try:
            yield
        finally:
            if own is None and lm.store is not None:
                lm.store.close()
            lm.store, lm.heard = own, None

    def result(self, results: Any) -> Result:
        """What simple_evaluate gave, with the folder."""
        assert self.folder is not None and results is not None, "the run has not ended"
        scores = {
            name: {key: value for key, value in found.items() if "," in key and isinstance(value, int | float)}
            for name, found in results["results"].items()
        }
        return Result(self.folder, scores, results, self.rows, self.record)

    # ---- code that models write

    def _allow(self, tasks: Mapping[str, Any], confirmed: bool) -> bool:
        """Tasks that run code: those that our sandbox grades need no word, the others do.

        Raises ValueError that says why. The report of the sandbox goes into the record.
        """
        unsafe = {name: task for name, task in tasks.items() if getattr(task, "UNSAFE_CODE", False)}
        sandboxed = {name for name, task in unsafe.items() if _grades_in_our_sandbox(task)}
        rest = sorted(set(unsafe) - sandboxed)
        if rest and not confirmed:
            raise ValueError(
                f"{', '.join(rest)}: lm-eval would run the model's code on this machine with your rights, outside our "
                "sandbox; --confirm_run_unsafe_code allows that"
            )
        kinds = {"function", "repository", "plot"}
        needs = sandboxed | {name for name, task in tasks.items() if _kinds(task) & kinds}
        self.isolations = dict.fromkeys(tasks, "nothing was run")
        if needs:
            report = isolation()
            if not report["available"] and not confirmed:
                raise ValueError(
                    f"{', '.join(sorted(needs))}: no sandbox works on this machine, so the model's code is not run "
                    f"({report['why']}); `moonkit sandbox check` says more"
                )
            self.record |= {"isolation": report["isolation"], "guarantees": report["guarantees"]}
            self.isolations |= dict.fromkeys(needs, report["isolation"])
            for name in sandboxed:
                tasks[name].UNSAFE_CODE = False  # lm-eval's own question is answered
        self.isolations |= dict.fromkeys(rest, "none")
        if rest:
            self.record["isolation"] = (
                "none" if not needs else f"{self.record['isolation']}; none for {', '.join(rest)}"
            )
        return confirmed

    # ---- the folder

    def _begin(self, model: str, lm: Any, model_args: Any, tasks: Mapping[str, Any], more: Mapping[str, Any]) -> None:
        identity = dict(getattr(lm, "identity", {}))
        name = str(getattr(lm, "name", "") or _model_name(model, model_args))
        label = getattr(lm, "label", None) or (name if model in ("moonkit", "Moonkit") else f"{model}:{name}")
        described = {
            "name": label,
            "path": name,
            "weights_sha256": identity.get("weights_sha256"),
            "tokenizer_sha256": identity.get("tokenizer_sha256"),
            "template_sha256": identity.get("template_sha256"),
            "parameters": dict(getattr(lm, "parameters", None) or _plain(model_args) or {}),
        }
        settings = {}
        for task_name, task in tasks.items():
            settings[task_name] = {
                "limit": more.get("limit"),
                "samples": (more.get("samples") or {}).get(task_name),
                "repeats": task.config.repeats,
                "gen_kwargs": _plain(dict(task.config.generation_kwargs or {}) | dict(more.get("gen_kwargs") or {})),
                "num_fewshot": more.get("num_fewshot", task.config.num_fewshot),
                "chat_template": bool(more.get("apply_chat_template")),
                "system_instruction": more.get("system_instruction"),
                "profile": self.manager.profile if self.manager and task_name in suite_names() else None,
                "frames": getattr(lm, "frames", None),
                "pixels": getattr(lm, "pixels", None),
            }
        self.record |= {
            "id": "",
            "created": _now(),
            "finished": None,
            "command": self.settings.command,
            "model": described,
            "settings": settings,
            "versions": versions(),
            "machine": machine(lm),
            "isolation": self.record.get("isolation", "nothing was run"),
            "guarantees": self.record.get("guarantees", []),
            "seeds": {
                "replies": getattr(lm, "seed", None),
                "python": more.get("random_seed", 0),
                "numpy": more.get("numpy_random_seed", 1234),
                "torch": more.get("torch_random_seed", 1234),
                "fewshot": more.get("fewshot_random_seed", 1234),
            },
            "tasks": {},
            "asked": {"model": model, "tasks": list(tasks), "more": _plain(more)},
        }
        if self.settings.regraded_from:
            self.record["regraded_from"] = self.settings.regraded_from
        self._find_folder(name)
        assert self.folder is not None
        self._write_record()

    def _find_folder(self, name: str) -> None:
        """--out, an unfinished run of the same things, or a new one."""
        if self.settings.out is not None:
            self.folder = self.settings.out
            old = read_record(self.folder)
            if old is not None:
                if not self._same(old):
                    raise ValueError(
                        f"{self.folder} holds another run ({', '.join(old.get('settings', {}))} on "
                        f"{old.get('model', {}).get('name')}); take another --out, or delete it"
                    )
                self.record |= {"id": old["id"], "created": old["created"]}
            elif self.folder.exists() and any(self.folder.iterdir()):
                raise ValueError(f"{self.folder} is no run folder and not empty; take another --out")
        else:
            for path in sorted(RUNS.glob("*/run.json"), reverse=True):
                old = read_record(path.parent)
                if old and old.get("finished") is None and self._same(old):
                    self.folder = path.parent
                    self.record |= {"id": old["id"], "created": old["created"]}
                    break
        if not self.record["id"]:
            label = "-".join([Path(name).name, *list(self.record["settings"])[:2]])
            label = "".join(sign if sign.isalnum() or sign in "._-" else "_" for sign in label)[:80]
            self.record["id"] = name_ = f"{datetime.now().strftime('%Y%m%d-%H%M%S')}-{label}"
            count = 1
            while self.folder is None and (RUNS / self.record["id"]).exists():  # two runs in one second
                count += 1
                self.record["id"] = f"{name_}-{count}"
        if self.folder is None:
            self.folder = RUNS / self.record["id"]
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.settings.store is None:
            self.settings.store = self.folder / "store" if self.settings.out is not None else RUNS / "store"

    def _same(self, old: Mapping[str, Any]) -> bool:
        """Whether a record is of this model and these settings; where and in which batches it runs does not count."""

        def matters(record: Mapping[str, Any]) -> Any:
            model = dict(record.get("model") or {})
            parameters = dict(model.get("parameters") or {})
            for name in ("device", "max_batch_tokens", "concurrency"):
                parameters.pop(name, None)
            return model | {"parameters": parameters}, record.get("settings")

        return matters(old) == matters(_plain(self.record))

    def _write_record(self) -> None:
        assert self.folder is not None
        replace_text(self.folder / "run.json", json.dumps(_plain(self.record), indent=1, ensure_ascii=False) + "\n")

    # ---- as answers come

    def _hear(self, request: "Instance", repeat: int, question: Question, answer: Answer) -> str | None:
        """Keep an answer for its row and what was shown for the page; the running score, for the progress bar."""
        assert self.folder is not None
        place = (str(request.task_name), int(request.doc_id or 0), request.idx, repeat)
        chosen = question.options
        parameters = {"max_tokens": chosen.max_tokens, "temperature": chosen.temperature, "top_p": chosen.top_p}
        self.heard[place] = Heard(question.key, answer, question.digests, parameters)
        for name, medium in zip(question.digests, question.media, strict=True):
            if name not in self.media:
                keep(medium, self.folder / "media", name)
                self.media.add(name)
        name = str(request.task_name)
        said = self._running(name, request, answer)
        if name not in self._left:
            mine = self.tasks[name].instances if name in self.tasks else []
            self._left[name] = sum(instance.repeats for instance in mine)
        self._left[name] -= 1
        if not self._left[name]:
            self._keep_rows(name)
        return said

    def _running(self, name: str, request: "Instance", answer: Answer) -> str | None:
        """The task's mean so far with this answer in it; None where it cannot be had between two answers."""
        if name not in self.tasks or self._quick.get(name, "") is None:
            return None
        started = time.perf_counter()
        score = None
        if name in suite_names():
            from evals import suites

            if suites.kind(request.doc) in GRADED_LATER:
                self._quick[name] = None
                return None
            with contextlib.suppress(ValueError):  # a broken row: it is named when the run is graded
                score = suites.verdict(request.doc, answer.text, answer.finish_reason == "length").score
        else:
            score = self._stock_score(name, request, answer)
            if time.perf_counter() - started > SLOW:
                self._quick[name] = None
        if score is None:
            return None
        sums = self._sums[name]
        sums[0] += score
        sums[1] += 1
        return f"{name} {sums[0] / sums[1]:.3f}"

    def _stock_score(self, name: str, request: "Instance", answer: Answer) -> float | None:
        """What one of lm-eval's own metrics says of one answer, where the task's score is the mean of it."""
        task = self.tasks[name]
        try:
            reply = Said(answer.text, answer.finish_reason)
            metrics = _score_alone(task, task._filters[0].name, request, reply)
            if name not in self._quick:
                metric = next(metric for metric in [*task.higher_is_better(), *metrics] if metric in metrics)
                means = task.aggregation().get(metric) is get_aggregation("mean")
                self._quick[name] = metric if means and _share(metrics[metric]) is not None else None
        except GRADING as error:
            log.info("%s: no running score (%s)", name, " ".join(str(error).split())[:200])
            self._quick[name] = None
        metric = self._quick[name]
        return None if metric is None else _share(metrics.get(metric))

    def _keep_rows(self, name: str) -> None:
        """A task's rows into samples.jsonl, before the other tasks are done."""
        assert self.folder is not None
        task = self.tasks[name]
        asked: dict[int, list[Any]] = defaultdict(list)
        for instance in task.instances:
            alone = copy.copy(instance)
            heard = (
                self.heard.get((name, int(instance.doc_id or 0), instance.idx, n)) for n in range(instance.repeats)
            )
            alone.resps = [Said(one.answer.text, one.answer.finish_reason) for one in heard if one is not None]
            alone.filtered_resps = {}
            if len(alone.resps) < instance.repeats:
                return
            asked[instance.doc_id].append(alone)
        everything = [one for group in asked.values() for one in group]
        try:
            task._filters[0].apply(everything)
            chosen, samples = task._filters[0].name, []
            for doc_id, group in asked.items():
                document = group[0].doc
                metrics = task.process_results(document, [one.filtered_resps[chosen] for one in group])
                sample = {"doc_id": self._true_id(name, doc_id), "doc": document, "filter": chosen} | dict(metrics)
                sample |= {"target": task.doc_to_target(document), "metrics": list(metrics)}
                samples.append(sample)
            rows = self._rows_of_task(name, task, samples, asked)
        except GRADING as error:
            log.info("%s: rows are written when all is done (%s)", name, " ".join(str(error).split())[:200])
            return
        lines = _lines(rows)
        if self._early:
            with open(self.folder / "samples.jsonl", "a", encoding="utf-8", errors="replace") as file:
                file.write(lines)
        else:
            replace_text(self.folder / "samples.jsonl", lines)
        self._early.add(name)
        self._write_record()

    def _true_id(self, name: str, doc_id: int) -> int:
        """A document's number in its data set; lm-eval counts anew where --samples picks some."""
        picked = (self.record["settings"].get(name) or {}).get("samples")
        return sorted(picked)[doc_id] if picked else doc_id

    # ---- rows

    def _end(self, tasks: Mapping[str, Any], results: Mapping[str, Any]) -> None:
        assert self.folder is not None
        for name, task in tasks.items():
            samples = results["samples"].get(name, [])
            instances: dict[int, list[Any]] = defaultdict(list)
            for instance in task.instances:
                instances[instance.doc_id].append(instance)
            picked = (self.record["settings"].get(name) or {}).get("samples")
            if picked:  # lm-eval takes them in the order of the data, and names them in the order of the wish
                samples = [sample | {"doc_id": sorted(picked)[picked.index(sample["doc_id"])]} for sample in samples]
            self.rows += self._rows_of_task(name, task, samples, instances)
            found = {k: v for k, v in results["results"][name].items() if isinstance(v, int | float)}
            self.record["tasks"][name] |= {"results": found}
            if self.record["tasks"][name]["version"] is None:
                self.record["tasks"][name]["version"] = results["versions"].get(name)
        replace_text(self.folder / "samples.jsonl", _lines(self.rows))
        plain = {key: value for key, value in results.items() if key != "samples"}
        replace_text(self.folder / "lm-eval.json", json.dumps(plain, indent=1, default=str) + "\n")
        self.record["finished"] = _now()
        self._write_record()

    def _rows_of_task(
        self, name: str, task: Any, samples: Sequence[Mapping[str, Any]], instances: Mapping[int, list[Any]]
    ) -> list[dict[str, Any]]:
        """A task's rows, and what the record says of it. instances: by lm-eval's own numbers of the documents."""
        metric, chosen_filter = main_metric(task, samples)
        mine = [sample for sample in samples if sample["filter"] == chosen_filter]
        numbers = {self._true_id(name, doc_id): doc_id for doc_id in instances}
        data = hashlib.sha256()
        rows: list[dict[str, Any]] = []
        for sample in mine:
            asked = instances.get(numbers.get(sample["doc_id"], -1)) or []
            first = asked[0] if asked else None
            own = document_digest(first.doc if first is not None else sample["doc"], first)
            data.update(own.encode())
            rows += self._rows_of(name, task, metric, chosen_filter, sample, asked, own)
        self.record["tasks"][name] = {
            "version": task.VERSION,
            "data_sha256": data.hexdigest(),
            "n": len(mine),
            "metric": f"{metric},{chosen_filter}",
            "higher_is_better": bool(task.higher_is_better().get(metric, True)),
            "isolation": self.isolations.get(name, "nothing was run"),
            "results": {},
        }
        return rows

    def _rows_of(
        self,
        name: str,
        task: Any,
        metric: str,
        chosen_filter: str,
        sample: Mapping[str, Any],
        asked: Sequence[Any],
        data_sha256: str,
    ) -> Iterator[dict[str, Any]]:
        doc_id = sample["doc_id"]
        first = asked[0] if asked else None
        document = first.doc if first is not None else sample["doc"]
        fields = document if isinstance(document, Mapping) else {}
        item = str(fields.get("id", fields.get("task_id", doc_id)))
        context = first.args[0] if first is not None else sample["arguments"][0][0]
        suite = _suite_task(fields)
        values = {m: _number(sample.get(m)) for m in sample["metrics"]}
        row: dict[str, Any] = {
            "task": name,
            "doc_id": doc_id,
            "item_id": item,
            "cluster": str(fields.get("cluster") or item),
            "repeat": 0,
            "prompt": str(context),
            "media": [],
            "reply": "",
            "thinking": "",
            "gold": fields.get("answer") if suite else _text(sample["target"]),
            "kind": suite["kind"] if suite else f"lm-eval {metric}",
            "score": None,
            "status": "graded",
            "evidence": {},
            "tokens": {"prompt": None, "completion": None, "thinking": None, "media": None},
            "finish_reason": None,
            "seconds": None,
            "key": None,
            "tests": fields.get("tests") if suite else None,
            "metrics": values,
            "document_sha256": data_sha256,
        }
        if task.OUTPUT_TYPE != "generate_until" or first is None:
            row |= {"score": _share(values.get(metric)), "responses": _plain(sample["resps"])}
            if row["score"] is None:
                row["status"] = "no_score"
            yield row
            return
        replies = list(first.resps)
        for repeat, reply in enumerate(replies):
            mine = copy.deepcopy(row) | {"repeat": repeat, "reply": str(reply)}
            heard = self.heard.get((name, int(first.doc_id or 0), first.idx, repeat))
            finish = getattr(reply, "finish_reason", None)
            if heard is not None:
                answer = heard.answer
                finish = answer.finish_reason
                mine |= {
                    "media": [f"media/{each}.png" for each in heard.digests],
                    "thinking": answer.thinking,
                    "tokens": dict(answer.tokens) or mine["tokens"],
                    "seconds": answer.seconds,
                    "key": heard.key,
                    "parameters": heard.parameters,
                }
                if answer.error:
                    mine["evidence"] = {"error": answer.error}
            mine["finish_reason"] = finish
            if suite:
                from evals import suites

                verdict = suites.verdict(document, str(reply), finish == "length")
                mine |= {"score": verdict.score, "status": verdict.status}
                mine["evidence"] = _plain(dict(verdict.evidence)) | mine["evidence"]
            else:
                got = values if len(replies) == 1 else _score_alone(task, chosen_filter, first, reply)
                mine |= {"metrics": got, "score": _share(got.get(metric))}
                if mine["score"] is None:
                    mine["status"] = "no_score"
                elif finish == "length" and not mine["score"]:
                    mine["status"] = "truncated"
                elif not str(reply).strip() and not mine["score"]:
                    mine["status"] = "silent"
            yield mine


def _check_choice(tasks: Mapping[str, Any], limit: Any, samples: Any) -> None:
    """Raises ValueError for a limit or a choice of samples that lm-eval would stumble over, or cut in silence."""
    if limit is not None and (not math.isfinite(limit) or limit <= 0 or (limit > 1 and limit != int(limit))):
        raise ValueError(f"--limit is a number of items from 1 up, or a share of them below 1; got {limit:g}")
    for name, picked in (samples or {}).items():
        if name not in tasks:
            raise ValueError(f"--samples names {name!r}, which is none of the tasks: {', '.join(tasks)}")
        count = len(tasks[name].eval_docs)
        wrong = [one for one in picked if isinstance(one, bool) or not isinstance(one, int) or not 0 <= one < count]
        if wrong or not picked or len(set(picked)) < len(picked):
            what = f"{wrong[0]!r} is none" if wrong else "one is there twice" if picked else "there are none"
            raise ValueError(f"--samples of {name}: different whole numbers from 0 to {count - 1} are wanted; {what}")


def _lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)


def _grade_once(task: Any) -> None:
    """Let a task remember what its metrics said of a document's answers: they are asked again when all is done."""
    inner = task.process_results
    if task.OUTPUT_TYPE != "generate_until" or hasattr(inner, "remembers"):
        return
    known: dict[bytes, Any] = {}

    def remembered(doc: Any, results: Any, *more: Any, **named: Any) -> Any:
        whole = json.dumps([doc, results], default=lambda value: f"{_by_bytes(value)} {id(value)}")
        key = hashlib.sha256(whole.encode("utf-8", "replace")).digest()
        if key not in known:
            known[key] = inner(doc, results, *more, **named)
        return copy.copy(known[key])

    remembered.remembers = True  # type: ignore[attr-defined]
    task.process_results = remembered


def _score_alone(task: Any, chosen_filter: str, instance: Any, reply: Any) -> dict[str, Any]:
    """A stock task's metrics of one of several repeats, as if it had been the only one."""
    alone = copy.copy(instance)
    alone.resps, alone.filtered_resps = [reply], {}
    for ensemble in task._filters:
        if ensemble.name == chosen_filter:
            ensemble.apply([alone])
    metrics = task.process_results(alone.doc, [alone.filtered_resps[chosen_filter]])
    return {name: _number(value) for name, value in metrics.items()}


def main_metric(task: Any, samples: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """The metric and filter that a row's score comes from: "score", or the task's first."""
    listed = list(task.higher_is_better())
    if not samples:
        return (listed[0] if listed else "score"), "none"
    found = {name for sample in samples for name in sample["metrics"]}
    order = ["score", *listed, *samples[0]["metrics"]]
    return next(name for name in order if name in found), samples[0]["filter"]


def _suite_task(fields: Mapping[str, Any]) -> dict[str, Any] | None:
    text = fields.get("task")
    if not isinstance(text, str) or not text.startswith("{"):
        return None
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) and "kind" in found else None


def _kinds(task: Any) -> set[str]:
    """Kinds of a suite task's documents."""
    found = set()
    for document in task.eval_docs if task.has_test_docs() or task.has_validation_docs() else ():
        suite = _suite_task(document) if isinstance(document, Mapping) else None
        if suite is None:
            break
        found.add(suite["kind"])
    return found


def _number(value: Any) -> Any:
    """A metric's value as JSON: numbers stay, anything else is its text."""
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, int | float):
        return value
    item = getattr(value, "item", None)
    if callable(item) and getattr(value, "ndim", 0) == 0:
        return item()
    return None if value is None else _plain(value)


def _share(value: Any) -> float | None:
    """A row's score. Of perplexities, (log-probability, words), it is the log-probability of a word."""
    if isinstance(value, list) and len(value) == 2 and all(isinstance(n, int | float) for n in value) and value[1]:
        value = value[0] / value[1]
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def _plain(value: Any) -> Any:
    """The same as JSON would read it back."""
    return json.loads(json.dumps(value, default=str))


def document_digest(document: Any, instance: Any) -> str:
    media = [digest(medium) for medium in media_of(instance)] if instance is not None else []
    text = (
        {k: v for k, v in document.items() if not hasattr(v, "tobytes")} if isinstance(document, Mapping) else document
    )
    whole = json.dumps([text, media], sort_keys=True, default=_by_bytes)
    return hashlib.sha256(whole.encode()).hexdigest()


def _by_bytes(value: Any) -> str:
    data = value.tobytes() if hasattr(value, "tobytes") else value if isinstance(value, bytes) else None
    return hashlib.sha256(data).hexdigest() if data is not None else type(value).__name__


def _model_name(model: str, model_args: Any) -> str:
    from lm_eval.utils import simple_parse_args_string

    arguments = simple_parse_args_string(model_args) if isinstance(model_args, str) else dict(model_args or {})
    return str(arguments.get("pretrained") or arguments.get("path") or arguments.get("model") or model)


def read_record(folder: Path) -> dict[str, Any] | None:
    """run.json of a run folder; None if there is none. Raises ValueError if it cannot be read."""
    path = folder / "run.json"
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no run record: {error}") from None
    if not isinstance(record, dict) or "settings" not in record:
        raise ValueError(f"{path} is no run record: it names no settings")
    return record


def replace_text(path: Path, text: str) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8", errors="replace")
    part.replace(path)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


# ---- what it ran on


def versions() -> dict[str, str]:
    """Of everything that numbers may depend on."""
    found = {"python": platform.python_version()}
    for name in ("moonkit", "lm_eval", "torch", "transformers", "datasets", "numpy", "pillow"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    head = Path(__file__).parents[1] / ".git"
    if head.exists():
        import subprocess

        asked = ["git", "-C", str(head.parent), "describe", "--always", "--dirty", "--abbrev=12"]
        said = subprocess.run(asked, capture_output=True, text=True, check=False)
        if said.returncode == 0:
            found["git"] = said.stdout.strip()
    return found


def machine(lm: Any) -> dict[str, Any]:
    """System, processors, memory, and what the model runs on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: dict[str, Any] = {"system": platform.platform(), "cores": cores, "device": str(getattr(lm, "device", None))}
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    if found["device"].startswith("cuda"):
        import torch

        found["accelerator"] = torch.cuda.get_device_name()
    return found


def isolation() -> dict[str, Any]:
    """What the sandbox guarantees here, found by attacking it; remembered for this kernel and this version of it."""
    import asyncio
    from dataclasses import asdict

    from agent import sandbox, seccomp, selftest
    from evals.store import cache_folder, files_digest

    try:
        chosen = sandbox.backend("auto")
    except sandbox.SandboxError as error:
        return {"available": False, "why": str(error), "isolation": "none", "guarantees": []}
    sources = [Path(str(module.__file__)) for module in (sandbox, seccomp, selftest)]
    kernel = f"{platform.release()} {os.getuid() if hasattr(os, 'getuid') else ''}"
    name = hashlib.sha256(f"{chosen.name} {kernel} {files_digest(sources)}".encode()).hexdigest()[:16]
    path = cache_folder() / f"isolation-{name}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        log.info("attacking the sandbox once, to say what it guarantees ...")
    report = asyncio.run(selftest.inspect(chosen))
    found = {
        "available": report.available,
        "why": report.why,
        "isolation": report.isolation,
        "guarantees": [asdict(guarantee) for guarantee in report.guarantees],
    }
    with contextlib.suppress(OSError):  # a home that cannot be written: asked again next time
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(found))
    return found


def _grades_in_our_sandbox(task: Any) -> bool:
    """Whether a stock task's metric holds our code_eval in place of lm-eval's."""
    for function in [*task._metric_fn_list.values(), task.config.process_results]:
        function = getattr(function, "__self__", function)  # lm-eval keeps a function's __call__
        held = getattr(function, "__globals__", {})
        if any(type(value).__module__.startswith("evals.code") for value in held.values()):
            return True
    return False


def install_code_eval() -> None:
    """Let stock tasks that ask for the metric code_eval get ours, which grades in the sandbox."""
    for name in ("evals.code_eval", "evals.code"):
        if find_spec(name) is not None:
            install = getattr(import_module(name), "install", None)
            if install is not None:
                install()
                return
