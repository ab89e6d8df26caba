"""Whole suites played by an agent: the verb and Python, kills, failures, two tries, reports and regrading.

pytest tests/evals/test_agents.py
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from agent.loop import ContextFull, Message, Policy, Script
from agent.sandbox import SandboxError
from evals import agents, regrade, suites
from evals.players import Agent, Rules, agent_of, rules_of
from evals.report import make_report, write_report
from evals.report_page import write_page
from tests.evals.published import aider_polyglot, git, lines, quixbugs
from tests.sandboxes import sandboxed

pytestmark = sandboxed

ROOT = Path(__file__).parents[2]
WRONG = {"add": "a - b", "mul": "a / b", "low": "max(a, b)"}
RIGHT = {"add": "a + b", "mul": "a * b", "low": "min(a, b)"}
ASKED = {"add": (19, 23, 42), "mul": (6, 9, 54), "low": (31, 17, 17)}


def source(fixed: str = "") -> str:
    return "\n\n".join(
        f"def {name}(a, b):\n    return {RIGHT[name] if name == fixed else code}" for name, code in WRONG.items()
    )


def swebench(root: Path, broken: str = "") -> None:
    """Rows of SWE-bench's form, one for each function of a repository. broken: one whose own patch is wrong."""
    repository = root / "repositories" / "own__calc.git"
    work = root / "work"
    work.mkdir(parents=True)
    (work / "calc.py").write_text(source() + "\n")
    (work / "test_old.py").write_text("import calc\n\n\ndef test_there():\n    assert callable(calc.add)\n")
    git(work, "init", "-q")
    git(work, "add", ".")
    git(work, "commit", "-qm", "first")
    git(root, "clone", "-q", "--mirror", str(work), str(repository))
    rows = []
    for name, (a, b, wanted) in ASKED.items():
        (work / "calc.py").write_text(source("" if name == broken else name) + "\n# mended\n")
        patch = git(work, "diff")
        test = [
            "from calc import *",
            "",
            "",
            f"def test_{name}():",
            f"    assert {name}({a}, {b}) == {wanted}",
        ]
        added = "".join(f"+{line}\n" for line in test)
        rows.append({
            "repo": "own/calc", "instance_id": f"own__calc-{name}", "version": "1",
            "base_commit": git(work, "rev-parse", "HEAD").strip(), "patch": patch,
            "test_patch": f"--- /dev/null\n+++ b/test_new.py\n@@ -0,0 +1,{len(test)} @@\n{added}",
            "problem_statement": f"The function {name} is wrong.",
            "FAIL_TO_PASS": json.dumps([f"test_new.py::test_{name}"]),
            "PASS_TO_PASS": '["test_old.py::test_there"]',
        })  # fmt: skip
    lines(root / "test.jsonl", rows)


def played(messages: list[Message]) -> Message:
    """What a model would say that mends add and mul, and thinks that low is right as it is."""
    told = str(messages[1]["content"])
    name = next(name for name in WRONG if f"function {name} " in told)
    step = sum(message["role"] == "assistant" for message in messages)
    calls: list[tuple[str, Any]] = [("bash", {"command": f"grep -n {name} calc.py; echo '<b>x</b>'"})]
    if name != "low":
        calls.append(("str_replace", {"path": "calc.py", "old": WRONG[name], "new": RIGHT[name]}))
    calls.append(("submit", {}))
    tool, arguments = calls[step]
    call = {"id": f"functions.{tool}:{step}", "type": "function"}
    call["function"] = {"name": tool, "arguments": json.dumps(arguments)}  # type: ignore[assignment]
    return {"role": "assistant", "content": "", "reasoning_content": f"step {step} of {name}", "tool_calls": [call]}


def scripted(seed: int, rules: Rules) -> Policy:
    def policy(messages: list[Message], tools: list[dict[str, Any]]) -> Message:
        return played(messages) | {"usage": {"prompt_tokens": 100, "completion_tokens": 7}}

    return policy


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data: in one place for all tests, because a reference's own run is remembered by it."""
    root = tmp_path_factory.mktemp("data")
    swebench(root / "swebench")
    aider_polyglot(root / "aider_polyglot")
    quixbugs(root / "quixbugs")
    return root


@pytest.fixture(autouse=True)
def apart(tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run in, with nothing kept."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOONKIT_DATA", str(shared))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    return tmp_path


