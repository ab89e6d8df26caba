"""A cluster for tests: an API server on loopback, whose pods run in bubblewrap.

    with Cluster(folder) as cluster:        KUBECONFIG=cluster.config reaches it, MOONKIT_K8S_NAMESPACE=tests
        cluster.pods, cluster.policies, cluster.asked        what it holds, and every request it got

It knows pods (create, get, list, watch, delete) with init containers, network policies, events, and attach and exec
over websockets of v5.channel.k8s.io. As a kubelet does, exec starts a process in the namespaces of the pod whose parent
is outside (ENTERING), ends its stdin when channel 0 is closed, waits for it and for the ends of its output, and says on
channel 3 how it ended, a signal as 128 and its number. It refuses pods that are not hardened, as an admission
controller would. The image's name says what becomes of a pod: "missing" is not found, "nowhere" fits no node, "late"
finds one after a while, "broken" has no Python. With network=True it ignores policies, as clusters without a fitting
network do.
"""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from aiohttp import WSMsgType, web

from agent.sandbox import NOBODY, Spec, _drop, _namespaces, find_python

CHANNEL = "v5.channel.k8s.io"

# PID PROGRAM...: runs a program in the namespaces of a process, as its user, and ends as it does.
ENTERING = """import ctypes,fcntl,os,sys
libc=ctypes.CDLL(None,use_errno=True)
pid=sys.argv[1]
def enter(fd):
    if libc.setns(fd,0):
        raise OSError(ctypes.get_errno(),"setns")
own=lambda name:os.stat(f"/proc/self/ns/{name}").st_ino==os.stat(f"/proc/{pid}/ns/{name}").st_ino
names=[name for name in ("pid","mnt","net","ipc","uts","cgroup") if not own(name)]
spaces=[os.open(f"/proc/{pid}/ns/{name}",os.O_RDONLY) for name in names]
user=os.open(f"/proc/{pid}/ns/user",os.O_RDONLY)
enter(fcntl.ioctl(spaces[0],0xb701))  # NS_GET_USERNS: bubblewrap makes two, and the outer one owns the others
for fd in spaces:
    enter(fd)
enter(user)
child=os.fork()
if child==0:
    libc.prctl(38,1,0,0,0)  # PR_SET_NO_NEW_PRIVS
    os.setsid()
    os.chdir("/work")
    os.execvp(sys.argv[2],sys.argv[2:])
null=os.open("/dev/null",os.O_RDWR)
for fd in (0,1,2):
    os.dup2(null,fd)
ended=os.waitpid(child,0)[1]
os._exit(128+os.WTERMSIG(ended) if os.WIFSIGNALED(ended) else os.WEXITSTATUS(ended))"""


@dataclass
class Pod:
    body: dict[str, Any]
    process: asyncio.subprocess.Process | None = None  # of the container "box"
    filling: asyncio.subprocess.Process | None = None  # of the init container
    log: bytes = b""  # of the init container
    given: Path | None = None
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

    def state(self, container: str = "box", **state: Any) -> None:
        kind = "containerStatuses" if container == "box" else "initContainerStatuses"
        self.becomes(**{kind: [{"name": container, "image": "x", "ready": "running" in state, "state": state}]})


def faults(pod: dict[str, Any]) -> list[str]:
    """What the "restricted" standard and we ask of a pod, and this one lacks."""
    spec = pod["spec"]
    outer = spec.get("securityContext", {})
    found = []
    for box in (*spec.get("initContainers", ()), *spec["containers"]):
        inner, limits = box.get("securityContext", {}), box.get("resources", {}).get("limits", {})
        asked = {
            "user": outer.get("runAsUser", 0) > 0 and outer.get("runAsNonRoot") and inner.get("runAsNonRoot"),
            "seccomp": outer.get("seccompProfile") == inner.get("seccompProfile") == {"type": "RuntimeDefault"},
            "capabilities": inner.get("capabilities") == {"drop": ["ALL"]},
            "privileges": inner.get("allowPrivilegeEscalation") is False and not inner.get("privileged"),
            "root": inner.get("readOnlyRootFilesystem") is True,
            "limits": {"cpu", "memory", "ephemeral-storage"} <= set(limits),
            "stdin": box.get("stdin") is True and box.get("stdinOnce") is True and not box.get("tty"),
        }
        found += [name for name, holds in asked.items() if not holds]
    asked = {
        "account": spec.get("automountServiceAccountToken") is False and spec.get("enableServiceLinks") is False,
        "users": spec.get("hostUsers") is False,
        "host": not (spec.get("hostNetwork") or spec.get("hostPID") or spec.get("hostIPC")),
        "volumes": all("sizeLimit" in volume.get("emptyDir", {}) for volume in spec["volumes"]),
        "end": spec.get("restartPolicy") == "Never" and spec.get("activeDeadlineSeconds", 0) > 0,
        "labels": pod["metadata"]["labels"].get("moonkit/sandbox") in ("open", "closed"),
    }
    return found + [name for name, holds in asked.items() if not holds]


