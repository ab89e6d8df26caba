"""A cluster for tests: an API server on loopback, whose pods run in bubblewrap.

    with Cluster(folder) as cluster:        KUBECONFIG=cluster.config reaches it, MOONKIT_K8S_NAMESPACE=tests
        cluster.pods, cluster.policies, cluster.asked        what it holds, and every request it got

It knows pods (create, get, list, watch, delete), network policies, events, and attach over a websocket of
v5.channel.k8s.io. It refuses pods that are not hardened, as an admission controller would. The image's name says what
becomes of a pod: "missing" is not found, "nowhere" fits no node, "late" finds one after a while, "broken" has no
Python. With network=True it ignores policies, as clusters without a fitting network do.
"""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from aiohttp import WSMsgType, web

from agent.sandbox import Spec, _drop, _namespaces, find_python

CHANNEL = "v5.channel.k8s.io"


@dataclass
class Pod:
    body: dict[str, Any]
    process: asyncio.subprocess.Process | None = None
    inner: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    version: int = 1
    socket: web.WebSocketResponse | None = None

    def becomes(self, **status: Any) -> None:
        self.body["status"] = {**self.body["status"], **status}
        self.version += 1
        self.body["metadata"]["resourceVersion"] = str(self.version)
        self.changed.set()
        self.changed = asyncio.Event()

    def state(self, **state: Any) -> None:
        self.becomes(containerStatuses=[{"name": "box", "image": "x", "ready": "running" in state, "state": state}])


def faults(pod: dict[str, Any]) -> list[str]:
    """What the "restricted" standard and we ask of a pod, and this one lacks."""
    spec = pod["spec"]
    (box,) = spec["containers"]
    outer, inner = spec.get("securityContext", {}), box.get("securityContext", {})
    limits = box.get("resources", {}).get("limits", {})
    asked = {
        "user": outer.get("runAsUser", 0) > 0 and outer.get("runAsNonRoot") and inner.get("runAsNonRoot"),
        "seccomp": outer.get("seccompProfile") == inner.get("seccompProfile") == {"type": "RuntimeDefault"},
        "capabilities": inner.get("capabilities") == {"drop": ["ALL"]},
        "privileges": inner.get("allowPrivilegeEscalation") is False and not inner.get("privileged"),
        "root": inner.get("readOnlyRootFilesystem") is True,
        "account": spec.get("automountServiceAccountToken") is False and spec.get("enableServiceLinks") is False,
        "users": spec.get("hostUsers") is False,
        "host": not (spec.get("hostNetwork") or spec.get("hostPID") or spec.get("hostIPC")),
        "limits": {"cpu", "memory", "ephemeral-storage"} <= set(limits),
        "volumes": all("sizeLimit" in volume.get("emptyDir", {}) for volume in spec["volumes"]),
        "end": spec.get("restartPolicy") == "Never" and spec.get("activeDeadlineSeconds", 0) > 0,
        "labels": pod["metadata"]["labels"].get("moonkit/sandbox") in ("open", "closed"),
        "stdin": box.get("stdin") is True and box.get("stdinOnce") is True and not box.get("tty"),
    }
    return [name for name, holds in asked.items() if not holds]


