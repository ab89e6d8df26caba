"""Models as policies of the agent's loop: one that is loaded here, one behind a server.

pytest tests/evals/test_policy.py
"""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from agent.edit import File
from agent.loop import Budget, ContextFull, Script, solve
from evals.policy import Served, policy_of
from fusion.generate import Sampling
from fusion.model import Kimi
from tests.sandboxes import sandboxed

pytestmark = sandboxed

FILES = {"ops.py": File(b"def add(a, b):\n    return a - b\n")}
CALLS = [("str_replace", {"path": "ops.py", "old": "a - b", "new": "a + b"}), ("submit", {})]


@pytest.fixture
def server() -> Iterator[tuple[str, list[dict[str, Any]], list[Any]]]:
    """A chat server that plays a script, or what is put into `wrong`: (status, body)."""
    asked: list[dict[str, Any]] = []
    wrong: list[Any] = []
    script = Script(CALLS)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body | {"authorization": self.headers.get("Authorization")})
            message = script(body["messages"], body["tools"])
            said = {"choices": [{"message": message}], "usage": {"completion_tokens": 7}}
            status, answer = wrong[0] if wrong else (200, json.dumps(said))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(answer.encode())

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_address[1]}/v1", asked, wrong
    http.shutdown()
    http.server_close()


def test_a_served_model_edits_and_submits(
    server: tuple[str, list[dict[str, Any]], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, asked, _ = server
    monkeypatch.setenv("KEY_OF_A_TEST", "k1")
    trace = solve(Served(url, "kimi", "KEY_OF_A_TEST", extra={"thinking": {"type": "enabled"}}), "Mend add.", FILES)
    assert trace.ended == "submitted" and trace.diff is not None and "+    return a + b" in trace.diff
    assert trace.tokens == 14 and asked[0]["authorization"] == "Bearer k1" and asked[0]["thinking"]
    assert [message["role"] for message in asked[1]["messages"]][-2:] == ["assistant", "tool"]
    assert all("usage" not in message for message in asked[1]["messages"])


@pytest.mark.parametrize(
    ("status", "body", "why"),
    [(500, "overloaded", "HTTP 500: overloaded"), (200, "{}", "no chat completion"), (200, "<html>", "no chat")],
)
def test_a_server_that_fails_ends_the_trace(
    server: tuple[str, list[dict[str, Any]], list[Any]], status: int, body: str, why: str
) -> None:
    url, _, wrong = server
    wrong.append((status, body))
    trace = solve(Served(url, "kimi", retries=1, pause=0.01), "Mend add.", FILES)
    assert trace.ended == "policy_error" and why in trace.why


def test_a_server_that_finds_it_too_long(server: tuple[str, list[dict[str, Any]], list[Any]]) -> None:
    url, asked, wrong = server
    for status, said in (
        (400, "This model's maximum context length is 8192 tokens."),
        (400, "Invalid request: Your request exceeded model token limit: 262144"),
        (413, "Requested token count exceeds the model's maximum context length"),
    ):
        wrong[:] = [(status, json.dumps({"error": {"message": said}}))]
        trace = solve(Served(url, "kimi", seed=3), "Mend add.", FILES)
        assert trace.ended == "context" and said in trace.why
    wrong[:] = [(400, '{"error": "no such model"}')]
    assert solve(Served(url, "kimi"), "Mend add.", FILES).ended == "policy_error"
    assert asked[0]["seed"] == 3 and len(asked) == 4  # none is tried again


def test_no_server() -> None:
    trace = solve(Served("http://127.0.0.1:9/v1", "kimi", retries=0), "Mend add.", FILES)
    assert trace.ended == "policy_error" and "127.0.0.1:9" in trace.why
    with pytest.raises(ValueError, match="base_url must begin"):
        Served("localhost", "kimi")


def test_a_model_that_is_loaded_here_speaks_its_own_format() -> None:
    """The model in the box knows calculators, not repositories: what counts is that its words and calls arrive."""
    import world

    kimi = Kimi.from_pretrained("nano", dtype="float32", experts="dense").eval()
    sample = world.sample("tool", 0, "train", seed=7)
    policy = policy_of(kimi, Sampling(max_new_tokens=100))
    message = policy(sample.ask(0), [dict(tool) for tool in sample.tools])
    assert isinstance(message, dict)
    (call,), (wanted,) = message["tool_calls"], sample.turns[0].steps[0]["tool_calls"]
    assert call["function"]["name"] == wanted["function"]["name"] and json.loads(call["function"]["arguments"])
    assert message["usage"]["completion_tokens"] > 0
    trace = solve(policy, "Mend add.", FILES, budget=Budget(steps=3, wall_s=600))
    assert trace.ended in ("steps", "finished", "length"), trace
    long = [{"role": "user", "content": "a b c d " * 20_000}]
    with pytest.raises(ContextFull, match=r"80,.* tokens, the context 4,096"):
        policy_of(kimi)(long, [])
