"""What the model saw: the pictures as it gets them, the tokens, where a token looked, and which experts worked.

    messages, reply -> ids   [user] [media] x x x x [end] How many? [assistant] <think> ... </think> 3 [end]
                              |            | | | |        |                                          |
    Look.tokens               control      media          text                                       answer
    Look.items                             2 x 2 squares of one picture, with its pixels
    Look.attention(p)         what share of token p's attention went to each square; the rest went to other tokens
    Look.experts              per layer: what share of its choices each expert got

    from fusion import Kimi
    from fusion.look import look, draw_heat
    kimi = Kimi.from_pretrained("nano")
    seen = look(kimi, messages, reply.ids)
    draw_heat(seen.items[0], seen.attention(len(seen.tokens) - 2)[0]).save("heat.png")

The conversation is read once, like a prompt. Attention is kept for no token: a token that is asked about is read once
more against the cache of those before it, so a long conversation costs its cache and never tokens x tokens numbers.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fusion.drawing import draw_experts as draw_experts
from fusion.drawing import draw_heat as draw_heat
from fusion.drawing import draw_items as draw_items
from fusion.drawing import draw_patches as draw_patches
from fusion.prompt import Prompt
from lm.cache import LatentCache
from lm.taps import Taps
from moonvit.config import MediaConfig
from moonvit.packing import PackedPatches
from moonvit.video import timestamp_text

if TYPE_CHECKING:
    from fusion.model import Kimi
    from lm.tokenizer import Tokenizer

Kind = Literal["control", "media", "text", "thinking", "answer"]
_CHUNK = 1024  # tokens read at a time: memory beyond the cache is that of one chunk


@dataclass(frozen=True)
class SeenItem:
    """One image, or one chunk of up to four frames of a clip, as the model gets it. Sizes are (width, height)."""

    kind: Literal["image", "video"]
    size: tuple[int, int]  # of the file
    resized: tuple[int, int]  # before padding
    padding: tuple[int, int]  # black pixels added right and below
    grid: tuple[int, int]  # rows and columns of patches
    merge: int  # merge x merge patches become one token
    tokens: int
    start: int  # place of its first token in the conversation
    frames: tuple[Image.Image, ...] = field(repr=False)  # resized and padded
    timestamp: float | None = None  # seconds, of a chunk's first frame
    stamp: str | None = None  # the same as the prompt spells it

    @property
    def cells(self) -> tuple[int, int]:
        """Rows and columns of tokens: one token sees merge x merge patches, of all frames."""
        return self.grid[0] // self.merge, self.grid[1] // self.merge


@dataclass(frozen=True)
class SeenToken:
    """One token. `text` can be printed on one line and is never empty; `raw` is what it stands for.

    text: a line end is ↵ and a tab ⇥; a token of spaces only is ␣ for each. Bytes of a character that is spread over
    several tokens are ‹E2 9C›, with the character in `whole`; what no font shows is ‹U+200B›.
    kind: "control" (only the template or the model itself can make it), "media" (a place that holds a picture),
    "thinking", "answer" (of the reply), and "text" for everything else.
    """

    id: int
    text: str
    kind: Kind
    item: int | None = None  # index into Look.items
    cell: tuple[int, int] | None = None  # row and column in that item
    whole: str | None = None  # the character that this token holds a part of
    raw: bytes = b""


@dataclass(eq=False)
class Look:
    """Made by `look`. Positions count tokens from 0, prompt first, then the reply.

    chosen: int32 (MoE layers, tokens, chosen), the experts of every token. expert_layers: the model's layer that each
    of those rows belongs to. Safe to ask from several threads.
    """

    items: tuple[SeenItem, ...]
    tokens: tuple[SeenToken, ...] = field(repr=False)
    prompt_tokens: int
    layers: int
    heads: int
    num_experts: int
    expert_layers: tuple[int, ...]
    chosen: NDArray[np.int32] = field(repr=False)
    _kimi: "Kimi" = field(repr=False)
    _embeddings: Tensor = field(repr=False)
    _cache: LatentCache = field(repr=False)
    _last: tuple[int, NDArray[np.float32]] | None = field(default=None, repr=False)

    # ---- experts ----

    @property
    def experts(self) -> list[NDArray[np.float64]]:
        """Per MoE layer (experts,): the share of all choices that each expert got. Empty for a model without MoE."""
        return self.load()

    def load(self, start: int = 0, end: int | None = None) -> list[NDArray[np.float64]]:
        """`experts`, of the tokens from `start` up to `end` only: load(0, look.prompt_tokens) is the prompt's."""
        picked = self.chosen[:, start:end]
        if len(picked) and not picked.shape[1]:
            raise ValueError(f"no tokens from {start} to {end}: the conversation has {len(self.tokens)}")
        counts = [np.bincount(layer.ravel(), minlength=self.num_experts) for layer in picked]
        return [count / count.sum() for count in counts]

    # ---- attention ----

    def shares(self, position: int, layer: int | None = None, head: int | None = None) -> NDArray[np.float64]:
        """How the token at `position` divides its attention over all tokens: (tokens,), sums to 1.

        layer, head: None is the mean over all of them. A token sees itself and what came before, so later places are
        0. The step that *wrote* token p is the reading of token p - 1: ask for that one to learn where the model
        looked for its next word. In bfloat16 the numbers may differ in the last digit from those of the first reading.
        """
        for name, value, count in (
            ("position", position, len(self.tokens)),
            ("layer", layer, self.layers),
            ("head", head, self.heads),
        ):
            if value is not None and not 0 <= value < count:
                raise ValueError(f"{name} must lie in 0..{count - 1}, got {value}")
        rows = self._rows(int(position))
        rows = rows if layer is None else rows[layer : layer + 1]
        rows = rows if head is None else rows[:, head : head + 1]
        out = np.zeros(len(self.tokens))
        out[: position + 1] = rows.mean((0, 1), dtype=np.float64)
        return out

    def attention(self, position: int, layer: int | None = None, head: int | None = None) -> list[NDArray[np.float64]]:
        """`shares` of each item's tokens, (rows, columns) each: what the token's attention to each square was.

        Everything that is not here went to text and control tokens; see `attention_to_text`.
        """
        shares = self.shares(position, layer, head)
        return [shares[item.start : item.start + item.tokens].reshape(item.cells) for item in self.items]

    def attention_to_text(
        self, position: int, layer: int | None = None, head: int | None = None
    ) -> NDArray[np.float64]:
        """`shares` of all tokens that hold no picture, control tokens included; 0 at the pictures: (tokens,)."""
        shares = self.shares(position, layer, head)
        shares[[token.kind == "media" for token in self.tokens]] = 0
        return shares

    def attention_by_kind(self, position: int, layer: int | None = None, head: int | None = None) -> dict[str, float]:
        """`shares` summed over each kind of token; all five kinds, sums to 1."""
        sums: dict[str, float] = dict.fromkeys(("control", "media", "text", "thinking", "answer"), 0.0)
        for token, share in zip(self.tokens, self.shares(position, layer, head), strict=True):
            sums[token.kind] += float(share)
        return sums

    def _rows(self, position: int) -> NDArray[np.float32]:
        """(layers, heads, keys) of one token, by reading it again."""
        last = self._last
        if last is not None and last[0] == position:
            return last[1]
        before = self._cache.row(0)
        before.lengths = [position]
        taps = Taps(want_shares=True)
        with torch.inference_mode():
            # a copy: the step writes its own keys, and others may be asking at the same time
            self._kimi.language_model(self._embeddings[position : position + 1], cache=before.select([0]), taps=taps)
        rows = torch.stack([shares for (shares,) in taps.shares]).cpu().numpy()
        self._last = (position, rows)
        return rows


