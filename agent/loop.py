"""A model at work on a repository: it calls tools in a sandbox until it submits, and what it changed comes back.

    trace = solve(policy, "Fix issue 12: ...", files)     ->  Trace(ended="submitted", diff="diff --git ...", ...)

    messages, TOOLS ──> policy ──> assistant message ──> tool calls ──> one sandbox, one working copy
          ^                                                                    │
          └──────────── {"role": "tool", "tool_call_id", "content"} ───────────┘      at the end: what differs

    policy     (messages, tools) -> an assistant message as in OpenAI's and Kimi's format: {"role": "assistant",
               "content", "reasoning_content", "tool_calls": [{"id", "type", "function": {"name", "arguments"}}]};
               it may be async. "usage": {"completion_tokens": n} in it counts against the budget of tokens, and
               "finish_reason": "length" says that the message was cut off; neither stays in the conversation.
    tools      bash, create_file, insert, view, str_replace, submit: the names that Kimi's own runs of SWE-bench use
    budget     steps, seconds, tokens, length of what a tool says; a tool's error is a tool result, not the end

The files come without history. The diff is not made by anything the model could have changed: when its last command has
ended with all its processes, a program of ours reads the working copy, and this process compares. The sandbox is gone
before `solve` returns, so that what grades the diff starts anew. Links that the model made are left out and named.
"""

import asyncio
import base64
import hashlib
import inspect
import json
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from agent.edit import EditError, File, Mode, Tree, checked_path, difference
from agent.sandbox import Backend, Limits, Sandbox, SandboxError, Spec, backend, running

Message = dict[str, Any]
Policy = Callable[[list[Message], list[dict[str, Any]]], Message | Awaitable[Message]]
Ended = Literal["submitted", "finished", "steps", "time", "tokens", "context", "length", "policy_error", "infra_error"]
LARGEST_FILE = 4 * 2**20  # bytes of a file that a tool or the diff reads
MOST_FILES = 200_000  # of a working copy, that are looked at
LARGEST_CHANGE = 32 * 2**20  # bytes of all changed files together

SYSTEM = (
    "You work on a software repository with the tools given. Find the cause of what the task describes, change the "
    "repository's source so that it is done, and check your work. Then call submit. Tests decide: they are run on a "
    "fresh copy with your changes to everything but tests and their configuration."
)


@dataclass(frozen=True)
class Budget:
    """What a trace may use. tokens: generated ones, as the policy counts them; None: no limit."""

    steps: int = 100
    wall_s: float = 1800.0
    tokens: int | None = None
    command_s: float = 120.0
    shown: int = 16_000  # characters of one tool result

    def __post_init__(self) -> None:
        for name, value in self.__dict__.items():
            if value is not None and (isinstance(value, bool) or not value > 0):
                raise ValueError(f"budget: {name} must be positive, got {value!r}")
        if self.shown < 200:
            raise ValueError(f"budget: shown must be 200 characters or more, got {self.shown}")


@dataclass(frozen=True)
class Call:
    """One tool call and its result. ok False: the tool could not do it, and said why."""

    id: str
    name: str
    arguments: str
    result: str
    ok: bool
    seconds: float


@dataclass(frozen=True)
class Step:
    """One message of the policy and what its calls gave."""

    message: Message
    calls: tuple[Call, ...]
    seconds: float  # of the policy alone
    tokens: int


@dataclass(frozen=True)
class Trace:
    """All that happened. ended: how; diff: what the working copy differs in, None for infra_error.

    "finished": a message without a tool call; "length": such a one that was cut off at its token limit; "steps",
    "time", "tokens": the budget; "context": the conversation no longer fits the model."""

    ended: Ended
    diff: str | None
    messages: tuple[Message, ...]
    steps: tuple[Step, ...]
    seconds: float
    isolation: str
    why: str = ""  # of context, policy_error and infra_error
    left_out: tuple[str, ...] = ()  # changes that the diff cannot hold: links, files too large

    @property
    def tokens(self) -> int:
        return sum(step.tokens for step in self.steps)


