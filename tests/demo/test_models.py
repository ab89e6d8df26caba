"""Models of a page: names, turns, stopping, formats.

python -m pytest tests/demo/test_models.py
"""

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, get_args

import pytest

from demo.models import PROFILES, Models, Settings, Turns
from fusion.config import Profile

ASK = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def models() -> Models:
    return Models(["nano", "untrained:tiny"])


def said(models: Models, question: str, settings: Settings, name: str = "nano", **more: Any) -> Any:
    events = list(models.stream(name, [{"role": "user", "content": question}], None, settings, **more))
    assert [event.kind for event in events].count("end") == 1 and events[-1].kind == "end"
    return events[-1].reply


def test_names_are_short_and_differ(tmp_path: Path) -> None:
    for parent in ("a", "b"):
        (tmp_path / parent / "model").mkdir(parents=True)
    models = Models(["nano", "org/nano", str(tmp_path / "a" / "model"), str(tmp_path / "b" / "model"), "nano"])
    assert models.names == ["nano", "nano (2)", "model", "model (2)"]
    assert models.path("nano (2)") == "org/nano"
    assert not models.loaded("nano")


@pytest.mark.parametrize("path", ["", "  ", "/no/such/folder", "./nor/this"])
def test_what_is_no_model_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="model"):
        Models([path])
    with pytest.raises(ValueError, match="model"):
        Models([])


def test_an_unknown_name_and_a_broken_folder_give_a_sentence(tmp_path: Path, models: Models) -> None:
    with pytest.raises(ValueError, match="there are: nano"):
        next(models.stream("../../etc/passwd", ASK))
    (tmp_path / "empty").mkdir()
    broken = Models([str(tmp_path / "empty")])
    with pytest.raises(ValueError, match="empty"):
        broken.kimi("empty")


def test_an_answer_is_that_of_the_model_alone(models: Models) -> None:
    question = "write f(xs): the sum of the squares of the even numbers."
    alone = models.kimi("nano").chat(question, max_new_tokens=64)
    reply = said(models, question, Settings(max_new_tokens=64))
    assert reply == alone and "sum(" in reply.text
    assert reply.ids == alone.ids


def test_settings_reach_the_model(models: Models) -> None:
    warm = Settings(temperature=1.0, seed=3, max_new_tokens=6, thinking_budget=0)
    one, two = (said(models, "hello", warm, "untrained:tiny") for _ in range(2))
    other = said(
        models, "hello", Settings(temperature=1.0, seed=4, max_new_tokens=6, thinking_budget=0), "untrained:tiny"
    )
    assert one.ids == two.ids != other.ids and len(one.ids) <= 6
    plain = said(models, "hello", Settings(max_new_tokens=1))
    told = said(models, "hello", Settings(max_new_tokens=1, system="be brief"))
    assert told.usage.prompt_tokens > plain.usage.prompt_tokens


@pytest.mark.parametrize(
    "settings",
    [
        Settings(temperature=-1),
        Settings(top_p=2),
        Settings(max_new_tokens=0),
        Settings(profile="nope"),
        Settings(seed=2**70),
    ],
)
def test_wrong_settings_give_a_sentence(models: Models, settings: Settings) -> None:
    with pytest.raises(ValueError, match=r"temperature|top_p|max_new_tokens|nope|seed"):
        next(models.stream("nano", ASK, None, settings))


def test_every_format_of_the_family_can_be_picked(models: Models) -> None:
    assert set(PROFILES.values()) - {None} == set(get_args(Profile))
    lengths = {}
    for profile in get_args(Profile):
        reply = said(models, "12+30=?", Settings(max_new_tokens=8, profile=profile))
        lengths[profile] = reply.usage.prompt_tokens
    assert lengths["k2_7_code"] == lengths["k2_6"] and lengths["k2"] != lengths["k2_5"]
    assert said(models, "12+30=?", Settings(profile="k2_7_code")).text == "42"
    with pytest.raises(ValueError, match="always thinks"):
        next(models.stream("nano", ASK, None, Settings(profile="k2_7_code", thinking=False)))


def test_a_prompt_longer_than_the_context_gives_a_sentence(models: Models) -> None:
    with pytest.raises(ValueError, match="context of this model"):
        next(models.stream("nano", [{"role": "user", "content": "1 2 3 4 " * 40_000}]))


def test_stop_ends_an_answer_with_what_it_has(models: Models) -> None:
    stop = threading.Event()
    events = models.stream("untrained:tiny", ASK, None, Settings(max_new_tokens=4000), stop)
    pieces = [next(events) for _ in range(3)]
    stop.set()
    rest = list(events)
    assert [event.kind for event in rest] == ["end"]
    reply = rest[0].reply
    assert reply is not None and reply.finish_reason == "halted"
    assert reply.usage.completion_tokens >= len(pieces) and reply.thinking.startswith("".join(p.delta for p in pieces))


def test_the_wall_clock_ends_an_answer() -> None:
    models = Models(["untrained:tiny"], wall_s=0.5)
    models.kimi("untrained:tiny")
    began = time.monotonic()
    reply = said(models, "hello", Settings(max_new_tokens=8000), "untrained:tiny")
    assert reply.finish_reason == "halted" and time.monotonic() - began < 10


def test_closing_gives_the_turn_back(models: Models) -> None:
    events = models.stream("untrained:tiny", ASK, None, Settings(max_new_tokens=4000))
    next(events)
    events.close()  # type: ignore[attr-defined]
    done = threading.Event()

    def next_one() -> None:
        with models.turn:
            done.set()

    threading.Thread(target=next_one, daemon=True).start()
    assert done.wait(5)


def test_two_answers_alternate_and_neither_changes(models: Models) -> None:
    settings = Settings(max_new_tokens=40, thinking_budget=0)
    alone = said(models, "hello", settings, "untrained:tiny")
    order: list[int] = []
    replies: dict[int, Any] = {}

    def answer(number: int) -> None:
        for event in models.stream("untrained:tiny", ASK, None, settings):
            order.append(number)
            if event.reply is not None:
                replies[number] = event.reply

    threads = [threading.Thread(target=answer, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(replies[number] == alone for number in range(3))
    # nobody had to wait for a whole answer of another
    first_end = min(len(order) - 1 - order[::-1].index(number) for number in range(3))
    assert set(order[: first_end + 1]) == {0, 1, 2}


def test_turns_are_given_in_the_order_they_were_asked_for() -> None:
    turns, order = Turns(), []
    with turns:
        threads = []
        for number in range(5):

            def take(number: int = number) -> None:
                with turns:
                    order.append(number)

            threads.append(threading.Thread(target=take))
            threads[-1].start()
            while len(turns._waiting) <= number:
                time.sleep(0.001)
    for thread in threads:
        thread.join(5)
    assert order == [0, 1, 2, 3, 4]


def test_an_exception_gives_the_turn_back() -> None:
    turns = Turns()
    with pytest.raises(RuntimeError), turns:
        raise RuntimeError
    with turns:
        pass


def test_importing_the_verb_costs_neither_gradio_nor_torch() -> None:
    program = "import sys, demo.app, demo.models; sys.exit(bool({'gradio', 'torch', 'fusion'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0
