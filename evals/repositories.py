"""Benchmarks of whole repositories and of programs to repair, from the files that their makers publish.

    for problem in swe_bench(rows, "mirrors"):              rows as in SWE-bench; one git repository for each `repo`
        trace, verdict = work(problem, policy)              an agent in a sandbox, then the grader in others

    for problem in aider_polyglot("polyglot-benchmark"):    exercises as in aider's polyglot benchmark
        verdicts = tries(ask, problem)                      two tries, the second with the first one's test output

    for problem in quixbugs("QuixBugs"):                    one wrong line in each program
        verdict = grade(problem.task, reply)                kind "function"; or work(problem, policy)

    files on disk ── loader ──> Problem(id, cluster, prompt, task) ──> evals/repository.py or evals/code.py

Whole suites, kept and resumed, with a report: evals/agents.py (`moonkit eval agent`).

Nothing is fetched. What a folder must hold is said by each loader; a row or folder that cannot be used is a ValueError
that names it.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from agent.edit import File, applied, difference
from agent.loop import Budget, Message, Policy, Trace, solve
from agent.sandbox import Limits, SandboxError, Spec
from evals.graders import Task, Verdict, grade, visible
from evals.repository import Edit, blocks, calibrate, environment_of, grade_edit, restore

TOOLCHAINS = {
    "cpp": ("cmake", "CMake and a C++ compiler"),
    "go": ("go", "Go"),
    "java": ("java", "a Java development kit"),
    "javascript": ("node", "Node.js and npm"),
    "rust": ("cargo", "Rust's cargo"),
}


SHOWN_LINES = 50  # of the tests' output, as aider shows them


@dataclass(frozen=True)
class Problem:
    """One problem. prompt: what a model is asked that answers in one message; agent_prompt: what an agent is asked, ""
    for the same; shown: files that belong to the question; editable: those that an answer gives back; cluster: the same
    for problems that are not independent."""

    id: str
    cluster: str
    prompt: str
    task: Task
    shown: Mapping[str, str] = field(default_factory=dict)
    editable: tuple[str, ...] = ()
    agent_prompt: str = ""

    def document(self) -> dict[str, str]:
        """As a row of plain text."""
        task = json.dumps({"kind": self.task.kind, "gold": self.task.gold, "data": dict(self.task.data)})
        return {"id": self.id, "cluster": self.cluster, "prompt": self.prompt, "task": task}


def _text(row: Mapping[str, Any], key: str, where: str, empty: bool = False) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not (value.strip() or empty):
        raise ValueError(f"{where}: {key!r} must be text, got {value!r:.80}")
    return value


# ---- SWE-bench


def swe_bench(
    rows: Iterable[Mapping[str, Any]], repositories: str | Path, environments: str | Path | None = None
) -> Iterator[Problem]:
    """Rows of SWE-bench's format: instance_id, repo ("owner/name"), base_commit, problem_statement, patch, test_patch,
    FAIL_TO_PASS, PASS_TO_PASS (lists, or lists as JSON text), version.

    repositories: a folder of git repositories, bare or not, as owner__name, owner/name or name, with or without .git.
    environments: a folder with what the tests need, as INSTANCE_ID or owner__name__VERSION: see `environment` in
    evals/repository.py. Tests must be pytest's. Raises ValueError for a row that cannot be used.
    """
    for number, row in enumerate(rows):
        where = f"row {number} ({row.get('instance_id', 'no instance_id')})"
        name = _text(row, "instance_id", where)
        repo = _text(row, "repo", where)
        data: dict[str, Any] = {
            "repository": str(_repository(Path(repositories), repo, where)),
            "commit": _text(row, "base_commit", where),
            "test_patch": _text(row, "test_patch", where, empty=True),
        }
        for ours, theirs in (("fail_to_pass", "FAIL_TO_PASS"), ("pass_to_pass", "PASS_TO_PASS")):
            value = row.get(theirs, [])
            try:
                value = json.loads(value) if isinstance(value, str) else value
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: {theirs} is no list of tests: {error}") from None
            if not isinstance(value, list | tuple):
                raise ValueError(f"{where}: {theirs} is no list of tests")
            data[ours] = [str(each) for each in value]
        if not data["fail_to_pass"]:
            raise ValueError(f"{where}: FAIL_TO_PASS names no test")
        own = _own_environment(environments, name, repo, str(row.get("version", "")))
        if own is not None:
            data["environment"] = str(own)
        prompt = _text(row, "problem_statement", where)
        yield Problem(name, name, prompt, Task("repository", _text(row, "patch", where), data))


def _repository(folder: Path, repo: str, where: str) -> Path:
    owner, _, name = repo.rpartition("/")
    if (
        not re.fullmatch(r"[\w.-]+", name)
        or not re.fullmatch(r"[\w.-]*", owner)
        or name in (".", "..")
        or owner == ".."
    ):
        raise ValueError(f"{where}: repo {repo!r} is no owner/name")
    places = [folder / f"{owner}__{name}", folder / owner / name, folder / name]
    looked = [place.with_name(place.name + end) for place in places for end in ("", ".git")]
    for place in looked:
        if place.is_dir():
            return place
    raise ValueError(
        f"{where}: no repository of {repo}; looked for {', '.join(map(str, looked))}. "
        f"`git clone --mirror https://github.com/{repo} {folder / f'{owner}__{name}.git'}` makes one"
    )


def _own_environment(folder: str | Path | None, name: str, repo: str, version: str) -> Path | None:
    if folder is None:
        return None
    for each in (name, f"{repo.replace('/', '__')}__{version}", repo.replace("/", "__")):
        if (Path(folder) / each).is_dir():
            return Path(folder) / each
    return None


def check(problem: Problem) -> None:
    """Run the problem's own solution. Raises ValueError for a broken task, SandboxError where the sandbox fails."""
    task = problem.task
    if task.kind == "repository":
        calibrate(_whole(task.gold), task.data)
    elif task.kind == "function":
        from evals.code import reference

        known = reference(task.gold, task.data)
        if known is not None and known.passed is None:
            raise SandboxError(str(known.evidence.get("error")))
    else:
        raise ValueError(f"{problem.id}: an agent works on files, and this is of kind {task.kind!r}")


