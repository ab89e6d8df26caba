"""The agent loop: what tools do and say, budgets, the trace, and a diff that the agent cannot forge.

pytest tests/agent/test_loop.py
"""

import json
from typing import Any

import pytest

from agent.edit import File, applied, difference
from agent.loop import SYSTEM, TOOLS, Budget, Script, Trace, shorten, solve
from tests.sandboxes import sandboxed

pytestmark = sandboxed

FILES = {
    "calc/ops.py": File(b"def add(a, b):\n    return a - b\n"),
    "run.sh": File(b"#!/bin/sh\necho ran\n", "executable"),
    "to": File(b"calc/ops.py", "link"),
    "blob": File(b"\0\xff"),
    "long.txt": File(b"".join(b"line %d\n" % n for n in range(1, 3001))),
}


def said(*calls: tuple[str, Any], budget: Budget | None = None, **options: Any) -> tuple[Trace, list[str]]:
    trace = solve(Script(calls), "Make add add.", FILES, budget=budget, **options)
    assert trace.ended != "infra_error", trace.why
    return trace, [call.result for step in trace.steps for call in step.calls]


def test_tools_change_one_working_copy() -> None:
    trace, results = said(
        ("bash", {"command": "cd calc && pwd && ls && ../run.sh; export X=1"}),
        ("bash", {"command": "basename $PWD; echo [$X]; echo oops >&2; (exit 3)"}),
        ("view", {"path": ""}),
        ("view", {"path": "calc/ops.py"}),
        ("view", {"path": "long.txt", "first": 2999, "last": 9999}),
        ("str_replace", {"path": "calc/ops.py", "old": "a - b", "new": "a + b"}),
        ("create_file", {"path": "new/deep/file.py", "content": "x = 1\n"}),
        ("insert", {"path": "new/deep/file.py", "line": 0, "text": "# first"}),
        ("insert", {"path": "new/deep/file.py", "line": 2, "text": "y = 2\n"}),
        ("bash", {"command": "cd /nowhere"}),
        ("bash", {"command": "python3 -c 'import ops; print(ops.add(1, 2))'; rm ../blob; chmod 644 ../run.sh"}),
        ("submit", {}),
    )
    assert trace.ended == "submitted" and len(trace.steps) == 12 and trace.isolation in ("bwrap", "landlock")
    root, rest = results[0].split("\n", 1)
    assert root.endswith("/calc") and rest == "ops.py\nran"
    assert results[1] == "calc\n[]\noops\n[exit code 3]" and not trace.steps[1].calls[0].ok
    assert results[2].split("\n") == ["blob", "calc/", "calc/ops.py", "long.txt", "run.sh", "to"]
    assert results[3] == "     1\tdef add(a, b):\n     2\t    return a - b\n     3\t"
    assert results[4] == "  2999\tline 2999\n  3000\tline 3000\n  3001\t"
    assert "     2\t    return a + b" in results[5] and "created" in results[6]
    assert "[exit code 1]" in results[9] and results[10] == "3"
    after = {
        **FILES,
        "calc/ops.py": File(b"def add(a, b):\n    return a + b\n"),
        "new/deep/file.py": File(b"# first\nx = 1\ny = 2\n"),
        "run.sh": File(FILES["run.sh"].data),
    }
    del after["blob"]
    assert trace.diff is not None and applied(FILES, trace.diff) == after and trace.diff == difference(FILES, after)
    assert [message["role"] for message in trace.messages[:4]] == ["system", "user", "assistant", "tool"]
    assert trace.messages[0]["content"] == SYSTEM and trace.messages[3]["tool_call_id"] == "functions.bash:0"
    json.dumps(trace.messages)


def test_errors_are_tool_results() -> None:
    calls: list[tuple[str, Any]] = [
        ("fly", {}),
        ("bash", "{broken"),
        ("bash", "[1]"),
        ("bash", {}),
        ("bash", {"command": 3}),
        ("bash", {"command": "ls", "user": "root"}),
        ("bash", {"command": "a\0b"}),
        ("view", {"path": "../etc/passwd"}),
        ("view", {"path": "/etc/passwd"}),
        ("view", {"path": "to"}),
        ("view", {"path": "none.py"}),
        ("view", {"path": "calc/ops.py", "first": 9}),
        ("str_replace", {"path": "calc/ops.py", "old": "b", "new": "c"}),
        ("str_replace", {"path": "calc/ops.py", "old": "", "new": "c"}),
        ("str_replace", {"path": "blob", "old": "x", "new": "c"}),
        ("create_file", {"path": "calc/ops.py", "content": ""}),
        ("create_file", {"path": "calc/ops.py/x", "content": ""}),
        ("create_file", {"path": ".git/config", "content": ""}),
        ("insert", {"path": "calc/ops.py", "line": 3, "text": ""}),
        ("insert", {"path": "calc/ops.py", "line": True, "text": ""}),
    ]
    trace, results = said(*calls)
    assert trace.ended == "finished" and trace.diff == "" and len(results) == len(calls)
    for step, (name, given) in zip(trace.steps, calls, strict=False):
        assert not step.calls[0].ok and step.calls[0].result.startswith("error: "), (name, given, step.calls[0].result)
    assert "there are bash, create_file, insert, view, str_replace, submit" in results[0]
    assert {tool["function"]["name"] for tool in TOOLS} == {
        "bash", "create_file", "insert", "view", "str_replace", "submit"
    }  # fmt: skip


