"""Text to token ids and back: byte-level BPE with Kimi's regex and special tokens, on tiktoken.

In: the `tiktoken.model` and `tokenizer_config.json` of a checkpoint. All K2 models share one file of 163,584 ranks;
ids above them are 256 special tokens. Source: released tokenization_kimi.py.
"""

import base64
import binascii
import json
import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

import tiktoken

# Alternatives in order: Han runs; words with an optional leading mark and contraction, lower- or upper-case tail;
# up to three digits; punctuation; line ends; spaces. Letters leave Han out, so that Han never joins a word.
_LETTER_OR_MARK = r"\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}{_LETTER_OR_MARK}]*[\p{{Ll}}{_LETTER_OR_MARK}]+{_CONTRACTION}",
        rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}{_LETTER_OR_MARK}]+[\p{{Ll}}{_LETTER_OR_MARK}]*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)

NUM_SPECIAL = 256
# Offsets from the first special id, with the names of K2.5 and later; every other slot is reserved.
SPECIAL_NAMES = {
    0: "[BOS]",
    1: "[EOS]",
    2: "<|im_end|>",
    3: "<|im_user|>",
    4: "<|im_assistant|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    9: "[EOT]",
    10: "<|im_system|>",
    11: "<|tool_calls_section_begin|>",
    12: "<|tool_calls_section_end|>",
    13: "<|tool_call_begin|>",
    14: "<|tool_call_argument_begin|>",
    15: "<|tool_call_end|>",
    17: "<|im_middle|>",
    18: "<|media_begin|>",
    19: "<|media_content|>",
    20: "<|media_end|>",
    21: "<|media_pad|>",
    22: "<think>",
    23: "</think>",
    254: "[UNK]",
    255: "[PAD]",
}
# These survive skip_special: they are part of what the model says ("special": false in the released file).
_SPOKEN = {11, 12, 13, 14, 15, 22, 23}

_PIECE = 400_000  # characters that tiktoken gets at once, as released
_RUN = 25_000  # longest run of (non-)whitespace in a piece: longer ones overflow the regex engine's stack


