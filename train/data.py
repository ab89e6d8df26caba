"""From samples, files and data sets to packed training batches: the same sequence of packs wherever it is made.

    1  mixture   which source comes next: the one with the largest token deficit, so token shares hold to one document
    2  document  number i of a source: a sample of the world, or a row of a corpus
    3  encode    rendered as fusion/prompt.py does, with a loss mask and padded uint8 frames; bad ones are counted
    4  lane      packs of whole documents within `sequence` tokens and `patch_budget` patches
    5  loader    lane m in worker m % workers, this rank's lanes of every step in order
    6  collate   packs -> Batch

    step      lane 0                lane 1                lane 2            lane m draws documents m, m + lanes, ...
      0    |aaaa|bb|cccccc|   |aaa|bbbbbbbb|cc|   |aaaaaaa|bbbb|    of each source, so what it holds depends on
      1    |ddddddd|ee|ff |   |dddd|eeee|fff  |   |ccc|ddddddd |    neither workers nor ranks

A pack remembers the state of its lane behind it: a few numbers. From them the next pack is made again, bit for bit.
"""

import contextlib
import math
import multiprocessing
import os
import queue
import signal
import threading
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from multiprocessing.connection import wait
from typing import Any
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray

import world
from fusion.config import KimiConfig
from fusion.template import Control, Media, Piece, encode_pieces, merge_text, render
from lm.tokenizer import Tokenizer
from moonvit.config import MediaConfig
from moonvit.image import cut_patches, load_image, pad_frame, plan_resize
from moonvit.packing import pack as pack_patches
from moonvit.video import read_video, timestamp_text
from train.batch import Batch
from train.corpus import Corpus, Row, open_corpus
from world.sample import Clip, Maker, Sample, Split, rng_of

LOOK_AHEAD = 16  # documents that wait for a place in a lane; more fill packs better and cost memory
BAD_SHARE, BAD_WINDOW = 0.05, 1000  # more than this share of the last 200 to 1000 documents bad: stop

State = dict[str, Any]


# ---- 1 mixture -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """Where documents of one kind come from: families of the world, or one corpus.

    group: under which its loss is reported. weight: its share of all tokens, relative to the other sources. families:
    family -> share of the source's documents. levels: lowest and highest, drawn evenly. makers: makers of your own,
    by family name; None means the world's. plain: share of the samples written as plain text, question and answer on
    lines of their own, instead of as a conversation: half the tokens. corpus: see train/corpus.py; window: bytes of one
    text document there. after: so many tokens of a lane pass before it begins; until then its group has its part.
    """

    name: str
    group: str
    weight: float
    families: Mapping[str, float] = field(default_factory=dict)
    levels: tuple[int, int] = (1, 1)
    makers: Mapping[str, Maker] | None = None
    plain: float = 0.0
    corpus: str | None = None
    window: int = 3000
    after: int = 0

    def __post_init__(self) -> None:
        if not self.name or not self.group:
            raise ValueError(f"a source needs a name and a group, got {self.name!r} and {self.group!r}")
        if not self.weight > 0:
            raise ValueError(f"source {self.name}: weight must be positive, got {self.weight}")
        if bool(self.families) == (self.corpus is not None):
            raise ValueError(f"source {self.name} needs either families or a corpus")
        if any(not share > 0 for share in self.families.values()):
            raise ValueError(f"source {self.name}: shares of families must be positive, got {dict(self.families)}")
        if self.after < 0:
            raise ValueError(f"source {self.name}: after counts tokens, got {self.after}")
        if not 0 <= self.plain <= 1:
            raise ValueError(f"source {self.name}: plain is a share between 0 and 1, got {self.plain}")
        if not 1 <= self.levels[0] <= self.levels[1]:
            raise ValueError(f"source {self.name}: levels are (lowest, highest) from 1, got {self.levels}")

    @property
    def fingerprint(self) -> str:
        """Changes when its documents or its weight do, so that a resumed run notices."""
        said = (
            self.group,
            self.weight,
            sorted(self.families.items()),
            self.levels,
            self.plain,
            self.corpus,
            self.window,
            *((self.after,) if self.after else ()),
        )
        return f"{crc32(repr(said).encode()):08x}"


@dataclass(frozen=True)
class Mixture:
    """Sources at fixed token shares, of one split."""

    sources: tuple[Source, ...]
    split: Split = "train"

    def __post_init__(self) -> None:
        names = [source.name for source in self.sources]
        if not names:
            raise ValueError("a mixture needs at least one source")
        twice = sorted(name for name, count in Counter(names).items() if count > 1)
        if twice:
            raise ValueError(f"two sources have the same name: {', '.join(twice)}")
        if all(source.after for source in self.sources):
            raise ValueError("a mixture needs a source that begins at once, after=0")

    @property
    def shares(self) -> dict[str, float]:
        """Share of all tokens that each source gets once all have begun."""
        total = sum(source.weight for source in self.sources)
        return {source.name: source.weight / total for source in self.sources}

    def wanted(self, tokens: float) -> dict[str, float]:
        """How many of a lane's first `tokens` tokens are each source's."""
        wanted = dict.fromkeys(self.shares, 0.0)
        for start, stop in pairwise((*sorted({source.after for source in self.sources}), math.inf)):
            span = min(tokens, stop) - start
            if span <= 0:
                break
            for name, share in self._shares_at(start).items():
                wanted[name] += span * share
        return wanted

    def _shares_at(self, tokens: float) -> dict[str, float]:
        """Shares of the sources that have begun. What is still to come leaves its part to the others of its group, or
        to all where none of them has begun: a group's share stays what it is."""
        begun = [source for source in self.sources if source.after <= tokens]
        weights = {source.name: source.weight for source in begun}
        for late in self.sources:
            if late.after > tokens:
                heirs = [source for source in begun if source.group == late.group] or begun
                for heir in heirs:
                    weights[heir.name] += late.weight * heir.weight / sum(source.weight for source in heirs)
        return {name: weight / sum(weights.values()) for name, weight in weights.items()}


