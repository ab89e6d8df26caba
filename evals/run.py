"""moonkit eval: lm-eval's own command line with moonkit's models, suites and graders in it, and a run folder to keep.

    moonkit eval --tasks kimi_gsm8k --limit 20                     the model in the box
    moonkit eval --tasks kimi_mnist,kimi_humaneval --model_args pretrained=/models/Kimi-K2.7-Code --out runs/k27
    moonkit eval --model moonkit-endpoint --model_args base_url=http://localhost:8000/v1,model=kimi --tasks kimi_ifeval
    moonkit eval list                                              the suites
    moonkit eval agent --tasks kimi_swebench                       with tools, in a sandbox (evals/agents.py)
    moonkit eval regrade RUN                                       today's graders on a run's replies; no model
    moonkit eval report RUN ...                                    tables and a page (evals/report.py)

    tasks, model --> lm-eval's evaluator --> RUN/run.json       what was run, on what: hashes, seeds, versions
                       |  ^                  RUN/samples.jsonl  one row per graded sample
                       v  |                  RUN/media/         what was shown, by digest
                       |  |                  RUN/lm-eval.json   lm-eval's own results
                     RUN/store               every answer as it came: after a kill the same command goes on

Every flag of `lm-eval run` works. From Python, with the same numbers: evals.evaluate("nano", ["kimi_gsm8k"], limit=20).
"""

import argparse
import logging
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.model import LM

from evals.record import Result, Run, Settings, install_code_eval
from evals.tasks import Tasks, suite_folder

log = logging.getLogger(__name__)

OURS = ("moonkit", "moonkit-endpoint")


# ---- from Python


def evaluate(
    model: Any = "nano",
    tasks: str | Sequence[Any] = (),
    *,
    limit: int | float | None = None,
    repeats: int | None = None,
    out: str | Path | None = None,
    store: str | Path | None = None,
    profile: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    apply_chat_template: bool | None = None,
    include_path: str | Path | None = None,
    **more: Any,
) -> Result:
    """Evaluate a model; the numbers are those of `moonkit eval` with the same settings.

    model: a folder, hub id or "nano"; a Kimi; a registered name ("moonkit-endpoint", "hf") with model_args; or an
    lm-eval LM. tasks: names or inline configs. apply_chat_template None: on for our suites. out, store: as on the
    command line. more: other arguments of lm_eval.simple_evaluate. Raises ValueError in one sentence.
    """
    from lm_eval.api.registry import model_registry

    from evals import adapter

    wanted = [tasks] if isinstance(tasks, str) else list(tasks)
    arguments = dict(model_args or {})
    if isinstance(model, str) and model not in model_registry:
        arguments, model = {"pretrained": model} | arguments, "moonkit"
    elif not isinstance(model, str | LM):
        model = adapter.Moonkit(model, **arguments)
    install_code_eval()
    ours = _all_ours(wanted)
    if apply_chat_template is None:
        apply_chat_template = ours and (not isinstance(model, str) or model in OURS)
    profile = profile or _profile_of(model, arguments)
    manager = Tasks(include_path=str(include_path) if include_path else None, profile=profile, repeats=repeats)
    run = Run(Settings(_path(out), _path(store), profile, repeats, command="evals.evaluate"))
    results = run.simple_evaluate(
        model=model,
        model_args=arguments if isinstance(model, str) else None,
        tasks=wanted,
        task_manager=manager,
        limit=limit,
        apply_chat_template=apply_chat_template,
        fewshot_as_multiturn=bool(apply_chat_template),
        **more,
    )
    if include_path and run.record.get("finished"):
        run.record["asked"]["include_path"] = str(Path(include_path).absolute())
        run._write_record()
    return run.result(results)


def _path(value: str | Path | None) -> Path | None:
    return None if value is None else Path(value)


def _all_ours(tasks: Iterable[Any]) -> bool:
    """Whether every name is a suite of ours, or a group of them."""
    names = set(Tasks(include_defaults=False).all_tasks)
    listed = list(tasks)
    return bool(listed) and all(isinstance(name, str) and name in names for name in listed)


