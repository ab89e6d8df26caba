"""Kind "repository": does an edit make a repository's tests pass, by being right?

    grade(Task("repository", gold=diff, data={...}), answer)  ->  Verdict      answer: a diff, or a JSON of whole files
    grade_edit(task, edit)                                    ->  Verdict      the same for an edit at hand

    clean files at the commit, no history ── + edit, without what belongs to the tests ── + the trusted tests
      ├── a fresh sandbox: the tests themselves; every required one is reported, under a nonce, and the run ends
      └── another: blind canaries in their place (evals/canaries.py); exactly the right copies pass
                                 both as they should be  ->  1, else 0

data, plain JSON:
    files           path -> text: the repository itself, or
    repository      a folder; with `commit`, a git repository (bare or not): its files at the commit
    test_patch      a diff, or path -> text: the trusted tests, put over the repository ("" if they are in it)
    fail_to_pass    ids as pytest writes them (tests/test_a.py::test_b): fail before, pass after
    pass_to_pass    ids: pass before and after
    test_files      instead of ids: all tests of these files that the gold passes
    environment     a folder with the packages that the tests need: a site-packages, a virtual environment of the
                    sandbox's Python, or a prefix with a Python of its own; left out, this program's own packages
    plugins         pytest plugins to load, by name; left out, all of `environment`, and none of the program's own
    pythonpath      folders of the repository to import from; left out, its root and src
    options         for pytest's command line
    limits          Limits as a dict; left out, times are measured on the gold (processor time times 4, wall times 10)

gold is an edit, as a diff or path -> text. Before the first answer is graded the gold is: tests that it does not pass,
and fail-to-pass tests that pass without it, are a ValueError. Both runs of the gold and of the untouched repository
set the time limits and weed out canaries that do not tell right from wrong. The result is kept for the process.

An edit cannot touch tests, conftest.py, pytest's configuration, what Python runs at start or entry points of plugins:
these come from the clean copy. Links and paths that lead out are refused.

Tests without a constant that can be changed are the weaker mode, and the evidence says so ("mode", "unblind"): their
results come from a process that the candidate's code shares. Their reports carry a nonce, a tripwire copy of each must
fail, and the edit must not name what would reach into pytest (SUSPECT; what the gold itself names is allowed). Code
that finds the nonce in memory by means the scan does not know could still lie about these tests. `chance` is how
probable it is to guess all canaries.
"""

import asyncio
import hashlib
import json
import os
import posixpath
import random
import re
import secrets
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.edit import EditError, File, Mode, Tree, applied, checked_path, replaced
from agent.sandbox import Backend, ExecResult, Limits, SandboxError, Spec, backend, running
from evals.canaries import Copy, Module, Site, Test, choices

if TYPE_CHECKING:
    from evals.graders import Task, Verdict

Edit = str | Mapping[str, str | None]  # a diff, or whole files by path
SURE = 1e-6  # the chance to guess all canaries that is aimed at
UNSURE = 1e-3  # above it the edit is scanned too
MOST_CHOICES = 24
MOST_COPIES = 1500
MOST_FREE = 50  # canaries of tests that pass before the edit, and tripwires, in one grading
CANARY_SECONDS = 60.0  # processor time of all copies together, by the gold's own times
GENEROUS = Limits(wall_s=900, cpu_s=600, memory_mb=4096, pids=128, disk_mb=1024, output_kb=8192)
ORDINARY_LIMITS = replace(GENEROUS, memory_mb=2048, disk_mb=512, output_kb=4096)

CONFIGURATION = {
    "conftest.py", "pytest.ini", ".pytest.ini", "pytest.toml", ".pytest.toml", "tox.ini", "setup.cfg", "pyproject.toml",
    "sitecustomize.py", "usercustomize.py",
}  # fmt: skip
TEST_FILE = re.compile(r"(?:^|/)(?:test_[^/]*|[^/]*_test)\.py$|(?:^|/)tests/|\.(?:egg-info|dist-info)/|\.pth$")
SUSPECT = {
    name: re.compile(pattern)
    for name, pattern in {
        "pytest": r"\b_pytest\b|\bimport pytest\b|\bfrom pytest\b|\bpytest\.|\bpluggy\b|\bhookimpl\b",
        "os._exit": r"\b_exit\b|\bos\.abort\b",
        "frames": r"\b_getframe\b|\bcurrentframe\b|\bf_back\b|\bf_locals\b|\bf_globals\b|\btb_frame\b",
        "stack": r"\binspect\.(?:stack|trace|getouterframes|getinnerframes)\b",
        "gc": r"\bget_objects\b|\bget_referrers\b|\bget_referents\b",
        "start-up": r"\bsitecustomize\b|\busercustomize\b|\batexit\b|\bsettrace\b|\bsetprofile\b",
        "conftest": r"\bconftest\b",
        "memory": r"\bctypes\b|/proc/self|\bmemfd_create\b",
        "modules": r"\bsys\.modules\b|\b__import__\b|\b__builtins__\b|\bbuiltins\b|\bmeta_path\b",
        "processes": r"\bos\.(?:kill|exec\w+|fork)\b",
        "file descriptors": r"\bos\.(?:write|dup2?|fdopen|listdir)\b|/dev/fd\b",
    }.items()
}
ORDINARY = {"modules", "processes", "file descriptors"}  # in honest edits too: looked for where nothing else would tell


