"""Who plays `moonkit eval agent`, and by which rules: a model that is loaded here, a chat server, or a policy of yours.

agent_of("nano")                                                     ->  Agent
agent_of("moonkit-endpoint", {"base_url": URL, "model": NAME})       ->  Agent
Agent("mine", lambda seed, rules: my_policy)                             any policy of agent/loop.py

suite's settings ── rules_of(suite, profile) ──> Rules ──┐
                                                         ├── Agent.start(seed, rules) ──> the policy of one trace
folder, hub id, server ── agent_of ──> Agent ────────────┘
"""

import asyncio
import inspect
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from agent.loop import Budget, ContextFull, Message, Policy
from evals import suites
from evals.store import key_of

Form = Literal["agent", "tries"]
TRIES = 2  # aider's
BUDGETS: dict[str, Budget] = {
    # steps and seconds are ours: Moonshot's reports name the tools and the number of runs, and no such limit
    "k2_7": Budget(steps=100, wall_s=3600.0),
    "k2_5": Budget(steps=100, wall_s=3600.0),
    "nano": Budget(steps=8, wall_s=120.0, command_s=20.0, shown=2_000),
}


@dataclass(frozen=True)
class Rules:
    """How one suite is played. step_tokens: new tokens of one message, thoughts included; thinking: asked for where
    the model leaves a choice."""

    form: Form
    budget: Budget
    temperature: float = 1.0
    top_p: float = 0.95
    step_tokens: int = 16_384
    thinking: bool = True
    repeats: int = 1

    def __post_init__(self) -> None:
        if self.form not in ("agent", "tries"):
            raise ValueError(f"a suite is played as agent or tries, got {self.form!r}")
        for name in ("step_tokens", "repeats"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if not 0 <= self.temperature < float("inf") or not 0 < self.top_p <= 1:
            raise ValueError(
                f"temperature must not be negative and top_p lies in (0, 1], got {self.temperature} and {self.top_p}"
            )


@dataclass(frozen=True)
class Agent:
    """Who plays. start(seed, rules) gives the policy of one trace; identity: what its messages depend on besides."""

    name: str
    start: Callable[[int, Rules], Policy]
    identity: Mapping[str, Any] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    given: Mapping[str, Any] = field(default_factory=dict)  # wins over a suite's settings
    seed: int = 0
    profile: str = "k2_7"
    device: str | None = None

    def __post_init__(self) -> None:
        key_of(self.identity)  # what JSON cannot say is no identity


def rules_of(name: str, profile: str, form: str | None = None, **given: Any) -> Rules:
    """A suite's rules under a profile. given: fields of Rules and Budget that are set otherwise; None is not set."""
    chosen = suites.settings(name, profile)  # type: ignore[arg-type]
    told = {key: value for key, value in given.items() if value is not None}
    budget = replace(BUDGETS[profile], **{key: told.pop(key) for key in list(told) if key in asdict(BUDGETS[profile])})
    made = {"temperature": chosen.temperature, "top_p": chosen.top_p, "step_tokens": chosen.tokens}
    made |= {"thinking": chosen.thinking, "repeats": chosen.repeats}
    return Rules(form or suites.form(name), budget, **(made | told))  # type: ignore[arg-type]


def describe(rules: Mapping[str, Rules], profile: str) -> str:
    """A table of how these suites are played, to be printed before."""
    head = f"{'suite, profile ' + profile:<28}{'form':>6}{'steps':>7}{'seconds':>9}{'command':>9}{'tokens':>9}"
    lines = [head + f"{'a step':>8}{'temp':>6}{'top_p':>7}{'avg@':>6}  thinking"]
    for name, r in rules.items():
        b = r.budget
        steps = TRIES if r.form == "tries" else b.steps
        total = "-" if b.tokens is None else str(b.tokens)
        lines.append(
            f"{name:<28}{r.form:>6}{steps:>7}{b.wall_s:>9g}{b.command_s:>9g}{total:>9}{r.step_tokens:>8}"
            f"{r.temperature:>6g}{r.top_p:>7g}{r.repeats:>6}  {'on' if r.thinking else 'off'}"
        )
    return "\n".join(lines)


# ---- who plays


def agent_of(model: Any = "nano", model_args: Mapping[str, Any] | None = None) -> Agent:
    """An Agent; a Kimi; "moonkit-endpoint" with base_url and model; "moonkit", or a folder, hub id or "nano".

    model_args: as of `moonkit eval`. Raises ValueError for arguments that do not fit."""
    if isinstance(model, Agent):
        if model_args:
            raise ValueError("an Agent brings its own arguments; model_args are for models that are loaded here")
        return model
    arguments = dict(model_args or {})
    if model == "moonkit-endpoint":
        return _served(arguments)
    return _loaded(arguments if model == "moonkit" else {"pretrained": model} | arguments)


def _served(arguments: dict[str, Any]) -> Agent:
    from evals.endpoint import Endpoint
    from evals.policy import Served

    end = Endpoint(**arguments)

    def start(seed: int, rules: Rules) -> Policy:
        extra: dict[str, Any] = {}
        thinking = {"true": True, "false": False}.get(end.thinking, None if rules.thinking else False)
        if thinking is not None:  # in the ways of Moonshot's API and of vLLM
            extra["thinking"] = {"type": "enabled" if thinking else "disabled"}
            extra["chat_template_kwargs"] = {"thinking": thinking}
        return Served(
            end.url,
            end.name,
            end._key_name,
            rules.step_tokens,
            rules.temperature,
            rules.top_p,
            end.timeout,
            end.retries,
            end.pause,
            seed,
            extra,
        )

    identity = {"endpoint": end.url, "model": end.name, "thinking": end.thinking}
    given = {
        "temperature": end.given["temperature"],
        "top_p": end.given["top_p"],
        "step_tokens": end.given["max_tokens"],
    }
    return Agent(f"moonkit-endpoint:{end.name}", start, identity, end.parameters, given, end.seed)


def _loaded(arguments: dict[str, Any]) -> Agent:
    from evals.adapter import ALWAYS, SOMETIMES, Moonkit, is_small
    from evals.policy import policy_of
    from fusion.generate import Sampling

    lm = Moonkit(**arguments)
    lock = threading.Lock()

    thinker = lm.profile in (*ALWAYS, *SOMETIMES, "k2_thinking")
    keeps = True if lm.thinking == "preserved" else None

    def start(seed: int, rules: Rules) -> Policy:
        sampling = Sampling(rules.step_tokens, rules.temperature, rules.top_p, int(lm.given["top_k"] or 0), seed)
        free = lm.thinking == "auto" and lm.profile in SOMETIMES
        return policy_of(lm.kimi, sampling, thinker and (rules.thinking if free else lm.thinks), keeps, lock)

    given = {name: lm.given[name] for name in ("temperature", "top_p")} | {"step_tokens": lm.given["max_tokens"]}
    profile = "nano" if is_small(lm.kimi.config) else "k2_5" if lm.profile == "k2_5" else "k2_7"
    identity = dict(lm.identity) | {"top_k": lm.given["top_k"]}
    return Agent(lm.name, start, identity, lm.parameters, given, lm.seed, profile, str(lm.kimi.device))


class Watched:
    """A policy that can be stopped, and whose own failure is remembered."""

    def __init__(self, policy: Policy, stop: threading.Event) -> None:
        self.policy, self.stop = policy, stop
        self.failure: Exception | None = None

    async def __call__(self, messages: list[Message], tools: list[dict[str, Any]]) -> Message:
        call: Any = self.policy
        try:
            if self.stop.is_set():
                raise InterruptedError("the run was stopped")
            if inspect.iscoroutinefunction(call):
                said = call(messages, tools)
            else:
                said = await asyncio.to_thread(call, messages, tools)
            return await said if inspect.isawaitable(said) else said
        except ContextFull:
            raise
        except Exception as error:
            self.failure = error
            raise