def files_of(problem: Problem) -> dict[str, File]:
    """What an agent finds. The tests of an exercise are hidden; those of a repository at a commit are as they were."""
    if problem.task.kind == "function":
        return {path: File(text.encode()) for path, text in problem.shown.items()}
    hidden = set(problem.task.data.get("test_files") or ())
    return {path: file for path, file in restore(problem.task.data).items() if path not in hidden}


def work(problem: Problem, policy: Policy, budget: Budget | None = None, **options: Any) -> tuple[Trace, Verdict]:
    """Let an agent solve a problem, and grade what it leaves. The task is checked first; the agent's sandbox is gone
    before the grader's are opened. Raises ValueError for a broken task."""
    check(problem)
    trace = play(problem, policy, budget, **options)
    if trace.diff is None:
        return trace, Verdict(None, "infra_error", {"reason": trace.why})
    verdict = graded(problem, trace.diff)
    if trace.left_out:
        verdict = replace(verdict, evidence={**verdict.evidence, "left_out": list(trace.left_out)})
    return trace, verdict


def play(problem: Problem, policy: Policy, budget: Budget | None = None, **options: Any) -> Trace:
    """The agent's part of `work`."""
    if "spec" not in options:
        options["spec"] = _with_packages(problem.task.data, budget or Budget())
    return solve(policy, problem.agent_prompt or problem.prompt, files_of(problem), budget=budget, **options)


def graded(problem: Problem, diff: str) -> Verdict:
    """The grader's part of `work`. Raises ValueError for a broken task."""
    if not diff:
        return Verdict(0.0, "graded", {"reason": "nothing was changed"})
    task, files = problem.task, files_of(problem)
    if task.kind == "repository":
        hidden = set(task.data.get("test_files") or ())
        if hidden:  # an agent may have written tests of its own under these names
            after = {path: file for path, file in applied(files, diff).items() if path not in hidden}
            diff = difference(files, after)
        return grade_edit(task, diff)
    (name,) = problem.shown
    after = applied(files, diff)
    if name not in after:
        return Verdict(0.0, "graded", {"reason": f"{name} is gone"})
    text = after[name].data.decode("utf-8", "replace")
    fence = "`" * (3 + max((len(run) for run in re.findall("`+", text)), default=0))
    return grade(task, f"{fence}python\n{text.rstrip()}\n{fence}")


