"""Run what a model wrote, without trusting it.

    with sandbox() as box:                                 the strongest backend that works here
        box.write({"main.py": b"print(6 * 7)"})
        result = box.exec(["python3", "main.py"])          ->  ExecResult(status="ok", stdout=b"42\\n", ...)

    async with await backend("auto").open() as box: ...    the same, for many at once

    bwrap        bubblewrap: namespaces, an empty environment, tmpfs of fixed size, seccomp, another user. A pool keeps
                 a few started; each is used once.
    landlock     Landlock and seccomp: no root, no package. Files, TCP, signals; what it leaves open is in its report.
    kubernetes   a pod in a cluster (agent/kubernetes.py): for many machines. Only where it is asked for or configured.
    none         a plain child process with limits: for people who know what they run. It must be asked for by name,
                 with allow_unsafe=True, and everything made with it says "isolation: none".

In every sandbox runs one process of ours (agent/inside.py) that starts and watches the commands. The host keeps
its own clock: a sandbox that does not answer in time is killed. When the host goes away, by exit, SIGINT or SIGKILL,
the process of ours reads the end of its pipe, kills what is left and goes too.

Needs Linux. On other systems every backend's report says so.
"""

import ast
import asyncio
import contextlib
import marshal
import os
import platform
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from agent import seccomp

Status = Literal["ok", "nonzero", "timeout", "memory", "output_limit", "disk", "killed", "infra_error"]
NOBODY = 65534
GRACE = 5.0  # seconds after a command's limit in which the sandbox must have answered
LARGEST = 256 * 2**20  # bytes of one answer

T = TypeVar("T")
S = TypeVar("S", bound="Sandbox")


@dataclass(frozen=True)
class Limits:
    """Of one command with all processes it starts. Raises ValueError for what is not positive."""

    wall_s: float = 10.0
    cpu_s: float = 10.0
    memory_mb: int = 1024
    pids: int = 32
    disk_mb: int = 64
    output_kb: int = 1024

    def __post_init__(self) -> None:
        for name, value in self.__dict__.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
                raise ValueError(f"limits: {name} must be a positive number, got {value!r}")


@dataclass(frozen=True)
class ExecResult:
    """How a command ended. infra_error: the sandbox failed, which says nothing about the command."""

    status: Status
    returncode: int | None = None  # negative: the signal
    stdout: bytes = b""
    stderr: bytes = b""
    truncated: bool = False
    wall_s: float = 0.0
    cpu_s: float = 0.0
    max_rss_mb: float = 0.0

    @property
    def ok(self) -> bool:
        return self.status == "ok"


@dataclass(frozen=True)
class Spec:
    """What a sandbox holds. binds: place inside to folder outside, read-only. limits: of commands that name none;
    disk_mb is the size of its work folder for its whole life."""

    limits: Limits = Limits()
    network: bool = False
    binds: Mapping[str, str] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for inside, outside in self.binds.items():
            if not inside.startswith("/") or ".." in inside.split("/") or not Path(outside).exists():
                raise ValueError(f"binds: {inside!r} must be an absolute place, and {outside!r} must exist")
        for name, value in self.env.items():
            if not name or "=" in name or "\0" in name + value:
                raise ValueError(f"env: {name!r} is no name of a variable, or its value holds a null byte")


@dataclass(frozen=True)
class Guarantee:
    """One thing that holds in a sandbox, or does not, as tried: `seen` is what was observed."""

    name: str
    holds: bool
    seen: str


@dataclass(frozen=True)
class Report:
    """What a backend can do here. available False: `why` says what is missing."""

    backend: str
    available: bool
    why: str = ""
    guarantees: tuple[Guarantee, ...] = ()

    @property
    def isolation(self) -> str:
        """For results: the backend and what it does not guarantee here."""
        if self.backend == "none":
            return "none"
        missing = [guarantee.name for guarantee in self.guarantees if not guarantee.holds]
        return self.backend + (f" without {', '.join(missing)}" if missing else "")


class SandboxError(OSError):
    """The sandbox itself failed: it could not be started, or it is gone. Never the command's fault."""


