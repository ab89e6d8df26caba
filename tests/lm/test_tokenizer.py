"""Text to ids and back: golden ids of the released tokenizer, round trips, special strings in user text.

pytest tests/lm/test_tokenizer.py
"""

import base64
import hashlib
import json
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from fusion.checkpoint import bundled_tokenizer
from lm.tokenizer import PATTERN, SPECIAL_NAMES, Tokenizer

# from the official tokenizer
GOLDEN = {
    "Hello, world!": [19180, 11, 2695, 0],
    "你好，世界": [33845, 378, 2243],
    "Kimi是一个AI助手": [42, 30223, 4279, 12910, 42544],
    "don't DON'T I'll": [88709, 92629, 64833, 17916],
    "  \n\n  x": [23118, 220, 1288],
    "🙂🚀": [5885, 46813, 5885, 40101],
    "functions.get_weather:0": [41937, 1150, 21055, 2800, 25, 15],
    "x\r\ny": [87, 462, 88],
    "<|im_end|>": [27, 91, 348, 11129, 91, 29],
    "“Hello,” 世界世世世界世界——I'm ChatGPT. CAN'T wait 'til 2026.世界世界": [
        *(1686, 19180, 4963, 220, 2243, 123421, 2243, 2243, 35086, 17172, 29338, 111021, 13, 32330, 64833),
        *(5161, 542, 3777, 220, 2975, 21, 13, 2243, 2243),
    ],
}


@pytest.fixture(scope="module")
def kimi_tokenizer(data: Path) -> Tokenizer:
    return Tokenizer.from_folder(data / "kimi-tokenizer")


OURS = bundled_tokenizer()


@pytest.mark.parametrize("text", GOLDEN)
def test_golden_ids(kimi_tokenizer: Tokenizer, text: str) -> None:
    assert kimi_tokenizer.encode(text) == GOLDEN[text]
    assert kimi_tokenizer.decode(GOLDEN[text]) == text


def test_special_ids(kimi_tokenizer: Tokenizer) -> None:
    assert kimi_tokenizer.vocab_size == 163_840
    for offset, name in SPECIAL_NAMES.items():
        assert kimi_tokenizer.id(name) == 163_584 + offset
    assert kimi_tokenizer.id("<|reserved_token_163700|>") == 163_700
    assert OURS.id("<|media_pad|>") == OURS.vocab_size - 256 + 21


def test_saving_gives_back_the_released_bytes(kimi_tokenizer: Tokenizer, tmp_path: Path) -> None:
    kimi_tokenizer.save(tmp_path)
    digest = hashlib.sha256((tmp_path / "tiktoken.model").read_bytes()).hexdigest()
    assert digest == "b6c497a7469b33ced9c38afb1ad6e47f03f5e5dc05f15930799210ec050c5103"
    assert Tokenizer.from_folder(tmp_path) == kimi_tokenizer


@given(st.text(st.characters(codec="utf-8"), max_size=200))
def test_any_text_comes_back(text: str) -> None:
    assert OURS.decode(OURS.encode(text)) == text


@given(st.text(max_size=60))
def test_lone_surrogates_become_replacement_characters(text: str) -> None:
    assert OURS.decode(OURS.encode(text)) == text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@given(st.lists(st.sampled_from([*SPECIAL_NAMES.values(), "a", " ", "\n", "<|", "|>", "世界", "<|im_"]), max_size=12))
def test_special_strings_in_user_text_are_text(parts: list[str]) -> None:
    text = "".join(parts)
    ids = OURS.encode(text)
    assert not any(OURS.is_special(token) for token in ids)
    assert OURS.decode(ids) == text


def test_special_strings_are_tokens_only_on_demand() -> None:
    assert OURS.encode("a<|im_end|>", allow_special=True)[-1] == OURS.id("<|im_end|>")


