"""Real text and code as documents: Python sources of this machine, folders, text files, JSONL, parquet, hub data sets.

    Corpus("python")                the standard library's sources; "python+site" also those of installed packages
    Corpus("notes/")                text files, JSONL and parquet of a folder, hidden ones left out; or one such file
    Corpus("hf:owner/name:split")   a data set of the Hugging Face hub, streamed; the split is train if none is named
    corpus.document(7)   ->   Document(text, messages, where)   or   Bad(where, reason)

    file or row  ─ cut at ends of lines into at most max_chars ─  documents, numbered, in a new order every epoch

A row is {"text": ...} or {"messages": [...]}. What cannot be trained on is a Bad, never an exception: the caller counts
it. Of a folder and of Python sources, files that `held_out("corpus|relative/path")` picks are in split heldout alone.
"""

import json
import logging
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from world.sample import Split, belongs, rng_of

log = logging.getLogger(__name__)

TEXT_SUFFIXES, TABLE_SUFFIXES = (".txt", ".md", ".py"), (".jsonl", ".parquet")
LARGEST_SOURCE = 500_000  # bytes; a larger Python source is a table that a program wrote
# other people's packages, tests, and modules that are tables
NOT_READ = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}


@dataclass(frozen=True)
class Document:
    """One of text and messages, never both, never neither. where: file and line or row, for people."""

    text: str | None
    messages: list[dict[str, Any]] | None
    where: str

    def __post_init__(self) -> None:
        assert (self.text is None) != (self.messages is None), "a document is a text or a conversation"


@dataclass(frozen=True)
class Bad:
    """What cannot be trained on. reason: the kind of fault, under which it is counted."""

    where: str
    reason: str


class Corpus:
    """Documents by number, or of a hub data set one after another. Pickles: a worker opens its own files."""

    def __init__(self, spec: str, seed: int = 0, split: Split = "train", max_chars: int = 4000) -> None:
        """Reads local files once, to know how many documents they make.

        Raises ValueError when there is nothing to read, or when a package that the format needs is not installed.
        """
        if max_chars < 1:
            raise ValueError(f"a document has at least one character, got max_chars={max_chars}")
        self.spec, self.seed, self.max_chars = spec, seed, max_chars
        self.streams = spec.startswith("hf:")
        self._rows: list[_Rows] = []
        if self.streams:
            if split == "heldout":
                raise ValueError(f"{spec}: a hub data set has splits of its own; name one as hf:NAME:SPLIT")
            _ = self._open_stream(0)  # now: what does not exist is an error before the run
        else:
            self._rows = [_open(path, where, max_chars) for path, where in _files(spec, split)]
        counts = np.concatenate([rows.counts for rows in self._rows]) if self._rows else np.zeros(0, np.int64)
        self._ends = np.cumsum(counts)
        self._first = np.cumsum([0, *(len(rows.counts) for rows in self._rows)])  # number of each file's first row
        if not self.streams and not counts.sum():
            raise ValueError(f"corpus {spec!r}: {len(self._rows)} files, no rows in them")

    def __len__(self) -> int:
        """Documents of one epoch. Raises TypeError for a stream, whose length nobody knows."""
        if self.streams:
            raise TypeError(f"{self.spec} is streamed, its length is not known")
        return int(self._ends[-1])

    def document(self, index: int) -> Document | Bad:
        """Document `index` of an endless sequence: every one once an epoch. Raises TypeError for a stream."""
        if self.streams:
            raise TypeError(f"{self.spec} is streamed: read it with stream(start)")
        if index < 0:
            raise ValueError(f"documents are numbered from 0, got {index}")
        epoch, place = divmod(index, len(self))
        number = int(_order(len(self), self.seed, epoch)[place])
        row = int(np.searchsorted(self._ends, number, side="right"))
        part = number - (int(self._ends[row - 1]) if row else 0)
        file = int(np.searchsorted(self._first, row, side="right")) - 1
        return self._rows[file].read(row - int(self._first[file]), part)

    def stream(self, start: int = 0) -> Iterator[Document | Bad]:
        """Documents from number `start` on, without end. A hub data set is read from its beginning to get there.

        Raises RuntimeError when the connection breaks: the row after a break is not the next one.
        """
        if not self.streams:
            return map(self.document, count(start))
        return islice(self._all_streamed(), start, None)

    def _all_streamed(self) -> Iterator[Document | Bad]:
        for epoch in count():
            rows, number = self._open_stream(epoch), -1
            while True:
                try:
                    row = next(rows, None)
                except (OSError, ValueError) as error:
                    raise RuntimeError(f"{self.spec}: the stream broke after row {number} ({error})") from error
                if row is None:
                    break
                number += 1
                yield from _documents(row, f"{self.spec} epoch {epoch} row {number}", self.max_chars)
            if number < 0:
                raise RuntimeError(f"{self.spec}: no rows in it")

    def _open_stream(self, epoch: int) -> Iterator[Any]:
        try:
            from datasets import load_dataset  # type: ignore[import-untyped]
        except ModuleNotFoundError as error:
            raise ValueError(f"{self.spec} needs the package datasets: pip install datasets") from error
        name, _, split = self.spec.removeprefix("hf:").partition(":")
        try:
            rows = load_dataset(name, split=split or "train", streaming=True)
        except (OSError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"{self.spec} cannot be opened: no such data set or split, or no network ({reason})"
            ) from error
        return iter(rows.shuffle(seed=self.seed + epoch, buffer_size=1000))


