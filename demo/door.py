"""Files of visitors: whose folder, how large, what is in them; and foreign text, made harmless.

In: a path or a text that a stranger chose. Out: a file in the visitor's own folder that a child process has decoded
whole under caps, with a note that says what it is; or `Refused`, one sentence.

    path ─ below uploads, own folder or examples? ─ copy ─ sniff (by content) ─ examine (child process) ─ Admitted

    admitted = admit(path, visitor_of(request), Caps())
"""

import contextlib
import hashlib
import html
import json
import math
import os
import re
import secrets
import shutil
import stat
import subprocess
import sys
import threading
import unicodedata
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Any, BinaryIO, Literal

Kind = Literal["image", "video"]

COOKIE = "moonkit_visitor"
HEADER = "x-moonkit-visitor"
_SECRET = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Caps:
    """What one visitor may ask for. A public server may want less; the owner of a workstation, more."""

    upload_mb: float = 64.0  # one request
    files: int = 8  # one request, one message
    visitor_mb: float = 512.0  # on disk, uploads and history apart
    total_mb: float = 8192.0  # uploads and shown pictures of all visitors
    pixels: int = 50_000_000  # one picture; a phone's largest are about this
    clip_seconds: float = 60.0
    clip_frames: int = 120  # looked at, 2 per second
    decode_s: float = 10.0  # all files of one request
    decode_mb: int = 2048
    text_chars: int = 100_000  # one string of a request
    body_mb: float = 4.0  # one request that is no upload
    receive_s: float = 120.0  # until a request has arrived
    wall_s: float = 120.0  # one answer
    pending: int = 4  # answers of a model for one visitor, running and waiting
    waiting: int = 32  # events of one visitor of any kind, running and waiting
    queue: int = 64  # answers of all visitors, waiting
    uploads_at_once: int = 2
    calls_at_once: int = 8
    streams: int = 24  # open event streams of one visitor; a tab holds about two
    examiners: int = 2  # files that are examined at the same time, all visitors


class Refused(ValueError):
    """One sentence for the visitor: what was wanted, what came. Safe to show as text."""


class _Late(Refused):
    """Not the file's fault alone: the machine may have been busy, so it is not remembered."""


@dataclass(frozen=True)
class Admitted:
    """A file of the visitor's own folder that the model may open. note: what it is, in words."""

    path: Path
    kind: Kind
    note: str


# ---- folders and visitors --------------------------------------------------------------------------------------------


def home() -> Path:
    """Where histories and files are kept: $MOONKIT_STATE, else ~/.local/state/moonkit/demo. Made 0700."""
    given = os.environ.get("MOONKIT_STATE")
    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    folder = Path(given).expanduser() if given else Path(base).expanduser() / "moonkit" / "demo"
    return _private_folder(folder)


def uploads() -> Path:
    """This process's passing folder: uploads, and pictures that answers show. Gradio is pointed at it.

    Call it before gradio is imported: gradio reads GRADIO_TEMP_DIR then. Folders of processes that have ended are
    removed.
    """
    parent = _private_folder(home() / "passing")
    for left in parent.iterdir():
        if left.name.isdigit() and not _alive(int(left.name)):
            shutil.rmtree(left, ignore_errors=True)
    folder = _private_folder(parent / str(os.getpid())).resolve()
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    return folder


def visitor_folder(visitor: str) -> Path:
    """The folder of one visitor, made 0700. visitor: from `visitor_of`."""
    if not _SECRET.fullmatch(visitor):
        raise ValueError(f"a visitor is 32 hexadecimal digits, got {visitor[:40]!r}")
    return _private_folder(_private_folder(home() / "visitors") / visitor)


def visitor_of(request: Any) -> str:
    """A folder name for who sent a gr.Request: a hash, so that the name gives nothing away.

    From the cookie; without one from the header x-moonkit-visitor; without either from the session, so that a script
    that names itself nowhere shares its folder with no other.
    """
    secret = secret_of(str(request.headers.get("cookie") or ""))
    if secret:
        return name_of("cookie", secret)
    named = str(request.headers.get(HEADER) or "")
    if named:
        return name_of("header", named)
    return name_of("session", str(getattr(request, "session_hash", None) or "none"))


def name_of(kind: str, value: str) -> str:
    return hashlib.sha256(f"moonkit {kind} {value}".encode("utf-8", "replace")).hexdigest()[:32]