def test_the_pattern_splits_as_the_regex_module_reads_it() -> None:
    """tiktoken's engine and Python's regex (which trains our own vocabularies) agree on class intersections."""
    regex = pytest.importorskip("regex")
    encoding = tiktoken.Encoding(
        "bytes", pat_str=PATTERN, mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={}
    )
    found = regex.findall(PATTERN, "I'll 世界abc 2026! é́  x\n\ny ABCdef", regex.VERSION1)
    assert "".join(found) == "I'll 世界abc 2026! é́  x\n\ny ABCdef"
    assert found[:4] == ["I'll", " ", "世界", "abc"] and "202" in found
    assert encoding.decode(encoding.encode("x")) == "x"


@pytest.mark.parametrize("run", ["a", " ", "世", "\n", "-"])
def test_long_runs_neither_crash_nor_crawl(run: str) -> None:
    text = run * 120_000
    assert OURS.decode(OURS.encode(text)) == text


def test_pieces_are_cut_where_the_released_code_cuts(kimi_tokenizer: Tokenizer) -> None:
    """400,000 characters at a time, and runs of at most 25,000: the cut shows in the ids."""
    text = "ab" * 30_000
    parts = [text[i : i + 25_000] for i in range(0, len(text), 25_000)]
    assert kimi_tokenizer.encode(text) == [token for part in parts for token in kimi_tokenizer.encode(part)]
    words = "word " * 100_000
    whole = kimi_tokenizer.encode(words)
    assert whole == kimi_tokenizer.encode(words[:400_000]) + kimi_tokenizer.encode(words[400_000:])


def test_skip_special_keeps_what_the_model_says() -> None:
    names = ("<think>", "</think>", "<|im_end|>", "[PAD]", "<|tool_call_begin|>")
    ids = [OURS.id(name) for name in names]
    assert OURS.decode(ids) == "".join(names)
    assert OURS.decode(ids, skip_special=True) == "<think></think><|tool_call_begin|>"


def lines(*pairs: tuple[bytes, int]) -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in pairs)


BYTES = [(bytes([i]), i) for i in range(256)]


@pytest.mark.parametrize(
    ("content", "config", "message"),
    [
        (b"", None, "0 distinct tokens"),
        (b"not a tokenizer\n", None, "line 1"),
        (lines(*BYTES) + b"!!! 256\n", None, "line 257"),
        (lines(*BYTES, (b"ab", 300)), None, "do not have the ranks 0..256"),
        (lines(*BYTES, (b"ab", 5)), None, "do not have the ranks"),
        (lines(*BYTES[:-1], (b"ab", 255)), None, "single bytes have no token"),
        (lines(*BYTES), "{", "not a tokenizer config"),
        (lines(*BYTES), "[]", "not a tokenizer config"),
        (lines(*BYTES), '{"added_tokens_decoder": {"x": {}}}', "not a tokenizer config"),
        (lines(*BYTES), '{"added_tokens_decoder": {"3": {"content": "<|im_end|>"}}}', "lie among"),
        (
            lines(*BYTES),
            json.dumps({"added_tokens_decoder": {str(i): {"content": "[BOS]"} for i in (256, 257)}}),
            "same name",
        ),
    ],
)
def test_broken_files_give_one_clear_line(tmp_path: Path, content: bytes, config: str | None, message: str) -> None:
    (tmp_path / "tiktoken.model").write_bytes(content)
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer.from_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_wrong_arguments() -> None:
    with pytest.raises(FileNotFoundError, match="no tokenizer"):
        Tokenizer.from_folder("/nonexistent")
    with pytest.raises(ValueError, match="must be a str"):
        OURS.encode(b"bytes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="outside the vocabulary"):
        OURS.decode([OURS.vocab_size])
    with pytest.raises(ValueError, match="outside the vocabulary"):
        OURS.decode([-1])
    with pytest.raises(ValueError, match=r"near: .*<\|im_end\|>"):
        OURS.id("<|im_ed|>")
