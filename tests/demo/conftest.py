"""A page of a few lines behind the guard, files that mean harm, and the real page in a process of its own."""

import http.client
import io
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from world import sample

ROOT = Path(__file__).parents[2]


# ---- files -----------------------------------------------------------------------------------------------------------


def png(width: int = 64, height: int = 48, *, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
    return encoded(Image.fromarray(pixels), "PNG")


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_bomb(width: int = 50_000, height: int = 50_000) -> bytes:
    """A few kilobytes that claim billions of pixels."""
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    body = zlib.compress(bytes(10_000_000), 9)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", head) + png_chunk(b"IDAT", body) + png_chunk(b"IEND", b"")


def scan_bomb(scans: int = 3000, side: int = 4000) -> bytes:
    """A progressive JPEG whose scans over all of a large picture are repeated: small, allowed in size, slow."""
    plain = encoded(Image.new("L", (side, side), 77), "JPEG", progressive=True, quality=50)
    start = plain.rindex(b"\xff\xda")
    return plain[:start] + plain[start:-2] * scans + b"\xff\xd9"


def clip(seconds: float = 2.0, fps: int = 8, size: int = 64, *, container: str = "mp4", codec: str = "mpeg4") -> bytes:
    """A square of colour that moves to the right."""
    import av

    out = io.BytesIO()
    with av.open(out, "w", format=container) as writer:
        stream = writer.add_stream(codec, rate=fps)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        for number in range(round(seconds * fps)):
            frame = np.zeros((size, size, 3), np.uint8)
            left = (number * 4) % (size - 16)
            frame[8:24, left : left + 16] = (200, 40, 40)
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                writer.mux(packet)
        for packet in stream.encode():
            writer.mux(packet)
    return out.getvalue()


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures and clips on disk, as a person would choose them in a file dialogue."""
    folder = tmp_path_factory.mktemp("files")
    for name, family, number in (("picture", "picture", 3), ("rings", "picture", 1), ("chart", "chart", 3)):
        drawn = sample(family, number, "heldout").media[0]
        Image.fromarray(drawn.pixels).save(folder / f"{name}.png")
    (folder / "noise.png").write_bytes(png(96, 64))
    (folder / "ball.mp4").write_bytes(clip(codec="libx264"))
    (folder / "bomb.png").write_bytes(png_bomb())
    (folder / "torn.jpg").write_bytes(encoded(Image.new("RGB", (400, 300), "teal"), "JPEG")[:900])
    (folder / "page.png").write_bytes(b"<html><script>document.title='owned'</script></html>")
    return folder


# ---- a page of a few lines -------------------------------------------------------------------------------------------


@dataclass
class Toy:
    """The small page's address, and what its functions saw."""

    address: str
    guard: Any
    blocks: Any
    state: Path
    seen: list[Any] = field(default_factory=list)
    living: set[str] = field(default_factory=set)  # generators that have started and not ended
    steps: dict[str, int] = field(default_factory=dict)


def free_port() -> int:
    with socket.socket() as finder:
        finder.bind(("127.0.0.1", 0))
        return finder.getsockname()[1]


def wait_until(true: Callable[[], Any], seconds: float = 10.0, what: str = "it") -> Any:
    """The first true value; an error after `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = true()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"waited {seconds:g} s for {what}")


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Toy]:
    """A guarded page with a slow generator, a function that takes files and one that shows a picture."""
    state = tmp_path_factory.mktemp("state")
    kept = {name: os.environ.get(name) for name in ("MOONKIT_STATE", "GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED")}
    os.environ.update(MOONKIT_STATE=str(state), GRADIO_ANALYTICS_ENABLED="False")
    from demo import guard

    guard.uploads()
    import fastapi
    import gradio as gr
    import uvicorn

    page_toy = Toy("", None, None, state)
    caps = guard.Caps(
        upload_mb=2, body_mb=0.5, text_chars=2000, pixels=20_000_000, decode_s=4, clip_seconds=10, pending=2
    )

    def tell(text: str, request: gr.Request) -> Iterator[str]:
        page_toy.living.add(text)
        try:
            for number in range(400):
                page_toy.steps[text] = number
                time.sleep(0.02)
                yield f"{text} {number}"
        finally:
            page_toy.living.discard(text)

    def take(message: Any, request: gr.Request) -> str:
        page_toy.seen.append((guard.visitor_of(request), message))
        admitted = [guard.admit(path, guard.visitor_of(request), caps) for path in (message or {}).get("files", [])]
        return "; ".join(item.note for item in admitted) or "no file"

    def show(number: float) -> Image.Image:
        return Image.new("RGB", (32, 32), (int(number) % 256, 7, 9))

    with gr.Blocks(analytics_enabled=False) as page:
        text, message, number = gr.Textbox(label="text"), gr.MultimodalTextbox(label="message"), gr.Number(label="n")
        said, picture = gr.Textbox(label="said"), gr.Image(label="picture")
        text.submit(tell, text, said, api_name="tell", concurrency_limit=2, concurrency_id="model")
        message.submit(take, message, said, api_name="take")
        number.submit(show, number, picture, api_name="show")
    page.queue(max_size=caps.queue)
    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    gr.mount_gradio_app(app, page, "/", run_history=False, ssr_mode=False, mcp_server=False, footer_links=[])
    page_toy.guard, page_toy.blocks = guard.Guard(app, blocks=page, caps=caps), page
    port = free_port()
    server = uvicorn.Server(
        uvicorn.Config(page_toy.guard, host="127.0.0.1", port=port, log_level="warning", timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started, 20, "the small page")
    page_toy.address = f"http://127.0.0.1:{port}"
    yield page_toy
    server.should_exit = True
    thread.join(10)
    for name, value in kept.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


# ---- the real page ---------------------------------------------------------------------------------------------------


@dataclass
class Server:
    """`moonkit demo` in a process of its own. started_s: until the first page came; started_cpu_s: its own work."""

    address: str
    state: Path
    process: "subprocess.Popen[str]"
    log: Path
    started_s: float
    started_cpu_s: float

    def cpu_s(self) -> float:
        """Seconds of computing so far; on a busy machine a better clock than the one on the wall."""
        parts = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(parts[11]) + int(parts[12])) / os.sysconf("SC_CLK_TCK")


def start_server(state: Path, *arguments: str) -> Server:
    port, log = free_port(), state / "server.log"
    environment = {**os.environ, "MOONKIT_STATE": str(state), "OMP_NUM_THREADS": "1"}
    environment.pop("GRADIO_TEMP_DIR", None)
    command = [
        sys.executable,
        "-m",
        "demo.app",
        "--model",
        "nano",
        "--model",
        "untrained:tiny",
        "--port",
        str(port),
        *arguments,
    ]
    begin = time.perf_counter()
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT, text=True)

    def answers() -> bool:
        if process.poll() is not None:
            raise AssertionError(f"the page's process ended with {process.returncode}:\n{log.read_text()[-2000:]}")
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        try:
            connection.request("GET", "/")
            response = connection.getresponse()
            body = response.read()
        except OSError:
            return False
        finally:
            connection.close()
        return response.status == 200 and b"gradio" in body

    try:
        wait_until(answers, 60, "the first page")
    except BaseException:
        process.kill()
        raise
    running = Server(f"http://127.0.0.1:{port}", state, process, log, time.perf_counter() - begin, 0.0)
    running.started_cpu_s = running.cpu_s()
    return running


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The page with the model in the box and one of random weights, on a free port, with its own state."""
    running = start_server(tmp_path_factory.mktemp("page"))
    yield running
    running.process.terminate()
    try:
        running.process.wait(10)
    except subprocess.TimeoutExpired:
        running.process.kill()


@pytest.fixture(scope="session")
def chromium() -> str:
    """Debian's Chromium, or whichever is on the path."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        found = shutil.which(name)
        if found:
            return found
    pytest.skip("no chromium on the path; on Debian: apt-get install chromium")
