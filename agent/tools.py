"""Tools that a model may call in a conversation: each says what it is, and what came of a call.

    tools = [calculator(), crop(["photo.jpg"]), python()]
    tools[0].run({"expression": "1234 * 5678"})      ->  ToolResult("7006652", ok=True)
    tools[1].run({"x1": 0, "y1": 0, "x2": 500, "y2": 500})   ->  ToolResult([text, image], ok=True)

    arguments ── checked against the schema ──> the tool ──> ToolResult: text, or parts of a message
                                                  └── what went wrong, as a sentence that the model reads (ok=False)

    calculator  exact arithmetic, bounded (agent/calculate.py)
    crop        a part of a picture of the conversation, larger where it is small, as a picture
    python      a program in a sandbox of its own, thrown away afterwards (agent/sandbox.py)

A call that is wrong is a result, never an exception; what raises is an error in a tool. agent/converse.py runs them.
"""

import base64
import io
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent.calculate import CannotCalculate, calculate
from agent.loop import CommandFailed, ToolError, shorten
from agent.sandbox import Backend, ExecResult, Limits, SandboxError, Spec, backend, running

LONGEST_RESULT = 8_000  # characters of text that a model is given back
LONGEST_CODE = 100_000  # characters
MOST_PIXELS = 2**27  # of a picture that is opened
MOST_SHOWN = 2**21  # pixels of a part that is given back: about what a model looks at
SMALLEST_SIDE = 448  # pixels: the longer side of a part is enlarged to it, so that the model has something to look at
MOST_ENLARGED = 8  # times
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")

# what a model reads about them
CALCULATE = (
    "Calculate an expression exactly: + - * / // % ** !, comparisons, sqrt, ln, log10, sin, floor, round, gcd, comb, "
    "max and the like."
)
LOOK = "Look closer at a part of a picture. The box runs from (x1, y1), left and top, to (x2, y2), right and bottom."
RUN = (
    "Run a Python program and read what it prints. It starts anew in each call; it has the standard library, no "
    "network, and {seconds} seconds."
)

Parts = list[dict[str, Any]]
Do = Callable[[Mapping[str, Any], threading.Event], "str | Parts"]


@dataclass(frozen=True)
class ToolResult:
    """What a tool says: text, or parts of a message as models read them. ok False: it could not, and says why."""

    content: str | Parts
    ok: bool = True

    @property
    def text(self) -> str:
        """The words alone."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part["text"] for part in self.content if part.get("type") == "text")


@dataclass(frozen=True)
class Tool:
    """A tool. specification: OpenAI's form of a function. do: (arguments, stop) -> content; it raises ToolError for
    what it cannot do, and ends soon after `stop` is set."""

    name: str
    specification: dict[str, Any]
    do: Do = field(repr=False)

    def run(self, arguments: Mapping[str, Any], stop: threading.Event | None = None) -> ToolResult:
        """One call. Whatever the arguments are, this gives a result."""
        try:
            given = checked(self.specification["function"], arguments)
            content = self.do(given, stop or threading.Event())
        except CommandFailed as error:
            return ToolResult(shorten(str(error), LONGEST_RESULT), False)
        except ToolError as error:
            return ToolResult(shorten(f"error: {error}", LONGEST_RESULT), False)
        return ToolResult(shorten(content, LONGEST_RESULT) if isinstance(content, str) else content)


def specified(name: str, what: str, required: Sequence[str] = (), **properties: Any) -> dict[str, Any]:
    """OpenAI's form of a function that takes these properties."""
    parameters = {"type": "object", "properties": properties, "required": list(required)}
    return {"type": "function", "function": {"name": name, "description": what, "parameters": parameters}}


