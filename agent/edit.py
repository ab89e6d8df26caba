"""Edits of a folder of files, in memory: what changed, as a diff; and a diff, applied.

    difference(before, after)  ->  "diff --git a/x.py b/x.py\\n--- a/x.py\\n+++ b/x.py\\n@@ -1 +1 @@\\n-1\\n+2\\n"
    applied(before, diff)      ->  after

    tree     path -> File(data, mode); mode is "file", "executable" or "link" (data is then where it leads)
    diff     the unified format, as git writes it: new, deleted, renamed and binary files, changed modes

Nothing here touches a file system or starts a program, so that a hostile diff is at worst an EditError. Diffs that
models write are taken where their meaning is clear: wrong line counts and shifted line numbers are put right by what
the lines say, but every line that stays or goes must be there.
"""

import base64
import difflib
import hashlib
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

Mode = Literal["file", "executable", "link"]
MODES: dict[str, Mode] = {"100644": "file", "100664": "file", "100755": "executable", "120000": "link"}
NUMBERS = {"file": "100644", "executable": "100755", "link": "120000"}
LARGEST = 64 * 2**20  # bytes of one file that a diff makes
MOST_WORK = 2_000_000  # lines read and compared while one diff is applied


class EditError(ValueError):
    """An edit that cannot be applied, or must not be."""


@dataclass(frozen=True)
class File:
    """One file of a tree."""

    data: bytes
    mode: Mode = "file"


Tree = Mapping[str, File]


def checked_path(path: str) -> str:
    """A path below the tree, in its shortest form. Raises EditError for one that leads out, or into git's own."""
    if not path or "\0" in path or path.startswith(("/", "~")) or "\\" in path or len(path) > 4000:
        raise EditError(f"{path[:80]!r} is no path below the repository")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if not parts or ".." in parts or path.endswith("/"):
        raise EditError(f"{path[:80]!r} is no path below the repository")
    if any(part.casefold() == ".git" for part in parts):
        raise EditError(f"{path[:80]!r} is git's own")
    return "/".join(parts)


def checked_tree(tree: Tree) -> Tree:
    """The same, if it can lie on a disk. Raises EditError where a file is also a folder."""
    for path in tree:
        for parent in _parents(path):
            if parent in tree:
                raise EditError(f"{path!r} cannot be: {parent!r} is a {tree[parent].mode}")
    return tree


def _parents(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:end]) for end in range(1, len(parts))]


# ---- before, after -> diff


def difference(before: Tree, after: Tree) -> str:
    """How a tree changed, in git's format. Text is UTF-8; what is not becomes a binary patch."""
    out = []
    for path in sorted({*before, *after}):
        old, new = before.get(path), after.get(path)
        if old != new:
            out.append(_difference(path, old, new))
    return "".join(out)


def _difference(path: str, old: File | None, new: File | None) -> str:
    if old is not None and new is not None and (old.mode == "link") != (new.mode == "link"):
        return _difference(path, old, None) + _difference(path, None, new)  # a change of kind: gone, and new
    a, b = _quoted(f"a/{path}"), _quoted(f"b/{path}")
    head = f"diff --git {a} {b}\n"
    if old is None and new is not None:
        head += f"new file mode {NUMBERS[new.mode]}\n"
    elif new is None and old is not None:
        head += f"deleted file mode {NUMBERS[old.mode]}\n"
    elif old is not None and new is not None and old.mode != new.mode:
        head += f"old mode {NUMBERS[old.mode]}\nnew mode {NUMBERS[new.mode]}\n"
    first, second = old.data if old else b"", new.data if new else b""
    if first == second:
        return head
    left, right = _text(first), _text(second)
    if left is None or right is None:
        index = "..".join("0" * 40 if side is None else _blob(side.data) for side in (old, new))  # git asks for it here
        return f"{head}index {index}\nGIT binary patch\n{_literal(second)}{_literal(first)}"
    names = "/dev/null" if old is None else a, "/dev/null" if new is None else b
    body = difflib.unified_diff(_lines(left), _lines(right), *names)
    return head + "".join(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in body)


