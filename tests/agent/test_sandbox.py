"""The sandbox: what commands may do, every attack of agent/selftest.py, and nothing left behind.

pytest tests/agent/test_sandbox.py            a backend that this machine lacks is skipped, with the reason
"""

import asyncio
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent import seccomp
from agent.sandbox import Bwrap, Limits, SandboxError, Spec, backend, sandbox
from agent.selftest import ATTACKS, GUARANTEES, SMALL, Attack, attempt, inspect, outside_world


def or_skip(name: str) -> Any:
    chosen = backend(name, allow_unsafe=True)
    if chosen.missing():
        pytest.skip(f"{name}: {chosen.missing()}")
    return chosen


@pytest.fixture(params=["bwrap", "landlock"])
def kind(request: pytest.FixtureRequest) -> str:
    or_skip(request.param)
    return str(request.param)


def within(kind: str, work: Callable[[Any], Awaitable[Any]], spec: Spec | None = None) -> Any:
    """Runs `work` with one sandbox."""

    async def inner() -> Any:
        async with await or_skip(kind).open(spec) as box:
            return await work(box)

    return asyncio.run(inner())


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_attack_fails(kind: str, attack: Attack) -> None:
    async def work() -> str:
        async with outside_world() as outside, await or_skip(kind).open(Spec(limits=SMALL)) as box:
            return await attempt(box, attack, outside)

    assert asyncio.run(work()) == ""


def test_attacks_succeed_where_nothing_isolates() -> None:
    """Or they would prove nothing: a plain child process with limits is broken out of in every way it should be."""

    async def work() -> dict[str, str]:
        seen = {}
        chosen = backend("none", allow_unsafe=True)
        for attack in ATTACKS:
            if attack.guarantee in ("network", "sockets", "reading", "writing", "kernel", "own"):
                async with outside_world() as outside, await chosen.open(Spec(limits=SMALL)) as box:
                    result = await attempt(box, attack, outside)
                if result:
                    seen[attack.guarantee] = result
        return seen

    assert {"network", "sockets", "reading", "writing"} <= set(asyncio.run(work()))
    assert {attack.guarantee for attack in ATTACKS} == set(GUARANTEES)


def test_commands_files_and_statuses(kind: str) -> None:
    async def work(box: Any) -> None:
        result = await box.exec(["python3", "-I", "-c", "print(input()[::-1])"], stdin=b"live\n")
        assert result.ok and result.stdout == b"evil\n" and result.returncode == 0 and result.max_rss_mb > 1
        await box.write({"a/b/c.txt": b"text", "run.py": b"import sys; print(open('a/b/c.txt').read()); sys.exit(3)"})
        result = await box.exec(["python3", "run.py"])
        assert (result.status, result.returncode, result.stdout) == ("nonzero", 3, b"text\n")
        assert await box.read("a/b/c.txt") == b"text"
        result = await box.exec(["python3", "-c", "import os; os.abort()"])
        assert (result.status, result.returncode) == ("killed", -signal.SIGABRT)
        result = await box.exec(["no-such-program"])
        assert result.returncode == 127 and b"no-such-program" in result.stderr
        result = await box.exec(["sh", "-c", "echo $HOME-$X; pwd"], env={"X": "1"}, cwd=None)
        assert b"-1\n" in result.stdout
        result = await box.python("import time; time.sleep(9)", limits=Limits(wall_s=0.5))
        assert result.status == "timeout" and 0.4 < result.wall_s < 3
        result = await box.python("print('x' * 3000)", limits=Limits(output_kb=2))
        assert result.status == "output_limit" and result.truncated and len(result.stdout) == 2048
        assert (await box.python("raise SystemExit('bye')")).stderr == b"bye\n"
        assert b"ZeroDivisionError" in (await box.python("1 / 0")).stderr
        result = await box.python("def f(x: int): pass\nprint(f.__annotations__, __name__)")
        assert result.stdout == b"{'x': <class 'int'>} __main__\n", "as a plain interpreter, nothing of ours inherited"

    within(kind, work)