class Backend(Protocol):
    """Opens sandboxes of one kind."""

    name: str

    def missing(self) -> str | None:
        """Why it cannot work here; None if nothing speaks against it."""

    async def open(self, spec: Spec | None = None) -> "Sandbox":
        """A new sandbox. Raises SandboxError if none can be had."""

    async def close(self) -> None:
        """Ends what it keeps started."""


# ---- one sandbox, as the host sees it


class Sandbox:
    """One sandbox: commands, files, one at a time. Made by a backend."""

    def __init__(self, spec: Spec, process: Any, work: Path | None = None):
        """process: of asyncio's, or what has its stdin, stdout and stderr, with `_end` to suit."""
        self.spec = spec
        self._process = process
        self._work = work  # a folder of the host's that goes with it
        self._lock = asyncio.Lock()
        self._channel: Channel | None = None
        self._inner: int | None = None
        self._closed = False

    async def __aenter__(self) -> "Sandbox":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def exec(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        limits: Limits | None = None,
    ) -> ExecResult:
        """Run a command to its end. cwd: inside, the work folder if left out. A command that cannot be started ends
        with return code 127."""
        if isinstance(argv, str | bytes) or not argv or not all(isinstance(part, str) for part in argv):
            raise ValueError(f"argv is a list of strings, got {argv!r}")
        return await self._run({"argv": list(argv), "env": dict(env or {}), "cwd": cwd}, stdin, limits)

    async def python(
        self,
        source: str,
        *,
        stdin: bytes = b"",
        env: Mapping[str, str] | None = None,
        limits: Limits | None = None,
    ) -> ExecResult:
        """Run a Python program in a copy of the sandbox's own interpreter: no start-up, no site-packages."""
        if not isinstance(source, str):
            raise ValueError(f"source is text, got {type(source).__name__}")
        return await self._run({"source": source, "env": dict(env or {})}, stdin, limits)

    async def spawn(
        self,
        argv: Sequence[str] | None = None,
        *,
        source: str | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        limits: Limits | None = None,
    ) -> "Channel":
        """Start a command, or a Python program, to talk with."""
        if (argv is None) == (source is None):
            raise ValueError("spawn takes argv or source, one of them")
        command = {"source": source} if argv is None else {"argv": list(argv)}
        async with self._lock:
            self._usable()
            self._channel = await self._spawn(
                {**command, "env": dict(env or {}), "cwd": cwd}, limits or self.spec.limits
            )
            return self._channel

    async def write(self, files: Mapping[str, bytes]) -> None:
        """Put files into the work folder, folders as needed. Raises ValueError for a path that leads out of it."""
        payload = b"".join(files.values())
        header = {"op": "write", "files": [(path, len(data)) for path, data in files.items()]}
        await self._ask(header, payload, "written")

    async def read(self, path: str, max_bytes: int = 2**20) -> bytes:
        """A regular file of the work folder. Raises ValueError if there is none, or it is longer."""
        return (await self._ask({"op": "read", "path": path, "most": max_bytes}, b"", "content"))[1]

    @property
    def alive(self) -> bool:
        """Whether its own process runs, as far as is known here."""
        return self._process.returncode is None

    async def close(self) -> None:
        """End it, with all that runs in it."""
        if self._closed:
            return
        self._closed = True
        await self._end()

    # ---- the pipe

    async def _run(self, command: dict[str, Any], stdin: bytes, limits: Limits | None) -> ExecResult:
        limits = limits or self.spec.limits
        async with self._lock:
            self._usable()
            try:
                await self._send({"op": "exec", **command, "limits": limits.__dict__}, stdin)
                header, payload = await asyncio.wait_for(self._receive(), limits.wall_s + GRACE)
            except TimeoutError:
                await self._fail()
                return ExecResult("infra_error", stderr=b"the sandbox did not answer in time")
            except SandboxError as error:
                status, text = await self._blame() or ("infra_error", str(error))
                await self._fail()
                return ExecResult(status, stderr=text.encode())
            except asyncio.CancelledError:
                await self._fail()
                raise
            if header["op"] == "error":
                return ExecResult("infra_error", stderr=header["text"].encode())
            return _result(header, payload)

    async def _spawn(self, command: dict[str, Any], limits: Limits) -> "Channel":
        await self._send({"op": "spawn", **command, "limits": limits.__dict__})
        return Channel(self, limits)

    async def _ask(self, header: dict[str, Any], payload: bytes, wanted: str) -> tuple[dict[str, Any], bytes]:
        async with self._lock:
            self._usable()
            try:
                await self._send(header, payload)
                answer, data = await asyncio.wait_for(self._receive(), 30 + GRACE)
            except (TimeoutError, asyncio.CancelledError):
                await self._fail()
                raise
            if answer["op"] == "error":
                raise ValueError(answer["text"].removeprefix("ValueError: "))
            assert answer["op"] == wanted, f"asked for {wanted}, got {answer['op']}"
            return answer, data

    async def _blame(self) -> tuple[Status, str] | None:
        """What a command did that ended the whole sandbox; None if it is the sandbox that failed."""
        return None

    def _usable(self) -> None:
        if self._closed:
            raise SandboxError("the sandbox is closed")
        if self._channel is not None and not self._channel.ended:
            raise SandboxError("a spawned command is still running in this sandbox")

    async def _send(self, header: dict[str, Any], payload: bytes = b"") -> None:
        text = marshal.dumps({**header, "size": len(payload)})
        try:
            self._process.stdin.write(struct.pack(">I", len(text)) + text + payload)
            await self._process.stdin.drain()
        except (BrokenPipeError, ConnectionResetError) as error:
            raise SandboxError(f"the sandbox is gone: {error}") from None

    async def _receive(self) -> tuple[dict[str, Any], bytes]:
        stream = self._process.stdout
        try:
            (length,) = struct.unpack(">I", await stream.readexactly(4))
            if length > 2**20:
                raise SandboxError(f"an answer with a header of {length} bytes")
            header = ast.literal_eval((await stream.readexactly(length)).decode())
            if not 0 <= header["size"] <= LARGEST:
                raise SandboxError(f"an answer of {header['size']} bytes")
            return header, await stream.readexactly(header["size"])
        except asyncio.IncompleteReadError:
            raise SandboxError("the sandbox ended without an answer") from None

    async def _fail(self) -> None:
        self._closed = True
        await self._end()

    async def _end(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        # process 1 of the namespace takes all others with it; bwrap outside then ends by itself and is reaped
        if self._inner is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(self._inner, signal.SIGKILL)
        try:
            await asyncio.wait_for(asyncio.shield(self._process.wait()), GRACE)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                self._process.kill()
            await self._process.wait()
        if self._work is not None:
            await asyncio.to_thread(_remove, self._work)


class Channel:
    """A running command: send and receive bytes. `ended` is true after its end was received."""

    def __init__(self, box: Sandbox, limits: Limits):
        self._box, self._limits = box, limits
        self._kept = bytearray()
        self.stderr = bytearray()
        self.result: ExecResult | None = None

    @property
    def ended(self) -> bool:
        return self.result is not None

    async def send(self, data: bytes) -> None:
        """To its standard input."""
        if not self.ended:
            await self._box._send({"op": "feed"}, data)

    async def finish_input(self) -> None:
        """Close its standard input."""
        if not self.ended:
            await self._box._send({"op": "end"})

    async def receive(self, size: int) -> bytes:
        """Exactly so many bytes of its standard output; fewer if it ends before."""
        while len(self._kept) < size and not self.ended:
            await self._step()
        data = bytes(self._kept[:size])
        del self._kept[:size]
        return data

    async def receive_line(self, most: int = 2**20) -> bytes:
        """Up to and with the next newline; without one if it ends, or the line is longer than `most`."""
        while b"\n" not in self._kept and len(self._kept) < most and not self.ended:
            await self._step()
        at = self._kept.find(b"\n", 0, most)
        size = at + 1 if at >= 0 else min(most, len(self._kept))
        data = bytes(self._kept[:size])
        del self._kept[:size]
        return data

    async def kill(self) -> ExecResult:
        """End it now."""
        if not self.ended:
            await self._box._send({"op": "kill"})
        return await self.wait()

    async def wait(self) -> ExecResult:
        """Until it has ended. What it still writes is kept for `receive`."""
        while self.result is None:
            await self._step()
        return self.result

    async def _step(self) -> None:
        try:
            header, payload = await asyncio.wait_for(self._box._receive(), self._limits.wall_s + GRACE)
        except (TimeoutError, SandboxError) as error:
            text = str(error) or "the sandbox did not answer in time"
            status: Status = "infra_error"
            if isinstance(error, SandboxError):
                status, text = await self._box._blame() or (status, text)
            self.result = ExecResult(status, stderr=text.encode())
            await self._box._fail()
            return
        if header["op"] == "out":
            self._kept += payload
        elif header["op"] == "err":
            self.stderr += payload
        elif header["op"] == "done":
            self.result = replace(_result(header, payload), stderr=bytes(self.stderr) + payload[header["out"] :])
        elif header["op"] == "error":
            self.result = ExecResult("infra_error", stderr=header["text"].encode())


def _result(header: Mapping[str, Any], payload: bytes) -> ExecResult:
    at = header["out"]
    measured = {name: header[name] for name in ("wall_s", "cpu_s", "max_rss_mb", "truncated", "returncode", "status")}
    return ExecResult(stdout=payload[:at], stderr=payload[at:], **measured)


# ---- starting the process of ours


# What the sandbox's interpreter is started with: it reads the program of ours from stdin, as code or as source, and
# its settings, each with its length in front. Arguments would be copied by every exec on the way.
FIRST = """import marshal,os
def take(size):
    data=b""
    while len(data)<size:
        more=os.read(0,size-len(data))
        if not more:
            os._exit(0)
        data+=more
    return data
def part():
    return marshal.loads(take(int.from_bytes(take(4),"big")))
def program(source,names):
    exec(source,names)
exec(part())
main(part())"""


def source_inside() -> str:
    """Of the sandbox's own process."""
    return (Path(__file__).parent / "inside.py").read_text(encoding="utf-8")


@lru_cache(maxsize=4)
def _packed(python: str) -> bytes:
    """The program of the sandbox's own process, compiled for an interpreter."""
    compiling = (
        "import marshal,sys;"
        "sys.stdout.buffer.write(marshal.dumps(compile(sys.stdin.read(),'inside','exec',optimize=2)))"
    )
    done = subprocess.run(
        [python, "-I", "-S", "-c", compiling], input=source_inside().encode(), capture_output=True, timeout=60
    )
    if done.returncode:
        said = done.stderr.decode(errors="replace")[-300:]
        raise SandboxError(f"{python} cannot run the sandbox's own process: {said}")
    return done.stdout


def parts(*given: bytes) -> bytes:
    """As FIRST reads them."""
    return b"".join(struct.pack(">I", len(part)) + part for part in given)


def _readable_by_others(path: Path) -> bool:
    """Whether another user can reach a folder or file."""
    try:
        return all(part.stat().st_mode & 0o001 for part in path.resolve().parents) and bool(
            path.stat().st_mode & (0o001 if path.is_dir() else 0o004)
        )
    except OSError:
        return False


@dataclass(frozen=True)
class Python:
    """The interpreter of a sandbox: `prefix` is the folder that it needs, empty where it is below /usr."""

    path: str
    prefix: str


@lru_cache(maxsize=1)
def find_python() -> Python | None:
    """The one that runs this, where the sandbox's user can read it; else the system's, from 3.9 on."""
    prefix = Path(sys.base_prefix).resolve()
    own = prefix / "bin" / f"python{sys.version_info[0]}.{sys.version_info[1]}"
    if own.exists() and (os.geteuid() != 0 or _readable_by_others(own)):
        return Python(str(own), "" if prefix == Path("/usr") else str(prefix))
    system = Path("/usr/bin/python3")
    if system.exists():
        done = subprocess.run(
            [system, "-c", "import sys;print(sys.version_info>=(3,9))"], capture_output=True, text=True
        )
        if done.stdout.strip() == "True":
            return Python(str(system), "")
    return None


def _lacking() -> str | None:
    """What every isolating backend needs and this machine has not."""
    if os.geteuid() == 0 and shutil.which("setpriv") is None:
        return "setpriv (util-linux) is not installed"
    return None if find_python() else f"no Python that user {NOBODY} can read"


def _python_of(each: Backend) -> Python:
    """The interpreter for a backend's sandboxes. Raises SandboxError where the backend cannot work."""
    why = each.missing()
    if why:
        raise SandboxError(why)
    python = find_python()
    assert python is not None, "nothing is missing"
    return python


def _search_path(python: Python) -> str:
    return f"{python.prefix}/bin:/usr/bin:/bin" if python.prefix else "/usr/bin:/bin"


def _drop() -> list[str]:
    """A prefix for commands of root: another user, no groups."""
    if os.geteuid() != 0:
        return []
    return ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--no-new-privs", "--"]


def _remove(folder: Path) -> None:
    """A work folder whose content may be another user's, with rights that hinder."""
    for root, folders, _ in os.walk(folder):
        for name in folders:
            path = os.path.join(root, name)
            if not os.path.islink(path):
                with contextlib.suppress(OSError):
                    os.chmod(path, 0o700)
    shutil.rmtree(folder, ignore_errors=True)


async def _begin(
    command: Sequence[str], settings: Mapping[str, Any], python: str, pass_fds: Sequence[int] = ()
) -> asyncio.subprocess.Process:
    given = parts(_packed(python), marshal.dumps(dict(settings)))
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            "-I",
            "-S",
            "-c",
            FIRST,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={},
            cwd="/",
            start_new_session=True,
            pass_fds=tuple(pass_fds),
            limit=2**20,
        )
    except OSError as error:
        raise SandboxError(f"the sandbox could not be started: {error}") from None
    assert process.stdin is not None, "started with a pipe"
    process.stdin.write(given)
    return process


