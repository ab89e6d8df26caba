"""moonkit eval contamination: how much of a benchmark stands in what a model was trained on.

    moonkit eval contamination kimi_gsm8k --run runs/nano            against all documents of a training run
    moonkit eval contamination my.jsonl --data corpus/ more.parquet   against files and folders
    moonkit eval contamination runs/eval --run runs/nano              with the scores of clean and of dirty items
    moonkit eval contamination world:sum --model nano                 perturbed twins of a world family (evals/twins.py)

    items  -->  words  -->  n-grams of the BENCHMARK, hashed once
                                   |
    corpus -->  words  -->  rolling hashes, one pass  -->  found, and where  -->  share of each item's n-grams

Words are compared: compatibility forms made one (NFKC), case folded, punctuation dropped, ideographs one by one. n is
13 (Brown et al. 2020); an item of fewer words is held against 8, 5 or as many as it has, and counts only as a whole.
What many items have in common, as an instruction does, is no item's own and is left out. Memory grows with the
benchmark, not with the corpus; every hit is compared word by word, so that no hash can accuse.

A training run's documents are made again from RUN/config.json and from where its data stood at the last checkpoint.
"""

import gzip
import hashlib
import io
import json
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro
from numpy.typing import NDArray

from evals.statistics import Estimate, estimate

if TYPE_CHECKING:
    from rich.console import Console

N = 13
LADDER = (8, 5, 4, 3, 2, 1)  # for items of fewer words than n
TELLING = 5  # words; an item of fewer says nothing, wherever it is found
DIRTY = 0.5  # share of an item's n-grams from which on it counts as seen
COMMON, LEAST = 0.05, 3  # n-grams of more than this share of the items (and of more than so many) are no item's own
BATCH = 200_000  # words that are looked up together
PIECE = 1 << 20  # characters of a text file that are read together
PLACES = 3  # places that are remembered of each item

Ids = NDArray[np.uint64]
Verdict = Literal["clean", "touched", "dirty", "words only", "cannot tell"]

WORD = re.compile(
    # ideographs and kana stand alone: they are written without spaces
    r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]|[^\W_\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+"
)


def words(text: str) -> list[str]:
    """The words that are compared: "Don't 2²!" is don, t, 22."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return WORD.findall(text.casefold())


@dataclass(frozen=True)
class Item:
    """One question of a benchmark. texts: n-grams do not cross from one to the next. media: digests of its pictures.

    scores: what a run had for it, one per answer; cluster: as the run had it.
    """

    id: str
    texts: tuple[str, ...]
    media: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    cluster: str = ""


@dataclass(frozen=True)
class Piece:
    """Text of a corpus. where: in words that find it again. goes_on: it continues the text of the piece before."""

    where: str
    text: str
    media: tuple[str, ...] = ()
    goes_on: bool = False


@dataclass(frozen=True)
class Found:
    """What of one item was found. n: length of its n-grams; grams: how many it has of its own; places: the first few.

    pictures: share of its pictures that were found; None where it has none, or the corpus has none.
    """

    id: str
    n: int
    words: int
    grams: int
    found: int
    verdict: Verdict
    places: tuple[str, ...] = ()
    pictures: float | None = None

    @property
    def share(self) -> float | None:
        """Of its own n-grams; None where it has none."""
        return self.found / self.grams if self.grams else None


@dataclass(frozen=True)
class Overlap:
    """items: in the benchmark's order. words, pictures: how much of the corpus was read. notes: what was not."""

    items: tuple[Found, ...]
    words: int
    pictures: int
    notes: tuple[str, ...] = ()

    def counts(self) -> dict[str, int]:
        """Items by verdict."""
        seen = Counter(item.verdict for item in self.items)
        return {name: seen[name] for name in ("clean", "touched", "dirty", "words only", "cannot tell") if seen[name]}


# ---- n-grams of the benchmark