# ---- 2 document ------------------------------------------------------------------------------------------------------


class Skip(ValueError):
    """A document that cannot be trained on. reason: the kind of fault, under which it is counted."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class Documents:
    """Documents by source and number, a pure function of both and the seed."""

    def __init__(self, mixture: Mixture, seed: int) -> None:
        self.mixture, self.seed = mixture, seed
        self.sources = {source.name: source for source in mixture.sources}
        self.corpora: dict[str, Corpus] = {}
        for source in mixture.sources:
            if source.corpus is not None:
                self.corpora[source.name] = open_corpus(source.corpus, seed, mixture.split, source.window)
            for family in source.families:
                _ = (source.makers or world.MAKERS)[family]  # an unknown one is an error now, not in a worker

    def draw(self, name: str, index: int) -> tuple[str, int]:
        """Family and level of document `index`."""
        source = self.sources[name]
        rng = rng_of("document", name, self.seed, index)
        family = rng.choices(list(source.families), list(source.families.values()))[0]
        return family, rng.randint(*source.levels)

    def plain(self, name: str, index: int) -> bool:
        """Whether document `index` is to be written as plain text."""
        share = self.sources[name].plain
        return share > 0 and rng_of("plain", name, self.seed, index).random() < share

    def get(self, name: str, index: int) -> Sample | Row:
        """Document `index` of a source. Raises Skip when the maker refuses or the row cannot be read."""
        source = self.sources[name]
        if name in self.corpora:
            try:
                return self.corpora[name].row(index)
            except (ValueError, OSError) as error:
                raise Skip("unreadable row", str(error)) from None
        family, level = self.draw(name, index)
        try:
            if source.makers is None:
                return world.sample(family, index, self.mixture.split, self.seed, level)
            rng = rng_of(family, self.mixture.split, self.seed, index)
            return source.makers[family](rng, self.mixture.split, level)
        except ValueError as error:
            raise Skip("refused by its maker", f"{family}, level {level}: {error}") from None

    def describe(self, name: str, index: int) -> str:
        """The document in words that find it again."""
        if name in self.corpora:
            return f"{name} document {index} of {self.sources[name].corpus}"
        family, level = self.draw(name, index)
        return f"{name} document {index} ({family}, level {level}, {self.mixture.split}, seed {self.seed})"


# ---- 3 encode --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoded:
    """One document, ready to be packed.

    ids: int32 (tokens), with one <|media_pad|> per vision token. loss_mask: bool (tokens), True where the model is to
    say this token. frames: per item, uint8 (t, height, width, 3), padded; four times smaller than patches, and
    cut_patches makes the same patches of them later. raw: plain text, which may be cut anywhere.
    """

    ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    frames: tuple[NDArray[np.uint8], ...] = ()
    patches: int = 0
    source: str = ""
    group: str = ""
    raw: bool = False

    def __len__(self) -> int:
        return len(self.ids)

    def part(self, start: int, stop: int) -> "Encoded":
        """Some tokens of a raw text."""
        assert self.raw and not self.frames, "only plain text is cut"
        ids, mask = self.ids[start:stop], self.loss_mask[start:stop]
        return Encoded(ids, mask, source=self.source, group=self.group, raw=True)


class Encoder:
    """Documents to ids, loss masks and frames. Remembers the ids of short texts: the world repeats its words."""

    def __init__(self, tokenizer: Tokenizer, config: KimiConfig) -> None:
        self.tokenizer, self.config = tokenizer, config
        self.thinks = config.profile in ("k2_thinking", "k2_5", "k2_6", "k2_7_code")
        self.start, self.end = tokenizer.id("[BOS]"), tokenizer.id("[EOS]")
        self._remembered = lru_cache(maxsize=50_000)(self._ids)

    def encode(self, document: Sample | Row, source: str = "", group: str = "", plain: bool = False) -> Encoded:
        """A sample, a row {"messages": ...} or {"text": ...}, or a text. Raises Skip with the reason.

        plain: a sample as a page of text (see `page`), unless it has tool rounds, which have no such form.
        """
        if isinstance(document, Sample):
            if plain and not any(turn.steps for turn in document.turns):
                return self.page(document, source, group)
            return self.chat(document.messages(), document.tools, source, group)
        if isinstance(document, dict) and document.get("messages") is not None:
            return self.chat(document["messages"], document.get("tools") or (), source, group)
        text = document.get("text") if isinstance(document, dict) else document
        if text is None:
            assert isinstance(document, dict)
            raise Skip("neither text nor messages", f"a row needs text or messages, got {', '.join(document) or '{}'}")
        if not isinstance(text, str):
            raise Skip("wrong type", f"text must be a str, got {type(text).__name__}")
        if not text.strip():
            raise Skip("empty", "a text without a letter in it")
        ids = np.array([self.start, *self.tokenizer.encode(text), self.end], np.int32)
        return Encoded(ids, np.ones(len(ids), bool), source=source, group=group, raw=True)

    def chat(
        self, messages: Any, tools: Sequence[Mapping[str, Any]] = (), source: str = "", group: str = ""
    ) -> Encoded:
        """A conversation. Only what the assistant says is learned: its thoughts after the opening <think>, </think>,
        answer, tool calls and <|im_end|>."""
        try:
            plain = [dict(tool) for tool in tools]
            pieces = render(messages, profile=self.config.profile, tools=plain, add_generation_prompt=False)
        except (ValueError, TypeError) as error:
            raise Skip("malformed messages", str(error)) from None
        ids: list[int] = []
        mask: list[bool] = []
        frames: list[NDArray[np.uint8]] = []
        speaking = learned = False  # inside an assistant's message; past its opening
        for piece in self._see(pieces, frames):
            new = self._tokens(piece)
            ids += new
            mask += [learned and not isinstance(piece, Media)] * len(new)
            if isinstance(piece, Control):
                if piece.name == "<|im_assistant|>":
                    speaking = True
                elif piece.name == ("<think>" if self.thinks else "<|im_middle|>"):
                    learned = speaking
                elif piece.name == "<|im_end|>":
                    speaking = learned = False
        if not any(mask):
            raise Skip("no target tokens", "no assistant's message in it, so there is nothing to learn")
        patches = sum(f.shape[0] * f.shape[1] * f.shape[2] for f in frames) // self.config.media.patch_size**2
        return Encoded(np.array(ids, np.int32), np.array(mask, bool), tuple(frames), patches, source, group)

    def page(self, sample: Sample, source: str = "", group: str = "") -> Encoded:
        """A sample as a page of text: its media, then question, newline, answer, newline, for each turn.

        Pre-training reads such pages; half of a short turn's tokens are the conversation's markup. Answers are learned,
        questions are not. A thought stands between <think> and </think>, as in a conversation.
        """
        frames: list[NDArray[np.uint8]] = []
        ids, mask = [self.start], [False]

        def add(pieces: Sequence[Piece], learned: bool) -> None:
            for piece in self._see(pieces, frames):
                new = self._tokens(piece)
                ids.extend(new)
                mask.extend([learned] * len(new))

        image = (Control("<|media_begin|>"), "image", Control("<|media_content|>"))
        for medium in sample.media:
            if isinstance(medium, Clip):
                add([Media("video", medium), "\n"], False)
            else:
                add([*image, Media("image", medium.pixels), Control("<|media_end|>"), "\n"], False)
        for turn in sample.turns:
            add([turn.question + "\n"], False)
            if turn.thinking:
                add([Control("<think>"), turn.thinking, Control("</think>")], True)
            add([turn.answer + "\n"], True)
        ids.append(self.end)
        mask.append(True)
        patches = sum(f.shape[0] * f.shape[1] * f.shape[2] for f in frames) // self.config.media.patch_size**2
        return Encoded(np.array(ids, np.int32), np.array(mask, bool), tuple(frames), patches, source, group)

    def _tokens(self, piece: Piece) -> Sequence[int]:
        """Ids of a piece; of padded frames, a <|media_pad|> for every token that the tower will make of them."""
        if isinstance(piece, Media):
            cell = self.config.media.patch_size * self.config.media.merge_kernel_size
            rows, columns = (side // cell for side in piece.source.shape[1:3])
            return [self.config.media_placeholder_token_id] * (rows * columns)
        short = isinstance(piece, Control) or len(piece) <= 200
        return self._remembered(piece) if short else self._ids(piece)

    def _ids(self, piece: str | Control) -> tuple[int, ...]:
        return tuple(token for token in encode_pieces([piece], self.tokenizer) if not isinstance(token, Media))

    def _see(self, pieces: Iterable[Piece], frames: list[NDArray[np.uint8]]) -> list[Piece]:
        """Media replaced by their padded frames, clips by their chunks with stamps, as fusion/prompt.py writes them."""
        media = self.config.media
        out: list[Piece] = []
        for piece in pieces:
            if not isinstance(piece, Media):
                out.append(piece)
                continue
            if self.config.vision is None:
                raise Skip("media for a text-only model", "this model has no vision tower")
            try:
                if piece.kind == "image":
                    image = load_image(piece.source)
                    plan = plan_resize(image.width, image.height, media, media.in_patch_limit)
                    frames.append(pad_frame(image, plan)[None])
                    out.append(Media("image", frames[-1]))
                    continue
                if media.rule == "kimi_vl":
                    raise ValueError("Kimi-VL takes no video: send the frames as images")
                clip = piece.source
                if isinstance(clip, Clip) and clip.fps > media.sample_fps:  # its answers count every frame
                    raise ValueError(
                        f"a clip of {clip.fps:g} frames/s, looked at {media.sample_fps:g} times per second"
                    )
                video = (
                    read_video(clip.frames, media, fps=clip.fps) if isinstance(clip, Clip) else read_video(clip, media)
                )
            except (ValueError, OSError) as error:
                raise Skip("unreadable media", str(error)) from None
            for chunk in video.chunks:
                frames.append(chunk.frames)
                out += [timestamp_text(chunk.timestamp, media.timestamp_mode), Control("<|media_begin|>"), "video"]
                out += [Control("<|media_content|>"), Media("image", chunk.frames), Control("<|media_end|>")]
        return merge_text(out)


def encode(
    document: Sample | Row, tokenizer: Tokenizer, config: KimiConfig, source: str = "", group: str = ""
) -> Encoded:
    """One document alone; an Encoder does many faster. Raises Skip (a ValueError) with the reason."""
    return Encoder(tokenizer, config).encode(document, source, group)


# ---- 4 lane ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pack:
    """Documents of one lane and step. state: the lane behind it, as JSON. good, bad: documents drawn for it."""

    lane: int
    documents: tuple[Encoded, ...]
    media: MediaConfig
    state: State
    good: int = 0
    bad: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        return sum(map(len, self.documents))

    @property
    def patches(self) -> int:
        return sum(document.patches for document in self.documents)


def judge(bad: Iterable[str], count: int) -> None:
    """Raises ValueError with the reasons when too many of `count` documents are bad; fewer than 200 say little."""
    reasons = Counter(bad)
    if count >= 200 and reasons.total() > BAD_SHARE * count:
        listed = ", ".join(f"{reason} ({number})" for reason, number in reasons.most_common())
        raise ValueError(
            f"{reasons.total()} of the last {count} documents are bad, over {BAD_SHARE:.0%}, so the run stops: {listed}"
        )


class Lane:
    """One endless stream of packs."""

    def __init__(
        self,
        documents: Documents,
        encoder: Encoder,
        number: int,
        lanes: int,
        sequence: int,
        patch_budget: int,
        state: State | None = None,
    ) -> None:
        self.documents, self.encoder, self.number, self.lanes = documents, encoder, number, lanes
        self.sequence, self.patch_budget = sequence, patch_budget
        self.shares = documents.mixture.shares
        state = state or {}
        self.next: dict[str, int] = {name: state.get("next", {}).get(name, 0) for name in self.shares}
        self.tokens: dict[str, int] = {name: state.get("tokens", {}).get(name, 0) for name in self.shares}
        self.used: dict[str, int] = {name: state.get("documents", {}).get(name, 0) for name in self.shares}
        self.skipped: dict[str, int] = dict(state.get("skipped", {}))
        self.examples: dict[str, str] = dict(state.get("examples", {}))
        self.packs, self.placed = state.get("packs", 0), state.get("placed", 0)
        self.waiting: list[tuple[str, int, int, int]] = []  # source, number, first token, tokens
        self.held: list[Encoded] = []  # the documents of `waiting`
        self.good = 0
        self.bad: list[str] = []
        self.at: tuple[str, int] | None = None  # the document being made, for messages
        for name, index, start, length in state.get("waiting", []):
            whole = self._make(name, index)
            self.waiting.append((name, index, start, length))
            self.held.append(whole.part(start, start + length) if len(whole) > length else whole)

    def pack(self) -> Pack:
        """The next pack: documents in the order drawn; when the oldest no longer fits, the largest that does."""
        self.good, self.bad = 0, []
        chosen: list[Encoded] = []
        tokens, patches = self.sequence, self.patch_budget
        while True:
            while len(self.held) < LOOK_AHEAD:
                self._draw()
            fits = [i for i, d in enumerate(self.held) if len(d) <= tokens and d.patches <= patches]
            if not fits:
                break
            best = 0 if fits[0] == 0 else max(fits, key=lambda i: len(self.held[i]))
            del self.waiting[best]
            chosen.append(self.held.pop(best))
            tokens -= len(chosen[-1])
            patches -= chosen[-1].patches
        self.packs += 1
        self.placed += self.sequence - tokens
        media = self.encoder.config.media
        return Pack(self.number, tuple(chosen), media, self.state(), self.good, tuple(self.bad))

    def state(self) -> State:
        """Numbers from which the next pack is made again."""
        return {
            "next": dict(self.next),
            "tokens": dict(self.tokens),
            "documents": dict(self.used),
            "skipped": dict(self.skipped),
            "examples": dict(self.examples),
            "packs": self.packs,
            "placed": self.placed,
            "waiting": [list(reference) for reference in self.waiting],
        }

    def _make(self, name: str, index: int) -> Encoded:
        self.at = name, index
        source = self.documents.sources[name]
        plain = self.documents.plain(name, index)
        return self.encoder.encode(self.documents.get(name, index), name, source.group, plain)

    def _draw(self) -> None:
        """Put one more document of the source that lags most among the waiting; count it when it is bad."""
        wanted = self.documents.mixture.wanted(sum(self.tokens.values()) + 1)
        name = max(wanted, key=lambda n: wanted[n] - self.tokens[n])
        index = self.number + self.lanes * self.next[name]
        self.next[name] += 1
        try:
            document = self._make(name, index)
            if len(document) > self.sequence and not document.raw:
                raise Skip("longer than a sequence", f"{len(document):,} tokens, a sequence has {self.sequence:,}")
            if document.patches > self.patch_budget:
                raise Skip(
                    "more patches than the budget", f"{document.patches:,} patches, the budget is {self.patch_budget:,}"
                )
        except Skip as skip:
            self.skipped[skip.reason] = self.skipped.get(skip.reason, 0) + 1
            self.examples.setdefault(skip.reason, f"{self.documents.describe(name, index)}: {skip}"[:300])
            self.bad.append(skip.reason)
            judge(self.bad, self.good + len(self.bad))  # else a lane of bad documents would never fill a pack
            return
        parts = -(-len(document) // self.sequence)  # a long text in equal parts: no part is a lonely token
        edges = [len(document) * part // parts for part in range(parts + 1)]
        for start, stop in pairwise(edges):
            self.waiting.append((name, index, start, stop - start))
            self.held.append(document.part(start, stop) if parts > 1 else document)
        self.tokens[name] += len(document)
        self.used[name] += 1
        self.good += 1


# ---- 5 loader --------------------------------------------------------------------------------------------------------


class Loader:
    """The packs of this rank, step by step. Close it, or use it in a `with`, when workers are not to outlive it."""

    def __init__(
        self,
        mixture: Mixture,
        tokenizer: Tokenizer,
        config: KimiConfig,
        *,
        sequence: int,
        lanes: int,
        patch_budget: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 1,
        state: State | None = None,
        ahead: int = 2,
        active: int | None = None,
    ) -> None:
        """sequence: tokens of a pack. lanes: packs of a step, over all ranks; active: only the first so many of them
        are used (None: all), as long as `set_sequence` says nothing else. workers: processes; 0 makes the packs in this
        one. state: what `state` gave, of this rank or merged. ahead: steps that workers may be ahead.
        Raises ValueError when the state belongs to another mixture, seed or number of lanes.
        """
        for name, value, least in (
            ("sequence", sequence, 2),
            ("lanes", lanes, 1),
            ("patch_budget", patch_budget, 0),
            ("world_size", world_size, 1),
            ("workers", workers, 0),
            ("ahead", ahead, 1),
        ):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
        if lanes % world_size or not 0 <= rank < world_size:
            raise ValueError(
                f"{lanes} lanes cannot be shared by {world_size} ranks (this is rank {rank}): lanes must be a "
                "multiple of the ranks, so that what a lane holds does not depend on them"
            )
        self.mixture, self.tokenizer, self.config = mixture, tokenizer, config
        self.sequence, self.lanes, self.patch_budget, self.seed = sequence, lanes, patch_budget, seed
        self.numbers = list(range(rank, lanes, world_size))
        self.world_size, self.workers, self.ahead = world_size, workers, ahead
        self._activate(lanes if active is None else active)
        documents = Documents(mixture, seed)
        self.origin = {
            "seed": seed,
            "lanes": lanes,
            "split": mixture.split,
            "sources": list(mixture.shares),
            "contents": {source.name: source.fingerprint for source in mixture.sources},
            "corpora": {name: corpus.fingerprint for name, corpus in documents.corpora.items()},
            "makers": world.fingerprint() if any(s.families and s.makers is None for s in mixture.sources) else "",
        }
        self.step = 0
        self.states: dict[int, State] = {number: {} for number in self.numbers}
        if state is not None:
            self._restore(state)
        self.recent: deque[str | None] = deque(maxlen=BAD_WINDOW)  # per document, why it is bad
        self._documents = documents
        self._inline: dict[int, Lane] = {}
        self._processes: list[_Worker] = []
        self._start()

    def next_step(self) -> list[Pack]:
        """The packs of this rank's lanes, in order.

        Raises ValueError when too many documents are bad, RuntimeError that names the document when making one failed.
        """
        packs: list[Pack] = []
        for place, number in enumerate(self.due):
            if self._processes:
                pack = self._processes[place % len(self._processes)].take()
                assert pack.lane == number, f"worker sent lane {pack.lane} where lane {number} is due"
            else:
                pack = make_pack(self._inline[number])
            packs.append(pack)
            self.recent.extend([*pack.bad, *[None] * pack.good])
            judge((reason for reason in self.recent if reason is not None), len(self.recent))
        for pack in packs:
            self.states[pack.lane] = pack.state
        self.step += 1
        return packs

    def state(self) -> State:
        """Small and JSON: behind the last step that was taken, however far the workers are ahead."""
        lanes = {str(number): self.states[number] for number in self.numbers}
        return {"origin": self.origin, "step": self.step, "sequence": self.sequence, "per_lane": lanes}

    def set_sequence(self, sequence: int, patch_budget: int | None = None, active: int | None = None) -> None:
        """Longer packs from the next step on, of the first `active` lanes (None: as many as now).

        Raises ValueError for shorter ones: waiting documents may not fit. What waits in a lane that is no longer active
        stays in its state.
        """
        if sequence < self.sequence or (patch_budget or self.patch_budget) < self.patch_budget:
            raise ValueError(f"a sequence can only grow: it has {self.sequence} tokens, asked for {sequence}")
        self.close()
        self.sequence, self.patch_budget = sequence, patch_budget or self.patch_budget
        self._activate(self.active if active is None else active)
        self._start()

    def _activate(self, active: int) -> None:
        if not 1 <= active <= self.lanes or active % self.world_size:
            raise ValueError(
                f"{active} active lanes of {self.lanes}: it must be a multiple of the {self.world_size} ranks"
            )
        self.active = active
        self.due = [number for number in self.numbers if number < active]

    def report(self) -> dict[str, Any]:
        """Of this rank's lanes so far: documents and tokens per source, skipped by reason with an example, fill."""
        states = [state for state in self.states.values() if state]
        total: dict[str, Counter[str]] = {key: Counter() for key in ("documents", "tokens", "skipped")}
        examples: dict[str, str] = {}
        for state in states:
            for key, counter in total.items():
                counter.update(state[key])
            examples = state["examples"] | examples
        tokens = total["tokens"].total()
        packs, placed = sum(s["packs"] for s in states), sum(s["placed"] for s in states)
        return {
            "steps": self.step,
            "documents": dict(total["documents"]),
            "tokens": dict(total["tokens"]),
            "shares": {name: count / tokens for name, count in total["tokens"].items()} if tokens else {},
            "skipped": dict(total["skipped"]),
            "examples": examples,
            "tokens_per_pack": placed / packs if packs else 0.0,
        }

    def close(self) -> None:
        """End the workers."""
        for process in self._processes:
            process.stop()
        self._processes = []

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _restore(self, state: State) -> None:
        for key, theirs in state["origin"].items():
            if self.origin.get(key) != theirs:
                raise ValueError(
                    f"the data state was made with {key} {theirs!r}, this run has {self.origin.get(key)!r}: "
                    "it would not continue with the next document"
                )
        missing = [number for number in self.numbers if str(number) not in state["per_lane"]]
        if missing:
            raise ValueError(f"the data state lacks lanes {missing}: merge the states of all ranks first")
        if state["sequence"] > self.sequence:
            raise ValueError(f"the data state has packs of {state['sequence']} tokens, this run of {self.sequence}")
        self.step = state["step"]
        self.states = {number: state["per_lane"][str(number)] for number in self.numbers}

    def _start(self) -> None:
        options = (self.lanes, self.sequence, self.patch_budget)
        if not self.workers:
            encoder = Encoder(self.tokenizer, self.config)
            self._inline = {n: Lane(self._documents, encoder, n, *options, self.states[n]) for n in self.due}
            return
        count = min(self.workers, len(self.due))
        for worker in range(count):
            lanes = {n: self.states[n] for n in self.due[worker::count]}
            parts = (self.mixture, self.tokenizer, self.config, self.seed, lanes, options)
            self._processes.append(_Worker(worker, parts, self.ahead * len(lanes)))