# ---- which files -----------------------------------------------------------------------------------------------------


def _files(spec: str, split: Split) -> list[tuple[Path, str]]:
    """Files of a spec in a fixed order, each with the name under which documents are reported."""
    if spec in ("python", "python+site"):
        found = list(_python_sources("stdlib", NOT_READ))
        if spec == "python+site":
            found += _python_sources("purelib", NOT_READ - {"site-packages", "dist-packages"})
    else:
        root = Path(spec).expanduser()
        if root.is_file():
            if root.suffix not in TEXT_SUFFIXES + TABLE_SUFFIXES:
                raise ValueError(f"{spec}: read are {', '.join(TEXT_SUFFIXES + TABLE_SUFFIXES)}, not {root.suffix!r}")
            if split == "heldout":
                raise ValueError(f"{spec}: one file has no held-out part; a folder has, file by file")
            return [(root, root.name)]
        if not root.is_dir():
            raise ValueError(f"no corpus {spec!r}: neither a file, a folder, python, python+site nor hf:NAME")
        every = [(p, p.relative_to(root)) for p in sorted(root.rglob("*")) if p.is_file()]
        shown = [(p, r) for p, r in every if not any(part.startswith(".") for part in r.parts)]
        found = [(p, r.as_posix()) for p, r in shown if p.suffix in TEXT_SUFFIXES + TABLE_SUFFIXES]
        if len(found) < len(shown):
            log.info("%s: %d of %d files are of a kind that is read", spec, len(found), len(shown))
    kept = [(path, name) for path, name in found if belongs(f"corpus|{name}", split)]
    if not kept:
        raise ValueError(f"corpus {spec!r}: {len(found)} files, none of them in split {split}")
    return kept


def _python_sources(place: str, skip: set[str]) -> Iterator[tuple[Path, str]]:
    root = Path(sysconfig.get_paths()[place])
    for folder, inside, files in os.walk(root):
        inside[:] = sorted(set(inside) - skip)  # walk goes into what stays here
        for path in (Path(folder) / name for name in sorted(files) if name.endswith(".py")):
            if 0 < path.stat().st_size <= LARGEST_SOURCE and _is_utf8(path):
                yield path, path.relative_to(root).as_posix()


def _is_utf8(path: Path) -> bool:
    try:
        path.read_bytes().decode()
    except (UnicodeDecodeError, OSError):
        return False
    return True


# ---- rows of one file ------------------------------------------------------------------------------------------------


class _Rows:
    """Rows of one file. counts: how many documents each row makes, at least one (a bad row is one Bad)."""

    def __init__(self, path: Path, name: str, max_chars: int, counts: Iterable[int]) -> None:
        self.path, self.name, self.max_chars = path, name, max_chars
        self.counts = np.fromiter(counts, np.int64)

    def read(self, row: int, part: int) -> Document | Bad:
        made = self.documents(row)
        if len(made) == 1 and isinstance(made[0], Bad):
            return made[0]
        return made[part] if part < len(made) else Bad(self.name, "changed since it was opened")

    def documents(self, row: int) -> list[Document | Bad]:
        raise NotImplementedError


class _Text(_Rows):
    """A text file is one row."""

    def __init__(self, path: Path, name: str, max_chars: int) -> None:
        super().__init__(path, name, max_chars, [len(_text_documents(path, name, max_chars))])

    def documents(self, row: int) -> list[Document | Bad]:
        return _remembered_text(self.path, self.name, self.max_chars)


def _text_documents(path: Path, name: str, max_chars: int) -> list[Document | Bad]:
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        return [Bad(name, f"unreadable ({type(error).__name__})")]
    except UnicodeDecodeError:
        return [Bad(name, "not UTF-8")]
    return _documents({"text": text}, name, max_chars)


_remembered_text = lru_cache(maxsize=64)(_text_documents)


class _Lines(_Rows):
    """JSONL: a row per line that is not blank."""

    def __init__(self, path: Path, name: str, max_chars: int) -> None:
        starts, counts, at = [], [], 0
        try:
            with path.open("rb") as lines:
                for number, line in enumerate(lines):
                    if line.strip():
                        starts.append((at, number))
                        short = len(line) <= max_chars  # bytes of JSON: its text is no longer than that
                        counts.append(1 if short else len(_line_documents(line, "", max_chars)))
                    at += len(line)
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error})") from error
        super().__init__(path, name, max_chars, counts)
        self.starts: NDArray[np.int64] = np.array(starts, np.int64).reshape(-1, 2)

    def documents(self, row: int) -> list[Document | Bad]:
        at, number = map(int, self.starts[row])
        where = f"{self.name} line {number + 1}"
        try:
            with self.path.open("rb") as lines:
                lines.seek(at)
                line = lines.readline()
        except OSError as error:
            return [Bad(where, f"unreadable ({type(error).__name__})")]
        return _line_documents(line, where, self.max_chars)


