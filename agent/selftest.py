"""What a sandbox really guarantees here, found by attacking it.

    moonkit sandbox check                 a table for every backend
    report = await inspect(backend)       ->  Report with one Guarantee for each name below

Each attack is a program that prints "breach" and what it got if it succeeds; some leave traces that are looked for from
outside. A guarantee holds if none of its attacks succeeds. The same attacks are the tests of the sandbox.
"""

import asyncio
import contextlib
import json
import os
import platform
import socket
import sys
import tempfile
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from agent.kubernetes import NAMESPACE, Kubernetes
from agent.sandbox import (
    Backend,
    ExecResult,
    Guarantee,
    Limits,
    Report,
    Sandbox,
    SandboxError,
    Spec,
    backend,
)

SMALL = Limits(wall_s=4, cpu_s=2, memory_mb=256, pids=16, disk_mb=16, output_kb=64)


@dataclass
class Outside:
    """What the host puts up to be attacked. `port`, `abstract` and `socket` listen; `secret` is in a file and in the
    environment; `mark` names what an attack leaves behind."""

    folder: Path
    port: int
    abstract: str
    socket: str
    secret: str
    mark: str = field(default_factory=lambda: f"mark{uuid.uuid4().hex[:12]}")
    reached: list[str] = field(default_factory=list)

    @property
    def file(self) -> Path:
        return self.folder / "answers.txt"


@dataclass(frozen=True)
class Attack:
    """A program, in which {port}, {file} and so on are filled in; see `program_of`."""

    name: str
    guarantee: str
    source: str
    statuses: tuple[str, ...] = ()  # it must end in one of these ways
    after: Callable[["ExecResult", Outside], str] | None = None  # a breach seen from outside, or nothing


CALLS = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def tried(name, result):
    if result >= 0:
        print("breach", name, result)
"""


def _survivor(_: ExecResult, outside: Outside) -> str:
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if outside.mark.encode() in Path(f"/proc/{entry.name}/cmdline").read_bytes():
                    return f"process {entry.name} is still there"
    return ""


def _file_changed(_: ExecResult, outside: Outside) -> str:
    if sorted(path.name for path in outside.folder.iterdir()) != ["answers.txt", "socket"]:
        return "the folder outside has other files"
    if outside.file.read_text() != outside.secret:
        return "the file outside has changed"
    return "" if outside.file.stat().st_mode & 0o777 == 0o666 else "the mode of a file outside has changed"


def _reached(_: ExecResult, outside: Outside) -> str:
    return f"a listener outside was reached: {outside.reached[0]}" if outside.reached else ""


def _small(result: ExecResult, _: Outside) -> str:
    return f"{result.max_rss_mb:.0f} MB were used" if result.max_rss_mb > 3 * SMALL.memory_mb else ""


GUARANTEES = {
    "network": "no address is reached, the machine's own neither",
    "sockets": "no socket outside is reached by name or path",
    "reading": "files outside cannot be read",
    "writing": "files outside cannot be made, changed, or given another mode",
    "environment": "no variable of the host is seen",
    "processes": "processes outside are not seen, signalled or traced",
    "kernel": "no namespaces, mounts, tracing, keys, bpf, io_uring; no privileges can be gained",
    "memory": "all processes together, with memory file systems",
    "forks": "processes at one time",
    "disk": "bytes and files",
    "cpu": "seconds of processor of all processes together",
    "time": "seconds by the clock, whatever signals are ignored",
    "output": "bytes of output",
    "survivors": "nothing runs on after the command",
    "own": "the process that watches cannot be killed, stopped, read or spoken for",
}

ATTACKS = (
    Attack(
        "tcp to the host",
        "network",
        """
import socket
for address in ("127.0.0.1", "localhost", "169.254.169.254", "10.0.0.1"):
    try:
        s = socket.create_connection((address, {port}), 0.5)
        s.sendall(b"hello")
        print("breach", address)
    except OSError:
        pass
""",
        after=_reached,
    ),
    Attack(
        "udp and name lookup",
        "network",
        """
import socket
try:
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.sendto(b"hello", ("127.0.0.1", {port}))
    s.settimeout(0.3)
    s.sendto(b"hello", ("8.8.8.8", 53))