def test_budgets_end_it_and_the_diff_is_still_made() -> None:
    edit = ("bash", {"command": "echo x > x; sleep 0.1"})
    trace, _ = said(edit, edit, edit, budget=Budget(steps=2))
    assert trace.ended == "steps" and len(trace.steps) == 2 and trace.diff is not None and "+x" in trace.diff
    trace, results = said(("bash", {"command": "echo a; sleep 60"}), budget=Budget(command_s=0.5))
    assert trace.ended == "finished" and results[0].endswith("[ended after 0.5 seconds]")
    trace, _ = said(edit, edit, edit, budget=Budget(wall_s=0.01))
    assert trace.ended == "time" and trace.diff is not None
    trace, results = said(("bash", {"command": "yes | head -c 300000"}), budget=Budget(shown=500, command_s=20))
    assert len(results[0]) <= 500 and "characters left out" in results[0]
    script = Script([edit, edit, edit])

    def counted(messages: list[Any], tools: list[Any]) -> dict[str, Any]:
        return {**script(messages, tools), "usage": {"completion_tokens": 40}}

    trace = solve(counted, "x", FILES, budget=Budget(tokens=80))
    assert trace.ended == "tokens" and trace.tokens == 80 and "usage" not in trace.messages[2]
    for wrong in ({"steps": 0}, {"wall_s": -1}, {"shown": 5}, {"steps": True}):
        with pytest.raises(ValueError, match="budget"):
            Budget(**wrong)  # type: ignore[arg-type]


def test_a_policy_that_fails_is_part_of_the_trace() -> None:
    def raises(messages: list[Any], tools: list[Any]) -> dict[str, Any]:
        raise ConnectionError("server gone")

    trace = solve(raises, "x", FILES)
    assert (trace.ended, trace.why, trace.diff) == ("policy_error", "ConnectionError: server gone", "")
    for answer in ("text", {"role": "user"}, {"role": "assistant", "tool_calls": [{"id": "a"}]}):
        assert solve(lambda messages, tools, answer=answer: answer, "x", FILES).ended == "policy_error"  # type: ignore[misc]

    async def later(messages: list[Any], tools: list[Any]) -> dict[str, Any]:
        # calls side by side, with arguments as a dict: after submit none is made
        calls = [
            {"function": {"name": name, "arguments": {"command": "echo hi > hi"}}}
            for name in ("bash", "submit", "bash")
        ]
        return {"role": "assistant", "tool_calls": calls}

    trace = solve(later, [{"role": "user", "content": "x"}], FILES)
    assert trace.ended == "submitted" and [call.name for call in trace.steps[0].calls] == ["bash", "submit"]
    assert trace.messages[-1] == {
        "role": "tool",
        "tool_call_id": "functions.submit:1",
        "name": "submit",
        "content": "submitted",
    }


def test_the_diff_is_out_of_the_agents_reach() -> None:
    # what it leaves running is gone before the diff is made; links, pipes, strange names and depth do not stop it
    commands = (
        "(setsid sh -c 'while :; do echo late > late; done' &) ; ln -s /etc/passwd link; ln -sfn / to",
        "rm -f late; mkfifo pipe; mkdir -p .git/x __pycache__; echo > .git/x/y; echo > 'a\\b'; echo > z.pyc",
        "printf x > $'b\\xff'; printf y > 'n\n.txt'; head -c 5000000 /dev/zero > large",
        "d=; for i in $(seq 150); do d=$d/dddddddddddddd; done; mkdir -p .$d",
        "echo 'print({})' > json.py; echo 'import os; os._exit(0)' > hashlib.py",
        "rm long.txt; mkdir long.txt; echo > long.txt/inner",
    )
    trace, _ = said(*(("bash", {"command": command}) for command in commands))
    assert trace.diff is not None and trace.ended == "finished"
    after = applied(FILES, trace.diff)
    assert set(after) == {*FILES, "b\udcff", "n\n.txt", "json.py", "hashlib.py", "long.txt/inner"} - {"long.txt"}
    assert {"link", "to", "pipe", "a\\b", "large"} <= set(trace.left_out) and after["to"] == FILES["to"]


def test_shorten() -> None:
    assert shorten("x" * 300, 300) == "x" * 300
    short = shorten("a" * 500 + "b" * 500, 300)
    assert (
        len(short) <= 300 and short.startswith("aaa") and short.endswith("bbb") and "780 characters left out" in short
    )