def _line_documents(line: bytes, where: str, max_chars: int) -> list[Document | Bad]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return [Bad(where, "not JSON")]
    return _documents(row, where, max_chars)


class _Parquet(_Rows):
    """Rows of a parquet file; one row group at a time is in memory."""

    def __init__(self, path: Path, name: str, max_chars: int) -> None:
        self.groups = _parquet(path).metadata.num_row_groups
        self.ends: NDArray[np.int64] = np.cumsum([len(_row_group(path, group)) for group in range(self.groups)])
        rows = (row for group in range(self.groups) for row in _row_group(path, group))
        super().__init__(path, name, max_chars, (len(_documents(row, "", max_chars)) for row in rows))

    def documents(self, row: int) -> list[Document | Bad]:
        group = int(np.searchsorted(self.ends, row, side="right"))
        inside = row - (int(self.ends[group - 1]) if group else 0)
        where = f"{self.name} row {row}"
        try:
            rows = _row_group(self.path, group)
        except ValueError as error:
            return [Bad(where, f"unreadable ({type(error.__cause__ or error).__name__})")]
        if inside >= len(rows):
            return [Bad(where, "changed since it was opened")]
        return _documents(rows[inside], where, self.max_chars)


def _parquet(path: Path) -> Any:
    try:
        import pyarrow as pa  # type: ignore[import-untyped]
        import pyarrow.parquet as pq  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise ValueError(f"{path}: parquet needs the package pyarrow: pip install pyarrow") from error
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a parquet file ({error})") from error


@lru_cache(maxsize=4)
def _row_group(path: Path, group: int) -> list[dict[str, Any]]:
    file = _parquet(path)
    names = file.schema_arrow.names
    wanted = [name for name in ("text", "messages") if name in names]
    if not wanted:
        raise ValueError(f"{path}: no column text or messages, only {', '.join(names)}")
    from pyarrow import ArrowException

    try:
        rows: list[dict[str, Any]] = file.read_row_group(group, columns=wanted).to_pylist()
    except (ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{path}: row group {group} cannot be read ({error})") from error
    return rows


def _open(path: Path, name: str, max_chars: int) -> _Rows:
    kinds: dict[str, Callable[[Path, str, int], _Rows]] = {".jsonl": _Lines, ".parquet": _Parquet}
    return kinds.get(path.suffix, _Text)(path, name, max_chars)


# ---- one row ---------------------------------------------------------------------------------------------------------


def _documents(row: Any, where: str, max_chars: int) -> list[Document | Bad]:
    """The documents of a row: a conversation, or the pieces of its text, or one Bad."""
    if not isinstance(row, dict):
        return [Bad(where, f"a row is an object, not {type(row).__name__}")]
    messages, text = row.get("messages"), row.get("text")
    if messages is not None:
        reason = _fault_of(messages)
        return [Bad(where, reason) if reason else Document(None, messages, where)]
    if text is None:
        return [Bad(where, "neither text nor messages")]
    if not isinstance(text, str):
        return [Bad(where, f"text is {type(text).__name__}")]
    if not text.strip():
        return [Bad(where, "empty")]
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell half a character
        return [Bad(where, "not UTF-8")]
    pieces = cut(text, max_chars)
    if len(pieces) == 1:
        return [Document(pieces[0], None, where)]
    return [Document(piece, None, f"{where} part {number}") for number, piece in enumerate(pieces, 1)]


def _fault_of(messages: Any) -> str | None:
    """What is wrong with a conversation, if anything is."""
    if not isinstance(messages, list):
        return f"messages is {type(messages).__name__}"
    if not messages:
        return "empty"
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return "a message without a role"
        if not isinstance(message.get("content"), str | list | None):
            return f"content is {type(message['content']).__name__}"
    return None


def cut(text: str, max_chars: int) -> list[str]:
    """Pieces of at most `max_chars`, cut behind ends of lines, within a line only where it is longer than that.

    Joined they are the text; none is blank, so a run of blank lines may be cut short.
    """
    pieces, start = [], 0
    while len(text) - start > max_chars:
        end = text.rfind("\n", start, start + max_chars) + 1 or start + max_chars
        pieces.append(text[start:end])
        start = end
    pieces.append(text[start:])
    return [piece for piece in pieces if piece.strip()]


@lru_cache(maxsize=8)
def _order(size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    order = np.random.Generator(np.random.PCG64(rng_of("corpus", seed, epoch, size).getrandbits(64)))
    return order.permutation(size)