def _profile_of(model: Any, arguments: Mapping[str, Any]) -> str:
    """The suites' settings for a model: small for the model in the box, else by the checkpoint's kind."""
    if isinstance(model, str):
        if model != "moonkit":
            return "k2_7"
        name = str(arguments.get("path") or arguments.get("pretrained") or "nano")
        if name == "nano" or name.startswith("untrained:"):
            return "nano"
        from evals.adapter import is_small
        from fusion.checkpoint import locate, read_config

        config = read_config(locate(name))
    elif hasattr(model, "kimi"):
        from evals.adapter import is_small

        config = model.kimi.config
    else:
        return "k2_7"
    if is_small(config):
        return "nano"
    return "k2_5" if config.profile == "k2_5" else "k2_7"


# ---- the verb


HELP = """usage: moonkit eval --tasks TASK[,TASK] [options]
       moonkit eval list | agent --tasks TASK | regrade RUN | report RUN ...

Evaluate a model with lm-eval's own command line: every option of `lm-eval run` works (below). Without --model the
model is moonkit's; without --model_args it is the one in the box.

added here:
  --out RUN             the run's folder; an unfinished run is continued there (default: runs/eval/...)
  --store DIR           folder of answers that are kept (default: RUN/store, or runs/eval/store)
  --profile NAME        settings of our suites: k2_7, k2_5 or nano (default: by the model)
  --repeats N           samples of each question
  --skip_missing        leave out, with a line each, those of our suites whose data is not here
  --no_chat_template    raw text for our suites too (for them the chat template is on by default)

model arguments (--model_args a=1,b=2) of --model moonkit: pretrained dtype experts device thinking temperature top_p
top_k seed max_gen_toks max_batch_tokens max_length frames pixels store; of --model moonkit-endpoint: base_url model
api_key_env concurrency retries timeout thinking temperature top_p seed max_gen_toks frames store

"""


def main() -> None:
    """The verb."""
    options = sys.argv[1:]
    if options[:1] == ["list"]:
        _list(options[1:])
    elif options[:1] == ["regrade"]:
        from evals import regrade

        speak()
        regrade.main(options[1:])
    else:
        _evaluate(options)


def _list(options: Sequence[str]) -> None:
    parser = argparse.ArgumentParser("moonkit eval list", description="The suites, and whether their data is here.")
    parser.add_argument("--profile", default="k2_7", help="settings to show: k2_7, k2_5 or nano")
    arguments = parser.parse_args(list(options))
    if not suite_folder():
        raise ValueError("this build has no suites of its own; `moonkit eval ls tasks` lists lm-eval's")
    from evals import suites

    sys.argv = ["moonkit eval list", "--profile", arguments.profile]
    suites.main()


def speak() -> None:
    """Our own lines as they are; lm-eval's remarks only when they are asked for."""
    os.environ.setdefault("LMEVAL_LOG_LEVEL", "ERROR")
    lines = logging.StreamHandler(sys.stderr)
    lines.setFormatter(logging.Formatter("%(message)s"))
    ours = logging.getLogger("evals")
    ours.handlers, ours.propagate = [lines], False
    ours.setLevel(logging.INFO)


def _evaluate(options: list[str]) -> None:
    from lm_eval._cli import HarnessCLI

    own = argparse.ArgumentParser("moonkit eval", add_help=False, allow_abbrev=False)
    own.add_argument("--out", type=Path)
    own.add_argument("--store", type=Path)
    own.add_argument("--profile", choices=("k2_7", "k2_5", "nano"))
    own.add_argument("--repeats", type=int)
    own.add_argument("--skip_missing", action="store_true")
    own.add_argument("--no_chat_template", action="store_true")
    ours, rest = own.parse_known_args(options)
    if ours.repeats is not None and ours.repeats < 1:
        raise ValueError(f"--repeats must be at least 1, got {ours.repeats}")
    command = "run"
    if rest and rest[0] in ("run", "ls", "validate"):
        command, rest = rest[0], rest[1:]
    harness = HarnessCLI()
    parser = harness._subparsers.choices[command]
    parser.prog = f"moonkit eval{'' if command == 'run' else ' ' + command}"
    parser.usage = None
    if command == "run" and (not options or "-h" in rest or "--help" in rest):
        parser.epilog = None
        for action in parser._actions:
            if action.dest == "model":
                action.help = "Model name (default: moonkit)"
        parser.usage = "as of lm-eval run"
        print(HELP + parser.format_help(), end="")
        return
    speak()
    from lm_eval.utils import setup_logging

    setup_logging()
    speak()
    namespace = harness._parser.parse_args([command, *rest])
    if command != "run":
        folder = suite_folder()
        if folder and hasattr(namespace, "include_path") and not namespace.include_path:
            namespace.include_path = str(folder[0])
        namespace.func(namespace)
        return
    _run(namespace, ours, "moonkit eval " + " ".join(options))