def test_paths_lead_nowhere_else(kind: str, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")

    async def work(box: Any) -> None:
        await box.python(f"import os; os.symlink({str(tmp_path)!r}, 'way'); os.mkfifo('pipe'); os.symlink('/', 'root')")
        for path in ("../x", "/etc/x", "a/../../x", "way/precious", "root/etc/passwd", "", "/", ".", "pipe"):
            with pytest.raises(ValueError):
                await box.write({path: b"x"})
            with pytest.raises(ValueError):
                await box.read(path)
        await box.write({"long": b"12345"})
        with pytest.raises(ValueError, match="longer than 3"):
            await box.read("long", 3)

    within(kind, work)
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_command_to_talk_with(kind: str) -> None:
    async def work(box: Any) -> None:
        source = "import sys\nfor line in sys.stdin:\n    print(line.upper(), end='', flush=True)\nprint('end')"
        channel = await box.spawn(source=source)
        for word in (b"one\n", b"two\n"):
            await channel.send(word)
            assert await channel.receive_line() == word.upper()
        with pytest.raises(SandboxError, match="still running"):
            await box.exec(["true"])
        await channel.finish_input()
        assert (await channel.wait()).ok and await channel.receive(99) == b"end\n"
        channel = await box.spawn(["sleep", "60"])
        assert (await channel.kill()).status == "killed"
        assert (await box.exec(["true"])).ok

    within(kind, work)


def test_user_errors() -> None:
    for wrong in ({"wall_s": 0}, {"memory_mb": -1}, {"pids": True}, {"cpu_s": "1"}, {"disk_mb": float("nan")}):
        with pytest.raises(ValueError, match="limits:"):
            Limits(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="isolates nothing"):
        backend("none")
    with pytest.raises(ValueError, match="known: auto"):
        backend("docker")
    with pytest.raises(ValueError, match="must exist"):
        Spec(binds={"/data": "/no/such/folder"})
    with pytest.raises(ValueError, match="env:"):
        Spec(env={"A=B": "1"})


def test_binds_are_read_only(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "given"
    folder.mkdir()
    (folder / "data").write_text("given")
    for part in (folder, *folder.parents):
        if part.stat().st_uid == os.getuid() and part != Path("/"):
            part.chmod(part.stat().st_mode | 0o055)
    place = "/data" if kind == "bwrap" else str(folder)

    async def work(box: Any) -> None:
        assert (await box.exec(["cat", f"{place}/data"])).stdout == b"given"
        assert not (await box.exec(["sh", "-c", f"echo x > {place}/data"])).ok

    within(kind, work, Spec(binds={place: str(folder)}))


def _of_sandboxes() -> set[str]:
    """Processes of sandboxes, zombies included, as seen from here: of this process and of hosts that are gone.

    Not those of another program that uses sandboxes now, nor of a grader that tests before ours used: it keeps some.
    """
    grader = sys.modules.get("evals.code")
    if grader is not None:
        grader.close()
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes()
                state = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            zombie = state[0] == "Z" and state[1] == str(os.getpid())
            if zombie or (b"marshal.loads" in line and not _of_another(int(state[1]))):
                found.add(entry.name)
    return found


def _of_another(parent: int) -> bool:
    """Whether a process that is neither this one nor a sandbox's own stands above."""
    while parent > 1 and parent != os.getpid():
        try:
            line = Path(f"/proc/{parent}/cmdline").read_bytes()
            above = int(Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return False
        if b"marshal.loads" not in line and not line.startswith((b"bwrap", b"/usr/bin/bwrap")):
            mine = above
            while mine > 1 and mine != os.getpid():  # a host that a test started is ours
                mine = int(Path(f"/proc/{mine}/stat").read_text().rpartition(")")[2].split()[1])
            return mine != os.getpid()
        parent = above
    return False


def _nothing_left(seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while _of_sandboxes() and time.monotonic() < end:
        time.sleep(0.05)
    return not _of_sandboxes()


async def _many(kind: str, count: int, pool: int = 2) -> None:
    chosen = backend(kind, pool=pool)
    places = asyncio.Semaphore(2)

    async def one(number: int) -> None:
        async with places, await chosen.open() as box:
            result = await box.python(f"print({number})")
            assert result.stdout == f"{number}\n".encode(), result

    try:
        await asyncio.gather(*(one(number) for number in range(count)))
    finally:
        await chosen.close()


def test_nothing_is_left_after_many(kind: str) -> None:
    before = set(Path("/tmp").glob("moonkit-sandbox-*"))
    descriptors = len(os.listdir("/proc/self/fd"))
    asyncio.run(_many(kind, 60))
    assert _nothing_left() and set(Path("/tmp").glob("moonkit-sandbox-*")) == before
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 2


@pytest.mark.slow
def test_nothing_is_left_after_two_thousand() -> None:
    or_skip("bwrap")
    began = time.monotonic()
    asyncio.run(_many("bwrap", 2000, pool=4))
    print(f"\n{2000 / (time.monotonic() - began):.0f} sandboxes a second")
    assert _nothing_left()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_when_the_host_goes(kind: str, number: int, tmp_path: Path) -> None:
    code = (
        "import asyncio, sys\nfrom agent.sandbox import backend\n"
        "async def main():\n"
        f"    boxes = [await backend({kind!r}).open() for _ in range(3)]\n"
        "    running = [asyncio.create_task(box.exec(['sleep', '60'])) for box in boxes]\n"
        "    await asyncio.sleep(0.5)\n"
        "    print('ready', flush=True)\n"
        "    await asyncio.gather(*running)\n"
        "asyncio.run(main())\n"
    )
    env = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    for part in (tmp_path, *tmp_path.parents):
        if part.stat().st_uid == os.getuid() and part != Path("/"):
            part.chmod(part.stat().st_mode | 0o011)
    host = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env)
    assert host.stdout is not None and host.stdout.readline() == b"ready\n"
    assert len(_of_sandboxes()) >= 3
    host.send_signal(number)
    host.wait(10)
    assert _nothing_left()


@pytest.fixture
def pooled() -> Iterator[Bwrap]:
    or_skip("bwrap")
    yield Bwrap(pool=2)


def test_a_pool_gives_each_sandbox_once(pooled: Bwrap) -> None:
    async def work() -> None:
        for _ in range(5):
            async with await pooled.open() as box:
                assert (await box.python("import os; print(os.path.exists('x')); open('x', 'w')")).stdout == b"False\n"
        await pooled.close()

    asyncio.run(work())
    assert _nothing_left()


def test_how_fast(pooled: Bwrap) -> None:
    """Printed with -s; a busy machine must not fail it, so only far off fails."""

    async def timed(chosen: Bwrap, rest: float) -> list[float]:
        times = []
        for _ in range(15):
            began = time.perf_counter()
            box = await chosen.open()
            result = await box.python("print(1)")
            times.append(time.perf_counter() - began)
            assert result.ok
            await box.close()
            await asyncio.sleep(rest)
        await chosen.close()
        return sorted(times)

    cold, warm = asyncio.run(timed(Bwrap(), 0)), asyncio.run(timed(pooled, 0.05))
    print(f"\nopen and first program: {1e3 * cold[7]:.1f} ms cold, {1e3 * warm[7]:.1f} ms from the pool")
    assert cold[7] < 1 and warm[7] < 1


def test_without_await() -> None:
    or_skip("bwrap")
    with sandbox("bwrap") as box:
        box.write({"x.txt": b"1"})
        assert box.exec(["cat", "x.txt"]).stdout == b"1" and box.python("print(2)").stdout == b"2\n"
        assert box.read("x.txt") == b"1"
    assert _nothing_left()


def test_the_report_says_what_does_not_hold() -> None:
    class Gone(Bwrap):
        def missing(self) -> str | None:
            return "not today"

    report = asyncio.run(inspect(Gone()))
    assert not report.available and report.why == "not today"


def run_filter(program: bytes, number: int, arguments: tuple[int, ...] = (), arch: int = 0xC000003E) -> int:
    """A classic BPF machine, as far as the filter uses it."""
    data = struct.pack("=iIQ6Q", number, arch, 0, *(arguments + (0,) * 6)[:6])
    code = [struct.unpack_from("=HBBI", program, at) for at in range(0, len(program), 8)]
    accumulator, at = 0, 0
    while True:
        op, yes, no, operand = code[at]
        at += 1
        if op == 0x20:
            (accumulator,) = struct.unpack_from("=I", data, operand)
        elif op == 0x06:
            return int(operand)
        else:
            met = {0x15: accumulator == operand, 0x45: bool(accumulator & operand), 0x35: accumulator >= operand}[op]
            at += yes if met else no


@pytest.mark.parametrize("machine", list(seccomp.AUDIT_ARCH))
@pytest.mark.parametrize("owner", [False, True])
def test_the_filter_means_what_it_says(machine: str, owner: bool) -> None:
    which, arch = list(seccomp.AUDIT_ARCH).index(machine), seccomp.AUDIT_ARCH[machine]
    filter_ = seccomp.program(machine, network=False, owner=owner)
    refused = seccomp.ERRNO | seccomp.EPERM

    def asked(number: int, *arguments: int) -> int:
        return run_filter(filter_, number, arguments, arch)

    for name, numbers in (seccomp.DENIED | seccomp.OWNER).items():
        if numbers[which] is not None:
            denied = name in seccomp.DENIED or owner
            assert asked(numbers[which] or 0) == (refused if denied else seccomp.ALLOW), name
    called = {name: numbers[which] for name, numbers in seccomp.CALLED.items()}
    assert asked(called["clone3"]) == seccomp.ERRNO | seccomp.ENOSYS
    assert asked(called["clone"], 0x10000011) == refused and asked(called["clone"], 0x01200011) == seccomp.ALLOW
    assert asked(called["ioctl"], 0, seccomp.TIOCSTI) == refused and asked(called["ioctl"], 0, 0x5401) == seccomp.ALLOW
    for family in range(46):
        allowed = family == seccomp.AF_UNIX and not owner
        assert (asked(called["socket"], family) == seccomp.ALLOW) == allowed
    assert run_filter(filter_, 0, (), 0x40000003) == seccomp.KILL, "another architecture's calls"
    if machine == "x86_64":
        assert asked(0x40000000 + 101) == seccomp.ERRNO | seccomp.ENOSYS, "x32"
    assert asked(0) == asked(60 if which == 0 else 93) == seccomp.ALLOW
    both = seccomp.program(machine, network=True)
    assert run_filter(both, called["socket"], (seccomp.AF_INET6,), arch) == seccomp.ALLOW
    assert run_filter(both, called["socket"], (40,), arch) != seccomp.ALLOW
    with pytest.raises(ValueError, match="no system call numbers for sparc"):
        seccomp.program("sparc")