class Grams:
    """The n-grams of a benchmark and which of them a corpus has."""

    def __init__(self, items: Sequence[Item], n: int = N) -> None:
        """Raises ValueError for n < 1 or no items."""
        if n < 1:
            raise ValueError(f"n-grams have at least one word, got n = {n}")
        if not items:
            raise ValueError("the benchmark has no items")
        self.n = n
        rng = np.random.Generator(np.random.PCG64(20_200_528))
        self.vocabulary: dict[str, int] = {}
        self.sizes: list[int] = []
        self.counts: list[int] = []
        owners: dict[tuple[int, bytes], set[int]] = defaultdict(set)
        for number, item in enumerate(items):
            parts = [words(text) for text in item.texts]
            longest = max(map(len, parts), default=0)
            size = n if longest >= n else next((s for s in LADDER if s <= longest), 0)
            self.sizes.append(size)
            self.counts.append(sum(map(len, parts)))
            if not size:
                continue
            for part in parts:
                ids = np.array([self._id(word, rng) for word in part], np.uint64)
                for at in range(len(ids) - size + 1):
                    owners[size, ids[at : at + size].tobytes()].add(number)
        most = max(LEAST, COMMON * len(items))
        self.owners: dict[int, list[tuple[int, ...]]] = {}
        self.rows: dict[int, Ids] = {}
        self.hashes: dict[int, Ids] = {}
        self.found: dict[int, NDArray[np.bool_]] = {}
        self.own = [0] * len(items)
        for size in sorted({s for s, _ in owners}):
            mine = [(raw, who) for (s, raw), who in owners.items() if s == size and len(who) <= most]
            rows = np.frombuffer(b"".join(raw for raw, _ in mine), np.uint64).reshape(-1, size)
            hashes = rolled(rows.reshape(-1), size)[::size] if len(rows) else np.zeros(0, np.uint64)
            order = np.argsort(hashes, kind="stable")
            self.rows[size], self.hashes[size] = rows[order], hashes[order]
            self.owners[size] = [tuple(sorted(mine[i][1])) for i in order]
            self.found[size] = np.zeros(len(rows), bool)
            for who in self.owners[size]:
                for number in who:
                    self.own[number] += 1
        self.places: dict[int, Counter[str]] = defaultdict(Counter)

    def _id(self, word: str, rng: np.random.Generator) -> int:
        """A random number per word; 0 is the word that no item has."""
        if word not in self.vocabulary:
            self.vocabulary[word] = int(rng.integers(1, 2**64, dtype=np.uint64, endpoint=False))
        return self.vocabulary[word]

    def ids(self, text: str) -> Ids:
        """Ids of a corpus text; 0 for a word that the benchmark lacks."""
        found = words(text)
        get = self.vocabulary.get
        return np.fromiter((get(word, 0) for word in found), np.uint64, len(found))

    def look(self, ids: Ids, starts: Sequence[int], places: Sequence[str]) -> None:
        """Mark what is found in a stretch of words; `places[i]` is where the words from `starts[i]` on stand."""
        unknown = np.concatenate(([0], np.cumsum(ids == 0)))
        for size, hashes in self.hashes.items():
            if len(ids) < size or not len(hashes):
                continue
            whole = np.flatnonzero(unknown[size:] == unknown[:-size])  # no unknown word in the window
            if not len(whole):
                continue
            windows = rolled(ids, size)[whole]
            spot = np.searchsorted(hashes, windows)
            spot[spot == len(hashes)] = 0
            hits = np.flatnonzero(hashes[spot] == windows)
            for at, gram in zip(whole[hits].tolist(), spot[hits].tolist(), strict=True):
                if not np.array_equal(ids[at : at + size], self.rows[size][gram]):
                    continue  # two n-grams with one hash
                self.found[size][gram] = True
                where = places[int(np.searchsorted(starts, at, side="right")) - 1]
                for number in self.owners[size][gram]:
                    known = self.places[number]
                    if where in known or len(known) < 64:
                        known[where] += 1

    def found_of(self) -> list[int]:
        """How many of each item's own n-grams were found."""
        out = [0] * len(self.sizes)
        for size, marks in self.found.items():
            for gram in np.flatnonzero(marks).tolist():
                for number in self.owners[size][gram]:
                    out[number] += 1
        return out


