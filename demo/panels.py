"""The four panels of "What the model sees", as HTML, from what fusion/look.py found.

    Look -- grid_panel, tokens_panel, heat_panel, experts_panel --> a <section> each:
            title, one sentence, shapes, content, and the files that do it

Pictures are drawn by fusion/drawing.py; what is here are words and their places.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from demo.pieces import facts, notice, picture, thought, words

if TYPE_CHECKING:
    from fusion.generate import Reply
    from fusion.look import Look, SeenToken

MOST_PICTURES = 24  # of one conversation that are drawn
FOLD = 240  # text tokens in a row of which the middle is folded away
ENDS = 80  # tokens that stay before and after a fold
MOST_TOKENS = 3000  # of one fold that are sent to the page
NO_PICTURE = "There is no picture or clip in this conversation, so no square of one could be looked at."

KINDS = {
    "control": "control: only the chat template or the model itself can make it",
    "media": "picture: a place that holds one square of a picture",
    "text": "text: what was asked, and the template's words",
    "thinking": "thought: what the model wrote for itself",
    "answer": "answer: what the model said",
}
PANELS = {
    "grid": (
        "1. Pictures become patches, patches become tokens",
        "Each picture is made smaller if it is too large, padded to full squares, and cut into patches of 14 x 14 "
        "pixels; 2 x 2 patches together become one token, which stands in the text like a word.",
        ("moonvit/image.py", "moonvit/video.py", "moonvit/encoder.py", "fusion/projector.py"),
    ),
    "tokens": (
        "2. The conversation as the model reads it",
        "The chat template writes the conversation as one row of numbers; these are its tokens in order, with the "
        "reply at the end. Pick one: the next panel shows where the model looked for it.",
        ("fusion/template.py", "fusion/prompt.py", "lm/tokenizer.py", "fusion/parse.py"),
    ),
    "heat": (
        "3. Where it looked",
        "In every layer each head divides its attention, 100 % in all, over the tokens so far; bright squares of the "
        "picture got much of it. It shows what was read, and is no proof of what the answer rests on.",
        ("lm/attention.py", "lm/taps.py", "fusion/look.py"),
    ),
    "experts": (
        "4. Which experts worked",
        "In each of these layers a router sends every token to a few of many experts, small networks of their own; "
        "bright squares were chosen often. Training keeps the load even, so one row should show no single bright spot.",
        ("lm/moe.py", "lm/experts.py"),
    ),
}


def first_choice(found: "Look") -> int:
    """The token that is picked at first: the first of the answer, else the first that was written, else the last."""
    for kind in ("answer", "thinking"):
        for place in range(found.prompt_tokens, len(found.tokens)):
            if found.tokens[place].kind == kind:
                return place
    return min(found.prompt_tokens, len(found.tokens) - 1)


def reading_of(found: "Look", place: int) -> int:
    """The token whose reading is looked at: of a written token the one before it, from which it was written."""
    return place - 1 if place >= found.prompt_tokens else place


def panel(name: str, inside: str, shapes: Sequence[tuple[str, str]] = ()) -> str:
    """One panel: its title, one sentence about it, the shapes, the content, and the files that do it."""
    title, meaning, files = PANELS[name]
    where = ", ".join(f"<code>{escape(file)}</code>" for file in files)
    return (
        f'<section class="mk mk-card mk-panel" aria-label="{escape(title)}"><header><h3>{escape(title)}</h3>'
        f"<p>{escape(meaning)}</p>{facts(shapes) if shapes else ''}</header>{inside}"
        f'<p class="mk-where">Done by {where}</p></section>'
    )


def answer_card(
    which: str,
    thinking: str,
    text: str,
    reply: "Reply | None" = None,
    notes: Sequence[str] = (),
    writing: bool = True,
) -> str:
    """The answer with its thought, and what it took."""
    said = f"{reply.usage.thinking_tokens} tokens" if reply else ""
    inside = thought(thinking, said, key="answer", follow=reply is None and writing)
    inside += f'<div class="mk-answered">{words(text)}</div>' if text else ""
    if reply is None:
        state = "" if not writing else ": writing ..." if thinking or text else ": reading the question ..."
        foot = f'<small role="note">{escape(which + state)}</small>'
    else:
        shown = [
            ("Read", f"{reply.usage.prompt_tokens:,} tokens, {reply.usage.media_tokens:,} of them of pictures"),
            ("Wrote", f"{reply.usage.completion_tokens:,} tokens"),
        ]
        foot = f"<small>{escape(which)}</small>{facts(shown)}"
        if not text:
            inside += '<p class="mk-quiet">Nothing was said after the thought.</p>'
    remarks = "".join(f"<small>{escape(note)}</small><br>" for note in notes)
    return (
        f'<section class="mk mk-card mk-reply" aria-label="Answer">{inside}<footer>{remarks}{foot}</footer></section>'
    )


def grid_panel(found: "Look") -> str:
    """Every picture and chunk as the model gets it, with its squares."""
    from fusion.drawing import describe, draw_patches

    if not found.items:
        return panel("grid", notice("There is no picture or clip in this conversation; the model read text alone."))
    figures = "".join(
        f"<figure>{picture(draw_patches(item, words=False), describe(item))}"
        f"<figcaption>{escape(_name(found, index))}: {escape(describe(item))}</figcaption></figure>"
        for index, item in enumerate(found.items[:MOST_PICTURES])
    )
    more = len(found.items) - MOST_PICTURES
    left = f"<p>{more:,} more are not drawn.</p>" if more > 0 else ""
    total = sum(item.tokens for item in found.items)
    patches = sum(item.grid[0] * item.grid[1] * len(item.frames) for item in found.items)
    shapes = [
        ("items", f"{len(found.items):,}"),
        ("patches", f"({patches:,}, 3, 14, 14)"),
        ("tokens", f"{total:,}"),
    ]
    return panel("grid", f'<div class="mk-gridded">{figures}</div>{left}', shapes)


def _name(found: "Look", index: int) -> str:
    """What an item is called on this page: "Picture 2", "Clip, chunk 3"."""
    item = found.items[index]
    same = [each for each in found.items[: index + 1] if each.kind == item.kind]
    return f"Picture {len(same)}" if item.kind == "image" else f"Clip, chunk {len(same)}"


def tokens_panel(found: "Look", chosen: int) -> str:
    """All tokens in order, a block for each turn; runs of a picture's places as one, long text folded."""
    counts: dict[str, int] = {}
    for each in found.tokens:
        counts[each.kind] = counts.get(each.kind, 0) + 1
    legend = "".join(
        f'<li><i class="mk-token {kind}" aria-hidden="true"></i>{escape(meaning)} ({counts.get(kind, 0):,})</li>'
        for kind, meaning in KINDS.items()
        if counts.get(kind)
    )
    blocks = "".join(f'<div class="mk-turn">{_run(found, start, end, chosen)}</div>' for start, end in _turns(found))
    said = escape(_sentence(found, chosen))
    shapes = [
        ("tokens", f"({len(found.tokens):,})"),
        ("of the question", f"{found.prompt_tokens:,}"),
        ("of the reply", f"{len(found.tokens) - found.prompt_tokens:,}"),
    ]
    hint = "<p><small>Pick a token with a click, or with the arrow keys and Enter.</small></p>"
    body = (
        f'<ul class="mk-legend">{legend}</ul>{hint}'
        f'<div class="mk-tokens" role="group" aria-label="Tokens">{blocks}</div>'
        f'<p class="mk-said" aria-live="polite">{said}</p>'
    )
    return panel("tokens", body, shapes)


