"""What the machine can do, measured while the rest is: products, reads of memory, the stock allocator, peak memory.

gemm, memory = Gemm(), Reads(2**30)
take_turns({"ours": f, "GEMM": gemm, "memory": memory}, rounds=5)        gemm.amount operations, memory.amount bytes
"""

import ctypes
import os
import platform
import re
import select
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn


class Gemm:
    """One product of two square matrices by torch, the best that it does on most machines: 2 n^3 operations."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16, size: int = 2048) -> None:
        self.left, self.right = (torch.randn(size, size).to(dtype) for _ in range(2))
        self.amount = 2.0 * size**3

    def __call__(self) -> None:
        torch.mm(self.left, self.right)


class Reads:
    """One pass over `size` bytes: one row times a matrix, the fastest reader that torch has (a sum is 5 % behind)."""

    def __init__(self, size: int, dtype: torch.dtype = torch.bfloat16) -> None:
        width = 4096
        rows = max(16, size // width // torch.empty(0, dtype=dtype).element_size())
        self.matrix = torch.full((rows, width), 0.01, dtype=dtype)
        self.row = torch.ones(1, width, dtype=dtype)
        self.amount = float(self.matrix.nbytes)

    def __call__(self) -> None:
        nn.functional.linear(self.row, self.matrix)


def forks() -> bool:
    """Whether `Stock` works here, and has something to show: the setting is one of glibc."""
    return sys.platform.startswith("linux")


class Stock:
    """A process that forks off here, with what is in memory now, and keeps the allocator as the system sets it.

    Make it before the first computation in several threads (a fork has none of them): torch.set_num_threads(1) until
    then. `calls` run there on demand; each returns nothing and is timed, or its own number.
    """

    def __init__(self, calls: Mapping[str, Callable[[], float | None]], threads: int) -> None:
        if torch.get_num_threads() != 1:
            raise ValueError(f"a process can fork off while torch has 1 thread, not {torch.get_num_threads()}")
        sys.stdout.flush()
        there, self._ask = os.pipe()
        self._answer, back = os.pipe()
        self.process = os.fork()
        if self.process == 0:
            os.close(self._ask)
            os.close(self._answer)
            _serve(calls, threads, there, back)
        os.close(there)
        os.close(back)
        self._lines = os.fdopen(self._answer)

    def run(self, name: str, timeout: float = 600.0) -> float:
        """Seconds that a call took there, or the number that it gave. Raises RuntimeError when it failed."""
        os.write(self._ask, f"{name}\n".encode())
        if not select.select([self._lines], [], [], timeout)[0]:
            raise RuntimeError(f"{name}: no answer after {timeout:g} s")
        line = self._lines.readline().strip()
        if not line or line.startswith("!"):
            raise RuntimeError(f"{name} failed in its own process: {line[1:] or 'it ended'}")
        return float(line)

    def side(self, name: str) -> Callable[[], float]:
        return lambda: self.run(name)

    def close(self) -> None:
        os.close(self._ask)
        self._lines.close()
        os.waitpid(self.process, 0)


def _serve(calls: Mapping[str, Callable[[], float | None]], threads: int, there: int, back: int) -> None:
    """Be the other end, and end with it: never return into the code that forked."""
    try:
        torch.set_num_threads(threads)
        with torch.inference_mode(), os.fdopen(there) as names:
            for line in names:
                try:
                    began = time.perf_counter()
                    told = calls[line.strip()]()
                    answer = f"{time.perf_counter() - began if told is None else told}"
                except (RuntimeError, ValueError, TypeError) as error:  # a peer's; told to who asked
                    answer = f"!{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                os.write(back, f"{answer}\n".encode())
    finally:
        os._exit(0)


def peak_growth(call: Callable[[], Any]) -> float:
    """MiB by which the process grows beyond what it holds while `call` runs; nan where the system does not say."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return float("nan")
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    reset.write_text("5")  # the peak starts from now
    before = _kib(status, "VmRSS")
    call()
    return (_kib(status, "VmHWM") - before) / 2**10


def _kib(status: Path, name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+)", status.read_text())
    assert found, f"{status} has no {name}"
    return int(found[1])


def about() -> dict[str, Any]:
    """The machine and the versions that numbers belong to."""
    from kernels import wide
    from lm.step import Unfit, kernel

    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists() and (found := re.search(r"model name\s*:\s*(.+)", info.read_text(errors="replace"))):
        processor = found[1]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30 if hasattr(os, "sysconf") else None
    try:
        decode = ("neither AMX nor AVX-512", "AMX", "AVX-512")[kernel()[1]]
    except Unfit as why:
        decode = f"none: {why}"
    sample = torch.zeros(1, dtype=torch.bfloat16)
    with torch.inference_mode():
        rows = "AMX" if wide.fits(sample) else "none"
    packages = {}
    for name in ("torch", "transformers", "timm", "llama-cpp-python", "decord", "av", "pillow"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    return {
        "processor": processor,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "memory GiB": round(memory, 1) if memory else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "kernels": {"a step (kernels/decode.cpp)": decode, "many rows (kernels/wide.cpp)": rows},
        "packages": packages,
    }