_KINDS: dict[str, tuple[type, ...]] = {"string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,)}


def checked(function: Mapping[str, Any], arguments: Any) -> dict[str, Any]:
    """Arguments as a flat schema wants them. Raises ToolError with what to tell the model."""
    name, parameters = function["name"], function.get("parameters") or {}
    properties = parameters.get("properties") or {}
    if not isinstance(arguments, Mapping):
        raise ToolError(f"the arguments must be a JSON object, got {type(arguments).__name__}")
    for key in parameters.get("required") or ():
        if arguments.get(key) is None:
            raise ToolError(f"{name} needs {key!r}")
    out = {}
    for key, value in arguments.items():
        if key not in properties:
            raise ToolError(f"{name} has no argument {str(key)[:40]!r}; it takes {', '.join(properties) or 'none'}")
        if value is None:
            continue  # as if it were left out
        kind, allowed = properties[key].get("type"), properties[key].get("enum")
        if kind == "integer" and isinstance(value, float) and value.is_integer():
            value = int(value)
        if kind in _KINDS and (not isinstance(value, _KINDS[kind]) or (isinstance(value, bool) and kind != "boolean")):
            raise ToolError(f"{name}: {key} must be a {kind}, got {_shown(value)}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ToolError(f"{name}: {key} must be a finite number")
        if allowed and value not in allowed:
            raise ToolError(f"{name}: {key} must be one of {', '.join(map(str, allowed))}, got {_shown(value)}")
        out[key] = value
    return out


def _shown(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 256:
        return "a very large number"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# ---- calculator


def calculator(plain: bool = False) -> Tool:
    """Arithmetic: calculator(expression). plain: without descriptions, as the model in the box has learned it."""
    specification = specified(
        "calculator",
        "" if plain else CALCULATE,
        ["expression"],
        expression={"type": "string"},
    )

    def do(arguments: Mapping[str, Any], stop: threading.Event) -> str:
        try:
            return calculate(arguments["expression"])
        except CannotCalculate as error:
            raise ToolError(str(error)) from None

    return Tool("calculator", specification, do)


# ---- crop


WHICH: dict[str, Any] = {
    "image": {"type": "integer", "description": "Which picture of the conversation, from 1; the last if left out."},
    "units": {
        "type": "string",
        "enum": ["thousandths", "pixels"],
        "description": "Of the box: thousandths of the picture's width and height (0 to 1000), or its pixels.",
    },
}


def crop(images: Sequence[Any], load: Callable[[Any], Any] | None = None, plain: bool = False) -> Tool:
    """A part of a picture: crop(x1, y1, x2, y2, image, units). The part is another picture, and can be cropped again.

    images: those of the conversation, in order: paths, data URLs, bytes or PIL images; `pictures` collects them.
    load: opens one as an RGB image; moonvit.image.load_image gives the very pixels that a model sees. Left out: Pillow,
    which like the models ignores EXIF orientation. Parts that the tool makes count on: one tool for one conversation.
    plain: four whole numbers and no more, the last picture's pixels, as the model in the box has learned it.
    """
    known = list(images)
    lock = threading.Lock()
    side = {"type": "integer" if plain else "number"}
    specification = specified(
        "crop",
        "" if plain else LOOK,
        ["x1", "y1", "x2", "y2"],
        x1=side,
        y1=side,
        x2=side,
        y2=side,
        **({} if plain else WHICH),
    )

    def do(arguments: Mapping[str, Any], stop: threading.Event) -> Parts:
        with lock:
            number = arguments.get("image", len(known))
            if not known:
                raise ToolError("the conversation has no picture")
            if not 1 <= number <= len(known):
                raise ToolError(f"image must be from 1 to {len(known)}, got {_shown(number)}")
            try:
                picture = (load or open_picture)(known[number - 1])
            except (ValueError, OSError) as error:
                raise ToolError(
                    f"picture {number} cannot be opened: {_without_path(error, known[number - 1])}"
                ) from None
            part, box = cut(picture, {"units": "pixels", **arguments} if plain else arguments)
            known.append(part)
            made = len(known)
        shown = fitted(part)
        said = f"crop.png {part.width}x{part.height}, picture {made}: {box} of picture {number}"
        if shown.size != part.size:
            said += f", shown at {shown.width}x{shown.height}"
        return [{"type": "text", "text": said + "\n"}, {"type": "image_url", "image_url": {"url": data_url(shown)}}]

    return Tool("crop", specification, do)


def pictures(messages: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The pictures of a conversation, in order: the sources in its parts, those of tool results too."""
    found = []
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list | tuple) else ():
            kind = part.get("type")
            if kind in ("image", "image_url"):
                source = part.get(kind) if part.get(kind) is not None else part.get("image_url")
                found.append(source.get("url") if isinstance(source, Mapping) else source)
    return found


def cut(picture: Any, arguments: Mapping[str, Any]) -> tuple[Any, str]:
    """The part of a PIL image in a box {x1, y1, x2, y2, units}, and the box in words. Corners may be swapped; what lies
    outside the picture is left out. Raises ToolError for a box with nothing in it."""
    sides = [arguments[key] for key in ("x1", "y1", "x2", "y2")]
    units = arguments.get("units", "thousandths")
    wide, high = picture.size
    if any(not -1e9 < side < 1e9 for side in sides):
        raise ToolError("the box is far outside the picture")
    x1, x2 = sorted((sides[0], sides[2]))
    y1, y2 = sorted((sides[1], sides[3]))
    if units == "thousandths":
        if x1 > 1000 or y1 > 1000 or max(x2, y2) > 2000:
            raise ToolError(
                f"the box is in thousandths, 0 to 1000, got {sides}; say units='pixels' if these are pixels"
            )
        x1, x2, y1, y2 = x1 * wide / 1000, x2 * wide / 1000, y1 * high / 1000, y2 * high / 1000
    if x1 == x2 or y1 == y2:
        raise ToolError(f"the box {sides} has no area")
    left, top = max(0, math.floor(x1)), max(0, math.floor(y1))
    right, bottom = min(wide, math.ceil(x2)), min(high, math.ceil(y2))
    if left >= right or top >= bottom:
        raise ToolError(f"the box {sides} lies outside the picture of {wide}x{high} pixels")
    return picture.crop((left, top, right, bottom)), f"pixels ({left}, {top}) to ({right}, {bottom}), {wide}x{high},"


def fitted(part: Any) -> Any:
    """A PIL image, enlarged where it is small, made smaller where it is more than a model looks at."""
    from PIL import Image

    longer, pixels = max(part.size), part.width * part.height
    scale = min(MOST_ENLARGED, SMALLEST_SIDE / longer) if longer < SMALLEST_SIDE else 1.0
    if pixels > MOST_SHOWN:
        scale = math.sqrt(MOST_SHOWN / pixels)
    if scale == 1:
        return part
    size = tuple(max(1, round(side * scale)) for side in part.size)
    return part.resize(size, Image.Resampling.BICUBIC)


def open_picture(source: Any) -> Any:
    """An RGB image from a path, a data URL, bytes or a PIL image; EXIF orientation ignored, of an animation the first
    frame. Raises ValueError or OSError."""
    from PIL import Image, UnidentifiedImageError

    if isinstance(source, Image.Image):
        return source.convert("RGB")
    file: Any = source
    if isinstance(source, str) and source.startswith("data:"):
        file = io.BytesIO(base64.b64decode(source.partition(",")[2], validate=True))
    elif isinstance(source, bytes):
        file = io.BytesIO(source)
    elif not isinstance(source, str | Path) or "://" in str(source):
        raise ValueError("a picture is a path, a data URL, bytes or an image; nothing is fetched from a network")
    try:
        Image.init()  # else a format that this Pillow lacks is a KeyError
        with Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN]) as opened:
            if opened.width * opened.height > MOST_PIXELS:
                raise ValueError(f"{opened.width}x{opened.height} pixels are more than {MOST_PIXELS}")
            if opened.mode.startswith("I;16"):
                return opened.point(lambda level: level / 256).convert("RGB")
            return opened.convert("RGB")
    except (UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, EOFError) as error:
        raise ValueError(f"not an image that can be read ({type(error).__name__})") from None


def data_url(picture: Any) -> str:
    """A PIL image as a PNG data URL, as messages hold it."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def _without_path(error: Exception, source: Any) -> str:
    """A model needs no paths of this machine."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error)
    return (text.replace(str(source), "the file") if isinstance(source, str | Path) else text)[:200]


# ---- python


# Prints what the last line is worth, as people who write for a notebook expect. Hostile text can break the compiler:
# it is read here, inside.
PROGRAM = """import sys
def start(text):
    import ast
    names = {"__name__": "__main__", "__builtins__": __builtins__}
    tree = ast.parse(text, "<python>")
    last = [tree.body.pop()] if tree.body and isinstance(tree.body[-1], ast.Expr) else []
    codes = [compile(tree, "<python>", "exec", dont_inherit=True)]
    codes += [compile(ast.Interactive([each]), "<python>", "single", dont_inherit=True) for each in last]
    def begin():
        for code in codes:
            exec(code, names)
    return begin
try:
    start(TEXT)()
except SystemExit:
    raise
except BaseException as error:
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename != "<python>":
        trace = trace.tb_next
    sys.__excepthook__(type(error), error.with_traceback(trace), trace)
    sys.exit(1)
"""


def started(code: str) -> str:
    """A program for Sandbox.python that runs `code` as a notebook would: its last line's value is printed, and an
    error's trace begins in it."""
    return PROGRAM.replace("TEXT", ascii(code))


def python(
    backend_: str | Backend = "auto",
    limits: Limits | None = None,
    *,
    allow_unsafe: bool = False,
    plain: bool = False,
) -> Tool:
    """A program in a sandbox: python(code). Each call has a sandbox of its own, without a network and without packages
    beyond Python's own, and nothing of it stays.

    backend_: a name, or what agent.sandbox.backend gave. Where no sandbox works, each call says so (ok=False).
    plain: without descriptions, as the model in the box has learned it.
    """
    limits = limits or Limits(wall_s=10.0, cpu_s=5.0, memory_mb=512, pids=16, disk_mb=32, output_kb=64)
    specification = specified(
        "python",
        "" if plain else RUN.format(seconds=f"{limits.cpu_s:g}"),
        ["code"],
        code={"type": "string"},
    )

    def do(arguments: Mapping[str, Any], stop: threading.Event) -> str:
        code = arguments["code"]
        if len(code) > LONGEST_CODE:
            raise ToolError(f"a program of {len(code)} characters; at most {LONGEST_CODE} are run")
        try:
            chosen = backend(backend_, allow_unsafe=allow_unsafe) if isinstance(backend_, str) else backend_
            with running() as loop:
                result = loop.run(_in_a_sandbox(chosen, code, limits, stop))
        except SandboxError as error:
            raise ToolError(f"programs cannot be run here: {error}") from None
        if result is None:
            raise ToolError("stopped before it had ended")
        return _told(result, limits)

    return Tool("python", specification, do)


async def _in_a_sandbox(chosen: Backend, code: str, limits: Limits, stop: threading.Event) -> ExecResult | None:
    """None if it was stopped. The sandbox is gone when this returns."""
    import asyncio

    async with await chosen.open(Spec(limits=limits)) as box:
        running_ = asyncio.ensure_future(box.python(started(code), limits=limits))
        while not running_.done():
            if stop.is_set():
                running_.cancel()  # which ends the sandbox
                await asyncio.wait([running_])
                return None
            await asyncio.wait([running_], timeout=0.05)
        return running_.result()


def _told(result: ExecResult, limits: Limits) -> str:
    """What a program printed and how it ended. Raises CommandFailed where it did not end well."""
    if result.status == "infra_error":
        raise SandboxError(result.stderr.decode("utf-8", "replace")[-300:] or "the sandbox failed")
    said = [stream.decode("utf-8", "replace").rstrip("\n") for stream in (result.stdout, result.stderr)]
    # of the two, errors are at the end and are read last: both keep some room
    text = "\n".join(shorten(part, LONGEST_RESULT // 2 - 200) for part in said if part.strip())
    if result.ok:
        return text or "(no output; print what you want to see)"
    how = {
        "nonzero": f"exit code {result.returncode}",
        "timeout": f"ended after {limits.wall_s:g} seconds, or {limits.cpu_s:g} of processor time",
        "memory": f"ended: more than {limits.memory_mb} MB of memory",
        "output_limit": f"ended: it printed more than {limits.output_kb} KB",
        "disk": f"ended: it wrote more than {limits.disk_mb} MB",
    }
    raise CommandFailed(f"{text}\n[{how.get(result.status, result.status)}]".lstrip("\n"))