except OSError:
    pass
else:
    print("sent, to nobody")
try:
    print("breach", socket.getaddrinfo("example.com", 80))
except OSError:
    pass
""",
        after=_reached,
    ),
    Attack(
        "raw, vsock, netlink and crypto sockets",
        "network",
        """
import socket
for family, kind in ((17, 3), (40, 1), (16, 3), (38, 5)):
    try:
        socket.socket(family, kind)
        print("breach", family)
    except OSError:
        pass
""",
    ),
    Attack(
        "abstract socket of the host",
        "sockets",
        """
import socket
try:
    s = socket.socket(socket.AF_UNIX)
    s.connect("\\0{abstract}")
    s.sendall(b"hello")
    print("breach")
except OSError:
    pass
""",
        after=_reached,
    ),
    Attack(
        "socket in a folder of the host",
        "sockets",
        """
import socket
try:
    s = socket.socket(socket.AF_UNIX)
    s.connect("{socket}")
    s.sendall(b"hello")
    print("breach")
except OSError:
    pass
""",
        after=_reached,
    ),
    Attack(
        "read a file of the host",
        "reading",
        """
import os
for path in ("{file}", "/etc/shadow", "/etc/passwd", "/root", "/home", "/var/log", "../../{file}"):
    try:
        found = os.listdir(path) if os.path.isdir(path) else open(path).read()
        if found:
            print("breach", path)
    except OSError:
        pass
os.symlink("{file}", "link")
try:
    print("breach", open("link").read())
except OSError:
    pass
try:
    os.link("{file}", "hard")
    print("breach", open("hard").read())
except OSError:
    pass
""",
    ),
    Attack(
        "files of other processes",
        "reading",
        """
import glob
for path in glob.glob("/proc/[0-9]*/root/{file}") + glob.glob("/proc/[0-9]*/cwd/{file}"):
    try:
        print("breach", path, open(path).read())
    except OSError:
        pass
""",
    ),
    Attack(
        "write and create outside",
        "writing",
        """
import os
places = "/usr/new", "/etc/new", "/new", "/dev/new", "/opt/new", "/proc/sys/kernel/core_pattern"
for path in ("{file}", "{folder}/new", *places):
    try:
        open(path, "a").write("x")
        print("breach", path)
    except OSError:
        pass
os.symlink("{folder}", "way")
try:
    open("way/new", "w").write("x")
    print("breach")
except OSError:
    pass
""",
        after=_file_changed,
    ),
    Attack(
        "mode, owner and times outside",
        "writing",
        """
import os
for change in (lambda: os.chmod("{file}", 0), lambda: os.utime("{file}", (1, 1)), lambda: os.truncate("{file}", 0),
               lambda: os.unlink("{file}"), lambda: os.rename("{file}", "{folder}/other"),
               lambda: os.setxattr("{file}", "user.x", b"1")):
    try:
        change()
        print("breach")
    except OSError:
        pass
""",
        after=_file_changed,
    ),
    Attack(
        "environment of the host",
        "environment",
        """
import glob, os
if "{secret}" in str(dict(os.environ)):
    print("breach, own")
for path in glob.glob("/proc/*/environ"):
    try:
        if "{secret}" in open(path).read():
            print("breach", path)
    except OSError:
        pass
""",
    ),
    Attack(
        "signals to processes outside",
        "processes",
        """
import os
for pid in ({host}, {parent}):
    try:
        if pid < 40:  # a number that a process of the sandbox may have, too
            continue
        os.kill(pid, 0)
        print("breach", pid)
    except OSError:
        pass
""",
    ),
    Attack(
        "tracing and reading memory",
        "processes",
        CALLS
        + """
for pid in (1, os.getppid(), {host}):
    for number in (16, 0x4206):
        tried("ptrace", libc.ptrace(number, pid, 0, 0))
    try:
        open(f"/proc/{pid}/mem", "rb")
        print("breach, mem", pid)
    except OSError:
        pass
buffer = ctypes.create_string_buffer(8)
""",
    ),
    Attack(
        "descriptors of the host",
        "processes",
        """
