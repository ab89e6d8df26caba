"""Sandboxes in a cluster: one pod each, and in it the same process of ours that a local sandbox has.

    MOONKIT_K8S_NAMESPACE=evals moonkit ...            `auto` takes the cluster then, and nothing else turns it on
    backend("kubernetes")                              the cluster of this pod, or of ~/.kube/config or $KUBECONFIG
    await Kubernetes(image="golang:1.24", runtime_class="gvisor", pool=4).open()

    host ── API server: pod, NetworkPolicy, watch ──> scheduler, kubelet
    host ── websocket "attach": channel 0 ──> process 1 of the pod = agent/inside.py ── fork, limits, exec ──> command
    host <── channels 1 and 2, status in 3 ──      "

Process 1 is attached to, not started by "exec": no signal from inside the pod reaches it, it is handed every orphan,
and as its stdin is open just once it ends with the connection, so that nothing runs on when the host goes. How a
command ended is told by it alone, in frames that the command has no way to write; how the pod ended, by the API server.
Files go through the same frames, opened part by part without following a link. The image needs a Python (from 3.9).

The pod meets the "restricted" standard and more: another user, drawn at random; no capabilities, no service account, a
user namespace of its own, a read-only root, disk, memory and time of fixed size. Addresses are closed twice: by a
NetworkPolicy that the namespace gets if it has none, and by a system call filter, which also holds where the cluster's
network ignores policies (`reached` finds out).

The namespace's role must allow: pods create, get, list, watch, delete; pods/attach create and get; networkpolicies get
and create; events list, for reasons in error texts. Needs the extra: pip install moonkit[k8s].
"""

import asyncio
import contextlib
import importlib
import importlib.util
import json
import marshal
import os
import secrets
import socket
import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent import seccomp
from agent.sandbox import FIRST, Pool, Sandbox, SandboxError, Spec, Status, parts, ready, source_inside

if TYPE_CHECKING:
    import aiohttp

NAMESPACE, IMAGE, RUNTIME = "MOONKIT_K8S_NAMESPACE", "MOONKIT_K8S_IMAGE", "MOONKIT_K8S_RUNTIME_CLASS"
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
POLICY = "moonkit-sandbox"
LABEL = "moonkit/sandbox"  # "closed" or "open": whether the pod may use the network
CHANNELS = "v5.channel.k8s.io,v4.channel.k8s.io"
IN, OUT, ERR, STATUS = 0, 1, 2, 3
PIECE = 32 * 2**10  # bytes of one message of the websocket: what servers use themselves
KEPT = 64 * 2**10  # bytes of stderr and of the status channel
ASKING = 30.0  # seconds for one answer of the API server
HOPELESS = {  # reasons for which a container waits in vain
    "ImagePullBackOff",
    "InvalidImageName",
    "ErrImageNeverPull",
    "CreateContainerConfigError",
    "CreateContainerError",
    "RunContainerError",
    "CrashLoopBackOff",
    "StartError",
}


class Wire:
    """The pipes of a pod's process 1 over a websocket, as asyncio's subprocesses have them."""

    def __init__(self, socket: "aiohttp.ClientWebSocketResponse"):
        self._socket = socket
        self._waiting = bytearray()
        self._room = asyncio.Event()
        self._room.set()
        self._sending = asyncio.Lock()
        self.stdin = self
        self.stdout = asyncio.StreamReader(2**20)
        self.stdout.set_transport(self)  # type: ignore[arg-type]  # it pauses and resumes, no more
        self.stderr = asyncio.StreamReader(2**20)
        self.status = b""
        self._task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        import aiohttp

        room = {ERR: KEPT, STATUS: KEPT}
        try:
            async for message in self._socket:
                data = message.data
                if message.type is aiohttp.WSMsgType.TEXT:
                    data = data.encode()
                if not isinstance(data, bytes) or not data:
                    continue
                channel, data = data[0], data[1:]
                if channel == OUT:
                    self.stdout.feed_data(data)
                    await self._room.wait()
                elif channel in room:
                    data = data[: room[channel]]
                    room[channel] -= len(data)
                    if channel == ERR:
                        self.stderr.feed_data(data)
                    else:
                        self.status += data
        finally:
            self.stdout.feed_eof()
            self.stderr.feed_eof()

    def pause_reading(self) -> None:
        self._room.clear()

    def resume_reading(self) -> None:
        self._room.set()

    def write(self, data: bytes) -> None:
        self._waiting += data

    async def drain(self) -> None:
        async with self._sending:  # the pieces of one frame stay together
            data, self._waiting = bytes(self._waiting), bytearray()
            for at in range(0, len(data), PIECE):
                await self._socket.send_bytes(bytes([IN]) + data[at : at + PIECE])

    async def end(self) -> None:
        """Ends the connection, and process 1 with it."""
        self._room.set()
        await self._socket.close()
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


