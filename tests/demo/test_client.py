"""The named endpoints, as a program reaches them: gradio_client against the page in a process of its own.

python -m pytest tests/demo/test_client.py
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from tests.demo.conftest import Server, wait_until

ENDPOINTS = {"/chat", "/see", "/compare", "/benchmark"}


@pytest.fixture(scope="module")
def client(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    made = Client(server.address, verbose=False, download_files=str(tmp_path_factory.mktemp("downloads")))
    yield made
    made.close()


def last(job: Any) -> Any:
    """The final report of a streaming call."""
    job.result(120)
    return job.outputs()[-1]


def test_only_the_named_endpoints_are_public(client: Client) -> None:
    named = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert set(named) == ENDPOINTS
    for name, about in named.items():
        assert about["description"], f"{name} says nothing about itself"


def test_chat_streams_an_answer_about_a_picture(client: Client, files: Path) -> None:
    picture = handle_file(str(files / "picture.png"))
    job = client.submit("the colour of the largest shape?", [picture], api_name="/chat")
    final = last(job)
    assert final["over"] and final["text"].strip() and len(job.outputs()) > 1  # it came in pieces
    assert final["usage"]["prompt_tokens"] > final["usage"]["completion_tokens"] > 0
    assert final["files"] == ["picture, 84 x 84 pixels, PNG"]


def test_chat_about_a_clip(client: Client, files: Path) -> None:
    final = last(client.submit("what moves?", [handle_file(str(files / "ball.mp4"))], api_name="/chat"))
    assert final["over"] and final["text"].strip() and "2.0 s" in final["files"][0]


def test_chat_settings_count_and_a_seed_is_a_seed(client: Client) -> None:
    drawn = {"max_new_tokens": 8, "temperature": 1.5, "seed": 5}
    one, two = (
        last(client.submit("tell me", settings=drawn, model="untrained:tiny", api_name="/chat")) for _ in range(2)
    )
    assert (one["text"], one["thinking"]) == (two["text"], two["thinking"])
    assert one["usage"]["completion_tokens"] == 8 and one["finish_reason"] == "length"


def test_earlier_turns_come_with_the_question(client: Client) -> None:
    before = [{"role": "user", "content": "what is 3 plus 4?"}, {"role": "assistant", "content": "7"}]
    alone = last(client.submit("and 5 plus 6?", api_name="/chat"))
    after = last(client.submit("and 5 plus 6?", earlier=before, api_name="/chat"))
    assert after["usage"]["prompt_tokens"] > alone["usage"]["prompt_tokens"]


def test_see_tells_grid_tokens_attention_and_experts(client: Client, files: Path) -> None:
    seen = client.predict(
        "the colour of the largest shape?", [handle_file(str(files / "picture.png"))], api_name="/see"
    )
    item = seen["items"][0]
    assert item["tokens"] == sum(token["kind"] == "media" for token in seen["tokens"])
    json.dumps(seen)  # plain data all through


def test_compare_two_settings(client: Client, files: Path) -> None:
    final = last(
        client.submit(
            "what is the value of bar b?",
            [handle_file(str(files / "chart.png"))],
            {"max_new_tokens": 16},
            {"max_new_tokens": 16, "temperature": 1.0, "seed": 3},
            api_name="/compare",
        )
    )
    assert final["over"] and {"left", "right"} <= set(final)
    assert any("emperature" in row["what"] for row in final["differences"])


def test_compare_with_a_model_that_is_not_here_goes_on_with_the_other(client: Client) -> None:
    final = last(client.submit("x", left={"model": "../../etc"}, api_name="/compare"))
    assert "No model" in final["left"]["error"] and not final["right"]["error"] and final["over"]


def test_benchmark_counts(client: Client) -> None:
    final = last(client.submit("picture", 3, api_name="/benchmark"))
    assert final["over"] and final["asked"] == final["of"] == 3
    assert final["right"] + len(final["misses"]) == 3


@pytest.mark.parametrize(
    ("endpoint", "arguments"),
    [
        ("/chat", {"question": ""}),
        ("/chat", {"question": "x", "settings": {"temperature": -1}}),
        ("/chat", {"question": "x", "settings": {"temperature": "hot"}}),
        ("/chat", {"question": "x", "settings": {"no such setting": 1}}),
        ("/chat", {"question": "x", "settings": [1]}),
        ("/chat", {"question": "x", "model": "/etc/passwd"}),
        ("/chat", {"question": "x", "tools": ["rm"]}),
        ("/chat", {"question": "x", "earlier": [{"role": "root", "content": 5}]}),
        ("/chat", {"question": "x", "earlier": {"a": "x"}}),
        ("/chat", {"question": "x", "files": [{"a": "x"}]}),
        ("/chat", {"question": "x", "files": ["/etc/passwd"]}),
        ("/see", {"question": ""}),
        ("/see", {"question": "x", "model": "/etc/passwd"}),
        ("/see", {"question": "x", "position": 10**9}),
        ("/compare", {"question": "x", "left": [1]}),
        ("/compare", {"question": "x", "right": "hot"}),
        ("/compare", {"question": "x", "left": {"no such setting": 1}}),
        ("/benchmark", {"family": "no such family"}),
        ("/benchmark", {"n": 10**9}),
        ("/benchmark", {"n": -1}),
    ],
)
def test_wrong_arguments_give_a_sentence(
    client: Client, server: Server, endpoint: str, arguments: dict[str, Any]
) -> None:
    said = len(server.log.read_text())
    with pytest.raises((AppError, httpx.HTTPStatusError)) as raised:
        client.predict(api_name=endpoint, **arguments)
    text = str(raised.value)
    assert 10 < len(text) < 600 and "Traceback" not in text and 'File "' not in text
    assert "Traceback" not in server.log.read_text()[said:]
    assert server.process.poll() is None


@pytest.mark.parametrize("name", ["bomb.png", "torn.jpg", "page.png"])
def test_hostile_files_give_a_sentence(client: Client, files: Path, name: str) -> None:
    with pytest.raises(httpx.HTTPStatusError, match="422"):
        client.predict("what is it?", [handle_file(str(files / name))], api_name="/chat")


def test_foreign_files_and_addresses_are_refused(client: Client, server: Server) -> None:
    for path in ("/etc/passwd", "http://127.0.0.1:1/x.png", str(server.state / "server.log")):
        body = {"data": ["look", [{"path": path, "meta": {"_type": "gradio.FileData"}}]]}
        got = httpx.post(f"{server.address}/gradio_api/call/chat", json=body)
        assert got.status_code == 403 and "\n" not in got.json()["detail"]


def test_programs_that_name_themselves_do_not_share_files(server: Server, files: Path) -> None:
    with httpx.Client(base_url=server.address) as http:
        sent = {"files": ("a.png", (files / "picture.png").read_bytes())}
        path = http.post("/gradio_api/upload", files=sent, headers={"x-moonkit-visitor": "one"}).json()[0]
        for name, status in (("one", 200), ("two", 403)):
            got = http.get(f"/gradio_api/file={path}", headers={"x-moonkit-visitor": name})
            assert got.status_code == status


def test_a_program_that_leaves_stops_its_answer(server: Server) -> None:
    with httpx.Client(base_url=server.address, timeout=60) as http:
        body = {"data": ["picture", 200, "", 0, 7, 256]}
        event = http.post("/gradio_api/call/benchmark", json=body).json()["event_id"]
        with http.stream("GET", f"/gradio_api/call/benchmark/{event}") as stream:
            lines = stream.iter_lines()
            for _ in range(3):
                next(line for line in lines if line.startswith("event: generating"))

        def nobody_works() -> bool:
            before = server.cpu_s()
            time.sleep(0.5)
            return server.cpu_s() - before < 0.25

        wait_until(nobody_works, 20, "the benchmark of who left to stop")
        assert http.get("/gradio_api/queue/status").json()["queue_size"] == 0