def _with_packages(data: Mapping[str, Any], budget: Budget) -> Spec:
    """A sandbox in which an agent can run the tests that it sees."""
    environment = environment_of(data)
    limits = Limits(wall_s=budget.command_s, cpu_s=budget.command_s, memory_mb=2048, pids=128, disk_mb=512)
    env = {"PYTHONPATH": ":".join(environment.packages), "PYTHONDONTWRITEBYTECODE": "1"}
    if environment.plugins is not None:
        env["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    if environment.python:
        env["PATH"] = f"{Path(environment.python[0]).parent}:/usr/bin:/bin"
    return Spec(limits=limits, binds=environment.binds, env=env)


def _whole(gold: Any) -> Edit:
    if not isinstance(gold, str | Mapping):
        raise ValueError(f"the gold is a diff, or path -> text, got {type(gold).__name__}")
    return gold


# ---- aider's polyglot benchmark


def languages(folder: str | Path) -> dict[str, str]:
    """The languages of a copy of the benchmark, and what is missing to grade each: "" where nothing is."""
    found = {}
    for practice in sorted(Path(folder).glob("*/exercises/practice")):
        language = practice.parents[1].name
        program, what = TOOLCHAINS.get(language, ("", language))
        if language == "python":
            found[language] = ""
        elif program and shutil.which(program):
            found[language] = f"{what} is installed, but only exercises in Python are graded here"
        else:
            found[language] = f"{what} is not installed, and only exercises in Python are graded here"
    return found


def aider_polyglot(folder: str | Path, language: str = "python") -> list[Problem]:
    """Exercises in LANGUAGE/exercises/practice/NAME: .docs/instructions.md, with introduction.md and
    instructions.append.md where they are there; .meta/config.json with files.solution, files.test and files.example;
    and those files.

    Raises ValueError for a language that cannot be graded here, and for an exercise that lacks a file.
    """
    known = languages(folder)
    if language not in known:
        there = ", ".join(known) or "none"
        raise ValueError(
            f"{folder} has no exercises in {language} (LANGUAGE/exercises/practice/NAME); there are: {there}"
        )
    if known[language]:
        raise ValueError(f"exercises in {language} cannot be graded: {known[language]}")
    places = sorted((Path(folder) / language / "exercises" / "practice").iterdir())
    return [_exercise(place, language) for place in places if (place / ".meta" / "config.json").is_file()]


def _exercise(place: Path, language: str) -> Problem:
    try:
        named = json.loads((place / ".meta" / "config.json").read_text(encoding="utf-8"))["files"]
        solution, tests, example = ([str(each) for each in named[key]] for key in ("solution", "test", "example"))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{place}: .meta/config.json names no files.solution, files.test and files.example: {error}"
        ) from None
    if len(example) != len(solution) or not tests:
        raise ValueError(f"{place}: {len(solution)} solution files, {len(example)} examples and {len(tests)} tests")
    content: dict[str, str] = {}
    for path in sorted(place.rglob("*")):
        inside = path.relative_to(place).as_posix()
        if path.is_file() and not inside.startswith((".meta/", ".docs/")) and "__pycache__" not in inside:
            content[inside] = path.read_text(encoding="utf-8")
    lost = [name for name in (*solution, *tests) if name not in content]
    lost += [name for name in example if not (place / name).is_file()]
    if lost:
        raise ValueError(f"{place}: no file {lost[0]}")
    gold = {name: (place / own).read_text(encoding="utf-8") for name, own in zip(solution, example, strict=True)}
    docs = [place / ".docs" / name for name in ("introduction.md", "instructions.md", "instructions.append.md")]
    said = [path.read_text(encoding="utf-8").strip() for path in docs if path.is_file()]
    if not said:
        raise ValueError(f"{place}: no .docs/instructions.md")
    shown = {name: content[name] for name in solution}
    asked = (
        "\n\n".join(said) + f"\n\nDo this by changing {', '.join(solution)}. Keep the names of its functions and "
        "classes: tests use them. Use the standard library only."
    )
    files = "\n\n".join(f"{name}\n```{language}\n{text.rstrip()}\n```" for name, text in shown.items())
    prompt = (
        f"{asked} Answer with the whole of each changed file: its name on a line of its own, then the content in a "
        f"fenced block.\n\n{files}"
    )
    name = f"{language}/{place.name}"
    data = {"files": content, "test_files": tests, "pythonpath": [""]}
    return Problem(name, place.name, prompt, Task("repository", gold, data), shown, tuple(solution), asked)


def whole_files(reply: str, names: Sequence[str]) -> dict[str, str | None]:
    """Fenced blocks of a reply by the file name on the line before. One block without a name is the only file's."""
    out: dict[str, str | None] = {}
    nameless: list[str] = []
    for before, _, inside in blocks(reply):
        said = re.sub(r"^(?:file(?:name)?|path)\s*:\s*", "", before[:1000].strip("*#`: "), flags=re.IGNORECASE)
        short = [name for name in names if said in (name, f"./{name}", name.rsplit("/", 1)[-1])]
        if short:
            out[short[0]] = inside
        else:
            nameless.append(inside)
    if not out and len(names) == 1 and nameless:
        out[names[0]] = nameless[-1]
    return out


@dataclass(frozen=True)
class Try:
    """One of several tries. files: what all answers so far have made of the files that may be changed."""

    reply: str
    files: Mapping[str, str | None]
    verdict: Verdict


