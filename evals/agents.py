"""moonkit eval agent: whole suites of repositories and repairs, worked on by a model with tools, kept and graded.

    moonkit eval agent --tasks kimi_swebench --model nano --limit 1
    moonkit eval agent --tasks kimi_swebench --model moonkit-endpoint \\
        --model_args base_url=http://localhost:8000/v1,model=kimi-k2.7-code --workers 8 --out runs/swe
    moonkit eval report runs/swe                     scores, tokens per solved task, every transcript
    moonkit eval regrade runs/swe                    today's tests and grader on the kept changes; no model

    problems ── check: the reference solves it ── trace: a policy, a sandbox ── verdict: other sandboxes ──> RUN
                                                     |  ^                          |  ^
                                                     v  |                          v  |
                                                  RUN/store    traces by what they depend on; verdicts likewise

    agent   agent/loop.py: bash, create_file, insert, view, str_replace, submit in one sandbox; its diff is graded
    tries   aider's rule: whole files in a message; where tests fail, their output once, and a second message

The folder is that of `moonkit eval`: run.json, samples.jsonl, store. After a kill the same command plays only what is
missing. From Python, with the same numbers: evals.agents.evaluate("nano", ["kimi_swebench"], limit=1).
"""

import argparse
import hashlib
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from agent.loop import SYSTEM, TOOLS, Budget, ContextFull, Message, Policy, Trace, answer
from agent.sandbox import SandboxError
from evals import suites
from evals.graders import Verdict
from evals.players import BUDGETS, TRIES, Agent, Form, Rules, Watched, agent_of, describe, rules_of
from evals.record import Result, Run, Settings, isolation, machine, read_record, versions
from evals.repositories import Problem, check, each_try, files_of, graded, play
from evals.repository import grade_edit
from evals.store import Store, files_digest, key_of, seed_of

log = logging.getLogger(__name__)

# what a verdict is made by
TELLING = ("repository", "canaries", "repositories", "code", "judge", "candidate", "values")


# ---- one trace


def _asked(problem: Problem, form: str) -> dict[str, Any]:
    """What the player sees: the words and the files; the reference and the tests do not change a trace."""
    data = problem.task.data
    found: dict[str, Any] = {"prompt": problem.agent_prompt or problem.prompt if form == "agent" else problem.prompt}
    if form == "tries":
        return found
    if problem.task.kind == "repository" and data.get("commit"):
        found |= {"repository": Path(str(data["repository"])).name, "commit": data["commit"]}
    else:
        tree = files_of(problem)
        found["files"] = {
            path: [file.mode, hashlib.sha256(file.data).hexdigest()] for path, file in sorted(tree.items())
        }
    environment = data.get("environment")
    return found | {"environment": None if environment is None else Path(str(environment)).name}


def question_digest(problem: Problem, form: str) -> str:
    """Of what the player sees of a problem."""
    return hashlib.sha256(json.dumps(_asked(problem, form), sort_keys=True).encode()).hexdigest()


def task_digest(problem: Problem) -> str:
    """Of a problem with its reference and tests, wherever on this machine they lie."""
    data = dict(problem.task.data)
    for name in ("repository", "environment"):
        if isinstance(data.get(name), str):
            data[name] = Path(data[name]).name
    whole = [problem.document() | {"task": ""}, problem.task.kind, problem.task.gold, data]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


@lru_cache(maxsize=1)
def _grader() -> str:
    return files_digest(Path(__file__).with_name(f"{name}.py") for name in TELLING)


def _step(message: Message, seconds: float) -> dict[str, Any]:
    """Numbers of one message of the policy."""
    usage = message.get("usage") or {}
    details = usage.get("completion_tokens_details") or {}
    tokens = {
        "prompt": int(usage.get("prompt_tokens") or 0),
        "completion": int(usage.get("completion_tokens") or 0),
        "thinking": int(details.get("reasoning_tokens") or 0),
    }
    return {"seconds": round(seconds, 3), "tokens": tokens, "finish_reason": message.get("finish_reason")}