def _turns(found: "Look") -> list[tuple[int, int]]:
    """Where each turn begins and ends: at the control tokens that open one."""
    opens = [p for p, each in enumerate(found.tokens) if each.kind == "control" and each.text.startswith("<|im_")]
    starts = [p for p in opens if found.tokens[p].text in ("<|im_system|>", "<|im_user|>", "<|im_assistant|>")]
    starts = sorted({0, *starts})
    return list(zip(starts, [*starts[1:], len(found.tokens)], strict=True))


def _run(found: "Look", start: int, end: int, chosen: int) -> str:
    """The tokens of one turn."""
    parts, at = [], start
    while at < end:
        token = found.tokens[at]
        stop = at + 1
        if token.kind == "media":
            while stop < end and found.tokens[stop].kind == "media" and found.tokens[stop].item == token.item:
                stop += 1
            parts.append(_places(found, at, stop))
        else:
            while stop < end and found.tokens[stop].kind == token.kind:
                stop += 1
            parts.append(_words(found, at, stop, chosen))
        at = stop
    return "".join(parts)


def _words(found: "Look", start: int, end: int, chosen: int) -> str:
    """Tokens of one kind in a row. The middle of a long text folds, unless the picked token is in it."""
    if end - start <= FOLD or start <= chosen < end:
        return "".join(_button(found, place, chosen) for place in range(start, end))
    head, tail = start + ENDS, end - ENDS
    shown = min(tail, head + MOST_TOKENS)
    inside = "".join(_button(found, place, chosen) for place in range(head, shown))
    left = f" <small>and {tail - shown:,} more that are not sent to the page</small>" if shown < tail else ""
    return (
        "".join(_button(found, place, chosen) for place in range(start, head))
        + f'<details class="mk-fold"><summary>{tail - head:,} more tokens</summary>{inside}{left}</details>'
        + "".join(_button(found, place, chosen) for place in range(tail, end))
    )