def _present(tasks: Iterable[str]) -> Iterable[str]:
    """The tasks without those of our suites that have no data here. Raises ValueError where none is left."""
    from evals import suites

    own, left = suites.names(), 0
    for name in tasks:
        try:
            if name in own and not name.startswith("world"):
                suites.source(name)
        except ValueError as error:
            log.info("left out, %s", str(error).splitlines()[0].removesuffix(": looked in"))
            continue
        left += 1
        yield name
    if not left:
        raise ValueError("none of these suites has its data here (`moonkit eval list`)")


def _run(namespace: argparse.Namespace, ours: argparse.Namespace, command: str) -> None:
    import lm_eval
    import lm_eval.tasks

    from evals import adapter  # noqa: F401  (registers our models)

    from_file: dict[str, Any] = {}
    if namespace.config:
        from lm_eval.config.evaluate_config import EvaluatorConfig

        from_file = EvaluatorConfig.load_yaml_config(namespace.config)
    model = namespace.model or from_file.get("model") or "moonkit"
    namespace.model = model
    from lm_eval.api.registry import model_registry
    from lm_eval.utils import simple_parse_args_string

    if model not in model_registry:
        from difflib import get_close_matches

        near = get_close_matches(model, list(model_registry), 3, 0.5)
        raise ValueError(f"--model {model!r} is not known; near: {', '.join(near) or 'moonkit, moonkit-endpoint, hf'}")
    arguments = namespace.model_args or from_file.get("model_args") or {}
    arguments = simple_parse_args_string(arguments) if isinstance(arguments, str) else dict(arguments)
    if model == "moonkit" and not {"pretrained", "path"} & set(arguments):
        namespace.model_args = arguments = {"pretrained": "nano"} | arguments
    tasks = namespace.tasks or from_file.get("tasks") or []
    tasks = [name.strip() for each in ([tasks] if isinstance(tasks, str) else tasks) for name in str(each).split(",")]
    tasks = [name for name in tasks if name]
    if not tasks:
        raise ValueError("no task was named: --tasks NAME (`moonkit eval list` shows ours)")
    if ours.skip_missing:
        tasks = list(_present(tasks))
    namespace.tasks = ",".join(tasks)
    template = getattr(namespace, "apply_chat_template", None) or from_file.get("apply_chat_template")
    if ours.no_chat_template and template:
        raise ValueError("--apply_chat_template and --no_chat_template: give one of them")
    if model in OURS and not template and not ours.no_chat_template:
        if _all_ours(tasks):
            namespace.apply_chat_template = True
        else:
            log.info("prompts are raw text, as lm-eval's default; --apply_chat_template asks as in a chat")
    profile = ours.profile or _profile_of(model, arguments)
    run = Run(Settings(ours.out, ours.store, profile, ours.repeats, command))
    install_code_eval()
    if model not in OURS:
        log.info("--model %s is not ours: its answers are not kept as they come (--use_cache keeps greedy ones)", model)

    def manager(*args: Any, **kwargs: Any) -> Tasks:
        return Tasks(*args, **kwargs, profile=profile, repeats=ours.repeats)

    started = time.perf_counter()
    stock = lm_eval.tasks.TaskManager
    lm_eval.tasks.TaskManager = manager
    lm_eval.simple_evaluate = run.simple_evaluate
    try:
        namespace.func(namespace)
    finally:
        lm_eval.tasks.TaskManager = stock
        del lm_eval.simple_evaluate
    if run.folder is not None and run.record.get("finished"):
        if namespace.include_path:
            run.record["asked"]["include_path"] = str(Path(namespace.include_path).absolute())
            run._write_record()
        count = len(run.rows)
        seconds = time.perf_counter() - started
        print(f"{count} samples in {seconds:.0f} s: {run.folder}  (moonkit eval report {run.folder})")


if __name__ == "__main__":
    main()
