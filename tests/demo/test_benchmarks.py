"""The tab "Benchmarks": questions asked live through evals.live, the score, and every miss.

pytest tests/demo/test_benchmarks.py
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent import sandbox
from demo import benchmarks
from demo.models import Models, Settings
from evals import live
from evals.graders import Verdict
from evals.suites import names
from evals.world import answer, summarize
from evals.world import questions as of_family
from fusion.generate import Reply, StreamEvent, Usage
from fusion.parse import ToolCall
from world import MAKERS


@pytest.fixture(scope="module")
def models() -> Models:
    return Models(["nano"])


class Always:
    """A model that gives the same reply to everything."""

    names = ("always",)

    def __init__(self, text: str, finish: str = "stop", calls: tuple[ToolCall, ...] = ()) -> None:
        self.text, self.finish, self.calls = text, finish, calls
        self.asked = self.closed = 0

    def stream(self, name: str, messages: Any, tools: Any, settings: Settings) -> Iterator[StreamEvent]:
        self.asked += 1
        try:
            yield StreamEvent("thinking", "hm <b>")
            yield StreamEvent("text", self.text)
            reply = Reply(self.text, "hm <b>", self.calls, Usage(5, 3, 0, 1), self.finish)  # type: ignore[arg-type]
            yield StreamEvent("end", reply=reply)
        finally:
            self.closed += 1


def last(models: Any, *what: Any) -> dict[str, Any]:
    """What each part of the tab shows at the end."""
    shown: dict[str, Any] = {}
    for page in benchmarks.watch(models, *what):
        shown |= {name: part for name, part in vars(page).items() if part is not None}
    return shown


def test_every_family_is_offered() -> None:
    assert set(benchmarks.FAMILIES) == set(MAKERS)
    assert set(benchmarks.SUITES) <= set(names())


def test_the_score_is_that_of_moonkit_score(models: Models) -> None:
    """The same questions, asked one by one or in a batch by evals.world: the same answers and the same numbers."""
    kimi = models.kimi("nano")
    for family in ("picture", "tool"):
        *_, report = benchmarks.reports(models, benchmarks.Wanted(family, "nano", 3, None, 7, 64))
        wanted = summarize(family, answer(kimi, of_family(family, 3, "heldout", 7), max_new_tokens=64))
        assert (report["right"], report["graded"]) == (wanted.right, wanted.n)
        assert report["interval"] == pytest.approx(wanted.interval, abs=1e-4)
        assert (report["chance"], report["majority"]) == (wanted.chance, wanted.majority)
        assert report["over"] and len(report["misses"]) == wanted.n - wanted.right


def test_the_page_shows_score_and_every_miss() -> None:
    shown = last(Always("no <script>"), "picture", "always", 5, 1)
    assert shown["over"] and "0.0 %" in shown["score"] and "0 of 5 right" in shown["score"]
    assert "95 % interval 0.0 to" in shown["score"] and "chance" in shown["score"]
    assert "majority" not in shown["score"], "of so few questions it says nothing"
    many = last(Always("no"), "picture", "always", benchmarks.FEW, 1)
    assert "majority" in many["score"]
    assert shown["misses"].count("<article") == 5
    assert shown["misses"].count("<img") == 5, "each with its picture"
    assert "<script" not in shown["misses"] + shown["now"] and "hm &lt;b&gt;" in shown["misses"]
    for _, turn in ((s, s.turns[n]) for s, n in of_family("picture", 5, "heldout", 7, 1)):
        assert turn.answer in shown["misses"]
    assert len(re.findall(r'<li class="wrong"', shown["score"])) == 5


def test_misses_only_grow_at_their_end() -> None:
    """So that a page gets each miss once, and what a reader has opened stays where it is."""
    before = ""
    for page in benchmarks.watch(Always("no"), "picture", "always", 4, 1):  # type: ignore[arg-type]
        if page.misses and "<article" in page.misses:
            assert page.misses.startswith(before)
            before = page.misses


def test_words_come_before_the_verdict_and_a_picture_is_sent_once() -> None:
    pages = list(benchmarks.watch(Always("no"), "clip", "always", 2, 1))  # type: ignore[arg-type]
    assert sum("<img" in (page.shown or "") for page in pages) == 2
    assert not any("<img" in (page.now or "") for page in pages)


def test_a_reply_that_was_cut_off_or_stopped_is_counted_apart() -> None:
    shown = last(Always("no", "length"), "picture", "always", 3, 1)
    assert "3 cut off at 256 tokens" in shown["score"] and "longest length" in shown["misses"]
    shown = last(Always("no", "halted"), "picture", "always", 3, 1)
    assert "nothing graded yet" in shown["score"] and "3 not graded" in shown["score"]


def test_a_tool_s_right_call_gets_its_result_and_a_wrong_one_ends() -> None:
    model = Always("5", "tool_calls", (ToolCall("functions.calculator:0", "calculator", '{"x": 1}', 0),))
    (done,) = [e for e in live.ask(live.questions("tool", 1)[0], lambda m, t: model.stream("", m, t, Settings()))
               if isinstance(e, live.Graded)]  # fmt: skip
    assert model.asked == 1 and not done.right
    question = live.questions("tool", 1)[0]
    call = question.rounds[0]["tool_calls"][0]
    right = ToolCall(call["id"], call["function"]["name"], call["function"]["arguments"], 0)
    heard: list[int] = []

    def stream(messages: Any, tools: Any) -> Iterator[StreamEvent]:
        heard.append(len(messages))
        calls = (right,) if len(heard) == 1 else ()
        text = "" if calls else question.gold
        yield StreamEvent("end", reply=Reply(text, "", calls, Usage(1, 1), "tool_calls" if calls else "stop"))

    *_, done = live.ask(question, stream)
    assert isinstance(done, live.Graded) and done.right and heard == [heard[0], heard[0] + 2]


def test_programs_run_in_a_sandbox_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    assert live.runs_code("function") and live.runs_code("repair") and not live.runs_code("picture")

    def none(*_: Any, **__: Any) -> None:
        raise sandbox.SandboxError("no sandbox works here. bwrap: not installed")

    monkeypatch.setattr(sandbox, "backend", none)
    assert "no sandbox" in benchmarks.remark_on("function") and benchmarks.remark_on("picture") == ""
    model = Always("def f(xs): return xs")
    shown = last(model, "function", "always", 2, 1)
    assert "no sandbox" in shown["now"] and model.asked == 0 and shown["over"]


def test_a_program_is_judged_by_its_tests() -> None:
    try:
        sandbox.backend("auto")
    except sandbox.SandboxError:
        pytest.skip("no sandbox here")
    question = live.questions("function", 1)[0]
    for text, score in ((question.gold, 1.0), ("def f(x):\n    return 'no such value'", 0.0)):
        verdict = question.grade(Reply(text, "", (), Usage(1, 1), "stop"))
        assert verdict.score == score and "of" in verdict.evidence


def test_missing_data_is_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("evals.rows.places", lambda name: [tmp_path / name])
    for suite in benchmarks.SUITES:
        assert "not on this machine" in benchmarks.remark_on(suite)
        shown = last(Always("no"), suite, "always", 2)
        assert "not on this machine" in shown["now"] and shown["over"]


@pytest.mark.parametrize("suite", ["kimi_mnist", "kimi_gsm8k"])
def test_a_suite_is_asked_and_judged_by_evals(data: Path, suite: str) -> None:
    if live.missing(suite):
        pytest.skip(live.missing(suite))
    made = live.questions(suite, 2)
    *_, right = live.ask(made[0], lambda m, t: Always(made[0].gold).stream("", m, t, Settings()))
    assert isinstance(right, live.Graded) and right.right and right.question.messages[-1]["role"] == "user"
    shown = last(Always("-"), suite, "always", 2)
    assert "0 of 2 right" in shown["score"] and shown["misses"].count("<article") == 2


@pytest.mark.parametrize(
    "what",
    [
        ("nonsense", "nano", 5),
        ("picture", "nano", 0),
        ("picture", "nano", 10**6),
        ("picture", "nano", 5, 9),
        ("picture", "nano", 5, 1, -1),
        ("picture", "nano", 5, 1, 7, 0),
        ("picture", "nobody", 5),
    ],
)
def test_what_cannot_be_asked_is_one_sentence(models: Models, what: tuple[Any, ...]) -> None:
    shown = last(models, *what)
    assert 'role="alert"' in shown["now"] and shown["over"] and "Traceback" not in shown["now"]


def test_who_leaves_ends_the_run() -> None:
    model = Always("no")
    pages = benchmarks.watch(model, "picture", "always", 50, 1)  # type: ignore[arg-type]
    for _ in range(6):
        next(pages)
    pages.close()
    assert model.asked == model.closed and model.asked < 5


def test_no_item_that_failed_is_in_the_share() -> None:
    question = live.questions("picture", 1)[0]
    reply = Reply("yes", "", (), Usage(1, 1), "stop")
    right = live.Graded(question, reply, Verdict(1.0), 0.1)
    failed = live.Graded(question, reply, Verdict(None, "infra_error", {"error": "<b>"}), 0.1)
    assert live.standing([failed]) is None
    made = live.standing([right, failed])
    assert made and (made.n, made.share, made.failed) == (1, 1.0, 1)
    assert "&lt;b&gt;" in benchmarks.miss(failed, 1)