def _tool(name: str, what: str, required: Sequence[str] = (), **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(required)}
    return {"type": "function", "function": {"name": name, "description": what, "parameters": parameters}}


_PATH = {"type": "string", "description": "Path below the repository's root."}
TOOLS: tuple[dict[str, Any], ...] = (
    _tool(
        "bash",
        "Run a command with bash. The working directory is kept from call to call; variables and processes are not.",
        ["command"],
        command={"type": "string", "description": "The command."},
    ),
    _tool(
        "create_file",
        "Create a file. Fails if it exists.",
        ["path", "content"],
        path=_PATH,
        content={"type": "string", "description": "The whole content."},
    ),
    _tool(
        "insert",
        "Insert text into a file after a line.",
        ["path", "line", "text"],
        path=_PATH,
        line={"type": "integer", "description": "After this line, counted from 1; 0 is the start of the file."},
        text={"type": "string", "description": "The text, whole lines."},
    ),
    _tool(
        "view",
        "Show a file with line numbers, or what a folder holds, two levels deep.",
        ["path"],
        path=_PATH,
        first={"type": "integer", "description": "First line, from 1."},
        last={"type": "integer", "description": "Last line, inclusive."},
    ),
    _tool(
        "str_replace",
        "Replace a text in a file. The old text must occur exactly once, blanks and line ends included.",
        ["path", "old", "new"],
        path=_PATH,
        old={"type": "string", "description": "The text to replace."},
        new={"type": "string", "description": "The text to put in its place."},
    ),
    _tool("submit", "Say that the work is done. Nothing can be changed afterwards."),
)


class ContextFull(Exception):
    """A policy raises it when the conversation has outgrown its context. The trace ends; what was done counts."""


class ToolError(Exception):
    """What a tool tells the model when it cannot do what was asked."""


class CommandFailed(ToolError):
    """What a command wrote, and how it ended."""


# ---- the working copy


LISTING = r"""
import os, sys
top = sys.argv[1] if len(sys.argv) > 1 else sys.stdin.read()
out = []
for root, folders, files in os.walk(top):
    depth = 0 if root == top else os.path.relpath(root, top).count(os.sep) + 1
    folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
    out += [os.path.relpath(os.path.join(root, name), top) + "/" for name in folders]
    out += [os.path.relpath(os.path.join(root, name), top) for name in sorted(files) if not name.startswith(".")]
    if depth >= 1:
        folders[:] = []
sys.stdout.write("\n".join(sorted(out)[:1000]))
"""

# what differs from the files that were put there, read by a program of ours when nothing else runs
CHANGES = r"""
import base64, hashlib, json, os, stat, sys
told = json.loads(sys.stdin.read())
known, most, total = told["known"], told["most"], told["total"]
changed, left_out, seen, waiting, count = {}, [], set(), [""], 0
while waiting:
    folder = waiting.pop()
    try:
        names = sorted(os.listdir(folder or "."))
    except OSError:
        left_out.append(folder)
        continue
    for name in names:
        path = folder + "/" + name if folder else name
        count += 1
        if count > told["files"]:
            left_out.append("(more than %d files)" % told["files"])
            waiting = []
            break
        try:
            info = os.lstat(path)
            if stat.S_ISDIR(info.st_mode):
                if name in (".git", "__pycache__", ".pytest_cache"):
                    continue
                (waiting if path.count("/") < 60 else left_out).append(path)
                continue
            if name.endswith(".pyc") and path not in known:
                continue
            seen.add(path)
            if stat.S_ISLNK(info.st_mode):
                data, mode = os.fsencode(os.readlink(path)), "link"
            elif stat.S_ISREG(info.st_mode) and info.st_size <= most:
                mode = "executable" if info.st_mode & 0o100 else "file"
                with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
                    data = file.read(most + 1)
            else:
                left_out.append(path)
                continue
        except OSError:
            left_out.append(path)
            continue
        if known.get(path) == [mode, hashlib.sha256(data).hexdigest()]:
            continue
        total -= len(data)
        if mode == "link" or total < 0:
            left_out.append(path)
        else:
            changed[path] = [mode, base64.b64encode(data).decode()]
gone = [path for path in known if path not in seen] if count <= told["files"] else []
print(json.dumps({"changed": changed, "gone": gone, "left_out": left_out[:1000]}))
"""

