"""moonkit tokenizer: train a small tokenizer of Kimi's kind on your own text.

    moonkit tokenizer src/ docs/ notes.txt --out my-tokenizer --vocab-size 4096

Same regex, same special-token names, same file format as the released one; only the byte pairs are yours.
Byte-pair encoding (arXiv 1508.07909): start from bytes, join the most frequent neighbours, repeat. Same text, same
tokenizer: ties go to the pair whose bytes sort first.
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import regex
import tyro

from lm.tokenizer import NUM_SPECIAL, PATTERN, Tokenizer

TEXT_SUFFIXES = frozenset(
    ".txt .md .rst .py .pyi .c .h .cpp .cc .rs .go .js .ts .java .html .css .json .jsonl .yaml .yml .toml .sh".split()
)


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    progress: Callable[[int, int], None] | None = None,
    split_digits: bool = False,
) -> dict[bytes, int]:
    """Ranks of at most vocab_size tokens, the 256 bytes among them (special tokens come on top).

    Fewer when the text has no pair left that occurs twice. progress(done, total) is called now and then.
    split_digits: no two digits are joined, so that sums line up digit by digit.
    Raises ValueError for a size below 256 or no text.
    """
    if vocab_size < 256:
        raise ValueError(f"a byte-level vocabulary needs at least the 256 bytes, got {vocab_size}")
    splitter = regex.compile(PATTERN, regex.VERSION1)
    counts: Counter[bytes] = Counter()
    for text in texts:
        clean = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        # the pattern keeps numbers apart from all else, so digits that are not joined here are joined nowhere
        words_of = (
            w for word in splitter.findall(clean) for w in (word if split_digits and word.isnumeric() else [word])
        )
        counts.update(word.encode() for word in words_of)
    if not counts:
        raise ValueError("no text to train on")

    tokens = [bytes([byte]) for byte in range(256)]
    words = [(list(word), count) for word, count in sorted(counts.items()) if len(word) > 1]
    pairs: Counter[tuple[int, int]] = Counter()
    where: defaultdict[tuple[int, int], set[int]] = defaultdict(set)
    for index, (word, count) in enumerate(words):
        for pair in pairwise(word):
            pairs[pair] += count
            where[pair].add(index)

    def entry(pair: tuple[int, int]) -> tuple[int, bytes, bytes, tuple[int, int]]:
        return -pairs[pair], tokens[pair[0]], tokens[pair[1]], pair

    heap = [entry(pair) for pair in pairs]
    heapq.heapify(heap)
    known = set(tokens)
    while heap and len(tokens) < vocab_size:
        count, _, _, pair = heapq.heappop(heap)
        if -count != pairs[pair]:
            continue  # the count changed since; its newer entry is further down
        if -count < 2:
            break
        new, joined = len(tokens), tokens[pair[0]] + tokens[pair[1]]
        if joined in known:  # the same bytes by another pair: one token is enough
            pairs[pair] = 0
            continue
        tokens.append(joined)
        known.add(joined)
        touched: set[tuple[int, int]] = set()
        for index in where.pop(pair):
            word, times = words[index]
            for old in pairwise(word):
                pairs[old] -= times
                touched.add(old)
            merged = _merge(word, pair, new)
            for fresh in pairwise(merged):
                pairs[fresh] += times
                where[fresh].add(index)
                touched.add(fresh)
            words[index] = (merged, times)
        touched.discard(pair)
        for changed in touched:
            if pairs[changed] > 0:
                heapq.heappush(heap, entry(changed))
        if progress is not None and len(tokens) % 16 == 0:
            progress(len(tokens), vocab_size)
    return {token: rank for rank, token in enumerate(tokens)}


def _merge(word: list[int], pair: tuple[int, int], new: int) -> list[int]:
    merged, at = [], 0
    while at < len(word):
        if at + 1 < len(word) and (word[at], word[at + 1]) == pair:
            merged.append(new)
            at += 2
        else:
            merged.append(word[at])
            at += 1
    return merged


def read_texts(paths: Iterable[Path], max_bytes: int, skipped: list[Path] | None = None) -> Iterator[str]:
    """Texts of files and folders, in sorted order, at most max_bytes in all. Files that are no UTF-8 are skipped.

    A folder gives its files with a text suffix. Raises FileNotFoundError for a path that does not exist.
    """
    left = max_bytes
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"no such file or folder: {path}")
        files = [path]
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix in TEXT_SUFFIXES and file.is_file())
        for file in files:
            try:
                text = file.read_bytes()[:left].decode("utf-8")
            except UnicodeDecodeError as error:
                if left < file.stat().st_size and error.start > left - 4:  # cut inside a character by the limit
                    text = file.read_bytes()[: error.start].decode("utf-8")
                else:
                    if skipped is not None:
                        skipped.append(file)
                    continue
            left -= len(text.encode())
            yield text
            if left <= 0:
                return


@dataclass(frozen=True)
class Train:
    """Train a small tokenizer of Kimi's kind: same regex, same special tokens, same files."""

    text: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILE|FOLDER")]
    """Text files, or folders whose text files are read."""
    out: Path
    """Folder for tiktoken.model and tokenizer_config.json."""
    vocab_size: int = 4096
    """Ids in all, the 256 special ones included."""
    max_bytes: int = 20_000_000
    """Stop reading after this much text."""
    split_digits: bool = False
    """Every digit a token of its own: small models add and count better so."""


def main() -> None:
    """The verb."""
    arguments = tyro.cli(Train, prog="moonkit tokenizer")
    if arguments.vocab_size < 256 + NUM_SPECIAL:
        raise ValueError(
            f"--vocab-size must be at least {256 + NUM_SPECIAL}: 256 bytes and {NUM_SPECIAL} special tokens"
        )
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True, highlight=False)
    skipped: list[Path] = []
    texts = list(read_texts(arguments.text, arguments.max_bytes, skipped))
    size = sum(len(text.encode()) for text in texts)
    console.print(f"{size:,} bytes from {len(texts)} files")
    if skipped:
        more = f" and {len(skipped) - 5} more" if len(skipped) > 5 else ""
        console.print(f"skipped, not UTF-8: {', '.join(map(str, skipped[:5]))}{more}", soft_wrap=True)
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("joining pairs", total=arguments.vocab_size - NUM_SPECIAL)
        ranks = train_bpe(
            texts,
            arguments.vocab_size - NUM_SPECIAL,
            lambda done, _: bar.update(task, completed=done),
            arguments.split_digits,
        )
    if len(ranks) < arguments.vocab_size - NUM_SPECIAL:
        raise ValueError(
            f"the text has only {len(ranks)} tokens worth making, not {arguments.vocab_size - NUM_SPECIAL}; "
            "give more text or a smaller --vocab-size"
        )
    tokenizer = Tokenizer(ranks)
    tokenizer.save(arguments.out)
    sample = "".join(texts)[:1_000_000]
    ratio = len(sample.encode()) / max(len(tokenizer.encode(sample)), 1)
    console.print(f"{arguments.out}: {tokenizer!r}, {ratio:.2f} bytes per token on its own text")


if __name__ == "__main__":
    main()