def _blob(data: bytes) -> str:
    """Git's name for a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _text(data: bytes) -> str | None:
    if b"\0" in data:
        return None
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def _lines(text: str) -> list[str]:
    """With their ends; only \\n ends a line, as for git."""
    return [line for line in re.split(r"(?<=\n)", text) if line]


def _literal(data: bytes) -> str:
    packed = zlib.compress(data)
    out = f"literal {len(data)}\n"
    for at in range(0, len(packed), 52):
        part = packed[at : at + 52]
        length = chr(ord("A") + len(part) - 1) if len(part) <= 26 else chr(ord("a") + len(part) - 27)
        out += length + base64.b85encode(part, pad=True).decode() + "\n"
    return out + "\n"


def _quoted(path: str) -> str:
    if all(32 <= ord(sign) < 127 and sign not in '"\\' for sign in path):
        return path
    known = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t"}
    data = path.encode("utf-8", "surrogateescape")
    signs = [known.get(chr(byte)) or (chr(byte) if 32 <= byte < 127 else f"\\{byte:03o}") for byte in data]
    return f'"{"".join(signs)}"'


# ---- diff, before -> after


def applied(tree: Tree, diff: str) -> dict[str, File]:
    """The tree after a diff. Raises EditError for a diff that does not apply, leads out of the tree, or makes links."""
    out = dict(tree)
    steps = _Reader(diff).files()
    if not steps:
        raise EditError("no diff in it: nothing begins with 'diff --git' or with '--- ' and '+++ '")
    work = [MOST_WORK]
    for step in steps:
        step.apply(out, work)
    checked_tree(out)
    return out


def replaced(tree: Tree, files: Mapping[str, str | bytes | None]) -> dict[str, File]:
    """The tree with whole files put in; None takes one out. Raises EditError as `applied` does."""
    out = dict(tree)
    for name, content in files.items():
        path = checked_path(name)
        _no_link(out, path)
        old = out.pop(path, None)
        if content is not None:
            data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
            out[path] = replace(old, data=data) if old else File(data)
    checked_tree(out)
    return out


def _no_link(tree: Tree, path: str) -> None:
    for part in (*_parents(path), path):
        if part in tree and tree[part].mode == "link":
            raise EditError(f"{path!r} goes through the link {part!r}")


@dataclass
class _Hunk:
    start: int  # line of the old file, from 1
    lines: list[tuple[str, str]]  # (" ", "-" or "+", the line with its end)


@dataclass
class _Step:
    """What a diff does to one file."""

    old: str | None = None
    new: str | None = None
    mode: Mode | None = None
    kind: Literal["change", "create", "delete", "rename", "copy"] = "change"
    hunks: list[_Hunk] | None = None
    binary: tuple[str, bytes, int] | None = None  # "literal" or "delta", unpacked, size of the result

    def apply(self, tree: dict[str, File], work: list[int]) -> None:
        name = self.new if self.kind != "delete" else self.old
        if name is None:
            raise EditError("a part of the diff names no file")
        path = checked_path(name)
        source = checked_path(self.old) if self.old is not None else path
        for each in {path, source}:
            _no_link(tree, each)
        if self.mode == "link":
            raise EditError(f"{path!r} would be a link")
        if self.kind == "create":
            if tree.get(path, File(b"")).data:
                raise EditError(f"{path!r} is there already")
            before = File(b"")
        elif source not in tree:
            raise EditError(f"{source!r} is not there")
        else:
            before = tree[source]
        data = self._changed(path, before.data, work)
        if self.kind in ("delete", "rename"):
            del tree[source]
        if self.kind != "delete":
            tree[path] = File(data, self.mode or before.mode)

    def _changed(self, path: str, data: bytes, work: list[int]) -> bytes:
        if self.binary is not None:
            kind, packed, size = self.binary
            out = packed if kind == "literal" else _undelta(data, packed)
            _charge(work, len(out) // 100)
            if len(out) != size:
                raise EditError(f"{path!r}: the binary patch makes {len(out)} bytes, not {size}")
            return out
        if not self.hunks:
            return data
        lines = _lines(data.decode("utf-8", "surrogateescape"))
        _charge(work, len(lines))
        return "".join(_patched(path, lines, self.hunks, work)).encode("utf-8", "surrogateescape")


def _patched(path: str, lines: list[str], hunks: list[_Hunk], work: list[int]) -> list[str]:
    out: list[str] = []
    at, shift = 0, 0  # lines of the old file that are done; how far off the last hunk's number was
    for number, hunk in enumerate(hunks, 1):
        wanted = [line.rstrip("\n") for sign, line in hunk.lines if sign != "+"]
        guess = hunk.start - 1 + shift if wanted else hunk.start + shift
        place = _find(lines, wanted, at, guess, work)
        if place is None:
            raise EditError(f"{path!r}: hunk {number} does not fit: {(wanted or [''])[0][:80]!r} and what follows")
        shift = place - (guess - shift)
        out += lines[at:place]
        at = place
        for sign, line in hunk.lines:
            if sign == "+":
                if out and not out[-1].endswith("\n"):
                    out[-1] += "\n"
                out.append(line)
            else:
                if sign == " ":
                    out.append(lines[at])
                at += 1
    return out + lines[at:]


def _find(lines: list[str], wanted: list[str], lowest: int, guess: int, work: list[int]) -> int | None:
    """Where these lines stand, nearest to a guess and not before `lowest`."""
    highest = len(lines) - len(wanted)
    guess = min(max(guess, lowest), max(highest, lowest))
    if not wanted:
        return guess
    for distance in range(max(guess - lowest, highest - guess) + 1):
        for place in (guess + distance, guess - distance) if distance else (guess,):
            if not lowest <= place <= highest:
                continue
            for at, wish in enumerate(wanted, place):
                work[0] -= 1
                if lines[at].rstrip("\n") != wish:
                    break
            else:
                return place
            _charge(work, 0)
    return None


def _charge(work: list[int], lines: int) -> None:
    work[0] -= lines
    if work[0] < 0:
        raise EditError("the diff takes too long to apply")


def _undelta(source: bytes, delta: bytes) -> bytes:
    """Git's delta: sizes, then copies of the source and inserted bytes."""
    at = 0

    def number() -> int:
        nonlocal at
        value, shift = 0, 0
        while True:
            byte = delta[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    try:
        if number() != len(source):
            raise EditError("a binary delta of another file")
        size = number()
        out = bytearray()
        while at < len(delta):
            byte = delta[at]
            at += 1
            if byte & 128:
                place = length = 0
                for bit in range(7):
                    if byte >> bit & 1:
                        if bit < 4:
                            place |= delta[at] << 8 * bit
                        else:
                            length |= delta[at] << 8 * (bit - 4)
                        at += 1
                out += source[place : place + (length or 0x10000)]
            elif byte:
                out += delta[at : at + byte]
                at += byte
            if len(out) > min(size, LARGEST):
                raise EditError("a binary delta that grows too large")
    except IndexError:
        raise EditError("a binary delta that ends too early") from None
    return bytes(out)


HUNK = re.compile(r"@@ -(\d{1,9})(?:,(\d{1,9}))? \+(\d{1,9})(?:,(\d{1,9}))? @@")


class _Reader:
    """The files of a diff, line by line."""

    def __init__(self, diff: str):
        if re.search(
            r"^(?:diff --git |\+\+\+ )[^\n]*\r$", diff, re.MULTILINE
        ):  # sent through a system that ends lines so
            diff = diff.replace("\r\n", "\n")
        self.lines = diff.split("\n")
        if self.lines and not self.lines[-1]:
            self.lines.pop()
        self.at = 0

    def peek(self, ahead: int = 0) -> str:
        return self.lines[self.at + ahead] if self.at + ahead < len(self.lines) else ""

    def files(self) -> list[_Step]:
        steps = []
        while self.at < len(self.lines):
            if self.peek().startswith("diff --git "):
                steps.append(self.headed())
            elif self._named():
                steps.append(self.body(_Step()))
            else:
                self.at += 1
        return steps

    def _named(self) -> bool:
        return self.peek().startswith("--- ") and self.peek(1).startswith("+++ ")

    def headed(self) -> _Step:
        """A file with git's header."""
        first = self.peek()
        step = _Step()
        self.at += 1
        while self.at < len(self.lines):
            line = self.peek()
            word, _, rest = line.partition(" ")
            if line.startswith("new file mode "):
                step.kind, step.mode = "create", self._mode(line)
            elif line.startswith("deleted file mode "):
                step.kind = "delete"
                self._mode(line)
            elif line.startswith("new mode "):
                step.mode = self._mode(line)
            elif line.startswith("old mode "):
                self._mode(line)
            elif line.startswith(("rename ", "copy ")):
                step.kind = "rename" if word == "rename" else "copy"
                side, _, name = rest.partition(" ")
                setattr(step, "old" if side == "from" else "new", _unquoted(name))
            elif not line.startswith(("index ", "similarity index ", "dissimilarity index ")):
                break
            self.at += 1
        if step.kind not in ("rename", "copy"):
            step.old = step.new = _same_name(first[len("diff --git ") :])
        if self.peek().startswith("Binary files "):
            raise EditError(f"{step.new!r}: the diff says that a binary file differs, not how (git diff --binary)")
        if self.peek() == "GIT binary patch":
            self.at += 1
            step.binary = self.binary()
            return step
        return self.body(step) if self._named() else step

    @staticmethod
    def _mode(line: str) -> Mode:
        number = line.rsplit(" ", 1)[1]
        if number not in MODES:
            raise EditError(f"no file has the mode {number[:20]!r}")
        return MODES[number]

    def body(self, step: _Step) -> _Step:
        """--- and +++ and hunks."""
        old, new = (_unquoted(self.peek(ahead)[4:].split("\t")[0].rstrip()) for ahead in (0, 1))
        self.at += 2
        prefixed = all(name == "/dev/null" or name.startswith(start) for name, start in ((old, "a/"), (new, "b/")))
        if prefixed:
            old, new = (name if name == "/dev/null" else name[2:] for name in (old, new))
        if old == new == "/dev/null":
            raise EditError("a part of the diff names no file")
        if step.kind == "change":
            step.kind = "create" if old == "/dev/null" else "delete" if new == "/dev/null" else "change"
        if step.kind not in ("rename", "copy"):
            if old not in ("/dev/null", new) and new != "/dev/null":
                step.kind = "rename"
            step.old = None if old == "/dev/null" else old
            step.new = None if new == "/dev/null" else new
        step.hunks = []
        while True:
            found = HUNK.match(self.peek())
            if not found:
                break
            self.at += 1
            step.hunks.append(self.hunk(found))
        return step

    def hunk(self, found: re.Match[str]) -> _Hunk:
        left, right = int(found[2] or 1), int(found[4] or 1)  # lines of the old and new file that the header promises
        lines: list[tuple[str, str]] = []
        while self.at < len(self.lines):
            line = self.peek()
            more = left > 0 or right > 0
            if line.startswith("\\"):
                if lines:
                    lines[-1] = (lines[-1][0], lines[-1][1].removesuffix("\n"))
                self.at += 1
                continue
            if HUNK.match(line) or line.startswith("diff --git ") or (not more and self._named()):
                break
            if not line and not more:
                break
            sign = line[:1] or " "  # models leave out the blank of an empty line
            if sign not in " +-":
                break
            lines.append((sign, line[1:] + "\n"))
            left -= sign != "+"
            right -= sign != "-"
            self.at += 1
        return _Hunk(int(found[1]), lines)

    def binary(self) -> tuple[str, bytes, int]:
        """The first of the two halves: how to go forward."""
        found = re.fullmatch(r"(literal|delta) (\d{1,9})", self.peek())
        if not found:
            raise EditError(f"no binary patch: {self.peek()[:40]!r}")
        self.at += 1
        packed = bytearray()
        while self.peek():
            line = self.peek()
            length = ord(line[0]) - (ord("A") - 1 if line[0] <= "Z" else ord("a") - 27)
            try:
                part = base64.b85decode(line[1:])
            except ValueError:
                raise EditError("a binary patch with signs that are none of its own") from None
            if not 0 < length <= len(part):
                raise EditError("a binary patch with a line of a wrong length")
            packed += part[:length]
            self.at += 1
        size = int(found[2])
        if size > LARGEST:
            raise EditError(f"a binary patch of {size} bytes")
        try:
            data = zlib.decompressobj().decompress(bytes(packed), size + 1)
        except zlib.error as error:
            raise EditError(f"a binary patch that does not unpack: {error}") from None
        if found[1] == "literal":
            return "literal", data, size
        if len(data) != size:
            raise EditError("a binary delta of a wrong length")
        return "delta", data, _delta_size(data)


def _delta_size(delta: bytes) -> int:
    sizes, at = [], 0
    for _ in range(2):
        value, shift = 0, 0
        while at < len(delta):
            byte = delta[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        sizes.append(value)
    return sizes[1]


def _unquoted(name: str) -> str:
    if not (len(name) > 1 and name.startswith('"') and name.endswith('"')):
        return name
    known = {"n": b"\n", "t": b"\t", '"': b'"', "\\": b"\\", "r": b"\r", "a": b"\a", "b": b"\b", "f": b"\f", "v": b"\v"}
    out = bytearray()
    for found in re.finditer(r"\\([0-7]{3})|\\(.)|([^\\]+)", name[1:-1], re.DOTALL):
        if found[1]:
            out.append(int(found[1], 8) & 255)
        elif found[2]:
            if found[2] not in known:
                raise EditError(f"{name[:80]!r} is no name that git writes")
            out += known[found[2]]
        else:
            out += found[3].encode("utf-8", "surrogateescape")
    return out.decode("utf-8", "surrogateescape")


def _same_name(names: str) -> str | None:
    """The name in `a/NAME b/NAME`; None where the two differ."""
    if names.startswith('"'):
        found = re.fullmatch(r'("(?:[^"\\]|\\.)*") ("(?:[^"\\]|\\.)*")', names)
        both = (_unquoted(found[1]), _unquoted(found[2])) if found else ("", "")
    else:
        middle = len(names) // 2
        both = (names[:middle], names[middle + 1 :])
    old, new = both
    if old.startswith("a/") and new.startswith("b/") and old[2:] == new[2:]:
        return old[2:]
    return None
