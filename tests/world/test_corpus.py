"""Documents of files, tables and hub data sets: nothing lost, nothing raised for a bad row, splits by file.

pytest tests/world/test_corpus.py
"""

import json
import pickle
import random
import sys
import sysconfig
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from world.corpus import Bad, Corpus, Document, cut
from world.sample import held_out


def texts(corpus: Corpus, start: int = 0, stop: int | None = None) -> list[str]:
    made = [corpus.document(i) for i in range(start, len(corpus) if stop is None else stop)]
    return [d.text for d in made if isinstance(d, Document) and d.text is not None]


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """Thirty files in two folders, by name in both splits."""
    rng = random.Random(0)
    for number in range(30):
        path = tmp_path / "notes" / ("deep" if number % 3 else "") / f"n{number}{('.txt', '.md', '.py')[number % 3]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = (f"{number} {line} " + "é" * rng.randint(0, 60) for line in range(rng.randint(1, 40)))
        path.write_text("\n".join(lines), "utf-8")
    return tmp_path / "notes"


def test_an_epoch_has_every_line_once_and_the_next_another_order(notes: Path) -> None:
    corpora = [Corpus(str(notes), 1, split, max_chars=300) for split in ("train", "heldout")]
    wanted = Counter(line for p in notes.rglob("*.*") for line in p.read_text("utf-8").splitlines())
    assert sum((Counter(t for d in texts(c) for t in d.splitlines()) for c in corpora), Counter()) == wanted
    size = len(corpora[0])
    first, second = texts(corpora[0]), texts(corpora[0], size, 2 * size)
    assert sorted(first) == sorted(second) and first != second
    assert max(map(len, first)) <= 300
    assert first == texts(Corpus(str(notes), 1, max_chars=300)) != texts(Corpus(str(notes), 2, max_chars=300))


def test_files_are_in_one_split(notes: Path) -> None:
    def files(split: Any) -> set[str]:
        corpus = Corpus(str(notes), 0, split)
        return {corpus.document(i).where.split(" part")[0] for i in range(len(corpus))}

    names = {p.relative_to(notes).as_posix() for p in notes.rglob("*.*")}
    held = {name for name in names if held_out(f"corpus|{name}")}
    assert held and files("heldout") == held and files("train") == files("seen") == names - held


@pytest.mark.parametrize("most", [1, 7, 50])
def test_cut_pieces_are_the_text(most: int) -> None:
    rng = random.Random(most)
    for _ in range(200):
        text = "".join(rng.choices(["a", "漢", "bc ", "\n"], k=rng.randint(1, 120)))
        pieces = cut(text, most)
        assert all(0 < len(p) <= most and p.strip() for p in pieces)
        assert "".join("".join(pieces).split()) == "".join(text.split())
    assert cut("one\ntwo\nthree\n", 9) == ["one\ntwo\n", "three\n"]
    assert cut("abcdefgh\nij", 3) == ["abc", "def", "gh\n", "ij"]


ROWS: dict[str, str] = {  # line of JSONL -> reason, or nothing where it is good
    '{"text": "fine"}': "",
    '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": null}]}': "",
    "{not json": "not JSON",
    "[" * 100_000: "not JSON",
    "7": "a row is an object, not int",
    "{}": "neither text nor messages",
    '{"text": " \\n"}': "empty",
    '{"text": 5}': "text is int",
    '{"text": "\\ud800"}': "not UTF-8",
    '{"messages": []}': "empty",
    '{"messages": "hi"}': "messages is str",
    '{"messages": [{"content": "hi"}]}': "a message without a role",
    '{"messages": [{"role": "user", "content": 3}]}': "content is int",
}


def test_bad_rows_are_counted_not_raised(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n".join(ROWS) + "\n \n")
    with path.open("ab") as lines:
        lines.write(b'{"text": "\xff"}\n')
    corpus = Corpus(str(path))
    made = [corpus.document(i) for i in range(len(corpus))]
    bad = Counter(d.reason for d in made if isinstance(d, Bad))
    assert bad == Counter([reason for reason in ROWS.values() if reason] + ["not JSON"])
    good = [d for d in made if isinstance(d, Document)]
    assert sorted(bool(d.text) for d in good) == [False, True]
    assert all(line.split(" line ")[0] == "rows.jsonl" for line in (d.where for d in made))
    where = {d.reason: d.where for d in made if isinstance(d, Bad)}
    assert where["text is int"] == f"rows.jsonl line {1 + 2 * list(ROWS.values()).index('text is int')}"


def for_training(stem: str, suffix: str) -> str:
    """A file name that is not held out."""
    return next(name for name in (f"{stem}{i}{suffix}" for i in range(99)) if not held_out(f"corpus|{name}"))


def test_bad_files_are_counted_not_raised(tmp_path: Path) -> None:
    good, latin, blank = for_training("good", ".txt"), for_training("latin", ".txt"), for_training("blank", ".md")
    for name, data in {good: b"yes", latin: b"caf\xe9", blank: b" \n", "picture.png": b"\x89PNG"}.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / good).write_text("no")
    corpus = Corpus(str(tmp_path))
    made = {d.where: d for d in map(corpus.document, range(len(corpus)))}
    assert made == {good: Document("yes", None, good), latin: Bad(latin, "not UTF-8"), blank: Bad(blank, "empty")}