class Cluster:
    """In a thread of its own."""

    def __init__(self, folder: Path, network: bool = False):
        self.folder, self.network = folder, network
        self.pods: dict[str, Pod] = {}
        self.policies: dict[str, dict[str, Any]] = {}
        self.events: list[dict[str, Any]] = []
        self.asked: list[str] = []
        self.bodies: list[dict[str, Any]] = []  # of all pods that were made
        self.loop = asyncio.new_event_loop()
        self.port = 0
        self._runner: web.AppRunner | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def config(self) -> Path:
        return self.folder / "kubeconfig"

    def __enter__(self) -> "Cluster":
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.do(self._serve())
        named = {"name": "here"}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "here",
            "clusters": [{**named, "cluster": {"server": f"http://127.0.0.1:{self.port}"}}],
            "users": [{**named, "user": {"token": "token-of-tests"}}],
            "contexts": [{**named, "context": {"cluster": "here", "user": "here"}}],
        }
        self.config.write_text(json.dumps(config))
        return self

    def __exit__(self, *_: object) -> None:
        self.do(self.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    def do(self, work: Any) -> Any:
        """In its thread."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)

    async def _serve(self) -> None:
        app = web.Application(middlewares=[self._middle])
        pods = "/api/v1/namespaces/tests/pods"
        policies = "/apis/networking.k8s.io/v1/namespaces/tests/networkpolicies"
        app.router.add_post(pods, self._create)
        app.router.add_get(pods, self._list)
        app.router.add_get(pods + "/{name}", self._read)
        app.router.add_delete(pods + "/{name}", self._delete)
        app.router.add_get(pods + "/{name}/attach", self._attach)
        app.router.add_get("/api/v1/namespaces/tests/events", self._events)
        app.router.add_post(policies, self._policy)
        app.router.add_get(policies + "/{name}", self._policy)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]

    async def stop(self) -> None:
        """As if the machine had been switched off: connections end, and so do the pods."""
        for pod in self.pods.values():
            await self.kill(pod)
            if pod.socket is not None and pod.socket._req is not None and pod.socket._req.transport is not None:
                pod.socket._req.transport.abort()
        for task in self._tasks:
            task.cancel()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    @web.middleware
    async def _middle(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.asked.append(f"{request.method} {request.path_qs}")
        if request.headers.get("Authorization") != "Bearer token-of-tests":
            return _refusal(401, "Unauthorized")
        return await handler(request)  # type: ignore[no-any-return]

    # ---- pods

    def _later(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _create(self, request: web.Request) -> web.Response:
        body = await request.json()
        lacking = faults(body)
        if lacking:
            return _refusal(403, f"the pod is not hardened: {', '.join(lacking)}")
        closed = body["metadata"]["labels"]["moonkit/sandbox"] == "closed"
        if closed and not self.policies:
            return _refusal(403, "no policy closes this pod")
        body["metadata"] |= {
            "namespace": "tests",
            "creationTimestamp": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
            "resourceVersion": "1",
        }
        body["status"] = {"phase": "Pending"}
        pod = self.pods[body["metadata"]["name"]] = Pod(body)
        self.bodies.append(json.loads(json.dumps(body)))
        self._later(self._live(pod))
        return web.json_response(body, status=201)

    async def _live(self, pod: Pod) -> None:
        """What scheduler and kubelet do."""
        image = pod.body["spec"]["containers"][0]["image"]
        nowhere = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes"}
        if image in ("nowhere", "late"):
            pod.becomes(conditions=[nowhere])
            if image == "nowhere":
                return
            await asyncio.sleep(0.3)
        pod.becomes(conditions=[{"type": "PodScheduled", "status": "True"}])
        pod.state(waiting={"reason": "ContainerCreating"})
        if image == "missing":
            pod.state(waiting={"reason": "ErrImagePull", "message": "not found"})
            await asyncio.sleep(0.1)
            pod.state(waiting={"reason": "ImagePullBackOff", "message": "Back-off pulling image"})
            return
        if image == "stuck":
            event = {"reason": "FailedCreatePodSandBox", "message": "user namespaces are not supported"}
            self.events.append({"metadata": {"name": "e"}, "involvedObject": {}, **event})
            return
        await self._start(pod)

    async def _start(self, pod: Pod) -> None:
        box = pod.body["spec"]["containers"][0]
        python = find_python()
        assert python is not None
        command = list(box["command"])
        if box["image"] == "broken":
            command = ["/bin/sh", "-c", "echo no python here >&2; exit 127"]
        elif command[0] == "python3":
            command[0] = "/opt/py/bin/" + Path(python.path).name if python.prefix else python.path
        size = int(pod.body["spec"]["volumes"][0]["emptyDir"]["sizeLimit"].removesuffix("Mi"))
        options = _namespaces(Spec(network=self.network), python.prefix)
        options = [str((size + 64) * 2**20) if part == str(64 * 2**20) else part for part in options]
        options += ["--setenv", "PATH", f"{'/opt/py' if python.prefix else '/usr'}/bin:/usr/bin:/bin"]
        options += ["--setenv", "KUBERNETES_SERVICE_HOST", "127.0.0.1"]
        options += ["--setenv", "KUBERNETES_SERVICE_PORT", str(self.port)]
        read, write = os.pipe()
        pod.process = await asyncio.create_subprocess_exec(
            *_drop(),
            *["bwrap", *options, "--info-fd", str(write), "--chdir", "/work", "--", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={},
            cwd="/",
            start_new_session=True,
            pass_fds=(write,),
        )
        os.close(write)
        with os.fdopen(read) as file:
            pod.inner = json.loads(await asyncio.to_thread(file.read) or '{"child-pid": 0}')["child-pid"]
        pod.becomes(phase="Running")
        pod.state(running={"startedAt": "now"})
        code = await pod.process.wait()
        if pod.body["status"]["phase"] == "Running":
            pod.becomes(phase="Failed" if code else "Succeeded")
            pod.state(terminated={"exitCode": code, "reason": "Error" if code else "Completed"})

    async def kill(self, pod: Pod) -> None:
        if pod.process is not None and pod.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pod.inner, signal.SIGKILL)
            await pod.process.wait()

    async def clear(self) -> None:
        for pod in self.pods.values():
            await self.kill(pod)
        self.pods.clear()
        self.events.clear()

    async def evict(self, name: str, message: str) -> None:
        pod = self.pods[name]
        await self.kill(pod)
        await asyncio.sleep(0.3)  # the connection ends before the status says why
        pod.becomes(phase="Failed", reason="Evicted", message=message)

    async def lose(self, name: str) -> None:
        """The connection, with a reason, but not the pod."""
        socket = self.pods[name].socket
        assert socket is not None
        status = {"metadata": {}, "status": "Failure", "message": "node is lost"}
        await socket.send_bytes(b"\x03" + json.dumps(status).encode())
        await socket.close()

    async def out_of_memory(self, name: str) -> None:
        pod = self.pods[name]
        pod.becomes(phase="Failed")
        pod.state(terminated={"exitCode": 137, "reason": "OOMKilled"})
        await self.kill(pod)

    async def _list(self, request: web.Request) -> web.StreamResponse:
        wanted = request.query.get("fieldSelector", "").removeprefix("metadata.name=")
        if "watch" not in request.query:
            label = request.query.get("labelSelector", "")
            items = [pod.body for pod in self.pods.values() if not label or label in pod.body["metadata"]["labels"]]
            return web.json_response({"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": items})
        answer = web.StreamResponse(headers={"Content-Type": "application/json"})
        await answer.prepare(request)
        seen, kind = 0, "ADDED"
        while wanted in self.pods:
            pod = self.pods[wanted]
            if pod.version > seen:
                seen = pod.version
                with contextlib.suppress(ConnectionError):  # it has seen enough
                    await answer.write(json.dumps({"type": kind, "object": pod.body}).encode() + b"\n")
                kind = "MODIFIED"
            else:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(pod.changed.wait(), 1)
        return answer

    async def _read(self, request: web.Request) -> web.Response:
        pod = self.pods.get(request.match_info["name"])
        return _refusal(404, "not found") if pod is None else web.json_response(pod.body)

    async def _delete(self, request: web.Request) -> web.Response:
        pod = self.pods.pop(request.match_info["name"], None)
        if pod is None:
            return _refusal(404, "not found")
        pod.changed.set()
        await self.kill(pod)
        return web.json_response(pod.body)

    async def _attach(self, request: web.Request) -> web.StreamResponse:
        pod = self.pods.get(request.match_info["name"])
        if pod is None or pod.process is None:
            return _refusal(404, "not found")
        process = pod.process
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        socket = web.WebSocketResponse(protocols=(CHANNEL,), max_msg_size=0)
        await socket.prepare(request)
        pod.socket = socket

        async def pass_on(stream: asyncio.StreamReader, channel: int) -> None:
            while data := await stream.read(2**15):
                await socket.send_bytes(bytes([channel]) + data)

        async def end() -> None:
            await asyncio.gather(pass_on(process.stdout, 1), pass_on(process.stderr, 2))  # type: ignore[arg-type]
            await process.wait()
            await socket.send_bytes(b"\x03" + json.dumps({"metadata": {}, "status": "Success"}).encode())
            await socket.close()

        ending = asyncio.ensure_future(end())
        with contextlib.suppress(ConnectionError):
            async for message in socket:
                if message.type is WSMsgType.BINARY and message.data[:1] == b"\x00":
                    process.stdin.write(message.data[1:])
                    await process.stdin.drain()
                elif message.data == b"\xff\x00":
                    process.stdin.close()
        process.stdin.close()  # stdinOnce
        ending.cancel()
        await asyncio.gather(ending, return_exceptions=True)
        return socket

    # ---- the rest

    async def _policy(self, request: web.Request) -> web.Response:
        if request.method == "POST":
            body = await request.json()
            self.policies[body["metadata"]["name"]] = body
            return web.json_response(body, status=201)
        found = self.policies.get(request.match_info["name"])
        return _refusal(404, "not found") if found is None else web.json_response(found)

    async def _events(self, request: web.Request) -> web.Response:
        return web.json_response({"kind": "EventList", "metadata": {}, "items": self.events})

    def age(self, seconds: float) -> None:
        """Makes all pods older."""
        for pod in self.pods.values():
            made = datetime.now(UTC) - timedelta(seconds=seconds)
            pod.body["metadata"]["creationTimestamp"] = f"{made:%Y-%m-%dT%H:%M:%SZ}"


def _refusal(status: int, message: str) -> web.Response:
    body = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "code": status}
    return web.json_response(body, status=status)


@contextlib.contextmanager
def cluster(folder: Path, network: bool = False) -> Iterator[Cluster]:
    """One, with the environment that leads to it."""
    before = {name: os.environ.get(name) for name in ("KUBECONFIG", "MOONKIT_K8S_NAMESPACE", "MOONKIT_K8S_IMAGE")}
    with Cluster(folder, network) as started:
        os.environ |= {"KUBECONFIG": str(started.config), "MOONKIT_K8S_NAMESPACE": "tests"}
        try:
            yield started
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value
