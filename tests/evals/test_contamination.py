"""n-gram overlap against brute force, corpora of every form, training runs made again, and perturbed twins.

pytest tests/evals/test_contamination.py
"""

import gzip
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import world
from evals import contamination
from evals.contamination import (
    Item,
    Piece,
    by_verdict,
    digest_of,
    load_items,
    main,
    overlap,
    pieces_of,
    pieces_of_run,
    with_scores,
    words,
)
from evals.twins import NAMES, Twin, form, gap, template, twins
from tests.evals.fake_run import make_run
from world.check import check

LONG = "the quick brown fox jumps over the lazy dog while seven wise owls count golden apples in autumn rain"


def found(items: Iterable[str], corpus: Iterable[str], **options: Any) -> list[contamination.Found]:
    pieces = [Piece(f"doc {number}", text) for number, text in enumerate(corpus)]
    return list(overlap([Item(str(i), (text,)) for i, text in enumerate(items)], pieces, **options).items)


# ---- words and n-grams


def test_words_are_what_is_left_of_case_and_punctuation() -> None:
    assert words("Don't — PANIC!! 2² ﬁne_day") == ["don", "t", "panic", "22", "fine", "day"]
    assert words("日本語 text です") == ["日", "本", "語", "text", "で", "す"]
    assert words("") == words("¿?…") == []


@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 40))
@settings(max_examples=60)
def test_shares_equal_brute_force(seed: int, n: int, most: int) -> None:
    rng = random.Random(seed)
    texts = [" ".join(rng.choice("abcd") for _ in range(rng.randint(0, most))) for _ in range(5)]
    corpus = [" ".join(rng.choice("abcde") for _ in range(rng.randint(0, 60))) for _ in range(4)]

    def size_of(text: str) -> int:
        count = len(text.split())
        return n if count >= n else next((s for s in (8, 5, 4, 3, 2, 1) if s <= count), 0)

    def grams(text: str, size: int) -> set[tuple[str, ...]]:
        parts = text.split()
        return {tuple(parts[i : i + size]) for i in range(len(parts) - size + 1)} if size else set()

    for text, one in zip(texts, found(texts, corpus, n=n), strict=True):
        size = size_of(text)
        alike = [grams(other, size) for other in texts if size_of(other) == size]
        seen = {gram for document in corpus for gram in grams(document, size)}
        # what more than three of the five items have is no item's own
        own = {gram for gram in grams(text, size) if sum(gram in other for other in alike) <= 3}
        assert (one.n, one.grams, one.found) == (size, len(own), len(own & seen))


def test_a_question_is_found_however_it_is_typeset() -> None:
    again = f"Intro. {LONG.upper().replace(' ', ',  ')}!!! The end."
    one = found([LONG], ["nothing of it here", again])[0]
    assert (one.verdict, one.share, one.places) == ("dirty", 1.0, ("doc 1",))


def test_half_a_question_is_touched_and_another_is_clean() -> None:
    half = " ".join(LONG.split()[:14])
    assert [one.verdict for one in found([LONG, LONG[::-1]], [half])] == ["touched", "clean"]
    assert found([LONG], [half], dirty=0.2)[0].verdict == "dirty"


def test_n_grams_do_not_reach_from_one_document_into_the_next() -> None:
    parts = LONG.split()
    assert found([LONG], [" ".join(parts[:10]), " ".join(parts[10:])])[0].found == 0


def test_a_short_item_counts_only_as_a_whole() -> None:
    short = "how tall is the old stone tower in metres"  # nine words: against eight
    whole, part, tiny = (
        found([short], [f"so {short} then"]),
        found([short], [short[:30]]),
        found(["two plus"], ["two plus"]),
    )
    assert (whole[0].n, whole[0].verdict) == (8, "dirty") and part[0].verdict == "clean"
    assert tiny[0].verdict == "cannot tell" and tiny[0].share == 1


def test_what_many_items_share_is_no_items_own() -> None:
    preamble = "answer the following question as well as you can and think step by step before you say what it is"
    rng = random.Random(1)
    items = [f"{preamble} {' '.join(str(rng.randrange(10**6)) for _ in range(14))}" for _ in range(30)]
    assert {one.verdict for one in found(items, [preamble])} == {"clean"}
    assert found([*items], [items[3]])[3].verdict == "dirty"


