"""Sandboxes in a cluster: the same attacks and the same contract as the local ones, and what can go wrong there.

pytest tests/agent/test_kubernetes.py         skipped without the package kubernetes (extra k8s) or bubblewrap
"""

import asyncio
import io
import os
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from importlib.metadata import files
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("kubernetes.aio")

from agent import archive, kubernetes
from agent.kubernetes import Kubernetes, _ended, exit_code, pod_of
from agent.pod import is_over, stat_of
from agent.sandbox import Limits, SandboxError, Spec, backend
from agent.selftest import ATTACKS, SMALL, Attack, attempt, inspect, outside_world
from tests.agent.cluster import Cluster, cluster, faults
from tests.agent.test_sandbox import (  # noqa: F401  collected here with this file's `kind`
    _nothing_left,
    or_skip,
    test_a_command_to_talk_with,
    test_binds_are_read_only,
    test_commands_files_and_statuses,
    test_nothing_is_left_when_the_host_goes,
    test_paths_lead_nowhere_else,
)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    or_skip("bwrap")
    with cluster(tmp_path_factory.mktemp("cluster")) as server:
        yield server


@pytest.fixture
def here(started: Cluster) -> Cluster:
    started.do(started.clear())
    return started


@pytest.fixture
def kind(here: Cluster) -> str:
    return "kubernetes"


def test_every_attack_fails(here: Cluster) -> None:
    """Each in a pod of its own, some at a time: many of them wait for their limit."""

    async def work() -> dict[str, str]:
        chosen, places = Kubernetes(), asyncio.Semaphore(4)

        async def one(attack: Attack) -> tuple[str, str]:
            async with places, outside_world() as outside, await chosen.open(Spec(limits=SMALL)) as box:
                return attack.name, await attempt(box, attack, outside)

        seen = await asyncio.gather(*(one(attack) for attack in ATTACKS))
        return {name: breach for name, breach in seen if breach}

    assert asyncio.run(work()) == {}
    assert not here.pods and _nothing_left()


def opened(image: str, **options: Any) -> float:
    """Seconds until a sandbox of an image opens."""

    async def work() -> None:
        await (await Kubernetes(image=image, **options).open()).close()

    began = time.monotonic()
    asyncio.run(work())
    return time.monotonic() - began


def test_a_pod_is_hardened(here: Cluster) -> None:
    opened("x", runtime_class="gvisor")
    body = here.bodies[-1]
    spec = body["spec"]
    assert faults(body) == [] and spec["runtimeClassName"] == "gvisor" and spec["dnsPolicy"] == "None"
    assert here.policies["moonkit-sandbox"]["spec"] == {
        "podSelector": {"matchLabels": {"moonkit/sandbox": "closed"}},
        "policyTypes": ["Ingress", "Egress"],
    }
    assert not here.pods, "the pod is deleted"
    plain = pod_of(Spec(network=True), "name", "image")
    assert plain["metadata"]["labels"]["moonkit/sandbox"] == "open" and "dnsPolicy" not in plain["spec"]
    assert "runtimeClassName" not in plain["spec"]
    users = {pod_of(Spec(), "name", "image")["spec"]["securityContext"]["runAsUser"] for _ in range(20)}
    assert len(users) > 10 and min(users) >= 10000 and max(users) < 65536


def test_a_pod_that_cannot_start_says_why_and_is_deleted(here: Cluster) -> None:
    began = time.monotonic()
    with pytest.raises(SandboxError, match="ImagePullBackOff: Back-off pulling"):
        opened("missing")
    with pytest.raises(SandboxError, match=r"in time: Unschedulable: 0/3 nodes"):
        opened("nowhere", patience_s=0.5)
    with pytest.raises(SandboxError, match="FailedCreatePodSandBox: user namespaces are not supported"):
        opened("stuck", start_s=0.5)
    with pytest.raises(SandboxError, match=r"no python here|127"):
        opened("broken")
    assert time.monotonic() - began < 20 and not here.pods
    opened("late", patience_s=20)