def _kept(trace: Trace) -> dict[str, Any]:
    steps = []
    for step in trace.steps:
        calls = [{"ok": call.ok, "seconds": round(call.seconds, 3)} for call in step.calls]
        steps.append(_step(step.message, step.seconds) | {"calls": calls})
    return {
        "ended": trace.ended,
        "why": trace.why,
        "edits": [] if trace.diff is None else [trace.diff],
        "left_out": list(trace.left_out),
        "messages": [dict(message) for message in trace.messages],
        "steps": steps,
        "seconds": round(trace.seconds, 3),
        "isolation": trace.isolation,
    }


def _two_tries(problem: Problem, policy: Policy, budget: Budget) -> tuple[dict[str, Any], list[Verdict]]:
    """aider's rule as a trace like any other."""
    began = time.monotonic()
    messages: list[Message] = []
    steps: list[dict[str, Any]] = []
    edits: list[dict[str, str | None]] = []
    verdicts: list[Verdict] = []
    ended, why = "finished", ""

    def ask(shown: list[Message]) -> str:
        messages.extend(shown[len(messages) :])
        start = time.monotonic()
        # with its earlier thoughts, which K2.7-Code keeps
        message = answer(policy, messages, budget.wall_s - (start - began))
        said = message.get("content") if isinstance(message, dict) else None
        if not isinstance(said, str | None):
            raise ValueError(f"the policy must give an assistant message, got {str(message)[:200]}")
        said = (said or "").encode("utf-8", "replace").decode()
        steps.append(_step(message, time.monotonic() - start) | {"calls": []})
        messages.append({k: v for k, v in message.items() if k not in ("usage", "finish_reason")} | {"content": said})
        return said

    try:
        for each in each_try(ask, problem, TRIES):
            edits.append(dict(each.files))
            verdicts.append(each.verdict)
            if steps[-1]["finish_reason"] == "length":
                ended = "length"
    except TimeoutError:
        ended, why = "time", "the policy did not answer in time"
    except ContextFull as error:
        ended, why = "context", str(error)
    except SandboxError as error:
        ended, why = "infra_error", str(error)
    except Exception as error:  # a policy is anyone's code, and its failure is what the trace reports
        if not isinstance(policy, Watched) or policy.failure is None:
            raise
        ended, why = "policy_error", f"{type(error).__name__}: {error}"
    kept = {
        "ended": ended,
        "why": why,
        "edits": edits,
        "left_out": [],
        "messages": messages,
        "steps": steps,
        "seconds": round(time.monotonic() - began, 3),
        "isolation": "",
    }
    return kept, verdicts


def _verdicts(problem: Problem, form: str, trace: Mapping[str, Any]) -> list[Verdict]:
    """Of each edit of a trace, in order."""
    if form == "agent":
        return [graded(problem, edit) for edit in trace["edits"]]
    return [grade_edit(problem.task, edit) for edit in trace["edits"]]


@dataclass
class _Job:
    """One trace to be had."""

    task: str
    number: int
    problem: Problem
    repeat: int
    key: str
    verdict_key: str


@dataclass
class _Done:
    """What became of a job. new: played now. broken: the problem's own fault; failure: the policy's."""

    job: _Job
    trace: Mapping[str, Any] | None = None
    verdicts: Sequence[Verdict] = ()
    new: bool = False
    broken: str | None = None
    failure: Exception | str | None = None


# ---- a run


