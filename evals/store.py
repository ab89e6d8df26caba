"""What a model has said is kept: an append-only file of replies, found again by what was asked.

    key = sha256(weights, tokenizer, template, prompt with its media's digests, sampling, seed index)
    with Store(folder) as store:
        store.get(key)                 the reply, or None
        store.add(key, reply)          one line more in folder/replies.jsonl

A run that was killed finds again what it had generated, sampled replies too: the seed of each is made from its key, so
that a repeat is another seed index and nothing is generated twice. A line is written whole and under a lock, and is
there when `add` returns; what a killed writer left of its last line is dropped, and one line says so. Several processes
may share a folder.
"""

import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

log = logging.getLogger(__name__)

SYNC_EVERY = 1.0  # seconds: what a killed process wrote is safe at once, only a power cut could take the last second
FORMAT = 1  # part of every key: a store of another format is never misread


def key_of(question: Mapping[str, Any]) -> str:
    """sha256 of a question in canonical JSON. Raises TypeError for what JSON cannot say."""
    text = json.dumps({"format": FORMAT} | dict(question), sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def seed_of(key: str) -> int:
    """The seed of a reply's sampling: 63 bits of its key."""
    return int(key[:16], 16) & (2**63 - 1)


class Store:
    """Replies by key. The index is in memory, the replies stay in the file."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"the store {self.folder} must be a folder, and it is a file")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / "replies.jsonl"
        self._lock = FileLock(self.folder / ".lock")
        self._mutex = threading.RLock()  # the index is shared by the threads of this process
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._places: dict[str, tuple[int, int]] = {}  # key to offset and length of its line
        self._synced = 0.0
        self._read = 0  # bytes of the file that the index knows
        with self._lock:
            self._mend()
            self._catch_up()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._file >= 0:
            os.fsync(self._file)
            os.close(self._file)
            self._file = -1

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: str) -> bool:
        with self._mutex:
            if key not in self._places:
                self._catch_up()
            return key in self._places

    def get(self, key: str) -> dict[str, Any] | None:
        """The reply of a key; None if nobody has added it."""
        if key not in self:
            return None
        start, length = self._places[key]
        return json.loads(os.pread(self._file, length, start))["reply"]

    def add(self, key: str, reply: Mapping[str, Any]) -> None:
        """Keep a reply. The first one of a key stays."""
        self.add_all([(key, reply)])

    def add_all(self, pairs: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
        """Keep several replies in one write."""
        with self._mutex, self._lock:
            self._mend()
            self._catch_up()
            new = {key: reply for key, reply in pairs if key not in self._places}
            lines = [json.dumps({"key": k, "reply": dict(r)}, ensure_ascii=False) + "\n" for k, r in new.items()]
            data = "".join(lines).encode("utf-8", "replace")
            at = 0
            while at < len(data):
                at += os.write(self._file, data[at:])
            if data and time.monotonic() - self._synced > SYNC_EVERY:
                os.fsync(self._file)
                self._synced = time.monotonic()
            self._catch_up()

    def _mend(self) -> None:
        """Drop a last line without an end. Called under the lock: whoever was writing it is gone."""
        size = os.fstat(self._file).st_size
        if not size or os.pread(self._file, 1, size - 1) == b"\n":
            return
        end, step = size, 1 << 16
        while end:
            start = max(0, end - step)
            at = os.pread(self._file, end - start, start).rfind(b"\n")
            if at >= 0:
                end = start + at + 1
                break
            end = start
        os.ftruncate(self._file, end)
        log.warning(
            "%s: the last line was cut off (%d bytes); dropped, it will be generated again", self.path, size - end
        )

    def _catch_up(self) -> None:
        """Index the lines that have come since, by us or by another process."""
        size = os.fstat(self._file).st_size
        if size <= self._read:
            return
        broken = 0
        with open(self.path, "rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    break  # another process is writing it
                try:
                    entry = json.loads(line)
                    self._places.setdefault(entry["key"], (self._read, len(line)))
                    entry["reply"]
                except (ValueError, KeyError, TypeError):
                    broken += 1
                self._read += len(line)
        if broken:
            log.warning("%s: %d lines are no replies; skipped, they will be generated again", self.path, broken)


# ---- hashes of models


def files_digest(files: Iterable[Path], cache: Path | None = None) -> str:
    """sha256 over the contents of files, in order, each hashed once: by path, size and time of change.

    cache: a JSON file of hashes that are known; None for the user's own.
    """
    cache = cache or cache_folder() / "hashes.json"
    known = _read_cache(cache)
    whole, news = hashlib.sha256(), False
    for path in files:
        stat = path.stat()
        name = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
        if name not in known:
            with open(path, "rb") as file:
                known[name] = hashlib.file_digest(file, "sha256").hexdigest()
            news = True
        whole.update(f"{path.name} {known[name]}\n".encode())
    if news:
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            part = cache.with_suffix(f".{os.getpid()}.part")
            part.write_text(json.dumps(known, indent=0), encoding="utf-8")
            part.replace(cache)
        except OSError as error:
            log.info("hashes are not kept (%s): the next run reads the weights again", error)
    return whole.hexdigest()


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moonkit"


def _read_cache(path: Path) -> dict[str, str]:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
