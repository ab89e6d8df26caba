"""A conversation, as the chat shows it.

    messages (OpenAI-style, history.py)                 rows of gr.Chatbot
        user        parts: image_url, video_url, text     a file each, then the words, as they were typed
        assistant   reasoning_content                     a block that folds: "Thinking", its seconds and tokens
                    tool_calls                            a block for each call, what came back nested in it
                    content                               the answer, as Markdown

    python -c "from demo.shown import plain; print(plain('a *star* and <b>'))"

What a user typed starts no Markdown and no HTML. What a model wrote may use Markdown; tags show as they are, and no
picture is fetched from anywhere.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo.guard import escape
from demo.pieces import sentence

Row = dict[str, Any]

# ---- words -----------------------------------------------------------------------------------------------------------

_SPACE = "\N{NO-BREAK SPACE}"
# punctuation where it could begin or end something in Markdown; a backslash makes it plain
_STARTS = re.compile(
    r"\\(?=[!-/:-@\[-`{-~])|[`]|[*~](?=\S)|(?<=\S)[*~]|(?<!\w)_|_(?!\w)|<(?=[A-Za-z/!?])|\](?=[(\[:])|&(?=#?\w+;)"
    r"|\$(?=\$)|(?<=\$)\$"
)
_ESCAPED = re.compile(r"\\([!-/:-@\[-`{-~])")


def plain(text: str) -> str:
    """What somebody typed, as Markdown that shows exactly that. `typed` is the way back."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = _STARTS.sub(lambda found: "\\" + found[0], text)
    # a number with a dot would begin a list: its dot is what can be escaped
    text = re.sub(r"(?m)^( *\d{1,9})([.)])(?=\s|$)", r"\1\\\2", text)
    text = re.sub(r"(?m)^( *)([#+=>-])", r"\1\\\2", text)
    # spaces at a line's start would make code, several in a row become one
    text = re.sub(r"(?m)^ +| {2,}", lambda found: _SPACE * len(found[0]), text)
    return text.replace("\t", _SPACE * 4)


def typed(markdown: str) -> str:
    """What was typed, from `plain` of it: for an edit, whose field holds the Markdown. A tab comes back as spaces."""
    return _ESCAPED.sub(r"\1", markdown.replace(_SPACE, " "))


_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})[^\n]*$", re.MULTILINE)
_CODE_START = re.compile(r"(?:async )?(?:def|class) \w+|(?:import|from) [\w.]+(?: import|\n|$)|@\w+[\w.]*\n")


def answer(text: str) -> str:
    """What a model wrote, as Markdown: HTML shows as text, pictures of Markdown as links, a bare program as code.

    Also of an unfinished text: what comes later does not change how the beginning looks.
    """
    if _CODE_START.match(text):
        return fenced(text, "python")
    if text.lstrip().startswith("<svg"):
        return fenced(text, "xml")
    out, at = [], 0
    while at < len(text):
        opening = _FENCE.search(text, at)
        if opening is None:
            out.append(_prose(text[at:]))
            break
        out.append(_prose(text[at : opening.start()]))
        mark = opening[1]
        closing = re.compile(rf"^ {{0,3}}{re.escape(mark[0])}{{{len(mark)},}} *$", re.MULTILINE)
        closed = closing.search(text, opening.end())
        end = closed.end() if closed else len(text)
        out.append(text[opening.start() : end])
        at = end
    return "".join(out)


def _prose(text: str) -> str:
    """Text outside of fences. Code between backticks stays as it is: Markdown escapes it itself."""
    parts = re.split(r"(`+[^`\n]*`+)", text)
    for index in range(0, len(parts), 2):
        part = re.sub(r"&(?=#?\w+;)", "&amp;", parts[index]).replace("<", "&lt;")
        parts[index] = part.replace("![", "!\\[")
    return "".join(parts)


