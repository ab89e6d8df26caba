"""Pieces of HTML that several pages show: a picture, a thought, an answer, a sentence. Everything is escaped here.

    picture(image, "the question's picture")        <img> with the pixels inside, nothing to fetch
    thought("First, ...", "34 tokens")              a block that folds, with its own scroll bar
    words("```python\\nprint(1)\\n```")              text as it is; what stands in a fence looks like code
    notice("Nothing to show yet.")                  one sentence in a box; kind: "empty", "wait" or "error"
    asked(message, visitor, caps)                   what a multimodal textbox holds -> parts of a user message
    question_box("Ask ...", "Question", "see-input") such a textbox
    examples(box, media=True)                       buttons that fill that box

    text of a model or a user -- html.escape --> markup of ours -- gr.HTML --> page

What a user or a model wrote is only ever text between tags, or a quoted attribute.
"""

import base64
import io
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import gradio as gr
    from PIL import Image

    from demo.guard import Caps

SMALL = 250_000  # pixels up to which a picture stays lossless
PROGRAM = re.compile(r"\s*(?:(?:async )?(?:def|class) \w|(?:import|from) [\w.]+(?: import |\n|$)|@\w[\w.]*\n)")
FENCE = re.compile(r"```([\w+-]{0,20})[^\S\n]*\n(.*?)(?:\n?```|\Z)", re.DOTALL)

# a block that a visitor has opened or closed stays so while the text around it grows
KEEP_OPEN = """
const open = new Map();
element.addEventListener('toggle', (event) => {
  if (event.target.dataset && event.target.dataset.key) open.set(event.target.dataset.key, event.target.open);
}, true);
const settle = () => {
  element.querySelectorAll('details[data-key]').forEach((one) => {
    if (open.has(one.dataset.key)) one.open = open.get(one.dataset.key);
  });
  element.querySelectorAll('[data-follow]').forEach((one) => { one.scrollTop = one.scrollHeight; });
};
watch('value', settle);
"""


def picture(image: "Image.Image", alt: str, longest: int = 1280, kind: str = "") -> str:
    """An <img> that carries its pixels. longest: a larger picture is shown scaled down. kind: a further CSS class."""
    width, height = image.size
    shown = image
    if max(width, height) > longest:
        scale = longest / max(width, height)
        shown = image.resize((max(1, round(width * scale)), max(1, round(height * scale))))
    packed, form = io.BytesIO(), "png"
    if shown.width * shown.height > SMALL and shown.mode in ("RGB", "L"):
        shown.save(packed, "JPEG", quality=88)
        form = "jpeg"
    else:
        shown.save(packed, "PNG")
    data = base64.b64encode(packed.getvalue()).decode()
    sharp = " mk-sharp" if max(width, height) <= 512 else ""
    return (
        f'<img class="mk-picture{sharp} {kind}" alt="{escape(alt)}" width="{shown.width}" height="{shown.height}" '
        f'src="data:image/{form};base64,{data}">'
    )


def thought(text: str, said: str = "", key: str = "", opened: bool = True, follow: bool = False) -> str:
    """A block that folds. said: what stands beside its name; key: by which the page remembers whether it is open."""
    if not text.strip():
        return ""
    mark = f' data-key="{escape(key)}"' if key else ""
    scroll = " data-follow" if follow else ""
    beside = f" <small>{escape(said)}</small>" if said else ""
    return (
        f'<details class="mk-thought"{mark}{" open" if opened else ""}><summary>Thinking{beside}</summary>'
        f'<div class="mk-text"{scroll} tabindex="0">{escape(text.strip())}</div></details>'
    )


def words(text: str) -> str:
    """Text with its lines kept. A bare program, and what stands in a fence of three backticks, is shown as code."""
    if PROGRAM.match(text) and "```" not in text:
        return f'<pre class="mk-code"><code>{escape(text.strip())}</code></pre>'
    parts, at = [], 0
    for found in FENCE.finditer(text):
        parts.append(_plain(text[at : found.start()]))
        parts.append(f'<pre class="mk-code"><code>{escape(found[2])}</code></pre>')
        at = found.end()
    return "".join([*parts, _plain(text[at:])])