class PodSandbox(Sandbox):
    """A sandbox in a pod."""

    def __init__(self, spec: Spec, wire: Wire, cluster: "Cluster", pod: str):
        super().__init__(spec, wire)
        self._wire, self._cluster, self.pod = wire, cluster, pod

    @property
    def alive(self) -> bool:
        return not self._wire.stdout.at_eof()

    async def _blame(self) -> tuple[Status, str] | None:
        """Evicted for what it wrote, or out of memory: the command's doing. Else why the pod ended, as far as the API
        server or the connection said."""
        best: tuple[Status, str] | None = None
        end = time.monotonic() + 3
        while time.monotonic() < end:
            with contextlib.suppress(SandboxError):
                pod = await self._cluster.pod(self.pod)
                if pod is None:
                    return "infra_error", f"pod {self.pod} was deleted"
                seen = _ended(pod)
                if seen is not None and seen[0] != "infra_error":
                    return seen
                if seen is not None and best is None:
                    best, end = seen, min(end, time.monotonic() + 1)  # the reason can come after the end
            await asyncio.sleep(0.1)
        with contextlib.suppress(ValueError, KeyError, TypeError):
            return "infra_error", f"the connection ended: {json.loads(self._wire.status)['message']}"
        return best

    async def _end(self) -> None:
        await self._wire.end()
        # where the server is gone the pod ends by itself, as its stdin has ended, and `reap` takes it away later
        with contextlib.suppress(SandboxError):
            await self._cluster.delete(self.pod)
        await self._cluster.close()


def _ended(pod: Mapping[str, Any]) -> tuple[Status, str] | None:
    """How a pod ended; None while it runs."""
    status = pod.get("status") or {}
    reason, message = status.get("reason") or "", status.get("message") or ""
    if (
        reason == "Evicted"
    ):  # the pod's own limits are those of disk; a node that is short of something is no fault of it
        return ("disk" if "exceed" in message and "node was low" not in message else "infra_error"), message
    if reason == "DeadlineExceeded":
        return "infra_error", f"the pod's lifetime is over: {message}"
    for container in status.get("containerStatuses") or ():
        done = (container.get("state") or {}).get("terminated")
        if done:
            text = f"process 1 ended with {done.get('exitCode')} ({done.get('reason') or 'no reason'})"
            return ("memory" if done.get("reason") == "OOMKilled" else "infra_error"), text
    if status.get("phase") in ("Failed", "Succeeded"):
        return "infra_error", f"the pod has ended: {reason or status['phase']} {message}".strip()
    return None


