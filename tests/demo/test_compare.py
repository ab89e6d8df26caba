"""The tab "Compare": two sides, token by token, with what differs between them.

pytest tests/demo/test_compare.py
"""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from demo import compare
from demo.guard import Caps
from demo.models import PROFILES, Models, Settings
from fusion.generate import Reply, StreamEvent, Usage

VISITOR = "1" * 32
OWN = next(iter(PROFILES))
LEFT = ["nano", -1, 0.0, 1.0, 48, 0, OWN, True, ""]


@pytest.fixture(scope="module")
def models() -> Models:
    return Models(["nano", "untrained:tiny"])


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOONKIT_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "passing"))
    (tmp_path / "passing").mkdir()
    return tmp_path / "passing"


def shown(models: Any, message: Any, left: Sequence[Any], right: Sequence[Any]) -> tuple[str, str, str]:
    """Left, right and what differs, at the end."""
    parts: list[str] = ["", "", ""]
    over = False
    for page in compare.watch(models, Caps(), VISITOR, message, left, right):
        parts = [old if new is None else new for old, new in zip(parts, page[:3], strict=True)]
        over = page[3]
    assert over
    return parts[0], parts[1], parts[2]


@dataclass
class Scripted:
    """Two models that say what they are told; `seen` is the order of their pieces, `closed` who was closed."""

    said: dict[str, list[str]]
    names: tuple[str, ...] = ("a", "b")

    def __post_init__(self) -> None:
        self.seen: list[str] = []
        self.closed: list[str] = []

    def kimi(self, name: str) -> None:
        if name not in self.said:
            raise ValueError(f"no model {name!r} here")

    def stream(
        self, name: str, messages: Any, tools: Any, settings: Settings, stop: threading.Event | None = None
    ) -> Iterator[StreamEvent]:
        text = ""
        try:
            for piece in self.said[name]:
                if piece == "!":
                    raise ValueError("the context of this model is 4 tokens")
                self.seen.append(name)
                text += piece
                yield StreamEvent("text", piece)
            yield StreamEvent("end", reply=Reply(text, "", (), Usage(3, len(self.said[name])), "stop"))
        finally:
            self.closed.append(name)


def sides(scripted: Scripted) -> list[compare.Side]:
    return [compare.Side(name) for name in scripted.names]


ASKED = [{"type": "text", "text": "?"}]


def test_both_answer_and_the_difference_is_named(models: Models, files: Path, state: Path) -> None:
    (state / "a.png").write_bytes((files / "picture.png").read_bytes())
    right = [*LEFT]
    right[1] = 0
    message = {"text": "how many shapes are there?", "files": [str(state / "a.png")]}
    left_card, right_card, table = shown(models, message, LEFT, right)
    for card in (left_card, right_card):
        assert "tokens/s" in card and "of pictures" in card and "finished" in card
    assert "<details" in left_card and "<details" not in right_card, "only the left side thought"
    assert "thinking budget" in table and "no limit" in table and "answers at once" in table
    assert table.count('scope="row"') == 1


def test_two_models_may_be_compared(models: Models) -> None:
    right = ["untrained:tiny" if "untrained:tiny" in models.names else models.names[1], *LEFT[1:]]
    left_card, right_card, table = shown(models, {"text": "what is 1 plus 1?", "files": []}, LEFT, right)
    assert '<th scope="row">model</th>' in table and models.names[1] in right_card
    assert models.names[0] in left_card


def test_pieces_of_the_two_sides_alternate() -> None:
    scripted = Scripted({"a": ["1", "2", "3"], "b": ["4", "5", "6", "7", "8"]})
    last = dict(compare.side_by_side(scripted, ASKED, sides(scripted)))  # type: ignore[arg-type]
    assert scripted.seen == ["a", "b", "a", "b", "a", "b", "b", "b"]
    assert (last[0].text, last[1].text) == ("123", "45678")
    assert last[1].reply and last[1].reply.usage.completion_tokens == 5 and last[1].rate


