"""Sandboxes in a cluster: one pod each. docs/kubernetes.md says what a cluster needs for it.

    MOONKIT_K8S_NAMESPACE=evals moonkit ...            `auto` takes the cluster then, and nothing else turns it on
    backend("kubernetes")                              the cluster of this pod, or of ~/.kube/config or $KUBECONFIG
    await Kubernetes(image="golang:1.24", runtime_class="gvisor", pool=4).open()

    host ── API server: pod, NetworkPolicy, watch ──> scheduler, kubelet
    host ── "attach" ──> process 1 of the pod (agent/pod.py): limits, files, the end of all that is left
    host ── "exec" ──> kubelet ── starts ──> the command     channel 0: stdin, with its end; 1, 2: output
    host <── channel 3: how it ended ── kubelet <── its parent waits for it, outside the pod

How a command ended comes from channel 3 alone, which no process of the pod can write to: Success, or a return code, and
anything else is an infra_error. The kubelet says a signal as 128 and its number, so that a command that leaves with 137
by itself reads as killed by signal 9. Which limit ended a command, and what it used, is told by process 1: no
signal from inside the pod reaches it, it is handed every orphan, and as its stdin is open just once it ends with the
connection, so that nothing runs on when the host goes. A command can write to neither connection.

What a Spec binds is packed on the host, unpacked by an init container, and mounted read-only (agent/archive.py).

The pod meets the "restricted" standard and more: another user, drawn at random; no capabilities, no service account, a
user namespace of its own, a read-only root, disk, memory and time of fixed size. Addresses are closed twice: by a
NetworkPolicy that the namespace gets if it has none, and by a system call filter, which also holds where the cluster's
network ignores policies (`reached` finds out).

Each sandbox has API clients of its own, in the event loop that it was opened in: no two threads share one.
Needs the extra: pip install moonkit[k8s].
"""

import asyncio
import contextlib
import importlib
import importlib.util
import json
import marshal
import os
import secrets
import signal
import socket
import tempfile
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent import archive, seccomp
from agent.pod import ENTER
from agent.sandbox import (
    FIRST,
    GRACE,
    Channel,
    ExecResult,
    Limits,
    Pool,
    Sandbox,
    SandboxError,
    Spec,
    Status,
    parts,
    ready,
    source_inside,
)

if TYPE_CHECKING:
    import aiohttp

NAMESPACE, IMAGE, RUNTIME = "MOONKIT_K8S_NAMESPACE", "MOONKIT_K8S_IMAGE", "MOONKIT_K8S_RUNTIME_CLASS"
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
POLICY = "moonkit-sandbox"
FILL = "fill"  # the init container that unpacks what a Spec binds
GIVEN = "/given"  # where it does
LABEL = "moonkit/sandbox"  # "closed" or "open": whether the pod may use the network
PROTOCOL = "v5.channel.k8s.io"  # the first that can end a command's stdin; servers from 1.30 on speak it
IN, OUT, ERR, STATUS = 0, 1, 2, 3
CLOSE = 255
PIECE = 32 * 2**10  # bytes of one message of the websocket: what servers use themselves
KEPT = 64 * 2**10  # bytes of stderr and of the status channel
ASKING = 30.0  # seconds for one answer of the API server, and for a command to be started
WATCHING = 10.0  # seconds of one watch
MOST_GIVEN = 2**30  # bytes of what a Spec binds
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


def exit_code(status: bytes) -> int:
    """What channel 3 says of a command: the return code, 128 and a signal's number after a signal. Raises SandboxError
    for all that is not the end of a command."""
    try:
        said = json.loads(status)
        if said["status"] == "Success":
            return 0
        if said["reason"] == "NonZeroExitCode":
            (code,) = (cause["message"] for cause in said["details"]["causes"] if cause["reason"] == "ExitCode")
            if 0 < int(code) < 256:
                return int(code)
        reason = said.get("message") or said["reason"]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        reason = f"it said {status[:200]!r}" if status else "it did not say how the command ended"
    raise SandboxError(f"exec failed: {str(reason)[:500]}")


