"""The page, START HERE: `moonkit demo` serves it on this machine.

    python -m demo.app --model nano            (the same as `moonkit demo`)

    browser - Guard (guard.py: whose file, how large) - gradio - pages - Models (models.py) - fusion
                                                        chat.py  sees.py  compare.py  benchmarks.py

Out: an address, as soon as the page can be had; the model is loaded behind it.
"""

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from demo.guard import LOOPBACK, Caps, Guard, home, uploads

if TYPE_CHECKING:
    import gradio as gr

    from demo.chat import Desk
    from demo.models import Models

PORTS_TRIED = 50


@dataclass(frozen=True)
class Demo:
    """Open the page: chat with pictures and clips, see what the model sees, compare models, run benchmarks."""

    model: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="PATH")] = ()
    """Folder or hub id of a checkpoint; may be given several times. None given: "nano", the small model in the box."""
    host: str = "127.0.0.1"
    """Address to listen on. 127.0.0.1 is this machine alone; 0.0.0.0 lets everyone in who can reach it."""
    port: int = 7860
    """Port to listen on; when it is taken, the next free one is used and said."""
    share: bool = False
    """Also open a public address through Gradio's tunnel: everyone who knows it can use this machine's model."""
    open: bool = True
    """Show the page in the browser, where this machine has a screen."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the weights; auto: the checkpoint's."""
    device: str = "auto"
    """cpu, cuda, mps; auto: the first that is there."""
    caps: Caps = field(default_factory=Caps)
    """What one visitor may ask for."""


def build(desk: "Desk") -> "gr.Blocks":
    """The whole page. Nothing is loaded and nothing is served yet."""
    import gradio as gr

    from demo import api, benchmarks, chat, compare, sees
    from demo.guard import visitor_of
    from demo.pieces import sentence

    with gr.Blocks(title="moonkit", analytics_enabled=False, delete_cache=(600, 7200), fill_width=True) as page:
        gr.HTML(
            '<header id="moonkit-title"><h1>moonkit</h1><p>Show a model a picture or a clip, watch it think, see what '
            "it saw. Everything runs on this machine.</p></header>",
            padding=False,
        )
        with gr.Tabs(elem_id="pages") as tabs:
            with gr.Tab("Chat", id="chat"):
                talk = chat.build(desk)
            with gr.Tab("What the model sees", id="sees"):
                seen = sees.build(desk.models, desk.caps)
            with gr.Tab("Compare", id="compare"):
                compare.build(desk.models, desk.caps)
            with gr.Tab("Benchmarks", id="benchmarks"):
                benchmarks.build(desk.models, desk.caps)
        api.build(desk)
        talk.on_load(page)

        def last_seen(id: str, request: gr.Request) -> list[Any]:
            try:
                return [desk.last_seen(visitor_of(request), id), gr.Tabs(selected="sees"), ""]
            except ValueError as error:
                return [gr.skip(), gr.skip(), chat.remark_of(sentence(error))]

        talk.see.click(
            last_seen, [talk.current], [seen.taken, tabs, talk.remark], show_progress="hidden", api_visibility="private"
        )
    return page


def mounted(desk: "Desk", host: str, port: int, public: bool) -> Guard:
    """The page as an ASGI app, with the guard around it."""
    import fastapi
    import gradio as gr

    from demo import chat, looks

    caps = desk.caps
    page = build(desk)
    page.queue(max_size=caps.queue, default_concurrency_limit=chat.AT_ONCE)
    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    gr.mount_gradio_app(
        app,
        page,
        "/",
        host,
        port,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        enable_monitoring=False,
        allowed_paths=[str(home() / "visitors"), *map(str, chat.PUBLIC)],
        theme=looks.theme(),
        css=looks.css(),
        head=looks.HEAD,
    )
    return Guard(app, blocks=page, caps=caps, public=chat.PUBLIC, hosts=None if public else LOOPBACK)