class Cluster:
    """A connection to an API server, for one event loop and one namespace. Everything it does raises SandboxError."""

    def __init__(self, configuration: Any, namespace: str):
        from kubernetes.aio import client, stream

        self.namespace = namespace
        self._http = client.ApiClient(configuration)
        self._sockets = stream.WsApiClient(configuration, heartbeat=30)
        self.core, self.network = client.CoreV1Api(self._http), client.NetworkingV1Api(self._http)
        self._attaching = client.CoreV1Api(self._sockets)

    async def close(self) -> None:
        for each in (self._http, self._sockets):
            await each.close()

    async def pod(self, name: str) -> dict[str, Any] | None:
        """As the server has it; None if it has none."""
        with _failing(f"pod {name} could not be read"):
            answer = await self.core.read_namespaced_pod_without_preload_content(
                name, self.namespace, _request_timeout=ASKING
            )
            text = await answer.read()
            return None if answer.status == 404 else _json(text, answer.status)

    async def delete(self, name: str) -> None:
        with _failing(f"pod {name} could not be deleted"):
            answer = await self.core.delete_namespaced_pod_without_preload_content(
                name, self.namespace, grace_period_seconds=0, _request_timeout=ASKING
            )
            text = await answer.read()
            if answer.status != 404:
                _json(text, answer.status)

    async def create(self, body: dict[str, Any]) -> None:
        from kubernetes.aio import client

        with _failing("the pod could not be made"):
            answer = await self.core.create_namespaced_pod_without_preload_content(
                self.namespace, client.V1Pod.from_dict(body), _request_timeout=ASKING
            )
            _json(await answer.read(), answer.status)

    async def close_network(self) -> None:
        """The NetworkPolicy that lets nothing in and nothing out of closed pods. Made if it is not there; one of its
        name that says something else is an error, not overwritten."""
        from kubernetes.aio import client

        with _failing("the NetworkPolicy could not be read or made"):
            answer = await self.network.read_namespaced_network_policy_without_preload_content(
                POLICY, self.namespace, _request_timeout=ASKING
            )
            text = await answer.read()
            if answer.status == 404:
                answer = await self.network.create_namespaced_network_policy_without_preload_content(
                    self.namespace, client.V1NetworkPolicy.from_dict(policy()), _request_timeout=ASKING
                )
                text = await answer.read()
                if answer.status == 409:  # another was faster
                    return
            found = _json(text, answer.status)["spec"]
        wanted = policy()["spec"]
        rules = found.get("ingress") or found.get("egress")
        same = all(found.get(part) == wanted[part] for part in ("podSelector", "policyTypes"))
        if rules or not same:
            raise SandboxError(f"NetworkPolicy {POLICY} in {self.namespace} does not close the pods; it says {found}")

    async def changes(self, name: str, seconds: float) -> AsyncGenerator[dict[str, Any], None]:
        """The pod each time it changes, as it is now first."""
        from kubernetes.aio import watch

        async with watch.Watch("object") as events:
            stream = events.stream(
                self.core.list_namespaced_pod,
                self.namespace,
                field_selector=f"metadata.name={name}",
                timeout_seconds=max(1, int(seconds)),
                _request_timeout=seconds + ASKING,
            )
            async for event in stream:
                if event["type"] == "DELETED":
                    raise SandboxError(f"pod {name} was deleted by another")
                yield event["raw_object"]

    async def started(self, name: str, seconds: float, patience: float) -> None:
        """Until the pod runs. patience: seconds in which a node must be found, as one may be on its way."""
        loop, waiting = asyncio.get_running_loop(), "no node has taken it"
        end = loop.time() + seconds
        try:
            async with asyncio.timeout_at(end) as clock:
                while True:
                    with _failing(f"pod {name}"):
                        async with contextlib.aclosing(self.changes(name, seconds)) as changes:
                            async for pod in changes:
                                reason, hopeless = _waits_for(pod)
                                if reason is None:
                                    return
                                waiting = reason or waiting
                                if hopeless:
                                    raise SandboxError(f"it cannot start: {waiting}")
                                soon = reason.startswith("Unschedulable")
                                clock.reschedule(min(end, loop.time() + patience) if soon else end)
                    await asyncio.sleep(0.2)  # the server ends a watch when it likes
        except TimeoutError:
            said = await self.last_event(name)
            raise SandboxError(f"the pod did not start in time: {said or waiting}") from None

    async def last_event(self, name: str) -> str:
        """What the cluster said last about a pod; nothing where that may not be read."""
        with contextlib.suppress(SandboxError), _failing("events"):
            answer = await self.core.list_namespaced_event_without_preload_content(
                self.namespace, field_selector=f"involvedObject.name={name}", _request_timeout=ASKING
            )
            found = _json(await answer.read(), answer.status).get("items") or [{}]
            return f"{found[-1].get('reason') or ''}: {found[-1].get('message') or ''}".strip(": ")
        return ""

    async def attach(self, name: str) -> Wire:
        with _failing(f"pod {name} could not be attached to"):
            connecting = await self._attaching.connect_get_namespaced_pod_attach_without_preload_content(
                name,
                self.namespace,
                container="box",
                stdin=True,
                stdout=True,
                stderr=True,
                tty=False,
                _headers={"sec-websocket-protocol": CHANNELS},
            )
            return Wire(await asyncio.wait_for(connecting, ASKING))

    async def reap(self, older_than: float | None) -> list[str]:
        """Deletes old pods of ours: see Kubernetes.reap."""
        with _failing("pods could not be listed"):
            answer = await self.core.list_namespaced_pod_without_preload_content(
                self.namespace, label_selector=LABEL, _request_timeout=ASKING
            )
            found = _json(await answer.read(), answer.status).get("items") or ()
        gone = []
        for pod in found:
            age = (datetime.now(UTC) - datetime.fromisoformat(pod["metadata"]["creationTimestamp"])).total_seconds()
            if age > (pod["spec"]["activeDeadlineSeconds"] + 60 if older_than is None else older_than):
                await self.delete(pod["metadata"]["name"])
                gone.append(pod["metadata"]["name"])
        return gone