class Refused(ValueError):
    """An edit that is not graded: it scores 0."""


# ---- the files


def restore(data: Mapping[str, Any]) -> Tree:
    """The clean files of a task, without history. Raises ValueError where they cannot be had."""
    if data.get("files") is not None:
        try:
            return replaced({}, data["files"])
        except (EditError, TypeError, AttributeError) as error:
            raise ValueError(f"repository: broken files: {error}") from None
    if not data.get("repository"):
        raise ValueError("repository: data needs `files`, or `repository` and `commit`")
    return _restored(str(data["repository"]), data.get("commit"))


@lru_cache(maxsize=8)
def _restored(folder: str, commit: str | None) -> Tree:
    if not Path(folder).is_dir():
        raise ValueError(f"repository: no folder {folder!r}")
    if commit is None:
        return _of_folder(Path(folder))
    return _at_commit(folder, str(commit))


def _of_folder(folder: Path) -> Tree:
    out: dict[str, File] = {}
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(set(folders) - {".git", "__pycache__"})
        for name in [*names, *(each for each in folders if os.path.islink(os.path.join(root, each)))]:
            path = Path(root, name)
            if name == ".git":
                continue
            inside = path.relative_to(folder).as_posix()
            if path.is_symlink():
                out[inside] = File(os.readlink(path).encode(), "link")
            elif path.is_file():
                out[inside] = File(path.read_bytes(), "executable" if path.stat().st_mode & 0o100 else "file")
    return out


def _git(folder: str, *words: str, stdin: bytes = b"") -> bytes:
    command = ["git", "-C", folder, *words]
    # nothing that the repository's own configuration names is run: reading objects calls no hook and no filter
    env = {
        "PATH": os.environ.get("PATH", ""),
        "HOME": "/nonexistent",
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_OPTIONAL_LOCKS": "0",
    }
    env |= {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "safe.directory", "GIT_CONFIG_VALUE_0": "*"}
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, timeout=600, env=env)
    except FileNotFoundError:
        raise ValueError("repository: git is not installed, and the task names a commit") from None
    if done.returncode:
        raise ValueError(
            f"repository: {' '.join(words[:2])} failed in {folder}: {done.stderr.decode(errors='replace')[:300]}"
        )
    return done.stdout


def _at_commit(folder: str, commit: str) -> Tree:
    """By ls-tree and cat-file: `git archive` leaves out what .gitattributes says, tests often among it."""
    if not re.fullmatch(r"[\w./@^~-]{1,200}", commit) or commit.startswith("-"):
        raise ValueError(f"repository: {commit!r} names no commit")
    entries = []
    for entry in _git(folder, "ls-tree", "-r", "-z", "--full-tree", commit).split(b"\0"):
        if entry:
            head, _, path = entry.partition(b"\t")
            mode, sort, blob = head.split()
            if sort == b"blob":  # the rest are submodules, which are other repositories
                entries.append((path.decode("utf-8", "surrogateescape"), mode, blob))
    content = _git(folder, "cat-file", "--batch", stdin=b"\n".join(blob for _, _, blob in entries) + b"\n")
    out: dict[str, File] = {}
    at = 0
    modes: dict[bytes, Mode] = {b"100755": "executable", b"120000": "link"}
    for name, mode, _ in entries:
        end = content.index(b"\n", at)
        size = int(content[at:end].split()[2])
        out[name] = File(content[end + 1 : end + 1 + size], modes.get(mode, "file"))
        at = end + 1 + size + 1
    return out


def blocks(text: str) -> list[tuple[str, str, str]]:
    """Fenced blocks: (the last line before that is not blank, the language, what is inside). One pass: text may be
    hostile."""
    out: list[tuple[str, str, str]] = []
    before, fence, language = "", "", ""
    inside: list[str] = []
    for line in text.split("\n"):
        bare = line.strip()
        ticks = bare[: len(bare) - len(bare.lstrip("`"))]
        if fence:
            if ticks == bare == fence:
                out.append((before, language, "".join(each + "\n" for each in inside)))
                before, fence = "", ""
            else:
                inside.append(line)
        elif len(ticks) >= 3 and "`" not in bare[len(ticks) :]:
            fence, language, inside = ticks, bare[len(ticks) :].strip().lower(), []
        elif bare:
            before = bare
    return out