def evaluate(
    model: Any = "nano",
    tasks: str | Sequence[str] = (),
    *,
    model_args: Mapping[str, Any] | None = None,
    limit: int | None = None,
    items: Sequence[str] = (),
    repeats: int | None = None,
    out: str | Path | None = None,
    store: str | Path | None = None,
    profile: str | None = None,
    form: Form | None = None,
    workers: int | None = None,
    skip_broken: bool = False,
    quiet: bool = False,
    command: str = "evals.agents.evaluate",
    **given: Any,
) -> Result:
    """Let a model work on the problems of suites, and grade what it leaves.

    model, model_args: see `agent_of`. limit: the first so many problems; items: only these ids. repeats: traces of each
    problem; the score is their mean. form: agent or tries; None: as the suite is played. workers: traces side by side;
    None: 4 for a server, 1 for a model that is loaded here. skip_broken: leave problems out that their own reference
    does not solve here, instead of ending with an error. given: steps, wall_s, tokens, command_s, shown, temperature,
    top_p, step_tokens, thinking. Raises ValueError in one sentence; what was played is kept.
    """
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    if not names:
        raise ValueError("no task was named: --tasks NAME (kimi_swebench, kimi_aider_polyglot, kimi_quixbugs)")
    for name, value in {"limit": limit, "repeats": repeats, "workers": workers}.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    for name in names:
        suites.form(name)
    problems = {name: list(suites.problems(name, None if items else limit)) for name in dict.fromkeys(names)}
    if items:
        problems = _chosen(problems, items, limit)
    agent = agent_of(model, model_args)  # after the data: what is missing shows at once
    profile = profile or agent.profile
    if profile not in BUDGETS:
        raise ValueError(f"no profile {profile!r}; known: {', '.join(BUDGETS)}")
    told = {key: value for key, value in agent.given.items() if value is not None}
    told |= {key: value for key, value in given.items() if value is not None} | {"repeats": repeats}
    unknown = set(told) - {"repeats", "temperature", "top_p", "step_tokens", "thinking", *Budget.__annotations__}
    if unknown:
        raise ValueError(f"evals.agents.evaluate has no argument {', '.join(sorted(unknown))}")
    rules = {name: rules_of(name, profile, form, **told) for name in problems}
    for name, some in problems.items():
        if rules[name].form == "tries" and not all(problem.editable for problem in some):
            raise ValueError(
                f"{name}: two tries are for exercises whose files are answered whole (kimi_aider_polyglot)"
            )
    log.info(describe(rules, profile))
    report = isolation()
    if not report["available"]:
        raise ValueError(
            f"no sandbox works on this machine, so a model is given no tools here ({report['why']}); "
            "`moonkit sandbox check` says more"
        )
    run = Run(Settings(Path(out) if out else None, Path(store) if store else None, profile, repeats, command))
    _begin(run, agent, problems, rules, profile, {"limit": limit, "items": list(items)}, report)
    workers = workers or (4 if agent.device is None else 1)
    assert run.folder is not None and run.settings.store is not None
    with Store(run.settings.store) as kept:
        done, broken = _play_all(run, agent, problems, rules, kept, workers, quiet, skip_broken)
    if not done:
        raise ValueError(f"all problems are broken, the first: {next(iter(broken.values()))}")
    return _end(run, problems, done, broken)


def _chosen(problems: Mapping[str, list[Problem]], items: Sequence[str], limit: int | None) -> dict[str, list[Problem]]:
    known = {problem.id for some in problems.values() for problem in some}
    lost = [item for item in items if item not in known]
    if lost:
        from difflib import get_close_matches

        near = get_close_matches(lost[0], known, 3, 0.4)
        raise ValueError(f"no problem {lost[0]!r} in {', '.join(problems)}; near: {', '.join(near) or 'none'}")
    chosen = {name: [each for each in some if each.id in items][:limit] for name, some in problems.items()}
    return {name: some for name, some in chosen.items() if some}


def _begin(
    run: Run,
    agent: Agent,
    problems: Mapping[str, list[Problem]],
    rules: Mapping[str, Rules],
    profile: str,
    asked: Mapping[str, Any],
    report: Mapping[str, Any],
) -> None:
    for name, some in problems.items():
        if not some:
            raise ValueError(f"{name}: its data holds no problem")
        twice = {problem.id for problem in some if [each.id for each in some].count(problem.id) > 1}
        if twice:
            raise ValueError(f"{name}: two problems have the id {min(twice)!r}")
    identity = dict(agent.identity)
    run.record = {
        "id": "",
        "created": _now(),
        "finished": None,
        "command": run.settings.command,
        "model": {
            "name": agent.name,
            "path": agent.name,
            "weights_sha256": identity.get("weights_sha256"),
            "tokenizer_sha256": identity.get("tokenizer_sha256"),
            "template_sha256": identity.get("template_sha256"),
            "parameters": dict(agent.parameters) or {k: v for k, v in identity.items() if not k.endswith("sha256")},
        },
        "settings": {name: {"profile": profile, **asked, **asdict(rules[name])} for name in problems},
        "versions": versions(),
        "machine": machine(agent),
        "isolation": report["isolation"],
        "guarantees": report["guarantees"],
        "seeds": {"replies": agent.seed},
        "tasks": {name: {"n": len(some)} for name, some in problems.items()},
        "asked": {"form": "agent", "model": agent.name, "tasks": list(problems)},
    }
    run._find_folder(agent.name.rpartition(":")[2])
    run._write_record()


