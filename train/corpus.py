"""Real text and code as numbered documents: Python sources of this machine, folders, JSONL, parquet, hub data sets.

    open_corpus("python")              the standard library's sources, as windows of whole lines
    open_corpus("notes/")              every text file of a folder, likewise; also one .txt or .py file
    open_corpus("chats.jsonl")         a row per line: {"text": ...} or {"messages": [...], "tools": [...]}
    open_corpus("rows.parquet")        the same columns, and "images" and "videos" for parts that only mark a place
    open_corpus("hf:owner/name")       a data set of the Hugging Face hub, streamed, or of its local cache
    corpus.row(7)   ->   str or dict   document 7 of an endless, shuffled sequence; epoch after epoch

What a row holds is checked where it is encoded; here a row that cannot be read is a ValueError that names it.
"""

import json
import logging
import sysconfig
from collections import OrderedDict
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from lm.bpe import TEXT_SUFFIXES
from world.sample import Split, held_out

log = logging.getLogger(__name__)

Row = str | dict[str, Any]


class Corpus(Protocol):
    """Documents by number. fingerprint: changes when the documents do, so that a resumed run notices."""

    fingerprint: str

    def row(self, index: int) -> Row: ...


def open_corpus(spec: str, seed: int = 0, split: Split = "train", window: int = 3000) -> Corpus:
    """The corpus that a spec or path names, shuffled by `seed`.

    split: for "python", whose files are split by name; user data has one split. window: bytes of one document of a
    text file, cut at the end of a line; 0 means whole files. Raises ValueError or FileNotFoundError.
    """
    if spec == "python":
        root = Path(sysconfig.get_paths()["stdlib"])
        # neither other people's packages, nor tests, nor files that are one long table
        skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "encodings", "pydoc_data"}
        files = [p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts)]
        kept = [p for p in files if held_out(f"python|{p.relative_to(root).as_posix()}") == (split == "heldout")]
        return TextFiles(root, [p for p in kept if p.stat().st_size >= 200], seed, window)
    if spec.startswith("hf:"):
        return HubRows(spec[3:], seed)
    path = Path(spec).expanduser()
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.is_file() and not any(q.startswith(".") for q in p.parts[1:]))
        texts = [p for p in found if p.suffix in TEXT_SUFFIXES - {".jsonl"} and p.stat().st_size]
        tables = [p for p in found if p.suffix in (".jsonl", ".parquet")]
        if tables and not texts:
            return Tables(tables, seed)
        if len(texts) < len(found):
            log.info("%s: %d of %d files are text and not empty, the others are left out", path, len(texts), len(found))
        return TextFiles(path, texts, seed, window)
    if not path.is_file():
        raise FileNotFoundError(f"no corpus {spec!r}: neither a file, a folder, 'python' nor hf:owner/name")
    if path.suffix in (".jsonl", ".parquet"):
        return Tables([path], seed)
    return TextFiles(path.parent, [path], seed, window)