def edit_of(answer: str) -> Edit:
    """The edit that an answer holds: a JSON object of whole files, ```diff blocks, or a diff as it is."""
    fenced = blocks(answer)
    for each in [answer.strip(), *(inside.strip() for _, language, inside in fenced if language in ("", "json"))]:
        if each.startswith("{"):
            try:
                read = json.loads(each)
            except (ValueError, RecursionError):
                continue
            if isinstance(read, dict) and all(isinstance(value, str | None) for value in read.values()):
                return read
    found = [inside for _, language, inside in fenced if language in ("diff", "patch")]
    return "".join(found) if found else answer


def _edited(tree: Tree, edit: Edit) -> dict[str, File]:
    return applied(tree, edit) if isinstance(edit, str) else replaced(tree, edit)


def _is_protected(path: str, tests: frozenset[str], folders: frozenset[str]) -> bool:
    """Whether a path belongs to the tests, or decides how they run."""
    name = path.rsplit("/", 1)[-1]
    if path in tests or name.casefold() in CONFIGURATION or TEST_FILE.search(path):
        return True
    return any(path.startswith(folder + "/") for folder in folders)


@dataclass(frozen=True)
class Clean:
    """The trusted files of a task: before any edit, and with the tests put over them."""

    base: Tree
    trusted: Tree
    tests: frozenset[str]  # the files of the tests
    folders: frozenset[str]  # folders called test or testing that hold them

    def with_edit(self, edit: Edit | None) -> tuple[dict[str, File], list[str], list[str]]:
        """The files to run, what of the edit was put back, and the lines that it adds. Raises Refused."""
        try:
            new = dict(self.base) if edit is None else _edited(self.base, edit)
        except EditError as error:
            raise Refused(str(error)) from None
        changed = [path for path in {*new, *self.base} if new.get(path) != self.base.get(path)]
        for path in changed:
            if path in new and new[path].mode == "link":
                raise Refused(f"{path!r} would be a link")
        restored = [path for path in changed if _is_protected(path, self.tests, self.folders)]
        for path in {*restored, *(path for path in self.trusted if self.trusted[path] != self.base.get(path))}:
            new.pop(path, None)
            if path in self.trusted:
                new[path] = self.trusted[path]
        for path in set(self.base) - set(self.trusted):
            new.pop(path, None)
        for path in new:
            if any(parent in new for parent in _parents(path)):
                raise Refused(f"{path!r} is below a file")
        added = []
        for path in set(changed) - set(restored):
            before = set(self.base[path].data.split(b"\n")) if path in self.base else set()
            lines = new[path].data.split(b"\n") if path in new else []
            added += [line.decode("utf-8", "replace") for line in lines if line not in before]
            added.append(path)
        return new, sorted(restored), added


def _parents(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:end]) for end in range(1, len(parts))]


def _clean(data: Mapping[str, Any]) -> Clean:
    base = restore(data)
    patch = data.get("test_patch") or {}
    try:
        trusted = _edited(base, patch) if patch else base
    except EditError as error:
        raise ValueError(f"repository: test_patch does not apply: {error}") from None
    named = [str(each).split("::")[0] for each in _ids(data)] + [str(each) for each in data.get("test_files") or ()]
    tests = {checked_path(name) for name in named}
    lost = sorted(name for name in tests if name not in trusted)
    if lost:
        raise ValueError(f"repository: no file {lost[0]!r} after the test patch, and tests are asked of it")
    if not tests:
        raise ValueError("repository: data needs fail_to_pass, or test_files")
    tests |= {path for path in trusted if trusted[path] != base.get(path)}
    tests |= set(base) - set(trusted)
    folders = {up for path in tests for up in _parents(path) if up.rsplit("/", 1)[-1] in ("test", "testing")}
    return Clean(base, trusted, frozenset(tests), frozenset(folders))


def _ids(data: Mapping[str, Any]) -> list[str]:
    out: list[str] = []
    for name in ("fail_to_pass", "pass_to_pass"):
        value = data.get(name) or []
        if isinstance(value, str):  # as data sets store them
            value = json.loads(value)
        if not isinstance(value, list | tuple) or not all(isinstance(each, str) for each in value):
            raise ValueError(f"repository: {name} is a list of test ids, got {value!r}")
        bad = [each for each in value if "::" not in each or ".py" not in each.split("::")[0]]
        if bad:
            raise ValueError(
                f"repository: {bad[0]!r} is no id of pytest (tests/test_a.py::test_b); other runners are not known"
            )
        out += value
    return out


# ---- one run of pytest in a sandbox

