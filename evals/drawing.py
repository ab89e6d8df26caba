"""Render and compare. Kinds "svg" and "plot" of evals/graders.py.

    grade(Task("svg", "<svg viewBox='0 0 24 24'>...</svg>"), "```svg\\n<svg ...>...</svg>\\n```")     ->   0 to 1
    grade(Task("plot", "import matplotlib.pyplot as plt\\nplt.plot([1, 4, 9])"), "```python ...```")   ->   0 to 1

    svg    the last drawing of the reply -- read strictly -- a worker draws it (resvg) --+-- likeness to the gold's
    plot   the last program of the reply -- runs in a sandbox, Agg ----------------------+   picture

data: "size", the side of the square that pictures are compared on (256); "metric", one of METRICS ("picture"); for
plots "seconds", processor time that a program gets on top of five times what the gold program took (10).

The likeness of two pictures on white paper, 1 for the same and 0 for an empty page:

    pixels   over all pixels that either has ink on: 1 - difference / ink, each summed over the colours, the mean of
             the full size and of a quarter of it, where a small shift costs less
    edges    of the outlines of both, the share that lies within 1 % and 2 % of the side of the other's: F1, mean
    picture  the mean of the two

A plot shares its frame and ticks with every other plot: what empty axes of the gold's size would score counts as 0.

An SVG is parsed without document types, entities, scripts, styles from elsewhere, pictures and references out of the
document, with limits on its size, depth and what its <use> elements unfold to. The square shows its viewBox, fitted
as SVG does; a drawing without one has the gold's. Letters come from matplotlib's fonts on every machine.
"""

import ast
import base64
import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from evals.workers import Died, Workers

WORKERS = Workers("render", memory_mb=2048, seconds=5)
SIZES = (32, 1024)
Picture = NDArray[np.float32]  # (size, size, 3), 0 to 1

# ---- likeness


def ink(picture: Picture) -> NDArray[np.float32]:
    """How far from white each pixel is, summed over the colours: 0 to 3."""
    return np.asarray((1 - picture).sum(-1), np.float32)


def pixels(gold: Picture, said: Picture) -> float:
    """Agreement over the union of the inks, at full size and at a quarter of it."""
    scores = []
    for step in (1, 4):
        a, b = _shrunk(gold, step), _shrunk(said, step)
        most = np.maximum(ink(a), ink(b))
        difference = np.minimum(np.abs(a - b).sum(-1), most)
        scores.append(1 - float(difference.sum(dtype=np.float64) / max(float(most.sum(dtype=np.float64)), 1e-9)))
    return max(0.0, sum(scores) / 2)


