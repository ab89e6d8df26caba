"""The models of one page, and turns for those who use them at once.

    paths ("nano", a folder, a hub id) -> Models -> .stream(name, messages, ...) -> thinking, text, tool calls, end

    visitor A   prompt . token . token . token
    visitor B      prompt . token . token . token      one step of one visitor at a time, in the order they asked

    python -c "from demo.models import Models; print(Models(['nano']).names)"

No model logic: fusion answers. What is here is who may take the next step, when a reply must end, and which is loaded.
"""

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from fusion import Kimi, StreamEvent
    from fusion.config import Profile

# chat formats as people pick them; None is the checkpoint's own
PROFILES: dict[str, str | None] = {
    "the checkpoint's own": None,
    "K2.7-Code: always thinks, keeps earlier thoughts": "k2_7_code",
    "K2.6: may think, may keep earlier thoughts": "k2_6",
    "K2.5: may think, drops earlier thoughts": "k2_5",
    "K2-Thinking": "k2_thinking",
    "K2-Instruct: no thoughts": "k2",
    "Kimi-VL: no thoughts, no clips": "kimi_vl",
}


@dataclass(frozen=True)
class Settings:
    """How to answer. Numbers out of range are refused with a ValueError that names them when a reply starts.

    temperature 0 is greedy. thinking_budget: thinking tokens after which the thought is closed; None is no limit.
    profile: the chat format of a model of the family; None is the checkpoint's own. preserve_thinking: None is the
    format's own rule.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 512
    thinking_budget: int | None = None
    seed: int = 0
    thinking: bool = True
    preserve_thinking: bool | None = None
    system: str = ""
    profile: str | None = None


class Turns:
    """A lock that is passed on in the order in which it was asked for.

    threading.Lock may give it back to the thread that let it go: one long answer would starve the others.
    """

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._busy = False
        self._waiting: deque[threading.Event] = deque()

    def __enter__(self) -> None:
        with self._mutex:
            if not self._busy:
                self._busy = True
                return
            mine = threading.Event()
            self._waiting.append(mine)
        mine.wait()

    def __exit__(self, *_: object) -> None:
        with self._mutex:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._busy = False


class Models:
    """Models by short name, loaded when first used and then kept; safe to use from several threads."""

    def __init__(
        self,
        paths: Sequence[str],
        dtype: str | None = None,
        device: str | None = None,
        wall_s: float = 300.0,
        max_frames: int = 480,
    ) -> None:
        """dtype: None keeps the checkpoint's. device: None is the first of cuda, mps and cpu that is there.

        wall_s: seconds after which a reply ends with what it has. max_frames: of one clip, after sampling.
        """
        self.dtype, self.device, self.wall_s, self.max_frames = dtype, device, wall_s, max_frames
        self.turn = Turns()
        self._paths: dict[str, str] = {}
        self._loaded: dict[str, Kimi] = {}
        self._loading: dict[str, threading.Lock] = {}
        for path in paths:
            self.add(path)
        if not self._paths:
            raise ValueError("no model: name at least one, for example nano")

    @property
    def names(self) -> list[str]:
        """Short names, all different, in the order given."""
        return list(self._paths)

    def add(self, path: str) -> str:
        """Take one more checkpoint in, for whoever started the program; its name. Nothing is loaded yet."""
        if not isinstance(path, str) or not path.strip():
            raise ValueError("a model is a folder, a hub id or a name in the box such as nano; got nothing")
        if path in self._paths.values():
            return next(name for name, known in self._paths.items() if known == path)
        looks_local = path.startswith((".", "/", "~"))
        if looks_local and not Path(path).expanduser().is_dir():
            raise ValueError(f"no such model folder: {path}")
        full = str(Path(path).expanduser()) if looks_local else path
        short = Path(full).resolve().name if looks_local else path.rstrip("/").rsplit("/", 1)[-1]
        name, number = short, 2
        while name in self._paths:
            name, number = f"{short} ({number})", number + 1
        self._loading[name] = threading.Lock()
        self._paths[name] = full
        return name

    def path(self, name: str) -> str:
        """Where a model comes from. Raises ValueError for a name that is not here."""
        if name not in self._paths:
            raise ValueError(f"no model {name!r} here; there are: {', '.join(self._paths)}")
        return self._paths[name]

    def loaded(self, name: str) -> bool:
        return name in self._loaded

    def kimi(self, name: str) -> "Kimi":
        """The model itself, loaded on first use. Raises ValueError with one sentence when that fails."""
        path = self.path(name)
        with self._loading[name]:
            if name not in self._loaded:
                # torch and the weights cost seconds: not before someone asks
                import torch

                from fusion.model import Kimi

                first = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
                try:
                    self._loaded[name] = Kimi.from_pretrained(path, dtype=self.dtype, device=self.device or first)
                except OSError as error:
                    raise ValueError(f"the model {name} could not be read: {error}") from error
            return self._loaded[name]

    def warm(self) -> threading.Thread:
        """Load the first model, and read one token with it, in the background: the first visitor should not wait."""

        def load() -> None:
            try:
                for _ in self.stream(
                    self.names[0], [{"role": "user", "content": "1"}], None, Settings(max_new_tokens=1)
                ):
                    pass
            except ValueError:
                return  # the same sentence meets whoever asks first, in the page

        thread = threading.Thread(target=load, name="moonkit-warm", daemon=True)
        thread.start()
        return thread

    def stream(
        self,
        name: str,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None = None,
        settings: Settings = Settings(),
        stop: threading.Event | None = None,
    ) -> "Iterator[StreamEvent]":
        """Answer an OpenAI-style conversation; the last event has kind "end" and carries the Reply.

        Steps of all callers alternate. Closing the iterator, `stop` or the wall clock end it: the last two with a
        reply whose finish_reason is "halted". Raises ValueError for bad settings, unreadable media and prompts longer
        than the context.
        """
        began = time.monotonic()
        kimi = self.kimi(name)
        if settings.system and not (messages and messages[0].get("role") == "system"):
            messages = [{"role": "system", "content": settings.system}, *messages]

        def halt() -> bool:
            return (stop is not None and stop.is_set()) or time.monotonic() - began > self.wall_s

        yield from kimi.stream(
            messages,
            tools=tools,
            thinking=settings.thinking,
            preserve_thinking=settings.preserve_thinking,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=settings.seed,
            thinking_budget=settings.thinking_budget,
            max_frames=self.max_frames,
            profile=cast("Profile | None", settings.profile),
            turn=self.turn,
            halt=halt,
        )

    @contextmanager
    def alone(self) -> Iterator[None]:
        """One step of the model for work that is no reply, such as reading attention: waits for its turn."""
        with self.turn:
            yield