def test_batches_and_parts_of_a_file_hide_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contamination, "BATCH", 50)
    monkeypatch.setattr(contamination, "PIECE", 40)
    noise = " ".join(f"w{i}" for i in range(500))
    (tmp_path / "a.txt").write_text(f"{noise} {LONG} {noise}")
    (tmp_path / "b.txt").write_text("一二三四五六七八九十" * 30)
    items = [Item("a", (LONG,)), Item("b", ("二三四五六七八九十一二三四五六七",)), Item("c", (f"{LONG} w0 w1",))]
    made = overlap(items, pieces_of([tmp_path], []))
    assert [one.verdict for one in made.items] == ["dirty", "dirty", "dirty"]
    assert made.items[0].places == (str(tmp_path / "a.txt"),) and made.words == 1000 + len(LONG.split()) + 300


@pytest.mark.parametrize("n, dirty, items", [(0, 0.5, 1), (13, 0.0, 1), (13, 1.5, 1), (13, 0.5, 0)])
def test_nonsense_is_refused(n: int, dirty: float, items: int) -> None:
    with pytest.raises(ValueError, match=r"n-grams|dirty|no items"):
        overlap([Item("a", ("b",))] * items, [], n, dirty)


# ---- corpora


def test_every_form_of_corpus_is_read(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = [f"{LONG} number {name}" for name in "abcdef"]
    (tmp_path / "a.txt").write_text(texts[0])
    (tmp_path / "b.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": [{"text": texts[1]}]}]}) + "\n"
    )
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(json.dumps({"x": {"y": texts[2]}}).encode()))
    pq.write_table(pa.table({"text": ["", texts[3]], "n": [1, 2]}), tmp_path / "d.parquet")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "e.py").write_text(f'"""{texts[4]}"""')
    (tmp_path / "f.bin").write_bytes(b"\xff" * 100)
    (tmp_path / "g.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (tmp_path / "h.parquet").write_text("no parquet")
    (tmp_path / "i.txt").write_bytes(b"\xff\xfe" + texts[5].encode() + b"\xff")
    notes: list[str] = []
    read = list(pieces_of([tmp_path], notes))
    for text in texts:
        assert any(text in piece.text for piece in read), text
    assert {f"{tmp_path}/d.parquet, row 2", f"{tmp_path}/b.jsonl, row 1"} <= {piece.where for piece in read}
    said = " ".join(notes)
    assert "g.jsonl, line 2" in said and "h.parquet" in said and "1 of .bin" in said and len(notes) == 3
    with pytest.raises(ValueError, match="no corpus"):
        list(pieces_of([tmp_path / "none"], []))


def test_a_picture_is_found_by_its_pixels_and_words_alone_are_no_proof(tmp_path: Path) -> None:
    from PIL import Image as PIL

    pixels = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (20, 30, 3), np.uint8)
    PIL.fromarray(pixels).save(tmp_path / "again.png", compress_level=1)
    question = "how many of the small red squares are left of the big blue circle"
    items = [Item("same", (question,), (digest_of(pixels),)), Item("other", (question,), (digest_of(pixels[::-1]),))]
    (tmp_path / "a.txt").write_text(f"asked: {question}?")
    made = overlap(items, pieces_of([tmp_path], []))
    assert [(one.verdict, one.pictures) for one in made.items] == [("dirty", 1.0), ("words only", 0.0)]
    assert str(tmp_path / "again.png") in made.items[0].places
    text_only = overlap(items, pieces_of([tmp_path / "a.txt"], []))
    assert [one.verdict for one in text_only.items] == ["dirty", "dirty"], "without pictures to compare, words must do"


def training_run(folder: Path, corpus: Path, state: bool = True) -> Path:
    """A run folder as training leaves it: two sources, two lanes."""
    from train.checkpoint import describe
    from train.data import Documents, Mixture, Source

    sources = (
        Source("sums", "text", 1.0, {"sum": 0.5, "word": 0.5}, (1, 2)),
        Source("things", "vision", 1.0, {"thing": 1.0}),
        Source("chats", "text", 1.0, corpus=str(corpus)),
    )
    mixture = Mixture(sources)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"mixture": describe(mixture), "seed": 5, "start": None}))
    (folder / "data.json").write_text(json.dumps({"documents": {"sums": 40, "things": 10, "chats": 7}}))
    if state:
        lanes = {str(n): {"next": {"sums": 20, "things": 5, "chats": 9}} for n in range(2)}
        print_ = {name: one.fingerprint for name, one in Documents(mixture, 5).corpora.items()}
        origin = {"makers": world.fingerprint(), "corpora": print_}
        (folder / "step-000010").mkdir()
        (folder / "step-000010" / "state.json").write_text(json.dumps({"data": {"origin": origin, "per_lane": lanes}}))
    return folder


