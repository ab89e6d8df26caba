"""A run folder as `moonkit eval` writes it, with made-up answers: pictures, thoughts, repeats, cuts, lost rows.

make_run(folder, seed=0, items=40)     ->   folder with run.json, samples.jsonl, media/
HOSTILE                                     what a model might write to break the page that shows it
"""

import hashlib
import io
import json
import random
from pathlib import Path
from typing import Any

from PIL import Image as PIL

from world import sample
from world.sample import Image

HOSTILE = (
    "</script><script>document.title='fooled'</script>",
    "<img src=x onerror=\"document.title='fooled'\">",
    "![pixel](http://evil.invalid/pixel.png) <img src='http://evil.invalid/a.png'>",
    "<!--<script>",
    "]]> <![CDATA[",
    "</textarea></style><svg onload=document.title='fooled'>",
    "\u2028\u2029\u0000\x1b[31m\ud800",
    "<iframe src='https://evil.invalid/'></iframe>",
    "<link rel=stylesheet href=http://evil.invalid/x.css><base href='http://evil.invalid/'>",
    "javascript:alert(1) <a href='javascript:alert(1)'>click</a> <meta http-equiv=refresh content='0;url=http://evil.invalid'>",
)

CODE = '''from typing import List


def below_zero(operations: List[int]) -> bool:
    """You're given a list of deposit and withdrawal operations on a bank account that starts with zero balance.
    Detect if at any point the balance falls below zero, and return True then. Otherwise return False.
    >>> below_zero([1, 2, 3])
    False
    """
'''


def png(pixels: Any) -> bytes:
    out = io.BytesIO()
    PIL.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def row(task: str, number: int, repeat: int = 0, **values: Any) -> dict[str, Any]:
    made = {
        "task": task,
        "doc_id": number,
        "item_id": f"{task.split('_')[-1]}/{number}",
        "cluster": None,
        "repeat": repeat,
        "prompt": "",
        "media": [],
        "reply": "",
        "thinking": "",
        "gold": "",
        "kind": "exact",
        "score": 1.0,
        "status": "graded",
        "evidence": {},
        "tokens": {"prompt": 60, "completion": 40, "thinking": 0, "media": 0},
        "finish_reason": "stop",
        "seconds": 0.4,
        "key": hashlib.sha256(f"{task}{number}{repeat}".encode()).hexdigest(),
    } | values
    made["cluster"] = made["cluster"] or made["item_id"]
    return made