def secret_of(header: str) -> str | None:
    try:
        morsel = SimpleCookie(header).get(COOKIE)
    except CookieError:
        return None
    return morsel.value if morsel and _SECRET.fullmatch(morsel.value) else None


def _private_folder(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if folder.is_symlink() or not folder.is_dir():
        raise ValueError(f"{folder} must be a folder of yours, not a link to one")
    if hasattr(os, "getuid") and folder.stat().st_uid != os.getuid():
        raise ValueError(f"{folder} belongs to another user; name a folder of your own in MOONKIT_STATE")
    folder.chmod(0o700)
    return folder


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


# ---- text ------------------------------------------------------------------------------------------------------------

_HIDDEN = {*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200B, 0x200E, 0x200F, 0x061C, 0xFEFF, 0x2028, 0x2029}


def escape(text: str, *, lines: bool = False) -> str:
    """Foreign text for Markdown and HTML alike: it shows as itself and starts nothing.

    Every ASCII sign but , becomes a character reference, which both languages read as plain text (so no link, no
    formula, no code, no table). Control characters and marks that turn the reading direction go; white space becomes
    one blank, or with `lines` each line break becomes <br>.
    """
    if lines:
        rows = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        return "<br>".join(escape(row) for row in rows)
    kept = []
    for char in text:
        category = unicodedata.category(char)
        if ord(char) in _HIDDEN:
            continue
        if category == "Cs":
            kept.append("\N{REPLACEMENT CHARACTER}")
        elif category == "Cc" or char.isspace():
            kept.append(" ")
        elif char.isascii() and not char.isalnum() and char not in " ,":
            kept.append(f"&#{ord(char)};")
        else:
            kept.append(char)
    return " ".join("".join(kept).split())


def plain_name(name: str) -> str:
    """A file's name for a sentence: last part, no control or direction marks, 60 characters at most."""
    last = re.split(r"[/\\]", name)[-1]
    shown = " ".join(html.unescape(re.sub(r"&#(\d+);", lambda found: chr(int(found[1])), escape(last))).split())
    return shown if len(shown) <= 60 else f"{shown[:40]}…{shown[-16:]}"


# ---- what is in a file -----------------------------------------------------------------------------------------------

_FTYP_PICTURES = {b"avif": ".avif", b"avis": ".avif"}
_FTYP_REFUSED = {b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"}
_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")
# FFmpeg looks for these anywhere at a file's start and would then open the files and addresses that it names
_PLAYLISTS = (b"dash:profile", b"compositionplaylist", b"#extm3u", b"ffconcat", b"<smil", b"<asx", b"[playlist]")


def sniff(head: bytes) -> tuple[Kind, str]:
    """Kind and file ending by content alone. head: the first 64 KB. Raises Refused for anything else."""
    if not head:
        raise Refused("the file is empty")
    picture = _picture_ending(head)
    if picture:
        return "image", picture
    clip = _clip_ending(head)
    if clip:
        lower = head.lower()
        if any(mark in lower for mark in _PLAYLISTS):
            raise Refused("the file names other files or addresses to play; only a clip that holds its own pictures")
        return "video", clip
    if head[4:8] == b"ftyp" and head[8:12] in _FTYP_REFUSED:
        raise Refused("HEIC pictures cannot be read here; save it as JPEG or PNG")
    what = "HTML or SVG" if re.match(rb"\s*<", head) else "neither picture nor clip"
    raise Refused(f"a picture (PNG, JPEG, WebP, GIF, ...) or a clip (MP4, WebM, ...) was expected; this is {what}")


def _picture_ending(head: bytes) -> str | None:
    if head[4:8] == b"ftyp":
        return _FTYP_PICTURES.get(head[8:12])
    if head[:4] == b"RIFF":
        return ".webp" if head[8:12] == b"WEBP" else None
    if re.match(rb"P[1-6]\s", head):
        return ".ppm"
    starts = {
        b"\x89PNG\r\n\x1a\n": ".png",
        b"\xff\xd8\xff": ".jpg",
        b"GIF87a": ".gif",
        b"GIF89a": ".gif",
        b"BM": ".bmp",
        b"II*\0": ".tiff",
        b"MM\0*": ".tiff",
        b"\0\0\1\0": ".ico",
        b"\0\0\0\x0cjP  \r\n\x87\n": ".jp2",
        b"\xff\x4f\xff\x51": ".jp2",
    }
    return next((ending for start, ending in starts.items() if head.startswith(start)), None)


def _clip_ending(head: bytes) -> str | None:
    if head[4:8] in _BOXES and not (head[4:8] == b"ftyp" and head[8:12] in _FTYP_REFUSED):
        return ".mov" if head[8:12] == b"qt  " else ".mp4"
    if head[:4] == b"\x1aE\xdf\xa3":
        return ".webm" if b"webm" in head[:64] else ".mkv"
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return ".avi"
    if head[:1] == b"G" and head[188:189] == b"G" and head[376:377] == b"G":
        return ".ts"
    starts = {b"OggS": ".ogv", b"FLV\1": ".flv", b"\0\0\1\xba": ".mpg", b"\0\0\1\xb3": ".mpg"}
    starts[b"0&\xb2u\x8ef\xcf\x11"] = ".wmv"
    return next((ending for start, ending in starts.items() if head.startswith(start)), None)


@dataclass(frozen=True)
class _Verdict:
    """What the examination of one content found: note, or the sentence it is refused with."""

    kind: Kind
    ending: str
    note: str
    refusal: str | None = None


_verdicts: OrderedDict[tuple[str, Caps], _Verdict] = OrderedDict()
_verdicts_lock = threading.Lock()


def examine(path: Path, caps: Caps, *, digest: str | None = None, seconds: float | None = None) -> _Verdict:
    """What a file is, found by decoding it whole in a child process under caps. Raises Refused.

    digest: the SHA-256 of its content, where known; the same content is examined once. seconds: less than
    caps.decode_s, where part of a request's time is spent.
    """
    key = (digest or digest_of(path), caps)
    with _verdicts_lock:
        verdict = _verdicts.get(key)
    if verdict is None:
        budget = caps.decode_s if seconds is None else min(seconds, caps.decode_s)
        try:
            with path.open("rb") as file:
                kind, ending = sniff(file.read(65_536))
            note = _examine_picture(path, caps, budget) if kind == "image" else _examine_clip(path, caps, budget)
            verdict = _Verdict(kind, ending, note)
        except _Late:
            raise
        except Refused as refused:
            verdict = _Verdict("image", "", "", str(refused))
        with _verdicts_lock:
            _verdicts[key] = verdict
            while len(_verdicts) > 4096:
                _verdicts.popitem(last=False)
    if verdict.refusal is not None:
        raise Refused(verdict.refusal)
    return verdict


def digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _examine_picture(path: Path, caps: Caps, seconds: float) -> str:
    from moonvit.image import _FORMATS

    request = {
        "path": str(path),
        "formats": list(_FORMATS),
        "pixels": caps.pixels,
        "memory": caps.decode_mb * 2**20,
        "seconds": seconds,
    }
    script = Path(__file__).with_name("picture_child.py")
    command = [sys.executable, "-P", str(script), json.dumps(request)]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=seconds, start_new_session=True, check=False
        )
    except subprocess.TimeoutExpired:
        raise _Late(f"decoding the picture took longer than {seconds:.3g} s") from None
    if not done.stdout:
        why = f"crashed on it (signal {-done.returncode})" if done.returncode < 0 else "gave up on it"
        raise Refused(f"the picture cannot be read: the decoder {why}")
    found = json.loads(done.stdout)
    if "error" in found:
        raise Refused(f"the picture cannot be read: {found['error']}")
    note = f"picture, {found['width']} x {found['height']} pixels, {found['format']}"
    if found["frames"] > 1:
        note += "; of an animation the first frame counts"
    if found["orientation"] not in (0, 1):
        note += "; stored sideways, and the model sees it as stored"
    return note


def _examine_clip(path: Path, caps: Caps, seconds: float) -> str:
    """By the very reader that feeds the model, with small frames: what passes here is as quick again later."""
    from moonvit.config import MediaConfig
    from moonvit.video import read_video

    small = MediaConfig(in_patch_limit_each_frame=64)
    frames = max(1, min(caps.clip_frames, math.ceil(caps.clip_seconds * small.sample_fps)))
    try:
        clip = read_video(path, small, max_frames=frames, timeout=seconds, memory_limit=caps.decode_mb * 2**20)
    except ValueError as error:
        text = str(error).removeprefix(str(path)[:200]).removeprefix(": ")
        if "over max_frames" in text:
            text = f"it is longer than the {frames / small.sample_fps:g} s allowed here"
        late = "decoding took longer" in text
        raise (_Late if late else Refused)(f"the clip cannot be read: {text}") from None
    length = clip.num_frames / clip.fps
    if length > caps.clip_seconds:
        raise Refused(f"the clip lasts {length:.1f} s, more than the {caps.clip_seconds:g} s allowed here")
    return f"clip, {length:.1f} s, {clip.num_frames} frames at {clip.fps:.4g} per second"


# ---- admit -----------------------------------------------------------------------------------------------------------


def admit(path: str | Path, visitor: str, caps: Caps, *, public: Sequence[Path] = ()) -> Admitted:
    """Copies a file that the visitor may use into the visitor's folder and says what it is.

    path: below the server's uploads, below the visitor's own folder or below one of `public` (examples); links that
    lead elsewhere are refused. visitor: from `visitor_of`. The content decides, never the name: it is decoded whole in
    a child process first, once per content. Raises Refused with one sentence.
    """
    text = str(path)
    if "\0" in text or not text:
        raise Refused("the file's name is empty or holds a null byte")
    if has_scheme(text):
        raise Refused("nothing is fetched from a network; upload the file itself")
    folder = visitor_folder(visitor)
    roots = [Path(os.environ.get("GRADIO_TEMP_DIR") or uploads()), folder, *public]
    try:
        real = Path(text).resolve(strict=True)
    except (OSError, RuntimeError, ValueError):
        raise Refused(f"there is no file {plain_name(text)!r} of yours here") from None
    if not any(real.is_relative_to(root.resolve()) for root in roots):
        raise Refused(f"there is no file {plain_name(text)!r} of yours here")  # the same words: no hint that it exists
    media = _private_folder(folder / "media")
    with _open_plain(real) as source:
        size = os.fstat(source.fileno()).st_size
        if size == 0:
            raise Refused(f"{plain_name(text)}: the file is empty")
        if size > caps.upload_mb * 1e6:
            raise Refused(f"{plain_name(text)}: {size / 1e6:.0f} MB are more than the {caps.upload_mb:g} MB allowed")
        if real.parent != media:
            check_room(visitor, size, caps)
        draft = media / f".{secrets.token_hex(8)}"
        try:
            digest = _copy(source, draft, size)
            try:
                verdict = examine(draft, caps, digest=digest)
            except Refused as refused:
                raise Refused(f"{plain_name(text)}: {refused}") from None
            kept = media / f"{digest[:32]}{verdict.ending}"
            os.replace(draft, kept)
        finally:
            draft.unlink(missing_ok=True)
    return Admitted(kept, verdict.kind, verdict.note)


def check_room(visitor: str, size: int, caps: Caps) -> None:
    """Raises Refused where a visitor's folder, or those of all visitors, cannot take `size` bytes more."""
    held = folder_size(visitor_folder(visitor)) / 1e6
    if held + size / 1e6 > caps.visitor_mb:
        raise Refused(f"your conversations hold {held:.0f} MB of the {caps.visitor_mb:g} MB allowed; delete some first")
    if folder_size(home() / "visitors") / 1e6 + size / 1e6 > caps.total_mb:
        raise Refused("this server's room for conversations is used up; its owner must make some")


def _open_plain(path: Path) -> BinaryIO:
    """A regular file, opened without following a link that appeared meanwhile and without waiting for a pipe."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError:
        raise Refused(f"there is no file {plain_name(str(path))!r} of yours here") from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise Refused(f"{plain_name(str(path))!r} is not a file")
    return os.fdopen(handle, "rb")


def _copy(source: BinaryIO, target: Path, size: int) -> str:
    digest = hashlib.sha256()
    left = size
    with os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
        while left > 0 and (block := source.read(min(left, 2**20))):
            digest.update(block)
            out.write(block)
            left -= len(block)
    return digest.hexdigest()


def folder_size(folder: Path) -> int:
    """Bytes of all files below a folder; links are not followed."""
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # gone meanwhile
                total += os.lstat(os.path.join(where, name)).st_size
    return total


def has_scheme(text: str) -> bool:
    return bool(re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:", text)) and not re.match(r"[a-zA-Z]:[\\/]", text)


def files_below(folder: Path) -> Iterator[tuple[float, int, Path]]:
    for where, _, names in os.walk(folder):
        for name in names:
            path = Path(where) / name
            with contextlib.suppress(OSError):  # gone meanwhile
                facts = path.lstat()
                yield facts.st_mtime, facts.st_size, path
