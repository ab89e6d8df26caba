"""Edits: a diff undoes what made it, git agrees with it in both directions, and no diff leads out of the tree.

pytest tests/agent/test_edit.py
"""

import random
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.edit import EditError, File, applied, checked_path, difference, replaced

names = st.sampled_from(["a.py", "b/c.txt", "b/d e.txt", "é.md", 'q"t.txt', "x/y/z"])
contents = st.one_of(
    st.lists(st.sampled_from(["one", "two", "", "  three", "-- x", "++ y", "\r", "@@ -1 +1 @@"])).map("\n".join),
    st.text(max_size=30),
).map(lambda text: text.encode("utf-8", "replace")) | st.binary(max_size=80)
files = st.builds(File, contents, st.sampled_from(["file", "executable"]))
trees = st.dictionaries(names, files, max_size=5)


@settings(max_examples=150)
@given(before=trees, after=trees)
def test_a_difference_applied_is_the_change(before: dict[str, File], after: dict[str, File]) -> None:
    diff = difference(before, after)
    if before == after:
        assert diff == ""
    else:
        assert applied(before, diff) == after


def on_disk(folder: Path, tree: dict[str, File]) -> None:
    for path, file in tree.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(file.data)
        (folder / path).chmod(0o755 if file.mode == "executable" else 0o644)