async def ready(box: S, timeout: float = 30.0) -> S:
    """The sandbox, when its own process has said that it runs; closed, and SandboxError, if it does not."""
    try:
        header, _ = await asyncio.wait_for(box._receive(), timeout)
        assert header["op"] == "ready"
    except (SandboxError, TimeoutError) as error:
        said = b""
        if box._process.stderr is not None:
            with contextlib.suppress(TimeoutError):
                said = await asyncio.wait_for(box._process.stderr.read(2000), 1.0)
        await box._fail()
        reason = said.decode(errors="replace").strip().splitlines()[-1:] or [str(error) or "no answer"]
        raise SandboxError(f"the sandbox could not be started: {reason[0]}") from None
    except asyncio.CancelledError:
        await box._fail()
        raise
    return box


class Pool:
    """Keeps sandboxes of one kind started, each for one use. size 0: each is started when it is asked for."""

    def __init__(self, size: int, spec: Spec, start: Callable[[Spec], Coroutine[Any, Any, Sandbox]]):
        if size < 0:
            raise ValueError(f"pool must not be negative, got {size}")
        self.size, self.spec, self._start = size, spec, start
        self._waiting: list[asyncio.Task[Sandbox]] = []

    async def take(self, spec: Spec | None = None) -> Sandbox:
        """One of the kind that is kept; another kind is started."""
        if not self.size or spec not in (None, self.spec):
            return await self._start(spec or self.spec)
        self._fill()
        task = self._waiting.pop(0)
        self._fill()
        try:
            box = await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(_discard)
            raise
        if not box.alive:  # died while it waited
            await box.close()
            return await self._start(self.spec)
        return box

    async def close(self) -> None:
        waiting, self._waiting = self._waiting, []
        for task in waiting:
            with contextlib.suppress(SandboxError):
                await (await task).close()

    def _fill(self) -> None:
        while len(self._waiting) < self.size:
            self._waiting.append(asyncio.create_task(self._start(self.spec)))