def _waits_for(pod: Mapping[str, Any]) -> tuple[str | None, bool]:
    """What a pod waits for, None if it runs, and whether it waits in vain."""
    ended = _ended(pod)
    if ended is not None:
        return ended[1], True
    status = pod.get("status") or {}
    for container in status.get("containerStatuses") or ():
        state = container.get("state") or {}
        if state.get("running"):
            return None, False
        waiting = state.get("waiting") or {}
        if waiting.get("reason"):
            return f"{waiting['reason']}: {waiting.get('message') or ''}".strip(": "), waiting["reason"] in HOPELESS
    for condition in status.get("conditions") or ():
        if condition.get("reason") == "Unschedulable" and condition.get("status") == "False":
            return f"Unschedulable: {condition.get('message') or ''}".strip(": "), False
    return "", False


def _json(text: bytes, status: int) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if status >= 400 or not isinstance(found, dict):
        said = found.get("message") if isinstance(found, dict) else text[:200].decode(errors="replace")
        raise SandboxError(f"the API server answered {status}: {said}")
    return found


@contextlib.contextmanager
def _failing(what: str) -> Iterator[None]:
    """Turns the errors of clients and connections into SandboxError."""
    import aiohttp
    from kubernetes.aio import client

    try:
        yield
    except SandboxError as error:
        raise SandboxError(f"{what}: {error}") from None
    except client.ApiException as error:
        raise SandboxError(f"{what}: the API server answered {error.status} {error.reason}") from None
    except aiohttp.WSServerHandshakeError as error:
        raise SandboxError(f"{what}: the API server answered {error.status} {error.message}") from None
    except (aiohttp.ClientError, OSError) as error:
        raise SandboxError(f"{what}: {error or type(error).__name__}") from None


def policy() -> dict[str, Any]:
    """Nothing in, nothing out, names neither."""
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": POLICY, "labels": {"app.kubernetes.io/managed-by": "moonkit"}},
        "spec": {"podSelector": {"matchLabels": {LABEL: "closed"}}, "policyTypes": ["Ingress", "Egress"]},
    }