class Running:
    """A command that "exec" runs, over its websocket. out, err: what it wrote and nobody took yet, up to its limit;
    after that `too_much` is called and the rest is thrown away. news: set when something came."""

    def __init__(self, socket: "aiohttp.ClientWebSocketResponse", most: int, too_much: Callable[[], Awaitable[None]]):
        self._socket, self.most, self._too_much = socket, most, too_much
        self.out, self.err = bytearray(), bytearray()
        self.seen = 0
        self.status = b""  # what channel 3 said
        self.news = asyncio.Event()
        self.ended = asyncio.create_task(self._read())

    async def _read(self) -> int:
        """Its return code."""
        async for message in self._socket:
            data = message.data.encode() if isinstance(message.data, str) else message.data
            if not isinstance(data, bytes) or not data:
                continue
            channel, data = data[0], data[1:]
            if channel in (OUT, ERR):
                room = max(0, self.most - self.seen)
                before, self.seen = self.seen, self.seen + len(data)
                (self.out if channel == OUT else self.err).extend(data[:room])
                if before <= self.most < self.seen:
                    await self._too_much()
                self.news.set()
            elif channel == STATUS:
                self.status += data[: KEPT - len(self.status)]
        return exit_code(self.status)

    async def feed(self, data: bytes, finish: bool = False) -> None:
        """To its stdin. It may have ended without reading it."""
        with contextlib.suppress(ConnectionResetError):
            for at in range(0, len(data), PIECE):
                await self._socket.send_bytes(bytes([IN]) + data[at : at + PIECE])
            if finish:
                await self._socket.send_bytes(bytes([CLOSE, IN]))

    async def leave(self) -> None:
        await self._socket.close()
        await asyncio.gather(self.ended, return_exceptions=True)


class PodChannel(Channel):
    """A running command of a pod."""

    def __init__(self, box: "PodSandbox", limits: Limits, running: Running):
        super().__init__(box, limits)
        self._running = running
        self._kept, self.stderr = running.out, running.err
        self.task = asyncio.create_task(self._end(box, limits))

    async def _end(self, box: "PodSandbox", limits: Limits) -> None:
        try:
            ended = await box.result(self._running, limits)
            # what it wrote waits for `receive`
            self.result = ended if ended.status == "infra_error" else replace(ended, stdout=b"")
        finally:
            self.result = self.result or ExecResult("infra_error", stderr=b"the sandbox was closed")
            self._running.news.set()

    async def send(self, data: bytes) -> None:
        if not self.ended:
            await self._running.feed(data)

    async def finish_input(self) -> None:
        if not self.ended:
            await self._running.feed(b"", finish=True)

    async def kill(self) -> ExecResult:
        if not self.ended:
            with contextlib.suppress(SandboxError):  # its result says so, too
                await self._box._send({"op": "kill", "why": "killed"})
        return await self.wait()

    async def _step(self) -> None:
        await self._running.news.wait()
        self._running.news.clear()