def fenced(text: str, language: str = "") -> str:
    """Text as a block of code, whatever backticks it holds."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    mark = "`" * max(3, longest + 1)
    return f"{mark}{language}\n{text}\n{mark}"


# ---- files -----------------------------------------------------------------------------------------------------------


def shown_file(path: str | Path, visitor: str) -> str | None:
    """A visitor's file as a page may show it: linked once into the server's passing folder. None when it is gone.

    Gradio would copy and hash it for every piece of an answer.
    """
    path = Path(path)
    folder = os.environ.get("GRADIO_TEMP_DIR")
    if not path.is_file():
        return None
    if not folder:
        return str(path)
    target = Path(folder) / "shown" / visitor / path.name
    if not target.exists():
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            os.link(path, target)
        except FileExistsError:
            pass
        except OSError:  # another disk
            draft = target.with_name(f".{os.getpid()}.{target.name}")
            shutil.copyfile(path, draft)
            os.replace(draft, target)
    return str(target)


# ---- rows ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Page:
    """Rows for gr.Chatbot, and of which message each of them is a part."""

    rows: list[Row]
    origin: list[int]


def rows_of(messages: Sequence[dict[str, Any]], visitor: str) -> Page:
    """A conversation as rows. Media that are gone from the disk are said, not left out."""
    rows: list[Row] = []
    origin: list[int] = []
    for index, message in enumerate(messages):
        made = list(_rows_of(message, visitor))
        after = messages[index + 1]["role"] if index + 1 < len(messages) else ""
        if message["role"] == "user" == after:
            made.append(note("not answered"))
        rows += made
        origin += [index] * len(made)
    return Page(rows, origin)


def _rows_of(message: dict[str, Any], visitor: str) -> Iterable[Row]:
    role, about = message["role"], message.get("moonkit") or {}
    if role == "user":
        media, text = parts_of(message)
        for kind, path in media:
            yield _file(kind, path, visitor, "user")
        if text:
            yield {"role": "user", "content": plain(text)}
    elif role == "assistant":
        if message.get("reasoning_content"):
            yield thinking(message["reasoning_content"], about.get("thinking_tokens"), about.get("thinking_seconds"))
        calls = message.get("tool_calls") or ()
        for call in calls:
            yield tool_call(call)
        media, text = parts_of(message)
        if text:
            yield {"role": "assistant", "content": answer(text)}
        if about.get("note"):
            yield note(about["note"])
        if not text and not calls and not about.get("note"):
            yield note("The model ended its answer without a word.")
    elif role == "tool":
        yield from tool_result(message, visitor)


def thinking(text: str, tokens: int | None = None, seconds: float | None = None) -> Row:
    """The block of a thought. seconds: None while it goes on."""
    about: dict[str, Any] = {"title": "Thinking", "status": "pending" if seconds is None else "done"}
    if tokens:
        about["log"] = f"{tokens:,} token{'' if tokens == 1 else 's'}"
    if seconds is not None:
        about["duration"] = round(max(seconds, 0.01), 2)
    return {"role": "assistant", "content": answer(text), "metadata": about}


def tool_call(call: dict[str, Any], pending: bool = False) -> Row:
    """The block of a call: the tool's name and what it was asked. call: as in an OpenAI-style message."""
    function = call["function"]
    about = {"title": f"Tool: {escape(function['name'][:80])}", "id": f"call-{call.get('id') or function['name']}"}
    about["status"] = "pending" if pending else "done"
    return {"role": "assistant", "content": _arguments(function.get("arguments")), "metadata": about}


def tool_result(message: dict[str, Any], visitor: str) -> Iterable[Row]:
    """What a tool gave back, nested in the block of its call."""
    about = message.get("moonkit") or {}
    media, text = parts_of(message)
    metadata: dict[str, Any] = {
        "title": "Result" if about.get("ok", True) else "The tool failed",
        "parent_id": f"call-{message.get('tool_call_id')}",
        "id": f"result-{message.get('tool_call_id')}",
        "status": "done",
    }
    if about.get("seconds") is not None:
        metadata["duration"] = round(max(about["seconds"], 0.01), 2)
    shown = fenced(text, "text") if text else "Nothing was printed." if not media else "A picture:"
    yield {"role": "assistant", "content": shown, "metadata": metadata}
    for kind, path in media:
        yield _file(kind, path, visitor, "assistant")


def note(text: str) -> Row:
    """A remark of the page, not of the model: stopped, cut off, failed."""
    return {"role": "assistant", "content": f"*{plain(sentence(text))}*"}


def parts_of(message: dict[str, Any]) -> tuple[list[tuple[str, str]], str]:
    """Media as (kind, path), and the text of a message."""
    content = message.get("content")
    if content is None or isinstance(content, str):
        return [], content or ""
    media, texts = [], []
    for part in content:
        kind = part.get("type", "")
        if kind.startswith(("image", "video")):
            source = part.get(kind)
            source = source.get("url") if isinstance(source, dict) else source
            media.append(("image" if kind.startswith("image") else "video", str(source)))
        else:
            texts.append(str(part.get("text") or ""))
    return media, "\n".join(texts)


def _file(kind: str, path: str, visitor: str, role: str) -> Row:
    shown = shown_file(path, visitor)
    if shown is None:
        what = "picture" if kind == "image" else "clip"
        return {"role": role, "content": f"*A {what} was here; its file is gone.*"}
    return {"role": role, "content": {"path": shown, "alt_text": "a picture" if kind == "image" else "a clip"}}


def _arguments(arguments: Any) -> str:
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError:
            return fenced(arguments, "text")
    if isinstance(arguments, dict) and len(arguments) == 1:
        name, value = next(iter(arguments.items()))
        if isinstance(value, str):
            return fenced(value, "python" if name == "code" else "text")
    return fenced(json.dumps(arguments, ensure_ascii=False, indent=1), "json")