class Cluster:
    """In a thread of its own."""

    def __init__(self, folder: Path, network: bool = False):
        self.folder, self.network = folder, network
        self.pods: dict[str, Pod] = {}
        self.policies: dict[str, dict[str, Any]] = {}
        self.events: list[dict[str, Any]] = []
        self.asked: list[str] = []
        self.bodies: list[dict[str, Any]] = []  # of all pods that were made
        self.protocols: tuple[str, ...] = (CHANNEL,)
        self.says: bytes | None = None  # on channel 3, in place of the truth
        self.refuses_exec = False
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
        app.router.add_get(pods + "/{name}/exec", self._exec)
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
        if "initContainers" in pod.body["spec"]:
            (box,) = pod.body["spec"]["initContainers"]
            pod.given = Path(tempfile.mkdtemp(prefix="moonkit-given-"))
            if os.geteuid() == 0:
                os.chown(pod.given, NOBODY, NOBODY)
            pod.filling, _ = await self._contain(pod, box)
            pod.state(box["name"], running={"startedAt": "now"})
            code = await pod.filling.wait()
            ended = {"exitCode": code, "reason": "Error" if code else "Completed"}
            if code and box["terminationMessagePolicy"] == "FallbackToLogsOnError":
                assert pod.filling.stderr is not None, "made with pipes"
                ended["message"] = (pod.log + await pod.filling.stderr.read()).decode()
            pod.state(box["name"], terminated=ended)
            if code:
                pod.becomes(phase="Failed")
                return
        pod.process, pod.inner = await self._contain(pod, pod.body["spec"]["containers"][0])
        pod.becomes(phase="Running")
        pod.state(running={"startedAt": "now"})
        code = await pod.process.wait()
        if pod.body["status"]["phase"] == "Running":
            pod.becomes(phase="Failed" if code else "Succeeded")
            pod.state(terminated={"exitCode": code, "reason": "Error" if code else "Completed"})

    def _environment(self) -> dict[str, str]:
        python = find_python()
        assert python is not None
        path = f"{'/opt/py' if python.prefix else '/usr'}/bin:/usr/bin:/bin"
        return {"PATH": path, "KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(self.port)}

    async def _contain(self, pod: Pod, box: dict[str, Any]) -> tuple[asyncio.subprocess.Process, int]:
        """A container: its process, and the number of what is process 1 in it."""
        python = find_python()
        assert python is not None
        command = list(box["command"])
        if box["image"] == "broken":
            command = ["/bin/sh", "-c", "echo no python here >&2; exit 127"]
        elif command[0] == "python3":
            command[0] = "/opt/py/bin/" + Path(python.path).name if python.prefix else python.path
        size = int(pod.body["spec"]["volumes"][0]["emptyDir"]["sizeLimit"].removesuffix("Mi"))
        *options, remount, root = _namespaces(Spec(network=self.network), python.prefix)
        options = [str((size + 64) * 2**20) if part == str(64 * 2**20) else part for part in options]
        for mount in box["volumeMounts"]:
            if mount["name"] == "given":
                kind = "--ro-bind" if mount.get("readOnly") else "--bind"
                options += [kind, f"{pod.given}/{mount.get('subPath', '')}", mount["mountPath"]]
        options += [remount, root]
        for name, value in self._environment().items():
            options += ["--setenv", name, value]
        read, write = os.pipe()
        process = await asyncio.create_subprocess_exec(
            *_drop(),
            *["bwrap", *options, "--info-fd", str(write), "--chdir", box["workingDir"], "--", *command],
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
            return process, json.loads(await asyncio.to_thread(file.read) or '{"child-pid": 0}')["child-pid"]

    async def kill(self, pod: Pod) -> None:
        if pod.filling is not None and pod.filling.returncode is None:
            pod.filling.kill()
            await pod.filling.wait()
        if pod.process is not None and pod.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pod.inner, signal.SIGKILL)
            await pod.process.wait()
        if pod.given is not None:
            shutil.rmtree(pod.given, ignore_errors=True)

    async def clear(self) -> None:
        for pod in self.pods.values():
            await self.kill(pod)
        self.pods.clear()
        self.events.clear()

    async def vanish(self, name: str) -> None:
        pod = self.pods.pop(name)
        pod.changed.set()
        await self.kill(pod)

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
        if seen:
            with contextlib.suppress(ConnectionError):
                await answer.write(json.dumps({"type": "DELETED", "object": pod.body}).encode() + b"\n")
        return answer

    async def _read(self, request: web.Request) -> web.Response:
        pod = self.pods.get(request.match_info["name"])
        return _refusal(404, "not found") if pod is None else web.json_response(pod.body)

    async def _delete(self, request: web.Request) -> web.Response:
        pod = self.pods.get(request.match_info["name"])
        if pod is None:
            return _refusal(404, "not found")
        await self.vanish(request.match_info["name"])
        return web.json_response(pod.body)

    async def _attach(self, request: web.Request) -> web.StreamResponse:
        pod = self.pods.get(request.match_info["name"])
        process = None if pod is None else pod.process if request.query["container"] == "box" else pod.filling
        if pod is None or process is None:
            return _refusal(404, "not found")
        assert process.stdin is not None, "made with pipes"
        socket = await self._stream(request)
        pod.socket = socket
        said = {"metadata": {}, "status": "Success"}
        ending = asyncio.ensure_future(self._pass_on(process, socket, lambda _: said, pod))
        await _take(process.stdin, socket)
        process.stdin.close()  # stdinOnce
        ending.cancel()
        await asyncio.gather(ending, return_exceptions=True)
        return socket

    async def _exec(self, request: web.Request) -> web.StreamResponse:
        pod, python = self.pods.get(request.match_info["name"]), find_python()
        if self.refuses_exec:
            return _refusal(403, "pods is forbidden")
        if pod is None or request.query.get("container") != "box":
            return _refusal(404, "not found")
        if pod.process is None or pod.process.returncode is not None:
            return _refusal(500, 'unable to upgrade connection: container not found ("box")')
        assert python is not None
        socket = await self._stream(request)
        command = request.query.getall("command")
        if command[0] == "python3":
            command[0] = "/opt/py/bin/" + Path(python.path).name if python.prefix else python.path
        process = await asyncio.create_subprocess_exec(
            *[*_drop(), python.path, "-I", "-S", "-c", ENTERING, str(pod.inner), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self._environment(),
            cwd="/",
            start_new_session=True,
        )
        assert process.stdin is not None, "made with pipes"
        ending = asyncio.ensure_future(self._pass_on(process, socket, _of_exec))
        self._tasks.add(ending)  # goes on without the client
        ending.add_done_callback(self._tasks.discard)
        await _take(process.stdin, socket)
        process.stdin.close()
        return socket

    async def _stream(self, request: web.Request) -> web.WebSocketResponse:
        asked = request.headers.get("Sec-WebSocket-Protocol", "").replace(" ", "").split(",")
        if not set(asked) & set(self.protocols):
            raise web.HTTPBadRequest(text="no such protocol")
        socket = web.WebSocketResponse(protocols=self.protocols, max_msg_size=0)
        await socket.prepare(request)
        return socket

    async def _pass_on(
        self, process: asyncio.subprocess.Process, socket: web.WebSocketResponse, status: Any, pod: Pod | None = None
    ) -> None:
        """Output until all who hold it are gone, then how the process ended."""

        async def each(stream: asyncio.StreamReader, channel: int) -> None:
            while data := await stream.read(2**15):
                if pod is not None and process is pod.filling:
                    pod.log += data
                with contextlib.suppress(ConnectionError):
                    await socket.send_bytes(bytes([channel]) + data)

        assert process.stdout is not None and process.stderr is not None, "made with pipes"
        await asyncio.gather(each(process.stdout, 1), each(process.stderr, 2))
        said = json.dumps(status(await process.wait())).encode() if self.says is None else self.says
        with contextlib.suppress(ConnectionError):
            if said:
                await socket.send_bytes(b"\x03" + said)
            await socket.close()

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


async def _take(stdin: asyncio.StreamWriter, socket: web.WebSocketResponse) -> None:
    """What comes on channel 0, until the client is gone."""
    async for message in socket:
        if message.type in (WSMsgType.BINARY, WSMsgType.TEXT):
            data = message.data.encode() if isinstance(message.data, str) else message.data
            with contextlib.suppress(ConnectionError):
                if data[:1] == b"\x00":
                    stdin.write(data[1:])
                    await stdin.drain()
                elif data == b"\xff\x00":
                    stdin.close()


def _of_exec(code: int) -> dict[str, Any]:
    """As a kubelet writes it."""
    if code == 0:
        return {"metadata": {}, "status": "Success"}
    return {
        "metadata": {},
        "status": "Failure",
        "message": f"command terminated with non-zero exit code: exit status {code}",
        "reason": "NonZeroExitCode",
        "details": {"causes": [{"reason": "ExitCode", "message": str(code)}]},
    }


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
