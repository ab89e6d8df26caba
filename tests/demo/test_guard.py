"""The door in front of the page: caps, whose file is whose, hostile files and hostile clients.

python -m pytest tests/demo/test_guard.py
"""

import asyncio
import contextlib
import http.client
import json
import os
import re
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from demo import door
from demo.guard import (
    Caps,
    Guard,
    Refused,
    admit,
    check_room,
    escape,
    home,
    plain_name,
    uploads,
    visitor_folder,
    visitor_of,
)
from tests.demo.conftest import Toy, clip, encoded, png, png_bomb, scan_bomb, wait_until

VISITOR = "0123456789abcdef" * 2
OTHER = "f" * 32


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A state of its own; the uploads folder of the process lies below it."""
    monkeypatch.setenv("MOONKIT_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    uploads()
    yield tmp_path / "state"


def uploaded(state: Path, name: str, body: bytes) -> Path:
    path = Path(os.environ["GRADIO_TEMP_DIR"]) / "abc" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(body)
    return path


# ---- text ------------------------------------------------------------------------------------------------------------


@given(st.text(max_size=60))
def test_escaped_text_shows_as_itself_and_starts_nothing(text: str) -> None:
    import html

    shown = escape(text)
    assert not re.search(r"[<>\[\]`*_$|!~\"'\\@]", shown)
    assert "://" not in shown and "www." not in shown
    assert html.unescape(shown) == " ".join(
        "".join(
            "\N{REPLACEMENT CHARACTER}"
            if "\ud800" <= char <= "\udfff"
            else " "
            if ord(char) < 32 or 127 <= ord(char) < 160 or char.isspace()
            else char
            for char in text
            if ord(char) not in door._HIDDEN
        ).split()
    )


@pytest.mark.parametrize(
    "text",
    [
        "<img src=x onerror=alert(1)>",
        "![a](http://evil.example/track.png)",
        "[click](javascript:alert(1))",
        "$\\href{javascript:alert(1)}{x}$",
        "```\ncode\n```",
        "# heading\n- list\n1. one\n| a | b |\n|---|---|",
        "<https://evil.example>",
        "evil@example.com www.evil.example",
        "&lt;script&gt;",
    ],
)
def test_markdown_of_a_stranger_renders_as_plain_text(text: str) -> None:
    markdown_it = pytest.importorskip("markdown_it")
    for lines in (False, True):
        shown = markdown_it.MarkdownIt("gfm-like", {"linkify": False}).render(escape(text, lines=lines))
        tags = set(re.findall(r"<(/?\w+)", shown))
        assert tags <= {"p", "/p", "br"}, shown


def test_names_with_direction_marks_tags_and_length_are_tamed() -> None:
    assert plain_name("../../etc/pass\u202ewd\n<b>.png") == "passwd <b>.png"  # for plain text; escape() for HTML
    assert len(plain_name("ä" * 255 + ".png")) <= 60
    assert escape("a\u202egnp.exe\u2066") == "agnp&#46;exe"
    assert escape("one\r\ntwo", lines=True) == "one<br>two"


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_home_is_private_and_a_link_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOONKIT_STATE", str(tmp_path / "new" / "state"))
    assert home().stat().st_mode & 0o777 == 0o700
    assert visitor_folder(VISITOR).stat().st_mode & 0o777 == 0o700
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.setenv("MOONKIT_STATE", str(tmp_path / "link"))
    with pytest.raises(ValueError, match="not a link"):
        home()


@pytest.mark.parametrize("name", ["", "..", "../" + "a" * 29, "A" * 32, "a" * 31, "a" * 33, "a" * 31 + "\n", "/" * 32])
def test_a_visitor_is_a_safe_folder_name(state: Path, name: str) -> None:
    with pytest.raises(ValueError, match="32 hexadecimal"):
        visitor_folder(name)


class FakeRequest:
    def __init__(self, session: str = "s", **headers: str) -> None:
        self.headers, self.session_hash = headers, session


def test_a_visitor_is_a_hash_of_cookie_header_or_session() -> None:
    cookie = f"a=b; moonkit_visitor={VISITOR}; c=d"
    known = visitor_of(FakeRequest(cookie=cookie))
    assert known == visitor_of(FakeRequest("other session", cookie=cookie)) and VISITOR not in known
    named = visitor_of(FakeRequest(**{"x-moonkit-visitor": "script"}))
    ways = {known, named, visitor_of(FakeRequest("one")), visitor_of(FakeRequest("two"))}
    assert len(ways) == 4 and all(re.fullmatch("[0-9a-f]{32}", way) for way in ways)
    assert visitor_of(FakeRequest("one", cookie="moonkit_visitor=../../etc")) == visitor_of(FakeRequest("one"))


def test_the_folder_of_a_process_that_ended_is_removed(state: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    left = home() / "passing" / str(ended.pid)
    left.mkdir()
    (left / "file").write_text("x")
    assert uploads().name == str(os.getpid()) and not left.exists()


# ---- admit -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO"])
def test_pictures_of_every_kind_are_admitted_by_content(state: Path, kind: str) -> None:
    path = uploaded(state, "named.txt", encoded(Image.new("RGB", (48, 32), "olive"), kind))
    admitted = admit(path, VISITOR, Caps())
    assert admitted.kind == "image" and admitted.path.parent == visitor_folder(VISITOR) / "media"
    assert admitted.path.stat().st_mode & 0o777 == 0o600 and admitted.path.read_bytes() == path.read_bytes()
    assert ("48 x 32" in admitted.note or kind == "ICO") and admitted.path.suffix != ".txt"


@pytest.mark.parametrize(("container", "codec"), [("mp4", "mpeg4"), ("matroska", "mpeg4"), ("avi", "mpeg4")])
def test_clips_are_admitted_by_content(state: Path, container: str, codec: str) -> None:
    admitted = admit(uploaded(state, "x", clip(2, container=container, codec=codec)), VISITOR, Caps())
    assert (admitted.kind, admitted.note) == ("video", "clip, 2.0 s, 16 frames at 8 per second")


HOSTILE = {
    "empty": (b"", "empty"),
    "bomb of 50,000 x 50,000": (png_bomb(), "50000 x 50000 pixels are more"),
    "text": (b"hello", "neither picture nor clip"),
    "page": (b"<html><script>alert(1)</script>", "HTML or SVG"),
    "drawing": (b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>", "HTML or SVG"),
    "torn PNG": (png()[:900], "cannot be read"),
    "torn JPEG": (encoded(Image.effect_noise((300, 200), 50), "JPEG")[:2000], "cannot be read"),
    "head of a PNG": (b"\x89PNG\r\n\x1a\n", "cannot be read"),
    "noise after PNG's head": (b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 8, "cannot be read"),
    "GIF of no size": (b"GIF89a\0\0\0\0\0\0\0;", "cannot be read"),
    "clip of noise": (b"\0\0\0\x20ftypisom" + bytes(range(256)) * 40, "cannot be read"),
    "torn clip": (clip(2)[:700], "cannot be read"),
    "clip without frames": (b"\x1aE\xdf\xa3\x80", "cannot be read"),
    "playlist": (b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:1/secret\n", "neither picture nor clip"),
    "playlist in a clip": (
        clip(1)[:64] + b'<MPD profiles="urn:mpeg:dash:profile:isoff-live:2011">',
        "names other files",
    ),
    "list of files": (b"ffconcat version 1.0\nfile /etc/passwd\n", "neither picture nor clip"),
    "HEIC": (b"\0\0\0\x18ftypheic" + bytes(64), "HEIC"),
    "programme": (b"\x7fELF" + bytes(64), "neither picture nor clip"),
    "archive": (b"PK\3\4" + bytes(64), "neither picture nor clip"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_gives_one_sentence_and_leaves_nothing(state: Path, name: str) -> None:
    body, expected = HOSTILE[name]
    with pytest.raises(Refused) as refused:
        admit(uploaded(state, "holiday.png", body), VISITOR, Caps())
    sentence = str(refused.value)
    assert expected in sentence and sentence.startswith("holiday.png: ")
    assert "\n" not in sentence and "Traceback" not in sentence and str(state) not in sentence and len(sentence) < 300
    assert list((visitor_folder(VISITOR) / "media").iterdir()) == []


def test_pixels_are_counted_before_they_are_decoded(state: Path) -> None:
    with pytest.raises(Refused, match=r"64 x 48 pixels are more than the 1,000 allowed"):
        admit(uploaded(state, "a.png", png(64, 48)), VISITOR, Caps(pixels=1000))
    huge = encoded(Image.new("RGB", (8192, 8192)), "WEBP", lossless=True, method=0, quality=0)
    begin = time.monotonic()
    with pytest.raises(Refused, match="8192 x 8192 pixels are more"):
        admit(uploaded(state, "a.webp", huge), VISITOR, Caps())
    assert time.monotonic() - begin < 5


def test_a_small_picture_that_decodes_for_minutes_is_cut_off(state: Path) -> None:
    body = scan_bomb()
    assert len(body) < 32e6
    begin = time.monotonic()
    with pytest.raises(Refused, match=r"took longer than 1 s|cannot be read"):
        admit(uploaded(state, "a.jpg", body), VISITOR, Caps(decode_s=1))
    assert time.monotonic() - begin < 4


def test_the_decoder_has_no_more_memory_than_allowed(state: Path) -> None:
    body = encoded(Image.new("RGB", (6000, 6000)), "PNG", compress_level=1)
    with pytest.raises(Refused, match=r"memory|cannot be read"):
        admit(uploaded(state, "a.png", body), VISITOR, Caps(decode_mb=120))
    assert admit(uploaded(state, "b.png", body), VISITOR, Caps()).kind == "image"  # the verdict holds for its caps only


def test_clips_have_a_length_a_number_of_frames_and_a_time(state: Path) -> None:
    long = uploaded(state, "long.mp4", clip(30, fps=2))
    with pytest.raises(Refused, match="longer than the 10 s allowed"):
        admit(long, VISITOR, Caps(clip_seconds=10))
    with pytest.raises(Refused, match="longer than the 4 s allowed"):
        admit(long, VISITOR, Caps(clip_frames=8))
    slow = uploaded(state, "slow.mp4", clip(20, fps=1))  # looked at fewer times than twice a second
    with pytest.raises(Refused, match=r"lasts 20\.0 s, more than the 15 s"):
        admit(slow, VISITOR, Caps(clip_seconds=15))
    with pytest.raises(Refused, match="took longer"):
        admit(long, VISITOR, Caps(decode_s=0.05))
    assert admit(long, VISITOR, Caps()).kind == "video"  # running out of time is not remembered


def test_files_of_others_and_of_the_machine_are_refused(state: Path, tmp_path: Path) -> None:
    mine = admit(uploaded(state, "a.png", png()), VISITOR, Caps()).path
    assert admit(mine, VISITOR, Caps()).path == mine
    outside = tmp_path / "outside.png"
    outside.write_bytes(png())
    link = uploaded(state, "x.png", png()).with_name("link.png")
    link.symlink_to(outside)
    folder_link = link.with_name("folder")
    folder_link.symlink_to(tmp_path)
    pipe = link.with_name("pipe.png")
    os.mkfifo(pipe)
    root = os.environ["GRADIO_TEMP_DIR"]
    tried: list[Any] = [
        mine,  # of VISITOR, asked for by OTHER
        outside,
        link,
        folder_link / "outside.png",
        f"{root}/../../../outside.png",
        "/etc/passwd",
        "/dev/zero",
        "/proc/self/environ",
        link.parent,
        pipe,
        root,
        "a.png",
        "",
        "a\0b",
        f"{root}/%2e%2e/%2e%2e/outside.png",
        f"{root}/{'x' * 5000}.png",
        f"{root}/\u202e\n<b>.png",
    ]
    for path in tried:
        with pytest.raises(Refused) as refused:
            admit(path, OTHER, Caps())
        assert "\n" not in str(refused.value) and str(tmp_path) not in str(refused.value)
    assert admit(outside, OTHER, Caps(), public=[tmp_path / "."]).kind == "image"  # examples are for all


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:1/x.png",
        "https://example.com/x.png",
        "ftp://x/y",
        "file:///etc/passwd",
        "data:image/png;base64,iVBORw0KGgo=",
        "concat:a|b",
        "tcp://127.0.0.1:1",
    ],
)
def test_nothing_is_fetched(state: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket, "create_connection", fail)
    with pytest.raises(Refused, match="nothing is fetched from a network"):
        admit(url, VISITOR, Caps())


def test_quota_of_a_visitor_and_of_all(state: Path) -> None:
    first = admit(uploaded(state, "a.png", png(200, 200)), VISITOR, Caps())  # 120 kB
    small = Caps(visitor_mb=0.15)
    with pytest.raises(Refused, match="delete some first"):
        admit(uploaded(state, "b.png", png(200, 200, seed=1)), VISITOR, small)
    assert admit(first.path, VISITOR, small).path == first.path  # what is there already costs nothing
    assert admit(uploaded(state, "b.png", png(200, 200, seed=1)), OTHER, small).kind == "image"
    with pytest.raises(Refused, match="room for conversations is used up"):
        check_room(VISITOR, 1, Caps(total_mb=0.1))


def test_the_same_content_is_examined_once(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    caps, counted = Caps(receive_s=77), []  # caps of no other test
    real = door._examine_picture
    monkeypatch.setattr(door, "_examine_picture", lambda *given: counted.append(1) or real(*given))
    for name in ("a.png", "b.png"):
        admit(uploaded(state, name, png(50, 51)), VISITOR, caps)
    for _ in range(2):
        with pytest.raises(Refused):
            admit(uploaded(state, "c.png", png(50, 51)[:500]), VISITOR, caps)
    assert len(counted) == 2


# ---- a client and the small page -------------------------------------------------------------------------------------


@pytest.fixture
def client(toy: Toy) -> Iterator[httpx.Client]:
    with person(toy) as one:
        yield one


@contextlib.contextmanager
def person(toy: Toy) -> Iterator[httpx.Client]:
    """A visitor with a cookie of its own."""
    with httpx.Client(base_url=toy.address, timeout=20) as one:
        one.get("/")
        assert "moonkit_visitor" in one.cookies
        yield one


def send(one: httpx.Client, body: bytes, name: str = "a.png") -> httpx.Response:
    return one.post("/gradio_api/upload", files={"files": (name, body)})


def file_of(path: str, **more: Any) -> dict[str, Any]:
    return {"path": path, "meta": {"_type": "gradio.FileData"}, **more}


def ask(one: httpx.Client, api: str, *data: Any, session: str | None = None) -> httpx.Response:
    return one.post(f"/gradio_api/call/{api}", json={"data": list(data), "session_hash": session})


def answer(one: httpx.Client, api: str, *data: Any) -> Any:
    """The last value of one call, by the plain HTTP route."""
    joined = ask(one, api, *data)
    assert joined.status_code == 200, joined.text
    stream = one.get(f"/gradio_api/call/{api}/{joined.json()['event_id']}")
    events = re.findall(r"event: (\w+)\ndata: (.*)\n", stream.text)
    assert events[-1][0] == "complete", stream.text[-500:]
    return json.loads(events[-1][1])[0]


def test_upload_take_and_show(client: httpx.Client, toy: Toy) -> None:
    path = send(client, png()).json()[0]
    assert answer(client, "take", {"text": "look", "files": [file_of(path)]}) == "picture, 64 x 48 pixels, PNG"
    shown = answer(client, "show", 5)
    got = client.get(f"/gradio_api/file={quote(shown['path'])}")
    assert got.status_code == 200 and got.headers["x-content-type-options"] == "nosniff"
    assert "sandbox" in got.headers["content-security-policy"]


def test_a_page_sets_a_strict_policy_and_a_hidden_cookie(toy: Toy) -> None:
    got = httpx.get(toy.address + "/")
    assert re.fullmatch(
        r"moonkit_visitor=[0-9a-f]{32}; Path=/; Max-Age=31536000; HttpOnly; SameSite=Lax", got.headers["set-cookie"]
    )
    assert "default-src 'self'" in got.headers["content-security-policy"]
    assert "http" not in got.headers["content-security-policy"]
    again = httpx.get(toy.address + "/", cookies={"moonkit_visitor": VISITOR})
    assert "set-cookie" not in again.headers
    forged = httpx.get(toy.address + "/", cookies={"moonkit_visitor": "../../etc"})
    assert "set-cookie" in forged.headers


def test_two_people_do_not_reach_each_others_files(toy: Toy) -> None:
    with person(toy) as one, person(toy) as two:
        path = send(one, png(seed=11)).json()[0]
        shown = answer(one, "show", 77)["path"]
        for text in (path, shown):
            assert one.get(f"/gradio_api/file={text}").status_code == 200
            assert two.get(f"/gradio_api/file={text}").status_code == 403
            assert two.head(f"/gradio_api/file={text}").status_code == 403
            refused = ask(two, "take", {"text": "", "files": [file_of(text)]})
            assert refused.status_code == 403 and "not yours" in refused.json()["detail"]
        assert send(two, png(seed=11)).json()[0] == path  # who has the same content may have the same file
        assert two.get(f"/gradio_api/file={path}").status_code == 200
        with httpx.Client(base_url=toy.address) as nobody:
            assert nobody.get(f"/gradio_api/file={path}").status_code == 403
            named = {"x-moonkit-visitor": "script"}
            assert nobody.get(f"/gradio_api/file={path}", headers=named).status_code == 403


def test_echoed_paths_open_nothing(toy: Toy) -> None:
    with person(toy) as one, person(toy) as two:
        path = send(one, png(seed=12)).json()[0]
        text = json.dumps({"path": path, "meta": {"_type": "gradio.FileData"}})
        joined = ask(two, "tell", text)
        with two.stream("GET", f"/gradio_api/call/tell/{joined.json()['event_id']}") as stream:
            for line in stream.iter_lines():
                if path in line:
                    break
        assert two.get(f"/gradio_api/file={path}").status_code == 403


def test_paths_outside_are_refused_however_they_are_spelled(client: httpx.Client, toy: Toy, tmp_path: Path) -> None:
    root = str(toy.guard.root)
    own = send(client, png()).json()[0]
    (tmp_path / "secret.png").write_bytes(png())
    link = Path(own).with_name("link.png")
    link.symlink_to(tmp_path / "secret.png")
    toy.guard.owners.put(str(link), {client_visitor(client)})  # even where the name were known as the visitor's
    spelled = [
        "/etc/passwd",
        "etc/passwd",
        f"{root}/../../../etc/passwd",
        f"{root}/%2e%2e/%2e%2e/etc/passwd",
        f"{own}/../../x",
        f"{own}\0.png",
        f"{own}%00",
        f"//{own}",
        own.replace("/", "//"),
        own.upper(),
        str(link),
        str(tmp_path / "secret.png"),
        str(toy.state / "visitors"),
        root,
        "http://127.0.0.1:1/x.png",
        "file:///etc/passwd",
        f"{root}/" + "x" * 3000,
        "x" * 9000,
        "C:\\Windows\\win.ini",
        "\\\\server\\share",
    ]
    for text in spelled:
        for raw in (quote(text), quote(text, safe="/:%"), quote(text, safe="").replace(".", "%2e")):
            status = raw_get(toy, f"/gradio_api/file={raw}", client)
            assert status in (400, 403, 404), (text, raw, status)
        refused = ask(client, "take", {"text": "", "files": [file_of(text)]})
        assert refused.status_code in (400, 403), text
    assert raw_get(toy, f"/gradio_api/file={quote(own)}", client) == 200


def client_visitor(client: httpx.Client) -> str:
    return visitor_of(FakeRequest(cookie=f"moonkit_visitor={client.cookies['moonkit_visitor']}"))


def raw_get(toy: Toy, target: str, client: httpx.Client) -> int:
    """Status of a GET whose target no library has tidied."""
    host, port = toy.address.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=10)
    try:
        connection.putrequest("GET", target, skip_accept_encoding=True)
        connection.putheader("Cookie", f"moonkit_visitor={client.cookies['moonkit_visitor']}")
        connection.endheaders()
        return connection.getresponse().status
    finally:
        connection.close()


@pytest.mark.parametrize(
    "change",
    [
        {"path": "http://127.0.0.1:{port}/x.png"},
        {"path": "https://example.com/x.png"},
        {"path": None, "url": 5},
        {"path": ["a"]},
        {"path": {"a": 1}},
        {"url": "http://127.0.0.1:{port}/x.png"},
        {"url": "https://example.com/gradio_api/file=/x.png"},
        {"url": "data:image/png;base64,iVBORw0KGgo="},
        {"url": "//example.com/gradio_api/file=x"},
        {"url": "/gradio_api/file=/etc/passwd"},
    ],
)
def test_no_address_of_a_body_is_fetched(client: httpx.Client, change: dict[str, Any]) -> None:
    path = send(client, png()).json()[0]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(0.3)
        port = listener.getsockname()[1]
        filled = {k: v.format(port=port) if isinstance(v, str) else v for k, v in change.items()}
        refused = ask(client, "take", {"text": "", "files": [{**file_of(path), **filled}]})
        assert refused.status_code in (400, 403), refused.text
        assert "\n" not in refused.json()["detail"]
        with pytest.raises(TimeoutError):
            listener.accept()


def test_own_address_of_an_upload_is_fine(client: httpx.Client, toy: Toy) -> None:
    path = send(client, png(), "a b (1).png").json()[0]
    for url in (
        f"{toy.address}/gradio_api/file={quote(path)}",
        f"/gradio_api/file={path}",
        "blob:http://x/1",
        None,
        "",
    ):
        assert ask(client, "take", {"text": "", "files": [file_of(path, url=url, orig_name="a")]}).status_code == 200


CLOSED = """
/gradio_api/proxy=https://x.hf.space/ /gradio_api/component_server /gradio_api/stream/x
/gradio_api/stream/a/b/1/playlist.m3u8 /gradio_api/deep_link?session_hash=x /monitoring /monitoring/summary
/gradio_api/mcp /gradio_api/mcp/sse /gradio_api/dev/reload /gradio_api/runs /gradio_api/run-history/records
/gradio_api/vibe-edit /gradio_api/vibe-code /gradio_api/process_recording /svelte/x
/gradio_api/custom_component/a/client/b/c /login /logout /gradio_api/token /pwa_icon/90000 /gradio_api/openapi.json
/docs /gradio_api/call/v2/tell /gradio_api/file//etc/passwd /static/../../etc/passwd /static/%2e%2e/%2e%2e/x
/assets/..%2f..%2fx /?deep_link=x /gradio_api/profiling/traces //gradio_api/file=/etc/passwd
/gradio_api//file=/etc/passwd /nothing
""".split()


@pytest.mark.parametrize("target", CLOSED)
def test_routes_that_the_page_does_not_need_are_closed(client: httpx.Client, toy: Toy, target: str) -> None:
    assert raw_get(toy, target, client) == 404
    if ".." not in target and "%2e" not in target and not target.startswith("//"):
        assert client.post(target, json={"prompt": "x", "code": "x", "hash": "x"}).status_code in (404, 405)


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "PROPFIND"])
def test_other_methods_are_closed(client: httpx.Client, method: str) -> None:
    assert client.request(method, "/gradio_api/upload").status_code in (400, 404, 405)


def test_a_foreign_name_or_page_is_refused(client: httpx.Client, toy: Toy) -> None:
    rebound = client.get("/", headers={"host": "evil.example"})
    assert rebound.status_code == 403 and "answers to" in rebound.text
    own = toy.address.removeprefix("http://")
    assert client.get("/", headers={"host": f"localhost:{own.split(':')[1]}"}).status_code == 200
    for origin in ("https://evil.example", "null", f"http://evil.example:{own.split(':')[1]}"):
        refused = client.post("/gradio_api/upload", files={"files": ("a.png", png())}, headers={"origin": origin})
        assert refused.status_code == 403
    assert client.post("/gradio_api/upload", files={"files": ("a", png())}, headers={"origin": toy.address}).is_success
    crossed = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}
    assert client.get("/config", headers=crossed).status_code == 403
    assert client.get("/", headers={**crossed, "sec-fetch-mode": "navigate"}).status_code == 200


def test_upload_size_is_counted_with_and_without_a_length(client: httpx.Client, toy: Toy) -> None:
    big = os.urandom(3_000_000)
    refused = send(client, big)
    assert refused.status_code == 413 and refused.text == "an upload may have 2 MB, this has 3.0 MB"
    read = 0

    def trickle() -> Iterator[bytes]:
        nonlocal read
        yield b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        for _ in range(400):
            read += 100_000
            yield bytes(100_000)

    kind = {"content-type": "multipart/form-data; boundary=x"}
    with contextlib.suppress(httpx.WriteError):  # the server closes on us in the middle
        assert client.post("/gradio_api/upload", content=trickle(), headers=kind).status_code == 413
    assert read < 40e6
    wait_until(lambda: not [p for p in toy.guard.root.iterdir() if p.is_file()], 5, "unfinished uploads to go")


def test_too_many_files_and_hostile_forms(client: httpx.Client, toy: Toy) -> None:
    many = client.post("/gradio_api/upload", files=[("files", (f"{n}.png", png(seed=n))) for n in range(9)])
    assert many.status_code == 422 and many.text == "8 files at most at a time, these are 9"
    form = "multipart/form-data; boundary=x"
    forms: list[tuple[bytes, str]] = [
        (b"", form),
        (b"--x\r\n\r\nhi\r\n--x--", form),
        (b"--x\r\nContent-Disposition: form-data; filename=a\r\n\r\nhi\r\n--x--", form),
        (b'--x\r\nContent-Disposition: form-data; name="files"\r\n\r\nhi\r\n--x--', form),
        (b"garbage", form),
        (b"garbage", "multipart/form-data"),
        (b"garbage", "text/plain"),
        (b"garbage", "multipart/form-data; boundary=" + "x" * 5000),
        (b"--x\r\n" + b"A: b\r\n" * 5000, form),
        (
            b"--x\r\nContent-Disposition: form-data; name=files; filename=..\r\n\r\nhi\r\n--x--",
            "multipart/form-data; boundary=x",
        ),
    ]
    for target in ("/gradio_api/upload", "/gradio_api/upload?upload_id=u1"):
        for body, kind in forms:
            got = client.post(target, content=body, headers={"content-type": kind})
            assert 400 <= got.status_code < 500, (body[:40], kind[:40], got.status_code, got.text)
            assert "Traceback" not in got.text
    assert send(client, png()).is_success


@pytest.mark.parametrize(
    "name",
    [
        "<img src=x onerror=alert(1)>.png",
        "a\nb.png",
        "\u202egnp.exe",
        "ü" * 120 + ".png",
        "x" * 255,
        "../../etc/cron.d/x.png",
        "..\\..\\x.png",
        "/etc/passwd",
        "%2e%2e%2f.png",
        "a%00b.png",
        "con.png",
        ".htaccess",
        "-rf",
        "%d.png",
        "*?{}.png",
    ],
)
def test_names_of_files_choose_no_place(client: httpx.Client, toy: Toy, name: str) -> None:
    got = send(client, png(seed=len(name)), name)
    if not got.is_success:
        assert got.status_code in (400, 422) and "\n" not in got.text
        return
    path = Path(got.json()[0])
    assert path.is_relative_to(toy.guard.root) and path.is_file() and len(path.name.encode()) <= 255
    taken = answer(client, "take", {"text": "", "files": [file_of(str(path), orig_name=name)]})
    assert taken == "picture, 64 x 48 pixels, PNG"


@pytest.mark.parametrize("name", ["bomb of 50,000 x 50,000", "page", "torn JPEG", "torn clip", "playlist", "empty"])
def test_a_hostile_upload_gives_a_sentence_and_is_removed(client: httpx.Client, toy: Toy, name: str) -> None:
    body, expected = HOSTILE[name]
    before = {path for path in toy.guard.root.rglob("*") if path.is_file()}
    got = send(client, body + (b"" if name == "empty" else name.encode()), "holiday.png")
    assert got.status_code == 422 and expected in got.text and got.text.startswith("holiday.png: "), got.text
    assert "\n" not in got.text
    assert {path for path in toy.guard.root.rglob("*") if path.is_file()} == before


def test_one_bad_file_takes_the_good_one_with_it_but_not_those_of_others(client: httpx.Client, toy: Toy) -> None:
    kept = Path(send(client, png(seed=21)).json()[0])
    both = [("files", ("a.png", png(seed=21))), ("files", ("b.png", png(seed=22))), ("files", ("c.png", b"no"))]
    assert client.post("/gradio_api/upload", files=both).status_code == 422
    assert kept.exists()


def test_a_slow_upload_is_cut_off_and_others_go_on(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy.guard, "caps", Caps(receive_s=0.6, upload_mb=2))
    host, port = toy.address.removeprefix("http://").split(":")
    with person(toy) as slow, person(toy) as other:
        raw = []
        for _ in range(3):  # the third is over the number at once
            one = socket.create_connection((host, int(port)))
            one.sendall(
                f"POST /gradio_api/upload HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: 1000000\r\n"
                f"Cookie: moonkit_visitor={slow.cookies['moonkit_visitor']}\r\n"
                "Content-Type: multipart/form-data; boundary=x\r\n\r\n".encode()
            )
            raw.append(one)
        assert b" 429 " in raw[2].recv(200)
        begin = time.monotonic()
        assert send(other, png()).is_success and time.monotonic() - begin < 5
        for one in raw[:2]:
            one.settimeout(5)
            assert b" 408 " in one.recv(200)
            one.close()
        assert send(slow, png()).is_success


def test_slow_files_of_one_visitor_do_not_keep_others_waiting(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    real, ended = toy.guard._examine_upload, []

    def examine(path: Path, seconds: float) -> None:
        if path.name == "slow.png":
            time.sleep(1.5)
        real(path, seconds)

    monkeypatch.setattr(toy.guard, "_examine_upload", examine)
    with person(toy) as slow, person(toy) as other:

        def upload(number: int) -> None:
            assert send(slow, png(seed=300 + number), "slow.png").is_success
            ended.append("slow")

        threads = [threading.Thread(target=upload, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        wait_until(lambda: any(busy.uploads == 2 for busy in toy.guard.busy.values()), 5, "both uploads to begin")
        assert send(other, png(seed=302)).is_success
        ended.append("other")
        for thread in threads:
            thread.join(20)
    assert ended.index("other") < 2 and len(ended) == 3


def test_an_upload_that_is_broken_off_leaves_nothing(toy: Toy) -> None:
    host, port = toy.address.removeprefix("http://").split(":")
    for _ in range(3):
        with socket.create_connection((host, int(port))) as one:
            one.sendall(
                f"POST /gradio_api/upload HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: 1000000\r\n"
                "Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
                'Content-Disposition: form-data; name="files"; filename="a"\r\n\r\n'.encode()
                + bytes(300_000)
            )
            wait_until(lambda: [p for p in toy.guard.root.iterdir() if p.is_file()], 5, "the upload to begin")
    wait_until(lambda: not [p for p in toy.guard.root.iterdir() if p.is_file()], 5, "unfinished uploads to go")
    wait_until(lambda: not toy.guard.busy, 5, "the guard to forget who was busy")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"[]", 400),
        (b"{", 400),
        (b"\xff\xfe", 400),
        (b"[" * 200_000, 400),
        (b'{"data":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400),
        (b'{"data": ["' + b"x" * 3000 + b'"]}', 413),
        (b'{"data": ["' + b"x" * 600_000 + b'"]}', 413),
        (b'{"data": [], "session_hash": 5}', 400),
        (b'{"data": [], "session_hash": "' + b"s" * 200 + b'"}', 400),
        (b'{"data": [{"component": "html", "value": "<script>", "constructor_args": {}}]}', 400),
        (b'{"data": [{"text": "", "files": [1,2,3,4,5,6,7,8,9]}]}', 413),
    ],
)
def test_bodies_that_are_large_deep_or_odd(client: httpx.Client, body: bytes, status: int) -> None:
    for target in ("/gradio_api/queue/join", "/gradio_api/call/take", "/gradio_api/run/take", "/gradio_api/cancel"):
        got = client.post(target, content=body, headers={"content-type": "application/json"})
        assert got.status_code == status and len(got.json()["detail"]) < 200, (target, got.status_code, got.text)


@pytest.mark.parametrize(
    ("target", "body", "status"),
    [
        ("call/take", {"data": 5}, 400),
        ("call/take", {}, 400),
        ("call/take", {"data": [1, 2, 3]}, 400),
        ("call/nothing", {"data": [1]}, 404),
        ("run/nothing", {"data": [1]}, 404),
        ("queue/join", {"data": [1]}, 404),
        ("queue/join", {"data": [1], "fn_index": 99}, 404),
        ("queue/join", {"data": [1], "fn_index": "x"}, 404),
        ("queue/join", {"data": [1, 2], "fn_index": 0}, 400),
    ],
)
def test_calls_that_fit_no_function_come_back_as_a_sentence(
    client: httpx.Client, target: str, body: dict[str, Any], status: int, capfd: Any
) -> None:
    got = client.post(f"/gradio_api/{target}", json=body)
    assert got.status_code == status and "\n" not in got.json()["detail"]
    assert "Traceback" not in "".join(capfd.readouterr())


def test_sessions_events_and_uploads_belong_to_who_began_them(toy: Toy) -> None:
    with person(toy) as one, person(toy) as two:
        first = ask(one, "tell", "of one", session="session-of-one").json()["event_id"]
        wait_until(lambda: toy.steps.get("of one", 0) > 2, 10, "an answer to begin")
        foreign = {"session_hash": "session-of-one", "fn_index": 0, "event_id": first}
        assert two.post("/gradio_api/cancel", json=foreign).status_code == 403
        own = ask(two, "tell", "of two", session="session-of-two").json()["event_id"]
        mixed = {"session_hash": "session-of-two", "fn_index": 0, "event_id": first}
        assert two.post("/gradio_api/cancel", json=mixed).status_code == 403
        assert two.get("/gradio_api/queue/data", params={"session_hash": "session-of-one"}).status_code == 403
        assert two.get("/gradio_api/heartbeat/session-of-one").status_code == 403
        assert two.get(f"/gradio_api/call/tell/{first}").status_code == 404
        assert ask(two, "tell", "x", session="session-of-one").status_code == 403
        assert (
            two.post("/gradio_api/reset", json={"event_id": "x", "session_hash": "session-of-one"}).status_code == 403
        )
        one.post("/gradio_api/upload?upload_id=u-one", files={"files": ("a.png", png())})
        assert two.get("/gradio_api/upload_progress?upload_id=u-one").status_code == 403
        assert "of one" in toy.living
        assert one.post("/gradio_api/cancel", json=foreign).status_code == 200
        wait_until(lambda: "of one" not in toy.living, 5, "the answer to stop")
        assert "of two" in toy.living  # a cancelled answer ends no other
        mine = {"session_hash": "session-of-two", "fn_index": 0, "event_id": own}
        assert two.post("/gradio_api/cancel", json=mine).status_code == 200
        wait_until(lambda: "of two" not in toy.living, 5, "the answer to stop")


def test_a_client_that_leaves_stops_its_answer(toy: Toy) -> None:
    with person(toy) as one:
        event = ask(one, "tell", "leaver").json()["event_id"]
        with one.stream("GET", f"/gradio_api/call/tell/{event}") as stream:
            for line in stream.iter_lines():
                if "leaver 3" in line:
                    break
        assert "leaver" in toy.living
    wait_until(lambda: "leaver" not in toy.living, 5, "the answer to stop")
    assert toy.steps["leaver"] < 390


def test_one_visitor_cannot_fill_the_queue(toy: Toy) -> None:
    with person(toy) as one, person(toy) as two:
        events = []
        for number in range(2):
            joined = ask(one, "tell", f"greedy {number}", session="greedy")
            events.append(joined.json()["event_id"])
        refused = ask(one, "tell", "greedy 3", session="greedy")
        assert refused.status_code == 429 and "answers of yours" in refused.json()["detail"]
        assert ask(one, "tell", "greedy 4", session="another").status_code == 429  # a new session is no new visitor
        wait_until(lambda: {"greedy 0", "greedy 1"} <= toy.living, 10, "both answers to begin")
        waiting = ask(two, "show", 3)
        assert waiting.status_code == 200
        for event in events:
            body = {"session_hash": "greedy", "fn_index": 0, "event_id": event}
            assert one.post("/gradio_api/cancel", json=body).status_code == 200
        wait_until(lambda: not toy.living, 5, "the answers to stop")
        assert ask(one, "show", 4, session="greedy").status_code == 200


def test_the_place_in_the_queue_is_told(toy: Toy) -> None:
    """Two run at a time; the third is told its place, by the stream that the page shows it from."""
    with person(toy) as one, person(toy) as two:
        index = 0
        events = [ask(one, "tell", f"front {n}", session="front").json()["event_id"] for n in range(2)]
        wait_until(lambda: {"front 0", "front 1"} <= toy.living, 10, "both answers to begin")
        body = {"data": ["behind"], "fn_index": index, "session_hash": "behind"}
        assert two.post("/gradio_api/queue/join", json=body).status_code == 200
        with two.stream("GET", "/gradio_api/queue/data", params={"session_hash": "behind"}) as stream:
            for line in stream.iter_lines():
                if line.startswith("data:") and json.loads(line[5:])["msg"] == "estimation":
                    told = json.loads(line[5:])
                    break
        assert (told["rank"], told["queue_size"]) == (0, 1)
        for event in events:
            one.post("/gradio_api/cancel", json={"session_hash": "front", "fn_index": index, "event_id": event})
        wait_until(lambda: not toy.living, 5, "all answers to stop; who waited has left")


def test_streams_of_one_visitor_are_counted(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy.guard, "caps", Caps(streams=2))
    with person(toy) as one, person(toy) as two, contextlib.ExitStack() as open_streams:
        for number in range(2):
            stream = open_streams.enter_context(one.stream("GET", f"/gradio_api/heartbeat/h{number}"))
            assert stream.status_code == 200
        assert one.get("/gradio_api/heartbeat/h2").status_code == 429
        with two.stream("GET", "/gradio_api/heartbeat/h3") as other:
            assert other.status_code == 200
    wait_until(lambda: not toy.guard.busy, 10, "the connections to end")


def test_a_visitors_oldest_uploads_make_room(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy.guard, "caps", Caps(upload_mb=0.3, visitor_mb=0.42))
    with person(toy) as one, person(toy) as two:
        shared = Path(send(one, png(250, 200, seed=90)).json()[0])  # 150 kB each
        assert Path(send(two, png(250, 200, seed=90)).json()[0]) == shared
        first = Path(send(one, png(250, 200, seed=91)).json()[0])
        second = Path(send(one, png(250, 200, seed=92)).json()[0])
        assert not first.exists() and second.exists() and shared.exists()  # another's is not taken away
        monkeypatch.setattr(toy.guard, "caps", Caps(total_mb=0.1, upload_mb=0.2))
        refused = send(two, png(seed=93))
        assert refused.status_code == 507 and "room" in refused.text


def test_websockets_and_lifespan(toy: Toy) -> None:
    sent: list[Any] = []

    async def send_(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    asyncio.run(toy.guard({"type": "websocket", "path": "/"}, receive, send_))
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_many_requests_at_once_leave_no_trace(toy: Toy) -> None:
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            with person(toy) as one:
                path = send(one, png(seed=number)).json()[0]
                assert answer(one, "take", {"text": "", "files": [file_of(path)]}).startswith("picture")
        except BaseException as error:  # noqa: BLE001 - told by the test's own thread
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    wait_until(lambda: not toy.guard.busy, 5, "the guard to forget who was busy")


def test_without_blocks_the_guard_stands_alone() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("never reached")

    guard, sent = Guard(app), []

    async def send_(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    scope = {
        "type": "http",
        "method": "GET",
        "path": "/nothing",
        "headers": [(b"host", b"localhost")],
        "query_string": b"",
    }
    asyncio.run(guard(scope, receive, send_))
    assert sent[0]["status"] == 404