def test_a_file_that_changes_under_the_run_is_bad(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "line\n" * 100}) + "\n" + json.dumps({"text": "b"}) + "\n")
    corpus = Corpus(str(path), max_chars=50)
    assert len(corpus) == 11 and "".join(sorted(texts(corpus))).count("line") == 100
    path.write_text('{"text": "short"}\n')
    assert {d.reason for d in map(corpus.document, range(11)) if isinstance(d, Bad)} == {
        "changed since it was opened",
        "not JSON",
    }
    path.unlink()
    assert all(isinstance(corpus.document(i), Bad) for i in range(11))


def test_parquet_gives_every_row(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pa.table({"text": [f"row {i}" for i in range(25)] + [None, "", "long\n" * 20], "other": list(range(28))})
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=10)
    corpus = Corpus(str(tmp_path / "rows.parquet"), max_chars=50)
    assert len(corpus) == 25 + 2 + 2
    assert sorted(texts(corpus)) == sorted([f"row {i}" for i in range(25)] + ["long\n" * 10] * 2)
    bad = [d for d in map(corpus.document, range(len(corpus))) if isinstance(d, Bad)]
    assert {(b.where, b.reason) for b in bad} == {
        ("rows.parquet row 25", "neither text nor messages"),
        ("rows.parquet row 26", "empty"),
    }
    pq.write_table(pa.table({"other": [1]}), tmp_path / "none.parquet")
    with pytest.raises(ValueError, match="no column text or messages, only other"):
        Corpus(str(tmp_path / "none.parquet"))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="not a parquet file"):
        Corpus(str(tmp_path / "broken.parquet"))


@pytest.mark.parametrize("package, spec", [("datasets", "hf:owner/name"), ("pyarrow", "rows.parquet")])
def test_a_package_that_is_not_installed_is_named(
    package: str, spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.parquet").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"pip install {package}"):
        Corpus(spec)


def test_a_hub_data_set_streams_from_anywhere(tmp_path: Path) -> None:
    """A folder stands for the hub: the same reader, without a network."""
    pytest.importorskip("datasets")
    rows = [{"text": f"row {i}"} for i in range(20)] + [{"text": ""}, {"text": "line\n" * 30}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = Corpus(f"hf:{tmp_path}", seed=1, max_chars=100)
    made = list(islice(corpus.stream(), 46))  # 21 documents and the long one's two, twice
    assert Counter(type(d) for d in made) == {Document: 44, Bad: 2}
    epochs = [
        sorted(str(getattr(d, "text", d)).removesuffix("\n") for d in half if isinstance(d, Document))
        for half in (made[:23], made[23:])
    ]
    assert epochs[0] == epochs[1] and made[:23] != made[23:]
    assert next(iter(corpus.stream(30))) == made[30]
    with pytest.raises(TypeError, match="stream"):
        len(corpus)
    with pytest.raises(TypeError, match="stream"):
        corpus.document(0)
    for wrong in (f"hf:{tmp_path / 'nothing'}", f"hf:{tmp_path}:nosuch"):
        with pytest.raises(ValueError, match="cannot be opened") as caught:
            Corpus(wrong)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="splits of its own"):
        Corpus(f"hf:{tmp_path}", split="heldout")


def test_python_sources_are_those_of_this_machine() -> None:
    train, held = Corpus("python"), Corpus("python", split="heldout")
    root = Path(sysconfig.get_paths()["stdlib"])
    made = [train.document(i) for i in range(0, len(train), 7)]
    for document in made:
        assert isinstance(document, Document) and document.text is not None and len(document.text) <= 4000
        name = document.where.split(" part")[0]
        assert not {"test", "tests", "site-packages"} & set(Path(name).parts) and not held_out(f"corpus|{name}")
        assert document.text in (root / name).read_bytes().decode()
    assert len(train) > 500 and 0.02 < len(held) / (len(train) + len(held)) < 0.3
    assert next(iter(train.stream(7))) == train.document(7)
    copy = pickle.loads(pickle.dumps(train))
    assert [copy.document(i) for i in range(20)] == [train.document(i) for i in range(20)]


def test_what_cannot_be_a_corpus_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "none.jsonl").touch()
    (tmp_path / "one.txt").write_text("one")
    (tmp_path / "picture.png").touch()
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("/no/such/place", {}),
        (str(tmp_path / "empty"), {}),
        (str(tmp_path / "none.jsonl"), {}),
        (str(tmp_path / "picture.png"), {}),
        (str(tmp_path / "one.txt"), {"split": "heldout"}),
        (str(tmp_path / "one.txt"), {"max_chars": 0}),
    ]
    for spec, options in wrong:
        with pytest.raises(ValueError) as caught:
            Corpus(spec, **options)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="from 0"):
        Corpus(str(tmp_path / "one.txt")).document(-1)