def _jobs(agent: Agent, problems: Mapping[str, list[Problem]], rules: Mapping[str, Rules]) -> Iterator[_Job]:
    """A problem's repeats one after the other: its reference is run once, and remembered while they last."""
    protocol = hashlib.sha256(json.dumps([SYSTEM, TOOLS]).encode()).hexdigest()
    for name, some in problems.items():
        played = {key: value for key, value in asdict(rules[name]).items() if key != "repeats"}
        for number, problem in enumerate(some):
            seen = question_digest(problem, rules[name].form)
            whole = task_digest(problem)
            for repeat in range(rules[name].repeats):
                who = dict(agent.identity) or {"name": agent.name}
                question: dict[str, Any] = {"kind": "trace", "agent": who, "rules": played}
                question |= {"asked": seen, "seed": agent.seed, "repeat": repeat, "protocol": protocol}
                if rules[name].form == "tries":  # the tests' output is part of the conversation
                    question["task"] = whole
                key = key_of(question)
                graded_by = key_of({"kind": "verdict", "trace": key, "task": whole, "grader": _grader()})
                yield _Job(name, number, problem, repeat, key, graded_by)


def _one(agent: Agent, job: _Job, rules: Rules, kept: Store, stop: threading.Event) -> _Done:
    """One job, from the store as far as it has it. A problem is checked before anything is asked of the model."""
    trace = kept.get(job.key)
    if trace is not None:
        known = kept.get(job.verdict_key)
        if known is not None:
            return _Done(job, trace, [Verdict(**each) for each in known["verdicts"]])
    try:
        check(job.problem)
    except ValueError as error:
        return _Done(job, broken=f"{job.task}, {job.problem.id}: a broken problem: {error}")
    except SandboxError as error:
        return _Done(job, {"ended": "infra_error", "why": str(error)} | _NOTHING)
    new, verdicts = trace is None, list[Verdict]()
    if trace is None:
        policy = Watched(agent.start(seed_of(job.key), rules), stop)
        if rules.form == "tries":
            trace, verdicts = _two_tries(job.problem, policy, rules.budget)
        else:
            trace = _kept(play(job.problem, policy, rules.budget))
        if trace["ended"] == "policy_error" and policy.failure is not None:
            return _Done(job, failure=policy.failure, new=True)
        if trace["ended"] == "infra_error":
            return _Done(job, trace)
        kept.add(job.key, trace)
    if not verdicts:
        verdicts = _verdicts(job.problem, rules.form, trace)
    if all(verdict.score is not None for verdict in verdicts):
        kept.add(job.verdict_key, {"verdicts": [_plain(asdict(verdict)) for verdict in verdicts]})
    return _Done(job, trace, verdicts, new)


_NOTHING: dict[str, Any] = {"edits": [], "left_out": [], "messages": [], "steps": [], "seconds": 0.0, "isolation": ""}