# ---- bubblewrap


class Bwrap:
    """Sandboxes in namespaces of their own. pool: so many of the default kind are kept started."""

    name = "bwrap"

    def __init__(self, pool: int = 0, spec: Spec | None = None):
        self.spec = spec or Spec()
        self._pool = Pool(pool, self.spec, self._start)

    def missing(self) -> str | None:
        if sys.platform != "linux":
            return "bubblewrap needs Linux"
        if shutil.which("bwrap") is None:
            return "bubblewrap is not installed (Debian, Fedora: package bubblewrap)"
        return _lacking()

    async def open(self, spec: Spec | None = None) -> Sandbox:
        return await self._pool.take(spec)

    async def close(self) -> None:
        await self._pool.close()

    async def _start(self, spec: Spec) -> Sandbox:
        python = _python_of(self)
        inside = Python("/opt/py/bin/" + Path(python.path).name, "/opt/py") if python.prefix else python
        rules = os.memfd_create("seccomp")
        os.write(rules, seccomp.program(platform.machine(), spec.network))
        os.lseek(rules, 0, os.SEEK_SET)
        info_read, info_write = os.pipe()
        command = [*_drop(), "bwrap", *_namespaces(spec, python.prefix)]
        command += ["--seccomp", str(rules), "--info-fd", str(info_write), "--chdir", "/work", "--", inside.path]
        settings = {
            "work": "/work",
            "scratch": ["/tmp", "/work", "/dev/shm"],
            "alone": True,
            "env": {"PATH": _search_path(inside), "HOME": "/tmp", "LANG": "C.UTF-8", **spec.env},
        }
        try:
            process = await _begin(command, settings, python.path, (rules, info_write))
        finally:
            os.close(rules)
            os.close(info_write)
        box = Sandbox(spec, process)
        try:
            await ready(box)
            with contextlib.suppress(ValueError, KeyError, SyntaxError):
                box._inner = int(ast.literal_eval(os.read(info_read, 4096).decode())["child-pid"])
        finally:
            os.close(info_read)
        return box