class PodSandbox(Sandbox):
    """A sandbox in a pod."""

    def __init__(self, spec: Spec, wire: Wire, cluster: "Cluster", pod: str):
        super().__init__(spec, wire)
        self._wire, self._cluster, self.pod = wire, cluster, pod
        self._running: Running | None = None

    @property
    def alive(self) -> bool:
        return not self._closed and not self._wire.stdout.at_eof()

    async def _begin(self, command: dict[str, Any], limits: Limits) -> Running:
        async def too_much() -> None:
            with contextlib.suppress(SandboxError):  # process 1 is gone, and the command with it
                await self._send({"op": "kill", "why": "output_limit"})

        door = f"moonkit-{secrets.token_hex(16)}"
        await self._send({"op": "expect", "door": door, **command, "limits": limits.__dict__})
        socket = await self._cluster.exec(self.pod, ["python3", "-I", "-S", "-c", ENTER, door])
        self._running = Running(socket, int(limits.output_kb * 1024), too_much)
        return self._running

    async def _run(self, command: dict[str, Any], stdin: bytes, limits: Limits | None) -> ExecResult:
        limits = limits or self.spec.limits
        async with self._lock:
            self._usable()
            feeding: asyncio.Task[None] | None = None
            try:
                running = await self._begin(command, limits)
                feeding = asyncio.create_task(running.feed(stdin, finish=True))
                return await self.result(running, limits)
            except SandboxError as error:
                return await self._failed(str(error))
            except asyncio.CancelledError:
                await self._fail()
                raise
            finally:
                if feeding is not None:
                    feeding.cancel()
                    await asyncio.gather(feeding, return_exceptions=True)

    async def _spawn(self, command: dict[str, Any], limits: Limits) -> Channel:
        try:
            return PodChannel(self, limits, await self._begin(command, limits))
        except (SandboxError, asyncio.CancelledError):
            await self._fail()  # process 1 may still wait for it
            raise

    async def result(self, running: Running, limits: Limits) -> ExecResult:
        """Of a command, when both the kubelet and process 1 have said that it ended."""
        try:
            code, told = await self._both(running, limits)
        except TimeoutError:
            why = "the sandbox did not answer in time"
            if running.ended.done() and not running.ended.exception():
                last = bytes(running.err[-300:]).decode(errors="replace").strip()
                why += f"; exec ended with {running.ended.result()}: {last or 'nothing was said'}"
            return await self._failed(why, blame=False)
        except SandboxError as error:
            said = running.status and running.ended.done() and running.ended.exception() is error
            return await self._failed(str(error), blame=not said)  # the kubelet has said what it is
        await running.leave()
        self._running = None
        return _result(running, code, told)

    async def _both(self, running: Running, limits: Limits) -> tuple[int, dict[str, Any]]:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(ASKING) as clock:

            async def listen() -> dict[str, Any]:
                while True:
                    header, _ = await self._receive()
                    if header["op"] == "error":
                        raise SandboxError(header["text"])
                    if header["op"] == "done":
                        return header
                    clock.reschedule(loop.time() + limits.wall_s + GRACE)  # it has begun

            told = asyncio.create_task(listen())
            waiting: set[asyncio.Task[Any]] = {told, running.ended}
            try:
                while waiting:
                    done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                    for each in done:
                        each.result()
                    # the rest of its output may still be on its way
                    clock.reschedule(loop.time() + (GRACE if running.ended.done() else ASKING))
            finally:
                told.cancel()
                await asyncio.gather(told, return_exceptions=True)
        return running.ended.result(), told.result()

    async def _failed(self, why: str, blame: bool = True) -> ExecResult:
        if self._closed:
            return ExecResult("infra_error", stderr=b"the sandbox was closed")
        status, text = (await self._blame() if blame else None) or ("infra_error", why)
        await self._fail()
        return ExecResult(status, stderr=text.encode())

    async def _blame(self) -> tuple[Status, str] | None:
        """Evicted for what it wrote, or out of memory: the command's doing. Else why the pod ended, as far as the API
        server or the connection said."""
        best: tuple[Status, str] | None = None
        end = time.monotonic() + (1 if self.alive else 3)
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
        if self._running is not None:
            await self._running.leave()
        if isinstance(self._channel, PodChannel) and self._channel.task is not asyncio.current_task():
            await asyncio.gather(self._channel.task, return_exceptions=True)
        await self._wire.end()
        # where the server is gone the pod ends by itself, as its stdin has ended, and `reap` takes it away later
        with contextlib.suppress(SandboxError):
            await self._cluster.delete(self.pod)
        await self._cluster.close()


def _result(running: Running, code: int, told: Mapping[str, Any]) -> ExecResult:
    """code: as the kubelet has it. told: by process 1."""
    returncode = 128 - code if 128 < code <= 128 + signal.SIGRTMAX else code
    truncated = running.seen > running.most
    status: Status = told["why"] or ("output_limit" if truncated else "ok")
    if status == "ok" and code:
        if returncode == -signal.SIGXCPU:
            status = "timeout"
        elif returncode == -signal.SIGXFSZ or told["full"]:
            status = "disk"
        else:
            status = "killed" if returncode < 0 else "nonzero"
    measured = {name: told[name] for name in ("wall_s", "cpu_s", "max_rss_mb")}
    return ExecResult(status, returncode, bytes(running.out), bytes(running.err), truncated, **measured)


