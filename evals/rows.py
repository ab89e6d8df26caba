"""Benchmark files as published, row by row: every broken row is one message with its file and line.

    Source("docvqa", folder).rows("*.parquet", "*.tsv")   ->   Row, Row, ...
        row.text("question")      a text, or ValueError "docvqa/val.tsv:17: wanted ..."
        row.picture("image")      a Ref: where the picture is, opened only when it is shown

    file            a picture in it                                what a Ref remembers
    .jsonl(.gz)     a path beside the file, or base64              path, or line's offset and field
    .json           a path beside the file                         path
    .tsv .csv       base64, or a path                              record's offset and column, or path
    .parquet        {"bytes", "path"}, as the hub stores images    row number and column
    idx (.gz)       28 x 28 bytes each, as MNIST                   number

No picture is read to list the questions, and no document holds a path of this machine.
"""

import ast
import base64
import binascii
import csv
import gzip
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image as PIL
from PIL import UnidentifiedImageError

MOST_BYTES = 2**31  # of one field of a table
ENLARGED = 4  # times: 28 x 28 pixels are one token, too few to read a digit from
BESIDE = ("images", "png")  # folders beside a file in which its rows' pictures are


@dataclass(frozen=True)
class Ref:
    """A picture or a clip in a data folder. name: the folder's; at: offset, row or number; column: field of the row."""

    name: str
    file: str
    at: int | None = None
    column: str | None = None
    start: float | None = None  # seconds, of a part of a video
    end: float | None = None

    def text(self) -> str:
        return json.dumps({key: value for key, value in vars(self).items() if value is not None})


@dataclass(frozen=True)
class Row:
    """One row: its values, where it stands ("file:line"), and how its pictures are found."""

    values: Mapping[str, Any]
    where: str
    find: Callable[[str, Any], Ref | None] = field(repr=False, default=lambda column, value: None)

    def wrong(self, message: str) -> ValueError:
        return ValueError(f"{self.where}: {message}")

    def get(self, key: str, default: Any = None) -> Any:
        value = self.values.get(key)
        return default if value is None else value

    def need(self, *keys: str) -> Any:
        """The value under the first of these names that the row has."""
        for key in keys:
            if self.values.get(key) is not None:
                return self.values[key]
        raise self.wrong(
            f"no {' or '.join(map(repr, keys))}; the row has {', '.join(map(repr, self.values)) or 'nothing'}"
        )

    def text(self, *keys: str, empty: bool = False) -> str:
        value = self.need(*keys)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise self.wrong(f"{keys[0]!r} must be text, got {type(value).__name__} {str(value)[:60]!r}")
        if not empty and not str(value).strip():
            raise self.wrong(f"{keys[0]!r} is empty")
        return str(value)

    def whole(self, *keys: str) -> int:
        value = self.need(*keys)
        try:
            number = int(str(value))
        except ValueError:
            raise self.wrong(f"{keys[0]!r} must be a whole number, got {str(value)[:60]!r}") from None
        return number

    def number(self, *keys: str) -> float:
        value = self.need(*keys)
        try:
            return float(value)
        except (TypeError, ValueError):
            raise self.wrong(f"{keys[0]!r} must be a number, got {str(value)[:60]!r}") from None

    def list(self, *keys: str) -> list[Any]:
        """A list, or its text as JSON or as Python prints it."""
        value = self.need(*keys)
        if isinstance(value, str):
            value = self.parsed(keys[0], value)
        if hasattr(value, "tolist"):
            value = value.tolist()
        if not isinstance(value, list | tuple):
            raise self.wrong(f"{keys[0]!r} must be a list, got {type(value).__name__} {str(value)[:60]!r}")
        return list(value)

    def parsed(self, key: str, text: str) -> Any:
        for read in (json.loads, ast.literal_eval):
            try:
                return read(text)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
        raise self.wrong(f"{key!r} is neither JSON nor a Python literal: {text[:60]!r}")

    def picture(self, *keys: str) -> Ref:
        """Where the picture is. ValueError when there is none, or its file is missing."""
        found = self.maybe_picture(*keys)
        if found is None:
            raise self.wrong(f"no picture under {' or '.join(map(repr, keys))}")
        return found

    def maybe_picture(self, *keys: str) -> Ref | None:
        for key in keys:
            if self.values.get(key) not in (None, ""):
                return self.find(key, self.values[key])
        return None

    def letter(self, options: Sequence[Any], *keys: str) -> str:
        """The gold letter of a choice: a letter, a number from 0, or the text of an option."""
        value = self.need(*keys)
        letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(options)]
        text = str(value).strip().strip("().")
        if len(text) == 1 and text.upper() in letters:
            return text.upper()
        same = [
            letter
            for letter, option in zip(letters, options, strict=False)
            if str(option).strip() == str(value).strip()
        ]
        if len(same) == 1:
            return same[0]
        if text.isdigit() and int(text) < len(options):
            return letters[int(text)]
        raise self.wrong(f"{keys[0]!r} is {str(value)[:60]!r}, which names none of the {len(options)} options")