def merge(states: Sequence[State]) -> State:
    """One state of the states of all ranks, taken at the same step. Raises ValueError when they differ."""
    first = states[0]
    for state in states[1:]:
        if any(state[key] != first[key] for key in ("origin", "step", "sequence")):
            raise ValueError("the ranks' data states are of different runs or steps")
    lanes = {number: lane for state in states for number, lane in state["per_lane"].items()}
    return {**first, "per_lane": lanes}


def make_pack(lane: Lane) -> Pack:
    """lane.pack(), with a one-line RuntimeError that names the document when something breaks inside."""
    try:
        return lane.pack()
    except ValueError:
        raise
    except Exception as error:
        where = lane.documents.describe(*lane.at) if lane.at else f"lane {lane.number}"
        raise RuntimeError(f"{where}: {type(error).__name__}: {error}") from error


class _Worker:
    """A process that makes the packs of some lanes. Bounded ahead; dies with its parent."""

    def __init__(self, number: int, parts: tuple[Any, ...], ahead: int) -> None:
        context = multiprocessing.get_context("spawn")  # fork would copy torch's threads in an unknown state
        self.number = number
        self.queue = context.Queue(maxsize=ahead)
        self.process = context.Process(target=_work, args=(parts, self.queue), daemon=True, name=f"data-{number}")
        self.process.start()

    def take(self) -> Pack:
        """The next pack. Raises what the worker raised, or RuntimeError when it died."""
        while True:
            alive = self.process.is_alive()
            try:
                kind, value = self.queue.get(timeout=0.5)
            except queue.Empty:
                if not alive:
                    code = self.process.exitcode
                    raise RuntimeError(f"data worker {self.number} died (exit code {code}) and left no word") from None
                continue
            if kind == "pack":
                return value
            self.stop()
            raise (ValueError if kind == "bad" else RuntimeError)(value)

    def stop(self) -> None:
        self.process.terminate()
        self.process.join()
        self.queue.close()


