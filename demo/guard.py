"""What a visitor may send, read and start: caps, whose file is whose, and a door in front of every route.

In: any request, as hostile as it likes. Out: the same request to Gradio, or a refusal of one sentence.

    request ─ Host, Origin ─ route known? ─ whose session, event, file? ─ size, time ─ Gradio ─ answer (files noted)
    upload  ─ counted while it streams ─ Gradio's folder ─ examined in a child process ─ path, or a sentence
    file    ─ admit (door.py) ─ copied, examined by content ─ the visitor's own folder ─ the model

A visitor is a random cookie of 128 bits; programs without one may send the header `x-moonkit-visitor`. A file of the
server's folder is served to whoever uploaded it, or was shown it in an answer, and to nobody else.

    guarded = Guard(gradio_app, blocks=page, caps=Caps(), hosts=LOOPBACK)
"""

import asyncio
import contextlib
import json
import logging
import os
import re
import secrets
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Collection, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from demo.door import (
    COOKIE,
    HEADER,
    Admitted,
    Caps,
    Refused,
    admit,
    check_room,
    digest_of,
    escape,
    examine,
    files_below,
    folder_size,
    has_scheme,
    home,
    name_of,
    plain_name,
    secret_of,
    uploads,
    visitor_folder,
    visitor_of,
)

__all__ = [
    "LOOPBACK",
    "Admitted",
    "Caps",
    "Guard",
    "Refused",
    "admit",
    "check_room",
    "escape",
    "home",
    "plain_name",
    "uploads",
    "visitor_folder",
    "visitor_of",
]

log = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

LOOPBACK = frozenset({"127.0.0.1", "localhost", "[::1]", "::1"})

_API = "/gradio_api"
_READ = (
    r"/",
    r"/config/?",
    r"/theme\.css",
    rf"{_API}/theme\.css",
    r"/favicon\.ico",
    r"/manifest\.json",
    r"/robots\.txt",
    r"/(static|assets)/[^\\]+",
    rf"{_API}/(info|app_id|user|login_check|startup-events|queue/status)/?",
    rf"{_API}/(?P<file>file)=(?P<path>.+)",
    rf"{_API}/(?P<stream>heartbeat)/(?P<session>[^/]+)",
    rf"{_API}/(?P<stream>queue/data)",
    rf"{_API}/(?P<stream>upload_progress)",
    rf"{_API}/(?P<stream>call)/(?P<name>[^/]+)/(?P<event>[^/]+)",
)
_WRITE = (
    rf"{_API}/(?P<upload>upload)",
    rf"{_API}/(?P<call>queue/join)",
    rf"{_API}/(?P<call>call)/(?P<name>[^/]+)/?",
    rf"{_API}/(?P<call>run|api)/(?P<name>[^/]+)/?",
    rf"{_API}/(?P<call>cancel)",
    rf"{_API}/(?P<call>reset)/?",
)


def _one_of(patterns: Sequence[str]) -> list[re.Pattern[str]]:
    return [re.compile(pattern, re.DOTALL) for pattern in patterns]


_ROUTES = {"GET": _one_of(_READ), "HEAD": _one_of(_READ[:10]), "POST": _one_of(_WRITE)}

# Gradio's page has inline scripts and styles and builds functions from text; nothing may come from elsewhere
_PAGE_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
_FILE_POLICY = "default-src 'none'; sandbox; frame-ancestors 'self'"


class _Cut(Exception):
    """Ends a request in the middle of its body. status 0: the client has left."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status, self.sentence = status, sentence


class _Known:
    """A bounded map that forgets what was used longest ago."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.items: OrderedDict[str, Any] = OrderedDict()

    def get(self, key: str) -> Any:
        if key in self.items:
            self.items.move_to_end(key)
        return self.items.get(key)

    def put(self, key: str, value: Any) -> None:
        self.items[key] = value
        self.items.move_to_end(key)
        while len(self.items) > self.size:
            self.items.popitem(last=False)


