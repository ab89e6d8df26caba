"""Conversations of one visitor, on disk.

    folder of one visitor/
        conversations/<id>.json     messages (OpenAI-style), settings, times, a revision
        ...                         pictures and clips, named in the messages by their path below the folder

    python -c "from demo.history import History; print(History('some/folder').listed())"

A file is written whole or not at all. Whoever writes says which revision was read: when another tab wrote meanwhile,
what comes later is kept beside it, under a new id, and nobody's words are lost.
"""

import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

MAX_CONVERSATIONS = 200
MAX_BYTES = 2 * 2**20
MAX_TITLE = 80
_ID = re.compile(r"[0-9a-f]{16}")
_MEDIA = ("image", "image_url", "video", "video_url")


@dataclass(frozen=True)
class Conversation:
    """One conversation. messages: OpenAI-style; media are absolute paths inside the visitor's folder.

    A message may carry "moonkit": what the page shows beside it (seconds, tokens); a model never reads it. times:
    seconds since 1970. revision: how often it was written.
    """

    id: str = field(default_factory=lambda: secrets.token_hex(8))
    title: str = ""
    messages: tuple[dict[str, Any], ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    created: float = field(default_factory=time.time)
    changed: float = field(default_factory=time.time)
    revision: int = 0


class History:
    """Reads and writes the conversations of one visitor. Safe between threads, tabs and servers."""

    def __init__(
        self, folder: str | Path, max_conversations: int = MAX_CONVERSATIONS, max_bytes: int = MAX_BYTES
    ) -> None:
        """folder: made when something is first written. max_bytes: of one conversation, pictures not counted."""
        self.folder = Path(folder)
        self.max_conversations, self.max_bytes = max_conversations, max_bytes

    @property
    def _conversations(self) -> Path:
        return self.folder / "conversations"

    def listed(self) -> tuple[list[Conversation], list[str]]:
        """All conversations, the last changed first; and a sentence for each file that could not be read."""
        found, notes = [], []
        for path in self._files():
            try:
                found.append(self._load(path))
            except FileNotFoundError:
                continue  # deleted by another tab while this one was looking
            except ValueError as error:
                notes.append(str(error))
        return sorted(found, key=lambda c: c.changed, reverse=True), notes

    def read(self, id: str) -> Conversation:
        """Raises ValueError with one sentence when there is none, or its file is damaged."""
        try:
            return self._load(self._path(id))
        except FileNotFoundError:
            raise ValueError("this conversation is not here any more: it was deleted, or belongs to another") from None

    def write(self, conversation: Conversation) -> Conversation:
        """Keep a conversation; returns it with its new revision.

        The result has another id when what is on disk was written by someone else since `conversation` was read.
        Raises ValueError when it is too large, or too many are kept already.
        """
        path = self._path(conversation.id)
        with self._locked():
            try:
                kept = self._load(path)
                on_disk = kept.revision
                if kept.messages:  # it may have been renamed meanwhile
                    conversation = replace(conversation, title=kept.title)
            except FileNotFoundError:
                on_disk = conversation.revision  # deleted in another tab, and continued here: it lives again
                self._check_number()
            except ValueError:
                on_disk = -1  # damaged: leave it to be looked at, and go on beside it
            if on_disk != conversation.revision:
                self._check_number()
                title = _cut(f"{conversation.title} (from another tab)")
                conversation = replace(conversation, id=secrets.token_hex(8), title=title)
                path = self._path(conversation.id)
            conversation = replace(conversation, revision=conversation.revision + 1, changed=time.time())
            self._store(path, conversation)
        return conversation

    def rename(self, id: str, title: str) -> Conversation:
        """Give a conversation another title. Raises ValueError for an empty one."""
        title = _cut(title)
        if not title:
            raise ValueError("a title needs at least one letter")
        with self._locked():
            renamed = replace(self.read(id), title=title)  # no new revision: an answer may be on its way
            self._store(self._path(id), renamed)
        return renamed

    def delete(self, id: str) -> None:
        """Remove a conversation, and the media that no other one shows. Raises ValueError when there is none."""
        with self._locked():
            path = self._path(id)
            try:
                media = set(media_of(self._load(path).messages))
            except FileNotFoundError:
                raise ValueError("this conversation is not here any more: it was deleted already") from None
            except ValueError:
                media = set()  # damaged: its media cannot be known
            path.unlink()
            self._unlink(media)

    def forget(self, messages: Sequence[dict[str, Any]]) -> None:
        """Remove the media of messages that were not kept, unless a conversation shows them."""
        media = set(media_of(messages))
        if media:
            with self._locked():
                self._unlink(media)

    def sweep(self, media: Path, seconds: float = 3600.0) -> None:
        """Remove what lies in `media`, is older than that, and is shown by no conversation any more."""
        if not media.is_dir():
            return
        with self._locked():
            before = time.time() - seconds
            self._unlink({str(path) for path in media.iterdir() if path.lstat().st_mtime < before})

    def _unlink(self, media: set[str]) -> None:
        kept, notes = self.listed()
        if notes:
            return  # a damaged file may show them
        for source in media - {source for other in kept for source in media_of(other.messages)}:
            if self._inside(Path(source)):
                Path(source).unlink(missing_ok=True)

    # ---- files -------------------------------------------------------------------------------------------------------

    def _files(self) -> list[Path]:
        try:
            return [path for path in self._conversations.glob("*.json") if _ID.fullmatch(path.stem)]
        except OSError as error:
            raise ValueError(f"the kept conversations cannot be read: {error.strerror}") from error

    def _path(self, id: str) -> Path:
        if not isinstance(id, str) or not _ID.fullmatch(id):
            raise ValueError("this is not the name of a conversation")
        return self._conversations / f"{id}.json"

    def _check_number(self) -> None:
        if len(self._files()) >= self.max_conversations:
            raise ValueError(
                f"{self.max_conversations} conversations are kept already, and more are not: delete one first"
            )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self._conversations.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            # thread_local off: a second thread of this process must wait too
            with FileLock(self.folder / ".lock", timeout=10, thread_local=False):
                yield
        except Timeout:
            raise ValueError("the kept conversations are busy: something else holds them for more than 10 s") from None

    def _store(self, path: Path, conversation: Conversation) -> None:
        def inside(source: Any) -> Any:
            if isinstance(source, str) and self._inside(Path(source)):
                return str(Path(source).resolve().relative_to(self.folder.resolve()))
            raise ValueError("a picture or clip lies outside the folder of its visitor, so it is not kept")

        values = asdict(conversation) | {"messages": _with_media(conversation.messages, inside)}
        text = json.dumps(values, ensure_ascii=False, indent=1).encode("utf-8", "backslashreplace")
        if len(text) > self.max_bytes:
            raise ValueError(
                f"this conversation has grown to {len(text) / 2**20:.1f} MiB and {self.max_bytes / 2**20:.1f} MiB are "
                "kept at most: start a new one"
            )
        half = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.part")
        try:
            with half.open("xb") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(half, path)
        except OSError as error:
            raise ValueError(f"the conversation could not be kept: {error.strerror}") from error
        finally:
            half.unlink(missing_ok=True)

    def _load(self, path: Path) -> Conversation:
        damaged = f"a kept conversation ({path.name}) is damaged and left out"
        try:
            if path.stat().st_size > 2 * self.max_bytes:
                raise ValueError(f"{damaged}: it is larger than any that is written here")
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise
        except OSError as error:
            raise ValueError(f"{damaged}: {error.strerror}") from error
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
            raise ValueError(f"{damaged}: it is not JSON") from None
        _check(values, path.stem, damaged)

        def absolute(source: Any) -> str:
            if isinstance(source, str) and self._inside(self.folder / source):
                return str(self.folder / source)
            raise ValueError(f"{damaged}: it names a file outside its folder")

        return Conversation(**values | {"messages": tuple(_with_media(values["messages"], absolute))})

    def _inside(self, path: Path) -> bool:
        return path.resolve().is_relative_to(self.folder.resolve())


def media_of(messages: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Paths of all pictures and clips, in order of appearance."""
    found: list[str] = []

    def note(source: Any) -> Any:
        found.append(str(source))
        return source

    _with_media(messages, note)
    yield from found


def _with_media(messages: Any, change: Callable[[Any], Any]) -> list[dict[str, Any]]:
    """The same messages with `change` of each medium in its place."""

    def part(value: Any) -> Any:
        kind = value.get("type") if isinstance(value, dict) else None
        if kind not in _MEDIA or kind not in value:
            return value
        source = value[kind]
        if isinstance(source, dict):
            return value | {kind: source | {"url": change(source.get("url"))}}
        return value | {kind: change(source)}

    out = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list | tuple):
            message = message | {"content": [part(value) for value in content]}
        out.append(message)
    return out


def _check(values: Any, id: str, damaged: str) -> None:
    """Raises ValueError unless `values` are those of a Conversation."""
    kinds: dict[str, Any] = {
        "id": str,
        "title": str,
        "messages": list,
        "settings": dict,
        "created": int | float,
        "changed": int | float,
        "revision": int,
    }
    if not isinstance(values, dict) or set(values) != set(kinds):
        raise ValueError(f"{damaged}: it has other fields than a conversation has")
    wrong = [name for name, kind in kinds.items() if not isinstance(values[name], kind)]
    if wrong:
        raise ValueError(f"{damaged}: its {wrong[0]} is of another kind")
    if values["id"] != id:
        raise ValueError(f"{damaged}: it says that it is another one")
    for message in values["messages"]:
        if not isinstance(message, dict) or message.get("role") not in ("user", "assistant", "tool", "system"):
            raise ValueError(f"{damaged}: a message has no role")
        content = message.get("content")
        if not isinstance(content, str | list | None):
            raise ValueError(f"{damaged}: a message has no text")
        if isinstance(content, list) and not all(isinstance(part, dict) for part in content):
            raise ValueError(f"{damaged}: a message has no text")


def _cut(title: str) -> str:
    title = " ".join(title.split())
    return title if len(title) <= MAX_TITLE else title[: MAX_TITLE - 1].rstrip() + "…"


def title_of(messages: Sequence[dict[str, Any]]) -> str:
    """A title for a conversation: the first words that were said, or what was shown."""
    for message in messages:
        content = message.get("content")
        if message.get("role") != "user":
            continue
        if isinstance(content, str) and content.strip():
            return _cut(content)
        for part in content if isinstance(content, list) else ():
            if part.get("type") == "text" and part["text"].strip():
                return _cut(part["text"])
        return "a clip" if any("video" in str(part.get("type")) for part in content or ()) else "a picture"
    return "nothing yet"