def rolled(ids: Ids, n: int) -> Ids:
    """A hash of every window of n words: a polynomial modulo 2**64."""
    out = np.zeros(len(ids) - n + 1, np.uint64)
    with np.errstate(over="ignore"):
        for k in range(n):
            out = out * np.uint64(0x9E3779B97F4A7C15) + ids[k : len(ids) - n + 1 + k]
    return out


def overlap(
    items: Sequence[Item], corpus: Iterable[Piece], n: int = N, dirty: float = DIRTY, notes: Sequence[str] = ()
) -> Overlap:
    """One pass over the corpus. notes may be filled while it is read. Raises ValueError for no items."""
    if not 0 < dirty <= 1:
        raise ValueError(f"the share from which on an item is dirty lies between 0 and 1, got {dirty}")
    grams = Grams(items, n)
    wanted = {digest for item in items for digest in item.media}
    pictures: dict[str, str] = {}
    total = seen = 0
    gap = np.zeros(1, np.uint64)  # an unknown word: nothing reaches from one text into the next
    kept: list[Ids] = []
    starts: list[int] = []
    places: list[str] = []
    size = 0
    for piece in corpus:
        for digest in piece.media:
            seen += 1
            if digest in wanted:
                pictures.setdefault(digest, piece.where)
        ids = grams.ids(piece.text)
        total += len(ids)
        if not piece.goes_on:
            kept.append(gap)
            size += 1
        starts.append(size)
        places.append(piece.where)
        kept.append(ids)
        size += len(ids)
        if size >= BATCH:
            whole = np.concatenate(kept)
            grams.look(whole, starts, places)
            tail = whole[max(0, len(whole) - n + 1) :]  # an n-gram may reach into what comes next
            kept, starts, places, size = [tail], [0], [piece.where], len(tail)
    if kept:
        grams.look(np.concatenate(kept), starts or [0], places or [""])
    found = grams.found_of()
    out = [_judge(item, grams, number, found[number], dirty, pictures, seen > 0) for number, item in enumerate(items)]
    return Overlap(tuple(out), total, seen, tuple(notes))


def _judge(
    item: Item, grams: Grams, number: int, found: int, dirty: float, pictures: Mapping[str, str], saw: bool
) -> Found:
    size, own = grams.sizes[number], grams.own[number]
    share = found / own if own else 0.0
    telling = size >= min(TELLING, grams.n) and own > 0
    # a short item has few n-grams: half of them is a turn of phrase
    read = telling and (share >= dirty if size == grams.n else share == 1)
    shown = sum(digest in pictures for digest in item.media) / len(item.media) if item.media and saw else None
    verdict: Verdict
    if shown is not None:
        # the same words about another picture are a form of question, not this question
        verdict = "dirty" if shown == 1 else "words only" if read else "touched" if shown or share else "clean"
    elif not telling:
        verdict = "cannot tell"
    else:
        verdict = "dirty" if read else "touched" if share else "clean"
    places = [where for where, _ in grams.places[number].most_common(PLACES)] if found else []
    places += [pictures[digest] for digest in item.media if digest in pictures][:PLACES]
    return Found(item.id, size, grams.counts[number], own, found, verdict, tuple(dict.fromkeys(places))[:PLACES], shown)