def _discard(task: "asyncio.Task[Sandbox]") -> None:
    """A sandbox that nobody waits for any more."""
    if not task.cancelled() and task.exception() is None:
        closing = asyncio.ensure_future(task.result().close())
        closing.add_done_callback(lambda _: None)


@lru_cache(maxsize=1)
def _bwrap_options() -> str:
    return subprocess.run(["bwrap", "--help"], capture_output=True, text=True, timeout=10).stdout


def _namespaces(spec: Spec, prefix: str) -> list[str]:
    """What bwrap unshares and mounts. Everything that is mounted writable has a size."""
    disk = spec.limits.disk_mb * 2**20
    options = ["--unshare-user", "--unshare-ipc", "--unshare-pid", "--unshare-uts", "--unshare-cgroup-try"]
    options += [] if spec.network else ["--unshare-net"]
    options += ["--as-pid-1", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--hostname", "sandbox"]
    if "--disable-userns" in _bwrap_options():
        options.append("--disable-userns")
    options += ["--clearenv", "--ro-bind", "/usr", "/usr"]
    for link in ("bin", "sbin", "lib", "lib64", "lib32"):
        at = Path("/") / link
        if at.is_symlink():
            options += ["--symlink", os.readlink(at), str(at)]
        elif at.is_dir():
            options += ["--ro-bind", str(at), str(at)]
    options += ["--perms", "0755", "--dir", "/etc", "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    options += ["--ro-bind-try", "/etc/alternatives", "/etc/alternatives"]
    if spec.network:
        for file in ("/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf", "/etc/ssl"):
            options += ["--ro-bind-try", file, file]
    options += ["--perms", "0755", "--dir", "/opt"]
    if prefix:
        options += ["--ro-bind", prefix, "/opt/py"]
    options += ["--proc", "/proc", "--dev", "/dev", "--size", str(16 * 2**20), "--tmpfs", "/dev/shm"]
    options += ["--remount-ro", "/dev", "--size", str(disk), "--perms", "1777", "--tmpfs", "/tmp"]
    options += ["--size", str(disk), "--perms", "0755", "--tmpfs", "/work"]
    for inside, outside in spec.binds.items():
        options += ["--ro-bind", str(Path(outside).resolve()), inside]
    return [*options, "--remount-ro", "/"]


# ---- Landlock


ABI_SYSCALL = 444
READ, WRITE_TOO = 0b1101, (1 << 16) - 1  # execute, read file, read folder; all kinds of access that were known at ABI 5
OF_FILES = 0b111 | 1 << 14 | 1 << 15


@lru_cache(maxsize=1)
def landlock_abi() -> int:
    """The kernel's version of Landlock; 0 where there is none."""
    import ctypes

    if sys.platform != "linux" or platform.machine() not in seccomp.AUDIT_ARCH:
        return 0
    return max(0, int(ctypes.CDLL(None).syscall(ABI_SYSCALL, None, 0, 1)))


def _landlock(work: Path, readable: Sequence[str]) -> dict[str, Any]:
    abi = landlock_abi()
    files = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)) - 1
    handled = (files, 0b11 if abi >= 4 else 0, 0b11 if abi >= 6 else 0)
    paths = [(path, READ & files) for path in readable]
    paths += [(device, 0b110 & files) for device in ("/dev/null", "/dev/zero", "/dev/full")]
    paths += [(device, 0b100) for device in ("/dev/random", "/dev/urandom", "/etc/ld.so.cache")]
    paths.append((str(work), WRITE_TOO & files))
    return {"handled": handled, "size": 8 if abi < 4 else 16 if abi < 6 else 24, "paths": paths, "of_files": OF_FILES}