def test_what_cannot_be_had_is_said(here: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SandboxError, match="nothing can be bound to /work"):
        asyncio.run(Kubernetes().open(Spec(binds={"/work/": str(tmp_path)})))
    monkeypatch.setattr(here, "protocols", ("v4.channel.k8s.io",))
    with pytest.raises(SandboxError, match=r"400 .* it must speak v5.channel.k8s.io \(Kubernetes 1.30 or newer\)"):
        opened("x")
    monkeypatch.undo()
    with pytest.raises(SandboxError, match="does not close the pods"):
        kept = here.policies.pop("moonkit-sandbox", None)
        here.policies["moonkit-sandbox"] = {"spec": {"podSelector": {}, "policyTypes": ["Ingress"]}}
        try:
            opened("x")
        finally:
            here.policies = {"moonkit-sandbox": kept} if kept else {}
    with pytest.raises(SandboxError, match="403: the pod is not hardened: users"):
        opened("x", host_users=True)
    (tmp_path / "config").write_text(here.config.read_text().replace("token-of-tests", "wrong"))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    with pytest.raises(SandboxError, match="401"):
        opened("x")
    (tmp_path / "config").write_text("{}")
    with pytest.raises(SandboxError, match="configuration cannot be used"):
        opened("x")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "nothing"))
    with pytest.raises(SandboxError, match="no cluster is configured"):
        opened("x")


def during(here: Cluster, happens: Any, source: str = "import time; time.sleep(30)") -> Any:
    """The result of a program while something happens to its pod."""

    async def work() -> Any:
        async with await Kubernetes().open() as box:
            running = asyncio.create_task(box.python(source, limits=Limits(wall_s=40)))
            await asyncio.sleep(0.3)
            await asyncio.to_thread(happens, box.pod)  # type: ignore[attr-defined]
            return await running

    return asyncio.run(work())


def test_how_a_pod_ended_is_the_status(here: Cluster) -> None:
    full = 'Usage of EmptyDir volume "work" exceeds the limit "64Mi".'
    result = during(here, lambda name: here.do(here.evict(name, full)))
    assert result.status == "disk" and result.stderr.decode() == full
    own = 'Container box exceeded its local ephemeral storage limit "192Mi".'
    low = "The node was low on resource: ephemeral-storage. Container box was using 5Mi, request is 192Mi."
    assert _ended({"status": {"reason": "Evicted", "message": own}}) == ("disk", own)
    assert _ended({"status": {"reason": "Evicted", "message": low}}) == ("infra_error", low)
    assert _ended({"status": {"phase": "Failed", "reason": "DeadlineExceeded"}})[0] == "infra_error"  # type: ignore[index]
    assert _ended({"status": {"phase": "Running"}}) is None
    assert during(here, lambda name: here.do(here.out_of_memory(name))).status == "memory"
    result = during(here, lambda name: here.do(here.kill(here.pods[name])))
    assert result.status == "infra_error" and b"process 1 ended with 137" in result.stderr
    result = during(here, lambda name: here.do(here.lose(name)))
    assert result.status == "infra_error" and result.stderr == b"the connection ended: node is lost"
    assert not here.pods


def test_a_pod_that_vanishes(here: Cluster) -> None:
    """Under a command, and on the way to one."""
    assert during(here, lambda name: here.do(here.vanish(name))).stderr.endswith(b"was deleted")

    async def work() -> None:
        starting = asyncio.create_task(Kubernetes(image="nowhere").open())
        while not here.pods:
            await asyncio.sleep(0.02)
        await asyncio.to_thread(lambda: here.do(here.vanish(next(iter(here.pods)))))
        with pytest.raises(SandboxError, match="was deleted by another"):
            await starting

    asyncio.run(work())


def test_a_server_that_goes_away(tmp_path: Path) -> None:
    or_skip("bwrap")
    with cluster(tmp_path) as server:
        result = during(server, lambda _: server.do(server.stop()))
    assert result.status == "infra_error"
    assert _nothing_left()


FAILED = b'{"metadata":{},"status":"Failure","message":"said","reason":"%s","details":{"causes":[%s]}}'


