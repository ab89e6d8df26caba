"""START HERE: a question about a picture becomes words.

    python -m fusion.generate --help        (the same as `moonkit ask`)

    messages -- prompt.py --> Prompt -- prefill --> cache of latents -- decode, token by token --> parse.py --> Reply

The path of one image: moonvit/image.py, moonvit/packing.py, moonvit/encoder.py, fusion/projector.py, fusion/model.py,
lm/model.py, lm/attention.py, lm/moe.py, and back here.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import tyro
from torch import Tensor

from fusion.parse import ReplyParser, ToolCall, overlap
from lm.cache import LatentCache

if TYPE_CHECKING:
    from rich.console import Console

    from fusion.checkpoint import Progress
    from fusion.model import Kimi
    from fusion.prompt import Prompt
    from lm.tokenizer import Tokenizer


@dataclass(frozen=True)
class Sampling:
    """How to pick tokens and when to stop. temperature 0 is greedy; top_p 1 and top_k 0 switch those filters off."""

    max_new_tokens: int = 1024
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()  # strings in the visible text that end the reply and are cut off
    thinking_budget: int | None = None  # thinking tokens after which </think> is forced

    def __post_init__(self) -> None:
        whole = ("max_new_tokens", "top_k", "seed", "thinking_budget")
        for name in ("temperature", "top_p", *whole):
            value = getattr(self, name)
            if value is None and name == "thinking_budget":
                continue
            if isinstance(value, bool) or not isinstance(value, int if name in whole else int | float):
                raise ValueError(f"{name} must be {'an integer' if name in whole else 'a number'}, got {value!r}")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed must fit in 64 bits, got {self.seed}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not self.temperature >= 0 or self.temperature == float("inf"):
            raise ValueError(f"temperature must be zero (greedy) or a positive number, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be zero (off) or positive, got {self.top_k}")
        if self.thinking_budget is not None and self.thinking_budget < 0:
            raise ValueError(f"thinking_budget must not be negative, got {self.thinking_budget}")
        if isinstance(self.stop, str) or any(not isinstance(s, str) or not s for s in self.stop):
            raise ValueError(f"stop must be a list of non-empty strings, got {self.stop!r}")


@dataclass(frozen=True)
class Usage:
    """Tokens read and written. `media_tokens` are part of the prompt's, `thinking_tokens` of the completion's."""

    prompt_tokens: int
    completion_tokens: int
    media_tokens: int = 0
    thinking_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Reply:
    """A finished answer.

    finish_reason: "stop", "length" (max_new_tokens or the context ran out), "tool_calls", or "halted" by the caller.
    """

    text: str
    thinking: str
    tool_calls: tuple[ToolCall, ...]
    usage: Usage
    finish_reason: Literal["stop", "length", "tool_calls", "halted"]
    ids: tuple[int, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class StreamEvent:
    """A piece of a reply. `delta` is the new text of kinds "thinking" and "text"; "end" carries the whole reply."""

    kind: Literal["thinking", "text", "tool_call", "end"]
    delta: str = ""
    tool_call: ToolCall | None = None
    reply: Reply | None = None


# ---- tokens ----------------------------------------------------------------------------------------------------------


def prefill(kimi: "Kimi", prompt: "Prompt", cache: LatentCache, chunk: int = 2048) -> Tensor:
    """Read the prompt into a cache of one sequence, `chunk` tokens at a time; logits of the next token, (vocab,).

    Memory beyond the cache is that of one chunk, however long the prompt.
    """
    media = prompt.media.to(kimi.device) if prompt.media else None
    return read(kimi, kimi.embed(prompt.ids.to(kimi.device), media), cache, chunk)


def read(kimi: "Kimi", x: Tensor, cache: LatentCache, chunk: int = 2048) -> Tensor:
    """Embedded tokens (tokens, dim) behind the one sequence of a cache; logits of the next token, (vocab,)."""
    stepper = kimi.language_model.stepper()
    if stepper is not None and stepper.reads(len(x)):
        return stepper.read(x, cache)
    for part in x.split(chunk):
        hidden = kimi.language_model(part, cache=cache)
    return kimi.language_model.logits(hidden[-1:])[0]


def decode(kimi: "Kimi", last: Sequence[int], cache: LatentCache) -> Tensor:
    """One step for every sequence of the cache: logits (sequences, vocab) after its last token."""
    x = kimi.language_model.embed(torch.tensor(last, device=kimi.device))
    return kimi.language_model.step(x, cache)


def generate(
    kimi: "Kimi",
    prompts: Sequence["Prompt"],
    sampling: Sampling,
    finished: set[int] | None = None,
    seeds: Sequence[int] | None = None,
) -> Iterator[dict[int, int]]:
    """Continue several prompts of any lengths side by side; yields {prompt index: next token} per step.

    A prompt leaves after its stop token (which is yielded), after max_new_tokens, at the end of the context, or when
    the caller adds its index to `finished`. Each prompt draws from its own generator, seeded alike or by `seeds`: in a
    batch it gives what it gives alone.
    """
    limit = kimi.config.text.max_position_embeddings
    for prompt in prompts:
        if len(prompt) >= limit:
            raise ValueError(
                f"the prompt has {len(prompt):,} tokens and the context of this model is {limit:,}; "
                "shorten the text, lower the frame rate or use smaller images"
            )
    finished = set() if finished is None else finished
    seeds = [sampling.seed] * len(prompts) if seeds is None else seeds
    draws = [torch.Generator().manual_seed(seed) for seed in seeds]
    budgets = [ThinkingBudget(kimi, prompt, sampling.thinking_budget) for prompt in prompts]
    assert len(draws) == len(prompts), "one seed for each prompt"
    ends = stop_ids(kimi)

    with torch.inference_mode():
        longest = max(len(prompt) for prompt in prompts)
        room = min(longest + min(sampling.max_new_tokens, 256), limit)
        cache = kimi.language_model.new_cache(len(prompts), room)
        logits = torch.stack([prefill(kimi, prompt, cache.row(i)) for i, prompt in enumerate(prompts)])
        cache.lengths = [len(prompt) for prompt in prompts]

    active = list(range(len(prompts)))
    for step in range(1, sampling.max_new_tokens + 1):
        rows = logits.cpu()
        chosen = {}
        for i, row in zip(active, rows, strict=True):
            forced = budgets[i].force()
            chosen[i] = sample(row, sampling, draws[i]) if forced is None else forced
            budgets[i].count(chosen[i])
        yield chosen
        finished |= {i for i, token in chosen.items() if token in ends}
        finished |= {i for i in active if len(prompts[i]) + step >= limit}
        keep = [row for row, i in enumerate(active) if i not in finished]
        if not keep or step == sampling.max_new_tokens:
            return
        with torch.inference_mode():
            if len(keep) < len(active):
                cache, active = cache.select(keep), [active[row] for row in keep]
            logits = decode(kimi, [chosen[i] for i in active], cache)


def sample(logits: Tensor, sampling: Sampling, draw: torch.Generator) -> int:
    """One token from float32 logits (vocab,): temperature, then top-k, then top-p."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    logits, ids = (logits / sampling.temperature).sort(descending=True, stable=True)
    if sampling.top_k:
        logits, ids = logits[: sampling.top_k], ids[: sampling.top_k]
    shares = logits.softmax(-1)
    if sampling.top_p < 1:
        # the smallest set whose mass reaches top_p: a token stays while the mass before it is below
        keep = max(int(((shares.cumsum(-1) - shares) < sampling.top_p).sum()), 1)
        shares, ids = shares[:keep], ids[:keep]
    return int(ids[torch.multinomial(shares, 1, generator=draw)])