def look(
    kimi: "Kimi",
    messages: Sequence[dict[str, Any]],
    reply_ids: Sequence[int] = (),
    *,
    tools: Sequence[dict[str, Any]] | None = None,
    thinking: bool = True,
    **options: Any,
) -> Look:
    """Read a conversation and the reply to it, and keep what there is to see.

    messages, tools, thinking and options (preserve_thinking, max_frames, profile) are those of `Kimi.prepare` and must
    be what the reply was made with. reply_ids: `Reply.ids`. Raises ValueError as `Kimi.prepare` does, and for a
    conversation that is longer than the model's context.
    """
    return look_at(kimi, kimi.prepare(messages, tools=tools, thinking=thinking, **options), reply_ids)


@torch.inference_mode()
def look_at(kimi: "Kimi", prompt: Prompt, reply_ids: Sequence[int] = ()) -> Look:
    """The same for a prompt that is already made."""
    if kimi.tokenizer is None:
        raise ValueError("this model was loaded without a tokenizer (no tiktoken.model in its folder)")
    text, total = kimi.config.text, len(prompt) + len(reply_ids)
    if total > text.max_position_embeddings:
        raise ValueError(
            f"prompt and reply have {len(prompt):,} + {len(reply_ids):,} tokens and the context of this model is "
            f"{text.max_position_embeddings:,}"
        )
    items = items_of(kimi, prompt)
    model = kimi.language_model
    embeddings = kimi.embed(prompt.ids.to(kimi.device), prompt.media.to(kimi.device) if prompt.media else None)
    if len(reply_ids):
        reply = model.embed(torch.tensor(list(reply_ids), device=kimi.device))
        embeddings = torch.cat([embeddings, reply.to(embeddings.dtype)])
    cache = model.new_cache(1, total)
    chosen = []
    for part in embeddings.split(_CHUNK):
        taps = Taps()
        model(part, cache=cache, taps=taps)
        chosen.append(np.stack([routing.chosen.cpu().numpy() for routing in taps.routing]) if taps.routing else None)
    layers = range(text.num_hidden_layers)
    found = [part for part in chosen if part is not None]
    return Look(
        items,
        _tokens(kimi.tokenizer, prompt, list(reply_ids), items),
        len(prompt),
        text.num_hidden_layers,
        text.num_attention_heads,
        text.n_routed_experts,
        tuple(layer for layer in layers if text.is_moe(layer)),
        np.concatenate(found, 1).astype(np.int32) if found else np.zeros((0, total, 0), np.int32),
        kimi,
        embeddings,
        cache,
    )


