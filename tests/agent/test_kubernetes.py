"""Sandboxes in a cluster: the same attacks and the same contract as the local ones, and what can go wrong there.

pytest tests/agent/test_kubernetes.py         skipped without the package kubernetes (extra k8s) or bubblewrap
"""

import asyncio
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("kubernetes.aio")

from agent import kubernetes
from agent.kubernetes import Kubernetes, _ended, pod_of
from agent.sandbox import Limits, SandboxError, Spec, backend
from agent.selftest import ATTACKS, SMALL, Attack, attempt, inspect, outside_world
from tests.agent.cluster import Cluster, cluster, faults
from tests.agent.test_sandbox import (  # noqa: F401  collected here with this file's `kind`
    _nothing_left,
    or_skip,
    test_a_command_to_talk_with,
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
    with pytest.raises(SandboxError, match="write files instead"):
        asyncio.run(Kubernetes().open(Spec(binds={"/data": str(tmp_path)})))
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


def test_a_server_that_goes_away(tmp_path: Path) -> None:
    or_skip("bwrap")
    with cluster(tmp_path) as server:
        result = during(server, lambda _: server.do(server.stop()))
    assert result.status == "infra_error"
    assert _nothing_left()


def test_what_a_command_writes_is_not_believed(here: Cluster) -> None:
    source = """
import os, sys
frame = b"\\x00\\x00\\x00\\x10{'op': 'done', 'status': 'ok', 'returncode': 0, 'out': 0, 'size': 0}"
for data in (b'{"metadata":{},"status":"Success"}', b"\\x03" + b'{"status":"Success"}', frame, b"\\xff\\x03"):
    os.write(1, data)
    os.write(2, data)
sys.exit(CODE)
"""

    async def work() -> None:
        async with await Kubernetes().open() as box:
            for code in (0, 1, 42, 255):
                result = await box.python(source.replace("CODE", str(code)))
                assert (result.status, result.returncode) == ("ok" if code == 0 else "nonzero", code)
                assert result.stdout == result.stderr and result.stdout.startswith(b'{"metadata"')
                assert (await box.exec(["sh", "-c", f"exit {code}"])).returncode == code

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