class Landlock:
    """Sandboxes without namespaces: each command gives up its rights before it starts."""

    name = "landlock"

    def missing(self) -> str | None:
        if sys.platform != "linux":
            return "Landlock needs Linux"
        if platform.machine() not in seccomp.AUDIT_ARCH:
            return f"no system call filter for {platform.machine()}"
        if landlock_abi() < 1:
            return "this kernel has no Landlock (5.13 and newer, CONFIG_SECURITY_LANDLOCK)"
        return _lacking()

    async def open(self, spec: Spec | None = None) -> Sandbox:
        python = _python_of(self)
        spec = spec or Spec()
        if spec.network:
            raise SandboxError("landlock gives no network: it cannot tell one address from another")
        work = _work_folder()
        system = [path for path in ("/usr", "/lib", "/lib64", "/bin", "/sbin") if Path(path).exists()]
        readable = [*system, *([python.prefix] if python.prefix else []), *spec.binds.values()]
        rules = {
            "landlock": _landlock(work, readable),
            "seccomp": {platform.machine(): seccomp.program(platform.machine(), owner=True).hex()},
        }
        return await _plain(spec, python, work, rules)

    async def close(self) -> None:
        return None


class Unsafe:
    """A child process with limits and nothing else: it reads and writes what its user can."""

    name = "none"

    def __init__(self, allow_unsafe: bool = False):
        if not allow_unsafe:
            raise ValueError(
                "the backend 'none' isolates nothing: what a model wrote can read and change your files. "
                "Say allow_unsafe=True (--allow-unsafe) if that is meant"
            )

    def missing(self) -> str | None:
        return None if os.name == "posix" and find_python() else "no POSIX system with a Python"

    async def open(self, spec: Spec | None = None) -> Sandbox:
        python = _python_of(self)
        return await _plain(spec or Spec(), python, _work_folder(), None)

    async def close(self) -> None:
        return None