def pod_of(
    spec: Spec,
    name: str,
    image: str,
    *,
    runtime_class: str | None = None,
    cpu: float = 1.0,
    lifetime_s: float = 3600.0,
    host_users: bool = False,
    probe: bool = False,
) -> dict[str, Any]:
    """The pod of a sandbox. probe: as a closed one, but with names and addresses to try."""
    user = 10000 + secrets.randbelow(50000)  # the kernel counts processes by user where pods share their users
    disk, memory = max(1, int(spec.limits.disk_mb)), int(spec.limits.memory_mb) + 128  # 128: process 1 itself
    folders = {"work": "/work", "tmp": "/tmp"}
    box = {
        "name": "box",
        "image": image,
        "command": ["python3", "-I", "-S", "-c", FIRST],
        "workingDir": "/work",
        "stdin": True,
        "stdinOnce": True,
        "tty": False,
        "terminationMessagePolicy": "File",
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "privileged": False,
            "readOnlyRootFilesystem": True,
            "runAsNonRoot": True,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "resources": {
            "limits": {"cpu": str(cpu), "memory": f"{memory}Mi", "ephemeral-storage": f"{2 * disk + 64}Mi"},
        },
        "volumeMounts": [{"name": volume, "mountPath": place} for volume, place in folders.items()],
    }
    inside: dict[str, Any] = {
        "restartPolicy": "Never",
        "activeDeadlineSeconds": int(lifetime_s),
        "terminationGracePeriodSeconds": 0,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "hostUsers": host_users,
        "hostNetwork": False,
        "hostPID": False,
        "hostIPC": False,
        "hostname": "sandbox",
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": user,
            "runAsGroup": user,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [box],
        "volumes": [{"name": volume, "emptyDir": {"sizeLimit": f"{disk}Mi"}} for volume in folders],
    }
    if runtime_class is not None:
        inside["runtimeClassName"] = runtime_class
    if not spec.network and not probe:
        inside |= {"dnsPolicy": "None", "dnsConfig": {"nameservers": ["127.0.0.1"]}}
    network = "open" if spec.network and not probe else "closed"
    metadata = {
        "name": name,
        "labels": {LABEL: network, "app.kubernetes.io/managed-by": "moonkit"},
        "annotations": {"moonkit/owner": f"{socket.gethostname()}, process {os.getpid()}"},
    }
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": inside}


PROBE = """
import os, socket
lines = open("/etc/resolv.conf") if os.path.exists("/etc/resolv.conf") else []
places = [(line.split()[1], 53) for line in lines if line.startswith("nameserver")]
places += [(os.environ.get("KUBERNETES_SERVICE_HOST", "10.96.0.1"), os.environ.get("KUBERNETES_SERVICE_PORT", 443))]
for host, port in [*places, ("1.1.1.1", 443), ("8.8.8.8", 53)]:
    try:
        socket.create_connection((host, int(port)), 2).close()
        print(host, port)
    except OSError:
        pass
"""