@pytest.mark.parametrize("state", [True, False])
def test_the_documents_of_a_training_run_are_made_again(tmp_path: Path, state: bool) -> None:
    from train.data import Documents, Mixture, Source

    rows = [{"messages": [{"role": "user", "content": f"{LONG} in row {n}"}]} for n in range(7)]
    corpus = tmp_path / "chats.jsonl"
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = training_run(tmp_path / "run", corpus, state)
    notes: list[str] = []
    read = list(pieces_of_run(folder, notes))
    documents = Documents(Mixture((Source("sums", "text", 1.0, {"sum": 0.5, "word": 0.5}, (1, 2)),)), 5)
    for index in (0, 17, 39):
        made = documents.get("sums", index)
        assert isinstance(made, world.Sample)
        assert any(piece.text == made.turns[0].question and f"document {index} " in piece.where for piece in read)
    assert sum("chats document" in piece.where and "in row" in piece.text for piece in read) == 7  # each row once
    thing = world.sample("thing", 3, "train", 5)
    assert any(piece.media == (digest_of(thing.media[0]),) for piece in read)
    assert bool(notes) != state, notes
    items = [Item("x", (f"{LONG} in row 3",)), Item("y", ("seven " * 5 + LONG[::-1],))]
    assert [one.verdict for one in overlap(items, read).items] == ["dirty", "clean"]
    few = list(pieces_of_run(folder, notes, limit=2))
    assert len(few) < 15 and "2 of" in " ".join(notes)


def test_a_run_that_has_changed_says_so(tmp_path: Path) -> None:
    corpus = tmp_path / "chats.jsonl"
    corpus.write_text(json.dumps({"text": LONG}) + "\n")
    folder = training_run(tmp_path / "run", corpus)
    config = json.loads((folder / "config.json").read_text()) | {"start": "runs/older"}
    config["mixture"]["sources"][0]["makers"] = "mine"
    (folder / "config.json").write_text(json.dumps(config))
    state = folder / "step-000010" / "state.json"
    state.write_text(state.read_text().replace(world.fingerprint(), "00000000"))
    corpus.write_text(json.dumps({"text": "now another"}) + "\n")
    notes: list[str] = []
    list(pieces_of_run(folder, notes))
    said = " ".join(notes)
    for part in (
        "runs/older",
        "user's own code and not checked: sums",
        "chats is not what it was",
        "makers have changed",
    ):
        assert part in said
    corpus.unlink()
    list(pieces_of_run(folder, notes))
    assert "chats cannot be read and was not checked" in " ".join(notes)
    with pytest.raises(ValueError, match="no training run"):
        list(pieces_of_run(tmp_path, []))


# ---- benchmarks and the verb


def test_items_come_from_rows_runs_and_families(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"task_id": "T/1", "prompt": "ask", "solution": "s"}\n{"odd": "one", "id": 3}\n')
    assert [(i.id, i.texts) for i in load_items(str(tmp_path / "b.jsonl"))] == [("T/1", ("ask",)), ("3", ("one",))]
    with pytest.raises(ValueError, match="row 2: no text under solution"):
        load_items(str(tmp_path / "b.jsonl"), ["solution"])
    run = make_run(tmp_path / "run", 0, 8)
    items = {item.id: item for item in load_items(str(run))}
    assert len(items["kimi_humaneval: humaneval/0"].scores) == 4
    made = world.sample("picture", 0, "heldout", 7, 1)
    assert items["world_picture: picture/0"].media == (digest_of(made.media[0]),)
    assert load_items("world:picture", limit=3)[0].media == (digest_of(made.media[0]),)
    for spec in ("nowhere.jsonl", "no/where", "world:nothing", "no_such_suite"):
        with pytest.raises(ValueError, match="no "):
            load_items(spec)


def test_the_verb_splits_scores_by_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(2)
    asked = [" ".join(str(rng.randrange(10**5)) for _ in range(16)) for _ in range(20)]
    (tmp_path / "b.jsonl").write_text(
        "".join(json.dumps({"id": f"q{i}", "question": q}) + "\n" for i, q in enumerate(asked))
    )
    rows = [{"task": "t", "item_id": f"q{i}", "score": float(i < 8)} for i in range(20)]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "seen.txt").write_text("\n\n".join(asked[:8]))
    out = tmp_path / "out.json"
    command = [str(tmp_path / "b.jsonl"), "--data", str(tmp_path / "seen.txt"), "--scores", str(tmp_path / "run")]
    main([*command, "--out", str(out)])
    said = capsys.readouterr().out
    assert "20 items against" in said and "100.0" in said and "dirty" in said and "seen.txt" in said
    made = json.loads(out.read_text())
    assert made["counts"] == {"clean": 12, "dirty": 8}
    assert made["scores"]["dirty"]["value"] == 1 and made["scores"]["clean"]["value"] == 0
    assert made["scores"]["all"]["value"] == 0.4 and made["items"][0]["share"] == 1
    with pytest.raises(ValueError, match="the ids are not those"):
        with_scores([Item("zz", ("x",))], tmp_path / "run")
    with pytest.raises(ValueError, match="name what is to be searched"):
        main([str(tmp_path / "b.jsonl")])
    with pytest.raises(ValueError, match="world:FAMILY"):
        main([str(tmp_path / "b.jsonl"), "--model", "nano"])