def _work_folder() -> Path:
    work = Path(tempfile.mkdtemp(prefix="moonkit-sandbox-")).resolve()
    work.chmod(0o700)
    if os.geteuid() == 0:
        os.chown(work, NOBODY, NOBODY)
    return work


async def _plain(spec: Spec, python: Python, work: Path, rules: Mapping[str, Any] | None) -> Sandbox:
    settings: dict[str, Any] = {
        "work": str(work),
        "alone": False,
        "watch_disk": [str(work)],
        "others": _processes_of(NOBODY if os.geteuid() == 0 else os.getuid()),
        "env": {
            "PATH": _search_path(python),
            "HOME": str(work),
            "TMPDIR": str(work),
            "LANG": "C.UTF-8",
            **spec.env,
        },
    }
    if rules is not None:
        settings["rules"] = dict(rules)
    try:
        process = await _begin([*_drop(), python.path], settings, python.path)
    except SandboxError:
        _remove(work)
        raise
    return await ready(Sandbox(spec, process, work))


def _processes_of(user: int) -> int:
    """Processes and threads that the kernel counts against a user's limit now."""
    count = 0
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if entry.stat().st_uid == user:
                    count += len(os.listdir(f"/proc/{entry.name}/task"))
    return count


# ---- which one


BACKENDS = ("auto", "kubernetes", "bwrap", "landlock", "none")