def _button(found: "Look", place: int, chosen: int) -> str:
    token = found.tokens[place]
    picked = place == chosen
    line = "<br>" if b"\n" in token.raw and token.kind != "control" else ""
    return (
        f'<button type="button" class="mk-token {token.kind}" data-position="{place}" tabindex="{0 if picked else -1}" '
        f'aria-pressed="{"true" if picked else "false"}" data-say="{escape(_sentence(found, place))}" '
        f'title="id {token.id}">{escape(token.text)}</button>{line}'
    )


def _places(found: "Look", start: int, end: int) -> str:
    """The places of one picture, as one."""
    token = found.tokens[start]
    assert token.item is not None, "a picture's place knows its picture"
    rows, columns = found.items[token.item].cells
    name = _name(found, token.item)
    say = (
        f"{name}: {end - start:,} places in the row of tokens, all with the id {token.id}; they hold its {rows} rows x "
        f"{columns} columns of squares."
    )
    return (
        f'<button type="button" class="mk-token media" tabindex="-1" data-say="{escape(say)}" title="id {token.id}">'
        f"{escape(token.text)} x {end - start:,}</button>"
    )


def _sentence(found: "Look", place: int) -> str:
    """What a token is, in one line."""
    token: SeenToken = found.tokens[place]
    who = "written by the model" if place >= found.prompt_tokens else "read"
    part = f", a part of the character {token.whole}" if token.whole else ""
    return f"Token {place}: {token.text}, id {token.id}, {KINDS[token.kind].split(':')[0]}, {who}{part}."


def heat_panel(found: "Look", place: int, layer: int | None = None, head: int | None = None) -> str:
    """Where the model looked for the token at `place`: shares by kind, the pictures as heat maps, the top words."""
    from fusion.drawing import describe_heat, draw_heat, percent

    reading = reading_of(found, place)
    token, read = found.tokens[place], found.tokens[reading]
    if place >= found.prompt_tokens:
        what = (
            f"To write “{token.text}” (token {place}), the model read “{read.text}” (token {reading}) and looked back"
        )
    else:
        what = f"When it read “{token.text}” (token {place}), the model looked back"
    which = f"{'all layers' if layer is None else f'layer {layer}'}, {'all heads' if head is None else f'head {head}'}"
    shares = found.shares(reading, layer, head)
    by_kind = found.attention_by_kind(reading, layer, head)
    parts = [f"<p>{escape(what)}. {which[0].upper()}{which[1:]}:</p>", _split(by_kind)]
    if found.items:
        weights = found.attention(reading, layer, head)
        most = max(float(each.max()) for each in weights) or None
        parts.append('<div class="mk-gridded">')
        for index, item in enumerate(found.items[:MOST_PICTURES]):
            said = f"{_name(found, index)}: {describe_heat(item, weights[index])}"
            drawn = draw_heat(item, weights[index], most, words=False)
            parts.append(f"<figure>{picture(drawn, said)}<figcaption>{escape(said)}</figcaption></figure>")
        parts.append("</div>")
        if most:
            parts.append(_ramp("0", f"{percent(most)} of its attention"))
        if layer is None:
            parts.append(_by_layer(found, reading, head))
    else:
        parts.append(notice(NO_PICTURE))
    parts.append(_most_words(found, shares))
    shapes = [
        ("layers", f"{found.layers}"),
        ("heads", f"{found.heads}"),
        ("shares of one token", f"(layers, heads, tokens) = ({found.layers}, {found.heads}, {reading + 1:,})"),
    ]
    return panel("heat", "".join(parts), shapes)