@dataclass
class _Busy:
    """What one visitor has open now."""

    uploads: int = 0
    reserved: int = 0  # bytes that are arriving
    calls: int = 0
    streams: int = 0
    # one file at a time: a visitor with slow files leaves the other examiners to others
    examining: asyncio.Lock = field(default_factory=asyncio.Lock, compare=False)


@dataclass
class _Answer:
    """A response that is held back until it was looked at."""

    status: int = 500
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: bytes = b""


class Guard:
    """ASGI middleware around the whole page. Pure: no thread, no state on disk, nothing of Gradio patched.

    app: the ASGI app. blocks: its gr.Blocks, to see the queue and which files its page shows to everyone.
    public: folders whose files everyone may read (examples). hosts: names in the Host header that are ours; None for
    any (a shared or public server, where a foreign page can reach us under our own name only). slow: the concurrency_id
    of the events that make a model work.
    """

    def __init__(
        self,
        app: Any,
        *,
        blocks: Any = None,
        caps: Caps | None = None,
        public: Sequence[Path] = (),
        hosts: Collection[str] | None = LOOPBACK,
        slow: str = "model",
    ) -> None:
        self.app, self.blocks, self.caps = app, blocks, caps or Caps()
        self.root = Path(os.environ.get("GRADIO_TEMP_DIR") or uploads()).resolve()
        self.public = [folder.resolve() for folder in public]
        self.hosts, self.slow = hosts, slow
        self.owners = _Known(100_000)  # path -> set of visitors who may read it
        self.sent = _Known(20_000)  # path -> who uploaded it, for the quota
        self.sessions = _Known(20_000)  # session_hash -> visitor
        self.events = _Known(20_000)  # event_id -> visitor
        self.progress = _Known(2_000)  # upload_id -> visitor
        self.busy: dict[str, _Busy] = {}
        self.examiners = asyncio.Semaphore(self.caps.examiners)
        self.shown_to_all: set[str] | None = None
        self.refusals: Counter[int] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # Gradio speaks plain HTTP only
            await send({"type": "websocket.close", "code": 1008})
            return
        request = _Request(scope)
        try:
            await self._serve(request, receive, send)
        except _Cut as cut:
            if cut.status:
                await self._refuse(request, send, cut.status, cut.sentence)

    async def _serve(self, request: "_Request", receive: Receive, send: Send) -> None:
        self._check_origin(request)
        match = self._route(request)
        part = match.groupdict()
        visitor = request.visitor
        if part.get("file"):
            if not self._allowed_file(part["path"], visitor):
                raise _Cut(403, "this file is not yours, or is gone")
            await self.app(request.scope, receive, _with_headers(send, _FILE_POLICY, None))
        elif part.get("stream"):
            await self._stream(request, part, receive, send)
        elif part.get("upload"):
            await self._upload(request, receive, send)
        elif part.get("call"):
            await self._call(request, part, receive, send)
        else:
            secret = None
            if request.path == "/" and request.method == "GET" and not request.secret:
                secret = secrets.token_hex(16)
            await self.app(request.scope, receive, _with_headers(send, _PAGE_POLICY, secret))

    # -- who and where

    def _check_origin(self, request: "_Request") -> None:
        """A page of another site may link here; it may neither post nor read, nor reach us under its own name."""
        host = request.header("host")
        name = urlsplit(f"//{host}").hostname or ""
        if self.hosts is not None and name not in self.hosts and f"[{name}]" not in self.hosts:
            raise _Cut(403, f"this server answers to {', '.join(sorted(self.hosts))}, not to {plain_name(host)}")
        origin = request.header("origin")
        if origin and urlsplit(origin).netloc.lower() != host.lower():
            raise _Cut(403, "requests from pages of another site are refused")
        crossed = request.header("sec-fetch-site") in ("cross-site", "same-site")
        if crossed and request.header("sec-fetch-mode") != "navigate":
            raise _Cut(403, "requests from pages of another site are refused")

    def _route(self, request: "_Request") -> re.Match[str]:
        if "\0" in request.path or len(request.path) > 4096:
            raise _Cut(400, "the address holds a null byte or is too long")
        for pattern in _ROUTES.get(request.method, []):
            match = pattern.fullmatch(request.path)
            if match:
                if match.groupdict().get("file") is None and ".." in request.path.split("/"):
                    break
                if "deep_link" in request.query:
                    break
                return match
        raise _Cut(404, "there is nothing at this address")

    def _own(self, known: _Known, key: str | None, visitor: str, what: str) -> None:
        """A session, event or upload belongs to who used it first."""
        if not key:
            return
        if len(key) > 128:
            raise _Cut(400, f"a name of a {what} has 128 characters at most, this has {len(key):,}")
        owner = known.get(key)
        if owner is None:
            known.put(key, visitor)
        elif owner != visitor:
            raise _Cut(403, f"this {what} is somebody else's")

    def _allowed_file(self, text: str, visitor: str) -> bool:
        """Whether a visitor may read a file of this server, or send it to the model."""
        if "\0" in text or not os.path.isabs(text) or text != os.path.normpath(text):
            return False
        owners = self.owners.get(text)
        if not (owners and visitor in owners) and text not in self._page_files():
            real = Path(os.path.realpath(text))
            return any(real.is_relative_to(folder) for folder in self.public)
        return Path(os.path.realpath(text)).is_relative_to(self.root) or any(
            Path(os.path.realpath(text)).is_relative_to(folder) for folder in self.public
        )

    def _page_files(self) -> set[str]:
        """Files of the page itself (icons, examples): what its configuration names, before anyone came."""
        if self.shown_to_all is None:
            config = getattr(self.blocks, "config", None)
            found = {text for text in _strings(config) if text.startswith(str(self.root) + os.sep)} if config else set()
            self.shown_to_all = {os.path.normpath(text) for text in found}
        return self.shown_to_all

    def _disclose(self, value: Any, visitor: str) -> None:
        """A visitor may read the files that an answer shows."""
        for text in _shown_files(value):
            path = os.path.normpath(text)
            if path.startswith(str(self.root) + os.sep):
                owners = self.owners.get(path)
                if owners is None:
                    owners = set()
                    self.owners.put(path, owners)
                if len(owners) < 1000:
                    owners.add(visitor)

    # -- the routes

    async def _stream(self, request: "_Request", part: dict[str, Any], receive: Receive, send: Send) -> None:
        visitor = request.visitor
        if part["stream"] == "upload_progress":
            self._own(self.progress, request.query.get("upload_id"), visitor, "upload")
        elif part["stream"] == "call":
            if self.events.get(part["event"]) != visitor:
                raise _Cut(404, "there is no such answer of yours")
        else:
            session = part.get("session") or request.query.get("session_hash")
            if not session:
                raise _Cut(400, "a session_hash was expected")
            self._own(self.sessions, session, visitor, "session")
        with self._counted(visitor, "streams", self.caps.streams, "open connections"):
            scope = request.without_compression()
            watched = self._watched(visitor, _with_headers(send, _FILE_POLICY, None))
            await self.app(scope, receive, watched)

    def _watched(self, visitor: str, send: Send) -> Send:
        marks = {str(self.root).encode(), json.dumps(str(self.root))[1:-1].encode()}

        async def watch(message: Message) -> None:
            body = message.get("body") or b""
            if message["type"] == "http.response.body" and any(mark in body for mark in marks):
                for line in body.split(b"\n"):
                    if line.startswith(b"data:"):
                        with contextlib.suppress(ValueError):
                            self._disclose(json.loads(line[5:]), visitor)
            await send(message)

        return watch

    async def _call(self, request: "_Request", part: dict[str, Any], receive: Receive, send: Send) -> None:
        visitor = request.visitor
        with self._counted(visitor, "calls", self.caps.calls_at_once, "calls at once"):
            raw = await self._read(receive, request)
            body = self._check_body(raw, request)
            session = body.get("session_hash")
            if session is not None and not (isinstance(session, str) and len(session) <= 128):
                raise _Cut(400, "session_hash must be a text of at most 128 characters")
            if part["call"] == "cancel":
                if not session or self.sessions.get(session) != visitor:
                    raise _Cut(403, "this session is somebody else's")
                if self.events.get(str(body.get("event_id"))) not in (visitor,):
                    raise _Cut(403, "this answer is somebody else's")
            else:
                self._own(self.sessions, session, visitor, "session")
            joins = part["call"] in ("queue/join", "call")
            if part["call"] not in ("cancel", "reset"):
                function = self._check_function(body, part.get("name"))
                if joins:
                    self._check_pending(visitor, function)
            answer = await self._collect(request.without_compression(), _replay(raw, receive))
            with contextlib.suppress(ValueError):
                found = json.loads(answer.body)
                self._disclose(found, visitor)
                if joins and isinstance(found, dict) and isinstance(found.get("event_id"), str):
                    self.events.put(found["event_id"], visitor)
            await _send_answer(answer, _with_headers(send, _FILE_POLICY, None))

    def _check_function(self, body: dict[str, Any], name: str | None) -> Any:
        """Gradio's record of the function that a request wants to run; refused where it cannot."""
        data, index = body.get("data"), body.get("fn_index")
        if not isinstance(data, list):
            raise _Cut(400, "data must be a list")
        functions = getattr(self.blocks, "fns", None)
        if functions is None:
            return None
        if name is None or (isinstance(index, int) and name == "predict"):
            function = functions.get(index) if isinstance(index, int) else None
        else:
            function = next((each for each in functions.values() if each.api_name == name), None)
        if function is None:
            raise _Cut(404, "there is no such function here")
        wanted = {len(function.inputs), sum(not block.skip_api for block in function.inputs)}
        if len(data) not in wanted:
            raise _Cut(400, f"data must have {max(wanted)} values, this has {len(data)}")
        return function

    def _check_pending(self, visitor: str, function: Any) -> None:
        """One visitor cannot fill the queue: few answers of a model at a time, and some dozens of small events."""
        queue = getattr(self.blocks, "_queue", None)
        if queue is None:
            return
        running = [event for jobs in queue.active_jobs if jobs for event in jobs]
        waiting = [event for line in queue.event_queue_per_concurrency_id.values() for event in line.queue]
        mine = [event for event in [*running, *waiting] if self.events.get(event._id) == visitor]
        answers = sum(event.concurrency_id == self.slow for event in mine)
        if getattr(function, "concurrency_id", None) == self.slow and answers >= self.caps.pending:
            raise _Cut(429, f"{answers} answers of yours are still being made; wait for one or stop it")
        if len(mine) >= self.caps.waiting:
            raise _Cut(429, f"{len(mine)} requests of yours are still waiting; try again later")

    async def _upload(self, request: "_Request", receive: Receive, send: Send) -> None:
        caps, visitor = self.caps, request.visitor
        self._own(self.progress, request.query.get("upload_id"), visitor, "upload")
        limit = int(caps.upload_mb * 1e6)
        length = request.header("content-length")
        if length and (not length.isdecimal() or int(length) > limit + 65_536):
            raise _Cut(413, f"an upload may have {caps.upload_mb:g} MB, this has {_megabytes(length)}")
        with self._counted(visitor, "uploads", caps.uploads_at_once, "uploads at once") as busy:
            await asyncio.to_thread(self._make_room, visitor, limit)
            busy.reserved += limit
            try:
                counted = self._counting(receive, limit + 65_536)
                answer = await self._collect(request.without_compression(), counted)
            finally:
                busy.reserved -= limit
                await asyncio.to_thread(self._sweep)
            await self._judge(answer, visitor, busy)
        await _send_answer(answer, _with_headers(send, _FILE_POLICY, None))

    async def _judge(self, answer: _Answer, visitor: str, busy: _Busy) -> None:
        """Every uploaded file is examined before its path is told; what is refused is removed."""
        if answer.status != 200:
            return
        paths = [os.path.normpath(text) for text in json.loads(answer.body)]
        deadline = time.monotonic() + self.caps.decode_s
        try:
            if not paths:
                raise Refused("the upload holds no file")
            if len(paths) > self.caps.files:
                raise Refused(f"{self.caps.files} files at most at a time, these are {len(paths)}")
            for text in paths:
                async with busy.examining, self.examiners:
                    left = deadline - time.monotonic()
                    if left <= 0:
                        raise Refused(f"reading the files took longer than {self.caps.decode_s:g} s")
                    try:
                        await asyncio.to_thread(self._examine_upload, Path(text), left)
                    except Refused as refused:
                        raise Refused(f"{plain_name(text)}: {refused}") from None
        except Refused as refused:
            for text in paths:
                if not self.owners.get(text) and Path(text).is_relative_to(self.root):
                    Path(text).unlink(missing_ok=True)
            raise _Cut(422, str(refused)) from None
        for text in paths:
            self._disclose({"path": text, "meta": {"_type": "gradio.FileData"}}, visitor)
            self.sent.put(text, visitor)

    def _examine_upload(self, path: Path, seconds: float) -> None:
        # Gradio names the folder after the content; where it does not, the content is hashed
        named = path.parent.name
        digest = named if re.fullmatch(r"[0-9a-f]{64}", named) and digest_of(path) == named else None
        examine(path, self.caps, digest=digest, seconds=seconds)

    def _make_room(self, visitor: str, size: int) -> None:
        """Room for one more upload: the visitor's own oldest uploads go first, then everyone's oldest files."""
        mine = [text for text, owner in list(self.sent.items.items()) if owner == visitor and os.path.exists(text)]
        over = sum(os.path.getsize(text) for text in mine) + size - self.caps.visitor_mb * 1e6
        for text in mine:
            if over <= 0:
                break
            if self.owners.get(text) == {visitor}:
                over -= os.path.getsize(text)
                Path(text).unlink(missing_ok=True)
        reserved = sum(busy.reserved for busy in list(self.busy.values()))
        over = folder_size(self.root) + reserved + size - self.caps.total_mb * 1e6
        if over <= 0:
            return
        for changed, length, path in sorted(files_below(self.root)):
            if over <= 0 or changed > time.time() - 60:
                break
            path.unlink(missing_ok=True)
            over -= length
        if over > 0:
            raise _Cut(507, "the server's room for uploads is used up; try again later")

    def _sweep(self) -> None:
        """Parts of uploads that never ended: Gradio writes them beside its folders and forgets them."""
        if sum(busy.uploads for busy in list(self.busy.values())) > 1:
            return
        for entry in os.scandir(self.root):
            if entry.is_file(follow_symlinks=False) and entry.name.startswith("tmp"):
                Path(entry.path).unlink(missing_ok=True)

    # -- bodies

    async def _read(self, receive: Receive, request: "_Request") -> bytes:
        limit = int(self.caps.body_mb * 1e6)
        length = request.header("content-length")
        if length and (not length.isdecimal() or int(length) > limit):
            raise _Cut(413, f"a request may have {self.caps.body_mb:g} MB, this has {_megabytes(length)}")
        parts, counted = [], self._counting(receive, limit)
        while True:
            message = await counted()
            parts.append(message.get("body", b""))
            if not message.get("more_body"):
                return b"".join(parts)

    def _counting(self, receive: Receive, limit: int) -> Receive:
        deadline = time.monotonic() + self.caps.receive_s
        total, ended = 0, False

        async def counting() -> Message:
            nonlocal total, ended
            if ended:
                return await receive()  # only the news that the client left can follow
            try:
                message = await asyncio.wait_for(receive(), max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                raise _Cut(408, f"the request took longer than {self.caps.receive_s:g} s to arrive") from None
            if message["type"] == "http.disconnect":
                raise _Cut(0, "the client left")
            total += len(message.get("body", b""))
            ended = not message.get("more_body")
            if total > limit:
                raise _Cut(413, f"a request may have {limit / 1e6:.3g} MB, this has more")
            return message

        return counting

    def _check_body(self, raw: bytes, request: "_Request") -> dict[str, Any]:
        try:
            body = json.loads(raw)
        except (ValueError, RecursionError):
            raise _Cut(400, "the request must be JSON, nested only a little") from None
        if not isinstance(body, dict):
            raise _Cut(400, "the request must be a JSON object")
        for value in _walk(body):
            if isinstance(value, str) and len(value) > self.caps.text_chars:
                raise _Cut(413, f"a text may have {self.caps.text_chars:,} characters, this has {len(value):,}")
            if isinstance(value, dict):
                self._check_object(value, request)
        return body

    def _check_object(self, value: dict[str, Any], request: "_Request") -> None:
        if "component" in value and ("constructor_args" in value or "props" in value or "value" in value):
            raise _Cut(400, "messages cannot carry components")  # Gradio would build whatever they describe
        files = value.get("files")
        if isinstance(files, list) and len(files) > self.caps.files:
            raise _Cut(413, f"{self.caps.files} files at most in a message, these are {len(files)}")
        path, url = value.get("path"), value.get("url")
        for key, text in (("path", path), ("url", url)):
            if text is not None and not isinstance(text, str) and "path" in value:
                raise _Cut(400, f"the {key} of a file must be text")
        if isinstance(path, str) and path:
            if has_scheme(path):
                raise _Cut(403, "nothing is fetched from a network; upload the file itself")
            if not self._allowed_file(path, request.visitor):
                raise _Cut(403, "this file is not yours, or is gone; upload it again")
        if isinstance(path, str) and isinstance(url, str) and url and not self._own_address(url, request):
            raise _Cut(403, "nothing is fetched from a network; upload the file itself")

    def _own_address(self, url: str, request: "_Request") -> bool:
        """Whether the address of a file is one that this server gave it."""
        if url.startswith("blob:"):
            return True  # of the visitor's own browser; nothing here opens it
        parts = urlsplit(url)
        if parts.scheme not in ("", "http", "https"):
            return False
        if parts.netloc and parts.netloc.lower() != request.header("host").lower():
            return False
        _, found, path = parts.path.partition(f"{_API}/file=")
        return bool(found) and self._allowed_file(unquote(path), request.visitor)

    # -- plumbing

    @contextlib.contextmanager
    def _counted(self, visitor: str, what: str, most: int, words: str) -> Iterator[_Busy]:
        busy = self.busy.setdefault(visitor, _Busy())
        if getattr(busy, what) >= most:
            raise _Cut(429, f"{most} {words} at most for one visitor; wait for one to end")
        setattr(busy, what, getattr(busy, what) + 1)
        try:
            yield busy
        finally:
            setattr(busy, what, getattr(busy, what) - 1)
            if busy == _Busy():
                self.busy.pop(visitor, None)

    async def _collect(self, scope: Scope, receive: Receive) -> _Answer:
        """The app's whole answer; what it still says after its request was cut is dropped."""
        answer = _Answer()

        async def keep(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer.status, answer.headers = message["status"], list(message.get("headers", []))
            elif message["type"] == "http.response.body":
                answer.body += message.get("body", b"")

        try:
            await self.app(scope, receive, keep)
        except _Cut:
            raise
        except Exception as error:  # noqa: BLE001 - Gradio's parsers on hostile bodies: whatever they raise
            log.warning("%s: Gradio failed on a request with %s: %s", scope["path"][:80], type(error).__name__, error)
            raise _Cut(400, "the request cannot be read") from None
        return answer

    async def _refuse(self, request: "_Request", send: Send, status: int, sentence: str) -> None:
        self.refusals[status] += 1
        log.info("refused %s %s: %d %s", request.method, request.path[:80], status, sentence)
        if request.path.endswith("/upload") or "json" not in request.header("content-type"):
            body, kind = sentence.encode(), b"text/plain; charset=utf-8"
        else:
            body, kind = json.dumps({"detail": sentence}).encode(), b"application/json"
        headers = [(b"content-type", kind), (b"connection", b"close")]
        await _send_answer(_Answer(status, headers, body), _with_headers(send, _FILE_POLICY, None))


class _Request:
    """What the guard needs of a request's head."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self.method, self.path = scope["method"], scope["path"]
        self.headers: dict[str, str] = {}
        for name, value in scope["headers"]:
            key, text = name.decode("latin-1").lower(), value.decode("latin-1")
            self.headers[key] = f"{self.headers[key]}; {text}" if key == "cookie" and key in self.headers else text
        query = parse_qs(scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True, max_num_fields=None)
        self.query = {name: values[0] for name, values in query.items()}
        self.secret = secret_of(self.header("cookie"))
        if self.secret:
            self.visitor = name_of("cookie", self.secret)
        elif self.header(HEADER):
            self.visitor = name_of("header", self.header(HEADER))
        else:  # programs that name themselves nowhere: one visitor per address, so that they share its caps
            self.visitor = name_of("address", (scope.get("client") or ("?",))[0])

    def header(self, name: str) -> str:
        return self.headers.get(name, "")

    def without_compression(self) -> Scope:
        """The same request, answered in plain bytes that can be read on the way."""
        kept = [(name, value) for name, value in self.scope["headers"] if name.lower() != b"accept-encoding"]
        return {**self.scope, "headers": kept}


def _with_headers(send: Send, policy: str, secret: str | None) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = list(message.get("headers", []))
            headers += [
                (b"x-content-type-options", b"nosniff"),
                (b"referrer-policy", b"same-origin"),
                (b"cross-origin-resource-policy", b"same-origin"),
                (b"content-security-policy", policy.encode()),
            ]
            if secret:
                cookie = f"{COOKIE}={secret}; Path=/; Max-Age=31536000; HttpOnly; SameSite=Lax"
                headers.append((b"set-cookie", cookie.encode()))
            message = {**message, "headers": headers}
        await send(message)

    return sending


async def _send_answer(answer: _Answer, send: Send) -> None:
    kept = [(name, value) for name, value in answer.headers if name.lower() != b"content-length"]
    kept.append((b"content-length", str(len(answer.body)).encode()))
    await send({"type": "http.response.start", "status": answer.status, "headers": kept})
    await send({"type": "http.response.body", "body": answer.body})


def _replay(raw: bytes, receive: Receive) -> Receive:
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": raw, "more_body": False}

    return replay


def _walk(value: Any) -> Iterator[Any]:
    """Every value below a JSON value, keys included; no recursion, so that no nesting is too deep."""
    left = [value]
    while left:
        item = left.pop()
        yield item
        if isinstance(item, dict):
            left.extend(item.keys())
            left.extend(item.values())
        elif isinstance(item, list | tuple):
            left.extend(item)


def _strings(value: Any) -> Iterator[str]:
    return (item for item in _walk(value) if isinstance(item, str))


def _shown_files(value: Any) -> Iterator[str]:
    """Paths of the files in an answer of Gradio: whole file objects, and changes that replace one's path."""
    for item in _walk(value):
        if isinstance(item, dict):
            meta = item.get("meta")
            if isinstance(meta, dict) and meta.get("_type") == "gradio.FileData" and isinstance(item.get("path"), str):
                yield item["path"]
        elif isinstance(item, list) and len(item) == 3 and item[0] in ("add", "replace"):
            where, what = item[1:]
            if isinstance(where, list) and where[-1:] == ["path"] and isinstance(what, str):
                yield what


def _megabytes(length: str) -> str:
    return f"{int(length) / 1e6:.1f} MB" if length.isdecimal() and len(length) < 20 else "an unreadable length"
