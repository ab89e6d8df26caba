"""Drawings and plots: the gold is 1, an empty page 0, near is more than far; nothing reaches out of a drawing.

pytest tests/evals/test_drawing.py
"""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evals import drawing
from evals.drawing import METRICS, draw, edges, pixels, program_of, read_svg, svg_of
from evals.graders import Task, grade
from tests.sandboxes import sandboxed
from world.scene import COLOURS
from world.svg import Shape, render, write

HOUSE = (
    '<svg xmlns="http://www.w3.org/2000/svg" width="24" height="24" viewBox="0 0 24 24">'
    '<rect x="4" y="10" width="16" height="12" fill="red"/><polygon points="2,10 22,10 12,2" fill="blue"/></svg>'
)


def score(said: str, gold: str = HOUSE) -> float:
    found = grade(Task("svg", gold, {"size": 128}), said).score
    assert found is not None
    return found


def test_the_same_drawing_in_other_words() -> None:
    assert score(f"```svg\n{HOUSE}\n```") == score(HOUSE) == score(f"Here:\n{HOUSE}\nDone.") == 1
    assert score(f"<svg><circle r='3'/></svg> no, rather {HOUSE}") == 1, "the last one counts"
    bare = HOUSE.replace(' xmlns="http://www.w3.org/2000/svg"', "").replace(' width="24" height="24"', "")
    assert score(bare) == 1
    twice = HOUSE.replace("0 0 24 24", "0 0 48 48").replace("<rect", '<g transform="scale(2)"><rect')
    assert score(twice.replace("</svg>", "</g></svg>")) > 0.99
    assert score(HOUSE.replace('fill="red"', 'style="fill:#f00"')) == 1


def test_near_is_better_than_far() -> None:
    shifted = score(HOUSE.replace('x="4"', 'x="4.5"'))
    other = score(HOUSE.replace("red", "green"))
    half = score(HOUSE.replace('<rect x="4" y="10" width="16" height="12" fill="red"/>', ""))
    far = score("<svg viewBox='0 0 24 24'><circle cx='4' cy='20' r='3'/></svg>")
    assert 1 > shifted > half > far and 0.3 < other < 0.95 and far < 0.2
    for blank in (
        "<svg viewBox='0 0 24 24'></svg>",
        '<svg viewBox="0 0 24 24"><rect width="24" height="24" fill="#fff"/></svg>',
    ):
        assert score(blank) == 0


LINKS = 'xmlns:xlink="http://www.w3.org/1999/xlink"'


@pytest.mark.parametrize(
    "said",
    [
        '<!DOCTYPE svg [<!ENTITY a "aaaa">]><svg viewBox="0 0 1 1"><text>&a;</text></svg>',
        '<svg viewBox="0 0 1 1"><!DOCTYPE x></svg>',
        "<svg viewBox='0 0 9 9'><image href='file:///etc/passwd' width='9' height='9'/></svg>",
        "<svg viewBox='0 0 9 9'><rect width='9' height='9' fill='url(http://a.b/c)'/></svg>",
        "<svg viewBox='0 0 9 9'><style>@import 'http://a.b/c';</style></svg>",
        f"<svg viewBox='0 0 9 9' {LINKS}><use xlink:href='file:///etc/passwd#a'/></svg>",
        "<svg viewBox='0 0 9 9'><script>alert(1)</script></svg>",
        "<svg viewBox='0 0 9 9'><rect onclick='x()'/></svg>",
        "<svg viewBox='0 0 9 9'><foreignObject/></svg>",
        "<svg viewBox='0 0 9 9'>" + "<g>" * 500 + "</g>" * 500 + "</svg>",
        "<svg viewBox='0 0 9 9'>" + "<g/>" * 5000 + "</svg>",
        "<svg viewBox='0 0 9 9'><g id='a'><use href='#b'/></g><g id='b'><use href='#a'/></g></svg>",
        "<svg viewBox='0 0 9 9'><g id='a0'><path d='M0 0h9'/></g>"
        + "".join(f"<g id='a{n + 1}'>{f'''<use href='#a{n}'/>''' * 10}</g>" for n in range(9))
        + "</svg>",
        "<svg viewBox='a b c d'></svg>",
        "<svg viewBox='0 0 0 0'><rect/></svg>",
        "<svg",
        "<svg></svg",
        "<svg viewBox='0 0 9 9'><g></svg>",
        "<svg viewBox='0 0 9 9'>" + "x" * 300_000 + "</svg>",
        "no drawing",
    ],
)
def test_hostile_drawings_score_nothing(said: str) -> None:
    verdict = grade(Task("svg", HOUSE, {"size": 64}), said)
    assert verdict.score == 0 and verdict.status == "graded"