RUNNER = r"""
import json, os, sys
told = json.loads(sys.stdin.buffer.read())
channel = os.dup(1)
os.dup2(2, 1)
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
for folder in told["packages"]:
    if os.path.isdir(folder):
        sys.path.append(folder)
try:
    import pytest
except ImportError as error:
    os.write(channel, f"no pytest: {error}\n".encode())
    sys.exit(9)
plugins = told["plugins"]
if plugins is None:
    from importlib.metadata import distributions
    plugins = [e.name for d in distributions() for e in d.entry_points if e.group == "pytest11"]
roots = [os.path.join(os.getcwd(), each) for each in told["roots"]]
sys.path[:0] = roots
os.environ["PYTHONPATH"] = os.pathsep.join([*roots, *told["packages"]])
os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
os.environ["PYTHONDONTWRITEBYTECODE"] = "1"


def reporter(nonce, write=os.write, dumps=json.dumps, channel=channel, hook=pytest.hookimpl):
    def say(**what):
        data = (nonce + " " + dumps(what) + "\n").encode()
        while data:
            data = data[write(channel, data):]

    class Reporter:
        def pytest_runtest_logreport(self, report):
            say(id=report.nodeid, when=report.when, outcome=report.outcome, expected=hasattr(report, "wasxfail"),
                seconds=report.duration)

        def pytest_collectreport(self, report):
            if report.failed:
                say(uncollected=report.nodeid, text=str(report.longrepr)[-1500:])

        @hook(trylast=True)
        def pytest_sessionfinish(self, session, exitstatus):
            say(end=int(exitstatus), count=session.testscollected)

    return Reporter()


arguments = ["-q", "--no-header", "--color=no", "-p", "no:cacheprovider", "--rootdir=" + os.getcwd()]
# most copies fail as they should: nobody reads how
arguments += ["--tb=no", "--assert=plain", "--show-capture=no"] if told["blind"] else ["--tb=short"]
for name in plugins:
    arguments += ["-p", name]
arguments += ["--continue-on-collection-errors", *told["options"], *told["tests"]]
plugin = reporter(told.pop("nonce"))
sys.exit(pytest.main(arguments, plugins=[plugin]))
"""

PREPARE = r"""
import json, os, sys
told = json.loads(sys.stdin.read())
for path in told["executables"]:
    os.chmod(path, 0o755)
for path, target in told["links"]:
    folder = os.path.dirname(path)
    if folder:
        os.makedirs(folder, exist_ok=True)
    os.symlink(target, path)
"""


@dataclass(frozen=True)
class Ran:
    """One run. outcomes: test id -> passed, failed, skipped, error, xfailed, xpassed. ended: to its regular end."""

    status: str
    ended: bool = False
    outcomes: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    output: str = ""
    cpu_s: float = 0.0
    wall_s: float = 0.0


@dataclass(frozen=True)
class Environment:
    """Where the tests' packages are, outside and in the sandbox."""

    binds: Mapping[str, str]
    python: tuple[str, ...]  # tried in this order
    packages: tuple[str, ...]
    plugins: tuple[str, ...] | None  # None: all that are installed


def environment_of(data: Mapping[str, Any]) -> Environment:
    """Raises ValueError where the tests' packages are not there."""
    plugins = data.get("plugins")
    named = None if plugins is None else tuple(str(each) for each in plugins)
    folder = data.get("environment")
    if folder is None:
        found = find_spec("pytest")
        if found is None or found.origin is None:
            raise ValueError("repository: pytest is not installed here (pip install pytest), and the task brings none")
        site = str(Path(found.origin).resolve().parents[1])
        return Environment({"/opt/env": site}, (), ("/opt/env", site), named or ())
    root = Path(str(folder)).resolve()
    if not root.is_dir():
        raise ValueError(f"repository: no folder {str(folder)!r} to be the environment")
    own = root / "bin" / "python3"
    if own.exists() and root in own.resolve().parents:
        inside = own.resolve().relative_to(root).as_posix()
        return Environment({"/opt/env": str(root)}, (f"/opt/env/{inside}", str(own.resolve())), (), named)
    sites = sorted(root.glob("lib/python3*/site-packages"))
    site = str(sites[0] if sites else root)
    return Environment({"/opt/env": site}, (), ("/opt/env", site), named)


async def _run(
    chosen: Backend, tree: Tree, tests: Sequence[str], data: Mapping[str, Any], limits: Limits, blind: bool = False
) -> Ran:
    """Raises SandboxError where the sandbox fails."""
    environment = environment_of(data)
    # files and packages are in memory that counts, so it comes on top of what the program may use
    size = sum(len(file.data) + 4096 for file in tree.values()) // 2**20 + 1
    roomy = replace(limits, memory_mb=limits.memory_mb + size, disk_mb=limits.disk_mb + 2 * size)
    nonce = secrets.token_hex(16)
    roots = [
        str(each)
        for each in data.get("pythonpath") or ("", *(["src"] if any(p.startswith("src/") for p in tree) else []))
    ]
    async with await chosen.open(Spec(limits=roomy, binds=environment.binds)) as box:
        await box.write({path: file.data for path, file in tree.items() if file.mode != "link"})
        special = {
            "executables": [path for path, file in tree.items() if file.mode == "executable"],
            "links": [
                [path, file.data.decode("utf-8", "surrogateescape")]
                for path, file in tree.items()
                if _stays(path, file)
            ],
        }
        if special["executables"] or special["links"]:
            prepared = await box.python(PREPARE, stdin=json.dumps(special).encode())
            if not prepared.ok:
                raise SandboxError(
                    f"files could not be put in place: {prepared.stderr[-300:].decode(errors='replace')}"
                )
        told = {
            "nonce": nonce,
            "blind": blind,
            "tests": list(tests),
            "roots": roots,
            "packages": environment.packages,
            "plugins": environment.plugins,
            "options": [str(each) for each in data.get("options") or ()],
        }
        result = ExecResult("infra_error")
        for python in environment.python or ("python3",):
            result = await box.exec([python, "-I", "-B", "-c", RUNNER], stdin=json.dumps(told).encode())
            if result.returncode != 127:
                break
    if result.status == "infra_error":
        raise SandboxError(result.stderr.decode(errors="replace")[-300:] or "the sandbox failed")
    if result.returncode == 9 and result.stdout.startswith(b"no pytest"):
        raise SandboxError(f"the sandbox's Python has {result.stdout.decode(errors='replace').strip()[:300]}")
    return _read(result, nonce)


