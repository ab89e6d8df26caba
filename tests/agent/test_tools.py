"""Tools: arithmetic that always ends, crops, programs in a sandbox; what a model gets wrong is a result.

pytest tests/agent/test_tools.py
"""

import base64
import io
import json
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from agent.calculate import FUNCTIONS, LONGEST, CannotCalculate, calculate
from agent.sandbox import Limits, SandboxError
from agent.tools import MOST_SHOWN, Tool, calculator, checked, crop, open_picture, pictures, python, specified
from tests.sandboxes import sandboxed

# ---- arithmetic


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4613+8777", "13390"),
        ("0.1+0.2", "0.3"),
        ("2/3", "0.666666666666667 (exactly 2/3)"),
        ("1/3+1/6", "0.5"),
        ("-2^2", "-4"),
        ("2^-1", "0.5"),
        ("2^3^2", "512"),
        ("2**10", "1024"),
        ("7//2", "3"),
        ("-7//2", "-4"),
        ("-7 % 3", "2"),
        ("20!/18!", "380"),
        ("200*5%", "10"),
        ("50%", "0.5"),
        ("0x1F + 0b11", "34"),
        ("1_000 + .5 + 2.", "1002.5"),
        ("3² × 2 ÷ 6 − 1", "2"),
        ("√2 * √2 == 2", "true"),
        ("sqrt(1/4)", "0.5"),
        ("8^(1/3)", "2"),
        ("cbrt(-27)", "-3"),
        ("sqrt(2)", "1.4142135623731 (rounded)"),
        ("math.sin(pi)", "0"),
        ("sin(1e1000) < 2", "true"),
        ("log(8, 2)", "3"),
        ("log10(1e4000)", "4000"),
        ("round(2.5) + round(-2.675, 2)", "0.32"),
        ("floor(-2.5) + ceil(pi) + trunc(-2.7)", "-1"),
        ("max(1, pi, 3) > 3.14", "true"),
        ("gcd(12, 18) + lcm(4, 6)", "18"),
        ("comb(5, 2) * perm(5, 2)", "200"),
        ("hypot(3, 4) + mean(1, 2, 3)", "7"),
        ("1 == 1.0", "true"),
        ("degrees(pi)", "180 (rounded)"),
        ("10^30", "1" + "0" * 30),
    ],
)
def test_values(text: str, value: str) -> None:
    assert calculate(text) == value


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("9**9**9**9", "too large"),
        ("factorial(10**9)", "0 to 1500"),
        ("1500!!", "0 to 1500"),
        ("(-2)^0.5", "no real value"),
        ("comb(10^6, 500000)", "more digits"),
        ("1e999999999", "too large"),
        ("1e4000*1e4000", "digits"),
        ("exp(exp(exp(9)))", "too large"),
        ("(2^0.5)^1e4000", "too large"),
        ("sin(10^4000)", "too large"),
        ("tan(pi/2)", "no value"),
        ("floor(exp(3000))", "made whole"),
        ("1/0", "division by zero"),
        ("0^-1", "division by zero"),
        ("5 % -3", "percentage"),
        ("(" * 300 + "1" + ")" * 300, "in one another"),
        ("-" * 300 + "1", "in one another"),
        ("2^" * 300 + "1", "in one another"),
        ("sqrt " * 190 + "1", "in one another"),
        ("1" * (LONGEST + 1), "characters"),
        ("٣+4", "٣"),
        ("１+1", "１"),
        ("1,000", "write 1000"),
        ("2(3)", "write *"),
        ("2pi", "write *"),
        ("(1", ") is missing"),
        ("1+", "ends too early"),
        ("", "empty"),
        ("\0", "nothing"),
        ("__import__('os').system('ls')", "nothing that"),
        ("f.__class__", "no function"),
        ("min()", "takes"),
        ("sin", "brackets"),
        ("(1 < 2) + 1", "missing"),
    ],
)
def test_what_cannot_be_calculated_is_a_sentence(text: str, why: str) -> None:
    began = time.monotonic()
    with pytest.raises(CannotCalculate) as caught:
        calculate(text)
    assert why in str(caught.value) and len(str(caught.value)) < 600
    assert time.monotonic() - began < 2


@settings(max_examples=40)
@given(a=st.integers(-(10**30), 10**30), b=st.integers(-(10**9), 10**9), c=st.integers(1, 10**6))
def test_whole_numbers_are_exact(a: int, b: int, c: int) -> None:
    assert calculate(f"({a})*({b})-{c}") == str(a * b - c)
    assert calculate(f"({a})//{c}*{c} + ({a})%{c} == {a}") == "true"
    exact = Fraction(a, c)
    assert calculate(f"({a})/{c} == {exact.numerator}/{exact.denominator}") == "true"


@settings(max_examples=40)
@given(x=st.floats(-700, 700), name=st.sampled_from("sin cos atan exp tanh".split()))
def test_functions_agree_with_floats(x: float, name: str) -> None:
    said = calculate(f"{name}({x:.12f})")
    value = float(said.split()[0])
    assert value == pytest.approx(getattr(math, name)(float(f"{x:.12f}")), rel=1e-9, abs=1e-12)