PLACE = r"""
import json, os, sys
told = json.loads(sys.stdin.read())
for path in told["executables"]:
    os.chmod(path, 0o755)
for path, target in told["links"]:
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    os.symlink(target, path)
"""


class Workplace:
    """A working copy in a sandbox, and the tools that act on it."""

    def __init__(self, box: Sandbox, files: Tree, budget: Budget):
        self.box, self.files, self.budget = box, files, budget
        self.limits = replace(box.spec.limits, wall_s=budget.command_s)
        self.folder = ""
        self.root = ""

    async def lay_out(self) -> None:
        """Put the files in place."""
        await self.box.write({path: file.data for path, file in self.files.items() if file.mode != "link"})
        special = {
            "executables": [path for path, file in self.files.items() if file.mode == "executable"],
            "links": [[path, file.data.decode()] for path, file in self.files.items() if file.mode == "link"],
        }
        await self._own(PLACE, special)
        self.root = (await self._own("import os; print(os.getcwd())", None)).decode().strip()
        self.folder = self.root

    async def _own(self, source: str, told: Any) -> bytes:
        """A program of ours. Raises SandboxError unless it ends well."""
        limits = replace(self.limits, wall_s=120, cpu_s=120, output_kb=2 * LARGEST_CHANGE // 1024)
        result = await self.box.python(source, stdin=json.dumps(told).encode(), limits=limits)
        if not result.ok:
            raise SandboxError(f"{result.status}: {result.stderr[-300:].decode(errors='replace')}")
        return result.stdout

    async def changes(self) -> tuple[str, tuple[str, ...]]:
        """The diff, and what it leaves out."""
        known = {path: [file.mode, hashlib.sha256(file.data).hexdigest()] for path, file in self.files.items()}
        told = {"known": known, "most": LARGEST_FILE, "total": LARGEST_CHANGE, "files": MOST_FILES}
        read = json.loads(await self._own(CHANGES, told))
        after = dict(self.files)
        left_out = list(read["left_out"])
        for path in read["gone"]:
            after.pop(path, None)
        for path, (mode, data) in read["changed"].items():
            try:
                after[checked_path(path)] = File(base64.b64decode(data), _mode(mode))
            except EditError:  # a name that no diff may hold
                left_out.append(path)
        return difference(self.files, after), tuple(left_out)

    # ---- tools

    async def call(self, name: str, arguments: Any) -> str:
        """Raises ToolError with what to tell the model."""
        known = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
        if name not in known:
            raise ToolError(f"no tool {name!r}; there are {', '.join(known)}")
        if not isinstance(arguments, dict):
            raise ToolError(f"arguments must be a JSON object, got {type(arguments).__name__}")
        properties = known[name]["properties"]
        for key in known[name]["required"]:
            if key not in arguments:
                raise ToolError(f"{name} needs {key!r}")
        for key, value in arguments.items():
            if key not in properties:
                raise ToolError(f"{name} has no argument {key!r}; it takes {', '.join(properties) or 'none'}")
            wanted = str if properties[key]["type"] == "string" else int
            if not isinstance(value, wanted) or isinstance(value, bool):
                raise ToolError(f"{name}: {key} must be {properties[key]['type']}, got {value!r:.80}")
        return str(await getattr(self, name)(**arguments))

    async def bash(self, command: str) -> str:
        if "\0" in command:
            raise ToolError("the command holds a null byte")
        mark = secrets.token_hex(8)
        # where the command ends is said behind a mark: the next one starts there
        program = f'trap \'printf "\\n{mark}%s" "$PWD"\' EXIT\ncd -- "$1" || exit 1\nset --\n{command}'
        result = await self.box.exec(["bash", "-c", program, "bash", self.folder], limits=self.limits)
        if result.status == "infra_error":
            raise SandboxError(result.stderr.decode(errors="replace"))
        said, _, folder = result.stdout.decode("utf-8", "replace").rpartition(f"\n{mark}")
        if folder.startswith("/") and "\0" not in folder and result.status in ("ok", "nonzero"):
            self.folder = folder
        else:
            said = result.stdout.decode("utf-8", "replace")
        error = result.stderr.decode("utf-8", "replace")
        said = "\n".join(part.rstrip("\n") for part in (said, error) if part.strip())
        if result.status == "ok":
            return said or "(no output)"
        how = {"nonzero": f"exit code {result.returncode}", "timeout": f"ended after {self.limits.wall_s:g} seconds"}
        raise CommandFailed(f"{said}\n[{how.get(result.status, result.status)}]".lstrip("\n"))

    def _path(self, path: str) -> str:
        inside = path.removeprefix(self.root + "/") if path.startswith("/") else path
        try:
            return checked_path(inside)
        except ValueError as error:
            raise ToolError(str(error)) from None

    async def _read(self, path: str) -> str:
        try:
            return (await self.box.read(self._path(path), LARGEST_FILE)).decode()
        except UnicodeDecodeError:
            raise ToolError(f"{path} is not UTF-8 text") from None
        except ValueError as error:
            raise ToolError(_plain(str(error))) from None

    async def _write(self, path: str, text: str) -> None:
        try:
            await self.box.write({self._path(path): text.encode("utf-8", "replace")})
        except ValueError as error:
            raise ToolError(_plain(str(error))) from None

    async def create_file(self, path: str, content: str) -> str:
        try:
            await self.box.read(self._path(path), LARGEST_FILE)
        except ValueError as error:
            if "FileNotFoundError" not in str(error):
                raise ToolError(_plain(str(error))) from None
            await self._write(path, content)
            return f"{path} created"
        raise ToolError(f"{path} exists; use str_replace or insert")

    async def insert(self, path: str, line: int, text: str) -> str:
        lines = (await self._read(path)).split("\n")
        count = len(lines) - (lines[-1] == "")
        if not 0 <= line <= count:
            raise ToolError(f"line must be from 0 to {count}, got {line}")
        lines[line:line] = text.removesuffix("\n").split("\n")
        await self._write(path, "\n".join(lines))
        return self._around("\n".join(lines), line, text.count("\n") + 1)

    async def str_replace(self, path: str, old: str, new: str) -> str:
        text = await self._read(path)
        found = text.count(old) if old else 0
        if found != 1:
            raise ToolError(f"old must occur exactly once in {path}, it occurs {found} times")
        at = text.index(old)
        await self._write(path, text[:at] + new + text[at + len(old) :])
        return self._around(text[:at] + new + text[at + len(old) :], text.count("\n", 0, at), new.count("\n") + 1)

    async def view(self, path: str, first: int = 1, last: int | None = None) -> str:
        if path.rstrip("/") in ("", ".", self.root):
            return await self._listing(self.root)
        inside = self._path(path.rstrip("/"))
        try:
            text = (await self.box.read(inside, LARGEST_FILE)).decode("utf-8", "replace")
        except ValueError as error:
            if "no regular file" not in str(error):
                raise ToolError(_plain(str(error))) from None
            return await self._listing(f"{self.root}/{inside}")
        lines = text.split("\n")
        end = len(lines) if last is None or last < 0 else min(last, len(lines))
        if not 1 <= first <= max(end, 1):
            raise ToolError(f"{path} has {len(lines)} lines; there is nothing from {first} to {end}")
        return "\n".join(f"{number:6}\t{line}" for number, line in enumerate(lines[first - 1 : end], first))

    async def _listing(self, folder: str) -> str:
        result = await self.box.python(LISTING, stdin=folder.encode("utf-8", "surrogateescape"))
        return result.stdout.decode("utf-8", "replace") or "(empty)"

    @staticmethod
    def _around(text: str, line: int, count: int) -> str:
        lines = text.split("\n")
        start = max(0, line - 3)
        shown = enumerate(lines[start : line + count + 3], start + 1)
        return "done; it reads now:\n" + "\n".join(f"{number:6}\t{each}" for number, each in shown)


def _mode(name: str) -> Mode:
    return "executable" if name == "executable" else "file"


def _plain(error: str) -> str:
    """An error of the sandbox's, as the model should read it."""
    return error.split(": ", 1)[-1] if error.startswith(("FileNotFoundError", "OSError")) else error


def shorten(text: str, most: int) -> str:
    """Head and tail of a long text, and how much is left out between."""
    if len(text) <= most:
        return text
    kept = most - 80
    head = text[: kept // 2]
    tail = text[len(text) - kept // 2 :]
    return f"{head}\n... [{len(text) - len(head) - len(tail)} characters left out] ...\n{tail}"


# ---- the loop


def _calls(message: Message) -> list[tuple[str, str, Any]]:
    """(id, name, arguments as they came). Raises ValueError for what is no assistant message."""
    if not isinstance(message, dict) or message.get("role") != "assistant":
        raise ValueError(f"the policy must give an assistant message, got {str(message)[:200]}")
    out = []
    for number, call in enumerate(message.get("tool_calls") or ()):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"tool call {number} has no function name: {str(call)[:200]}")
        name = function["name"]
        out.append((str(call.get("id") or f"functions.{name}:{number}"), name, function.get("arguments")))
    return out


async def _do(work: Workplace, id: str, name: str, given: Any) -> Call:
    began = time.monotonic()
    arguments: Any = given
    try:
        if not isinstance(given, dict):
            arguments = json.loads(given) if given and given.strip() else {}
        result, ok = await work.call(name, arguments), True
    except (json.JSONDecodeError, RecursionError, AttributeError) as error:
        result, ok = f"error: the arguments are no JSON: {error}", False
    except CommandFailed as error:
        result, ok = str(error), False
    except ToolError as error:
        result, ok = f"error: {error}", False
    text = given if isinstance(given, str) else json.dumps(given)
    return Call(id, name, text, shorten(result, work.budget.shown), ok, time.monotonic() - began)


async def attempt(
    policy: Policy,
    task: str | Sequence[Message],
    files: Tree,
    *,
    budget: Budget | None = None,
    spec: Spec | None = None,
    chosen: Backend | None = None,
) -> Trace:
    """Let a policy work on files until it submits, calls no tool, or its budget is used up.

    task: what is asked, or the messages to begin with. spec: the sandbox, whose limits hold for each command.
    Raises ValueError for what the caller got wrong; whatever policy and sandbox do is in the trace.
    """
    budget = budget or Budget()
    chosen = chosen or backend("auto")
    opening: list[Message] = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": task}]
    messages: list[Message] = opening if isinstance(task, str) else [dict(each) for each in task]
    steps: list[Step] = []
    began = time.monotonic()
    limits = Limits(wall_s=budget.command_s, cpu_s=budget.command_s, memory_mb=2048, pids=128, disk_mb=512)
    ended: Ended = "steps"
    diff: str | None = None
    why, left_out = "", tuple[str, ...]()
    try:
        async with await chosen.open(spec or Spec(limits=limits)) as box:
            work = Workplace(box, files, budget)
            await work.lay_out()
            ended, why = await _loop(work, policy, messages, steps, began)
            diff, left_out = await work.changes()
    except (SandboxError, TimeoutError) as error:
        ended, why = "infra_error", str(error) or "the sandbox did not answer"
    seconds = time.monotonic() - began
    return Trace(ended, diff, tuple(messages), tuple(steps), seconds, chosen.name, why, left_out)


async def _loop(
    work: Workplace, policy: Policy, messages: list[Message], steps: list[Step], began: float
) -> tuple[Ended, str]:
    budget = work.budget
    while len(steps) < budget.steps:
        left = budget.wall_s - (time.monotonic() - began)
        if left <= 0:
            return "time", ""
        start = time.monotonic()
        try:
            message = await asyncio.wait_for(_ask(policy, [dict(each) for each in messages], TOOLS), left)
            calls = _calls(message)
        except TimeoutError:
            return "time", "the policy did not answer in time"
        except ContextFull as error:
            return "context", str(error)
        except SandboxError:
            raise
        except Exception as error:  # noqa: BLE001  a policy is anyone's code, and its failure is what the trace reports
            return "policy_error", f"{type(error).__name__}: {error}"
        usage = message.get("usage") or {}
        tokens = int(usage.get("completion_tokens") or 0)
        messages.append({key: value for key, value in message.items() if key not in ("usage", "finish_reason")})
        seconds = time.monotonic() - start
        done: list[Call] = []
        submitted = False
        for id, name, given in calls:
            left = budget.wall_s - (time.monotonic() - began)
            if submitted or left <= 0:
                break
            if name == "submit":
                submitted = True
                done.append(
                    Call(id, name, given if isinstance(given, str) else json.dumps(given), "submitted", True, 0.0)
                )
            else:
                work.limits = replace(work.limits, wall_s=max(0.1, min(budget.command_s, left)))
                done.append(await _do(work, id, name, given))
            messages.append({"role": "tool", "tool_call_id": id, "name": name, "content": done[-1].result})
        steps.append(Step(message, tuple(done), seconds, tokens))
        if submitted:
            return "submitted", ""
        if not calls:
            return ("length" if message.get("finish_reason") == "length" else "finished"), ""
        if budget.tokens is not None and sum(step.tokens for step in steps) >= budget.tokens:
            return "tokens", ""
    return "steps", ""


async def _ask(policy: Policy, messages: list[Message], tools: Sequence[dict[str, Any]]) -> Message:
    own = [dict(tool) for tool in tools]
    answer: Any
    if inspect.iscoroutinefunction(policy):
        answer = policy(messages, own)
    else:
        call: Callable[..., Any] = policy
        answer = await asyncio.to_thread(call, messages, own)
    return await answer if inspect.isawaitable(answer) else answer


def answer(policy: Policy, messages: Sequence[Message], seconds: float) -> Message:
    """One message of a policy, without tools. Raises TimeoutError when the seconds are over, and what it raises."""
    with running() as loop:
        return loop.run(asyncio.wait_for(_ask(policy, [dict(each) for each in messages], ()), max(0.0, seconds)))


def solve(policy: Policy, task: str | Sequence[Message], files: Tree, **options: Any) -> Trace:
    """`attempt` for programs that do not await."""
    with running() as loop:
        return loop.run(attempt(policy, task, files, **options))


@dataclass
class Script:
    """A policy that has its calls written down: [("bash", {"command": "ls"}), ...]; what it was shown is kept."""

    calls: Sequence[tuple[str, Any]]
    seen: list[list[Message]] = field(default_factory=list)

    def __call__(self, messages: list[Message], tools: list[dict[str, Any]]) -> Message:
        self.seen.append(messages)
        at = len(self.seen) - 1
        if at >= len(self.calls):
            return {"role": "assistant", "content": "done"}
        name, arguments = self.calls[at]
        text = arguments if isinstance(arguments, str) else json.dumps(arguments)
        call = {"id": f"functions.{name}:{at}", "type": "function", "function": {"name": name, "arguments": text}}
        return {"role": "assistant", "content": "", "tool_calls": [call]}
