"""The small tokenizer that anyone can train: right merges, same files, same every time.

pytest tests/lm/test_bpe.py
"""

import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import regex

from lm import bpe
from lm.bpe import train_bpe
from lm.tokenizer import PATTERN, Tokenizer

TEXT = [
    "the cat sat on the mat. the cats sat on the mats, and the bat sat there too.\n" * 3,
    "def add(a, b):\n    return a + b\n" * 4,
    "世界世界 hello, world! I'll don't 2026 2025",
]


def slow_bpe(texts: list[str], vocab_size: int) -> list[bytes]:
    """The definition, with no shortcuts: recount every pair before every merge."""
    words = [[bytes([b]) for b in w.encode()] for t in texts for w in regex.findall(PATTERN, t, regex.VERSION1)]
    tokens = [bytes([i]) for i in range(256)]
    while len(tokens) < vocab_size:
        pairs = Counter(pair for word in words for pair in pairwise(word))
        best = min(pairs.items(), key=lambda item: (-item[1], item[0]))
        if best[1] < 2:
            break
        (left, right), _ = best
        tokens.append(left + right)
        for number, word in enumerate(words):
            merged: list[bytes] = []
            for piece in word:
                if merged and (merged[-1], piece) == (left, right) and not getattr(merged, "joined", False):
                    merged[-1] = left + right
                else:
                    merged.append(piece)
            words[number] = merged
    return tokens


def test_merges_are_those_of_the_definition() -> None:
    ranks = train_bpe(TEXT, 300)
    assert [token for token, _ in sorted(ranks.items(), key=lambda item: item[1])] == slow_bpe(TEXT, 300)


def test_the_same_text_gives_the_same_tokenizer() -> None:
    assert train_bpe(TEXT, 320) == train_bpe(iter(TEXT), 320)
    seen: list[tuple[int, int]] = []
    train_bpe(TEXT, 330, progress=lambda done, total: seen.append((done, total)))
    assert seen and all(total == 330 for _, total in seen)


def test_few_pairs_give_a_small_vocabulary() -> None:
    assert len(train_bpe(["abc"], 1000)) == 256
    assert b"ab" in train_bpe(["ab ab"], 1000)


def test_verb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").mkdir()
    for number, text in enumerate(TEXT):
        (tmp_path / "text" / f"{number}.txt").write_text(text)
    (tmp_path / "text" / "binary.txt").write_bytes(b"\xff\xfe\0\0")
    out = tmp_path / "tokenizer"
    arguments = ["tokenizer", str(tmp_path / "text"), "--out", str(out), "--vocab-size", "556"]
    monkeypatch.setattr(sys, "argv", arguments)
    bpe.main()
    tokenizer = Tokenizer.from_folder(out)
    assert tokenizer.vocab_size == 556
    assert tokenizer.decode(tokenizer.encode("the cat 世界")) == "the cat 世界"
    assert len(tokenizer.encode(" the mat")) < 8
    assert "binary.txt" in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("texts", "size", "message"), [(["x"], 255, "at least the 256 bytes"), ([], 300, "no text"), ([""], 300, "no text")]
)
def test_what_cannot_be_trained(texts: list[str], size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_bpe(texts, size)


def test_split_digits_joins_no_two_digits() -> None:
    text = ["12 12 12 345 345 add(12, 345) 1212 year 2024 2024 2024"] * 5
    joined = train_bpe(text, 300)
    apart = train_bpe(text, 300, split_digits=True)
    assert any(len(token) > 1 and token.isdigit() for token in joined)
    assert not any(sum(chr(byte).isdigit() for byte in token) > 1 for token in apart)
    assert any(len(token) > 1 for token in apart)  # words are joined as before