def stop_ids(kimi: "Kimi") -> set[int]:
    """Tokens that end a turn: the config's, and both <|im_end|> and [EOS], since configs of the family name either."""
    ends = {kimi.config.eos_token_id}
    if kimi.tokenizer is not None:
        ends |= {kimi.tokenizer.special[name] for name in ("<|im_end|>", "[EOS]") if name in kimi.tokenizer.special}
    return ends


class ThinkingBudget:
    """Counts thinking tokens of one reply and, at the budget, asks for </think>."""

    def __init__(self, kimi: "Kimi", prompt: "Prompt", budget: int | None) -> None:
        special = kimi.tokenizer.special if kimi.tokenizer else {}
        self.open_id, self.close_id = special.get("<think>"), special.get("</think>")
        self.budget, self.thinking, self.used = budget, prompt.thinking, 0

    def force(self) -> int | None:
        spent = self.thinking and self.budget is not None and self.used >= self.budget
        return self.close_id if spent else None

    def count(self, token: int) -> None:
        if token == self.open_id:
            self.thinking = True
        elif token == self.close_id:
            self.thinking = False
        elif self.thinking:
            self.used += 1


# ---- words -----------------------------------------------------------------------------------------------------------


class ReplyReader:
    """Tokens of one prompt's continuation to events: parses, applies stop strings, counts."""

    def __init__(
        self, tokenizer: "Tokenizer", prompt: "Prompt", sampling: Sampling, ends: set[int], first_call: int, tools: Any
    ) -> None:
        self.parser = ReplyParser(tokenizer, thinking=prompt.thinking, first_index=first_call, tools=tools)
        self.prompt, self.sampling, self.ends = prompt, sampling, ends
        self.ids: list[int] = []
        self.ended = self.stopped = False
        self.text, self.thinking, self.held = "", "", ""
        self.calls: list[ToolCall] = []
        self.thinking_tokens = 0

    def feed(self, token: int) -> Iterator[StreamEvent]:
        self.ids.append(token)
        if token in self.ends:
            self.ended = True
            return
        before = self.parser.in_thinking
        events = self.parser.feed([token])
        self.thinking_tokens += before and self.parser.in_thinking
        yield from self._pass_on(events)

    def finish(self, halted: bool = False) -> Iterator[StreamEvent]:
        if not self.stopped:
            yield from self._pass_on(self.parser.finish())
            if self.held:
                yield self._show(self.held)
        media = sum(item.tokens for item in self.prompt.items)
        usage = Usage(len(self.prompt), len(self.ids), media, self.thinking_tokens)
        reason: Literal["stop", "length", "tool_calls", "halted"] = "halted" if halted else "length"
        if self.ended or self.stopped:
            reason = "tool_calls" if self.calls else "stop"
        reply = Reply(self.text, self.thinking, tuple(self.calls), usage, reason, tuple(self.ids))
        yield StreamEvent("end", reply=reply)

    def _pass_on(self, events: Sequence[Any]) -> Iterator[StreamEvent]:
        for event in events:
            if self.stopped:
                return
            if event.kind == "text":
                yield from self._hold(event.delta)
            elif event.kind == "thinking":
                self.thinking += event.delta
                yield StreamEvent("thinking", event.delta)
            else:
                self.calls.append(event.tool_call)
                yield StreamEvent("tool_call", tool_call=event.tool_call)

    def _hold(self, delta: str) -> Iterator[StreamEvent]:
        """Pass text on, but keep back an end that may turn out to be the start of a stop string."""
        text = self.held + delta
        hits = [at for at in (text.find(stop) for stop in self.sampling.stop) if at >= 0]
        if hits:
            text, self.held, self.stopped = text[: min(hits)], "", True
        else:
            keep = max((overlap(text, stop) for stop in self.sampling.stop), default=0)
            text, self.held = text[: len(text) - keep], text[len(text) - keep :]
        if text:
            yield self._show(text)

    def _show(self, text: str) -> StreamEvent:
        self.text += text
        return StreamEvent("text", text)


