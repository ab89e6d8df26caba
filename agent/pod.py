"""What agent/inside.py lacks in a pod, where commands are started by the cluster and not by process 1.

    host ── attach: "expect", limits, argv ──> process 1 ── listens, once, at a name that only the host knows
    host ── exec NAME ──> kubelet ── starts ENTER in the pod ──> process 1: who is it, what does it become
                                     ENTER ── limits, filter, exec ──> command          the same process all the way
    process 1 ── /proc, a pidfd ──> over, or past a limit: kills all that is left ── attach: "begun", "done" ──> host

The command is the very process that the kubelet started, so that the return code which the API server reports is its
own: process 1 is not its parent, and says only which limit ended it and what it used. That is measured by looking every
20 ms, as no wait() tells it: a command shorter than that has used what was seen at its start.

ask      {"op": "expect", "door": name, argv or source, env, cwd, limits}      before each exec
         {"op": "kill", "why": status}                                         ends it, or will when it has come
         {"op": "write", ...}  {"op": "read", ...}                             as in agent/inside.py
answer   {"op": "begun"}  {"op": "done", why, full, wall_s, cpu_s, max_rss_mb}
"""

from __future__ import annotations

import errno
import marshal
import os
import select
import socket
import struct
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any
if "Inside" not in globals():  # in a pod they are: both files run in one namespace there
    from agent.inside import WATCH, Inside, Job, become, disk_full, serve, spent_by_children, suppress

CODES: list[Any] = []  # both files, compiled: what starts process 1 puts them here

# What each exec starts. It becomes what process 1 tells it; who else could ask is dead before the name is made.
ENTER = """import marshal,os,sys,time,_socket
door=_socket.socket(_socket.AF_UNIX,_socket.SOCK_STREAM)
for _ in range(1000):
    try:
        door.connect("\\0"+sys.argv[1])
        break
    except OSError:
        time.sleep(.01)
else:
    os._exit(126)
def take(size):
    data=b""
    while len(data)<size:
        more=door.recv(min(size-len(data),1<<20))
        if not more:
            os._exit(126)
        data+=more
    return data
def program(source,names):
    exec(source,names)
codes,told=marshal.loads(take(int.from_bytes(take(4),"big")))
door.close()
for code in codes:
    exec(code)
enter(told)"""


def enter(told: dict[str, Any]) -> None:
    """Of the process that the kubelet started."""
    try:
        with suppress(PermissionError):  # runtimes may have made it the first of a session
            os.setsid()
        become(told["header"], told["settings"], told["env"])
    except (OSError, ValueError, TypeError) as error:  # no such program, a null byte in its name
        with suppress(OSError):
            os.write(2, f"{type(error).__name__}: {error}".encode()[:500])
        os._exit(127)


class PodInside(Inside):
    """The loop of a pod's process 1."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        self.door: socket.socket | None = None
        self.expected: dict[str, Any] = {}
        self.born = b""  # when the command was: its number could be given again

    def run(self) -> None:
        self.send({"op": "ready"})
        while True:
            waiting: list[Any] = [self.read_fd]
            if self.door is not None:
                waiting.append(self.door)
            if self.job is not None and self.job.ended >= 0:
                waiting.append(self.job.ended)
            ready, _, _ = select.select(waiting, [], [], WATCH if self.job else None)
            if self.job is not None:
                self.look(self.job)
            elif self.door in ready:
                self.admit()
            if self.read_fd in ready:
                for header, payload in self.frames():
                    self.handle(header, payload)

    def handle(self, header: dict[str, Any], payload: bytes) -> None:
        if header["op"] == "expect":
            try:
                self.expect(header)
            except OSError as error:
                self.send({"op": "error", "text": f"{type(error).__name__}: {error}"})
        elif header["op"] == "kill":
            if self.job is not None:
                self.job.why = self.job.why or header["why"]
            elif self.door is not None:
                self.expected["why"] = header["why"]  # it ends as soon as it has come
        else:
            super().handle(header, payload)

    # ---- a command

    def expect(self, header: dict[str, Any]) -> None:
        if self.job is not None or self.door is not None:
            raise OSError(errno.EBUSY, "a command is running")
        self.door = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.door.bind("\0" + header["door"])
        self.door.listen(1)
        self.expected = header

    def admit(self) -> None:
        """The process that has come is the command: tell it what to become."""
        assert self.door is not None, "it has come through it"
        connection, _ = self.door.accept()
        self.door.close()
        self.door = None
        header = self.expected
        told = {"header": header, "settings": self.settings, "env": {**self.env, **(header.get("env") or {})}}
        text = marshal.dumps((CODES, told))
        with connection:
            pid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
            self.spent_before = spent_by_children()
            job = Job(pid, header["limits"], False)
            job.why = header.get("why")
            self.born = b"".join(stat_of(pid)[19:20])
            connection.settimeout(10)
            with suppress(OSError):  # it is gone again, which is seen at the next look
                connection.sendall(struct.pack(">I", len(text)) + text)
        self.send({"op": "begun"})
        self.job = job
        job.next_look = 0.0  # also a short command is seen once
        self.look(job)

    def look(self, job: Job) -> None:
        """Ends the job if it is over, by itself or by a limit."""
        self.judge(job)
        if job.why is None:
            self.reap_orphans(-1)
            if not (select.select([job.ended], [], [], 0)[0] if job.ended >= 0 else is_over(job.pid, self.born)):
                return
        wall = time.monotonic() - job.began
        full = any(disk_full(folder) for folder in self.settings.get("scratch", ()))
        memory, seconds = self.usage()
        self.end_all()
        if job.ended >= 0:
            os.close(job.ended)
        self.job = None
        answer = {"op": "done", "why": job.why, "full": full, "wall_s": wall, "cpu_s": max(job.spent, seconds)}
        self.send({**answer, "max_rss_mb": max(job.peak, memory) / 2**20})

    def living(self) -> list[int]:
        """Without what is dead and waits for its parent, which is outside."""
        return [pid for pid in self.others() if not is_over(pid)]


def stat_of(pid: int) -> list[bytes]:
    """The fields of /proc/PID/stat from the third on; none if there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()
    except OSError:
        return []


def is_over(pid: int, born: bytes = b"") -> bool:
    """Whether a process is gone, or a zombie whose threads are gone and whose parent is outside the pod. born: when it
    was, if its number may be another's by now."""
    fields = stat_of(pid)
    if not fields or (born and fields[19] != born):
        return True
    return fields[0] in (b"Z", b"X") and fields[1] == b"0" and int(fields[17]) <= 1


def main(settings: dict[str, Any]) -> None:
    serve(settings, PodInside)