import os
for fd in range(3, 1024):
    try:
        os.fstat(fd)
    except OSError:
        continue
    print("breach, descriptor", fd)
""",
    ),
    Attack(
        "namespaces and mounts",
        "kernel",
        CALLS
        + """
tried("unshare user", libc.unshare(0x10000000))
tried("unshare mount", libc.unshare(0x00020000))
tried("mount", libc.mount(b"none", b"/tmp", b"tmpfs", 0, None))
tried("chroot", libc.chroot(b"/tmp"))
tried("setns", libc.setns(0, 0))
x86 = os.uname().machine == "x86_64"
pid = libc.syscall(56 if x86 else 220, 0x10000000 | 17, 0, 0, 0, 0)
if pid == 0:
    os._exit(0)
tried("clone user", pid)
""",
    ),
    Attack(
        "bpf, io_uring, keys, personality, perf, userfaultfd",
        "kernel",
        CALLS
        + """
x86 = os.uname().machine == "x86_64"
buffer = ctypes.create_string_buffer(256)
for name, a, b, args in (("bpf", 321, 280, (5, 0, 0)), ("io_uring_setup", 425, 425, (4, buffer)),
                         ("keyctl", 250, 219, (0, -3, 1)), ("personality", 135, 92, (0xffffffff,)),
                         ("userfaultfd", 323, 282, (1,)), ("add_key", 248, 217, (b"user", b"a", b"b", 1, -3))):
    tried(name, libc.syscall(a if x86 else b, *args))
""",
    ),
    Attack(
        "becoming another user",
        "kernel",
        """
import os
for change in (lambda: os.setuid(0), lambda: os.setgid(0), lambda: os.setgroups([0])):
    try:
        change()
        print("breach")
    except OSError:
        pass
try:
    status = open("/proc/self/status").read()
except OSError:
    status = ""
for line in status.splitlines():
    if line.startswith("CapEff") and int(line.split()[1], 16):
        print("breach", line)
    if line.startswith("NoNewPrivs") and line.split()[1] != "1":
        print("breach", line)
""",
    ),
    Attack(
        "one process that takes memory",
        "memory",
        "data = []\nwhile True:\n    data.append(bytearray(10**7))\n",
        ("nonzero", "memory", "killed"),
        _small,
    ),
    Attack(
        "many processes that take memory",
        "memory",
        """
import os, time
for _ in range(12):
    if os.fork() == 0:
        break
data = []
try:
    while len(data) < 20:
        data.append(bytearray(10**7))
except MemoryError:
    pass
time.sleep(20)
""",
        ("memory", "nonzero"),
        _small,
    ),
    Attack(
        "memory in file systems",
        "memory",
        """
import os
written = 0
for folder in ("/dev/shm", "/tmp", "/work", "/dev", "/", "/run", "/var/tmp"):
    try:
        with open(folder + "/big", "wb") as file:
            for _ in range(500):
                file.write(bytes(10**6))
                file.flush()
                written += 10**6
    except OSError:
        pass
if written > 64e6:
    print("breach", written)
""",
        ("ok", "nonzero", "memory", "disk", "killed"),
        _small,
    ),
    Attack(
        "fork bomb",
        "forks",
        """
import os, time
count = 0
try:
    for _ in range(400):
        if os.fork() == 0:
            time.sleep(30)
            os._exit(0)
        count += 1
except OSError:
    pass
if count > 16:
    print("breach", count)
""",
    ),
    Attack(
        "fork bomb that grows by itself",
        "forks",
        "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass\n",
        ("timeout", "memory", "killed"),
    ),
    Attack(
        "threads",
        "forks",
        """
import threading, time
count = 0
try:
    for _ in range(400):
        threading.Thread(target=time.sleep, args=(30,), daemon=True).start()
        count += 1
except RuntimeError:
    pass
if count > 16:
    print("breach", count)
import os
os._exit(0)
""",
    ),
    Attack(
        "one large file",
        "disk",
        """
written = 0
try:
    with open("big", "wb") as file:
        while written < 200e6:
            written += file.write(bytes(10**6))
            file.flush()
except OSError:
    pass
if written > 40e6:
    print("breach", written)