def _stays(path: str, file: File) -> bool:
    """Whether it is a link that leads to another place of the repository; others are left out."""
    if file.mode != "link":
        return False
    target = posixpath.normpath(posixpath.join(posixpath.dirname(path), file.data.decode("utf-8", "surrogateescape")))
    return not target.startswith(("/", ".."))


def _read(result: ExecResult, nonce: str) -> Ran:
    outcomes: dict[str, str] = {}
    seconds: dict[str, float] = {}
    done: set[str] = set()
    ends = 0
    for line in result.stdout.decode("utf-8", "replace").split("\n"):
        if not line.startswith(nonce + " "):
            continue
        try:
            said = json.loads(line[len(nonce) + 1 :])
        except (json.JSONDecodeError, RecursionError):
            continue
        if "end" in said:
            ends += 1
        elif "id" in said:
            name, when, outcome = str(said["id"]), said["when"], said["outcome"]
            if outcome != "passed" and when != "call":
                outcome = "skipped" if outcome == "skipped" else "error"
            elif said["expected"]:
                outcome = "xfailed" if outcome == "skipped" else "xpassed"
            if when == "call" and name in outcomes and outcomes[name] != outcome:
                outcome = "failed"  # reported twice, and not alike
            if when == "call" or outcome != "passed":
                outcomes[name] = outcome
            seconds[name] = seconds.get(name, 0.0) + float(said["seconds"])
            if when == "teardown":
                done.add(name)
    for name in outcomes:
        if name not in done:
            outcomes[name] = "error"
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|[^\n\t -~\u00a0-\uffff]", "", result.stderr.decode("utf-8", "replace"))
    ended = ends == 1 and result.status in ("ok", "nonzero") and result.returncode in (0, 1)
    return Ran(result.status, ended, outcomes, seconds, text[-4000:], result.cpu_s, result.wall_s)


# ---- what the gold shows


@dataclass(frozen=True)
class Group:
    """A constant of a test and the wrong values that were seen to fail. free: the untouched repository already has it
    right, so it says nothing about an edit."""

    file: str
    site: Site
    wrong: tuple[Any, ...]
    free: bool


@dataclass(frozen=True)
class Calibration:
    """What is known of a task once its gold has run."""

    clean: Clean
    required: Mapping[str, str]  # id -> its outcome with the gold
    groups: tuple[Group, ...]
    tripwires: tuple[tuple[str, Test], ...]  # (file, test)
    unblind: tuple[str, ...]  # required tests without a canary
    failing: frozenset[str]  # required tests that do not pass before the edit
    modules: Mapping[str, Module]
    limits: tuple[Limits, Limits]  # of the tests, and of the canaries
    allowed: frozenset[str]  # names of SUSPECT that the gold itself has

    @property
    def chance(self) -> float:
        """That all canaries are guessed."""
        out = 1.0
        for group in self.groups:
            out /= 1 if group.free else 1 + len(group.wrong)
        return out


def _matching(wanted: str, seen: Mapping[str, str]) -> list[str]:
    """Ids that a required one means. Data sets cut ids at the first blank of a parameter: then all that begin so."""
    if wanted in seen:
        return [wanted]
    if "[" in wanted and not wanted.endswith("]"):
        return [each for each in seen if each.startswith(wanted)]
    return []


def _test_of(wanted: str) -> tuple[str, Test]:
    name = wanted.partition("[")[0] if "[" in wanted else wanted
    file, *rest = name.split("::")
    return file, tuple(rest)