@dataclass(frozen=True)
class Source:
    """The data of one suite: a local folder, or a data set of the hub. limit: rows that are wanted, None for all."""

    name: str
    folder: Path | None
    layout: str = ""
    hub: str = ""
    config: str | None = None
    split: str = "test"

    def files(self, *patterns: str) -> list[Path]:
        """Files of the first pattern that has any, in order. ValueError names the layout when there are none."""
        if self.folder is None:
            raise ValueError(
                f"{self.name} comes in files that the hub does not give row by row; layout:\n{self.layout}"
            )
        for pattern in patterns:
            found = sorted(path for path in self.folder.glob(pattern) if path.is_file())
            if found:
                return found
        raise ValueError(f"{self.folder} has no {' or '.join(patterns)}; layout of the folder:\n{self.layout}")

    def rows(self, *patterns: str) -> Iterator[Row]:
        """All rows of the files of the first pattern that has any; of the hub's data set if there is no folder."""
        if self.folder is None:
            yield from self._hub_rows()
            return
        for path in self.files(*patterns):
            yield from self.read(path)

    def read(self, path: Path) -> Iterator[Row]:
        """All rows of one file of the folder."""
        assert self.folder is not None, "only a folder has files"
        kind = path.name.removesuffix(".gz").rsplit(".", 1)[-1]
        readers = {"jsonl": _jsonl, "json": _json, "tsv": _table, "csv": _table, "parquet": _parquet}
        if kind not in readers:
            raise ValueError(f"{path}: no reader for .{kind}; known: {', '.join(readers)}")
        yield from readers[kind](self, path)

    def inside(self, path: Path) -> str:
        """A file's name within the folder. ValueError for a file outside of it."""
        assert self.folder is not None, "only a folder has files"
        try:
            return path.resolve().relative_to(self.folder.resolve()).as_posix()
        except ValueError:
            raise ValueError(f"{path} is outside {self.folder}") from None

    def finder(self, path: Path, where: str, at: int) -> Callable[[str, Any], Ref | None]:
        """Where a row's picture is: a {"bytes"} struct, a path beside the file or in the folder, or base64."""

        def find(column: str, value: Any) -> Ref | None:
            assert self.folder is not None, "only a folder has files"
            if isinstance(value, Mapping):
                return Ref(self.name, self.inside(path), at, column)
            if not isinstance(value, str) or not value:
                raise ValueError(f"{where}: {column!r} must be a picture's path or base64, got {type(value).__name__}")
            if len(value) < 250:  # longer than a name of a file may be
                beside = (path.parent / name for name in BESIDE)
                for base in (self.folder, path.parent, *beside, self.folder / "images"):
                    if (base / value).is_file():
                        return Ref(self.name, self.inside(base / value))
            if len(value) < 60 or "." in value[:60]:
                raise ValueError(f"{where}: the picture {value[:200]!r} is not in {self.folder}")
            try:
                base64.b64decode(value[:400].encode(), validate=True)
            except (binascii.Error, ValueError):
                raise ValueError(f"{where}: {column!r} is neither a file in {self.folder} nor base64") from None
            return Ref(self.name, self.inside(path), at, column)

        return find

    def _hub_rows(self) -> Iterator[Row]:
        import datasets

        found = _hub(self.hub, self.config, self.split)
        for name, kind in list(found.features.items()):
            if isinstance(kind, datasets.Image):
                found = found.cast_column(name, datasets.Image(decode=False))
        for number, values in enumerate(found):
            place = f"{self.hub}/{self.split}"

            def find(column: str, value: Any, number: int = number, place: str = place) -> Ref | None:
                return Ref(f"hub:{self.hub}:{self.config or ''}:{self.split}", place, number, column)

            yield Row(values, f"{place}:{number + 1}", find)