def make_run(folder: Path, seed: int = 0, items: int = 40, skill: float = 0.6, hostile: bool = False) -> Path:
    """Write the folder. skill: about the share of right answers. hostile: every text is one of HOSTILE."""
    rng = random.Random(seed)
    (folder / "media").mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for n in range(items):
        made = sample("picture", n, "heldout", 7, 1 + n % 2)
        turn, image = made.turns[n % len(made.turns)], made.media[0]
        assert isinstance(image, Image)
        data = png(image.pixels)
        name = f"media/{hashlib.sha256(data).hexdigest()}.png"
        (folder / name).write_bytes(data)
        right = rng.random() < skill
        said = turn.answer if right else rng.choice([*turn.choices, "no", "3"])
        rows.append(
            row(
                "world_picture",
                n,
                prompt=f"<image>\n{turn.question}",
                media=[name],
                reply=said,
                gold=turn.answer,
                thinking=turn.thinking,
                score=float(said == turn.answer),
                evidence={"said": said, "tests": turn.tests},
                tokens={"prompt": 24, "completion": rng.randint(4, 40), "thinking": rng.randint(2, 30), "media": 16},
            )
        )
    for n in range(items // 2):
        a, b = rng.randint(11, 99), rng.randint(11, 99)
        cut, lost = rng.random() < 0.12, rng.random() < 0.01
        right = rng.random() < skill and not cut
        long = " ".join(
            f"Step {k}: I add {a} and {b} once more and check the carry." for k in range(rng.randint(2, 90))
        )
        rows.append(
            row(
                "kimi_gsm8k",
                n,
                kind="number",
                gold=str(a + b),
                prompt=f"Natalia sold {a} clips in April and {b} in May. How many clips did she sell altogether?",
                thinking=long,
                reply="" if cut else f"She sold {a} + {b} = **{a + b if right else a + b + 10}** clips.",
                score=None if lost else float(right),
                status="infra_error" if lost else "truncated" if cut else "graded",
                evidence={"error": "the worker died"}
                if lost
                else {}
                if cut
                else {"read": str(a + b), "gold": str(a + b)},
                finish_reason="length" if cut else "stop",
                seconds=rng.uniform(1, 30),
                tokens={"prompt": 80, "completion": len(long) // 4 + 30, "thinking": len(long) // 4, "media": 0},
            )
        )
    for n in range(items // 4):
        easy = min(0.95, max(0.02, rng.gauss(skill, 0.3)))
        for repeat in range(4):
            right = rng.random() < easy
            body = "balance += op\n        if balance < 0:\n            return True" if right else "pass"
            rows.append(
                row(
                    "kimi_humaneval",
                    n,
                    repeat,
                    kind="function",
                    prompt=CODE,
                    gold=CODE + "    ...",
                    reply=f"    balance = 0\n    for op in operations:\n        {body}\n    return False\n",
                    thinking="A running sum; as soon as it is negative, stop.",
                    score=float(right),
                    evidence={"passed": 7 if right else 3, "of": 7}
                    | ({} if right else {"first failure": "below_zero([1, -2])"}),
                    seconds=rng.uniform(3, 9),
                    tokens={"prompt": 130, "completion": rng.randint(60, 400), "thinking": 20, "media": 0},
                )
            )
    for n in range(items // 8):
        call = {"name": "bash", "arguments": '{"command": "ls"}', "result": "calc.py\nNEWS", "ok": n % 2 == 0}
        turn = {"thinking": "First the files.", "text": "I look.", "calls": [call], "tokens": 12, "seconds": 0.4}
        rows.append(
            row(
                "kimi_swebench",
                n,
                kind="repository, agent",
                prompt="add subtracts",
                reply="--- a/calc.py\n+++ b/calc.py\n@@ -1 +1 @@\n-a - b\n+a + b\n",
                transcript=[turn, {"shown": "The tests fail."}, turn | {"calls": [call, call | {"result": None}]}],
            )
        )
    for n in range(items // 4):
        rows.append(
            row(
                "kimi_svg",
                n,
                kind="svg",
                prompt="Draw this as SVG.",
                reply="<svg><rect width='4'/></svg>",
                gold="<svg><circle r='4'/></svg>",
                score=round(rng.betavariate(4, 2), 3),
            )
        )
    if hostile:
        for at, one in enumerate(rows):
            text = HOSTILE[at % len(HOSTILE)]
            one |= {
                "prompt": text,
                "reply": text,
                "thinking": text,
                "gold": text,
                "kind": text,
                "finish_reason": text,
                "cluster": text,
                "item_id": f"{text}{at}",
                "evidence": {text: text},
            }
            call = dict.fromkeys(("name", "arguments", "result"), text)
            turn = {"thinking": text, "text": text, "calls": [call, text], "tokens": text}
            one["transcript"] = [turn, {"shown": text}, text, {"calls": text}] if at % 2 else text
            one["media"] = [*one["media"], "http://evil.invalid/a.png", "../run.json", "media/../run.json", text]
    names = list(dict.fromkeys(one["task"] for one in rows))
    info = {
        "id": folder.name,
        "created": "2026-11-27T10:00:00+0000",
        "finished": "2026-11-27T10:04:31+0000",
        "command": "moonkit eval --model moonkit --tasks world_picture,kimi_gsm8k",
        "model": {
            "name": HOSTILE[0] if hostile else "nano",
            "path": "nano",
            "weights_sha256": "9f2c" * 16,
            "tokenizer_sha256": "77aa" * 16,
            "template_sha256": "01bc" * 16,
            "parameters": 11_646_480,
        },
        "settings": {
            name: {
                "limit": items,
                "repeats": 4 if "human" in name else 1,
                "gen_kwargs": {"temperature": 1.0},
                "frames": 8,
                "pixels": 224,
            }
            for name in names
        },
        "versions": {"moonkit": "0.1.0", "torch": "2.11.0", "lm_eval": "0.4.13", "python": "3.11.7"},
        "machine": {"cpu": "2 cores", "system": "Linux 6.18", "memory": "24 GB"},
        "isolation": "bwrap",
        "guarantees": [
            "no network",
            "own process ids, killed with the sandbox",
            "memory at most 512 MiB",
            "read-only system",
            "uid 65534, no capabilities",
            "seccomp: no ptrace, no mounts, no keyrings",
        ],
        "seeds": {"sampling": 0, "fewshot": 1234},
        "tasks": {
            name: {
                "version": 1,
                "data_sha256": "ab" * 32,
                "n": len({r["item_id"] for r in rows if r["task"] == name}),
                "metric": "score",
                "higher_is_better": True,
            }
            for name in names
        },
    }
    (folder / "run.json").write_text(json.dumps(info, indent=1), encoding="utf-8")
    with (folder / "samples.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(one) + "\n" for one in rows)
    return folder