signs = st.sampled_from([*"0123456789.+-*/%^!(),<>=eE ", "**", "//", "pi", "1e4000", *FUNCTIONS])


@given(text=st.one_of(st.text(max_size=60), st.lists(signs, max_size=40).map("".join)))
def test_no_expression_does_more_than_give_a_sentence_soon(text: str) -> None:
    began = time.monotonic()
    try:
        assert len(calculate(text)) < 400
    except CannotCalculate as error:
        assert str(error)
    assert time.monotonic() - began < 5


def test_the_largest_that_is_calculated_takes_no_time() -> None:
    began = time.monotonic()
    for each in ("1499!/1498!", "7^5000 % 10^9", "*".join(["(1e4000+1)^(1/199)"] * 8), "sum(" + "1499!," * 60 + "1)"):
        calculate(each)
    assert time.monotonic() - began < 5


def test_threads_do_not_disturb_each_other() -> None:
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(calculate, ["sin(1) + exp(2) + ln(3) + 2^0.3"] * 200))
    assert found == {calculate("sin(1) + exp(2) + ln(3) + 2^0.3")}


# ---- arguments


def test_arguments_are_checked_against_the_schema() -> None:
    run = calculator().run
    assert run({"expression": "2^10"}).content == "1024"
    assert run({"expression": "1/0"}).content == "error: division by zero"
    for arguments, why in [
        ({}, "needs 'expression'"),
        ({"expression": None}, "needs 'expression'"),
        ({"expression": 3}, "must be a string, got 3"),
        ({"expression": ["x" * 9999]}, "must be a string"),
        ({"expression": 10**5000}, "must be a string, got a very large number"),
        ({"expression": "1", "x" * 9999: 1}, "no argument"),
        ([], "a JSON object"),
        (None, "a JSON object"),
        ("1+1", "a JSON object"),
    ]:
        result = run(arguments)  # type: ignore[arg-type]
        assert not result.ok and why in result.text and len(result.text) < 500
    function = specified("f", "", ["n"], n={"type": "integer"}, how={"type": "string", "enum": ["a", "b"]})["function"]
    assert checked(function, {"n": 3.0, "how": None}) == {"n": 3}
    for wrong in ({"n": True}, {"n": 3.5}, {"n": 1, "how": "c"}):
        assert "error" in Tool("f", {"function": function}, lambda arguments, stop: "").run(wrong).text


# ---- crop


def picture(wide: int = 200, high: int = 100) -> Image.Image:
    """Red left, blue right."""
    made = Image.new("RGB", (wide, high), (255, 0, 0))
    made.paste((0, 0, 255), (wide // 2, 0, wide, high))
    return made


def shown(result: Any) -> Image.Image:
    url = result.content[1]["image_url"]["url"]
    return Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))


def box(*sides: float, **more: Any) -> dict[str, Any]:
    return {**dict(zip(("x1", "y1", "x2", "y2"), sides, strict=True)), **more}


def test_a_crop_is_a_part_of_a_message(tmp_path: Path) -> None:
    from fusion.template import check_messages
    from moonvit.image import load_image

    picture().save(tmp_path / "a.png")
    tool = crop([tmp_path / "a.png"])
    result = tool.run(box(500, 0, 1000, 1000))
    assert result.ok and result.text.startswith("crop.png 100x100, picture 2: pixels (100, 0) to (200, 100)")
    assert shown(result).getpixel((5, 5)) == (0, 0, 255) and shown(result).size == (448, 448)
    check_messages([{"role": "tool", "tool_call_id": "functions.crop:0", "content": result.content}])
    url = result.content[1]["image_url"]["url"]  # type: ignore[index]
    assert load_image(url).size == (448, 448)
    json.dumps(result.content)
    for swapped in (box(120, 30, 80, 10, units="pixels"), box(80, 30, 120, 10, units="pixels")):
        assert tool.run(swapped | {"image": 1}).text.startswith("crop.png 40x20")
    part = tool.run(box(0, 0, 500, 500, image=2))  # the first crop: all blue
    assert part.text.startswith("crop.png 50x50") and shown(part).getpixel((0, 0)) == (0, 0, 255)
    reaches_out = tool.run(box(-50, -50, 30, 20, units="pixels", image=1))
    assert reaches_out.text.startswith("crop.png 30x20")
    one = tool.run(box(100.2, 50.2, 100.4, 50.4, units="pixels", image=1))
    assert one.text.startswith("crop.png 1x1") and shown(one).size == (8, 8)