class Kubernetes:
    """Sandboxes in a cluster. What is left out comes from the environment: MOONKIT_K8S_NAMESPACE (else that of this
    pod's account, or "default"), MOONKIT_K8S_IMAGE (python:3.12-slim), MOONKIT_K8S_RUNTIME_CLASS (none: the node's).

    context: of the kube config. cpu: cores of a pod. lifetime_s: after so long the cluster ends a pod, whatever
    happens here. start_s: for a pod to run, with its image fetched. patience_s: for a node to be found.
    host_users: True for clusters without user namespaces (before 1.33). pool: so many are kept started.
    """

    name = "kubernetes"

    def __init__(
        self,
        pool: int = 0,
        spec: Spec | None = None,
        *,
        namespace: str | None = None,
        image: str | None = None,
        runtime_class: str | None = None,
        context: str | None = None,
        cpu: float = 1.0,
        lifetime_s: float = 3600.0,
        start_s: float = 180.0,
        patience_s: float = 15.0,
        host_users: bool = False,
    ):
        self.spec = spec or Spec()
        self.namespace = namespace or os.environ.get(NAMESPACE) or _own_namespace() or "default"
        self.image = image or os.environ.get(IMAGE) or "python:3.12-slim"
        self.runtime_class = runtime_class or os.environ.get(RUNTIME) or None
        self.context, self.cpu, self.lifetime_s = context, cpu, lifetime_s
        self.start_s, self.patience_s, self.host_users = start_s, patience_s, host_users
        self._pool = Pool(pool, self.spec, self._start)
        self._prepared = False

    def missing(self) -> str | None:
        if importlib.util.find_spec("kubernetes") is None or importlib.util.find_spec("kubernetes.aio") is None:
            return "the package kubernetes (37 or newer) is not installed: pip install moonkit[k8s]"
        if not _in_cluster() and not any(Path(path).expanduser().exists() for path in _config_files()):
            return f"no cluster is configured: this is no pod with an account, and there is no {_config_files()[0]}"
        return None

    async def open(self, spec: Spec | None = None) -> Sandbox:
        return await self._pool.take(spec)

    async def close(self) -> None:
        await self._pool.close()

    async def reap(self, older_than: float | None = None) -> list[str]:
        """Deletes this namespace's sandboxes, of any host, that were made more than so many seconds ago; without a
        number those whose lifetime is over, which the first `open` does, too. Their names."""
        cluster = await self._connect()
        try:
            return await cluster.reap(older_than)
        finally:
            await cluster.close()

    async def reached(self) -> list[str]:
        """Addresses that a closed pod reaches without our system call filter: none if the cluster's network enforces
        policies. One pod is started for it."""
        async with await self._start(self.spec, probe=True) as box:
            result = await box.python(PROBE)
        if not result.ok:
            raise SandboxError(f"the network could not be tried: {result.status} {result.stderr[-200:]!r}")
        return result.stdout.decode().splitlines()

    async def _connect(self) -> Cluster:
        why = self.missing()
        if why:
            raise SandboxError(why)
        await asyncio.to_thread(importlib.import_module, "kubernetes.aio.client")  # seconds, the first time
        from kubernetes.aio import client, config

        configuration = client.Configuration()
        try:
            if _in_cluster():
                config.load_incluster_config(client_configuration=configuration)
            else:
                await config.load_kube_config(
                    os.pathsep.join(_config_files()), self.context, configuration, persist_config=False
                )
        except (config.ConfigException, OSError, ValueError) as error:
            raise SandboxError(f"the cluster's configuration cannot be used: {error}") from None
        return Cluster(configuration, self.namespace)

    async def _start(self, spec: Spec, probe: bool = False) -> Sandbox:
        if spec.binds:
            raise SandboxError("kubernetes: folders of this machine cannot be bound into a pod; write files instead")
        cluster = await self._connect()
        name = f"moonkit-{uuid.uuid4().hex[:16]}"
        body = pod_of(
            spec,
            name,
            self.image,
            runtime_class=self.runtime_class,
            cpu=self.cpu,
            lifetime_s=self.lifetime_s,
            host_users=self.host_users,
            probe=probe,
        )
        made = False
        try:
            if not self._prepared:
                await cluster.close_network()
                await cluster.reap(None)  # left by hosts that were killed
                self._prepared = True
            made = True
            await cluster.create(body)
            await cluster.started(name, self.start_s, self.patience_s)
            wire = await cluster.attach(name)
        except BaseException:
            if made:
                with contextlib.suppress(SandboxError):
                    await cluster.delete(name)
            await cluster.close()
            raise
        wire.write(parts(marshal.dumps(source_inside(), 2), marshal.dumps(_settings(spec, probe), 2)))
        box = PodSandbox(spec, wire, cluster, name)
        try:
            await wire.drain()
        except ConnectionResetError as error:
            await box.close()
            raise SandboxError(f"pod {name} ended: {error}") from None
        return await ready(box)


def _settings(spec: Spec, probe: bool) -> dict[str, Any]:
    machines = seccomp.AUDIT_ARCH
    return {
        "work": "/work",
        "alone": True,
        "scratch": ["/dev/shm"],
        "watch_disk": ["/work", "/tmp"],
        "keep": ["PATH", *(["KUBERNETES_SERVICE_HOST", "KUBERNETES_SERVICE_PORT"] if probe else [])],
        "env": {"HOME": "/tmp", "LANG": "C.UTF-8", **spec.env},
        "rules": {"seccomp": {each: seccomp.program(each, spec.network or probe).hex() for each in machines}},
    }


def _in_cluster() -> bool:
    return bool(os.environ.get("KUBERNETES_SERVICE_HOST")) and (ACCOUNT / "token").exists()


def _own_namespace() -> str | None:
    return (ACCOUNT / "namespace").read_text().strip() if _in_cluster() else None


def _config_files() -> list[str]:
    return os.environ.get("KUBECONFIG", "~/.kube/config").split(os.pathsep)