def serve(settings: Demo) -> None:
    """Serve the page until Ctrl-C."""
    gc.disable()  # what is imported stays: looking for garbage among it is a quarter of the time to the first page
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    uploads()  # before gradio is imported: it reads then where files may lie
    public = settings.share or settings.host not in LOOPBACK
    listening = listen(settings.host, settings.port)
    port = listening.getsockname()[1]
    if port != settings.port:
        print(f"port {settings.port} is taken, so the page is on {port}")

    import uvicorn

    from demo.chat import Desk
    from demo.models import Models

    models = Models(
        settings.model or ("nano",),
        None if settings.dtype == "auto" else settings.dtype,
        None if settings.device == "auto" else settings.device,
        wall_s=settings.caps.wall_s,
        max_frames=settings.caps.clip_frames,
    )
    desk = Desk(models, settings.caps)
    app = mounted(desk, settings.host, port, public)
    # every open page holds a stream that never ends: nothing to wait for
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=0, server_header=False, ws="none")
    logging.getLogger("uvicorn.error").addFilter(lambda record: not ended_by_us(record))
    server = uvicorn.Server(config)
    threading.Thread(target=announce, args=(settings, server, models, port), daemon=True).start()
    # uvicorn raises the signal again once it has closed; SIGTERM's default would leave no time to keep anything
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        server.run(sockets=[listening])
    except KeyboardInterrupt:
        desk.close()
        print("\nclosed", flush=True)
        # a thread that loads a model cannot be ended, and Python's own end would wait for it, or abort in its middle
        os._exit(0)


def ended_by_us(record: logging.LogRecord) -> bool:
    """Whether a line of the log only tells that an open stream was cut when the server ended."""
    error = record.exc_info[1] if record.exc_info else None
    return isinstance(error, asyncio.CancelledError) or "timeout graceful shutdown exceeded" in record.getMessage()


def announce(settings: Demo, server: Any, models: "Models", port: int) -> None:
    """Say where the page is once it answers, then load the model."""
    while not server.started:
        if server.should_exit:
            return
        time.sleep(0.01)
    name = (
        "127.0.0.1" if settings.host == "0.0.0.0" else f"[{settings.host}]" if ":" in settings.host else settings.host
    )
    address = f"http://{name}:{port}"
    print(f"moonkit demo: {address}   (Ctrl-C ends it)", flush=True)
    if settings.host not in LOOPBACK:
        print(
            f"warning: listening on {settings.host}, so everyone who can reach this machine can use the model and fill "
            "its queue; there is no password",
            flush=True,
        )
    if settings.share:
        share(settings.host, port)
    if settings.open and sys.stdout.isatty() and has_screen():
        import webbrowser

        webbrowser.open(address)
    models.warm()


def share(host: str, port: int) -> None:
    """Open a public address through Gradio's tunnel, and warn."""
    import secrets

    from gradio import networking

    print(
        "warning: --share sends this page through a server of Gradio; everyone who knows the address below can use "
        "this machine's model, and there is no password",
        flush=True,
    )
    local = "127.0.0.1" if host == "0.0.0.0" else host
    try:
        print("shared:", networking.setup_tunnel(local, port, secrets.token_urlsafe(32), None, None), flush=True)
    except (OSError, RuntimeError) as error:
        print(f"--share did not work, the page is on this machine alone: {error}", flush=True)


def has_screen() -> bool:
    """Whether a browser can be shown here: webbrowser would start one of the terminal's otherwise."""
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def listen(host: str, port: int) -> socket.socket:
    """A socket on the first free port from `port` on. Raises ValueError when there is none, or no such address."""
    if not 0 <= port <= 65_535:
        raise ValueError(f"a port lies between 0 and 65535, got {port}")
    try:
        family, kind, protocol, _, _ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ValueError(f"{host} is no address of this machine: {error.strerror}") from error
    reason = ""
    for number in range(port, min(port + PORTS_TRIED, 65_536)):
        candidate = socket.socket(family, kind, protocol)
        if os.name == "posix":  # elsewhere it would share the port with whoever has it
            candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            candidate.bind((host, number))
            candidate.listen(128)
        except OSError as error:
            candidate.close()
            reason = str(error.strerror or error)
            continue
        return candidate
    raise ValueError(f"no free port on {host} from {port} on: {reason}")


def main() -> None:
    """The verb."""
    serve(tyro.cli(Demo, prog="moonkit demo"))


if __name__ == "__main__":
    main()