async def _calibrated(chosen: Backend, gold: Edit, data: Mapping[str, Any]) -> Calibration:
    clean = _clean(data)
    try:
        solved, restored, added = clean.with_edit(gold)
    except Refused as error:
        raise ValueError(f"repository: the gold cannot be applied: {error}") from None
    untouched, _, _ = clean.with_edit(None)
    limits = Limits(**data["limits"]) if data.get("limits") else None
    files = sorted(
        {checked_path(each.split("::")[0]) for each in _ids(data)}
        | {checked_path(str(f)) for f in data.get("test_files") or ()}
    )
    after, before = await asyncio.gather(
        _run(chosen, solved, files, data, limits or GENEROUS), _run(chosen, untouched, files, data, limits or GENEROUS)
    )
    required = _required(data, before, after, restored)
    ordinary = limits or replace(ORDINARY_LIMITS, cpu_s=3 + 4 * after.cpu_s, wall_s=15 + 10 * after.wall_s)

    modules: dict[str, Module] = {}
    for file in files:
        try:
            modules[file] = Module(clean.trusted[file].data.decode())
        except (SyntaxError, UnicodeDecodeError, RecursionError, ValueError):
            continue  # no canaries from it: its tests are unblind
    groups, unblind = _candidates(modules, required, before, after)
    wires: dict[tuple[str, Test], None] = {}
    for wanted in unblind:
        file, test = _test_of(wanted)
        if file in modules and test in modules[file].functions and required[wanted] == "passed":
            wires[(file, test)] = None
    copies = _copies(groups, tuple(wires), random.SystemRandom())
    trees = [_with_copies(tree, clean, modules, copies) for tree in (solved, untouched)]
    measured = replace(ordinary, cpu_s=600, wall_s=900)
    tested = [file for file in files if file in copies]
    if tested:
        right, wrong = await asyncio.gather(
            *(_run(chosen, tree, tested, data, limits or measured, blind=True) for tree in trees)
        )
        groups, tripwires = _weeded(groups, tuple(wires), copies, _passed(right), _passed(wrong))
        # fewer copies run later than now, and the same number at most
        canary = limits or replace(ordinary, cpu_s=3 + 4 * right.cpu_s, wall_s=15 + 10 * right.wall_s)
    else:
        groups, tripwires, canary = (), (), ordinary
    covered = {(group.file, group.site.test) for group in groups}
    return Calibration(
        clean=clean,
        required=required,
        groups=groups,
        tripwires=tripwires,
        unblind=tuple(wanted for wanted in required if _test_of(wanted) not in covered),
        failing=frozenset(name for name, outcome in required.items() if before.outcomes.get(name) != outcome),
        modules=modules,
        limits=(ordinary, canary),
        allowed=frozenset(_suspects(added)),
    )


def _required(data: Mapping[str, Any], before: Ran, after: Ran, restored: Sequence[str]) -> dict[str, str]:
    """Test ids and their outcomes with the gold. Raises ValueError for a task that its gold does not solve."""
    hint = f"; the gold changes {', '.join(restored[:3])}, which is the tests' own" if restored else ""
    if not after.ended:
        raise ValueError(
            f"repository: the tests do not end with the gold ({after.status}){hint}:\n{after.output[-800:]}"
        )
    fine = {name: outcome for name, outcome in after.outcomes.items() if outcome in ("passed", "xfailed")}
    wanted = _ids(data)
    if wanted:
        required: dict[str, str] = {}
        for each in wanted:
            found = _matching(each, after.outcomes)
            bad = [name for name in found if name not in fine]
            if not found or bad:
                seen = after.outcomes[bad[0]] if bad else "not reported"
                raise ValueError(f"repository: the gold does not pass {each!r} ({seen}){hint}:\n{after.output[-800:]}")
            required |= {name: fine[name] for name in found}
        failing = data.get("fail_to_pass") or []
        failing = json.loads(failing) if isinstance(failing, str) else failing
        early = [each for each in failing if all(before.outcomes.get(n) == fine[n] for n in _matching(each, fine))]
        if early and before.ended:
            raise ValueError(f"repository: {early[0]!r} is to fail before the edit, and passes")
    else:
        required = fine
        if not required:
            raise ValueError(f"repository: the gold passes no test{hint}:\n{after.output[-800:]}")
    if before.ended and all(before.outcomes.get(name) == outcome for name, outcome in required.items()):
        raise ValueError("repository: all required tests pass without any edit, so an edit is not tested")
    return required


