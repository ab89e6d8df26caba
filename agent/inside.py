"""The one process of a sandbox that is ours: it starts commands, watches them, and says how they ended.

    host ── frames over stdin ──> this process ── fork, limits, exec ──> command
    host <── frames over stdout ──      "      <── pipes, /proc, wait4 ──    "

    frame    4 bytes: length of the header | header | header["size"] bytes
             a header is a dict: marshalled on the way in, where the host is trusted, and a literal on the way out

    ask      {"op": "exec", argv or source, env, cwd, limits}, payload: stdin     one command, from start to end
             {"op": "spawn", ...}  {"op": "feed"}  {"op": "end"}  {"op": "kill"}    one command, talked with
             {"op": "write", files: [[path, size], ...]}  {"op": "read", path, most}
    answer   {"op": "ready" | "out" | "err" | "done" | "written" | "content" | "error", ...}

It imports little, because every import is a part of the start-up time, and nothing of ours: its code comes first over
stdin, then its settings, and it runs under the interpreter that is there (3.9 or newer). Commands share its user, so it
protects itself: it cannot be traced or read (not dumpable), its ends of the pipes are not inherited, and where it has
the process namespace to itself it is process 1, which no signal from inside reaches.

Paths are taken below the work folder and never through a link: without namespaces this process may write where the
commands may not.
"""

from __future__ import annotations

import errno
import marshal
import os
import resource
import select
import stat
import struct
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:  # as in typing, which takes long to import
    import signal
    from collections.abc import Iterator
    from typing import Any

    def program(source: str, names: dict[str, Any]) -> None:
        """exec; defined in what reads this file from stdin."""
else:  # what signal is made of: signal itself makes enums of it, for 3 ms of the 9 that a start takes
    import _signal as signal

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER = 1, 4, 38, 22, 36
WATCH = 0.02  # seconds between two looks at memory, time and files
PAGE = os.sysconf("SC_PAGE_SIZE")
TICK = os.sysconf("SC_CLK_TCK")
LARGEST = 256 * 2**20  # bytes of one frame's payload


class suppress:
    """As in contextlib, without what contextlib imports."""

    def __init__(self, *errors: type[BaseException]) -> None:
        self.errors = errors

    def __enter__(self) -> suppress:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: object) -> bool:
        return kind is not None and issubclass(kind, self.errors)


class Job:
    """A command that runs."""

    def __init__(self, pid: int, limits: dict[str, float], live: bool) -> None:
        self.pid = pid
        self.limits = limits
        self.live = live  # output is sent on as it comes
        self.began = time.monotonic()
        try:
            self.ended = os.pidfd_open(pid)
        except OSError:  # a kernel before 5.3: its end is then seen at the next look
            self.ended = -1
        self.stdin = -1
        self.outputs: dict[int, str] = {}  # fd -> "out" or "err"
        self.kept = {"out": bytearray(), "err": bytearray()}
        self.seen = 0
        self.pending = bytearray()
        self.no_more_input = False
        self.why: str | None = None  # the limit that ended it
        self.peak = 0.0  # bytes, all of its processes together
        self.spent = 0.0  # seconds of processor, the same
        self.next_look = self.began + WATCH
        self.next_walk = self.began + WATCH