def test_items_without_scores_have_none() -> None:
    items = [Item("a", (LONG,))]
    assert by_verdict(items, overlap(items, [])) == {}


def test_a_real_benchmark_is_found_in_itself_and_not_in_another(data: Path) -> None:
    items = load_items(str(data / "humaneval" / "HumanEval.jsonl.gz"))
    assert len(items) == 164
    notes: list[str] = []
    itself = overlap(items, pieces_of([data / "humaneval"], notes)).counts()
    other = overlap(items, pieces_of([data / "mbpp"], notes)).counts()
    assert itself == {"dirty": 164} and other.get("dirty", 0) == 0


# ---- twins


def test_forms_keep_the_shape_and_drop_the_contents() -> None:
    assert form("what is 47 plus 86?") == form("what is 12 plus 99?") != form("what is 7 plus 86?")
    assert template("what is 47 plus 86?") == template("what is 7 plus 186?")
    assert form("is there a red star?") == form("is there a blue ring?") != form("is the red star left?")
    assert template("sort: cat sun map") == template("sort: dog tea") != template("sort: 3 4")


@pytest.mark.parametrize("family", sorted(world.MAKERS))
def test_every_family_has_twins_with_a_gold_of_their_own(family: str) -> None:
    pairs = twins(family, 6)
    assert len(pairs) >= 5
    for pair in pairs:
        (a, i), (b, j) = pair.original, pair.twin
        assert (a.family, a.level, a.split) == (b.family, b.level, b.split) and a.seed != b.seed
        one, other = a.turns[i], b.turns[j]
        if pair.likeness == "form":
            assert one.tests == other.tests and form(one.question) == form(other.question)
        if one.question == other.question:
            assert b.media and digest_of(a.media[0]) != digest_of(b.media[0])
        assert other.check.kind == "program" or check(other, other.answer)
    assert len({(p.twin[0].level, p.twin[0].index) for p in pairs}) == len(pairs), "no sample is two twins"
    assert sum(pair.likeness == "form" for pair in pairs) >= len(pairs) / 2 or family in ("repair",)


def test_the_twins_are_the_same_each_time() -> None:
    assert [p.twin[0].index for p in twins("word", 12)] == [p.twin[0].index for p in twins("word", 12)]


def test_a_renamed_program_still_passes_its_tests_and_the_old_name_does_not() -> None:
    pairs = twins("function", 6, renamed=True)
    assert len(pairs) == 6
    for pair in pairs:
        (a, i), (b, j) = pair.original, pair.twin
        name = b.turns[j].check.data["name"]
        assert name in dict(NAMES) and f"{name}(" in b.turns[j].question and "f(" not in b.turns[j].question
        assert check(b.turns[j], b.turns[j].answer)
        assert not check(b.turns[j], a.turns[i].answer)
    with pytest.raises(ValueError, match="no name to change"):
        twins("sum", 3, renamed=True)


def test_the_gap_is_paired() -> None:
    pairs = twins("sum", 20)
    knows = [1.0] * 20
    made = gap("sum", pairs, knows, [0.0] * 10 + [1.0] * 10, 20)
    assert made.difference.difference.value == -0.5 and made.difference.p < 0.01 and made.left_out == 0
    assert made.original.value == 1 and made.twin.value == 0.5 and "-50.0" in made.text()
    even = gap("sum", pairs, knows, knows, 22)
    assert even.difference.p == 1 and even.left_out == 2
    with pytest.raises(ValueError, match="must match"):
        gap("sum", pairs, knows, knows[:-1], 20)
    assert all(isinstance(pair, Twin) for pair in pairs)


def test_an_untrained_model_is_asked_both(monkeypatch: pytest.MonkeyPatch) -> None:
    import evals.world
    from evals.twins import score_twins

    def by_heart(kimi: Any, asked: list[Any], **_: Any) -> list[Any]:
        return [type("Asked", (), {"right": sample.seed == 7})() for sample, _ in asked]

    monkeypatch.setattr(evals.world, "answer", by_heart)
    made = score_twins(None, "date", 10)  # type: ignore[arg-type]
    assert made.original.value == 1 and made.twin.value == 0 and made.difference.difference.value == -1