def _ended(pod: Mapping[str, Any]) -> tuple[Status, str] | None:
    """How a pod ended; None while it runs."""
    status = pod.get("status") or {}
    reason, message = status.get("reason") or "", status.get("message") or ""
    if reason == "Evicted":
        # the pod's own limits are those of disk; a node that is short of something is no fault of it
        return ("disk" if "exceed" in message and "node was low" not in message else "infra_error"), message
    if reason == "DeadlineExceeded":
        return "infra_error", f"the pod's lifetime is over: {message}"
    for container in _containers(status):
        done = (container.get("state") or {}).get("terminated")
        if done and container.get("name") == FILL:
            if done.get("exitCode"):
                return "infra_error", f"what the sandbox is given could not be unpacked: {_how(done)}"
        elif done:
            text = f"process 1 ended with {_how(done)}"
            return ("memory" if done.get("reason") == "OOMKilled" else "infra_error"), text
    if status.get("phase") in ("Failed", "Succeeded"):
        return "infra_error", f"the pod has ended: {reason or status['phase']} {message}".strip()
    return None


def _containers(status: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]


def _how(done: Mapping[str, Any]) -> str:
    said = (done.get("message") or "").strip().splitlines()[-1:]
    return f"{done.get('exitCode')} ({': '.join([done.get('reason') or 'no reason', *said])})"


class Cluster:
    """A connection to an API server, for one event loop and one namespace. Everything it does raises SandboxError."""

    def __init__(self, configuration: Any, namespace: str):
        from kubernetes.aio import client, stream

        self.namespace = namespace
        self._http = client.ApiClient(configuration)
        self._sockets = stream.WsApiClient(configuration, heartbeat=30)
        self.core, self.network = client.CoreV1Api(self._http), client.NetworkingV1Api(self._http)
        self._streams = client.CoreV1Api(self._sockets)

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

    async def started(self, name: str, container: str, seconds: float, patience: float) -> None:
        """Until a container of the pod runs. patience: seconds in which a node must be found, as one may be on its
        way."""
        loop, waiting = asyncio.get_running_loop(), "no node has taken it"
        end = loop.time() + seconds
        try:
            async with asyncio.timeout_at(end) as clock:
                while True:
                    # a watch says nothing of a pod that was deleted before it
                    if await self.pod(name) is None:
                        raise SandboxError(f"pod {name} was deleted by another")
                    with _failing(f"pod {name}"):
                        async with contextlib.aclosing(self.changes(name, min(seconds, WATCHING))) as changes:
                            async for pod in changes:
                                reason, hopeless = _waits_for(pod, container)
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

    async def attach(self, name: str, container: str = "box") -> Wire:
        """The pipes of a container's first process."""
        call = self._streams.connect_get_namespaced_pod_attach_without_preload_content
        return Wire(await self._stream(f"pod {name} could not be attached to", call, name, container=container))

    async def exec(self, name: str, command: Sequence[str]) -> "aiohttp.ClientWebSocketResponse":
        call = self._streams.connect_get_namespaced_pod_exec_without_preload_content
        return await self._stream(f"exec in pod {name}", call, name, container="box", command=list(command))

    async def _stream(
        self, what: str, call: Callable[..., Any], name: str, **options: Any
    ) -> "aiohttp.ClientWebSocketResponse":
        pipes = {"stdin": True, "stdout": True, "stderr": True, "tty": False}
        with _failing(what):
            connecting = await call(
                name, self.namespace, **pipes, **options, _headers={"sec-websocket-protocol": PROTOCOL}
            )
            return await asyncio.wait_for(connecting, ASKING)

    async def fill(self, name: str, places: Sequence[Path], seconds: float) -> None:
        """Sends what a sandbox is given to the container that unpacks it, until that has ended, well or not."""
        with tempfile.TemporaryFile() as packed:
            await asyncio.to_thread(archive.pack, places, packed)
            size = packed.tell()
            packed.seek(0)
            wire = await self.attach(name, FILL)
            try:
                async with asyncio.timeout(seconds):
                    wire.write(size.to_bytes(8, "big"))
                    with contextlib.suppress(ConnectionResetError):  # it has ended: why is in the pod's status
                        while piece := await asyncio.to_thread(packed.read, 2**20):
                            wire.write(piece)
                            await wire.drain()
                    await wire.stderr.read()
            except TimeoutError:
                raise SandboxError(f"what pod {name} is given did not get there in {seconds:.0f} seconds") from None
            finally:
                await wire.end()

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
            most = (pod["spec"].get("activeDeadlineSeconds") or 0) + 60 if older_than is None else older_than
            if age > most:
                await self.delete(pod["metadata"]["name"])
                gone.append(pod["metadata"]["name"])
        return gone


