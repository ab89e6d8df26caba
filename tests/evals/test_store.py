"""The store of replies: found again, whole after a crash, shared by processes.

pytest tests/evals/test_store.py
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evals.store import Store, files_digest, key_of, seed_of


def test_a_reply_is_found_again(tmp_path: Path) -> None:
    key = key_of({"text": "a", "repeat": 0})
    with Store(tmp_path / "s") as store:
        assert store.get(key) is None and key not in store
        store.add(key, {"text": "é\n\ud800 ", "tokens": {"prompt": 3}})
        store.add(key, {"text": "later"})
        assert len(store) == 1
    with Store(tmp_path / "s") as store:
        assert store.get(key) == {"text": "é\n? ", "tokens": {"prompt": 3}}


def test_keys_and_seeds() -> None:
    one, two = {"a": 1, "b": [1, {"c": None}]}, {"b": [1, {"c": None}], "a": 1}
    assert key_of(one) == key_of(two) != key_of(one | {"a": 2}) and len(key_of(one)) == 64
    assert 0 <= seed_of("f" * 64) < 2**63 and seed_of(key_of(one)) == seed_of(key_of(two)) != seed_of(key_of({}))
    with pytest.raises(TypeError):
        key_of({"image": object()})


def test_any_cut_loses_the_last_line_alone(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.add_all((key_of({"n": number}), {"text": "x" * 20 + "é\n" * number}) for number in range(4))
    path = tmp_path / "replies.jsonl"
    whole = path.read_bytes()
    ends = [at + 1 for at, byte in enumerate(whole) if byte == 10]
    for at in [*range(0, len(whole), 23), *ends, *(end - 1 for end in ends), *(end + 1 for end in ends[:-1])]:
        path.write_bytes(whole[:at])
        with Store(tmp_path) as store:
            kept = sum(end <= at for end in ends)
            assert len(store) == kept and path.stat().st_size == (ends[kept - 1] if kept else 0)
            if at % 200 < 23:
                store.add_all((key_of({"n": number}), {"text": "again"}) for number in range(4))
                assert len(store) == 4 == len(path.read_text().splitlines())


def test_lines_that_are_no_replies_are_said_and_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Store(tmp_path) as store:
        store.add("k1", {"text": "one"})
    with open(tmp_path / "replies.jsonl", "ab") as file:
        file.write(b'{"key": 3\nnonsense\n[1]\n\xff\xfe\n')
        file.write(b'{"key": "k2", "reply": {"text": "tw')
    with Store(tmp_path) as store:
        assert store.get("k1") == {"text": "one"} and store.get("k2") is None
        store.add("k2", {"text": "two"})
    with Store(tmp_path) as store:
        assert store.get("k2") == {"text": "two"}
    assert "cut off" in caplog.text and "4 lines are no replies" in caplog.text


WRITER = """
import sys
from evals.store import Store, key_of
store, name, count = Store(sys.argv[1]), sys.argv[2], int(sys.argv[3])
print("ready", flush=True)
for number in range(count):
    store.add(key_of({"n": number % 40 if name == "shared" else [name, number]}), {"text": name * 200})
"""


def writer(folder: Path, name: str, count: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", WRITER, str(folder), name, str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])


def test_two_processes_share_a_store(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        others = [writer(tmp_path, name, 50) for name in ("a", "b")]
        for number in range(20):
            store.add(key_of({"mine": number}), {"text": "c"})
        assert [other.wait(120) for other in others] == [0, 0]
        assert key_of({"n": ["a", 49]}) in store and len(store) == 120
        assert store.get(key_of({"n": ["b", 7]})) == {"text": "b" * 200}
    with Store(tmp_path) as store:
        assert len(store) == 120
    assert len((tmp_path / "replies.jsonl").read_text().splitlines()) == 120


def test_a_killed_writer_leaves_whole_lines_and_no_lock(tmp_path: Path) -> None:
    other = writer(tmp_path, "x", 10**6)
    assert other.stdout is not None and other.stdout.readline() == "ready\n"
    while not (tmp_path / "replies.jsonl").stat().st_size:
        time.sleep(0.01)
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    started = time.perf_counter()
    with Store(tmp_path) as store:
        count = len(store)
        store.add("mine", {"text": "m"})
        assert count > 0 and store.get("mine") == {"text": "m"}
    assert time.perf_counter() - started < 20
    for line in (tmp_path / "replies.jsonl").read_text().splitlines():
        assert set(json.loads(line)) == {"key", "reply"}


def test_a_folder_is_wanted(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="must be a folder"):
        Store(tmp_path / "file")


def test_weights_are_hashed_once(tmp_path: Path) -> None:
    one, two, cache = tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "hashes.json"
    one.write_bytes(b"1" * 1000)
    two.write_bytes(b"2" * 1000)
    first = files_digest([one, two], cache)
    known = json.loads(cache.read_text())
    assert len(known) == 2 and files_digest([one, two], cache) == first
    cache.write_text(json.dumps(dict.fromkeys(known, "f" * 64)))
    assert files_digest([one, two], cache) != first  # what is known is not read again
    cache.write_text("broken")
    assert files_digest([one, two], cache) == first
    two.write_bytes(b"3" * 1000)
    os.utime(two, ns=(1, 1))
    assert files_digest([one, two], cache) != first