def stream(
    kimi: "Kimi",
    prompt: "Prompt",
    sampling: Sampling,
    first_call: int = 0,
    tools: Any = None,
    turn: AbstractContextManager[Any] | None = None,
    halt: Callable[[], bool] | None = None,
) -> Iterator[StreamEvent]:
    """Events of one reply as they come; the last one has kind "end" and carries the Reply.

    turn: entered for each step (the prompt, then token by token), so that replies that share a machine can alternate.
    halt: asked before each step; when true, the reply ends with what it has.
    """
    assert kimi.tokenizer is not None, "prepare() refuses a model without a tokenizer"
    reader = ReplyReader(kimi.tokenizer, prompt, sampling, stop_ids(kimi), first_call, tools)
    steps = generate(kimi, [prompt], sampling)
    halted = False
    while not reader.stopped:
        with turn or nullcontext():
            # asked inside: whoever waited long for the turn may have been told to halt meanwhile
            halted = halt is not None and halt()
            tokens = None if halted else next(steps, None)
        if tokens is None:
            break
        yield from reader.feed(tokens[0])
    yield from reader.finish(halted)


def complete(kimi: "Kimi", prompts: Sequence["Prompt"], sampling: Sampling, tools: Any = None) -> list[Reply]:
    """Replies to several prompts, generated side by side."""
    assert kimi.tokenizer is not None, "prepare() refuses a model without a tokenizer"
    ends = stop_ids(kimi)
    readers = [ReplyReader(kimi.tokenizer, prompt, sampling, ends, 0, tools) for prompt in prompts]
    finished: set[int] = set()
    for tokens in generate(kimi, prompts, sampling, finished) if prompts else ():
        for index, token in tokens.items():
            for _ in readers[index].feed(token):
                pass
            if readers[index].stopped:
                finished.add(index)
    replies = [list(reader.finish())[-1].reply for reader in readers]
    return [reply for reply in replies if reply is not None]


