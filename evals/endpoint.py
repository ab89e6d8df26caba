"""Any OpenAI-compatible chat server as an lm-eval model: "moonkit-endpoint".

    export MOONSHOT_API_KEY=...
    moonkit eval --model moonkit-endpoint --tasks gsm8k \\
        --model_args base_url=https://api.moonshot.ai/v1,model=kimi-k2.7-code,api_key_env=MOONSHOT_API_KEY

    conversation, images as data URLs -> POST base_url/chat/completions, several at once -> text, thinking, usage

The key is read from an environment variable and never written anywhere. 429 and 5xx are tried again with growing
pauses, or after as long as the server says. A request that fails for good does not stop the others: when all are done
one sentence counts the failures, what came is in the store, and the same command asks for the rest. Servers give no
log-probabilities of a prompt, so tasks that need likelihoods are refused.
"""

import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from evals.media import data_urls
from evals.requests import Answer, Heard, Question, Rendered, check_names, conversation, cut, replies
from evals.store import Store

if TYPE_CHECKING:
    import httpx
    from lm_eval.api.instance import Instance

log = logging.getLogger(__name__)

AGAIN = (408, 409, 429, 500, 502, 503, 504, 520, 522, 524, 529)
HOPELESS = (401, 403, 404)  # the next request will end the same way
LONGEST_PAUSE = 60.0