def test_boxes_that_hold_nothing_are_told() -> None:
    tool = crop([picture()])
    for sides, why in [
        (box(10, 10, 10, 50), "no area"),
        (box(300, 0, 400, 50, units="pixels"), "outside the picture of 200x100"),
        (box(-90, 0, -5, 50), "outside"),
        (box(1500, 0, 1900, 50), "units='pixels'"),
        (box(0, 0, 1e300, 1e300, units="pixels"), "far outside"),
        (box(0, 0, 10**400, 5), "far outside"),
        (box(0, 0, float("nan"), 5), "finite"),
        (box(0, 0, float("inf"), 5), "finite"),
        (box(0, 0, 5, 5, image=2), "from 1 to 1, got 2"),
        (box(0, 0, 5, 5, image=0), "from 1 to 1"),
        (box(0, 0, 5, 5, image=10**400), "from 1 to 1, got a very large number"),
        (box(0, 0, 5, 5, units="miles"), "one of thousandths, pixels"),
        ({"x1": 1, "y1": 1, "x2": 2}, "needs 'y2'"),
        (box(0, 0, 5, "5"), "must be a number"),  # type: ignore[arg-type]
        (box(0, 0, 5, True), "must be a number"),
    ]:
        result = tool.run(sides)
        assert not result.ok and why in result.text, (sides, result.text)
    assert "no picture" in crop([]).run(box(0, 0, 5, 5)).text


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_pictures_are_opened_as_a_model_sees_them(tmp_path: Path) -> None:
    turned = picture()
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert open_picture(tmp_path / "turned.jpg").size == (200, 100)
    deep = Image.new("I;16", (4, 4), 65535 // 2)
    deep.save(tmp_path / "deep.png")
    assert 126 <= open_picture(str(tmp_path / "deep.png")).getpixel((0, 0))[0] <= 128
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    big = tmp_path / "bomb.png"
    Image.new("1", (20_000, 8_000)).save(big)
    tool = crop([tmp_path / "broken.png", tmp_path / "gone.png", "http://example.org/a.png", big, "data:,x", b"GIF89a"])
    for number in range(1, 7):
        result = tool.run(box(0, 0, 5, 5, image=number))
        assert not result.ok and f"picture {number} cannot be opened" in result.text
        assert str(tmp_path) not in result.text
    large = crop([Image.new("RGB", (4000, 3000))]).run(box(0, 0, 1000, 1000))
    assert shown(large).width * shown(large).height <= MOST_SHOWN * 1.01 and "shown at" in large.text


def test_the_plain_forms_are_those_that_the_model_in_the_box_has_learned() -> None:
    from world.text import CALCULATOR, CROP, PYTHON

    tool = crop([picture()], plain=True)
    assert [calculator(True).specification, python(plain=True).specification] == [CALCULATOR, PYTHON]
    assert tool.specification == CROP
    assert tool.run(box(3, 4, 20, 300)).text.startswith("crop.png 17x96")


def test_the_pictures_of_a_conversation() -> None:
    messages: list[dict[str, Any]] = [
        {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "?"}],
        },
        {"role": "assistant", "content": "looking"},
        {"role": "tool", "content": [{"type": "image", "image": "b.png"}, {"type": "video", "video": "c.mp4"}]},
        {"role": "user", "content": [{"type": "image_url", "image_url": "d.png"}, {"type": "image", "image_url": "e"}]},
    ]
    assert pictures(messages) == ["a.png", "b.png", "d.png", "e"]


# ---- python


@sandboxed
def test_programs_run_in_a_sandbox_of_their_own() -> None:
    run = python(limits=Limits(wall_s=5, cpu_s=1, memory_mb=256, output_kb=16)).run
    assert run({"code": "x = 6\nprint(x)\nx * 7"}).content == "6\n42"
    assert run({"code": "open('a', 'w').write('1')"}).content == "1"
    assert "FileNotFoundError" in run({"code": "open('a')"}).text
    assert run({"code": "x = 1"}).text.startswith("(no output")
    for code, why in [
        ("def f():\n    return 1 / 0\nf()", 'File "<python>", line 3, in <module>'),
        ("1 +", "SyntaxError"),
        ("import sys; sys.exit(3)", "[exit code 3]"),
        ("while True: pass", "of processor time]"),
        ("x = 'x' * 10**9", "MemoryError"),
        ("import socket; socket.create_connection(('1.1.1.1', 80), 1)", "Error"),
        ("\ud800", "surrogates"),
        ("(" * 500, "[exit code 1]"),
        ("x" * 200_000, "at most"),
        ("raise BaseException('no')", "BaseException: no"),
    ]:
        result = run({"code": code})
        assert not result.ok and why in result.text, (code[:40], result.text[:300])
        assert "<string>" not in result.text
    long = run({"code": "import sys\nprint('a' * 7000)\nsys.stderr.write('b' * 7000)"})
    assert len(long.text) <= 8000 and long.text.endswith("b") and "left out" in long.text


@sandboxed
def test_a_program_can_be_stopped() -> None:
    stop = threading.Event()
    threading.Timer(0.5, stop.set).start()
    began = time.monotonic()
    result = python().run({"code": "import time; time.sleep(60)"}, stop)
    assert not result.ok and "stopped" in result.text and time.monotonic() - began < 8


def test_without_a_sandbox_a_call_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str = "auto", **options: Any) -> Any:
        raise SandboxError("no sandbox works here. bwrap: not installed")

    monkeypatch.setattr("agent.tools.backend", none)
    result = python().run({"code": "1"})
    assert not result.ok and result.text.startswith("error: programs cannot be run here: no sandbox works here")
