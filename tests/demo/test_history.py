"""Conversations on disk: two tabs, damage, caps, and files that lie elsewhere.

python -m pytest tests/demo/test_history.py
"""

import json
import os
import stat
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from demo.history import Conversation, History, media_of, title_of


@pytest.fixture
def history(tmp_path: Path) -> History:
    return History(tmp_path / "visitor")


def say(*texts: str) -> tuple[dict[str, Any], ...]:
    return tuple({"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(texts))


def with_picture(history: History, name: str = "a.png") -> tuple[dict[str, Any], ...]:
    path = history.folder / "media" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"picture")
    parts = [{"type": "image_url", "image_url": {"url": str(path)}}, {"type": "text", "text": "what?"}]
    return ({"role": "user", "content": parts},)


def test_what_is_written_is_read(history: History) -> None:
    assert history.listed() == ([], [])
    made = Conversation(title="Ä \u202e <b>", messages=with_picture(history), settings={"seed": 3})
    kept = history.write(made)
    assert kept.revision == 1 and history.read(kept.id) == kept
    assert list(media_of(kept.messages)) == [str(history.folder / "media" / "a.png")]
    on_disk = json.loads(next(history.folder.glob("conversations/*.json")).read_text())
    assert on_disk["messages"][0]["content"][0]["image_url"]["url"] == "media/a.png"  # the folder may be moved
    assert stat.S_IMODE((history.folder / "conversations").stat().st_mode) == 0o700


def test_the_last_changed_comes_first(history: History) -> None:
    ids = [history.write(Conversation(title=str(n), messages=say("x"))).id for n in range(3)]
    history.write(history.read(ids[0]))
    assert [c.title for c in history.listed()[0]] == ["0", "2", "1"]


def test_two_tabs_do_not_lose_each_others_words(history: History) -> None:
    base = history.write(Conversation(title="t", messages=say("x")))
    one = history.write(replace(base, messages=say("x", "from one")))
    two = history.write(replace(base, messages=say("x", "from two")))
    assert one.id == base.id != two.id
    assert {c.messages[-1]["content"] for c in history.listed()[0]} == {"from one", "from two"}


def test_many_writers_at_once_lose_nothing(history: History) -> None:
    base = history.write(Conversation(title="t", messages=say("x")))

    def write(number: int) -> None:
        History(history.folder).write(replace(base, messages=say("x", f"answer {number}")))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kept, notes = history.listed()
    assert not notes and {c.messages[-1]["content"] for c in kept} == {f"answer {n}" for n in range(8)}
    assert not list(history.folder.glob("conversations/.*.part"))


def test_a_title_given_while_an_answer_is_written_stays(history: History) -> None:
    base = history.write(Conversation(title="first words", messages=say("x")))
    history.rename(base.id, "  my\n title ")
    answered = history.write(replace(base, messages=say("x", "y")))
    assert answered.id == base.id and history.read(base.id).title == "my title"
    with pytest.raises(ValueError, match="title"):
        history.rename(base.id, " \n ")


def test_deleted_in_another_tab_and_continued_here_lives_again(history: History) -> None:
    base = history.write(Conversation(messages=say("x")))
    history.delete(base.id)
    again = history.write(replace(base, messages=say("x", "y")))
    assert history.read(base.id) == again
    history.delete(base.id)
    with pytest.raises(ValueError, match="deleted"):
        history.delete(base.id)
    with pytest.raises(ValueError, match="not here any more"):
        history.read(base.id)


def test_deleting_removes_the_media_that_no_other_shows(history: History) -> None:
    one = history.write(Conversation(messages=(*with_picture(history), *with_picture(history, "b.png"))))
    history.write(Conversation(messages=with_picture(history)))
    history.delete(one.id)
    assert [path.name for path in (history.folder / "media").iterdir()] == ["a.png"]
    history.forget(with_picture(history, "c.png"))
    history.forget(with_picture(history))
    assert [path.name for path in (history.folder / "media").iterdir()] == ["a.png"]


def test_sweeping_removes_only_what_is_old_and_shown_by_nothing(history: History) -> None:
    history.write(Conversation(messages=with_picture(history)))
    with_picture(history, "new.png")
    with_picture(history, "old.png")
    for name in ("a.png", "old.png"):
        os.utime(history.folder / "media" / name, (1, 1))
    history.sweep(history.folder / "media")
    assert {path.name for path in (history.folder / "media").iterdir()} == {"a.png", "new.png"}


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"[" * 100_000,
        b'{"id": 3}',
        b"null",
    ],
)
def test_a_damaged_file_is_left_out_with_a_note(history: History, damage: bytes) -> None:
    good = history.write(Conversation(title="good", messages=say("x")))
    bad = history.write(Conversation(title="bad", messages=say("x")))
    path = history.folder / "conversations" / f"{bad.id}.json"
    path.write_bytes(damage)
    kept, notes = history.listed()
    assert [c.id for c in kept] == [good.id] and len(notes) == 1 and "damaged" in notes[0]
    with pytest.raises(ValueError, match="damaged"):
        history.read(bad.id)
    saved = history.write(replace(bad, messages=say("x", "y")))  # beside it; the damaged file can still be looked at
    assert saved.id != bad.id and path.read_bytes() == damage