class Tokenizer:
    """Kimi's tokenizer. Special strings in a text are plain text unless `allow_special` says otherwise."""

    def __init__(self, ranks: dict[bytes, int], names: dict[int, str] | None = None, config: Any = None) -> None:
        """ranks: bytes to id, 0..n-1 without gaps. names: special ids to strings; None: Kimi's names behind the ranks.

        config: the tokenizer_config.json to save again, when there was one.
        """
        if sorted(ranks.values()) != list(range(len(ranks))):
            raise ValueError(f"the {len(ranks)} ranks must be 0..{len(ranks) - 1}, each once")
        missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
        if missing:
            raise ValueError(f"{len(missing)} single bytes have no token ({missing[:5]} ...), so some text has no ids")
        base = len(ranks)
        named = {base + offset: name for offset, name in SPECIAL_NAMES.items()} if names is None else names
        wrong = [i for i in named if i < base]
        if wrong:
            raise ValueError(f"special ids {wrong[:5]} lie among the {base} ordinary tokens")
        size = max(base + NUM_SPECIAL, max(named, default=0) + 1)
        every = {i: named.get(i, f"<|reserved_token_{i}|>") for i in range(base, size)}
        if len(set(every.values())) != len(every):
            raise ValueError("two special ids have the same name")
        self.ranks, self.names, self.config = ranks, every, config
        self.special = {name: i for i, name in every.items()}
        self._encoding = tiktoken.Encoding(
            "kimi", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=self.special, explicit_n_vocab=size
        )

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """Read a checkpoint's tokenizer. Raises FileNotFoundError, or ValueError that names file and line."""
        folder = Path(folder)
        ranks = _read_ranks(folder / "tiktoken.model")
        path = folder / "tokenizer_config.json"
        if not path.is_file():
            return cls(ranks)
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            added = {int(i): entry["content"] for i, entry in config.get("added_tokens_decoder", {}).items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a tokenizer config: {error}") from None
        return cls(ranks, added or None, config)

    def save(self, folder: str | Path) -> None:
        """Write tiktoken.model and tokenizer_config.json; from_folder reads back an equal tokenizer."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        ordered = sorted(self.ranks.items(), key=lambda item: item[1])
        lines = b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ordered)
        (folder / "tiktoken.model").write_bytes(lines)
        config = self.config or self._default_config()
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")

    def _default_config(self) -> dict[str, Any]:
        base = len(self.ranks)
        flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
        added = {
            str(i): {"content": name} | flags | {"special": i - base not in _SPOKEN}
            for i, name in self.names.items()
            if not name.startswith("<|reserved_token_")
        }
        tokens = {"bos_token": "[BOS]", "eos_token": "[EOS]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
        named = {key: name for key, name in tokens.items() if name in self.special}
        return {"added_tokens_decoder": added, **named, "tokenizer_class": "TikTokenTokenizer"}

    @property
    def vocab_size(self) -> int:
        return len(self.ranks) + len(self.names)

    def id(self, name: str) -> int:
        """Id of a special token. Raises ValueError for an unknown name."""
        if name not in self.special:
            near = get_close_matches(name, [n for n in self.special if "reserved" not in n], 3, 0.4)
            raise ValueError(
                f"no special token {name!r} in this tokenizer" + (f"; near: {', '.join(near)}" if near else "")
            )
        return self.special[name]

    def is_special(self, token: int) -> bool:
        """True for control tokens, thinking and tool-call markers included."""
        return token in self.names

    @cached_property
    def hidden(self) -> frozenset[int]:
        """Special ids that `skip_special` leaves out: all but thinking and tool-call markers."""
        base = len(self.ranks)
        spoken = {base + offset for offset in _SPOKEN}
        if self.config:
            entries = self.config.get("added_tokens_decoder", {}).items()
            spoken = {int(i) for i, entry in entries if not entry.get("special", True)}
        return frozenset(self.names) - spoken

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Ids of a text. A lone surrogate becomes U+FFFD: it has no UTF-8.

        allow_special: read special strings in the text as control tokens (the released default, and an injection
        hole: never for text that a user wrote).
        """
        if not isinstance(text, str):
            raise ValueError(f"text must be a str, got {type(text).__name__}")
        if not text.isascii():
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids: list[int] = []
        allowed: Any = "all" if allow_special else set()
        for start in range(0, len(text), _PIECE):
            for piece in _bounded_runs(text[start : start + _PIECE]):
                ids += self._encoding.encode(piece, allowed_special=allowed, disallowed_special=())
        return ids

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes of the ids, special tokens by name. Raises ValueError for an id outside the vocabulary."""
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"token id {token} is outside the vocabulary of {self.vocab_size}")
        return self._encoding.decode_bytes(list(ids))

    def decode(self, ids: Sequence[int], *, skip_special: bool = False, errors: str = "replace") -> str:
        """Text of the ids. Bytes that are no UTF-8 become U+FFFD unless `errors` says otherwise."""
        kept = [token for token in ids if token not in self.hidden] if skip_special else ids
        return self.decode_bytes(kept).decode("utf-8", errors)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and (self.ranks, self.names) == (other.ranks, other.names)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Tokenizer({len(self.ranks):,} tokens and {len(self.names)} special ones)"


def _read_ranks(path: Path) -> dict[bytes, int]:
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer: {path} does not exist")
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(f"{path}, line {number}: expected base64 and a rank, got {line[:40]!r}") from None
    if sorted(ranks.values()) != list(range(len(ranks))) or not ranks:
        raise ValueError(
            f"{path}: its {len(ranks)} distinct tokens do not have the ranks 0..{len(ranks) - 1}, each once"
        )
    return ranks


_LONG_RUN = re.compile(rf"\s{{{_RUN + 1}}}|\S{{{_RUN + 1}}}")


def _bounded_runs(text: str) -> Iterator[str]:
    """Cut so that no piece has more than _RUN whitespace or non-whitespace characters in a row."""
    if len(text) <= _RUN or _LONG_RUN.search(text) is None:
        yield text
        return
    start = run = 0
    space = text[0].isspace()
    for at, character in enumerate(text):
        if character.isspace() == space:
            run += 1
            if run > _RUN:
                yield text[start:at]
                start, run = at, 1
        else:
            space, run = not space, 1
    yield text[start:]