# ---- pictures --------------------------------------------------------------------------------------------------------


def items_of(kimi: "Kimi", prompt: Prompt) -> tuple[SeenItem, ...]:
    """The pictures and chunks of a prompt, with the pixels that the tower gets. No model runs."""
    if prompt.media is None:
        return ()
    if len(prompt.items) != len(prompt.media):
        raise ValueError(
            f"the prompt holds {len(prompt.media)} pictures but describes {len(prompt.items)}; "
            "make it with Kimi.prepare, which keeps their sizes"
        )
    rules = kimi.config.media
    places = (prompt.ids == kimi.config.media_placeholder_token_id).nonzero().flatten().tolist()
    seen, done = [], 0
    for item, patches in zip(prompt.items, prompt.media.split(), strict=True):
        _, rows, columns = patches.grid_thw[0].tolist()
        plan = item.plan
        seen.append(
            SeenItem(
                "image" if item.kind == "image" else "video",
                item.size,
                (plan.width, plan.height),
                (plan.pad_right, plan.pad_bottom),
                (rows, columns),
                plan.merge,
                item.tokens,
                places[done],
                _frames(patches, rules),
                item.timestamp,
                None if item.timestamp is None else timestamp_text(item.timestamp, rules.timestamp_mode),
            )
        )
        done += item.tokens
    return tuple(seen)