class TextFiles:
    """Windows of whole lines over text files."""

    def __init__(self, root: Path, files: list[Path], seed: int, window: int) -> None:
        if not files:
            raise ValueError(f"{root}: no text files in it")
        if window < 0:
            raise ValueError(f"a window has at least one byte, or 0 for whole files; got {window}")
        self.files = sorted(files)
        self.seed, self.window = seed, window
        sizes = [p.stat().st_size for p in self.files]
        counts = [max(1, size // window) if window else 1 for size in sizes]
        self.ends = np.cumsum(counts)
        names = "\n".join(f"{p.relative_to(root).as_posix()} {n}" for p, n in zip(self.files, sizes, strict=True))
        self.fingerprint = f"{len(files)} files, {crc32(f'{window}{names}'.encode()):08x}"

    def row(self, index: int) -> Row:
        number = _shuffled(int(self.ends[-1]), self.seed, index)
        file = int(np.searchsorted(self.ends, number, side="right"))
        first = int(self.ends[file - 1]) if file else 0
        path, data = self.files[file], _bytes(self.files[file])
        start, stop = 0, len(data)
        if self.window:
            start = _line_start(data, (number - first) * self.window)
            last = number == self.ends[file] - 1
            stop = len(data) if last else _line_start(data, (number - first + 1) * self.window)
        try:
            return data[start:stop].decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{path}: not UTF-8 text") from None


def _line_start(data: bytes, at: int) -> int:
    """The first start of a line at or after `at`; within a line that goes on for long, the start of a character."""
    if at == 0 or at >= len(data):
        return min(at, len(data))
    end = data.find(b"\n", at - 1, at + 1024)
    if end >= 0:
        return end + 1
    while at < len(data) and data[at] & 0xC0 == 0x80:
        at += 1
    return at


class Tables:
    """Rows of JSONL and parquet files. Every row of JSONL is shuffled; of parquet, row groups and rows inside them."""

    def __init__(self, paths: list[Path], seed: int) -> None:
        self.paths, self.seed = paths, seed
        self.blocks: list[tuple[int, int]] = []  # (path, row group) or (path, -1)
        counts: list[int] = []
        self.offsets: dict[int, NDArray[np.int64]] = {}
        for number, path in enumerate(paths):
            if path.suffix == ".jsonl":
                self.offsets[number] = _line_offsets(path)
                self.blocks.append((number, -1))
                counts.append(len(self.offsets[number]))
            else:
                meta = _parquet(path).metadata
                self.blocks += [(number, group) for group in range(meta.num_row_groups)]
                counts += [meta.row_group(group).num_rows for group in range(meta.num_row_groups)]
        self.counts = np.array(counts)
        if not self.counts.sum():
            raise ValueError(f"{paths[0]}: no rows in it")
        sizes = " ".join(f"{path.name} {path.stat().st_size}" for path in paths)
        self.fingerprint = f"{self.counts.sum()} rows, {crc32(sizes.encode()):08x}"

    def row(self, index: int) -> Row:
        epoch, number = divmod(index, int(self.counts.sum()))
        order = _order(len(self.blocks), self.seed, epoch)
        ends = np.cumsum(self.counts[order])
        place = int(np.searchsorted(ends, number, side="right"))
        block = int(order[place])
        inside = number - (int(ends[place - 1]) if place else 0)
        size = int(self.counts[block])
        line = _shuffled(size, self.seed + block + 1, epoch * size + inside)
        file, group = self.blocks[block]
        path = self.paths[file]
        if group >= 0:
            return with_media(_row_group(path, group)[line], path.parent)
        with path.open("rb") as stream:
            stream.seek(int(self.offsets[file][line]))
            text = stream.readline()
        try:
            row = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path}, line {line + 1}: not JSON ({error})") from None
        return with_media(row, path.parent) if isinstance(row, dict) else row if isinstance(row, str) else {"row": row}


_MEDIA = {"image": "images", "image_url": "images", "video": "videos", "video_url": "videos"}  # of a part: its column


def with_media(row: dict[str, Any], folder: Path | None = None) -> dict[str, Any]:
    """The row with every picture and clip in its part of a message.

    A part {"type": "image"} marks a place: it takes the next of the row's `images` (`videos` for clips). A struct of
    bytes and path is one or the other. A relative path is looked up beside the file, in `folder`, and then from the
    working folder. Messages of any other form stay as they are: what is wrong with them is said where they are
    encoded. Raises ValueError where places and media differ in number.
    """
    messages = row.get("messages")
    if not isinstance(messages, list):
        return row
    left = {column: list(row.get(column) or ()) for column in ("images", "videos")}
    places = {column: len(media) for column, media in left.items()}

    def placed(part: Any) -> Any:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in _MEDIA:
            return part
        source = part.get(kind)
        source = part.get(f"{kind}_url") if source is None else source
        if isinstance(source, dict) and "url" in source:
            source = source["url"]
        if source is None:
            column = _MEDIA[kind]
            if not left[column]:
                raise ValueError(f"more places than {column}: the row has {places[column]}")
            source = left[column].pop(0)
        if isinstance(source, dict):  # as data sets store them
            source = source.get("bytes") or source.get("path")
        if folder and isinstance(source, str) and not source.startswith(("data:", "/")) and len(source) < 1024:
            beside = folder / source
            source = str(beside) if beside.is_file() else source
        return {"type": kind, kind: source}

    filled = []
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        filled.append(
            message | {"content": [placed(part) for part in content]} if isinstance(content, list) else message
        )
    unused = [f"{len(media)} of {places[column]} {column}" for column, media in left.items() if media]
    if unused:
        raise ValueError(f"{' and '.join(unused)} have no place in the messages")
    return {name: value for name, value in row.items() if name not in left} | {"messages": filled}


def _line_offsets(path: Path) -> NDArray[np.int64]:
    """Where each line of a file starts; a blank last line is none."""
    starts = [0]
    with path.open("rb") as stream:
        for line in stream:
            starts.append(starts[-1] + len(line))
    return np.array(starts[:-1], dtype=np.int64)


def _parquet(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a parquet file ({error})") from None


@lru_cache(maxsize=4)
def _row_group(path: Path, group: int) -> list[dict[str, Any]]:
    table = _parquet(path)
    names = table.schema_arrow.names
    wanted = [name for name in ("text", "messages", "tools", "images", "videos") if name in names]
    if not {"text", "messages"} & set(wanted):
        raise ValueError(f"{path}: no column text or messages, only {', '.join(names)}")
    return table.read_row_group(group, columns=wanted).to_pylist()


class HubRows:
    """Rows of a hub data set in the order of a seeded, buffered shuffle. Streams; going back starts again."""

    def __init__(self, spec: str, seed: int) -> None:
        """spec: owner/name or a folder, and #split where it is not train."""
        name, _, split = spec.partition("#")
        self.name, self.split, self.seed = name, split or "train", seed
        self.fingerprint = f"hf:{spec}"
        self.rows = self._stream(0)  # now: a name that does not exist is an error before the run
        self.epoch = self.next = self.first = 0  # first: number of the epoch's first row
        self.recent: OrderedDict[int, dict[str, Any]] = (
            OrderedDict()
        )  # lanes of one worker ask in almost the same order

    def row(self, index: int) -> Row:
        if index in self.recent:
            return with_media(self.recent[index])
        if index < self.next:
            self.epoch = self.next = self.first = 0
            self.rows = self._stream(0)
        while self.next <= index:
            try:
                row = next(self.rows, None)
            except (OSError, ValueError) as error:  # what comes after a break is not the next row: stop
                raise RuntimeError(f"hf:{self.name}: the stream broke at row {self.next} ({error})") from error
            if row is None:
                if self.next == self.first:
                    raise RuntimeError(f"hf:{self.name}: no rows in split {self.split}")
                self.epoch, self.first = self.epoch + 1, self.next
                self.rows = self._stream(self.epoch)
                continue
            self.recent[self.next] = row
            self.next += 1
            if len(self.recent) > 4096:
                self.recent.popitem(last=False)
        return with_media(self.recent[index])

    def _stream(self, epoch: int) -> Iterator[dict[str, Any]]:
        from datasets import load_dataset

        rows = load_dataset(self.name, split=self.split, streaming=True)
        return iter(rows.shuffle(seed=self.seed + epoch, buffer_size=1000))


def _shuffled(count: int, seed: int, index: int) -> int:
    """Place `index` of an endless sequence: epoch after epoch, every number below `count` once, in a new order."""
    epoch, place = divmod(index, count)
    return int(_order(count, seed, epoch)[place])


@lru_cache(maxsize=64)
def _order(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.Generator(np.random.PCG64([seed, epoch, count])).permutation(count)


@lru_cache(maxsize=8)
def _bytes(path: Path) -> bytes:
    return path.read_bytes()