def _split(by_kind: Mapping[str, float]) -> str:
    """How the attention was divided over kinds of tokens: a bar, and the same in words."""
    from fusion.drawing import percent

    shown = {kind: share for kind, share in by_kind.items() if share > 0}
    bars = "".join(
        f'<span style="background:var(--mk-{"quiet" if kind == "text" else kind});flex:{share:.5f}"></span>'
        for kind, share in shown.items()
    )
    names = {
        "media": "pictures",
        "text": "text",
        "control": "control tokens",
        "thinking": "thought",
        "answer": "answer",
    }
    keys = "".join(
        f'<li><i class="mk-token {kind}" style="background:var(--mk-{"quiet" if kind == "text" else kind})" '
        f'aria-hidden="true"></i>{names[kind]} {percent(share)}</li>'
        for kind, share in shown.items()
    )
    return f'<div class="mk-split" aria-hidden="true">{bars}</div><ul class="mk-legend">{keys}</ul>'


def _by_layer(found: "Look", reading: int, head: int | None) -> str:
    """The share that went to pictures, layer by layer: where to look more closely."""
    from fusion.drawing import percent

    rows = []
    for layer in range(found.layers):
        share = found.attention_by_kind(reading, layer, head)["media"]
        rows.append(
            f'<tr><th scope="row">layer {layer}</th><td><span class="mk-bar" style="width:{100 * share:.2f}%"></span>'
            f"</td><td>{percent(share)}</td></tr>"
        )
    return (
        '<details class="mk-fold mk-layers"><summary>Attention to pictures, layer by layer</summary>'
        f'<table class="mk-bars"><tbody>{"".join(rows)}</tbody></table></details>'
    )


def _most_words(found: "Look", shares: Any, most: int = 6) -> str:
    """The tokens that are no picture and got the most attention."""
    from fusion.drawing import percent

    order = [p for p in shares.argsort()[::-1] if found.tokens[p].kind != "media" and shares[p] > 0][:most]
    rows = "".join(
        f'<li><span class="mk-token {found.tokens[p].kind}">{escape(found.tokens[p].text)}</span> {percent(shares[p])} '
        f"<small>token {p}</small></li>"
        for p in order
    )
    return (
        "<h4>Words and control tokens that got most of it</h4>"
        f'<ul class="mk-legend">{rows}</ul><p><small>The first tokens often get much: attention has to go somewhere, '
        "and they are where it rests when nothing else is needed.</small></p>"
    )


def experts_panel(found: "Look", part: str = "all") -> str:
    """Which experts were chosen, layer by layer, by all tokens or those of the question or the reply."""
    from fusion.drawing import describe_experts, draw_experts, percent

    if not found.experts:
        return panel("experts", notice("This model has no expert layers: every token runs through the same weights."))
    start, end = {"prompt": (0, found.prompt_tokens), "reply": (found.prompt_tokens, None)}.get(part, (0, None))
    if part == "reply" and len(found.tokens) == found.prompt_tokens:
        return panel("experts", notice("There is no reply whose tokens could be counted."))
    load = found.load(start, end)
    drawn, said = draw_experts(found, load, words=False), describe_experts(found, load)
    scale = _ramp("0", f"{percent(max(float(each.max()) for each in load))} of the layer's choices")
    shapes = [
        ("layers with experts", f"{len(found.experts)} of {found.layers}"),
        ("experts", f"{found.num_experts}"),
        ("chosen", f"(layers, tokens, chosen) = ({', '.join(f'{n:,}' for n in found.chosen.shape)})"),
    ]
    inside = f'<div class="mk-wide">{picture(drawn, said, kind="mk-fit")}</div>{scale}<p>{escape(said)}</p>'
    return panel("experts", inside, shapes)


def _ramp(low: str, high: str) -> str:
    """The colours of the drawings, with what their two ends stand for."""
    return f'<p class="mk-ramp"><span>{escape(low)}</span><i aria-hidden="true"></i><span>{escape(high)}</span></p>'
