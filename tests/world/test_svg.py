"""Drawings: text and shapes are the same thing, pixels are where they should be, what is not drawn is refused.

pytest tests/world/test_svg.py
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from world.scene import COLOURS
from world.svg import MOST, Shape, read, render, similar, write

CIRCLE = Shape("circle", "red", (3, 4, 2))
RECT = Shape("rect", "blue", (6, 1, 3, 2))
TRIANGLE = Shape("polygon", "green", (1, 9, 5, 9, 3, 7))
LINE = Shape("line", "pink", (7, 5, 7, 9))
ALL = [CIRCLE, RECT, TRIANGLE, LINE]

number = st.integers(-20, 20).map(float) | st.integers(0, 400).map(lambda n: n / 4)
side = st.integers(1, 10).map(float)
colour = st.sampled_from(list(COLOURS))
shape = st.one_of(
    st.builds(lambda c, x, y, r: Shape("circle", c, (x, y, r)), colour, number, number, side),
    st.builds(lambda c, x, y, w, h: Shape("rect", c, (x, y, w, h)), colour, number, number, side, side),
    st.builds(lambda c, x, y, w, h: Shape("line", c, (x, y, x + w, y + h)), colour, number, number, side, number),
    st.builds(
        lambda c, n: Shape("polygon", c, tuple(v for xy in n for v in xy)),
        colour,
        st.lists(st.tuples(number, number), min_size=3, max_size=12),
    ),
)


@settings(deadline=None)  # shared machines stall
@given(shapes=st.lists(shape, max_size=MOST))
def test_what_is_written_is_read(shapes: list[Shape]) -> None:
    assert read(write(shapes)) == shapes
    assert render(shapes, 20).shape == (20, 20, 3)


@settings(deadline=None)  # shared machines stall
@given(
    text=st.text(max_size=80) | st.lists(st.sampled_from([*'<>/="', " ", "svg", "rect", "line", "x", "1"])).map("".join)
)
def test_reading_raises_value_errors_only(text: str) -> None:
    for one in (
        text,
        f"<svg>{text}</svg>",
        f"<svg><rect {text}/></svg>",
        f'<svg><polygon points="{text}" fill="red"/></svg>',
    ):
        try:
            read(one)
        except ValueError:
            continue


@pytest.mark.parametrize(
    "one, area",
    [
        (CIRCLE, np.pi * 4),
        (RECT, 6),
        (TRIANGLE, 4),
        (LINE, 4),
        (Shape("line", "red", (2, 2, 6, 5)), 5),
        (Shape("polygon", "red", (1, 1, 9, 1, 1, 9, 9, 9)), 32),  # crosses itself: two triangles
    ],
)
def test_area_and_place_of_pixels(one: Shape, area: float) -> None:
    pixels = render([one], 400)
    ink = (pixels == COLOURS[one.colour]).all(2)
    assert ink.sum() / 40**2 == pytest.approx(area, rel=0.01)
    assert (ink | (pixels == 255).all(2)).all()
    rows, columns = np.nonzero(ink)
    seen = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / 40
    np.testing.assert_allclose(seen, one.box, atol=0.06)


def test_the_last_shape_is_on_top() -> None:
    over = [Shape("rect", "red", (0, 0, 10, 10)), Shape("rect", "blue", (0, 0, 5, 10))]
    pixels = render(over, 10)
    assert (pixels[:, :5] == COLOURS["blue"]).all() and (pixels[:, 5:] == COLOURS["red"]).all()


def test_the_same_area_drawn_otherwise_is_the_same() -> None:
    corners = Shape("polygon", "blue", (6, 1, 9, 1, 9, 3, 6, 3))
    stroke = Shape("rect", "pink", (6.5, 5, 1, 4))
    assert np.array_equal(render([RECT], 60), render([corners], 60))
    assert np.array_equal(render([LINE], 60), render([stroke], 60))
    assert similar(write(ALL), write([stroke, TRIANGLE, corners, CIRCLE]))


@pytest.mark.parametrize("place", range(len(ALL)))
def test_every_wrong_number_colour_and_kind_is_seen(place: int) -> None:
    gold, one = write(ALL), ALL[place]
    wrong = [one._replace(colour="yellow"), Shape("rect", one.colour, (3, 4, 1, 1))]
    for i in range(len(one.numbers)):
        for step in (-1, 1):
            changed = (*one.numbers[:i], one.numbers[i] + step, *one.numbers[i + 1 :])
            wrong.append(one._replace(numbers=changed))
    for other in wrong:
        assert not similar(gold, write([*ALL[:place], other, *ALL[place + 1 :]])), other
    assert not similar(gold, write([*ALL[:place], *ALL[place + 1 :]]))
    assert not similar(gold, write([*ALL, Shape("circle", one.colour, (9, 9, 1))]))


def test_a_square_is_no_circle() -> None:
    assert not similar(write([CIRCLE]), write([Shape("rect", "red", (1, 2, 4, 4))]))


def test_nothing_is_not_similar_and_an_empty_gold_is_refused() -> None:
    assert not similar(write(ALL), write([])) and not similar(write(ALL), "")
    for gold in (write([]), write([Shape("rect", "red", (20, 20, 3, 3))])):
        with pytest.raises(ValueError, match="nothing is drawn"):
            similar(gold, write(ALL))


@pytest.mark.parametrize(
    "inside, reason",
    [
        ('<script src="x"/>', "not drawn"),
        ('<image href="file:///etc/passwd"/>', "not drawn"),
        ("<g></g>", "wanted a tag"),
        ("words", "wanted a tag"),
        ("&lol;", "wanted a tag"),
        ("<!-- -->", "wanted a tag"),
        ('<circle cx="3" cy="4" r="2"/>', "wants"),
        ('<circle cx="3" cx="4" cy="4" r="2" fill="red"/>', "each once"),
        ('<circle cx="3" cy="4" r="2" fill="red" opacity="0"/>', "wants"),
        ('<circle cx="3" cy="4" r="2" fill="url(x)"/>', "colour"),
        ('<circle cx="3" cy="4" r="0" fill="red"/>', "no area"),
        ('<rect x="1" y="1" width="-1" height="1" fill="red"/>', "no area"),
        ('<circle cx="1e3" cy="4" r="2" fill="red"/>', "plain numbers"),
        ('<circle cx="nan" cy="4" r="2" fill="red"/>', "plain numbers"),
        ('<circle cx="99999999" cy="4" r="2" fill="red"/>', "plain numbers"),
        ('<line x1="1" y1="1" x2="1" y2="1" stroke="red"/>', "ends where it starts"),
        ('<polygon points="1,1 2,2" fill="red"/>', "corners"),
        ('<polygon points="" fill="red"/>', "corners"),
        ('<rect x="1" y="1" width="1" height="1" fill="red"/>' * (MOST + 1), "more than"),
        (" " * 9000, "characters"),
    ],
)
def test_what_is_not_drawn_is_refused(inside: str, reason: str) -> None:
    text = f"<svg>{inside}</svg>"
    with pytest.raises(ValueError, match=reason):
        read(text)
    assert not similar(write(ALL), text)


@pytest.mark.parametrize(
    "text", ["", "<svg>", '<svg viewBox="0 0 20 20"></svg>', '<!DOCTYPE a [<!ENTITY b "c">]><svg></svg>']
)
def test_the_frame_is_svg_without_attributes(text: str) -> None:
    with pytest.raises(ValueError, match="without attributes"):
        read(text)