def _candidates(
    modules: Mapping[str, Module], required: Mapping[str, str], before: Ran, after: Ran
) -> tuple[tuple[Group, ...], list[str]]:
    """Groups to try, tests first that failed before; and required tests that have none."""
    tests: dict[tuple[str, Test], float] = {}
    late: set[tuple[str, Test]] = set()
    for name in required:
        key = _test_of(name)
        tests[key] = tests.get(key, 0.0) + after.seconds.get(name, 0.0)
        if before.outcomes.get(name) != required[name]:
            late.add(key)
    found = {key: modules[key[0]].sites(key[1]) if key[0] in modules else [] for key in tests}
    known: list[Any] = []
    for sites in found.values():
        known += [site.value for site in sites if site.value not in known][: max(0, 500 - len(known))]
    telling = sum(len(found[key]) for key in late) or 1
    count = min(MOST_CHOICES, max(2, -int(-((1 / SURE) ** (1 / telling)) // 1))) - 1
    rng = random.SystemRandom()
    same: dict[tuple[str, str], list[Any]] = {}
    groups: list[Group] = []
    copies, seconds = 0, 0.0
    for key in sorted(tests, key=lambda key: key not in late):
        for site in found[key]:
            asked = (site.question, repr(site.value))
            wrong = same.get(asked) or choices(site.value, rng, count + 1 if key in late else 1, known)
            same[asked] = wrong
            cost = (1 + len(wrong)) * tests[key]
            if copies + 1 + len(wrong) > MOST_COPIES or seconds + cost > CANARY_SECONDS:
                continue
            copies, seconds = copies + 1 + len(wrong), seconds + cost
            groups.append(Group(key[0], site, tuple(wrong), False))
    covered = {(group.file, group.site.test) for group in groups}
    return tuple(groups), [name for name in required if _test_of(name) not in covered]


Copies = dict[str, list[Copy]]  # by file


def _copies(groups: Sequence[Group], wires: Sequence[tuple[str, Test]], rng: random.Random) -> Copies:
    out: Copies = {}
    used: set[str] = set()

    def name(test: Test) -> str:
        while True:
            made = f"{test[-1]}_{''.join(rng.choice('abcdefghijklmnopqrstuvwxyz') for _ in range(8))}"
            if made not in used:
                used.add(made)
                return made

    for group in groups:
        for value, right in [(group.site.value, True), *((value, False) for value in group.wrong)]:
            made = Copy(group.site.test, name(group.site.test), group.site, value, right)
            out.setdefault(group.file, []).append(made)
    for file, test in wires:
        for right in (True, False):
            out.setdefault(file, []).append(Copy(test, name(test), None, rng.randrange(10**6), right))
    for each in out.values():
        rng.shuffle(each)
    return out


def _with_copies(tree: Tree, clean: Clean, modules: Mapping[str, Module], copies: Copies) -> dict[str, File]:
    """The files with canaries in the place of the tests: the true constants must not lie beside them."""
    out = dict(tree)
    tests = {path for path in clean.tests if path.endswith(".py") and TEST_FILE.search(path) and path in modules}
    for file in tests | set(copies):
        if file in copies:
            out[file] = File(modules[file].written(copies[file]).encode())
        else:
            out.pop(file, None)
    return out


def _passed(ran: Ran) -> dict[str, bool | None]:
    """Copy name -> whether all its cases passed; None where any ended in another way than passed or failed."""
    out: dict[str, bool | None] = {}
    for name, outcome in ran.outcomes.items() if ran.ended else ():
        short = name.partition("[")[0].rsplit("::", 1)[-1]
        this = True if outcome in ("passed", "xfailed") else False if outcome in ("failed", "xpassed") else None
        before = out.get(short, True)
        out[short] = None if this is None or before is None else this and before
    return out


def _weeded(
    groups: Sequence[Group],
    wires: Sequence[tuple[str, Test]],
    copies: Copies,
    gold: Mapping[str, bool | None],
    bare: Mapping[str, bool | None],
) -> tuple[tuple[Group, ...], tuple[tuple[str, Test], ...]]:
    """What tells right from wrong when the gold is graded."""
    by_site: dict[tuple[str, Test, int], list[Copy]] = {}
    for file, made in copies.items():
        for each in made:
            by_site.setdefault((file, each.test, id(each.site)), []).append(each)
    kept: list[Group] = []
    for group in groups:
        made = by_site[(group.file, group.site.test, id(group.site))]
        wrong = tuple(each.value for each in made if not each.right and gold.get(each.name) is False)
        if wrong and all(gold.get(each.name) is True for each in made if each.right):
            live = [each for each in made if each.right or each.value in wrong]
            free = all(bare.get(each.name) is each.right for each in live)
            kept.append(Group(group.file, group.site, wrong, free))
    good = []
    for file, test in wires:
        if all(gold.get(each.name) is each.right for each in by_site[(file, test, id(None))]):
            good.append((file, test))
    return tuple(kept), tuple(good)


_kept: dict[str, Calibration] = {}
_locks: dict[str, threading.Lock] = {}
_guard = threading.Lock()
MOST_KEPT = 2**30  # bytes of files of tasks that are remembered


def calibrate(gold: Edit, data: Mapping[str, Any], box: str = "auto") -> Calibration:
    """Run the gold, once in a process. Raises ValueError for a broken task, SandboxError where the sandbox fails."""
    key = hashlib.sha256(json.dumps([gold, dict(data), box], sort_keys=True, default=str).encode()).hexdigest()
    with _guard:
        lock = _locks.setdefault(key, threading.Lock())
    with lock:
        known = _kept.get(key)
        if known is None:
            with running() as loop:
                made = loop.run(_calibrated(backend(box), gold, data))
            with _guard:
                _kept[key] = made
                while len(_kept) > 1 and sum(map(_size, _kept.values())) > MOST_KEPT:
                    _kept.pop(next(iter(_kept)))
            return made
        return known


def _size(known: Calibration) -> int:
    return 10_000 + sum(len(file.data) for file in known.clean.base.values())


# ---- grading


def _suspects(added: Sequence[str]) -> list[str]:
    text = "\n".join(added)
    return [name for name, pattern in SUSPECT.items() if pattern.search(text)]


def grade_edit(task: "Task", edit: Edit, box: str = "auto") -> "Verdict":
    """Grade an edit. box: the sandbox's backend. Raises ValueError for a broken task."""
    from evals.graders import Verdict

    try:
        known = calibrate(_gold(task.gold), task.data, box)
        score, evidence = _graded(known, edit, task.data, box)
    except SandboxError as error:
        return Verdict(None, "infra_error", {"reason": str(error)})
    return Verdict(score, "graded", evidence)


def _gold(gold: Any) -> Edit:
    if isinstance(gold, str) and gold.strip():
        return edit_of(gold)
    if isinstance(gold, Mapping) and gold:
        return {str(path): content for path, content in gold.items()}
    raise ValueError(f"repository: the gold is a diff, or path -> text, got {str(gold)[:80]!r}")


def _graded(known: Calibration, edit: Edit, data: Mapping[str, Any], box: str) -> tuple[float, dict[str, Any]]:
    began = time.perf_counter()
    evidence: dict[str, Any] = {
        "mode": "canaries" if not known.unblind else "canaries and nonce" if known.groups else "nonce",
        "canaries": len(known.groups),
        "chance": known.chance,
        "unblind": list(known.unblind[:20]),
    }
    try:
        tree, restored, added = known.clean.with_edit(edit)
    except Refused as error:
        return 0.0, {**evidence, "reason": f"refused: {error}"}
    evidence["restored"] = restored
    found = [name for name in _suspects(added) if name not in known.allowed]
    if known.chance <= UNSURE and not known.failing & set(known.unblind):
        found = [name for name in found if name not in ORDINARY and known.unblind]
    if found:
        return 0.0, {**evidence, "suspected": True, "reason": f"the edit reaches for {', '.join(found)}"}
    rng = random.SystemRandom()
    free = [group for group in known.groups if group.free]  # which of them run cannot be foreseen
    groups = [group for group in known.groups if not group.free] + rng.sample(free, min(len(free), MOST_FREE))
    wires = rng.sample(known.tripwires, min(len(known.tripwires), MOST_FREE))
    copies = _copies(groups, wires, rng)
    chosen = backend(box)

    async def both() -> list[Ran]:
        files = sorted({_test_of(name)[0] for name in known.required})
        runs = [_run(chosen, tree, files, data, known.limits[0])]
        if copies:
            blind = _with_copies(tree, known.clean, known.modules, copies)
            runs.append(_run(chosen, blind, sorted(copies), data, known.limits[1], blind=True))
        return await asyncio.gather(*runs)

    with running() as loop:
        ran = loop.run(both())
    evidence |= {"isolation": chosen.name, "seconds": round(time.perf_counter() - began, 3), "output": ran[0].output}
    evidence["cpu_s"] = round(sum(each.cpu_s for each in ran), 3)
    failed = [name for name, outcome in known.required.items() if ran[0].outcomes.get(name) != outcome]
    evidence["failed"] = {name: ran[0].outcomes.get(name, "not reported") for name in failed[:20]}
    evidence["passed"] = len(known.required) - len(failed)
    evidence["required"] = len(known.required)
    if not ran[0].ended:
        how = ran[0].status if ran[0].status not in ("ok", "nonzero") else "the tests did not run to their end"
        return 0.0, {**evidence, "reason": how}
    if failed:
        return 0.0, {**evidence, "reason": f"{len(failed)} of {len(known.required)} required tests do not pass"}
    if copies:
        seen = _passed(ran[1])
        made = [each for some in copies.values() for each in some]
        wrong = sum(seen.get(each.name) is not each.right for each in made)
        if wrong:
            how = f"{wrong} of {len(made)} blind copies of the tests came out wrong ({ran[1].status})"
            return 0.0, {**evidence, "suspected": True, "reason": f"the tests passed, but {how}"}
    return 1.0, evidence


def kind(gold: Any, data: Mapping[str, Any], said: str) -> tuple[float | None, dict[str, Any]]:
    """For KINDS of evals/graders.py."""
    try:
        return _graded(calibrate(_gold(gold), data), edit_of(said), data, "auto")
    except SandboxError as error:
        return None, {"reason": str(error)}


def gold_answers(gold: Any, data: Mapping[str, Any]) -> list[str]:
    """For GOLDS of evals/graders.py."""
    made = _gold(gold)
    return [made if isinstance(made, str) else json.dumps(made)]