@pytest.mark.parametrize(
    "change",
    [
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "../../etc/passwd"}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "/etc/passwd"}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "image", "image": 7}]}]},
        {"messages": [{"role": "user", "content": 7}]},
        {"messages": [{"role": "boss", "content": "x"}]},
        {"messages": ["x"]},
        {"messages": {}},
        {"id": "0" * 16},
        {"revision": "1"},
        {"settings": None},
        {"more": 1},
    ],
)
def test_a_file_that_says_more_than_a_conversation_is_left_out(history: History, change: dict[str, Any]) -> None:
    kept = history.write(Conversation(messages=say("x")))
    path = history.folder / "conversations" / f"{kept.id}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    found, notes = history.listed()
    assert not found and len(notes) == 1


def test_a_link_out_of_the_folder_is_no_medium(history: History, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(b"x")
    messages = with_picture(history)
    link = history.folder / "media" / "a.png"
    link.unlink()
    link.symlink_to(tmp_path / "secret.png")
    with pytest.raises(ValueError, match="outside"):
        history.write(Conversation(messages=messages))
    assert (tmp_path / "secret.png").exists()


@pytest.mark.parametrize("id", ["", "..", "../x", "0" * 15, "0" * 17, "G" * 16, "0" * 16 + "\n", "a/b", None, 3])
def test_ids_name_nothing_but_conversations(history: History, id: Any) -> None:
    with pytest.raises(ValueError, match="not the name"):
        history.read(id)
    with pytest.raises(ValueError, match="not the name"):
        history.delete(id)
    with pytest.raises(ValueError, match="not the name"):
        history.write(Conversation(id=id, messages=say("x")))


def test_number_and_size_have_limits(tmp_path: Path) -> None:
    history = History(tmp_path, max_conversations=2, max_bytes=2000)
    first = history.write(Conversation(messages=say("x")))
    history.write(Conversation(messages=say("x")))
    with pytest.raises(ValueError, match="delete one"):
        history.write(Conversation(messages=say("x")))
    with pytest.raises(ValueError, match="start a new one"):
        history.write(replace(first, messages=say("x" * 3000)))
    assert history.read(first.id) == first  # what was there is whole
    assert history.write(replace(first, messages=say("x", "y"))).revision == 2


def test_half_of_a_letter_does_not_stop_a_conversation(history: History) -> None:
    kept = history.write(Conversation(messages=say("\ud83d lone")))  # tokens may cut a letter in two
    assert "lone" in history.read(kept.id).messages[0]["content"]


@pytest.mark.parametrize(
    ("content", "title"),
    [
        ("  how\nmany? ", "how many?"),
        ([{"type": "image_url", "image_url": {"url": "x"}}, {"type": "text", "text": "look"}], "look"),
        ([{"type": "video_url", "video_url": {"url": "x"}}], "a clip"),
        ([{"type": "image_url", "image_url": {"url": "x"}}], "a picture"),
    ],
)
def test_a_title_is_the_first_words(content: Any, title: str) -> None:
    assert title_of([{"role": "user", "content": content}]) == title
    assert len(title_of(say("word " * 100))) <= 80