def from_disk(folder: Path) -> dict[str, File]:
    out = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and ".git" not in path.parts:
            mode = "executable" if path.stat().st_mode & 0o100 else "file"
            out[str(path.relative_to(folder))] = File(path.read_bytes(), mode)  # type: ignore[arg-type]
    return out


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_git_agrees(tmp_path: Path) -> None:
    def git(*words: str, stdin: bytes = b"") -> bytes:
        own = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "core.autocrlf=false")
        done = subprocess.run(["git", *own, *words], cwd=tmp_path, input=stdin, capture_output=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    text = "".join(f"line {n}\n" for n in range(60))
    changed = text.replace("line 3\n", "").replace("line 40\n", "forty\nand more\n")
    data = random.Random(0).randbytes(3000)
    before = {
        "keep.py": File(b"x = 1\n"),
        "long.txt": File(text.encode()),
        "no end.txt": File(b"a\nb"),
        "gone/old.txt": File(b"old\n"),
        "moved.txt": File(b"moved\n" * 9),
        "run.sh": File(b"#!/bin/sh\n"),
        "blob.bin": File(data),
        "grün.txt": File("grün\n".encode()),
    }
    after = {
        "keep.py": File(b"x = 1\n"),
        "long.txt": File(changed.encode()),
        "no end.txt": File(b"a\nb\nc"),
        "new/place.txt": File(b"moved\n" * 9),
        "run.sh": File(b"#!/bin/sh\n", "executable"),
        "blob.bin": File(data[:1500] + b"\0new" + data[1500:]),
        "grün.txt": File("grüner\n".encode()),
        "empty.txt": File(b""),
    }
    git("init", "-q")
    on_disk(tmp_path, before)
    git("add", "-A")
    git("commit", "-q", "-m", "before")
    git("apply", stdin=difference(before, after).encode())
    assert from_disk(tmp_path) == after
    git("add", "-A")
    for options in (["--binary"], ["--binary", "-M", "-U0"], ["--binary", "--no-renames", "-U7"]):
        assert applied(before, git("diff", "--cached", *options).decode()) == after
    with pytest.raises(EditError, match="not how"):
        applied(before, git("diff", "--cached").decode())


BEFORE = {
    "a.py": File(b"".join(b"line %d\n" % n for n in range(30))),
    "to": File(b"b", "link"),
    "run": File(b"", "executable"),
}


@pytest.mark.parametrize(
    "diff",
    [
        "--- a/a.py\n+++ b/a.py\n@@ -1,99 +1,2 @@\n line 9\n-line 10\n+ten\n",  # numbers and counts that are wrong
        "--- a.py\n+++ a.py\n@@ -11 +11 @@\n-line 10\n+ten\n",  # no prefix
        "words\n```diff\n--- a/a.py\n+++ b/a.py\n@@ -10,1 +10,1 @@ def f\n line 9\n-line 10\n+ten\n line 11\n```\n.",
    ],
)
def test_what_models_write_is_understood(diff: str) -> None:
    assert applied(BEFORE, diff)["a.py"].data == BEFORE["a.py"].data.replace(b"line 10\n", b"ten\n")


@pytest.mark.parametrize(
    "diff",
    [
        "",
        "please change line 10",
        "--- a/a.py\n+++ b/a.py\n@@ -11 +11 @@\n-line ten\n+ten\n",
        "--- a/none.py\n+++ b/none.py\n@@ -1 +1 @@\n-x\n+y\n",
        "--- /dev/null\n+++ b/a.py\n@@ -0,0 +1 @@\n+y\n",
        "--- /dev/null\n+++ b/../out.py\n@@ -0,0 +1 @@\n+y\n",
        "--- /dev/null\n+++ /etc/cron.d/x\n@@ -0,0 +1 @@\n+y\n",
        "--- /dev/null\n+++ b/x/.git/hooks/pre-commit\n@@ -0,0 +1 @@\n+y\n",
        "--- /dev/null\n+++ b/.GIT/config\n@@ -0,0 +1 @@\n+y\n",
        "--- /dev/null\n+++ b/a.py/b\n@@ -0,0 +1 @@\n+y\n",
        "--- /dev/null\n+++ b/to/b\n@@ -0,0 +1 @@\n+y\n",
        "--- /dev/null\n+++ /dev/null\n@@ -0,0 +1 @@\n+y\n",
        "--- a/to\n+++ b/to\n@@ -1 +1 @@\n-b\n\\ No newline at end of file\n+/etc\n",
        "diff --git a/l b/l\nnew file mode 120000\n--- /dev/null\n+++ b/l\n@@ -0,0 +1 @@\n+/etc/passwd\n",
        "diff --git a/s b/s\nnew file mode 160000\n--- /dev/null\n+++ b/s\n@@ -0,0 +1 @@\n+Subproject commit 1\n",
        "diff --git a/s b/s\nnew file mode 104755\n",
        "diff --git a/a.py b/../../x\nrename from a.py\nrename to ../../x\n",
        "diff --git a/run b/run\nGIT binary patch\nliteral 99\nzzzz\n\n",
        "diff --git a/run b/run\nGIT binary patch\nliteral 999999999\nzcmV\n\n",
        "diff --git a/run b/run\nGIT binary patch\n\n",
    ],
)
def test_what_must_not_be_applied_is_refused(diff: str) -> None:
    with pytest.raises(EditError):
        applied(BEFORE, diff)


@pytest.mark.parametrize(
    "path", ["", "/", "/a", "../a", "a/../../b", "a/..", "~/.ssh", "a\0b", ".git/x", "a\\..\\b", "a/"]
)
def test_paths_that_lead_out(path: str) -> None:
    with pytest.raises(EditError):
        checked_path(path)
    with pytest.raises(EditError):
        replaced(BEFORE, {path: "x"})


def test_whole_files() -> None:
    made = replaced(BEFORE, {"run": "#!/bin/sh\n", "a.py": None, "./n/m.py": b"\0"})
    assert made == {"to": BEFORE["to"], "run": File(b"#!/bin/sh\n", "executable"), "n/m.py": File(b"\0")}
    for files in ({"to": "x"}, {"to/x": "y"}, {"a.py/x": "y"}):
        with pytest.raises(EditError):
            replaced(BEFORE, files)


def test_hostile_diffs_end_soon() -> None:
    many = {"a": File(b"x\n" * 50_000)}
    with pytest.raises(EditError):
        applied(many, "--- a/a\n+++ b/a\n@@ -1 +1 @@\n" + " x\n" * 20_000 + "-y\n")
    with pytest.raises(EditError, match="too long"):
        applied(many, "--- a/a\n+++ b/a\n@@ -1 +1 @@\n x\n" * 9_000)


@settings(max_examples=150)
@given(
    st.text(max_size=200)
    | st.lists(
        st.sampled_from(
            "diff --git a/a.py b/a.py|--- a/a.py|+++ b/a.py|@@ -1 +1 @@| line 1|-line 2|+x|\\ No|GIT binary patch|"
            "literal 3|delta 5|zcmV|rename from a.py|rename to b|new file mode 100644||deleted file mode 100644".split(
                "|"
            )
        )
    ).map("\n".join)
)
def test_nonsense_is_refused_or_applied(diff: str) -> None:
    try:
        applied(BEFORE, diff)
    except EditError:
        return