def test_a_drawing_that_never_ends_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    workers = drawing.Workers("render", memory_mb=2048, seconds=1)
    monkeypatch.setattr(drawing, "WORKERS", workers)
    blur = '<filter id="f"><feTurbulence baseFrequency="0.01" numOctaves="9999999"/></filter>'
    many = '<rect width="9" height="9" filter="url(#f)"/>' * 20
    slow = f'<svg viewBox="0 0 9 9">{blur}{many}</svg>'
    verdict = grade(Task("svg", HOUSE, {"size": 64}), slow)
    assert verdict.score is not None and verdict.score < 0.5 and verdict.status == "graded"
    assert score(HOUSE) == 1
    workers.close()


def test_icons(data: Path) -> None:
    files = sorted((data / "feather_svg" / "icons").glob("*.svg"))
    icons = [file.read_text(encoding="utf-8") for file in files[::12]]
    pictures = [draw(icon, 128)[0] for icon in icons]
    metric = METRICS["picture"]
    for icon, picture in zip(icons, pictures, strict=True):
        assert grade(Task("svg", icon, {"size": 128}), icon).score == 1
        assert metric(picture, np.ones_like(picture)) == 0
    others = [metric(a, b) for at, a in enumerate(pictures) for b in pictures[:at]]
    assert np.mean(others) < 0.25 and np.quantile(others, 0.95) < 0.4


NUMBER = st.integers(1, 8).map(float)
SHAPES = st.lists(
    st.one_of(
        st.builds(Shape, st.just("circle"), st.sampled_from(list(COLOURS)), st.tuples(NUMBER, NUMBER, st.just(2.0))),
        st.builds(
            Shape,
            st.just("rect"),
            st.sampled_from(list(COLOURS)),
            st.tuples(NUMBER, NUMBER, st.just(3.0), st.just(2.0)),
        ),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=15, deadline=None)
@given(shapes=SHAPES)
def test_it_draws_what_the_world_draws(shapes: list[Shape]) -> None:
    """world/svg.py has its own names of colours: where a browser's differ, only the outlines are compared."""
    ours, _ = draw(write(shapes), 120, view="0 0 10 10")
    theirs = render(shapes, 120).astype(np.float32) / 255
    assert edges(ours, theirs) > 0.97


def test_likeness_is_one_only_for_the_same() -> None:
    a = np.ones((64, 64, 3), np.float32)
    a[10:20, 10:40] = 0
    b = a.copy()
    b[10:12, 10:12] = 1
    for name, metric in METRICS.items():
        assert metric(a, a) == 1 and 0 < metric(a, b) < 1, name
        assert metric(a, np.ones_like(a)) == 0, name
        pale = 1 - (1 - a) * np.float32(0.06)
        assert metric(pale, pale) == 1 and metric(pale, np.ones_like(a)) == 0, "pale ink is ink"
    red = a.copy()
    red[10:20, 10:40, 0] = 1
    assert pixels(a, red) == pytest.approx(2 / 3, abs=0.02)


def test_pieces() -> None:
    assert (
        svg_of("x <svg>1</svg> y <svg>2</svg>") == "<svg>2</svg>"
        and svg_of("```svg\n<svg>1</svg>\n```") == "<svg>1</svg>"
    )
    assert read_svg("<svg width='3' height='4px'/>")[1] == "0 0 3 4"
    assert program_of("```python\na\n```\n```python\nb\n```") == "b\n" and program_of("c") == "c"
    with pytest.raises(ValueError, match="no metric"):
        grade(Task("svg", HOUSE, {"metric": "taste"}), HOUSE)


# ---- plots

PLOT = "import matplotlib.pyplot as plt\nplt.plot([1, 4, 9, 2], 'r-o')\nplt.title('Sales')\nplt.savefig('plot.png')\n"


@sandboxed
def test_plots() -> None:
    task = Task("plot", PLOT, {"size": 128})

    def of(source: str) -> float:
        verdict = grade(task, f"```python\n{source}\n```")
        assert verdict.score is not None, verdict
        return verdict.score

    shown = PLOT.replace("plt.savefig('plot.png')", "plt.show()")
    assert of(shown) == 1, "a figure that is left open is taken"
    near = of(PLOT.replace("9, 2", "9, 3"))
    assert 1 > near > 0.3
    assert of("import matplotlib.pyplot as plt\nplt.plot([])") < 0.05, "empty axes are worth nothing"
    assert of("import os\nopen('/work/picture.png', 'w').write('x')\nos._exit(0)") == 0


@sandboxed
def test_plots_that_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="draws nothing"):
        grade(Task("plot", "import sys; sys.exit(3)"), PLOT)


def test_a_sandbox_that_fails_is_no_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise drawing._Failed("no sandbox works here")

    monkeypatch.setattr(drawing, "_run", fails)
    monkeypatch.setattr(drawing, "_gold_plot", lambda *_: fails())
    verdict = grade(Task("plot", PLOT + "# once more"), PLOT)
    assert (verdict.score, verdict.status) == (None, "infra_error")
