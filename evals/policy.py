"""A model as the policy of an agent's loop: messages and tools in, one assistant message out.

    kimi = Kimi.from_pretrained(path)
    for problem in evals.suites.problems("kimi_swebench"):
        trace, verdict = evals.repositories.work(problem, policy_of(kimi, Sampling(16_384, temperature=1.0)))

    server = Served("http://localhost:8000/v1", "kimi-k2.7-code")          any OpenAI-compatible chat server
    trace, verdict = evals.repositories.work(problem, server)

The message has "content", "reasoning_content" (thoughts stay in the conversation, as K2.7-Code wants them),
"tool_calls", "finish_reason" and "usage", as agent.loop reads them. A conversation that fits no context ends the trace
as "context"; whatever else goes wrong raises, and ends it as "policy_error".
"""

import os
import re
import threading
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

from agent.loop import ContextFull, Message, Policy
from fusion.generate import Sampling, stream
from fusion.model import Kimi

OURS = ("role", "content", "reasoning_content", "reasoning", "tool_calls", "tool_call_id", "name")  # what is sent back
# what servers say of a conversation that is too long: Moonshot's, vLLM's, SGLang's, OpenAI's words
TOO_LONG = re.compile(r"context.{0,20}(length|window|size|limit)|token limit|maximum.{0,20}length|too long", re.I)


def policy_of(
    kimi: Kimi,
    sampling: Sampling | None = None,
    thinking: bool = True,
    preserve_thinking: bool | None = None,
    lock: AbstractContextManager[Any] | None = None,
) -> Policy:
    """A model that is loaded here. Each step has its own seed.

    thinking, preserve_thinking: as Kimi.prepare takes them. lock: held while the model writes, for several policies of
    one model side by side. Raises ContextFull where the conversation leaves no room for a token."""
    chosen = sampling or Sampling(max_new_tokens=16_384, temperature=1.0, top_p=0.95)
    held = lock or threading.Lock()
    steps = 0

    def policy(messages: list[Message], tools: list[dict[str, Any]]) -> Message:
        nonlocal steps
        with held:
            prompt = kimi.prepare(messages, tools=tools or None, thinking=thinking, preserve_thinking=preserve_thinking)
            limit = kimi.config.text.max_position_embeddings
            if len(prompt) >= limit:
                raise ContextFull(f"the conversation has {len(prompt):,} tokens, the context {limit:,}")
            seed = (chosen.seed + steps) % 2**63
            steps += 1
            before = sum(len(message.get("tool_calls") or ()) for message in messages)
            *_, last = stream(kimi, prompt, replace(chosen, seed=seed), before, tools or None)
        reply = last.reply
        assert reply is not None, "the last event carries the reply"
        calls = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in reply.tool_calls
        ]
        usage = reply.usage
        return {
            "role": "assistant",
            "content": reply.text,
            "reasoning_content": reply.thinking,
            "tool_calls": calls,
            "finish_reason": reply.finish_reason,
            "usage": {
                "prompt_tokens": usage.prompt_tokens,
                "completion_tokens": usage.completion_tokens,
                "completion_tokens_details": {"reasoning_tokens": usage.thinking_tokens},
            },
        }

    return policy


@dataclass(frozen=True)
class Served:
    """A model behind an OpenAI-compatible chat server. The key is read from the environment variable that is named."""

    base_url: str
    model: str
    api_key_env: str = "OPENAI_API_KEY"
    max_tokens: int = 16_384
    temperature: float = 1.0
    top_p: float = 0.95
    timeout: float = 600.0
    retries: int = 4  # after the first try, of what may pass: no connection, 429, 5xx
    pause: float = 1.0  # seconds before the first of them; it doubles
    seed: int | None = None  # of the first step's sampling, sent where it is given; each step has its own
    extra: Mapping[str, Any] | None = None  # further fields of a request, as {"thinking": {"type": "disabled"}}

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url must begin with http:// or https://, got {self.base_url!r}")

    def __call__(self, messages: list[Message], tools: list[dict[str, Any]]) -> Message:
        """One request. Raises EndpointError for a server that says no or gives no reply, ContextFull for a conversation
        that it finds too long."""
        import httpx

        from evals.endpoint import EndpointError, post

        key = os.environ.get(self.api_key_env, "")
        asked: dict[str, Any] = {
            "model": self.model,
            "messages": [{name: value for name, value in each.items() if name in OURS} for each in messages],
            **({"tools": tools} if tools else {}),
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
        }
        if self.seed is not None and self.temperature:
            step = sum(message.get("role") == "assistant" for message in messages)
            asked["seed"] = (self.seed + step) & 0x7FFF_FFFF
        asked |= dict(self.extra or {})
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        url = self.base_url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"

        def again(trouble: EndpointError, seconds: float) -> bool:
            time.sleep(seconds)
            return True

        try:
            with httpx.Client(timeout=self.timeout, headers=headers) as client:
                response = post(client, url, asked, self.retries, self.pause, again, "" if key else self.api_key_env)
        except EndpointError as error:
            if error.status in (400, 413, 422) and TOO_LONG.search(str(error)):
                raise ContextFull(str(error)) from None
            raise
        try:
            body = response.json()
            choice = body["choices"][0]
            message = {name: value for name, value in dict(choice["message"]).items() if name in OURS}
            usage = dict(body.get("usage") or {})
            usage["completion_tokens"] = int(usage.get("completion_tokens") or 0)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise EndpointError(f"{url}: no chat completion ({type(error).__name__}: {error})", 200) from None
        return {**message, "role": "assistant", "finish_reason": choice.get("finish_reason"), "usage": usage}