@pytest.fixture
def own(apart: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a test has data of its own."""
    monkeypatch.setenv("MOONKIT_DATA", str(apart / "data"))
    return apart / "data" / "swebench"


class Server:
    """A chat server that plays. answer: what it does with a request, (status, body); asked: the requests."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.answer: Callable[[dict[str, Any]], tuple[int, Any]] = self.play
        self.url = ""

    @staticmethod
    def play(body: dict[str, Any]) -> tuple[int, Any]:
        message = played(body["messages"])
        usage = {"prompt_tokens": 100, "completion_tokens": 7}
        return 200, {"choices": [{"message": message, "finish_reason": "tool_calls"}], "usage": usage}


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            made.asked.append(body)
            status, said = made.answer(body)
            self.send_response(status)
            self.end_headers()
            try:
                self.wfile.write(json.dumps(said).encode())
            except OSError:  # whoever asked has been killed
                return

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    made.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
    yield made
    http.shutdown()
    http.server_close()


def verb(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["moonkit eval agent", *arguments])
    agents.main()


def arguments_for(server: Server, *more: str) -> list[str]:
    model = f"base_url={server.url},model=kimi,retries=0"
    return ["--tasks", "kimi_swebench", "--model", "moonkit-endpoint", "--model_args", model, *more]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_server_and_python_give_the_same_scores(
    server: Server, apart: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    verb(monkeypatch, *arguments_for(server, "--repeats", "2", "--workers", "2", "--out", "r"))
    shown = capsys.readouterr()
    assert "kimi_swebench               66.7 %" in shown.out and "3 problems x 2" in shown.out
    assert "16384     1   0.95     2  on" in shown.err  # what it is run with, before it is
    rows, told = rows_of(apart / "r"), json.loads((apart / "r" / "run.json").read_text())
    assert [(row["item_id"][10:], row["repeat"], row["score"]) for row in rows] == [
        ("add", 0, 1.0), ("add", 1, 1.0), ("mul", 0, 1.0), ("mul", 1, 1.0), ("low", 0, 0.0), ("low", 1, 0.0)
    ]  # fmt: skip
    assert told["finished"] and told["tasks"]["kimi_swebench"]["results"] == {"score,none": pytest.approx(2 / 3)}
    assert told["settings"]["kimi_swebench"]["budget"]["steps"] == 100 and told["isolation"]
    first = rows[0]
    assert (
        first["finish_reason"] == "submitted"
        and first["tokens"]["completion"] == 21
        and "+    return a + b" in first["reply"]
    )
    assert [turn["thinking"] for turn in first["transcript"]] == [f"step {step} of add" for step in range(3)]
    assert first["transcript"][0]["calls"][0]["result"] == "1:def add(a, b):\n<b>x</b>"
    assert {body["seed"] for body in server.asked if len(body["messages"]) == 2} and len(server.asked) == 16
    assert server.asked[0]["top_p"] == 0.95 and "usage" not in str(server.asked[-1]["messages"])

    result = agents.evaluate(
        Agent("scripted", scripted), "kimi_swebench", repeats=2, out="p", quiet=True, profile="k2_7", workers=2
    )
    mine = [(row["item_id"], row["repeat"], row["score"], row["edits"], row["tokens"]) for row in rows_of(apart / "p")]
    assert mine == [(row["item_id"], row["repeat"], row["score"], row["edits"], row["tokens"]) for row in rows]
    assert result.scores == {"kimi_swebench": {"score,none": pytest.approx(2 / 3)}}

    report = make_report([apart / "r"])
    summary = report.summaries[0]["kimi_swebench"]
    assert summary.score is not None and summary.score.value == pytest.approx(2 / 3) and summary.score.clusters == 3
    assert (
        summary.tokens_solved is not None
        and summary.tokens_solved.value == (4 * 21 + 2 * 14) / 4
        and summary.pass_at[2].value > 0.6
    )
    write_report(report, apart / "r")
    write_page(report, apart / "page.html", 0)
    assert "<b>x</b>" not in (apart / "page.html").read_text()  # what a tool said is text, and packed

    asked = len(server.asked)
    verb(monkeypatch, *arguments_for(server, "--repeats", "2", "--out", "r"))  # nothing is missing
    assert len(server.asked) == asked and rows_of(apart / "r") == rows
    with pytest.raises(ValueError, match="holds another run"):
        verb(monkeypatch, *arguments_for(server, "--steps", "7", "--out", "r"))


def test_regrading_asks_no_model(server: Server, apart: Path, own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swebench(own)
    verb(monkeypatch, *arguments_for(server, "--repeats", "1", "--out", "r"))
    asked = len(server.asked)
    path = own / "test.jsonl"
    plain = path.read_text()
    # the tests of add are mended: they had forgotten something
    path.write_text(plain.replace("assert add(19, 23) == 42", "assert add(19, 23) == 42 == add(40, 2)"))
    monkeypatch.setattr(agents, "agent_of", None)
    result, old = regrade.regrade(apart / "r")
    assert [row["score"] for row in result.rows] == [1.0, 1.0, 0.0] and len(server.asked) == asked
    assert result.record["regraded_from"] == old["id"] and result.folder == Path("r-regraded").absolute()
    digests = [record["tasks"]["kimi_swebench"]["data_sha256"] for record in (result.record, old)]
    assert digests[0] != digests[1] and rows_of(result.folder)[0]["transcript"] == rows_of(apart / "r")[0]["transcript"]
    monkeypatch.setattr(sys, "argv", ["moonkit eval", "regrade", "r", "--out", "again"])
    from evals import run

    run.main()
    assert make_report([Path("r"), Path("again")]).differences[0][1].difference.value == 0
    path.write_text(plain.replace("The function mul", "The method mul"))
    with pytest.raises(ValueError, match="own__calc-mul: the data has changed"):
        regrade.regrade(apart / "r", apart / "third")


def test_a_killed_run_goes_on_where_it_was(server: Server, apart: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reached, killed, play = threading.Event(), threading.Event(), server.answer

    def hang(body: dict[str, Any]) -> tuple[int, Any]:
        if "low" in body["messages"][1]["content"]:
            reached.set()
            killed.wait()
        return play(body)

    server.answer = hang
    arguments = arguments_for(server, "--repeats", "1", "--workers", "1", "--out", "r")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(
        [sys.executable, "-m", "moonkit", "eval", "agent", *arguments], env=environment, stderr=subprocess.DEVNULL
    )
    while not reached.wait(0.1):
        assert child.poll() is None
    child.send_signal(signal.SIGKILL)
    child.wait()
    killed.set()
    assert [row["score"] for row in rows_of(apart / "r")] == [1.0, 1.0]  # what there is can be reported
    (run,) = make_report([apart / "r"]).runs
    assert any("2 of 3 items" in problem for problem in run.problems)
    with pytest.raises(ValueError, match="has not finished; the same command goes on with it: moonkit eval agent"):
        regrade.regrade(apart / "r")
    server.answer, before = play, len(server.asked)
    verb(monkeypatch, *arguments)
    new = server.asked[before:]
    assert len(new) == 2 and all("low" in body["messages"][1]["content"] for body in new)
    assert [row["score"] for row in rows_of(apart / "r")] == [1.0, 1.0, 0.0]


def test_a_model_that_fails_loses_nothing(server: Server, apart: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play = server.answer

    def fails(body: dict[str, Any]) -> tuple[int, Any]:
        if "mul" in body["messages"][1]["content"] and len(body["messages"]) > 2:
            return 500, {"error": {"message": "out of memory"}}
        return play(body)

    server.answer = fails
    arguments = arguments_for(server, "--repeats", "1", "--workers", "1", "--out", "r")
    with pytest.raises(
        ValueError, match=r"failed in 1 trace, .*calc-mul, repeat 0: HTTP 500: out of mem.* 2 new traces of 3"
    ):
        verb(monkeypatch, *arguments)
    server.answer, before = (lambda body: (401, "no")), len(server.asked)
    with pytest.raises(ValueError, match=r"HTTP 401.*OPENAI_API_KEY is not set.* 0 new traces of 3"):
        verb(monkeypatch, *arguments)
    server.answer, middle = play, len(server.asked)
    verb(monkeypatch, *arguments)
    assert middle - before == 1 and len(server.asked) - middle == 3
    assert [row["score"] for row in rows_of(apart / "r")] == [1.0, 1.0, 0.0]


def test_what_is_the_models_own_fault_is_graded(apart: Path) -> None:

    def start(seed: int, rules: Rules) -> Policy:
        def policy(messages: list[Message], tools: list[dict[str, Any]]) -> Message:
            told = messages[1]["content"]
            if "mul" in told:
                return {"role": "assistant", "tool_calls": ["none"]}
            if len(messages) > 4 and "add" in told:
                raise ContextFull("200 of 100 tokens")
            if "low" in told:
                return {"role": "assistant", "content": "so ...", "finish_reason": "length"}
            return played(messages)

        return policy

    result = agents.evaluate(Agent("own", start), ["kimi_swebench"], repeats=1, quiet=True, profile="k2_5")
    ends = {row["item_id"][10:]: (row["finish_reason"], row["score"], row["status"]) for row in result.rows}
    # the change that was made before the context was full counts
    assert ends == {
        "add": ("context", 1.0, "graded"), "mul": ("policy_error", 0.0, "graded"), "low": ("length", 0.0, "truncated")
    }  # fmt: skip
    again = agents.evaluate(Agent("own", lambda seed, rules: pytest.fail("played")), ["kimi_swebench"], repeats=1,
                            quiet=True, profile="k2_5", store=result.folder.parent / "store", out="again")  # fmt: skip
    assert again.scores == result.scores


def test_broken_problems_are_named_and_can_be_left_out(own: Path) -> None:
    swebench(own, broken="mul")
    counts: list[int] = []

    def start(seed: int, rules: Rules) -> Policy:
        counts.append(seed)
        return scripted(seed, rules)

    options: dict[str, Any] = {"repeats": 1, "out": "r", "quiet": True, "profile": "k2_7"}
    with pytest.raises(
        ValueError, match=r"1 problem is broken, .*calc-mul: a broken .*not pass(?s:.*)2 new traces of 3"
    ):
        agents.evaluate(Agent("a", start), ["kimi_swebench"], **options)
    assert len(counts) == len(set(counts)) == 2  # the broken one was never played
    result = agents.evaluate(Agent("a", start), ["kimi_swebench"], skip_broken=True, **options)
    assert len(counts) == 2 and [row["item_id"][10:] for row in result.rows] == ["add", "low"]
    told = result.record["tasks"]["kimi_swebench"]
    assert told["n"] == 2 and list(told["left_out"]) == ["own__calc-mul"] and told["results"]["score,none"] == 0.5


def test_a_sandbox_that_fails_is_no_zero_and_is_tried_again(apart: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"repeats": 1, "out": "r", "quiet": True, "profile": "k2_7", "items": ["own__calc-add"]}

    def gone(problem: Any) -> None:
        raise SandboxError("no machine")

    with monkeypatch.context() as patched:
        patched.setattr(agents, "check", gone)
        result = agents.evaluate(Agent("a", scripted), ["kimi_swebench"], **options)
    (row,) = result.rows
    assert (row["score"], row["status"], row["evidence"]["why"]) == (None, "infra_error", "no machine")
    assert agents.evaluate(Agent("a", scripted), ["kimi_swebench"], **options).rows[0]["score"] == 1.0


def test_two_tries_as_aider_gives_them(apart: Path) -> None:
    seen: list[list[Message]] = []

    def start(seed: int, rules: Rules) -> Policy:
        def policy(messages: list[Message], tools: list[dict[str, Any]]) -> Message:
            assert not tools
            seen.append(messages)
            what = "leap.py\n```python\ndef leap_year(year):\n    return year % 4 == 0\n```"
            text = what if len(messages) > 1 else "I would rather not."
            return {"role": "assistant", "content": text, "reasoning_content": "hm", "usage": {"completion_tokens": 5}}

        return policy

    result = agents.evaluate(Agent("t", start), "kimi_aider_polyglot", repeats=1, out="r", quiet=True)
    assert result.scores["kimi_aider_polyglot"] == {"score,none": 1.0, "first_try,none": 0.0}
    (row,) = result.rows
    assert row["evidence"]["tries"] == [0.0, 1.0] and row["tokens"]["completion"] == 10 and len(row["edits"]) == 2
    assert row["item_id"] == suites.load("kimi_aider_polyglot")[0]["id"]
    # the tests' output is shown once, the tests are not; what was thought stays
    assert (
        "test_leap" in seen[1][2]["content"] and "test_leap" not in str(seen[1][0]) and seen[1][1]["reasoning_content"]
    )
    assert [next(iter(turn)) for turn in rows_of(apart / "r")[0]["transcript"]] == ["thinking", "shown", "thinking"]
    again, _ = regrade.regrade(apart / "r")
    assert again.scores == result.scores
    # with tools instead, the tests are hidden as well, and a file of their name is no test
    steps: list[tuple[str, Any]] = [
        ("bash", {"command": "ls; echo 'def test(): pass' > leap_test.py"}),
        ("bash", {"command": "echo 'def leap_year(year): return year % 4 == 0' > leap.py"}),
    ]
    result = agents.evaluate(Agent("s", lambda s, r: Script(steps)), "kimi_aider_polyglot", form="agent", repeats=1,
                             quiet=True)  # fmt: skip
    assert result.rows[0]["score"] == 1.0 and "Answer with" not in result.rows[0]["prompt"]
    assert rows_of(result.folder)[0]["transcript"][0]["calls"][0]["result"] == "leap.py"


def test_a_program_is_repaired_with_tools(apart: Path) -> None:
    for old, score in (("n // 3", 1.0), ("half", 0.0)):
        steps = [("str_replace", {"path": "half.py", "old": old, "new": "n // 2"})]
        made = agents.evaluate(
            Agent(old, lambda seed, rules, steps=steps: Script(steps)), "kimi_quixbugs", repeats=1, quiet=True
        )  # type: ignore[misc]
        assert made.rows[0]["score"] == score, made.rows[0]


def test_the_model_in_the_box_tries(apart: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("--tasks", "kimi_swebench", "--limit", "1", "--steps", "2", "--step_tokens", "40", "--out", "r")
    verb(monkeypatch, *arguments)
    (row,) = rows_of(apart / "r")
    assert row["score"] == 0.0 and row["tokens"]["completion"] > 0 and row["status"] in ("graded", "truncated")
    told = json.loads((apart / "r" / "run.json").read_text())
    assert told["model"]["weights_sha256"] and told["settings"]["kimi_swebench"]["profile"] == "nano"


def test_what_is_wrong_is_said_in_one_sentence(apart: Path, own: Path) -> None:
    agent = Agent("a", scripted)
    for tasks, options, says in (
        ("kimi_swebenc", {}, "no suite 'kimi_swebenc'; known: kimi_swebench"),
        ("kimi_gsm8k", {}, "has no files to work on; an agent can be given .*kimi_quixbugs"),
        ((), {}, "no task was named"),
        ("kimi_swebench", {}, "no data for kimi_swebench: looked in"),
        ("kimi_swebench", {"workers": 0}, "workers must be a whole number"),
    ):
        with pytest.raises(ValueError, match=says):
            agents.evaluate(agent, tasks, quiet=True, **options)
    swebench(own)
    for options, says in (
        ({"items": ["own__calc-ad"]}, "no problem 'own__calc-ad' .* near: own__calc-add"),
        ({"steps": 0}, "budget: steps must be positive"),
        ({"top_p": 2.0}, "top_p lies in"),
        ({"profile": "k3"}, "no profile 'k3'"),
        ({"form": "chat"}, "played as agent or tries"),
        ({"form": "tries"}, "two tries are for exercises"),
        ({"colour": 1}, "has no argument colour"),
        ({"model_args": {"a": 1}}, "brings its own"),
    ):
        with pytest.raises(ValueError, match=says):
            agents.evaluate(agent, "kimi_swebench", quiet=True, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs the server's name of the model"):
        agent_of("moonkit-endpoint", {"base_url": "http://localhost:1/v1"})
    path = own / "test.jsonl"
    path.write_text(path.read_text().replace('"FAIL_TO_PASS"', '"FAILS"', 1))
    with pytest.raises(ValueError, match=r"test\.jsonl:1: .*FAIL_TO_PASS names no test"):
        agents.evaluate(agent, "kimi_swebench", quiet=True)
    assert not (apart / "runs").exists()


def test_settings_are_those_of_the_suites() -> None:
    new, old = rules_of("kimi_swebench", "k2_7"), rules_of("kimi_swebench", "k2_5")
    assert (new.temperature, new.top_p, new.repeats, new.thinking) == (1.0, 0.95, 10, True)
    assert (old.temperature, old.repeats, old.thinking, old.form) == (0.6, 5, False, "agent")
    assert rules_of("kimi_aider_polyglot", "k2_7").form == "tries"
    assert rules_of("kimi_swebench", "nano", tokens=500, temperature=None).budget.tokens == 500
