"""Processes that do for a grader what may take for ever or kill: algebra and drawing of what a model wrote.

    WORKERS = Workers("compare", memory_mb=2048, seconds=5)
    WORKERS.ask(gold="\\\\sqrt{8}", answer="2\\\\sqrt{2}")     ->  {"parsed": True, "read": True, "equal": True}

    grader -- one line of JSON --> a free worker (evals/worker.py) -- one line back --> grader
                                   none free: a new one, at most one for each core

The kernel ends a worker that uses more memory or, for one line, more processor time than it may: Died, costly. It is
processor time, since a busy machine must not make a right answer wrong. A worker that ends of something else, or is
silent for WAIT seconds, is replaced and asked once more before Died says so.

Workers start at the first question, can be asked from any thread, are renewed now and then, and end with Python; when
Python is killed they read the end of their pipe.
"""

import atexit
import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

WAIT = 180.0  # seconds by the clock, for a start or an answer: only a machine that is broken takes as long
RENEWED = 400  # questions, after which a worker is replaced: the caches of its libraries grow


class Died(Exception):
    """A worker ended, or had to be ended. costly: what it was asked took more time or memory than it may."""

    def __init__(self, why: str, costly: bool = False):
        super().__init__(why)
        self.costly = costly


class Worker:
    """One process. Raises Died when it does not start."""

    def __init__(self, duty: str, memory_mb: int, seconds: int):
        self.asked = 0
        self._limits = (memory_mb, seconds)
        self._text = b""
        program = str(Path(__file__).with_name("worker.py"))
        self._process = subprocess.Popen(
            [sys.executable, "-I", program, duty, str(memory_mb), str(seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"PYTHONHASHSEED": "0", "LANG": "C.UTF-8"},
            cwd="/",
            bufsize=0,
            start_new_session=True,
        )
        assert self._process.stdin is not None and self._process.stdout is not None, "started with pipes"
        self._in, self._out = self._process.stdin, self._process.stdout
        first = self._line()
        if "ready" not in first:
            self.end()
            raise Died(f"a worker cannot {duty}: {first}")

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """What its duty returns, or {"error": name}. Raises Died, and then the worker is gone."""
        self.asked += 1
        line = memoryview(json.dumps(question).encode() + b"\n")
        try:
            while line:
                line = line[self._in.write(line) or 0 :]
        except BrokenPipeError:
            raise self._ended() from None
        said = self._line()
        if said.get("error") == "memory":
            self.end()
            raise Died(f"more than {self._limits[0]} MB of memory", costly=True)
        return said

    def _line(self) -> dict[str, Any]:
        deadline = time.monotonic() + WAIT
        with selectors.DefaultSelector() as selector:
            selector.register(self._out, selectors.EVENT_READ)
            while not self._text.endswith(b"\n"):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    self.end()
                    raise Died(f"no answer within {WAIT:g} s")
                part = os.read(self._out.fileno(), 2**20)
                if not part:
                    raise self._ended()
                self._text += part
        said: dict[str, Any] = json.loads(self._text)
        self._text = b""
        return said

    def _ended(self) -> Died:
        """It closed its pipe by itself."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        self.end()
        code = self._process.returncode
        if code == -signal.SIGXCPU:
            return Died(f"more than {self._limits[1]} s of processor time", costly=True)
        return Died(f"the worker ended with status {code}")

    def end(self) -> None:
        """Kill it. Nothing is left of it."""
        self._process.kill()
        self._process.wait()
        self._in.close()
        self._out.close()


class Workers:
    """All workers of one duty: a name in evals/worker.py."""

    def __init__(self, duty: str, memory_mb: int, seconds: int):
        self.duty, self.memory_mb, self.seconds = duty, memory_mb, seconds
        self._free: list[Worker] = []
        self._may, self._lock = threading.Semaphore(min(4, os.cpu_count() or 1)), threading.Lock()
        atexit.register(self.close)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self.forget)

    def ask(self, **question: Any) -> dict[str, Any]:
        """Raises Died when a worker found it too costly, or two have died."""
        try:
            return self._ask(question)
        except Died as died:
            if died.costly:
                raise
        return self._ask(question)

    def work(self, **question: Any) -> bool:
        """Whether the machinery does, for a question that is known to be harmless: then another one killed it."""
        try:
            return "error" not in self._ask(question)
        except Died:
            return False

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        with self._may:
            with self._lock:
                worker = self._free.pop() if self._free else None
            worker = worker or Worker(self.duty, self.memory_mb, self.seconds)
            try:
                said = worker.ask(question)
            except BaseException:
                worker.end()
                raise
            if worker.asked >= RENEWED:
                worker.end()
            else:
                with self._lock:
                    self._free.append(worker)
            return said

    def close(self) -> None:
        """End those that wait for work; a later question starts a new one."""
        with self._lock:
            free, self._free = self._free, []
        for worker in free:
            worker.end()

    def forget(self) -> None:
        """In the child of a fork: the workers are the parent's, and a lock that another thread held stays locked."""
        self._free = []
        self._may, self._lock = threading.Semaphore(min(4, os.cpu_count() or 1)), threading.Lock()