class EndpointError(RuntimeError):
    """A request that failed for good. status None: no answer came."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@register_model("moonkit-endpoint")
class Endpoint(LM):
    """A chat server. Arguments as in `--model_args`; see __init__."""

    MULTIMODAL = True
    thinks = True

    def __init__(
        self,
        base_url: str = "http://localhost:8000/v1",
        model: str = "",
        *,
        api_key_env: str = "OPENAI_API_KEY",
        concurrency: int = 8,
        retries: int = 8,
        timeout: float = 3600.0,
        pause: float = 1.0,
        thinking: bool | str = "auto",
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int = 0,
        max_gen_toks: int | None = None,
        frames: int | None = None,
        store: str | Path | Store | None = None,
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        trust_remote_code: bool = False,
        **unknown: Any,
    ) -> None:
        """Nothing is asked yet.

        concurrency: requests at once. retries: after the first try, with pauses from `pause` seconds up. timeout:
        seconds of one request. thinking: auto says nothing to the server; true and false ask for it in the ways of
        Moonshot's API and of vLLM. temperature, top_p, max_gen_toks: win over what a task says. frames: clips are sent
        as so many images; left out, as files. Raises ValueError for arguments that do not fit.
        """
        super().__init__()
        if "api_key" in unknown:
            raise ValueError(
                "a key is never an argument, where others can read it: put it in an environment variable and name "
                "that one (api_key_env=MY_KEY)"
            )
        known = [name for name in self.__init__.__annotations__ if name not in ("unknown", "return")]  # type: ignore[misc]
        check_names("moonkit-endpoint", unknown, known)
        if not model:
            raise ValueError("--model moonkit-endpoint needs the server's name of the model: --model_args model=NAME")
        if not re.match(r"https?://", base_url):
            raise ValueError(f"base_url must start with http:// or https://, got {base_url!r}")
        for name, value in {"concurrency": concurrency, "max_gen_toks": max_gen_toks, "frames": frames}.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        mode = str(thinking).lower()
        if mode not in ("auto", "true", "false"):
            raise ValueError(f"thinking must be auto, true or false, got {thinking!r}")
        if batch_size not in (None, 1, "1"):
            log.warning("batch_size is ignored: concurrency=%d requests run at once", concurrency)
        self.url = base_url.rstrip("/")
        if not self.url.endswith("/chat/completions"):
            self.url += "/chat/completions"
        self.name = model
        self.thinking, self.concurrency, self.retries = mode, concurrency, int(retries)
        self.timeout, self.pause, self.frames = float(timeout), float(pause), frames
        self.given = {"temperature": temperature, "top_p": top_p, "top_k": None, "max_tokens": max_gen_toks}
        self.seed, self.max_gen_toks = int(seed), max_gen_toks or 4096
        self.store = store if isinstance(store, Store) or store is None else Store(store)
        self.heard: Heard | None = None
        self._key_name, self._key = api_key_env, os.environ.get(api_key_env)
        self._stop = threading.Event()
        self.usage = {"prompt": 0, "completion": 0, "thinking": 0, "requests": 0, "retries": 0}

    @property
    def identity(self) -> dict[str, Any]:
        return {"endpoint": self.url, "model": self.name, "thinking": self.thinking, "frames": self.frames}

    @property
    def parameters(self) -> dict[str, Any]:
        given = {name: value for name, value in self.given.items() if value is not None}
        return given | self.identity | {"seed": self.seed, "max_gen_toks": self.max_gen_toks}

    def get_model_info(self) -> dict[str, Any]:
        return {"model_sha": "", "endpoint": self.url, "endpoint_model": self.name, "usage": dict(self.usage)}

    @property
    def tokenizer_name(self) -> str:
        return f"endpoint-{re.sub(r'[^A-Za-z0-9.]+', '-', self.url)}-{self.name.replace('/', '-')}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The server has its own."""
        return ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> Rendered:
        messages = [{"role": m["role"], "content": m["content"]} for m in chat_history]
        text = "\n\n".join(f"[{message['role']}]\n{message['content']}" for message in messages)
        return Rendered(text, messages, add_generation_prompt)

    def loglikelihood(self, requests: list["Instance"], **_: Any) -> list[tuple[float, bool]]:
        tasks = ", ".join(sorted({str(request.task_name) for request in requests}))
        raise ValueError(
            f"{tasks}: a chat server gives no log-probabilities of a prompt; take a task that generates, or run the "
            "weights here (--model moonkit)"
        )

    def loglikelihood_rolling(self, requests: list["Instance"], **_: Any) -> list[float]:
        self.loglikelihood(requests)
        return []

    def generate_until(self, requests: list["Instance"], disable_tqdm: bool = False) -> list[str]:
        """The visible text of each reply, cut at the first `until`."""
        if any(not isinstance(request.args[0], Rendered) for request in requests):
            log.warning(
                "no chat template was asked for; a chat server gets each prompt as one user message all the same"
            )
        return replies(self, requests, disable_tqdm)

    def produce(self, asked: list[Question]) -> Iterator[tuple[Question, Answer]]:
        """Answers as they come. What fails for good is counted, and raised when the others are done."""
        import httpx

        if not asked:
            return
        failures: list[tuple[Question, EndpointError]] = []
        self._stop.clear()
        limits = httpx.Limits(max_connections=self.concurrency)
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        left = iter(asked)
        with (
            httpx.Client(timeout=self.timeout, limits=limits, headers=headers) as client,
            ThreadPoolExecutor(self.concurrency) as pool,
        ):
            running: dict[Future[Answer], Question] = {}
            try:
                while True:
                    # no more in flight than run at once: a prompt with images is large
                    while len(running) < self.concurrency and (question := next(left, None)) is not None:
                        running[pool.submit(self._one, client, question)] = question
                    if not running:
                        break
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        question = running.pop(future)
                        try:
                            yield question, future.result()
                        except EndpointError as error:
                            failures.append((question, error))
                            if error.status in HOPELESS:
                                raise
            finally:
                self._stop.set()  # retries that sleep give up
        if failures:
            question, first = failures[0]
            raise EndpointError(
                f"{len(failures)} of {len(asked)} requests failed, the first at {question.where}: {first}"
            )

    def _payload(self, question: Question) -> dict[str, Any]:
        options = question.options
        messages = conversation(question.context, question.media)
        for message in messages:
            if isinstance(message["content"], list):
                message["content"] = [
                    each
                    for part in message["content"]
                    for each in ([part] if part["type"] == "text" else data_urls(part[part["type"]], self.frames))
                ]
        if isinstance(question.context, Rendered) and not question.context.open:
            messages[-1]["partial"] = True  # Moonshot's name for an answer that has begun
        payload: dict[str, Any] = {"model": self.name, "messages": messages, "max_tokens": options.max_tokens}
        payload["temperature"] = options.temperature
        if options.temperature:
            payload |= {"top_p": options.top_p, "seed": question.seed & 0x7FFF_FFFF}
        if self.thinking != "auto":
            on = self.thinking == "true"
            payload["thinking"] = {"type": "enabled" if on else "disabled"}
            payload["chat_template_kwargs"] = {"thinking": on}
        if options.until and self.thinking == "false":
            payload["stop"] = list(options.until[:4])  # with thoughts, a server would stop inside them
        return payload

    def _one(self, client: "httpx.Client", question: Question) -> Answer:
        payload = self._payload(question)
        started = time.perf_counter()

        def again(trouble: EndpointError, wait_s: float) -> bool:
            self.usage["retries"] += 1
            log.info("%s: %s; again in %.1f s", question.where, trouble, wait_s)
            return not self._stop.wait(wait_s)

        no_key = "" if self._key else self._key_name
        response = post(client, self.url, payload, self.retries, self.pause, again, no_key)
        self.usage["requests"] += 1
        return self._read(response, question, started)

    def _read(self, response: "httpx.Response", question: Question, started: float) -> Answer:
        try:
            body = response.json()
            choice = body["choices"][0]
            message = choice["message"]
            content = message.get("content") or ""
            thinking = message.get("reasoning_content") or message.get("reasoning") or ""
            usage = body.get("usage") or {}
            reason = choice.get("finish_reason") or "stop"
            details = usage.get("completion_tokens_details") or {}
            tokens = {
                "prompt": int(usage.get("prompt_tokens") or 0),
                "completion": int(usage.get("completion_tokens") or 0),
                "thinking": int(details.get("reasoning_tokens") or 0),
                "media": 0,
            }
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise EndpointError(f"the reply is no chat completion ({type(error).__name__}: {error})") from None
        if not isinstance(content, str) or not isinstance(thinking, str):
            raise EndpointError("the reply is no chat completion (its content is no text)")
        if not thinking and "</think>" in content:
            thinking, _, content = content.rpartition("</think>")
            thinking = thinking.replace("<think>", "", 1)
        elif not thinking and content.lstrip().startswith("<think>"):  # cut off inside the thought
            thinking, content = content.lstrip().removeprefix("<think>"), ""
        for name in ("prompt", "completion", "thinking"):
            self.usage[name] += tokens[name]
        text = content.lstrip() if thinking else content
        short = cut(text, question.options.until)
        seconds = round(time.perf_counter() - started, 3)
        return Answer(
            text if short is None else short, thinking, "stop" if short is not None else reason, tokens, seconds
        )


