"""Continuous batching: requests join and leave a running batch, token by token.

    with Batcher(kimi) as batcher:                 a thread of its own; or call step() yourself
        request = batcher.submit(prompt, Sampling(max_new_tokens=64))
        for event in request.events(): ...         as fusion.generate.stream gives them
        request.cancel()                           leaves at the next step

    waiting ──> reading (its prompt, a few rows a step) ──> writing (one row a step) ──> done
       each step:  [ rows of all that write | rows of some that read ]  ->  one call  ->  next tokens

Prompts that begin like one seen before start from its latents (prefix caching): pictures count by their pixels.
Where lm/step.py has a kernel, a request gives bit for bit what it gives alone, whoever else is in the batch; elsewhere
up to the rounding of a product with more rows.
"""

import hashlib
import queue
import threading
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusion.generate import (
    Reply,
    ReplyReader,
    Sampling,
    StreamEvent,
    ThinkingBudget,
    read,
    sample,
    stop_ids,
)
from lm.cache import LatentCache
from lm.step import MOST, Stepper

if TYPE_CHECKING:
    from fusion.model import Kimi
    from fusion.prompt import Prompt

BLOCK = 64  # tokens; prefixes are kept and shared in whole blocks


class Request:
    """One prompt on its way to a reply. Made by `Batcher.submit`."""

    def __init__(self, kimi: "Kimi", prompt: "Prompt", sampling: Sampling, first_call: int, tools: Any) -> None:
        assert kimi.tokenizer is not None, "prepare() refuses a model without a tokenizer"
        self.prompt, self.sampling = prompt, sampling
        self.cached_tokens = 0  # of the prompt, that a prefix spared
        self._reader = ReplyReader(kimi.tokenizer, prompt, sampling, stop_ids(kimi), first_call, tools)
        self._budget = ThinkingBudget(kimi, prompt, sampling.thinking_budget)
        self._draw = torch.Generator().manual_seed(sampling.seed)
        self._events: queue.SimpleQueue[StreamEvent | BaseException] = queue.SimpleQueue()
        self._cancelled = threading.Event()
        self._pixels: list[bytes] = []  # what the prompt's vision tokens are of
        self._waiting: Tensor | None = None  # embeddings of the prompt that are not read yet
        self.reply: Reply | None = None

    def cancel(self) -> None:
        """Leave the batch at the next step. What was written until then is the reply, which ends as "halted"."""
        self._cancelled.set()

    def events(self, timeout: float | None = None) -> Iterator[StreamEvent]:
        """The events of the reply as they come; the last one carries it. Another thread must drive the batcher.

        Raises what went wrong in this request, and queue.Empty when nothing came for `timeout` seconds.
        """
        while True:
            event = self._events.get(timeout=timeout)
            if isinstance(event, BaseException):
                raise event
            yield event
            if event.kind == "end":
                return

    def wait(self, timeout: float | None = None) -> Reply:
        """The whole reply, when it is there."""
        for event in self.events(timeout):
            if event.reply is not None:
                return event.reply
        raise AssertionError("the last event of a reply carries it")

    def _give(self, events: Iterator[StreamEvent]) -> None:
        for event in events:
            if event.reply is not None:
                self.reply = event.reply
            self._events.put(event)


@dataclass
class _Prefix:
    """Latents of the first tokens of something read before: per layer (tokens, cache_dim)."""

    layers: list[Tensor]

    @property
    def bytes(self) -> int:
        return sum(layer.numel() * layer.element_size() for layer in self.layers)


class PrefixStore:
    """Latents of prompts by the content of their blocks; the least recently used leave first."""

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0
        self._entries: OrderedDict[bytes, _Prefix] = OrderedDict()  # by the mark of their last block

    def __len__(self) -> int:
        return len(self._entries)

    def longest(self, marks: Sequence[bytes]) -> tuple[int, list[_Prefix]]:
        """How many leading blocks are known, and the pieces that hold them, one per block."""
        found = []
        for mark in marks:
            entry = self._entries.get(mark)
            if entry is None:
                break
            self._entries.move_to_end(mark)
            found.append(entry)
        return len(found), found

    def keep(self, marks: Sequence[bytes], cache: LatentCache, slot: int) -> None:
        """Keep the blocks of a sequence that are not held yet. A block is of use only with all before it."""
        for index, mark in enumerate(marks):
            if mark in self._entries:
                self._entries.move_to_end(mark)
                continue
            part = [layer[slot, index * BLOCK : (index + 1) * BLOCK].clone() for layer in cache.layers]
            entry = _Prefix(part)
            if entry.bytes > self.limit:
                return
            self._entries[mark] = entry
            self.held += entry.bytes
        while self.held > self.limit:
            _, old = self._entries.popitem(last=False)
            self.held -= old.bytes