def test_what_channel_3_says() -> None:
    def ended(code: str) -> bytes:
        return FAILED % (b"NonZeroExitCode", b'{"reason":"ExitCode","message":"%s"}' % code.encode())

    assert exit_code(b'{"metadata":{},"status":"Success"}') == 0
    assert [exit_code(ended(code)) for code in ("1", "3", "127", "137", "255")] == [1, 3, 127, 137, 255]
    cause = b'{"reason":"ExitCode","message":"7"}'
    wrong = [
        *(ended(code) for code in ("0", "-1", "256", "", "x", "1e1", "9" * 5000)),
        FAILED % (b"NonZeroExitCode", b""),
        FAILED % (b"NonZeroExitCode", cause + b"," + cause),
        FAILED % (b"InternalError", b'{"message":"error executing command in container"}'),
        *(b"", b"null", b"[]", b"3", b'"Success"', b"{}", b'{"status":"Fai', b"\xff", b"[" * 10**5, b'{"status":[]}'),
    ]
    for status in wrong:
        with pytest.raises(SandboxError, match="exec failed"):
            exit_code(status)


def test_no_end_is_made_up(here: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kubelet does not say is an infra_error, whatever the command did."""

    async def one(argv: list[str]) -> Any:
        async with await Kubernetes().open() as box:
            result = await box.exec(argv)
            assert not box.alive or result.status != "infra_error", "it is used no more"
            return result

    lost = FAILED % (b"InternalError", b'{"message":"x"}')
    for said, why in ((b"", "did not say how"), (lost, "exec failed: said"), (b"{}", "exec failed: it said b'{}'")):
        monkeypatch.setattr(here, "says", said)
        result = asyncio.run(one(["true"]))
        assert result.status == "infra_error" and why in result.stderr.decode() and result.returncode is None
    monkeypatch.undo()
    monkeypatch.setattr(here, "refuses_exec", True)
    result = asyncio.run(one(["true"]))
    assert result.status == "infra_error" and b"403" in result.stderr and b"get and create on" in result.stderr

    async def talk() -> None:
        async with await Kubernetes().open() as box:
            with pytest.raises(SandboxError, match="403"):
                await box.spawn(["cat"])
            with pytest.raises(SandboxError, match="closed"):
                await box.exec(["true"])

    asyncio.run(talk())
    monkeypatch.undo()
    assert asyncio.run(one(["true"])).ok and not here.pods


def test_what_a_command_does_is_not_its_return_code(here: Cluster) -> None:
    """It comes from the kubelet: not from output, descriptors, sockets of the same name, or orphans that end well."""
    source = """
import os, signal, socket, sys
frame = b"\\x00\\x00\\x00\\x10{'op': 'done', 'status': 'ok', 'returncode': 0, 'out': 0, 'size': 0}"
for data in (b'{"metadata":{},"status":"Success"}', b"\\x03" + b'{"status":"Success"}', frame, b"\\xff\\x03"):
    os.write(1, data)
    os.write(2, data)
doors = [line.split()[-1] for line in open("/proc/net/unix") if "moonkit-" in line]
assert not doors, doors
for pid in os.listdir("/proc"):
    if pid.isdigit() and int(pid) != os.getpid():
        for number in (signal.SIGCONT, signal.SIGTERM, signal.SIGCHLD, signal.SIGKILL):
            try:
                os.kill(int(pid), number)
            except OSError:
                pass
if os.fork() == 0:
    os.setsid()
    os._exit(0)
for fd in range(3, 256):
    try:
        os.write(fd, frame)
    except OSError:
        pass
os._exit(CODE)
"""

    async def work() -> None:
        async with await Kubernetes().open() as box:
            for code in (0, 1, 42, 126, 128, 255):
                result = await box.python(
                    source.replace("CODE", str(code)).replace("PROC", "os.path.exists('/proc/net/unix')")
                )
                assert (result.status, result.returncode) == ("ok" if code == 0 else "nonzero", code), result
                assert result.stdout == result.stderr and result.stdout.startswith(b'{"metadata"')
                assert (await box.exec(["sh", "-c", f"exit {code}"])).returncode == code
            for number in (signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM):
                result = await box.exec(["sh", "-c", f"kill -{number} $$"])
                assert (result.status, result.returncode) == ("killed", -number)
            assert (await box.exec(["sh", "-c", "exit 137"])).returncode == -9, "the kubelet says both alike"
            result = await box.python("import os\nos.close(0)\nos.close(1)\nos.close(2)\nos._exit(5)")
            assert (result.status, result.returncode) == ("nonzero", 5)

    asyncio.run(work())


def test_the_cluster_of_these_tests_is_as_the_official_client_wants_it(here: Cluster) -> None:
    """Its synchronous WSClient, which nothing of ours uses, reads the same return codes from it."""
    client = pytest.importorskip("kubernetes.client")
    config, stream = pytest.importorskip("kubernetes.config"), pytest.importorskip("kubernetes.stream").stream

    def ran(pod: str, command: list[str], stdin: str = "") -> tuple[int, str]:
        core = client.CoreV1Api(config.new_client_from_config(str(here.config)))
        call = core.connect_get_namespaced_pod_exec
        pipes = {"stdin": True, "stdout": True, "stderr": True, "tty": False}
        running = stream(call, pod, "tests", command=command, container="box", _preload_content=False, **pipes)
        assert running.subprotocol == "v5.channel.k8s.io"
        running.write_stdin(stdin)
        running.close_channel(0)
        running.run_forever(timeout=20)
        return running.returncode, running.read_stdout()

    async def work() -> None:
        async with await Kubernetes().open() as box:
            name = box.pod  # type: ignore[attr-defined]
            for command, stdin, wanted in (
                (["cat"], "given", (0, "given")),
                (["sh", "-c", "cat; exit 3"], "x", (3, "x")),
                (["sh", "-c", "kill -9 $$"], "", (137, "")),
            ):
                assert await asyncio.to_thread(ran, name, command, stdin) == wanted

    asyncio.run(work())


def test_much_goes_through(here: Cluster) -> None:
    async def work() -> None:
        data = os.urandom(3 * 2**20)
        async with await Kubernetes().open() as box:
            await box.write({"data": data})
            assert await box.read("data", 2**23) == data
            most = Limits(output_kb=8192)
            result = await box.exec(["cat"], stdin=data, limits=most)
            assert result.ok and result.stdout == data
            channel = await box.spawn(["cat"], limits=most)
            await channel.send(data)
            await asyncio.sleep(0.5)  # nobody reads: what has come waits outside this process
            assert await channel.receive(len(data)) == data
            await channel.finish_input()
            assert (await channel.wait()).ok

    asyncio.run(work())


def test_limits_hold_without_being_its_parent(here: Cluster) -> None:
    async def work() -> None:
        async with await Kubernetes().open() as box:
            began = time.monotonic()
            result = await box.exec(["sh", "-c", "sleep 60 & exit 4"])
            assert (result.status, result.returncode) == ("nonzero", 4) and time.monotonic() - began < 20
            orphans = """
import os, time
while True:
    if os.fork() == 0:
        if os.fork() == 0:
            end = time.process_time() + 0.2
            while time.process_time() < end:
                pass
        os._exit(0)
    os.wait()
    time.sleep(0.21)
"""
            result = await box.python(orphans, limits=Limits(cpu_s=1, wall_s=30))
            assert result.status == "timeout" and result.cpu_s > 1 and result.wall_s < 25
            result = await box.python("x = bytearray(10**8); import time; time.sleep(0.3)")
            assert result.ok and result.max_rss_mb > 90
            channel = await box.spawn(["sleep", "60"])
            result = await channel.kill()
            assert (result.status, result.returncode) == ("killed", -9)
            channel = await box.spawn(
                ["sh", "-c", "echo first; sleep 0.3; echo more than is allowed"], limits=Limits(output_kb=0.01)
            )  # type: ignore[arg-type]
            assert await channel.receive_line() == b"first\n"
            assert (await channel.wait()).status == "output_limit" and await channel.receive(99) == b"more"
            channel = await box.spawn(["sleep", "60"])
        assert (await channel.wait()).stderr == b"the sandbox was closed"

    asyncio.run(work())


def test_whether_a_process_is_over() -> None:
    """For kernels without descriptors of processes."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    born = stat_of(child.pid)[19]
    assert not is_over(child.pid) and not is_over(child.pid, born) and is_over(child.pid, b"1")
    child.kill()
    while stat_of(child.pid)[0] != b"Z":
        time.sleep(0.01)
    assert not is_over(child.pid, born), "its parent is here, and waits for it"
    child.communicate()
    assert is_over(child.pid) and stat_of(child.pid) == []


def test_each_thread_has_clients_of_its_own(here: Cluster) -> None:
    chosen, clients, codes = Kubernetes(), [], []

    async def work(code: int) -> None:
        async with await chosen.open() as box:
            cluster = box._cluster  # type: ignore[attr-defined]
            clients.extend((cluster._http, cluster._sockets))
            codes.append((code, (await box.exec(["sh", "-c", f"exit {code}"])).returncode))

    threads = [threading.Thread(target=lambda code=code: asyncio.run(work(code))) for code in (11, 12, 13)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(codes) == [(11, 11), (12, 12), (13, 13)] and len({id(each) for each in clients}) == 6


# ---- what a Spec binds


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As a careless repository has it."""
    top = tmp_path / "top"
    (top / "in" / "empty").mkdir(parents=True)
    (top / "run.sh").write_text("#!/bin/sh\necho ran\n")
    (top / "run.sh").chmod(0o4755)
    (top / "in" / "secret").write_text("s")
    (top / "in" / "secret").chmod(0o600)
    (top / "in" / "odd \n name").write_bytes(b"\0" * 5000)
    os.utime(top / "run.sh", (10**9, 10**9))
    os.symlink("../run.sh", top / "in" / "link")
    os.symlink(__file__, top / "out")
    os.symlink("/", top / "root")
    os.link(top / "run.sh", top / "again")
    return top


def test_an_archive_follows_no_link_and_keeps_modes(folder: Path, tmp_path: Path) -> None:
    packed = io.BytesIO()
    archive.pack([folder, folder / "run.sh"], packed)
    with tarfile.open(fileobj=io.BytesIO(packed.getvalue())) as read:
        found = {entry.name: entry for entry in read.getmembers()}
    inside = {"", "/again", "/in", "/in/empty", "/in/link", "/in/odd \n name", "/in/secret", "/out", "/root", "/run.sh"}
    assert set(found) == {*(f"0{name}" for name in inside), "1"}
    assert found["0/out"].issym() and found["0/root"].issym() and found["0/in/link"].linkname == "../run.sh"
    assert found["0/run.sh"].mode == 0o755 and found["0/run.sh"].mtime == 10**9 and found["1"].isreg()
    assert found["0/in/secret"].mode == 0o600 and {entry.uid for entry in found.values()} == {0}

    place = tmp_path / "place"
    place.mkdir()

    def unpacked(data: bytes) -> int:
        command = [sys.executable, "-I", "-S", "-c", archive.UNPACK, str(place)]
        return subprocess.run(command, input=data, capture_output=True, timeout=60).returncode

    data = packed.getvalue()
    assert unpacked(len(data).to_bytes(8, "big") + data) == 0
    assert (place / "0" / "run.sh").stat().st_mtime == 10**9 and (
        place / "0" / "run.sh"
    ).stat().st_mode & 0o7777 == 0o755
    assert os.readlink(place / "0" / "out") == __file__
    for cut in (0, 4, 8, 20, len(data) - 1):
        assert unpacked((len(data).to_bytes(8, "big") + data)[:cut]) == 1, cut


def test_what_cannot_be_copied_is_refused(here: Cluster, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = archive.measure([folder], 10**6)
    assert 5000 < size < 10**5
    with pytest.raises(SandboxError, match="top is too large to be copied"):
        archive.measure([folder], size - 1)
    with monkeypatch.context() as changed, pytest.raises(SandboxError, match="too large"):
        changed.setattr(archive, "MOST_FILES", 5)
        archive.measure([folder], 10**6)
    monkeypatch.setattr(kubernetes, "MOST_GIVEN", 8192)
    with pytest.raises(SandboxError, match="too large"):
        asyncio.run(Kubernetes().open(Spec(binds={"/data": str(folder)})))
    monkeypatch.undo()
    os.mkfifo(folder / "pipe")
    with pytest.raises(SandboxError, match=r"pipe .* a device, a pipe or a socket"):
        archive.pack([folder], io.BytesIO())
    os.unlink(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        before = Path.cwd()
        os.chdir(folder)  # the path of a socket is short
        server.bind("s")
        os.chdir(before)
        with pytest.raises(SandboxError, match="a device, a pipe or a socket"):
            asyncio.run(Kubernetes().open(Spec(binds={"/data": str(folder)})))
    assert not here.pods


def test_folders_are_copied_in(here: Cluster, folder: Path) -> None:
    source = """
import os
print(sorted(os.listdir("/data")), os.readlink("/data/out"), oct(os.stat("/data/run.sh").st_mode & 0o7777))
print(open("/data/in/secret").read(), os.path.exists("/data/out"), len(os.listdir("/data/root")) > 3)
for change in (lambda: open("/data/new", "w"), lambda: os.unlink("/data/run.sh"), lambda: os.chmod("/data/run.sh", 0),
               lambda: os.rename("/data/in", "/data/on"), lambda: open("/opt/one/file", "a"),
               lambda: os.listdir("/given")):
    try:
        print("breach", change())
    except OSError:
        pass
"""

    async def work() -> None:
        spec = Spec(binds={"/data": str(folder), "/opt/one/file": str(folder / "run.sh")})
        async with await Kubernetes().open(spec) as box:
            result = await box.python(source)
            names = ["again", "in", "out", "root", "run.sh"]
            assert result.stdout.decode() == f"{names} {__file__} 0o755\ns False True\n", result
            assert (await box.exec(["sh", "-c", "/data/in/link && sh /opt/one/file"])).stdout == b"ran\nran\n"

    asyncio.run(work())
    (fill,) = here.bodies[-1]["spec"]["initContainers"]
    assert fill["volumeMounts"] == [{"name": "given", "mountPath": "/given"}]
    assert fill["securityContext"] == here.bodies[-1]["spec"]["containers"][0]["securityContext"]
    with pytest.raises(SandboxError, match=r"could not be unpacked: 127 \(Error: no python here"):
        asyncio.run(Kubernetes(image="broken").open(Spec(binds={"/data": str(folder)})))
    with pytest.raises(SandboxError, match="ImagePullBackOff"):
        asyncio.run(Kubernetes(image="missing").open(Spec(binds={"/data": str(folder)})))
    assert not here.pods and not list(Path("/tmp").glob("moonkit-given-*"))


def packages(folder: Path) -> Path:
    """A folder with pytest and what it needs, no more."""
    for name in ("pytest", "pluggy", "iniconfig", "packaging", "pygments"):
        for file in files(name) or ():
            if file.suffix == ".py" or ".dist-info" in str(file):
                place = folder / file
                if ".." not in file.parts:
                    place.parent.mkdir(parents=True, exist_ok=True)
                    place.write_bytes(Path(str(file.locate())).read_bytes())
    return folder


@pytest.mark.slow
def test_a_repository_is_graded_in_pods(here: Cluster, tmp_path: Path) -> None:
    from evals.graders import Task
    from evals.repository import grade_edit

    wrong = "def add(a, b):\n    return a - b\n"
    tests = "from calc import add\n\n\ndef test_add():\n    assert add(2, 3) == 5\n    assert add(10, 7) == 17\n"
    data = {
        "files": {"calc.py": wrong, "tests/test_calc.py": tests},
        "fail_to_pass": ["tests/test_calc.py::test_add"],
        "environment": str(packages(tmp_path / "packages")),
    }
    right = {"calc.py": wrong.replace("a - b", "a + b")}
    task = Task("repository", right, data)
    verdict = grade_edit(task, right, "kubernetes")
    assert verdict.score == 1 and verdict.evidence["isolation"] == "kubernetes", verdict
    assert verdict.evidence["mode"] == "canaries" and len(here.bodies) >= 6
    equal = "class Any(int):\n    def __eq__(self, other):\n        return True\n\n\n"
    cheat = {"calc.py": equal + "def add(a, b):\n    return Any()\n"}
    verdict = grade_edit(task, cheat, "kubernetes")
    assert verdict.score == 0 and verdict.evidence["suspected"], verdict
    assert not here.pods


def test_pods_left_over_are_reaped(here: Cluster) -> None:
    async def work() -> None:
        chosen = Kubernetes()
        box = await chosen.open()
        assert await chosen.reap(3600) == [] and len(here.pods) == 1
        here.age(4000)
        assert len(await chosen.reap(3600)) == 1 and not here.pods
        result = await box.python("print(1)")
        assert result.status == "infra_error" and b"was deleted" in result.stderr
        await box.close()
        left = await Kubernetes().open()
        here.age(4000)
        async with await Kubernetes().open():
            assert len(here.pods) == 1, "the first to come takes away what is past its lifetime"
        await left.close()

    asyncio.run(work())


def test_a_pool_gives_each_pod_once(here: Cluster) -> None:
    async def work() -> None:
        chosen = Kubernetes(pool=2)
        for _ in range(3):
            async with await chosen.open() as box:
                assert (await box.python("import os; print(os.path.exists('x')); open('x', 'w')")).stdout == b"False\n"
        await chosen.close()

    asyncio.run(work())
    assert not here.pods and _nothing_left()


def test_a_network_that_ignores_policies_is_seen(here: Cluster, tmp_path: Path) -> None:
    assert asyncio.run(Kubernetes().reached()) == []
    with cluster(tmp_path, network=True) as careless:
        assert f"127.0.0.1 {careless.port}" in asyncio.run(Kubernetes().reached())


def test_auto_takes_the_cluster_only_where_one_is_named(here: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    assert backend("auto").name == "kubernetes"
    monkeypatch.delenv(kubernetes.NAMESPACE)
    assert backend("auto").name == "bwrap"
    assert isinstance(backend("kubernetes"), Kubernetes)


@pytest.mark.slow
def test_the_report(here: Cluster) -> None:
    report = asyncio.run(inspect(Kubernetes()))
    assert report.available and report.isolation == "kubernetes"


def test_the_role_of_the_documentation_is_what_is_asked_for(here: Cluster, folder: Path) -> None:
    yaml = pytest.importorskip("yaml")
    text = (Path(__file__).parents[2] / "docs" / "kubernetes.md").read_text()
    (role,) = yaml.safe_load_all(text.partition("```yaml\n")[2].partition("```")[0])
    allowed = {(what, verb) for rule in role["rules"] for what in rule["resources"] for verb in rule["verbs"]}

    async def work() -> None:
        async with await Kubernetes().open(Spec(binds={"/data": str(folder)})) as box:
            assert (await box.exec(["true"])).ok
        with pytest.raises(SandboxError, match="Unschedulable"):
            await Kubernetes(image="nowhere", patience_s=0.2).open()

    here.policies.clear()
    here.asked.clear()
    asyncio.run(work())
    verbs = {"GET": "get", "POST": "create", "DELETE": "delete"}
    asked = set()
    for request in here.asked:
        method, _, path = request.partition(" ")
        what, _, rest = path.partition("?")[0].partition("/namespaces/tests/")[2].partition("/")
        part = rest.partition("/")[2]
        verb = verbs[method] if rest or method != "GET" else "watch" if "watch=" in path else "list"
        asked.add((f"{what}/{part}" if part else what, verb))
    assert asked <= allowed and allowed - asked == {("pods/attach", "create"), ("pods/exec", "create")}