""",
        ("ok", "nonzero", "disk", "memory", "killed"),
    ),
    Attack(
        "many files",
        "disk",
        """
import os, time
made = 0
try:
    for number in range(2000000):
        open(f"f{number}", "wb").close()
        made += 1
        if made == 500000:
            print("breach", made)
            break
except OSError:
    pass
""",
        ("nonzero", "disk", "memory", "timeout", "killed", "ok"),
    ),
    Attack("a loop", "cpu", "while True:\n    pass\n", ("timeout", "killed")),
    Attack(
        "a loop in many processes, one after another",
        "cpu",
        """
import os, time
while True:
    if os.fork() == 0:
        end = time.process_time() + 0.5
        while time.process_time() < end:
            pass
        os._exit(0)
    os.wait()
""",
        ("timeout", "killed"),
    ),
    Attack(
        "sleep with all signals ignored",
        "time",
        """
import signal, time
for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
time.sleep(60)
""",
        ("timeout",),
    ),
    Attack("endless output", "output", "import os\nwhile True:\n    os.write(1, b'x' * 65536)\n", ("output_limit",)),
    Attack("endless errors", "output", "import os\nwhile True:\n    os.write(2, b'x' * 65536)\n", ("output_limit",)),
    Attack(
        "a daemon",
        "survivors",
        """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execvp("python3", ["python3", "-I", "-S", "-c", "import time; time.sleep(30)", "{mark}"])
    os._exit(0)
time.sleep(0.2)
""",
        after=_survivor,
    ),
    Attack(
        "kill everything",
        "own",
        """
import os, signal
for pid in (-1, 1, os.getppid() or 1):  # 0, for a parent outside, would be itself
    for number in (signal.SIGSTOP, signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV):
        try:
            os.kill(pid, number)
        except OSError:
            pass
""",
        ("ok", "killed"),
    ),
    Attack(
        "speak for the watch",
        "own",
        """
import glob, os
for pid in (1, os.getppid()):
    for path in glob.glob(f"/proc/{pid}/fd/*"):
        try:
            os.open(path, os.O_WRONLY)
            print("breach", path)
        except OSError:
            pass
os.write(1, b"\\x00\\x00\\x00\\x10{'op': 'done'}")
""",
    ),
)


async def _listen(outside: Outside) -> list[asyncio.AbstractServer]:
    async def taken(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        outside.reached.append(str(writer.get_extra_info("sockname")))
        writer.close()

    tcp = await asyncio.start_server(taken, "127.0.0.1", 0)
    outside.port = tcp.sockets[0].getsockname()[1]
    abstract = socket.socket(socket.AF_UNIX)
    abstract.bind("\0" + outside.abstract)
    servers: list[asyncio.AbstractServer] = [tcp, await asyncio.start_unix_server(taken, sock=abstract)]
    servers.append(await asyncio.start_unix_server(taken, outside.socket))
    os.chmod(outside.socket, 0o777)
    return servers


@contextlib.asynccontextmanager
async def outside_world() -> AsyncIterator[Outside]:
    """Files, sockets and a variable for attacks to find, as open as a careless host would leave them."""
    folder = Path(tempfile.mkdtemp(prefix="moonkit-outside-"))
    folder.chmod(0o777)
    outside = Outside(folder, 0, f"moonkit{uuid.uuid4().hex[:12]}", str(folder / "socket"), f"secret{uuid.uuid4().hex}")
    outside.file.write_text(outside.secret)
    outside.file.chmod(0o666)
    os.environ["MOONKIT_OUTSIDE"] = outside.secret
    servers = await _listen(outside)
    try:
        yield outside
    finally:
        for server in servers:
            server.close()
            await server.wait_closed()
        os.environ.pop("MOONKIT_OUTSIDE", None)
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


def program_of(attack: Attack, outside: Outside) -> str:
    """The attack's program with the targets filled in."""
    targets = {
        "port": outside.port,
        "abstract": outside.abstract,
        "socket": outside.socket,
        "file": outside.file,
        "folder": outside.folder,
        "secret": outside.secret,
        "mark": outside.mark,
        "host": os.getpid(),
        "parent": os.getppid(),
    }
    source = attack.source
    for name, value in targets.items():
        source = source.replace(f"{{{name}}}", str(value))
    return source