def test_one_side_fails_and_the_other_goes_on() -> None:
    scripted = Scripted({"a": ["1", "!"], "b": ["2", "3", "4"]})
    last = dict(compare.side_by_side(scripted, ASKED, sides(scripted)))  # type: ignore[arg-type]
    assert last[0].error == "The context of this model is 4 tokens." and last[0].over
    assert last[1].text == "234" and last[1].reply
    scripted = Scripted({"b": ["2"]})
    last = dict(compare.side_by_side(scripted, ASKED, sides(scripted)))  # type: ignore[arg-type]
    assert "No model" in last[0].error and last[1].text == "2"
    card = compare.reply_card("Left", compare.Side("a"), last[0])
    assert 'role="alert"' in card


def test_who_leaves_closes_both() -> None:
    scripted = Scripted({"a": ["1"] * 9, "b": ["2"] * 9})
    pieces = compare.side_by_side(scripted, ASKED, sides(scripted))  # type: ignore[arg-type]
    for _ in range(3):
        next(pieces)
    assert not scripted.closed
    pieces.close()
    assert sorted(scripted.closed) == ["a", "b"]


def test_what_a_model_says_is_escaped() -> None:
    evil = "</div><script>alert(1)</script>```py\n<img src=x onerror=alert(2)>\n```"
    scripted = Scripted({"a": [evil], "b": [evil]})
    last = dict(compare.side_by_side(scripted, ASKED, sides(scripted)))  # type: ignore[arg-type]
    last[0].thinking, last[0].calls = evil, [evil]
    card = compare.reply_card("Left", compare.Side(evil), last[0])
    assert "<script" not in card and "<img" not in card and card.count("&lt;script&gt;") == 4
    table = compare.difference_table([compare.Side("a"), compare.Side("b", Settings(system=evil))], [evil])
    assert "<script" not in table and "<img" not in table


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (6, "none", "no chat format"),
        (0, "nobody", "no model"),
        (4, 0, "max_new_tokens"),
        (3, 7, "top_p"),
    ],
)
def test_wrong_controls_are_one_sentence(models: Models, place: int, value: Any, said: str) -> None:
    wrong = [*LEFT]
    wrong[place] = value
    left_card, right_card, table = shown(models, {"text": "1?", "files": []}, wrong, LEFT)
    told = left_card + table
    assert 'role="alert"' in told and said.lower() in told.lower()
    if place != 6:
        assert "finished" in right_card or "cut off" in right_card, "the other side answers all the same"


def test_same_settings_are_said_to_be_the_same() -> None:
    one = compare.Side("nano", Settings())
    assert "same model and settings" in compare.difference_table([one, one])
    assert not compare.differences([one, one])
    other = replace(one, settings=Settings(0.5, 0.9, 64, 8, 1, False, True, "be brief", "k2_5"))
    assert len(compare.differences([one, other])) == 9, "every field of Settings has a name on the page"


def test_programs_get_plain_dicts(models: Models) -> None:
    message, short = {"text": "what is 61 minus 16?", "files": []}, {"max_new_tokens": 8}
    *_, last = compare.reports(models, Caps(), VISITOR, message, short, short | {"thinking_budget": 0})
    assert last["over"] and last["left"]["completion_tokens"] and last["right"]["text"]
    assert {each["what"] for each in last["differences"]} == {"thinking budget"}
    *_, last = compare.reports(models, Caps(), VISITOR, message, {"temperature": -1}, short)
    assert "temperature must be" in last["left"]["error"].lower() and last["right"]["completion_tokens"]
    with pytest.raises(ValueError, match="nonsense"):
        next(compare.reports(models, Caps(), VISITOR, message, {"nonsense": 1}, None))
    with pytest.raises(ValueError, match="Write a question"):
        next(compare.reports(models, Caps(), VISITOR, {"text": "", "files": []}, None, None))