def each_try(ask: Callable[[list[Message]], str], problem: Problem, count: int = 2) -> Iterator[Try]:
    """Ask for whole files, and again with the tests' output while it is wrong: aider's rule, with two tries.

    As there: the files of earlier answers stay as they are unless a later one has them too; an answer without a file
    leaves them, and the tests say what they say; 50 lines of their output are shown, once, and tests are never shown
    themselves.
    """
    messages: list[Message] = [{"role": "user", "content": problem.prompt}]
    files: dict[str, str | None] = dict(problem.shown)
    for _ in range(count):
        reply = ask([dict(each) for each in messages])
        said, unfinished = visible(reply)
        found = {} if unfinished else whole_files(said, problem.editable)
        files |= found
        verdict = grade_edit(problem.task, files)
        if not found and verdict.score is not None:
            evidence = {**verdict.evidence, "reason": "no file in the answer"}
            verdict = Verdict(verdict.score, "graded" if reply.strip() else "silent", evidence)
        yield Try(reply, dict(files), verdict)
        if verdict.score != 0:
            return
        output = str(verdict.evidence.get("output") or verdict.evidence.get("reason", ""))
        again = "\n".join(output.splitlines()[:SHOWN_LINES])
        again += f"\n\nThe tests are right. Correct {', '.join(problem.editable)} and answer as before."
        messages += [{"role": "assistant", "content": said}, {"role": "user", "content": again}]


def tries(ask: Callable[[list[Message]], str], problem: Problem, count: int = 2) -> list[Verdict]:
    """One verdict for each try; the benchmark counts problems solved after one and after two."""
    return [each.verdict for each in each_try(ask, problem, count)]


# ---- QuixBugs

SAME = """
def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (str, bytes)) or not hasattr(value, "__iter__"):
        return value
    return [_plain(each) for each in value]


def same(got, wanted, slack=0.0):
    got = _plain(got)
    if slack:
        return isinstance(got, (int, float)) and abs(got - wanted) <= slack
    return got == wanted
"""


def quixbugs(folder: str | Path) -> list[Problem]:
    """Programs with one wrong line: python_programs/NAME.py, correct_python_programs/NAME.py, json_testcases/NAME.json
    (a line each: [arguments, result]). Programs on graphs and linked lists, which have no such file, are left out:
    see `without_cases`. Raises ValueError for a folder or a file that is not so."""
    root = Path(folder)
    for name in ("python_programs", "correct_python_programs", "json_testcases"):
        if not (root / name).is_dir():
            raise ValueError(f"{root} has no folder {name}: it is no copy of QuixBugs")
    problems = []
    for path in sorted((root / "json_testcases").glob("*.json")):
        if (root / "python_programs" / f"{path.stem}.py").is_file():
            problems.append(_quixbug(root, path))
    if not problems:
        raise ValueError(f"{root}: json_testcases names none of python_programs")
    return problems


def without_cases(folder: str | Path) -> list[str]:
    """Programs of QuixBugs that have no file of cases, and are left out."""
    root = Path(folder)
    helpers = ("node", "__init__")
    names = [path.stem for path in sorted((root / "python_programs").glob("*.py"))]
    return [
        name
        for name in names
        if name not in helpers
        and not name.endswith("_test")
        and not (root / "json_testcases" / f"{name}.json").is_file()
    ]


def _quixbug(root: Path, cases: Path) -> Problem:
    name = cases.stem
    wrong = (root / "python_programs" / f"{name}.py").read_text(encoding="utf-8")
    right = root / "correct_python_programs" / f"{name}.py"
    if not right.is_file():
        raise ValueError(f"{right} is not there")
    tests = []
    for number, line in enumerate(cases.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            arguments, result = json.loads(line)
        except (json.JSONDecodeError, ValueError, TypeError) as error:
            raise ValueError(f"{cases}, line {number}: not [arguments, result]: {error}") from None
        arguments = arguments if isinstance(arguments, list) else [arguments]
        slack = f", {arguments[-1]!r}" if name == "sqrt" else ""  # its last argument is how exact it is to be
        tests.append(f"assert same({name}({', '.join(map(repr, arguments))}), {result!r}{slack})")
    if not tests:
        raise ValueError(f"{cases} holds no case")
    prompt = (
        f"This program has a bug in one line. Answer with the whole corrected program in a fenced block; keep the name "
        f"of `{name}`.\n\n```python\n{wrong.strip()}\n```"
    )
    data = {"entry_point": name, "tests": tests, "setup": SAME}
    return Problem(
        f"quixbugs/{name}",
        name,
        prompt,
        Task("function", right.read_text(encoding="utf-8"), data),
        {f"{name}.py": wrong},
        agent_prompt=f"{name}.py has a bug in one line. Correct it there; keep the name of `{name}`.",
    )