def _work(parts: tuple[Any, ...], packs: Any) -> None:
    """Body of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_die_with_parent, daemon=True).start()
    with contextlib.suppress(OSError, AttributeError):
        os.nice(5)  # training has the cores first
    torch.set_num_threads(1)
    mixture, tokenizer, config, seed, states, (count, sequence, patch_budget) = parts
    kind, said = "broken", ""
    try:
        documents, encoder = Documents(mixture, seed), Encoder(tokenizer, config)
        lanes = [Lane(documents, encoder, n, count, sequence, patch_budget, state) for n, state in states.items()]
        while True:
            for lane in lanes:
                packs.put(("pack", make_pack(lane)))
    except ValueError as error:
        kind, said = "bad", str(error)
    except Exception as error:  # noqa: BLE001 - the parent raises it again
        said = str(error) if isinstance(error, RuntimeError) else f"{type(error).__name__}: {error}"
    packs.put((kind, said))


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


# ---- 6 collate -------------------------------------------------------------------------------------------------------


def collate(packs: Sequence[Pack]) -> Batch:
    """One Batch of one or more packs. Raises ValueError for none."""
    documents = [document for pack in packs for document in pack.documents]
    if not documents:
        raise ValueError("nothing to collate: no packs")
    targets = []
    for document in documents:
        next_ids = np.full(len(document), -1, np.int64)
        next_ids[:-1] = np.where(document.loss_mask[1:], document.ids[1:], -1)
        targets.append(next_ids)
    items = [
        cut_patches(frames, pack.media) for pack in packs for document in pack.documents for frames in document.frames
    ]
    return Batch(
        ids=torch.from_numpy(np.concatenate([document.ids for document in documents]).astype(np.int64)),
        targets=torch.from_numpy(np.concatenate(targets)),
        lengths=tuple(map(len, documents)),
        groups=tuple(document.group for document in documents),
        media=pack_patches(items) if items else None,
    )