class Inside:
    """The loop. settings: work (folder), scratch (file systems whose fill counts as memory), watch_disk (folders that
    are measured), alone (process namespace of its own), rules (Landlock and seccomp, for each command), env, keep
    (names of its own variables that commands get too), others (processes that are counted against their limit)."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.work: str = settings["work"]
        self.alone: bool = settings["alone"]
        kept = {name: os.environ[name] for name in settings.get("keep", ()) if name in os.environ}
        self.env: dict[str, str] = {**kept, **settings["env"]}
        self.job: Job | None = None
        self.spent_before = 0.0  # seconds of processor, of children that ended before the job
        self.read_fd, self.write_fd = os.dup(0), os.dup(1)
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.close(null)
        os.set_blocking(self.read_fd, False)
        self.buffer = bytearray()
        self.work_fd = os.open(self.work, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    # ---- frames

    def send(self, header: dict[str, Any], *payload: bytes) -> None:
        header["size"] = sum(map(len, payload))
        text = repr(header).encode()
        data = memoryview(b"".join((struct.pack(">I", len(text)), text, *payload)))
        while data:
            data = data[os.write(self.write_fd, data) :]

    def frames(self) -> Iterator[tuple[dict[str, Any], bytes]]:
        """Complete frames that have come; SystemExit when the host is gone."""
        while True:
            try:
                data = os.read(self.read_fd, 1 << 20)
            except BlockingIOError:
                break
            if not data:
                self.end_all()
                raise SystemExit(0)
            self.buffer += data
        while len(self.buffer) >= 4:
            (length,) = struct.unpack_from(">I", self.buffer)
            if len(self.buffer) < 4 + length:
                return
            header = marshal.loads(bytes(self.buffer[4 : 4 + length]))
            size = header.get("size", 0)
            if size > LARGEST:
                raise SystemExit(f"a frame of {size} bytes")
            if len(self.buffer) < 4 + length + size:
                return
            payload = bytes(self.buffer[4 + length : 4 + length + size])
            del self.buffer[: 4 + length + size]
            yield header, payload

    # ---- the loop

    def run(self) -> None:
        self.send({"op": "ready", "python": list(sys.version_info[:3])})
        while True:
            job = self.job
            waiting = [self.read_fd]
            writing = []
            if job is not None:
                waiting += list(job.outputs)
                if job.ended >= 0:
                    waiting.append(job.ended)
                if job.stdin >= 0 and job.pending:
                    writing.append(job.stdin)
            ready, writable, _ = select.select(waiting, writing, [], WATCH if job else None)
            if job is not None:
                for fd in ready:
                    if fd in job.outputs:
                        self.take(job, fd)
                if writable:
                    self.feed(job)
                self.look(job)
            if self.read_fd in ready:
                for header, payload in self.frames():
                    self.handle(header, payload)

    def handle(self, header: dict[str, Any], payload: bytes) -> None:
        op = header["op"]
        try:
            if op in ("exec", "spawn"):
                if self.job is not None:
                    raise OSError(errno.EBUSY, "a command is running")
                self.start(header, payload, op == "spawn")
            elif op == "feed" and self.job is not None:
                self.job.pending += payload
            elif op == "end" and self.job is not None:
                self.job.no_more_input = True
                self.feed(self.job)
            elif op == "kill" and self.job is not None:
                self.job.why = self.job.why or "killed"
            elif op == "write":
                self.write_files(header["files"], payload)
                self.send({"op": "written"})
            elif op == "read":
                self.send({"op": "content"}, self.read_file(header["path"], header["most"]))
        except (OSError, ValueError) as error:
            self.send({"op": "error", "text": f"{type(error).__name__}: {error}"})

    # ---- files

    def open_below(self, path: str, flags: int, make: bool = False) -> int:
        """A file below the work folder, each part opened without following a link."""
        parts = [part for part in os.fspath(path).split("/") if part not in ("", ".")]
        inner = [part for part in self.work.split("/") if part]
        if path.startswith("/"):
            if parts[: len(inner)] != inner:
                raise ValueError(f"{path} is not below {self.work}")
            parts = parts[len(inner) :]
        if not parts or ".." in parts:
            raise ValueError(f"{path} is not below {self.work}")
        folder = os.dup(self.work_fd)
        try:
            for part in parts[:-1]:
                if make:
                    with suppress(FileExistsError):
                        os.mkdir(part, 0o755, dir_fd=folder)
                step = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
                os.close(folder)
                folder = step
            fd = os.open(parts[-1], flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644, dir_fd=folder)
        finally:
            os.close(folder)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise ValueError(f"{path} is no regular file")
        return fd

    def write_files(self, files: list[tuple[str, int]], payload: bytes) -> None:
        at = 0
        for path, size in files:
            fd = self.open_below(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, make=True)
            with os.fdopen(fd, "wb") as file:
                file.write(payload[at : at + size])
            at += size

    def read_file(self, path: str, most: int) -> bytes:
        with os.fdopen(self.open_below(path, os.O_RDONLY), "rb") as file:
            data = file.read(most + 1)
        if len(data) > most:
            raise ValueError(f"{path} is longer than {most} bytes")
        return data

    # ---- a command

    def start(self, header: dict[str, Any], payload: bytes, live: bool) -> None:
        limits = header["limits"]
        error_read, error_write = os.pipe2(os.O_CLOEXEC)
        pipes = [os.pipe2(os.O_CLOEXEC) for _ in range(3)]
        self.spent_before = spent_by_children()
        pid = os.fork()
        if pid == 0:
            try:
                os.setsid()
                for number, fd in enumerate((pipes[0][0], pipes[1][1], pipes[2][1])):
                    os.dup2(fd, number)
                become(header, self.settings, {**self.env, **(header.get("env") or {})})
            except BaseException as error:
                with suppress(OSError):
                    os.write(error_write, f"{type(error).__name__}: {error}".encode()[:500])
                os._exit(127)
        for fd in (error_write, pipes[0][0], pipes[1][1], pipes[2][1]):
            os.close(fd)
        if header.get("argv"):
            trouble = os.read(error_read, 500)  # ends with the exec: the other end is gone then
        else:
            trouble = b""
        os.close(error_read)
        job = Job(pid, limits, live)
        job.stdin = pipes[0][1]
        job.outputs = {pipes[1][0]: "out", pipes[2][0]: "err"}
        for fd in (job.stdin, *job.outputs):
            os.set_blocking(fd, False)
        job.kept["err"] += trouble
        job.pending += payload
        job.no_more_input = not live
        self.job = job
        self.feed(job)

    def feed(self, job: Job) -> None:
        if job.stdin < 0:
            return
        try:
            while job.pending:
                sent = os.write(job.stdin, job.pending[:65536])
                del job.pending[:sent]
        except BlockingIOError:
            return
        except OSError:
            job.pending.clear()
            job.no_more_input = True
        if job.no_more_input and not job.pending:
            os.close(job.stdin)
            job.stdin = -1

    def take(self, job: Job, fd: int) -> None:
        """What the command has written, up to its limit of all output together."""
        try:
            data = os.read(fd, 65536)
        except BlockingIOError:
            return
        if not data:
            os.close(fd)
            del job.outputs[fd]
            return
        room = job.limits["output_kb"] * 1024 - job.seen
        job.seen += len(data)
        data = data[: max(0, int(room))]
        if job.live:
            if data:
                self.send({"op": job.outputs[fd]}, data)
        else:
            job.kept[job.outputs[fd]] += data
        if job.seen > job.limits["output_kb"] * 1024:
            job.why = job.why or "output_limit"

    def judge(self, job: Job) -> None:
        """Sets `why` if a limit is passed."""
        now = time.monotonic()
        if job.why is None and now - job.began > job.limits["wall_s"]:
            job.why = "timeout"
        if job.why is None and now >= job.next_look:
            memory, seconds = self.usage()
            job.peak = max(job.peak, memory)
            job.spent = max(job.spent, seconds)
            if memory > job.limits["memory_mb"] * 2**20:
                job.why = "memory"
            elif seconds > job.limits["cpu_s"] + 0.5:
                job.why = "timeout"
            job.next_look = now + WATCH
        if job.why is None and self.settings.get("watch_disk") and now >= job.next_walk:
            most = job.limits["disk_mb"] * 2**20
            if any(folder_size(folder, most) > most for folder in self.settings["watch_disk"]):
                job.why = "disk"
            job.next_walk = now + max(0.1, 4 * (time.monotonic() - now))

    def look(self, job: Job) -> None:
        """Ends the job if it is over, by itself or by a limit."""
        self.judge(job)
        if job.why is not None:
            with suppress(ProcessLookupError):
                os.kill(job.pid, signal.SIGKILL)
            self.finish(job, os.wait4(job.pid, 0))
            return
        self.reap_orphans(job.pid)
        ended = os.wait4(job.pid, os.WNOHANG)
        if ended[0]:
            self.finish(job, ended)

    def finish(self, job: Job, ended: tuple[int, int, resource.struct_rusage]) -> None:
        _, code, used = ended
        full = any(disk_full(folder) for folder in self.settings.get("scratch", ()))
        self.end_all()
        for fd in list(job.outputs):
            while fd in job.outputs and job.why != "output_limit":
                before = job.seen
                self.take(job, fd)
                if fd in job.outputs and job.seen == before:
                    break
            if fd in job.outputs:
                os.close(fd)
        for fd in (job.stdin, job.ended):
            if fd >= 0:
                os.close(fd)
        returncode = -os.WTERMSIG(code) if os.WIFSIGNALED(code) else os.WEXITSTATUS(code)
        status = job.why
        if status is None:
            if returncode == 0:
                status = "ok"
            elif returncode == -signal.SIGXCPU:
                status = "timeout"
            elif returncode == -signal.SIGXFSZ or full:
                status = "disk"
            else:
                status = "killed" if returncode < 0 else "nonzero"
        out, err = bytes(job.kept["out"]), bytes(job.kept["err"])
        self.job = None
        answer = {
            "op": "done",
            "status": status,
            "returncode": returncode,
            "out": len(out),
            "truncated": job.seen > job.limits["output_kb"] * 1024,
            "wall_s": time.monotonic() - job.began,
            "cpu_s": used.ru_utime + used.ru_stime,
            "max_rss_mb": max(used.ru_maxrss * 1024, job.peak) / 2**20,
        }
        self.send(answer, out, err)

    # ---- processes

    def others(self) -> list[int]:
        """Processes of the sandbox but for this one: all in its namespace, or its descendants."""
        me = os.getpid()
        pids = [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != me]
        if self.alone:
            return pids
        parent: dict[int, int] = {}
        for pid in pids:
            with suppress(OSError, ValueError, IndexError), open(f"/proc/{pid}/stat", "rb") as file:
                parent[pid] = int(file.read().rpartition(b")")[2].split()[1])
        found: set[int] = set()
        more = {me}
        while more:
            more = {pid for pid, above in parent.items() if above in more and pid not in found}
            found |= more
        return sorted(found)

    def usage(self) -> tuple[int, float]:
        """Bytes of memory and seconds of processor of all commands, with what they put into memory file systems."""
        memory, ticks = 0, 0
        for pid in self.others():
            try:
                with open(f"/proc/{pid}/statm", "rb") as file:
                    _, resident, shared = map(int, file.read().split()[:3])
                with open(f"/proc/{pid}/stat", "rb") as file:
                    fields = file.read().rpartition(b")")[2].split()
            except (OSError, ValueError):
                continue
            memory += (resident - shared) * PAGE
            ticks += sum(map(int, fields[11:15]))  # utime, stime, and those of its children that have ended
        for folder in self.settings.get("scratch", ()):
            used = os.statvfs(folder)
            memory += (used.f_blocks - used.f_bfree) * used.f_frsize + (used.f_files - used.f_ffree) * 1024
        # an orphan is handed to this process, and leaves its time here when it is taken off the process table
        return memory, ticks / TICK + spent_by_children() - self.spent_before

    def living(self) -> list[int]:
        """Processes that are to be gone when a command has ended."""
        return self.others()

    def end_all(self) -> None:
        """Kill whatever a command has left, and take it off the process table."""
        while True:
            if self.alone:
                with suppress(ProcessLookupError):
                    os.kill(-1, signal.SIGKILL)
            else:
                left = self.others()
                for number in (signal.SIGSTOP, signal.SIGKILL):  # stopped first: what forks cannot outrun the list
                    for pid in left:
                        with suppress(ProcessLookupError, PermissionError):
                            os.kill(pid, number)
            try:
                while True:
                    pid, _ = os.waitpid(-1, os.WNOHANG)
                    if pid == 0:
                        break
            except ChildProcessError:
                if not self.living():
                    return
            time.sleep(0.001)

    def reap_orphans(self, main: int) -> None:
        """This process is handed every orphan: leave none of them a zombie, but do not take the command's own end."""
        with suppress(ChildProcessError):
            while True:
                seen = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                if seen is None or seen.si_pid == main:
                    return
                os.waitpid(seen.si_pid, os.WNOHANG)


