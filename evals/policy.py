"""A model as the policy of an agent's loop: messages and tools in, one assistant message out.

    kimi = Kimi.from_pretrained(path)
    for problem in evals.suites.problems("kimi_swebench"):
        trace, verdict = evals.repositories.work(problem, policy_of(kimi, Sampling(16_384, temperature=1.0)))

    server = Served("http://localhost:8000/v1", "kimi-k2.7-code")          any OpenAI-compatible chat server
    trace, verdict = evals.repositories.work(problem, server)

The message has "content", "reasoning_content" (thoughts stay in the conversation, as K2.7-Code wants them),
"tool_calls" and "usage", as agent.loop reads them. What goes wrong raises, and ends the trace as policy_error.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from agent.loop import Message, Policy
from fusion.generate import Sampling, complete
from fusion.model import Kimi


def policy_of(kimi: Kimi, sampling: Sampling | None = None, thinking: bool = True) -> Policy:
    """A model that is loaded here. Each step has its own seed. Raises ValueError where a prompt fits no context."""
    chosen = sampling or Sampling(max_new_tokens=16_384, temperature=1.0, top_p=0.95)
    steps = 0

    def policy(messages: list[Message], tools: list[dict[str, Any]]) -> Message:
        nonlocal steps
        prompt = kimi.prepare(messages, tools=tools, thinking=thinking)
        (reply,) = complete(kimi, [prompt], replace(chosen, seed=chosen.seed + steps), tools)
        steps += 1
        calls = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in reply.tool_calls
        ]
        return {
            "role": "assistant",
            "content": reply.text,
            "reasoning_content": reply.thinking,
            "tool_calls": calls,
            "usage": {"completion_tokens": reply.usage.completion_tokens},
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
    extra: Mapping[str, Any] | None = None  # further fields of a request, as {"thinking": {"type": "disabled"}}

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url must begin with http:// or https://, got {self.base_url!r}")

    def __call__(self, messages: list[Message], tools: list[dict[str, Any]]) -> Message:
        """One request. Raises RuntimeError for a server that says no, and for a reply that is none."""
        import httpx

        key = os.environ.get(self.api_key_env, "")
        asked: dict[str, Any] = {
            "model": self.model,
            "messages": [{name: value for name, value in each.items() if name != "usage"} for each in messages],
            "tools": tools,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            **(self.extra or {}),
        }
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        url = f"{self.base_url.rstrip('/')}/chat/completions"
        try:
            response = httpx.post(url, json=asked, headers=headers, timeout=self.timeout)
        except httpx.TransportError as error:
            raise RuntimeError(f"{url}: {type(error).__name__} {error}".strip()) from None
        if response.status_code != 200:
            raise RuntimeError(f"{url}: HTTP {response.status_code}: {' '.join(response.text.split())[:300]}")
        try:
            body = response.json()
            message = dict(body["choices"][0]["message"])
            used = int((body.get("usage") or {}).get("completion_tokens") or 0)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise RuntimeError(f"{url}: no chat completion ({type(error).__name__}: {error})") from None
        return {**message, "role": "assistant", "usage": {"completion_tokens": used}}