def _plain(text: str) -> str:
    return f'<div class="mk-text">{escape(text.strip())}</div>' if text.strip() else ""


def notice(text: str, kind: Literal["empty", "wait", "error"] = "empty") -> str:
    """One sentence in a box. An error is also read out by a screen reader."""
    role = "alert" if kind == "error" else "status"
    return f'<p class="mk-notice mk-{kind}" role="{role}">{escape(text)}</p>'


def sentence(error: object) -> str:
    """An error's text as one sentence: with a capital and a full stop, however long the first line was."""
    text = " ".join(str(error).split())[:600] or type(error).__name__
    return text[0].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


@contextmanager
def told() -> Iterator[None]:
    """Around an endpoint for programs: a ValueError reaches the caller as its sentence, and is no fault of ours."""
    import gradio as gr

    try:
        yield
    except ValueError as error:
        raise gr.Error(sentence(error), print_exception=False) from error


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Names with their values, in a row that wraps."""
    rows = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in pairs)
    return f'<dl class="mk-facts">{rows}</dl>'


def asked(message: Any, visitor: str, caps: "Caps") -> tuple[list[dict[str, Any]], list[str]]:
    """Parts of a user message (media first, then the words) and remarks on its files.

    message: what a multimodal textbox holds, {"text", "files"}. Raises ValueError with one sentence: nothing asked, too
    long, too many files, or a file that the guard refuses.
    """
    from demo.guard import admit

    if not isinstance(message, Mapping):
        raise ValueError("Write a question, and add a picture or a clip where it is about one.")
    text = str(message.get("text") or "").strip()
    files = list(message.get("files") or ())
    if not text:
        raise ValueError("Write a question first; a picture alone asks nothing.")
    if len(text) > caps.text_chars:
        raise ValueError(f"The question has {len(text):,} characters; at most {caps.text_chars:,} are read.")
    if len(files) > caps.files:
        raise ValueError(f"{len(files)} files came with the question; at most {caps.files} are read.")
    parts: list[dict[str, Any]] = []
    notes: list[str] = []
    for file in files:
        found = admit(_path(file), visitor, caps)
        kind = "image_url" if found.kind == "image" else "video_url"
        parts.append({"type": kind, kind: {"url": str(found.path)}})
        if found.note:
            notes.append(found.note)
    return [*parts, {"type": "text", "text": text}], notes


def _path(file: Any) -> str:
    """Where an uploaded file lies: gradio gives a path, or a mapping that names one."""
    if isinstance(file, str | Path):
        return str(file)
    found = file.get("path") if isinstance(file, Mapping) else getattr(file, "path", None)
    if not isinstance(found, str):
        raise ValueError("A file came without a name of where it lies; add it again.")
    return found


def question_box(placeholder: str, label: str, elem_id: str) -> "gr.MultimodalTextbox":
    """Where a question is written and its pictures and clips are put."""
    import gradio as gr

    return gr.MultimodalTextbox(
        file_types=["image", "video"],
        file_count="multiple",
        sources=["upload"],
        placeholder=placeholder,
        label=label,
        elem_id=elem_id,
        submit_btn=False,
        lines=2,
    )


def examples(box: "gr.MultimodalTextbox", media: bool) -> None:
    """A row of buttons that fill the box with a question to begin with. media: only those about a picture or a clip."""
    import gradio as gr

    from demo.examples import EXAMPLES

    with gr.Row(elem_classes="mk-examples"):
        for example in EXAMPLES:
            if example.tools or (media and not example.file):
                continue
            value = {"text": example.question, "files": [str(example.file)] if example.file else []}
            gr.Button(example.label, size="sm", min_width=100).click(
                lambda value=value: value,
                None,
                box,
                queue=False,
                show_progress="hidden",
                api_visibility="private",
            )