def backend(name: str = "auto", *, pool: int = 0, allow_unsafe: bool = False) -> Backend:
    """A backend by name; "auto" is the strongest that works here: kubernetes where MOONKIT_K8S_NAMESPACE names one of
    its namespaces, then bwrap, then landlock.

    Raises SandboxError if none does, ValueError for an unknown name and for "none" without allow_unsafe.
    """
    if name not in BACKENDS:
        raise ValueError(f"no sandbox backend {name!r}; known: {', '.join(BACKENDS)}")
    if name == "none":
        return Unsafe(allow_unsafe)
    found: dict[str, Backend] = {"bwrap": Bwrap(pool), "landlock": Landlock()}
    if name == "kubernetes" or (name == "auto" and os.environ.get("MOONKIT_K8S_NAMESPACE")):
        from agent.kubernetes import Kubernetes  # needs packages that others need not have only when it is used

        found = {"kubernetes": Kubernetes(pool), **found}
    if name != "auto":
        return found[name]
    reasons = []
    for each in found.values():
        why = each.missing() or _refused(each)
        if why is None:
            return each
        reasons.append(f"{each.name}: {why}")
    raise SandboxError("no sandbox works here. " + "; ".join(reasons))


_tried: dict[str, str | None] = {}


def _refused(each: Backend) -> str | None:
    """Whether a sandbox really starts: containers and some kernels forbid namespaces. Tried once in a process."""
    if each.name not in _tried:
        with running() as loop:
            try:
                result = loop.run(_try(each))
                _tried[each.name] = None if result.ok else f"a first program ended with {result.status}"
            except SandboxError as error:
                _tried[each.name] = str(error)
    return _tried[each.name]


async def _try(each: Backend) -> ExecResult:
    async with await (type(each)()).open() as box:
        return await box.python("print(1)")


# ---- for programs that do not await


class _Loop:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="sandbox", daemon=True)
        self.thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


@contextlib.contextmanager
def running() -> Iterator[_Loop]:
    """A loop for one block."""
    loop = _Loop()
    try:
        yield loop
    finally:
        loop.close()


class Box:
    """A sandbox without await: `exec`, `python`, `write`, `read` as in Sandbox."""

    def __init__(self, loop: _Loop, box: Sandbox):
        self._loop, self.box = loop, box

    def exec(self, argv: Sequence[str], **options: Any) -> ExecResult:
        return self._loop.run(self.box.exec(argv, **options))

    def python(self, source: str, **options: Any) -> ExecResult:
        return self._loop.run(self.box.python(source, **options))

    def write(self, files: Mapping[str, bytes]) -> None:
        self._loop.run(self.box.write(files))

    def read(self, path: str, max_bytes: int = 2**20) -> bytes:
        return self._loop.run(self.box.read(path, max_bytes))


@contextlib.contextmanager
def sandbox(name: str = "auto", spec: Spec | None = None, allow_unsafe: bool = False) -> Iterator[Box]:
    """One sandbox for one block."""
    chosen = backend(name, allow_unsafe=allow_unsafe)
    with running() as loop:
        box = loop.run(chosen.open(spec))
        try:
            yield Box(loop, box)
        finally:
            loop.run(box.close())