def _shrunk(picture: Picture, step: int) -> Picture:
    size = len(picture) // step * step
    return np.asarray(picture[:size, :size].reshape(size // step, step, size // step, step, 3).mean((1, 3)), np.float32)


def edges(gold: Picture, said: Picture) -> float:
    """F1 of outlines that lie near an outline of the other, mean over two distances."""
    from scipy.ndimage import distance_transform_edt

    a, b = _outline(gold), _outline(said)
    if not a.any() or not b.any():  # so soft that there are no outlines
        return 0.0 if a.any() or b.any() else pixels(gold, said)
    to_a, to_b = distance_transform_edt(~a), distance_transform_edt(~b)
    scores = []
    for share in (0.01, 0.02):
        near = share * len(gold)
        right, found = float((to_a[b] <= near).mean()), float((to_b[a] <= near).mean())
        scores.append(2 * right * found / (right + found) if right + found else 0.0)
    return sum(scores) / 2


def _outline(picture: Picture) -> NDArray[np.bool_]:
    """Pixels that differ from the one to the right or below by a twelfth of the range of a colour: pale ink counts."""
    found = np.zeros(picture.shape[:2], bool)
    found[:, :-1] |= np.abs(np.diff(picture, axis=1)).max(-1) > 1 / 12
    found[:-1] |= np.abs(np.diff(picture, axis=0)).max(-1) > 1 / 12
    return found


METRICS: dict[str, Callable[[Picture, Picture], float]] = {
    "picture": lambda gold, said: (pixels(gold, said) + edges(gold, said)) / 2,
    "pixels": pixels,
    "edges": edges,
}


def _settings(data: Mapping[str, Any]) -> tuple[int, Callable[[Picture, Picture], float]]:
    size, metric = data.get("size", 256), data.get("metric", "picture")
    if isinstance(size, bool) or not isinstance(size, int) or not SIZES[0] <= size <= SIZES[1]:
        raise ValueError(f"size is a whole number of pixels, {SIZES[0]} to {SIZES[1]}, got {size!r}")
    if metric not in METRICS:
        raise ValueError(f"no metric {metric!r}; known: {', '.join(METRICS)}")
    return size, METRICS[metric]


def _opened(png: bytes, size: int) -> Picture:
    """A PNG on a white square, as large as fits. Raises ValueError for what is none, or is too large."""
    try:
        file = Image.open(io.BytesIO(png), formats=["PNG"])
        if max(file.size) > 4096:
            raise ValueError(f"a picture of {file.size} pixels; the longest side has at most 4096")
        image = file.convert("RGBA")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"no PNG: {error}") from None
    paper = Image.new("RGBA", image.size, "white")
    paper.alpha_composite(image)
    scale = size / max(image.size)
    fitted = paper.convert("RGB").resize(
        (max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.BOX
    )
    square = Image.new("RGB", (size, size), "white")
    square.paste(fitted, ((size - fitted.width) // 2, (size - fitted.height) // 2))
    return np.asarray(square, np.float32) / np.float32(255)


# ---- SVG

LARGEST = 200_000  # characters
ELEMENTS, DEEPEST, UNFOLDED = 3000, 40, 20_000
_SPACE = "http://www.w3.org/2000/svg"
_LINKS = "http://www.w3.org/1999/xlink"
REFUSED = ("script", "foreignObject", "image", "feImage", "iframe", "animate", "animateMotion", "set", "handler", "a")
ET.register_namespace("", _SPACE)
ET.register_namespace("xlink", _LINKS)


def svg_of(reply: str) -> str | None:
    """The last <svg> ... </svg> of a reply, in a fence or not."""
    end = reply.rfind("</svg>")
    if end < 0:
        return None
    fence = reply.rfind("```", 0, end)
    start = reply.find("<svg", fence) if fence >= 0 else -1
    if not 0 <= start < end:  # no fence before it, or one that was closed before it
        before = reply.rfind("</svg>", 0, end)
        start = reply.find("<svg", before + 1 if before >= 0 else 0, end)
    return reply[start : end + 6] if 0 <= start < end else None


def read_svg(text: str, view: str | None = None) -> tuple[str, str]:
    """(a drawing that can be rendered safely, its viewBox). view: the viewBox of one that has none, nor a size.

    Raises ValueError for what is no drawing, or too much of one.
    """
    if len(text) > LARGEST:
        raise ValueError(f"{len(text)} characters; a drawing has at most {LARGEST}")
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    if "<!" in text.replace("<![CDATA[", "") or "<?" in text:
        raise ValueError("document types, entities and processing instructions are not read")
    head = re.match(r"\s*<svg\b[^>]*", text)
    if head is None:
        raise ValueError("a drawing is <svg> ... </svg>")
    missing = "" if re.search(r"\sxmlns\s*=", head[0]) else f' xmlns="{_SPACE}"'
    if "xlink:" in text and "xmlns:xlink" not in head[0]:
        missing += f' xmlns:xlink="{_LINKS}"'
    at = text.index("<svg") + 4
    try:
        root = ET.fromstring(text[:at] + missing + text[at:])
    except (ET.ParseError, ValueError, RecursionError) as error:
        raise ValueError(f"no XML: {error}") from None
    if root.tag != f"{{{_SPACE}}}svg":
        raise ValueError(f"the root is {root.tag[:80]!r}, not svg")
    _check(root)
    box = root.get("viewBox")
    if box is None:
        sides = [re.match(r"\s*(\d+(?:\.\d+)?)(?:px)?\s*$", root.get(side, "")) for side in ("width", "height")]
        box = f"0 0 {sides[0][1]} {sides[1][1]}" if sides[0] and sides[1] else view
    numbers = re.fullmatch(r"\s*-?[\d.e+-]+(?:[\s,]+-?[\d.e+-]+){3}\s*", box or "")
    if box is None or numbers is None:
        raise ValueError(f"no viewBox of four numbers, nor width and height, got {box!r}")
    root.set("viewBox", box)
    for side in ("width", "height"):
        root.set(side, "100")
    for place in ("x", "y"):
        root.attrib.pop(place, None)
    return ET.tostring(root, encoding="unicode"), box


def _check(root: ET.Element) -> None:
    """Raises ValueError for what reaches out of the document, and for what is too much."""
    named: dict[str, ET.Element] = {}
    elements = 0
    stack = [(root, 1)]
    while stack:
        element, depth = stack.pop()
        elements += 1
        if elements > ELEMENTS or depth > DEEPEST:
            raise ValueError(f"more than {ELEMENTS} elements, or {DEEPEST} in each other")
        name = str(element.tag).rpartition("}")[2]
        if name in REFUSED:
            raise ValueError(f"<{name}> is not drawn")
        for key, text in element.attrib.items():
            plain = key.rpartition("}")[2]
            if plain == "href" and not text.strip().startswith("#"):
                raise ValueError(f"a reference out of the document: {text[:60]!r}")
            if plain.startswith("on"):
                raise ValueError(f"a script: {plain[:40]!r}")
            _inside(text)
        if name == "style":
            _inside("".join(element.itertext()))
        if "id" in element.attrib:
            named[element.attrib["id"]] = element
        stack += [(child, depth + 1) for child in element]
    _unfolded(root, named, {}, 0)


def _inside(text: str) -> None:
    if "@import" in text or "\\" in text or re.search(r"url\(\s*['\"]?\s*(?!#)(?!['\"\s])", text, re.IGNORECASE):
        raise ValueError(f"a style from elsewhere: {text[:60]!r}")


def _unfolded(element: ET.Element, named: Mapping[str, ET.Element], known: dict[int, int], depth: int) -> int:
    """How many elements there are when every reference is followed: <use> in <use> doubles."""
    if depth > 2 * DEEPEST:
        raise ValueError("references that lead in a circle, or too deep")
    if id(element) in known:
        return known[id(element)]
    count = 1 + sum(_unfolded(child, named, known, depth + 1) for child in element)
    for key, text in element.attrib.items():
        targets = re.findall(r"url\(\s*['\"]?#([^'\")]+)", text)
        if key.rpartition("}")[2] == "href":
            targets.append(text.strip()[1:])
        for target in targets:
            if target in named:
                count += _unfolded(named[target], named, known, depth + 1)
    if count > UNFOLDED:
        raise ValueError(f"it unfolds to more than {UNFOLDED} elements")
    known[id(element)] = count
    return count


@lru_cache(maxsize=1)
def _fonts() -> str:
    import matplotlib

    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf")


def draw(text: str, size: int, view: str | None = None) -> tuple[Picture, str]:
    """(a drawing's picture, its viewBox). Raises ValueError for what cannot be drawn, Died from evals/workers.py."""
    safe, box = read_svg(text, view)
    said = WORKERS.ask(svg=safe, size=size, fonts=_fonts())
    if "png" not in said:
        raise ValueError(f"not drawn: {said.get('refused', said.get('error'))}")
    return _opened(base64.b64decode(said["png"]), size), box


@lru_cache(maxsize=256)
def _gold_drawing(gold: str, size: int) -> tuple[Picture, str]:
    """Raises ValueError for a gold that cannot be drawn, or draws nothing."""
    try:
        picture, box = draw(gold, size)
    except Died as died:
        if not died.costly:
            raise
        raise ValueError(f"svg: the gold takes too much: {died}") from None
    if not (ink(picture) > 0.1).any():
        raise ValueError(f"svg: nothing is drawn by the gold {gold[:80]!r}")
    return picture, box


def svg_golds(gold: Any, data: Mapping[str, Any]) -> list[str]:
    """The gold said as an answer. Raises ValueError for one that cannot be drawn."""
    if not isinstance(gold, str) or svg_of(gold) is None:
        raise ValueError(f"svg: the gold is the text of a drawing, got {str(gold)[:80]!r}")
    return [f"```svg\n{gold}\n```"]


def svg(gold: str, data: Mapping[str, Any], said: str) -> tuple[float | None, dict[str, Any]]:
    """The grader. evidence: "likeness" by each metric, or "why" there is no picture."""
    size, metric = _settings(data)
    text = svg_of(said)
    if text is None:
        return 0.0, {"why": "no <svg> ... </svg>"}
    try:
        wanted, view = _gold_drawing(svg_of(gold) or gold, size)
    except Died as died:
        return None, {"error": str(died)}
    try:
        picture, _ = draw(text, size, view)
    except ValueError as error:
        return 0.0, {"why": str(error)[:300]}
    except Died as died:
        if died.costly or WORKERS.work(svg=read_svg(svg_of(gold) or gold)[0], size=size):
            return 0.0, {"why": str(died)}
        return None, {"error": str(died)}
    return _compared(wanted, picture, metric)


def _compared(
    wanted: Picture, picture: Picture, metric: Callable[[Picture, Picture], float], floor: float = 0.0
) -> tuple[float, dict[str, Any]]:
    likeness = {"pixels": round(pixels(wanted, picture), 4), "edges": round(edges(wanted, picture), 4)}
    score = metric(wanted, picture)
    return min(1.0, max(0.0, (score - floor) / (1 - floor))), {"likeness": likeness, "floor": round(floor, 4)}


# ---- plots

DRIVER = r"""
import os, random, sys
os.environ["MPLBACKEND"] = "Agg"
import matplotlib
matplotlib.use("Agg", force=True)
import matplotlib.pyplot as plt
import numpy
from matplotlib.figure import Figure

random.seed(0)
numpy.random.seed(0)
plain, taken = Figure.savefig, []

def keep(figure, name):
    width, height = figure.get_size_inches()
    dpi = max(10.0, min(100.0, 1200.0 / max(width, height, 0.1)))
    plain(figure, name, format="png", dpi=dpi, facecolor="white", bbox_inches=None)

def savefig(figure, *arguments, **options):
    taken[:] = [figure]
    keep(figure, "/work/picture.png")

if sys.argv[1] == "ready":
    plt.plot([0, 1])
    keep(plt.gcf(), "/work/picture.png")
else:
    Figure.savefig = savefig
    with open("/work/program.py", encoding="utf-8") as file:
        source = file.read()
    try:
        exec(compile(source, "program.py", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        if end.code not in (None, 0):
            raise
    if not taken and plt.get_fignums():
        savefig(plt.gcf())
    if not taken:
        sys.exit("no figure was drawn")
    if sys.argv[1] == "gold":
        size = taken[0].get_size_inches()
        plt.close("all")
        matplotlib.rcdefaults()
        empty = plt.figure(figsize=size)
        empty.add_subplot()
        keep(empty, "/work/empty.png")
"""
MOST_PNG = 8 * 2**20
WAITS = 20  # times the processor time, by the clock
SITE = "/opt/site"


class _Failed(Exception):
    """The machinery failed, not the program."""


def program_of(reply: str) -> str:
    """The last fenced program of a reply, or all of it."""
    fences = re.findall(r"```(?:python3?|py)?[^\S\n]*\n(.*?)(?:```|\Z)", reply, re.DOTALL)
    return fences[-1] if fences else reply


def _run(source: str, role: str, seconds: float) -> tuple[dict[str, bytes], str, float]:
    """(pictures by name, why there is none, processor time). Raises _Failed."""
    from agent.sandbox import Limits, SandboxError, Spec, sandbox

    limits = Limits(wall_s=WAITS * seconds, cpu_s=seconds, memory_mb=2048, pids=32, disk_mb=64, output_kb=64)
    env = {"PYTHONPATH": SITE, "MPLCONFIGDIR": "/work/.matplotlib", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    try:
        with sandbox(spec=Spec(limits=limits, binds={SITE: str(_site())}, env=env)) as box:
            files = {"driver.py": DRIVER.encode(), "program.py": source.encode("utf-8", "replace")}
            if role != "ready":
                files |= _cache()
            box.write(files)
            result = box.exec(["python3", "-B", "/work/driver.py", role])
            if result.status == "infra_error":
                raise _Failed(result.stderr.decode(errors="replace")[-300:])
            if result.status != "ok":
                last = result.stderr.decode(errors="replace").strip().splitlines()[-1:]
                return {}, f"{result.status}: {last[0][:300] if last else ''}", result.cpu_s
            pictures = {}
            names = {"ready": ["picture.png"], "gold": ["picture.png", "empty.png"], "answer": ["picture.png"]}
            for name in names[role]:
                try:
                    pictures[name] = box.read(name, MOST_PNG)
                except ValueError as error:
                    return {}, str(error), result.cpu_s
            if role == "ready":
                listing = box.exec(["python3", "-c", "import os; print(os.listdir('/work/.matplotlib'))"])
                for name in ast.literal_eval(listing.stdout.decode() or "[]"):
                    pictures[f".matplotlib/{name}"] = box.read(f".matplotlib/{name}", MOST_PNG)
            return pictures, "", result.cpu_s
    except (SandboxError, TimeoutError) as error:
        raise _Failed(str(error) or "the sandbox did not answer in time") from None


def _site() -> Path:
    """The folder that holds matplotlib and what it imports."""
    import matplotlib

    return Path(matplotlib.__file__).resolve().parent.parent


@lru_cache(maxsize=1)
def _cache() -> dict[str, bytes]:
    """matplotlib's list of fonts, which it takes seconds to make: once, in a sandbox. Raises _Failed when matplotlib
    does not work there, as with a Python of another version."""
    pictures, why, _ = _run("", "ready", 60.0)
    if why:
        raise _Failed(f"matplotlib does not run in the sandbox: {why}")
    return {name: content for name, content in pictures.items() if name.endswith(".json")}


class _Plot:
    """A gold's picture, what empty axes of its size look like, and the processor time that it took."""

    def __init__(self, picture: Picture, empty: Picture, cpu_s: float):
        self.picture, self.empty, self.cpu_s = picture, empty, cpu_s


@lru_cache(maxsize=256)
def _gold_plot(gold: str, size: int) -> _Plot:
    """Raises ValueError for a program that draws nothing, or fails."""
    pictures, why, cpu_s = _run(program_of(gold), "gold", 60.0)
    if why:
        raise ValueError(f"plot: the gold program draws nothing: {why}")
    picture, empty = _opened(pictures["picture.png"], size), _opened(pictures["empty.png"], size)
    if not (ink(picture) > 0.1).any():
        raise ValueError(f"plot: the gold program draws an empty page: {gold[:80]!r}")
    return _Plot(picture, empty, cpu_s)


def _time(data: Mapping[str, Any]) -> float:
    seconds = data.get("seconds", 10)
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds <= 600:
        raise ValueError(f"seconds is processor time, above 0 and at most 600, got {seconds!r}")
    return float(seconds)


def plot_golds(gold: Any, data: Mapping[str, Any]) -> list[str]:
    """The gold said as an answer. Raises ValueError for what is no program."""
    if not isinstance(gold, str) or not gold.strip():
        raise ValueError(f"plot: the gold is a program, got {str(gold)[:80]!r}")
    return [f"```python\n{gold}\n```" if "```" not in gold else gold]


def plot(gold: str, data: Mapping[str, Any], said: str) -> tuple[float | None, dict[str, Any]]:
    """The grader. evidence: "likeness" by each metric, "floor", or "why" there is no picture."""
    size, metric = _settings(data)
    seconds = _time(data)
    source = program_of(said)
    if "import" not in source:
        return 0.0, {"why": "a program that imports nothing draws nothing"}
    try:
        wanted = _gold_plot(gold, size)
        pictures, why, cpu_s = _run(source, "answer", seconds + 5 * wanted.cpu_s)
    except _Failed as error:
        return None, {"error": str(error)}
    if why:
        return 0.0, {"why": why, "cpu_s": round(cpu_s, 2)}
    try:
        picture = _opened(pictures["picture.png"], size)
    except ValueError as error:
        return 0.0, {"why": str(error)}
    floor = metric(wanted.picture, wanted.empty)
    if floor > 0.98:  # the gold itself is next to empty axes: nothing to tell apart
        floor = 0.0
    return _compared(wanted.picture, picture, metric, floor)