async def attempt(box: Sandbox, attack: Attack, outside: Outside) -> str:
    """Runs an attack: what it achieved, or nothing. The sandbox must still work after it."""
    result = await box.python(program_of(attack, outside), limits=SMALL)
    await asyncio.sleep(0)  # lets a connection that was made be seen
    if result.status == "infra_error":
        return f"the sandbox failed: {result.stderr.decode(errors='replace')[:100]}"
    for line in result.stdout.decode(errors="replace").splitlines():
        if line.startswith("breach"):
            return line[:120]
    if attack.statuses and result.status not in attack.statuses:
        return f"ended with {result.status}"
    seen = attack.after(result, outside) if attack.after else ""
    if not seen:
        alive = await box.python("print(6 * 7)", limits=SMALL)
        if alive.stdout != b"42\n":
            return f"afterwards the sandbox is broken: {alive.status}"
    return seen


async def inspect(chosen: Backend) -> Report:
    """Attacks the backend, each attack in a sandbox of its own."""
    why = chosen.missing()
    if why:
        return Report(chosen.name, False, why)
    breaches: dict[str, str] = {}
    try:
        async with outside_world() as outside:
            for attack in ATTACKS:
                async with await chosen.open(Spec(limits=SMALL)) as box:
                    seen = await attempt(box, attack, outside)
                outside.reached.clear()
                if seen and attack.guarantee not in breaches:
                    breaches[attack.guarantee] = f"{attack.name}: {seen}"
                if attack.guarantee == "writing":
                    outside.file.write_text(outside.secret)
                    outside.file.chmod(0o666)
                    for path in outside.folder.iterdir():
                        if path.name not in ("answers.txt", "socket"):
                            path.unlink()
        reached = await chosen.reached() if isinstance(chosen, Kubernetes) else []
    except SandboxError as error:
        return Report(chosen.name, False, str(error))
    meanings = dict(GUARANTEES)
    if reached:
        meanings["network"] += (
            f"; only the system call filter sees to it, the cluster's network does not ({reached[0]})"
        )
    found = tuple(
        Guarantee(name, name not in breaches, breaches.get(name, meaning)) for name, meaning in meanings.items()
    )
    return Report(chosen.name, True, "", found)


# ---- the verb


@dataclass(frozen=True)
class Options:
    """Attack the sandboxes of this machine, and say what holds."""

    backend: Literal["all", "kubernetes", "bwrap", "landlock", "none"] = "all"
    """all: those that isolate, a cluster only where MOONKIT_K8S_NAMESPACE is set; none has to be asked for."""
    json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """One JSON object instead of tables."""


def main() -> None:
    """moonkit sandbox check. Leaves with 1 if no sandbox works here."""
    options = tyro.cli(Options, prog="moonkit sandbox check", description=__doc__)
    every = (*(["kubernetes"] if os.environ.get(NAMESPACE) else []), "bwrap", "landlock")
    names = every if options.backend == "all" else (options.backend,)
    reports = []
    for name in names:
        reports.append(asyncio.run(inspect(backend(name, allow_unsafe=True))))
        if not options.json:
            _show(reports[-1])
    best = next((report for report in reports if report.available), None)
    if options.json:
        kernel = f"{platform.system()} {platform.release()} {platform.machine()}"
        print(json.dumps({"kernel": kernel, "reports": [asdict(report) for report in reports]}))
    elif options.backend == "all":
        print(f"auto takes: {best.isolation if best else 'nothing; programs of models will not be run here'}")
    if best is None:
        sys.exit(1)


def _show(report: Report) -> None:
    if not report.available:
        print(f"{report.backend}: not here, {report.why}\n")
        return
    held = sum(guarantee.holds for guarantee in report.guarantees)
    print(f"{report.backend}: {held} of {len(report.guarantees)} guarantees hold, after {len(ATTACKS)} attacks")
    for guarantee in report.guarantees:
        print(f"  {'yes' if guarantee.holds else 'NO '}  {guarantee.name:<12} {guarantee.seen}")
    print()


if __name__ == "__main__":
    main()