# ---- moonkit ask -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ask:
    """Ask a model about images, clips, or nothing but the question. The answer streams; thinking is dimmed."""

    question: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="QUESTION")] = ()
    """What to ask. Left out: read from standard input."""
    model: str = "nano"
    """Folder or hub id of a checkpoint; "nano" is the small model in the box. "untrained:tiny" and "untrained:nano"
    have random weights: their answers mean nothing."""
    image: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction, tyro.conf.arg(aliases=["-i"], metavar="FILE")] = ()
    """An image; may be given several times."""
    video: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction, tyro.conf.arg(aliases=["-v"], metavar="FILE")] = ()
    """A clip; may be given several times."""
    system: str | None = None
    """System prompt."""
    thinking: bool = True
    """Let the model think first (K2.7-Code always does)."""
    thinking_budget: int | None = None
    """Thinking tokens after which the thought is closed."""
    max_new_tokens: int = 1024
    """Longest answer, thinking included."""
    temperature: float = 0.0
    """0 picks the likeliest token. Kimi's own setting: 1.0 when thinking, 0.6 when not."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that hold this share. Kimi's own setting: 0.95."""
    top_k: int = 0
    """Sample from this many likeliest tokens; 0: from all."""
    seed: int = 0
    """Seed of the sampling."""
    stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A string that ends the answer; may be given several times."""
    max_frames: int = 480
    """Refuse clips that sample to more frames."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the weights; auto: the checkpoint's."""
    device: str = "auto"
    """cpu, cuda, mps; auto: the first that is there."""
    dense: bool = False
    """Dequantise INT4 experts while loading instead of as they are used: faster, four times the memory."""
    json: bool = False
    """Print one JSON object when done instead of streaming."""


@contextmanager
def loading_bar(console: "Console", name: str) -> "Iterator[Progress]":
    """A progress bar on the console while weights come in; yields the callback for from_pretrained."""
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Bars(*columns, console=console, transient=True) as bars:
        task = bars.add_task(f"loading {name}", total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


def main() -> None:
    """The verb."""
    arguments = tyro.cli(Ask, prog="moonkit ask")
    question = " ".join(arguments.question)
    if not question and not sys.stdin.isatty():
        question = sys.stdin.read().strip()
    if not question:
        raise ValueError('no question: moonkit ask -i photo.png "What is this?"')
    from rich.console import Console

    from fusion.model import Kimi

    notes = Console(stderr=True)
    for path in (*arguments.image, *arguments.video):
        if not path.is_file():  # before a long load, not after
            raise FileNotFoundError(f"no such file: {path}")
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    started = time.perf_counter()
    with loading_bar(notes, arguments.model) as progress:
        kimi = Kimi.from_pretrained(
            arguments.model,
            dtype=None if arguments.dtype == "auto" else arguments.dtype,
            device=device,
            experts="dense" if arguments.dense else "packed",
            progress=progress,
        )
    loaded = time.perf_counter()
    if arguments.model.startswith("untrained:"):
        notes.print(f"[yellow]{arguments.model}: random weights, so the answer means nothing[/]")
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": path}} for path in arguments.image]
    parts += [{"type": "video_url", "video_url": {"url": path}} for path in arguments.video]
    messages: list[dict[str, Any]] = [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]
    if arguments.system:
        messages.insert(0, {"role": "system", "content": arguments.system})
    events = kimi.stream(
        messages,
        thinking=arguments.thinking,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        seed=arguments.seed,
        stop=arguments.stop,
        thinking_budget=arguments.thinking_budget,
        max_frames=arguments.max_frames,
    )
    reply, first = show(events, Console(highlight=False), quiet=arguments.json)
    usage = reply.usage
    if arguments.json:
        print(json.dumps(asdict(reply) | {"total_tokens": usage.total_tokens}, ensure_ascii=False))
        return
    seconds = time.perf_counter() - first
    rate = f", {(usage.completion_tokens - 1) / seconds:.1f} tokens/s" if usage.completion_tokens > 1 else ""
    notes.print(
        f"[dim]{usage.prompt_tokens} tokens read ({usage.media_tokens} of media), {usage.completion_tokens} written "
        f"({usage.thinking_tokens} of thinking); loaded in {loaded - started:.1f} s, first token after "
        f"{first - loaded:.1f} s{rate}; ended by {reply.finish_reason}[/]"
    )


def show(events: Iterator[StreamEvent], console: "Console", quiet: bool = False) -> tuple[Reply, float]:
    """Print a reply as it comes, thinking dimmed; the reply, and when its first piece came (perf_counter)."""
    first, before = 0.0, ""
    for event in events:
        first = first or time.perf_counter()
        if event.reply is not None:
            if before and not quiet:
                console.print()
            return event.reply, first
        if quiet:
            continue
        if before == "thinking" != event.kind:
            console.print("\n")
        before = event.kind
        if event.tool_call is not None:
            console.print(f"-> {event.tool_call.name}({event.tool_call.arguments})", style="cyan", markup=False)
        else:
            style = "dim" if event.kind == "thinking" else None
            console.print(event.delta, end="", style=style, markup=False, soft_wrap=True)
    raise AssertionError("the last event of a stream carries the reply")


if __name__ == "__main__":
    main()