def by_verdict(items: Sequence[Item], found: Overlap) -> dict[str, Estimate]:
    """The score of all items, and of those of each verdict, where the items have scores."""
    groups: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for item, one in zip(items, found.items, strict=True):
        for score in item.scores:
            groups["all"].append((score, item.cluster or item.id))
            groups[one.verdict].append((score, item.cluster or item.id))
    return {name: estimate([s for s, _ in g], [c for _, c in g]) for name, g in groups.items()}


# ---- benchmarks

QUESTION = ("question", "prompt", "problem", "instruction", "text", "input", "code")
IDS = ("id", "task_id", "item_id", "key", "doc_id")


def load_items(spec: str, fields: Sequence[str] = (), limit: int | None = None, seed: int = 7) -> list[Item]:
    """A benchmark: a run folder, a file of rows, a suite's name, or world:FAMILY.

    fields: of a row, the columns that are compared; none: the first known name of a question, else every text.
    Raises ValueError where there is nothing of that name, or a row has none of the fields.
    """
    path = Path(spec)
    if path.is_dir():
        return _items_of_run(path)[:limit]
    if path.is_file():
        return _items_of_rows(path, fields, limit)
    if spec.startswith("world:"):
        return _items_of_world(spec[6:], limit or 200, seed)
    if "/" in spec or path.suffix:
        raise ValueError(f"no benchmark {spec!r}: there is no such file or folder")
    from evals.suites import load

    return [Item(str(doc["id"]), (_without_marks(doc["question"]),)) for doc in load(spec, limit)]


def _without_marks(text: str) -> str:
    return text.replace("<image>", " ").replace("<video>", " ")


def _items_of_run(folder: Path) -> list[Item]:
    from evals.report import picture, read_run

    run = read_run(folder)
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in run.rows:
        groups[row["task"], row["item_id"]].append(row)
    several = len({task for task, _ in groups}) > 1
    out = []
    for (task, name), rows in groups.items():
        files = [picture(folder, medium) for medium in rows[0]["media"]]
        out.append(
            Item(
                f"{task}: {name}" if several else name,
                (_without_marks(rows[0]["prompt"]),),
                tuple(digest for file in files if file and (digest := _file_digest(file))),
                tuple(row["score"] for row in rows if row["score"] is not None),
                f"{task}: {rows[0]['cluster']}",
            )
        )
    if not out:
        raise ValueError(f"{folder} has no answers to read questions from. {' '.join(run.problems)}")
    return out


def _items_of_rows(path: Path, fields: Sequence[str], limit: int | None) -> list[Item]:
    out: list[Item] = []
    for number, row in enumerate(rows_of(path), 1):
        if limit is not None and len(out) >= limit:
            break
        if fields:
            missing = [name for name in fields if not isinstance(row.get(name), str)]
            if missing:
                raise ValueError(f"{path}, row {number}: no text under {', '.join(missing)}; it has {', '.join(row)}")
            texts = [str(row[name]) for name in fields]
        else:
            named = next((row[name] for name in QUESTION if isinstance(row.get(name), str) and row[name].strip()), None)
            texts = [named] if named else list(strings({k: v for k, v in row.items() if k not in IDS}))
        name = next((str(row[key]) for key in IDS if row.get(key) is not None), str(number))
        out.append(Item(name, tuple(texts)))
    if not out:
        raise ValueError(f"{path} holds no rows")
    return out


def _items_of_world(family: str, n: int, seed: int) -> list[Item]:
    from evals.world import questions

    items = []
    for made, number in questions(family, n, "heldout", seed):
        items.append(Item(f"{family}/{made.index}", (made.turns[number].question,), tuple(map(digest_of, made.media))))
    return items


# ---- corpora

TEXTS = frozenset(".html .htm .tex .xml .csv .tsv .log .jl .rb .php .kt .scala .lua .r .sql .svg .ipynb .json".split())
ROWS = (".jsonl", ".ndjson", ".parquet")
IMAGES = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp")


