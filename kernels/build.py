"""A C++ file of this folder becomes a library of functions, once per machine.

    library("decode")      kernels/decode.cpp -> ctypes library, or None where there is no compiler or no wish

Built with the machine's own instructions (-march=native) at first use, in about three seconds, into
$XDG_CACHE_HOME/moonkit (default ~/.cache/moonkit) under a name made of the source, the compiler and the processor.
MOONKIT_KERNELS=0 leaves all kernels out; CXX names another compiler.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

# -ffast-math is left out: sums would depend on the compiler, and infinities stand for "not seen"
_FLAGS = ("-O3", "-march=native", "-std=c++20", "-fopenmp-simd", "-pthread", "-shared", "-fPIC", "-w")
_why: dict[str, str] = {}


@cache
def library(name: str) -> ctypes.CDLL | None:
    """The library of kernels/{name}.cpp, or None: then `reason` says why, and the plain form does the work."""
    source = Path(__file__).with_name(f"{name}.cpp")
    if os.environ.get("MOONKIT_KERNELS", "1") == "0":
        _why[name] = "MOONKIT_KERNELS=0"
        return None
    compiler = shutil.which(os.environ.get("CXX") or "g++") or shutil.which("clang++")
    if compiler is None:
        _why[name] = "no C++ compiler (g++ or clang++) was found"
        return None
    built = _folder() / f"{name}-{_mark(source, compiler)}.so"
    try:
        if not built.exists():
            _compile(compiler, source, built)
        return ctypes.CDLL(str(built))
    except subprocess.CalledProcessError as error:
        _why[name] = f"{compiler} could not compile {source.name}: {error.stderr.strip().splitlines()[:1]}"
    except OSError as error:
        _why[name] = f"{built} could not be written or loaded: {error}"
    return None


def reason(name: str) -> str:
    """Why `library(name)` is None; empty when it is not."""
    library(name)
    return _why.get(name, "")


def _folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "moonkit"


def _mark(source: Path, compiler: str) -> str:
    # a home folder may be shared by machines of different kinds
    flags = ""
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    parts = (
        *(each.read_text() for each in (source, *sorted(source.parent.glob("*.h")))),
        version,
        flags,
        platform.machine(),
        *_FLAGS,
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _compile(compiler: str, source: Path, built: Path) -> None:
    built.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=built.parent) as folder:
        new = Path(folder) / built.name
        command = [compiler, *_FLAGS, str(source), "-o", str(new)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
        os.replace(new, built)  # two processes may build at once; each puts a whole file