def _waits_for(pod: Mapping[str, Any], container: str) -> tuple[str | None, bool]:
    """What a container of a pod waits for, None if it runs, and whether it waits in vain."""
    ended = _ended(pod)
    if ended is not None:
        return ended[1], True
    status = pod.get("status") or {}
    reason = ""
    for each in _containers(status):
        state = each.get("state") or {}
        if state.get("running") and each.get("name") == container:
            return None, False
        waiting = state.get("waiting") or {}
        if waiting.get("reason"):
            reason = f"{waiting['reason']}: {waiting.get('message') or ''}".strip(": ")
            if waiting["reason"] in HOPELESS:
                return reason, True
    if reason:
        return reason, False
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
        raise SandboxError(
            f"{what}: the API server answered {error.status} {error.message}; it must speak {PROTOCOL} (Kubernetes "
            "1.30 or newer), and the role must allow get and create on pods/attach and pods/exec"
        ) from None
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
    given: int = 0,
) -> dict[str, Any]:
    """The pod of a sandbox. probe: as a closed one, but with names and addresses to try. given: bytes of what the spec
    binds."""
    user = 10000 + secrets.randbelow(50000)  # the kernel counts processes by user where pods share their users
    disk, memory = max(1, int(spec.limits.disk_mb)), int(spec.limits.memory_mb) + 128  # 128: process 1 itself
    folders = {"work": "/work", "tmp": "/tmp"}
    storage = 2 * disk + 64
    box: dict[str, Any] = {
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
            "limits": {"cpu": str(cpu), "memory": f"{memory}Mi", "ephemeral-storage": f"{storage}Mi"},
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
    if spec.binds:
        size = given // 2**20 + 16  # folders of the file system itself
        storage += size
        box["resources"]["limits"]["ephemeral-storage"] = f"{storage}Mi"
        fill = {
            **box,
            "name": FILL,
            "command": ["python3", "-I", "-S", "-c", archive.UNPACK, GIVEN],
            "workingDir": GIVEN,
            "terminationMessagePolicy": "FallbackToLogsOnError",
            "volumeMounts": [{"name": "given", "mountPath": GIVEN}],
        }
        inside["initContainers"] = [fill]
        inside["volumes"] = [*inside["volumes"], {"name": "given", "emptyDir": {"sizeLimit": f"{size}Mi"}}]
        box["volumeMounts"] = [
            *box["volumeMounts"],
            *(
                {"name": "given", "mountPath": place, "subPath": str(number), "readOnly": True}
                for number, place in enumerate(spec.binds)
            ),
        ]
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
        places = [Path(outside) for outside in spec.binds.values()]
        taken = sorted({"/", "/work", "/tmp", GIVEN} & {place.rstrip("/") or "/" for place in spec.binds})
        if taken:
            raise SandboxError(f"kubernetes: nothing can be bound to {taken[0]}, which is the pod's own")
        given = await asyncio.to_thread(archive.measure, places, MOST_GIVEN)
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
            given=given,
        )
        made = False
        try:
            if not self._prepared:
                await cluster.close_network()
                await cluster.reap(None)  # left by hosts that were killed
                self._prepared = True
            made = True
            await cluster.create(body)
            if places:
                await cluster.started(name, FILL, self.start_s, self.patience_s)
                await cluster.fill(name, places, self.start_s)
            await cluster.started(name, "box", self.start_s, self.patience_s)
            wire = await cluster.attach(name)
        except BaseException:
            if made:
                with contextlib.suppress(SandboxError):
                    await cluster.delete(name)
            await cluster.close()
            raise
        wire.write(parts(marshal.dumps(_first(), 2), marshal.dumps(_settings(spec, probe), 2)))
        box = PodSandbox(spec, wire, cluster, name)
        try:
            await wire.drain()
        except ConnectionResetError as error:
            await box.close()
            raise SandboxError(f"pod {name} ended: {error}") from None
        return await ready(box)


def _first() -> str:
    """What process 1 runs, and keeps compiled for each command."""
    texts = [source_inside(), (Path(__file__).parent / "pod.py").read_text(encoding="utf-8")]
    return (
        f"codes = [compile(text, 'sandbox', 'exec', dont_inherit=True, optimize=2) for text in {texts!r}]\n"
        "for code in codes:\n    exec(code)\nCODES += codes\n"
    )


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