def _play_all(
    run: Run,
    agent: Agent,
    problems: Mapping[str, list[Problem]],
    rules: Mapping[str, Rules],
    kept: Store,
    workers: int,
    quiet: bool,
    skip_broken: bool,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """All jobs. Rows in order, less their transcripts, and what is broken; samples.jsonl is written as they come.

    Raises ValueError, when all others are done, for policies that failed and for problems that are broken."""
    from tqdm import tqdm

    from evals.endpoint import HOPELESS, EndpointError

    assert run.folder is not None
    jobs = list(_jobs(agent, problems, rules))
    known = sum(job.key in kept for job in jobs)
    if known:
        log.info("%d of %d traces are in the store %s", known, len(jobs), kept.folder)
    stop = threading.Event()
    done: list[dict[str, Any]] = []
    new = 0
    failures: list[_Done] = []
    broken: dict[str, str] = {}
    scores: list[float] = []
    left = iter(jobs)
    waiting: dict[Future[_Done], _Job] = {}
    bar = tqdm(total=len(jobs), desc="traces", disable=quiet, file=sys.stderr, mininterval=0.5, smoothing=0.05)
    pool = ThreadPoolExecutor(workers, "trace")
    try:
        with open(run.folder / "samples.jsonl", "w", encoding="utf-8", errors="replace") as rows:
            while True:
                while len(waiting) < workers and not stop.is_set() and (job := next(left, None)) is not None:
                    if job.problem.id in broken:
                        bar.update()
                        continue
                    waiting[pool.submit(_one, agent, job, rules[job.task], kept, stop)] = job
                if not waiting:
                    break
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    waiting.pop(future)
                    one = future.result()
                    if one.broken is not None:
                        if one.job.problem.id not in broken:
                            log.info("%s%s", one.broken, "; left out" if skip_broken else "")
                        broken[one.job.problem.id] = one.broken
                    elif one.failure is not None:
                        failures.append(one)
                        if isinstance(one.failure, EndpointError) and one.failure.status in HOPELESS:
                            stop.set()  # the next will end the same way
                    else:
                        row = row_of(one.job, rules[one.job.task], one.trace or {}, one.verdicts)
                        rows.write(_line(row))
                        rows.flush()
                        del row["transcript"]  # the file has it: thousands of them are gigabytes
                        done.append(row)
                        new += one.new
                        if row["score"] is not None:
                            scores.append(row["score"])
                            bar.set_postfix_str(f"score {sum(scores) / len(scores):.3f}", refresh=False)
                    bar.update()
    except BaseException as error:
        stop.set()
        if isinstance(error, KeyboardInterrupt):
            log.info("stopping; running traces end with the message that is being written (interrupt again to drop it)")
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    finally:
        bar.close()
    pool.shutdown()
    played = f"{new} new traces of {len(jobs)} are kept in {kept.folder}; the same command goes on from there"
    failures = [one for one in failures if not isinstance(one.failure, InterruptedError)]
    if failures:
        first = min(failures, key=lambda one: (one.job.number, one.job.repeat))
        where = f"{first.job.task}, {first.job.problem.id}, repeat {first.job.repeat}"
        said = " ".join(str(first.failure).split())[:400] or type(first.failure).__name__
        traces = "1 trace" if len(failures) == 1 else f"{len(failures)} traces"
        raise ValueError(f"the model failed in {traces}, the first at {where}: {said}. {played}")
    if broken and not skip_broken:
        several = "1 problem is" if len(broken) == 1 else f"{len(broken)} problems are"
        raise ValueError(
            f"{several} broken, the first: {next(iter(broken.values()))[:900]}\n"
            f"{played}, and --skip_broken leaves broken problems out"
        )
    place = {(job.task, job.problem.id, job.repeat): number for number, job in enumerate(jobs)}
    done.sort(key=lambda row: place[_place(row)])
    _in_order(run.folder / "samples.jsonl", place)
    return done, broken


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, default=str) + "\n"


def _place(row: Mapping[str, Any]) -> tuple[str, str, int]:
    return row["task"], row["item_id"], row["repeat"]


def _in_order(path: Path, place: Mapping[tuple[str, str, int], int]) -> None:
    """Sort the lines of a file of rows; one is held at a time."""
    found: list[tuple[int, int, int]] = []
    at = 0
    with open(path, "rb") as file:
        for line in file:
            found.append((place[_place(json.loads(line))], at, len(line)))
            at += len(line)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with open(path, "rb") as file, open(part, "wb") as out:
        for _, start, length in sorted(found):
            file.seek(start)
            out.write(file.read(length))
    part.replace(path)


# ---- rows