def post(
    client: "httpx.Client",
    url: str,
    payload: Mapping[str, Any],
    retries: int,
    pause: float,
    again: Callable[[EndpointError, float], bool],
    no_key: str = "",
) -> "httpx.Response":
    """One request, tried again where that may help. again(trouble, seconds) waits, and says whether to go on; no_key:
    the variable that holds no key. Raises EndpointError for one that fails for good."""
    import httpx

    for attempt in range(retries + 1):
        wait_s = min(LONGEST_PAUSE, pause * 2**attempt) * (0.5 + random.random() / 2)
        try:
            response = client.post(url, json=payload)
        except httpx.TransportError as error:
            trouble = EndpointError(f"{url}: {type(error).__name__} {error}".strip())
        else:
            if response.status_code == 200:
                return response
            trouble = EndpointError(f"HTTP {response.status_code}: {_said(response)}", response.status_code)
            if response.status_code not in AGAIN:
                if response.status_code == 401 and no_key:
                    raise EndpointError(f"{trouble} (no key: {no_key} is not set)", 401)
                raise trouble
            wait_s = _retry_after(response.headers) or wait_s
        if attempt == retries or not again(trouble, wait_s):
            break
    raise EndpointError(f"{trouble} (after {attempt + 1} tries)", trouble.status)


def _said(response: "httpx.Response") -> str:
    """A server's words about an error, in one line."""
    text = response.text
    try:
        body = response.json()
    except ValueError:
        body = None
    if isinstance(body, dict):
        error = body.get("error", body)
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    return " ".join(text.split())[:300]


def _retry_after(headers: Mapping[str, str]) -> float | None:
    try:
        return min(LONGEST_PAUSE, max(0.0, float(headers.get("retry-after", ""))))
    except ValueError:
        return None