def _frames(patches: PackedPatches, rules: MediaConfig) -> tuple[Image.Image, ...]:
    """Normalised patches back to pixels: the inverse of moonvit.image.cut_patches, to the last bit."""
    t, rows, columns = patches.grid_thw[0].tolist()
    mean, std = (torch.tensor(values)[:, None, None] for values in (rules.image_mean, rules.image_std))
    pixels = ((patches.pixels * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    size = pixels.shape[-1]
    pixels = pixels.view(t, rows, columns, 3, size, size).permute(0, 1, 4, 2, 5, 3)  # (t, rows, size, columns, size, 3)
    return tuple(Image.fromarray(f) for f in pixels.reshape(t, rows * size, columns * size, 3).numpy())


# ---- words -----------------------------------------------------------------------------------------------------------


def _tokens(
    tokenizer: "Tokenizer", prompt: Prompt, reply: list[int], items: Sequence[SeenItem]
) -> tuple[SeenToken, ...]:
    ids = prompt.ids.tolist() + reply
    of_item: dict[int, tuple[int, tuple[int, int]]] = {}
    for index, item in enumerate(items):
        for place in range(item.tokens):
            of_item[item.start + place] = (index, divmod(place, item.cells[1]))
    raws = [tokenizer.decode_bytes([token]) for token in ids]
    words: dict[int, tuple[str, str | None]] = {}
    run: list[int] = []
    for position, token in enumerate(ids):
        if not tokenizer.is_special(token):
            run.append(position)
        elif run:
            words |= zip(run, spell([raws[p] for p in run]), strict=True)
            run = []
    words |= zip(run, spell([raws[p] for p in run]), strict=True)

    opens, closes = tokenizer.special.get("<think>"), tokenizer.special.get("</think>")
    # a turn's end, and a tool call, end a thought that was left open
    ends = {closes, *(tokenizer.special.get(name) for name in ("<|im_end|>", "<|tool_calls_section_begin|>"))}
    thinking = False
    seen = []
    for position, token in enumerate(ids):
        if position in of_item:
            index, cell = of_item[position]
            seen.append(SeenToken(token, raws[position].decode(), "media", index, cell, raw=raws[position]))
        elif position not in words:
            thinking = token == opens or (thinking and token not in ends)
            seen.append(SeenToken(token, raws[position].decode(), "control", raw=raws[position]))
        else:
            kind: Kind = "thinking" if thinking else "answer" if position >= len(prompt) else "text"
            shown, whole = words[position]
            seen.append(SeenToken(token, shown, kind, whole=whole, raw=raws[position]))
    return tuple(seen)


def spell(raws: Sequence[bytes]) -> list[tuple[str, str | None]]:
    """Tokens that follow each other, as text to print, each with the character that it shares with a neighbour."""
    # surrogateescape gives every byte that is no UTF-8 a character of its own
    characters = b"".join(raws).decode("utf-8", "surrogateescape")
    widths = [1 if "\ud800" <= c <= "\udfff" else len(c.encode()) for c in characters]
    shown: list[tuple[str, str | None]] = []
    at, number, begun = 0, 0, 0  # where this token starts; which character is next, and where that one starts
    for raw in raws:
        end, parts, whole = at + len(raw), [], None
        hexes = b""
        while begun < end:
            after = begun + widths[number]
            if begun >= at and after <= end and not "\ud800" <= characters[number] <= "\udfff":
                parts += [_hex(hexes), _visible(characters[number])]
                hexes = b""
            else:
                hexes += raw[max(begun - at, 0) : after - at]
                if not "\ud800" <= characters[number] <= "\udfff":
                    whole = characters[number]
            if after > end:
                break
            begun, number = after, number + 1
        text = "".join([*parts, _hex(hexes)])
        shown.append((text if text.strip(" ") else "␣" * len(text), whole))
        at = end
    return shown


def _hex(raw: bytes) -> str:
    return f"‹{raw.hex(' ').upper()}›" if raw else ""


def _visible(character: str) -> str:
    if character in "\n\t":
        return {"\n": "↵", "\t": "⇥"}[character]
    if not character.isprintable():
        return f"‹U+{ord(character):04X}›"
    # an accent without its letter would sit on whatever stands before it
    return "\N{DOTTED CIRCLE}" + character if unicodedata.combining(character) else character