def strings(value: Any) -> Iterator[str]:
    """Every text in a row, however deep; not pictures in base64, which have no words."""
    if isinstance(value, str):
        if not (len(value) > 500 and value[:5] == "data:") and value:
            yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from strings(inner)


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a JSONL (also .gz) or parquet file. Raises ValueError that names the file and the line."""
    if path.suffix == ".parquet":
        import pyarrow as arrow
        import pyarrow.parquet as parquet

        try:
            file = parquet.ParquetFile(path)
        except (arrow.ArrowException, OSError) as error:
            raise ValueError(f"{path}: not a parquet file ({error})") from None
        for batch in file.iter_batches(batch_size=256):
            yield from batch.to_pylist()
        return
    if path.name.removesuffix(".gz").endswith(".json"):
        whole = json.loads(_opened(path).read())
        listed = whole.get("data", list(whole.values())) if isinstance(whole, dict) else whole
        yield from (row if isinstance(row, dict) else {"text": row} for row in listed)
        return
    with _opened(path) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
                yield row if isinstance(row, dict) else {"text": row}


def _opened(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def pieces_of(paths: Sequence[Path], notes: list[str]) -> Iterator[Piece]:
    """Everything that can be read in files and folders; notes: a sentence for what cannot.

    Raises ValueError for a path that does not exist.
    """
    from lm.bpe import TEXT_SUFFIXES

    left: Counter[str] = Counter()
    for given in paths:
        if not given.exists():
            raise ValueError(f"no corpus {given}: there is no such file or folder")
        files = sorted(p for p in given.rglob("*") if p.is_file()) if given.is_dir() else [given]
        for path in files:
            kind = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
            kind = kind.lower()
            try:
                if kind in ROWS:
                    for number, row in enumerate(rows_of(path), 1):
                        media = tuple(_row_digests(row))
                        for at, text in enumerate(strings(row)):
                            yield Piece(f"{path}, row {number}", text, () if at else media)
                elif kind in IMAGES:
                    digest = _file_digest(path)
                    if digest:
                        yield Piece(str(path), "", (digest,))
                elif kind in TEXT_SUFFIXES | TEXTS or given == path:
                    yield from _text_pieces(path)
                else:
                    left[kind or "no suffix"] += 1
            except (ValueError, OSError, EOFError) as error:
                notes.append(f"{path} was read in part or not at all: {error}")
    if left:
        listed = ", ".join(f"{count} of {kind}" for kind, count in left.most_common(8))
        notes.append(f"{left.total()} files are neither text, rows nor pictures and were left out ({listed})")


def _text_pieces(path: Path) -> Iterator[Piece]:
    """A text file in pieces cut at white space."""
    with io.TextIOWrapper(_opened(path), encoding="utf-8", errors="replace") as file:
        rest, goes_on = "", False
        while chunk := file.read(PIECE):
            text = rest + chunk
            cut = max(text.rfind(" "), text.rfind("\n"))
            # without white space, as Chinese is: cut anywhere, its words are single characters
            cut = len(text) if len(chunk) < PIECE or cut < len(text) - 10_000 else cut
            yield Piece(str(path), text[:cut], (), goes_on)
            rest, goes_on = text[cut:], True
        yield Piece(str(path), rest, (), goes_on)


def digest_of(medium: Any) -> str:
    """Of a picture's pixels, uint8 (height, width, 3), or of a clip's frames: the same however it is stored."""
    pixels = medium.frames if hasattr(medium, "frames") else getattr(medium, "pixels", medium)
    array = np.ascontiguousarray(pixels, np.uint8)
    return hashlib.sha256(f"{array.shape}".encode() + array.tobytes()).hexdigest()


def _file_digest(source: Path | bytes) -> str | None:
    from PIL import Image as PIL
    from PIL import UnidentifiedImageError

    try:
        with PIL.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
            return digest_of(np.asarray(opened.convert("RGB")))
    except (UnidentifiedImageError, OSError, ValueError, PIL.DecompressionBombError):
        return None


def _row_digests(value: Any) -> Iterator[str]:
    """Of pictures that stand in a row as bytes, as the hub's data sets store them."""
    if isinstance(value, bytes):
        digest = _file_digest(value)
        if digest:
            yield digest
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _row_digests(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _row_digests(inner)


# ---- a training run


def pieces_of_run(folder: Path, notes: list[str], limit: int | None = None) -> Iterator[Piece]:
    """The documents of a training run, made again; each once, however often it was read.

    limit: at most so many of each source. notes: what could not be made again, and what is only about so. Raises
    ValueError for a folder that is no training run.
    """
    from train.data import Documents, Mixture, Skip, Source

    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        described, seed = config["mixture"], int(config["seed"])
        listed = [{k: v for k, v in one.items() if k != "makers"} for one in described["sources"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} is no training run: its config.json names no mixture ({error!r})") from None
    if config.get("start"):
        notes.append(f"{folder} went on from {config['start']}: what that model was trained on is to be checked too")
    own = [one["name"] for one in described["sources"] if one.get("makers")]
    if own:
        notes.append(f"{folder}: made by the user's own code and not checked: {', '.join(own)}")
    origin, lanes = _position(folder)
    for one, plain in zip(described["sources"], listed, strict=True):
        if one.get("makers"):
            continue
        plain["levels"] = tuple(plain["levels"])
        source = Source(**plain | {"after": 0})
        name = source.name
        try:
            documents = Documents(Mixture((source,), described.get("split", "train")), seed)
        except (ValueError, OSError, RuntimeError) as error:
            notes.append(f"{folder}: source {name} cannot be read and was not checked: {error}")
            continue
        size = _size(documents.corpora.get(name))
        if origin and name in documents.corpora:
            before, now = origin.get("corpora", {}).get(name), documents.corpora[name].fingerprint
            if before is not None and before != now:
                notes.append(f"{folder}: source {name} is not what it was ({before}, now {now})")
        drawn = _drawn(folder, name, lanes, notes)
        if limit is not None and len(drawn) > limit:
            notes.append(f"{folder}: of source {name} {limit:,} of {len(drawn):,} documents were checked")
            drawn = drawn[:limit]
        if size is not None and len(drawn) >= size:
            drawn = range(size)  # an epoch is every row once
        for index in drawn:
            try:
                document = documents.get(name, index)
            except Skip:
                continue  # training left it out as well
            yield from _pieces(document, f"{folder.name}: {documents.describe(name, index)}")
    if origin:
        import world

        if origin.get("makers") and origin["makers"] != world.fingerprint():
            notes.append(
                f"{folder}: the world's makers have changed since, so its documents are not quite what they were"
            )


def _position(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Where the data of a run stood at its newest checkpoint: of what, and each lane's state."""
    for path in sorted(folder.glob("step-*/state.json"), reverse=True):
        try:
            state = json.loads(path.read_text(encoding="utf-8"))["data"]
            return dict(state["origin"]), dict(state["per_lane"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return {}, {}


def _drawn(folder: Path, name: str, lanes: Mapping[str, Mapping[str, Any]], notes: list[str]) -> Sequence[int]:
    """Numbers of the documents of a source that were drawn."""
    if lanes:
        count = len(lanes)
        return sorted(int(lane) + count * k for lane, at in lanes.items() for k in range(at["next"].get(name, 0)))
    try:
        made = int(json.loads((folder / "data.json").read_text(encoding="utf-8"))["documents"].get(name, 0))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{folder} has neither a checkpoint nor data.json: what was read is not known") from None
    said = f"{folder} has no checkpoint left: which documents were read is known by their number only"
    if said not in notes:
        notes.append(said)
    return range(made)


def _size(corpus: Any) -> int | None:
    """Rows of one epoch; None where that is not known."""
    if hasattr(corpus, "ends"):
        return int(corpus.ends[-1])
    return int(corpus.counts.sum()) if hasattr(corpus, "counts") else None


def _pieces(document: Any, where: str) -> Iterator[Piece]:
    from world.sample import Sample

    if isinstance(document, Sample):
        media = tuple(map(digest_of, document.media))
        for number, turn in enumerate(document.turns):
            yield Piece(where, turn.question, () if number else media)
            yield Piece(where, f"{turn.thinking} {turn.answer}")
        return
    media = tuple(_row_digests(document))
    for at, text in enumerate(strings(document)):
        yield Piece(where, text, () if at else media)


# ---- the verb


@dataclass(frozen=True)
class Arguments:
    """How much of a benchmark stands in training data; for a family of the world, how it fares on perturbed twins."""

    benchmark: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SUITE|FILE|RUN|world:FAMILY")]
    """What is asked: a suite's name, a JSONL or parquet file, a folder of `moonkit eval`, or world:FAMILY."""
    run: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="TRAINING_RUN")] = ()
    """Training runs whose documents are searched."""
    data: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE|FOLDER")] = ()
    """Texts, JSONL, parquet, pictures, or folders of them, that are searched."""
    scores: Annotated[Path | None, tyro.conf.arg(metavar="RUN")] = None
    """An evaluation whose scores are split by verdict; not needed where the benchmark is one."""
    fields: tuple[str, ...] = ()
    """Columns of a file that are compared; none named: the question."""
    n: int = N
    """Words of an n-gram."""
    dirty: float = DIRTY
    """Share of an item's n-grams from which on it counts as seen."""
    limit: int | None = None
    """Read at most so many items of the benchmark; for world families, ask so many."""
    documents: int | None = None
    """Make at most so many documents of each source of a training run; none: all."""
    model: str | None = None
    """With world:FAMILY: ask this model the questions and their twins, and report the gap."""
    renamed: bool = False
    """With --model, for families of programs: twins with other names in place of other programs."""
    seed: int = 7
    """Seed of the world's questions."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE.json")] = None
    """Write every item with its share and places into this file."""
    show: int = 10
    """Print so many of the items that were found most."""


def main(argv: Sequence[str] | None = None) -> None:
    """The verb."""
    arguments = tyro.cli(Arguments, prog="moonkit eval contamination", args=argv, description=__doc__)
    from rich.console import Console

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    if arguments.model is not None:
        if not arguments.benchmark.startswith("world:"):
            raise ValueError("twins are made by the world: --model goes with world:FAMILY")
        _ask_twins(arguments, console)
        return
    if not arguments.run and not arguments.data:
        raise ValueError("name what is to be searched: --run TRAINING_RUN or --data FILE|FOLDER (or --model for twins)")
    items = load_items(arguments.benchmark, arguments.fields, arguments.limit, arguments.seed)
    if arguments.scores is not None:
        items = with_scores(items, arguments.scores)
    notes: list[str] = []

    def corpus() -> Iterator[Piece]:
        for folder in arguments.run:
            yield from pieces_of_run(folder, notes, arguments.documents)
        yield from pieces_of(arguments.data, notes)

    found = overlap(items, _watched(corpus(), console), arguments.n, arguments.dirty)
    found = Overlap(found.items, found.words, found.pictures, tuple(notes))
    print_overlap(items, found, arguments, console)
    if arguments.out is not None:
        text = {"settings": asdict(arguments), "counts": found.counts(), "words": found.words, "notes": notes}
        text |= {"pictures": found.pictures}
        text |= {"scores": {name: asdict(made) for name, made in by_verdict(items, found).items()}}
        text |= {"items": [asdict(one) | {"share": one.share} for one in found.items]}
        arguments.out.write_text(json.dumps(text, indent=1, default=str, ensure_ascii=False) + "\n", encoding="utf-8")


def with_scores(items: Sequence[Item], run: Path) -> list[Item]:
    """The items with the scores that a run had for them, by their ids. Raises ValueError where none is in it."""
    from evals.report import read_run

    scores: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for row in read_run(run).rows:
        if row["score"] is not None:
            scores[row["item_id"]].append((row["score"], row["cluster"]))
    out = [
        Item(item.id, item.texts, item.media, tuple(s for s, _ in scores[item.id]), scores[item.id][0][1])
        if item.id in scores
        else item
        for item in items
    ]
    if not any(item.scores for item in out):
        raise ValueError(
            f"{run} has no score for any of the {len(items)} items, so the ids are not those of the benchmark"
        )
    return out


def _watched(corpus: Iterable[Piece], console: "Console") -> Iterator[Piece]:
    """The same pieces, with their number and place on a terminal."""
    if not console.is_terminal:
        yield from corpus
        return
    with console.status("reading") as status:
        for number, piece in enumerate(corpus, 1):
            if number % 500 == 0:
                status.update(f"{number:,} texts, now {piece.where[:80]}")
            yield piece


def print_overlap(items: Sequence[Item], found: Overlap, arguments: Arguments, console: "Console") -> None:
    """Counts, scores by verdict, and the items that were found most."""
    from rich.table import Table
    from rich.text import Text

    read = f"{found.words:,} words" + (f" and {found.pictures:,} pictures" if found.pictures else "")
    console.print(Text(f"{arguments.benchmark}: {len(items):,} items against {read}, {arguments.n}-grams"))
    scores = by_verdict(items, found)
    table = Table()
    for column in ("verdict", "items", *(("score", "95 % interval") if scores else ())):
        table.add_column(column, justify="left" if column == "verdict" else "right")
    for name, count in (found.counts() | {"all": len(items)}).items():
        row = [name, f"{count:,}"]
        if scores:
            made = scores.get(name)
            row.append(f"{100 * made.value:.1f}" if made else "-")
            known = made is not None and made.low is not None and made.high is not None
            row.append(f"{100 * made.low:.1f} to {100 * made.high:.1f}" if known else "-")  # type: ignore[union-attr,operator]
        table.add_row(*row)
    console.print(table)
    console.print(Text(MEANING.format(dirty=f"{arguments.dirty:.0%}", least=TELLING), "dim"))
    worst = [one for one in found.items if one.found or one.pictures]
    worst.sort(key=lambda one: (-(one.pictures or 0), -(one.share or 0), -one.found))
    if worst and arguments.show:
        table = Table(title=f"found most, {min(arguments.show, len(worst))} of {len(worst)}", title_justify="left")
        for column in ("item", "verdict", "n-grams", "share", "where"):
            table.add_column(column, overflow="fold")
        for one in worst[: arguments.show]:
            share = "-" if one.share is None else f"{one.share:.0%}"
            share += "" if one.pictures is None else f", pictures {one.pictures:.0%}"
            counted = f"{one.found} of {one.grams} ({one.n} words)"
            table.add_row(*map(Text, (one.id, one.verdict, counted, share, "; ".join(one.places))))
        console.print(table)
    for said in found.notes:
        console.print(Text(said, "yellow"))


MEANING = (
    "dirty: {dirty} or more of an item's own n-grams are there (all, of an item shorter than one; all pictures, where "
    "it has some). touched: fewer. words only: the same words about another picture. cannot tell: under {least} words, "
    "or none of its own."
)


def _ask_twins(arguments: Arguments, console: "Console") -> None:
    from evals.twins import score_twins
    from fusion.model import Kimi

    family = arguments.benchmark.removeprefix("world:")
    kimi = Kimi.from_pretrained(str(arguments.model), dtype="float32", experts="dense").eval()
    made = score_twins(kimi, family, arguments.limit or 100, seed=arguments.seed, renamed=arguments.renamed)
    console.print(made.text(), markup=False)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(asdict(made), indent=1, default=str) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