def spent_by_children() -> float:
    """Seconds of processor of all that this process has waited for: orphans of commands, and commands."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def folder_size(folder: str, enough: float) -> int:
    """Bytes of the files below a folder, counted until it is enough; a file costs a block at least."""
    total, waiting = 0, [folder]
    while waiting and total <= enough:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    with suppress(OSError):
                        total += max(4096, entry.stat(follow_symlinks=False).st_blocks * 512)
                        if entry.is_dir(follow_symlinks=False):
                            waiting.append(entry.path)
        except OSError:
            continue
    return total


def disk_full(folder: str) -> bool:
    used = os.statvfs(folder)
    return used.f_bavail == 0 or used.f_favail == 0


def become(header: dict[str, Any], settings: dict[str, Any], env: dict[str, str]) -> None:
    """Of a process that is ours until now: turns it into the command. Does not come back; raises OSError if the command
    cannot be started."""
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    for number in (signal.SIGPIPE, signal.SIGINT, signal.SIGTERM, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    os.chdir(header.get("cwd") or settings["work"])
    confine(header["limits"], settings)
    if header.get("argv"):
        os.execvpe(header["argv"][0], header["argv"], env)
    os.closerange(3, 256)
    run_here(header["source"], env)


def confine(limits: dict[str, float], settings: dict[str, Any]) -> None:
    """What holds for a command from here on, and for all that it starts."""
    memory, disk = int(limits["memory_mb"]) * 2**20, max(1, int(limits["disk_mb"])) * 2**20
    seconds = max(1, int(limits["cpu_s"] + 0.999))
    wanted = {
        resource.RLIMIT_AS: (memory, memory),
        resource.RLIMIT_CPU: (seconds, seconds + 1),
        resource.RLIMIT_FSIZE: (disk, disk),
        resource.RLIMIT_NOFILE: (256, 256),
        resource.RLIMIT_CORE: (0, 0),
        resource.RLIMIT_STACK: (64 * 2**20, 64 * 2**20),
        resource.RLIMIT_MEMLOCK: (0, 0),
        resource.RLIMIT_MSGQUEUE: (0, 0),
    }
    pids = int(limits["pids"]) + settings.get("others", 0)  # the kernel counts all of the user's
    wanted[resource.RLIMIT_NPROC] = (pids, pids)
    for what, pair in wanted.items():
        resource.setrlimit(what, pair)
    rules = settings.get("rules")
    if rules:
        if "landlock" in rules:
            apply_landlock(rules["landlock"])
        machine = os.uname().machine
        if machine not in rules["seccomp"]:
            raise OSError(f"no system call filter for {machine}")
        apply_seccomp(bytes.fromhex(rules["seccomp"][machine]))


def run_here(source: str, env: dict[str, str]) -> None:
    """Run a Python program in this forked interpreter, which is warm, as if it had been started for it."""
    os.environ.clear()
    os.environ.update(env)
    sys.argv = ["-c"]
    streams = []
    for number, mode in ((0, "r"), (1, "w"), (2, "w")):
        streams.append(open(number, mode, encoding="utf-8", errors="surrogateescape", closefd=False))
    sys.stdin, sys.stdout, sys.stderr = streams
    code = 0
    try:
        # not compile(), whose first use makes a type for each kind of syntax (0.7 ms), and not from here, where
        # it would inherit this file's __future__
        program(source, {"__name__": "__main__", "__builtins__": __builtins__})
    except SystemExit as leaving:
        if isinstance(leaving.code, str):
            sys.stderr.write(leaving.code + "\n")
        code = leaving.code if isinstance(leaving.code, int) else 0 if leaving.code is None else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    for stream in streams[1:]:
        try:
            stream.flush()
        except Exception:
            code = code or 120
    os._exit(code & 255)


# ---- the kernel, where Python has no word for it


def prctl(option: int, value: int) -> None:
    """Through what ctypes is made of: the whole of it takes a millisecond to import."""
    import _ctypes

    class Function(_ctypes.CFuncPtr):
        _flags_ = 1  # FUNCFLAG_CDECL

    everything: Any = None  # what is loaded already, in place of a library's name
    if Function(_ctypes.dlsym(_ctypes.dlopen(everything, 0), "prctl"))(option, value, 0, 0, 0):
        raise OSError(f"prctl {option} was refused")


# without namespaces, Landlock and seccomp, for each command


def syscall(number: int, *arguments: int | bytes | None) -> int:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.syscall(ctypes.c_long(number), *(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), f"system call {number}: {os.strerror(ctypes.get_errno())}")
    return int(result)


def apply_landlock(rules: dict[str, Any]) -> None:
    """Files that may be read or written, no TCP, no signals and no abstract sockets to the outside."""
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    attributes = struct.pack("QQQ", *rules["handled"])[: rules["size"]]
    ruleset = syscall(444, attributes, len(attributes), 0)
    for path, access in rules["paths"]:
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            access &= rules["of_files"]
        syscall(445, ruleset, 1, struct.pack("=Qi", access, fd), 0)
        os.close(fd)
    syscall(446, ruleset, 0)
    os.close(ruleset)


def apply_seccomp(program: bytes) -> None:
    import ctypes

    prctl(PR_SET_NO_NEW_PRIVS, 1)
    buffer = ctypes.create_string_buffer(program, len(program))
    head = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_SECCOMP, 2, head, 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")


def serve(settings: dict[str, Any], kind: type[Inside]) -> None:
    prctl(PR_SET_DUMPABLE, 0)
    if not settings["alone"]:
        prctl(PR_SET_CHILD_SUBREAPER, 1)
    if settings.get("rules"):
        import ctypes  # noqa: F401  here once, and not in each command
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    kind(settings).run()


def main(settings: dict[str, Any]) -> None:
    serve(settings, Inside)