def pixel_digests(prompt: "Prompt") -> list[bytes]:
    """For every vision token of a prompt, a digest of the picture or chunk that it belongs to."""
    digests: list[bytes] = []
    for item in prompt.media.split() if prompt.media else ():
        seen = hashlib.sha256(item.pixels.contiguous().cpu().view(torch.uint8).numpy().tobytes())
        seen.update(str(item.grid_thw.tolist()).encode())
        digests += [seen.digest()] * item.tokens[0]
    return digests


def block_marks(ids: Sequence[int], placeholder: int, pixels: Sequence[bytes]) -> list[bytes]:
    """A digest for each whole block of tokens, of everything up to its end: ids, and pixels where media stand."""
    media = iter(pixels)
    marks = []
    chain = hashlib.sha256()
    for index, token in enumerate(ids):
        chain.update(token.to_bytes(4, "little"))
        if token == placeholder and pixels:
            chain.update(next(media))
        if (index + 1) % BLOCK == 0:
            marks.append(chain.digest())
    return marks


class Batcher:
    """Runs requests of one model together.

    most: requests that read or write at a time; the others wait in order. prefix_mb: memory for latents of prompts
    that may come again; 0 keeps none. Methods may be called from any thread.
    """

    def __init__(self, kimi: "Kimi", most: int = 32, prefix_mb: int = 256) -> None:
        if not 1 <= most <= MOST:
            raise ValueError(f"a batch holds 1 to {MOST} requests at a time, got {most}")
        if prefix_mb < 0:
            raise ValueError(f"prefix_mb must not be negative, got {prefix_mb}")
        self.kimi, self.most = kimi, most
        self.prefixes = PrefixStore(prefix_mb * 2**20)
        self.steps = 0
        self._waiting: deque[Request] = deque()
        self._active: list[Request] = []  # request n has slot n of the cache
        self._next: list[int | None] = []  # the token that each has just written; None: it still reads
        self._cache: LatentCache | None = None
        self._lock = threading.Lock()  # of what is submitted
        self._turn = threading.Lock()  # of a step
        self._wake = threading.Condition(self._lock)
        self._thread: threading.Thread | None = None
        self._closed = False

    # ---- what people call

    def submit(
        self, prompt: "Prompt", sampling: Sampling | None = None, first_call: int = 0, tools: Any = None
    ) -> Request:
        """Queue a prompt. Raises ValueError when it cannot fit into the model's context."""
        limit = self.kimi.config.text.max_position_embeddings
        if len(prompt) >= limit:
            raise ValueError(f"the prompt has {len(prompt):,} tokens and the context of this model is {limit:,}")
        request = Request(self.kimi, prompt, sampling or Sampling(), first_call, tools)
        with self._wake:
            if self._closed:
                raise ValueError("this batcher is closed; make a new one")
            self._waiting.append(request)
            self._wake.notify()
        return request

    def position(self, request: Request) -> int:
        """How many requests wait before this one; 0 when it is next or runs."""
        with self._lock:
            return self._waiting.index(request) if request in self._waiting else 0

    def run(self, prompts: Sequence["Prompt"], sampling: Sampling | None = None) -> list[Reply]:
        """Replies to all prompts, in their order. Without a thread of its own it drives itself."""
        requests = [self.submit(prompt, sampling) for prompt in prompts]
        if self._thread is None:
            while any(request.reply is None for request in requests) and self.step():
                pass
        return [request.wait() for request in requests]

    def __enter__(self) -> "Batcher":
        self._thread = threading.Thread(target=self._drive, name="batcher", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End everything: what runs is halted, what waits is refused, the thread ends."""
        with self._wake:
            self._closed = True
            refused = list(self._waiting)
            self._waiting.clear()
            for request in [*self._active, *refused]:
                request.cancel()
            self._wake.notify()
        for request in refused:
            request._give(request._reader.finish(halted=True))
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        while self.step():
            pass

    def _drive(self) -> None:
        while True:
            with self._wake:
                while not self._waiting and not self._active and not self._closed:
                    self._wake.wait()
                if self._closed and not self._active:
                    return
            self.step()

    # ---- one step

    @torch.inference_mode()
    def step(self) -> bool:
        """The next token of every request that writes, some more of the prompts being read. False: nothing to do."""
        with self._turn:
            self._leave([n for n, request in enumerate(self._active) if request._cancelled.is_set()], halted=True)
            self._join()
            if not self._active:
                return False
            self.steps += 1
            stepper = self.kimi.language_model.stepper()
            try:
                answers = self._by_kernel(stepper) if stepper else self._plainly()
                self._answer(answers)
            except BaseException as error:  # whoever waits must hear of it
                for request in self._active:
                    request._events.put(error)
                self._active, self._next = [], []
                raise
            return True

    def _join(self) -> None:
        """Take requests from the queue while there is room, and start them from what is known of their prompt."""
        while len(self._active) < self.most:
            with self._lock:
                if not self._waiting:
                    return
                request = self._waiting.popleft()
            if request._cancelled.is_set():
                request._give(request._reader.finish(halted=True))
                continue
            try:
                self._start(request)
            except (ValueError, RuntimeError) as error:  # of this request alone: media that the tower refuses, memory
                request._events.put(error)

    def _start(self, request: Request) -> None:
        lm, prompt = self.kimi.language_model, request.prompt
        if self.prefixes.limit:
            request._pixels = pixel_digests(prompt)
        # the last token is always read: its logits are the answer
        blocks, pieces = self.prefixes.longest(self._marks(request, len(prompt) - 1))
        start = blocks * BLOCK
        request._waiting = embed_rest(self.kimi, prompt, start)
        room = min(
            len(prompt) + min(request.sampling.max_new_tokens, 256), self.kimi.config.text.max_position_embeddings
        )
        if self._cache is None:
            self._cache = lm.new_cache(1, room)
        slot = len(self._active)
        self._cache.reserve(room)
        if slot == len(self._cache.lengths):
            self._cache.widen(min(self.most, 2 * slot))
        for index, piece in enumerate(pieces):
            for layer, part in zip(self._cache.layers, piece.layers, strict=True):
                layer[slot, index * BLOCK : (index + 1) * BLOCK] = part
        self._cache.lengths[slot] = request.cached_tokens = start
        self._active.append(request)
        self._next.append(None)

    def _marks(self, request: Request, tokens: int) -> list[bytes]:
        """Marks of the whole blocks among the first `tokens` of a request's prompt and reply."""
        if not self.prefixes.limit:
            return []
        ids = [*request.prompt.ids.tolist(), *request._reader.ids][:tokens]
        return block_marks(ids, self.kimi.config.media_placeholder_token_id, request._pixels)

    def _by_kernel(self, stepper: Stepper) -> dict[int, Tensor]:
        """One call of the kernel: a row for each that writes, the rest for those that read, the earliest first."""
        lm, cache = self.kimi.language_model, self._cache
        assert cache is not None
        lengths = cache.lengths
        writing = [n for n, token in enumerate(self._next) if token is not None]
        cache.reserve(max((lengths[n] for n in writing), default=0) + 1)
        room = MOST - len(writing)
        whole: list[tuple[int, int]] = []  # slot and rows of prompts that this call finishes, then of those it does not
        part: list[tuple[int, int]] = []
        answers: dict[int, Tensor] = {}
        for n, request in enumerate(self._active):
            left = request._waiting
            if left is None:
                continue
            if lengths[n] == request.cached_tokens and not stepper.reads(len(left)):
                answers[n] = self._read(n)  # many rows: torch's products
                continue
            rows = min(len(left), room)
            room -= rows
            if rows:
                (whole if rows == len(left) else part).append((n, rows))
        if not writing and not whole and not part:
            return answers
        ids = torch.tensor([self._next[n] for n in writing], dtype=torch.int64)
        pieces, slots, places = [lm.embed(ids)], list(writing), [lengths[n] for n in writing]
        # rows that are answered come first: of each finished prompt its last one
        ends = [(n, rows, rows - 1) for n, rows in whole]
        for n, rows, row in [*ends, *((n, rows, None) for n, rows in (*whole, *part))]:
            left = self._active[n]._waiting
            assert left is not None
            chosen = slice(row, row + 1) if row is not None else slice(0, rows - 1 if (n, rows) in whole else rows)
            pieces.append(left[chosen])
            slots += [n] * len(left[chosen])
            places += range(lengths[n] + chosen.start, lengths[n] + chosen.stop)
        answered = len(writing) + len(whole)
        if answered:
            logits = stepper.rows(torch.cat(pieces), cache, slots, places, answered)
            answers |= dict(zip([*writing, *(n for n, _ in whole)], logits, strict=True))
        else:
            stepper.rows(torch.cat(pieces), cache, slots, places, 0)
        for n in writing:
            lengths[n] += 1
        for n, rows in (*whole, *part):
            lengths[n] += rows
            request = self._active[n]
            assert request._waiting is not None
            request._waiting = request._waiting[rows:] if rows < len(request._waiting) else None
        return answers

    def _plainly(self) -> dict[int, Tensor]:
        """Layer by layer: a prompt is read whole, then all that write go on together."""
        lm, cache = self.kimi.language_model, self._cache
        assert cache is not None
        reading = [n for n, request in enumerate(self._active) if request._waiting is not None]
        if reading:
            return {n: self._read(n) for n in reading}
        count = len(self._active)
        view = cache.first(count)
        tokens = torch.tensor(self._next, device=self.kimi.device)
        logits = lm.step(lm.embed(tokens), view)
        cache.take(view)
        return dict(enumerate(logits))

    def _read(self, n: int) -> Tensor:
        """The rest of a prompt at once; logits of the next token, (vocab)."""
        cache, request = self._cache, self._active[n]
        assert cache is not None and request._waiting is not None
        own = cache.row(n)
        logits = read(self.kimi, request._waiting, own)
        cache.lengths[n] = own.lengths[0]
        request._waiting = None
        return logits

    def _answer(self, answers: dict[int, Tensor]) -> None:
        """Choose the next token of each, pass it on, and let go those that have ended."""
        limit = self.kimi.config.text.max_position_embeddings
        assert self._cache is not None
        done = []
        for n, row in answers.items():
            request = self._active[n]
            if self._next[n] is None:  # its prompt has just been read
                self.prefixes.keep(self._marks(request, len(request.prompt)), self._cache, n)
            forced = request._budget.force()
            token = sample(row.cpu(), request.sampling, request._draw) if forced is None else forced
            request._budget.count(token)
            self._next[n] = token
            request._give(request._reader.feed(token))
            written = len(request._reader.ids)
            full = written >= request.sampling.max_new_tokens or len(request.prompt) + written >= limit
            if request._reader.ended or request._reader.stopped or full:
                done.append(n)
        self._leave(done)

    def _leave(self, slots: Sequence[int], halted: bool = False) -> None:
        """Take requests out; the last ones move into their slots."""
        for n in sorted(slots, reverse=True):
            request, last = self._active[n], len(self._active) - 1
            assert self._cache is not None
            if request._waiting is None:  # the next turn of a conversation begins with this one
                self.prefixes.keep(self._marks(request, self._cache.lengths[n]), self._cache, n)
            request._give(request._reader.finish(halted))
            if n != last:
                self._cache.move(last, n)
                self._active[n], self._next[n] = self._active[last], self._next[last]
            self._active.pop()
            self._next.pop()


def embed_rest(kimi: "Kimi", prompt: "Prompt", start: int) -> Tensor:
    """Embeddings of a prompt from token `start` on, (tokens, dim); media wholly before it are not encoded again."""
    from fusion.model import splice
    from moonvit.packing import pack

    ids = prompt.ids[start:].to(kimi.device)
    if prompt.media is None:
        return kimi.embed(ids)
    slots = prompt.ids == kimi.config.media_placeholder_token_id
    skip = int(slots[:start].sum())  # vision tokens before
    kept, tokens = [], []
    for item in prompt.media.split():
        count = item.tokens[0]
        if skip < count:
            kept.append(item)
            tokens.append(count)
        else:
            skip -= count
    embeddings = kimi.language_model.embed(ids)
    if not kept:
        return embeddings
    vision = kimi.see(pack(kept).to(kimi.device))[skip:]
    tokens[0] -= skip
    return splice(embeddings, slots[start:].to(kimi.device), vision, tokens)