@lru_cache(maxsize=8)
def _hub(name: str, config: str | None, split: str) -> Any:
    import datasets

    return datasets.load_dataset(name, config, split=split)


def _opened(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _jsonl(source: Source, path: Path) -> Iterator[Row]:
    with _opened(path) as file:
        at = 0
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            start, at = at, at + len(line)
            if line.strip():
                yield Row(_mapping(line, where), where, source.finder(path, where, start))


def _mapping(line: bytes, where: str) -> Mapping[str, Any]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{where}: a row is a JSON object, got {type(values).__name__}")
    return values


def _json(source: Source, path: Path) -> Iterator[Row]:
    """A list of objects, {"data": [...]}, or a map from ids to objects."""
    with _opened(path) as file:
        try:
            whole = json.load(file)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not JSON: {error}") from None
    if isinstance(whole, dict) and isinstance(whole.get("data"), list):
        whole = whole["data"]
    pairs = list(whole.items()) if isinstance(whole, dict) else list(enumerate(whole, 1))
    for key, values in pairs:
        where = f"{path}:{key}"
        if not isinstance(values, dict):
            raise ValueError(f"{where}: a row is a JSON object, got {type(values).__name__}")
        yield Row({"key": key, **values} if isinstance(whole, dict) else values, where, source.finder(path, where, 0))


def _table(source: Source, path: Path) -> Iterator[Row]:
    for values, number, start in _records(path):
        where = f"{path}:{number}"
        yield Row(values, where, source.finder(path, where, start))


def _records(path: Path, at: int = 0) -> Iterator[tuple[dict[str, str], int, int]]:
    """Records of a TSV or CSV file with a header: values, line of the record's start, its offset in bytes."""
    csv.field_size_limit(min(sys.maxsize, MOST_BYTES))
    separator = "\t" if ".tsv" in path.name else ","
    with _opened(path) as file:
        place = [0, 0]  # lines and bytes handed on

        def lines() -> Iterator[str]:
            for line in file:
                place[0] += 1
                place[1] += len(line)
                yield line.decode("utf-8-sig" if place[0] == 1 else "utf-8")

        header = next(csv.reader(lines(), delimiter=separator), None)
        if not header:
            raise ValueError(f"{path}:1: no header line")
        if at:
            file.seek(at)
        first, before, number = at or place[1], place[1], place[0] + 1
        start = first
        for record in csv.reader(lines(), delimiter=separator):
            if record and len(record) != len(header):
                raise ValueError(f"{path}:{number}: {len(record)} fields, the header has {len(header)}")
            if record:
                yield dict(zip(header, record, strict=True)), number, start
            start, number = first + place[1] - before, place[0] + 1


def _parquet(source: Source, path: Path) -> Iterator[Row]:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    try:
        table = parquet.ParquetFile(path)
    except (arrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: not a Parquet file: {error}") from None
    schema = table.schema_arrow
    images = [one.name for one in schema if arrow.types.is_struct(one.type) and {"bytes"} <= {f.name for f in one.type}]
    # of pictures only the name is read here: enough to see whether there is one
    columns = [name for name in schema.names if name not in images]
    columns += [f"{name}.path" if "path" in {f.name for f in schema.field(name).type} else name for name in images]
    number = 0
    for batch in table.iter_batches(batch_size=256, columns=columns):
        for values in batch.to_pylist():
            where = f"{path}:{number + 1}"
            yield Row(values, where, source.finder(path, where, number))
            number += 1


# ---- opening


def open_picture(ref: Ref, folder: Path | None) -> PIL.Image:
    """The picture that a Ref names, as RGB. ValueError says which one is missing or broken."""
    where = f"{ref.file}:{ref.at}:{ref.column}" if ref.at is not None else ref.file
    if ref.name.startswith("hub:"):
        _, name, config, split = ref.name.split(":")
        found = _hub(name, config or None, split)[int(ref.at or 0)][str(ref.column)]
        if not isinstance(found, PIL.Image):
            raise ValueError(f"{where}: no picture")
        return found.convert("RGB")
    if folder is None:
        raise ValueError(f"{where}: the folder {ref.name!r} is gone")
    path = folder / ref.file
    if not path.is_file():
        raise ValueError(f"{path}: the picture is missing")
    data = path.read_bytes() if ref.at is None else _embedded(path, ref.at, str(ref.column))
    if isinstance(data, PIL.Image):
        return data
    try:
        with PIL.open(io.BytesIO(data)) as picture:
            return picture.convert("RGB")
    except (UnidentifiedImageError, OSError, PIL.DecompressionBombError) as error:
        raise ValueError(f"{where}: not a picture: {error}") from None


def _embedded(path: Path, at: int, column: str) -> bytes | PIL.Image:
    if path.name.removesuffix(".gz").endswith("ubyte"):
        small = PIL.fromarray(idx(path)[at]).convert("RGB")
        return small.resize((small.width * ENLARGED, small.height * ENLARGED), PIL.Resampling.NEAREST)
    if path.suffix == ".parquet":
        value = _group(path, at, column, path.stat().st_mtime_ns)
        if not isinstance(value, Mapping) or not value.get("bytes"):
            raise ValueError(f"{path}:{at + 1}: {column!r} holds no picture")
        return bytes(value["bytes"])
    if ".tsv" in path.name or ".csv" in path.name:
        text = next(_records(path, at))[0][column]
    else:
        with _opened(path) as file:
            file.seek(at)
            text = _mapping(file.readline(), f"{path}@{at}")[column]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{path}@{at}: {column!r} is not base64: {error}") from None


def _group(path: Path, at: int, column: str, changed: int) -> Any:
    starts = _starts(path, changed)
    group = next(number for number in range(len(starts) - 1, -1, -1) if starts[number] <= at)
    return _column(path, group, column, changed)[at - starts[group]].as_py()


@lru_cache(maxsize=64)
def _starts(path: Path, changed: int) -> tuple[int, ...]:
    import pyarrow.parquet as parquet

    metadata = parquet.ParquetFile(path).metadata
    starts = [0]
    for number in range(metadata.num_row_groups - 1):
        starts.append(starts[-1] + metadata.row_group(number).num_rows)
    return tuple(starts)


@lru_cache(maxsize=4)
def _column(path: Path, group: int, column: str, changed: int) -> Any:
    import pyarrow.parquet as parquet

    return parquet.ParquetFile(path).read_row_group(group, columns=[column]).column(column)


@lru_cache(maxsize=4)
def idx(path: Path) -> Any:
    """The array of an idx file (LeCun's format for MNIST): uint8 (n) or (n, rows, columns)."""
    import numpy as np

    try:
        with _opened(path) as file:
            data = file.read()
    except (OSError, EOFError) as error:
        raise ValueError(f"{path}: cannot be unpacked: {error}") from None
    if len(data) < 4 or data[:3] != b"\x00\x00\x08" or not 1 <= data[3] <= 3:
        raise ValueError(f"{path}:1: not an idx file of bytes")
    shape = [int.from_bytes(data[4 + 4 * axis : 8 + 4 * axis], "big") for axis in range(data[3])]
    body = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3])
    if len(body) != int(np.prod(shape)):
        raise ValueError(f"{path}: {len(body)} bytes, the header promises {' x '.join(map(str, shape))}")
    return body.reshape(shape)


# ---- finding


def places(name: str) -> list[Path]:
    """Where a suite's data may be, in the order in which it is looked for."""
    given = os.environ.get("MOONKIT_DATA")
    roots = [Path(given)] if given else []
    roots += [Path(__file__).parents[2] / "shared" / "data", Path("data")]
    return [root / name for root in roots]


def find_data(name: str) -> Path | None:
    """The folder of a suite's data on this machine; None if there is none."""
    return next((place for place in places(name) if place.is_dir()), None)