def transcript(trace: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A trace for reading: {"thinking", "text", "calls": [{"name", "arguments", "result", "ok"}], "tokens", "seconds"}
    for each message of the model, {"shown": text} for what it was told in between."""
    out: list[dict[str, Any]] = []
    steps: Iterator[dict[str, Any]] = iter(trace["steps"])
    calls: dict[str, dict[str, Any]] = {}
    started = False
    for message in trace["messages"]:
        role = message.get("role")
        if role == "assistant":
            started = True
            step: dict[str, Any] = next(steps, {"seconds": None, "tokens": {}, "calls": []})
            turn: dict[str, Any] = {"thinking": str(message.get("reasoning_content") or message.get("reasoning") or "")}
            turn |= {"text": str(message.get("content") or ""), "calls": []}
            turn |= {"tokens": step["tokens"].get("completion"), "seconds": step["seconds"]}
            # what was not called any more, after submit or the end of the time, has no result
            marks = iter(step["calls"])
            calls = {}
            for number, call in enumerate(message.get("tool_calls") or ()):
                function = call.get("function") or {}
                said = function.get("arguments")
                made = {
                    "name": str(function.get("name")),
                    "arguments": said if isinstance(said, str) else json.dumps(said),
                    "result": None,
                    "ok": next(marks, {"ok": None})["ok"],
                }
                turn["calls"].append(made)
                calls[str(call.get("id") or f"functions.{function.get('name')}:{number}")] = made
            out.append(turn)
        elif role == "tool":
            found = calls.get(str(message.get("tool_call_id")))
            if found is not None:
                found["result"] = str(message.get("content"))
        elif started:
            out.append({"shown": str(message.get("content"))})
    return out


def row_of(job: _Job, rules: Rules, trace: Mapping[str, Any], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """A line of samples.jsonl."""
    problem, gold = job.problem, job.problem.task.gold
    tokens = {
        name: sum(step["tokens"][name] for step in trace["steps"]) for name in ("prompt", "completion", "thinking")
    }
    texts = [turn for turn in transcript(trace) if "text" in turn]
    edits = list(trace["edits"])
    row: dict[str, Any] = {
        "task": job.task,
        "doc_id": job.number,
        "item_id": problem.id,
        "cluster": problem.cluster,
        "repeat": job.repeat,
        "prompt": problem.agent_prompt or problem.prompt if rules.form == "agent" else problem.prompt,
        "media": [],
        "reply": (edits[-1] if edits else "") if rules.form == "agent" else (texts[-1]["text"] if texts else ""),
        "thinking": "",
        "gold": gold if isinstance(gold, str) else json.dumps(gold, ensure_ascii=False, indent=1),
        "kind": f"{problem.task.kind}, {rules.form}",
        "tokens": tokens | {"media": 0},
        "finish_reason": trace["ended"],
        "seconds": trace["seconds"],
        "key": job.key,
        "tests": None,
        "document_sha256": question_digest(problem, rules.form),
        "parameters": {"temperature": rules.temperature, "top_p": rules.top_p, "step_tokens": rules.step_tokens},
        "edits": edits,
        "transcript": transcript(trace),
        "steps": len(trace["steps"]),
    }
    return row | _judged(trace, verdicts, rules.form)


def _judged(trace: Mapping[str, Any], verdicts: Sequence[Verdict], form: str) -> dict[str, Any]:
    """Score, status and evidence of a row. A trace without any verdict has done nothing, or was lost."""
    told: dict[str, Any] = {"ended": trace["ended"]} | ({"why": trace["why"]} if trace.get("why") else {})
    if trace["ended"] == "infra_error" or any(verdict.score is None for verdict in verdicts):
        lost = next((verdict.evidence for verdict in verdicts if verdict.score is None), {})
        evidence = told | _plain(dict(lost))
        return {"score": None, "status": "infra_error", "evidence": evidence, "metrics": {}}
    if trace.get("left_out"):
        told["left_out"] = list(trace["left_out"])
    last = verdicts[-1] if verdicts else Verdict(0.0, "silent", {"reason": "no answer"})
    score = float(last.score or 0.0)
    metrics = {"score": score}
    if form == "tries":
        metrics["first_try"] = float(verdicts[0].score or 0.0) if verdicts else 0.0
        told["tries"] = [verdict.score for verdict in verdicts]
    status: str = last.status
    if not score and trace["ended"] == "length":
        status = "truncated"
    return {"score": score, "status": status, "evidence": _plain(dict(last.evidence)) | told, "metrics": metrics}


def _end(
    run: Run, problems: Mapping[str, list[Problem]], rows: list[dict[str, Any]], broken: Mapping[str, str]
) -> Result:
    """run.json of a finished run. rows: as they stand in samples.jsonl, less their transcripts."""
    assert run.folder is not None
    run.rows = rows
    results: dict[str, dict[str, float]] = {}
    for name, some in problems.items():
        mine = [row for row in rows if row["task"] == name]
        data = hashlib.sha256("".join(task_digest(problem) for problem in some).encode()).hexdigest()
        results[name] = _means(mine)
        left_out = {problem.id: broken[problem.id] for problem in some if problem.id in broken}
        run.record["tasks"][name] = {
            "version": suites.version(name),
            "data_sha256": data,
            "n": len(some) - len(left_out),
            "metric": "score,none",
            "higher_is_better": True,
            "results": results[name],
        } | ({"left_out": left_out} if left_out else {})
    run.record["finished"] = _now()
    run._write_record()
    return Result(run.folder, results, {"results": results}, rows, run.record)


def _means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean over problems of the mean over their repeats, lost ones left out."""
    by_metric: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        for name, value in row["metrics"].items():
            by_metric.setdefault(name, {}).setdefault(row["item_id"], []).append(value)
    return {
        f"{name},none": sum(sum(values) / len(values) for values in items.values()) / len(items)
        for name, items in by_metric.items()
    }


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def _now() -> str:
    from evals.record import _now as now

    return now()


# ---- again


def regrade(folder: str | Path, out: str | Path | None = None) -> tuple[Result, dict[str, Any]]:
    """Today's tests and grader on the changes that the traces of a run have left; the new result, and the old record.

    Raises ValueError for a run that has not finished, and for a problem that asks something else than it did."""
    folder = Path(folder)
    old = read_record(folder)
    if old is None or old.get("finished") is None:
        raise ValueError(f"{folder} has not finished; the same command goes on with it: {(old or {}).get('command')}")
    samples = folder / "samples.jsonl"
    rows = [{k: v for k, v in row.items() if k != "transcript"} for row in _rows(samples)]
    forms = {name: told["form"] for name, told in old["settings"].items()}
    asked = {name: {row["item_id"] for row in rows if row["task"] == name} for name in forms}
    problems = {name: [p for p in suites.problems(name) if p.id in asked[name]] for name in forms}
    known = {(name, problem.id): problem for name, some in problems.items() for problem in some}
    for row in rows:
        where = f"{row['task']}, {row['item_id']}"
        problem = known.get((row["task"], row["item_id"]))
        if problem is None:
            raise ValueError(f"{where}: the data no longer holds this problem")
        if question_digest(problem, forms[row["task"]]) != row["document_sha256"]:
            raise ValueError(f"{where}: the data has changed since the run, so its trace answers another question")
    target = Path(out) if out is not None else folder.with_name(f"{folder.name}-regraded")
    run = Run(Settings(target, None, command=f"moonkit eval regrade {folder}", regraded_from=old["id"]))
    report = isolation()
    run.record = old | {"id": "", "created": _now(), "finished": None, "command": run.settings.command}
    run.record |= {"versions": versions(), "isolation": report["isolation"], "guarantees": report["guarantees"]}
    run.record |= {"regraded_from": old["id"], "tasks": {name: {"n": len(some)} for name, some in problems.items()}}
    run._find_folder(str(old["model"]["name"]).rpartition(":")[2])
    run._write_record()

    def again(row: dict[str, Any]) -> dict[str, Any]:
        trace = {"ended": row["finish_reason"], "edits": row["edits"], "why": row["evidence"].get("why")}
        trace["left_out"] = row["evidence"].get("left_out")
        form = forms[row["task"]]
        problem = known[row["task"], row["item_id"]]
        return row | _judged(trace, _verdicts(problem, form, trace), form)

    with ThreadPoolExecutor(2) as pool:
        new = list(pool.map(again, rows))
    assert run.folder is not None
    part = run.folder / f"samples.jsonl.{os.getpid()}.part"
    with open(part, "w", encoding="utf-8", errors="replace") as file:
        for row, before in zip(new, _rows(samples), strict=True):
            file.write(_line(before | row))
    part.replace(run.folder / "samples.jsonl")
    return _end(run, problems, new, {}), old


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


# ---- the verb


HELP = """Let a model work with tools on the problems of a suite, in a sandbox, and grade what it leaves: kimi_swebench
(an issue of a repository), kimi_quixbugs (a program to repair), and, with aider's two tries instead of tools,
kimi_aider_polyglot. Settings are those of K2.5 and K2.7-Code by default (docs/suites.md), and are printed first."""


def main() -> None:
    """The verb."""
    from evals.run import speak

    parser = argparse.ArgumentParser("moonkit eval agent", description=HELP, allow_abbrev=False)
    add = parser.add_argument
    add("--tasks", required=True, help="suites, with commas between")
    add("--model", default="nano", help="folder, hub id, nano (default), or moonkit-endpoint for a chat server")
    add("--model_args", default="", help="of moonkit-endpoint: base_url=URL,model=NAME[,api_key_env,timeout,retries,"
        "thinking,seed]; of a folder: dtype,experts,device,thinking,seed")  # fmt: skip
    add("--limit", type=int, help="the first so many problems of each suite")
    add("--items", default="", help="only the problems of these ids, with commas between")
    add("--repeats", type=int, help="traces of each problem; the score is their mean (avg@k)")
    add("--workers", type=int, help="traces side by side (default: 4 for a server, 1 for a model that is loaded here)")
    add("--out", type=Path, help="the run's folder; an unfinished run is continued there (default: runs/eval/...)")
    add("--store", type=Path, help="folder of traces that are kept (default: RUN/store, or runs/eval/store)")
    add("--profile", choices=tuple(BUDGETS), help="settings of the suites (default: by the model)")
    add("--form", choices=("agent", "tries"), help="with tools, or aider's two tries (default: by the suite)")
    add("--steps", type=int, help="messages of the model in one trace")
    add("--seconds", type=float, dest="wall_s", help="of one trace")
    add("--tokens", type=int, help="new tokens of one trace (default: no limit)")
    add("--command_seconds", type=float, dest="command_s", help="of one command that the model runs")
    add("--step_tokens", type=int, help="new tokens of one message, thoughts included")
    add("--temperature", type=float, help="of sampling; 0: the likeliest token")
    add("--top_p", type=float, help="of sampling")
    add("--thinking", choices=("true", "false"), help="where the model leaves a choice")
    add("--skip_broken", action="store_true", help="leave out problems that their own reference does not solve here")
    given = vars(parser.parse_args())
    speak()
    from lm_eval.utils import simple_parse_args_string

    tasks, items = (given.pop(name).split(",") for name in ("tasks", "items"))
    thinking = {"true": True, "false": False}.get(given.pop("thinking"))
    model, arguments = given.pop("model"), simple_parse_args_string(given.pop("model_args"))
    started = time.perf_counter()
    result = evaluate(
        model,
        [name.strip() for name in tasks if name.strip()],
        model_args=arguments,
        items=[item.strip() for item in items if item.strip()],
        thinking=thinking,
        command="moonkit eval agent " + " ".join(sys.argv[1:]),
        **given,
    )
    _say(result, time.perf_counter() - started)


def _say(result: Result, seconds: float) -> None:
    from evals.report import percent, remarks, span, tokens_span
    from evals.statistics import summarize

    for name in result.record["tasks"]:
        summary = summarize(name, [row for row in result.rows if row["task"] == name])
        first = result.scores[name].get("first_try,none")
        said = f"{name:<28}{percent(summary.score.value if summary.score else None)} % ({span(summary.score)})"
        said += f", {summary.items} problems" + (f" x {summary.repeats}" if summary.repeats > 1 else "")
        said += "" if first is None else f"; after the first try {percent(first)} %"
        print(said + f"; tokens per solved task {tokens_span(summary.tokens_solved)}")
        for remark in remarks(summary):
            print(f"  {remark}")
    folder = result.folder
    print(f"{len(result.rows)} traces in {seconds:.0f} s: {folder}  (moonkit eval report {folder})")


if __name__ == "__main__":
    main()
