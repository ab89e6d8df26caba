"""Small folders of data in the form in which each benchmark is published, made here: names of fields as theirs are."""

import base64
import csv
import gzip
import io
import json
import pickle
import struct
import subprocess
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet
from PIL import Image


def png(colour: str = "red", size: tuple[int, int] = (40, 30)) -> bytes:
    packed = io.BytesIO()
    Image.new("RGB", size, colour).save(packed, "PNG")
    return packed.getvalue()


def lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def table(path: Path, rows: Sequence[Mapping[str, Any]], images: Sequence[str] = ("image",)) -> None:
    """A Parquet file whose pictures are {"bytes", "path"}, as the hub keeps them; two rows a group."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns: dict[str, Any] = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if name in images:
            kind = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
            packed = [
                None if one is None else {"bytes": one, "path": f"{number}.png"} for number, one in enumerate(values)
            ]
            columns[name] = arrow.array(packed, kind)
        else:
            columns[name] = arrow.array(values)
    parquet.write_table(arrow.table(columns), path, row_group_size=2)


def video(path: Path, frames: int = 24) -> None:
    import av
    import numpy as np

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height = 64, 48
        for number in range(frames):
            shade = np.full((48, 64, 3), 10 * number % 250, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shade, "rgb24")))
        container.mux(stream.encode())


def git(folder: Path, *words: str) -> str:
    names = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", "-C", str(folder), *names, *words], check=True, capture_output=True, text=True).stdout


def humaneval(root: Path) -> None:
    row = {
        "task_id": "HumanEval/0",
        "prompt": 'def add(a, b):\n    """Sum."""\n',
        "entry_point": "add",
        "canonical_solution": "    return a + b\n",
        "test": "def check(candidate):\n    assert candidate(2, 3) == 5\n    assert candidate(-1, 1) == 0\n",
    }
    root.mkdir(parents=True)
    with gzip.open(root / "HumanEval.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def humaneval_plus(root: Path) -> None:
    row = {
        "task_id": "HumanEval/1",
        "prompt": 'def twice(a):\n    """Two times."""\n',
        "entry_point": "twice",
        "canonical_solution": "    return 2 * a\n",
        "test": "def check(candidate):\n    for n in range(9):\n        assert candidate(n) == n + n\n",
    }
    table(root / "data" / "test-00000-of-00001.parquet", [row])


MBPP = {
    "text": "Write a function to square a number.",
    "code": "def square(n):\r\n  return n * n",
    "task_id": 11,
    "test_setup_code": "",
    "test_list": ["assert square(2) == 4", "assert square(-3) == 9", "assert square(0) == 0"],
    "challenge_test_list": [],
}


def mbpp(root: Path) -> None:
    lines(root / "mbpp.jsonl", [MBPP | {"task_id": 2, "code": "no"}, MBPP, MBPP | {"task_id": 700}])


def mbpp_plus(root: Path) -> None:
    row = {
        "task_id": 3,
        "code": MBPP["code"],
        "prompt": MBPP["text"],
        "source_file": "x",
        "test_imports": ["import math"],
        "test_list": MBPP["test_list"],
        "test": "for n in range(5):\n    assert square(n) == n ** 2\nassert math.isclose(square(0.5), 0.25)\n",
    }
    table(root / "data" / "test-00000-of-00001.parquet", [row])


def cruxeval(root: Path) -> None:
    row = {"code": "def f(a, b=1):\n    return [a] * b", "input": "'x', b=2", "output": "['x', 'x']", "id": "sample_0"}
    lines(root / "cruxeval.jsonl", [row])


def livecodebench(root: Path) -> None:
    private = json.dumps([{"input": "4\n", "output": "8\n", "testtype": "stdin"}])
    packed = base64.b64encode(zlib.compress(pickle.dumps(private))).decode()
    base = {"question_title": "t", "platform": "atcoder", "contest_id": "abc", "contest_date": "2024-10-05T00:00:00"}
    stdin = base | {
        "question_content": "Print twice the number.",
        "question_id": "abc_a",
        "starter_code": "",
        "difficulty": "easy",
        "public_test_cases": json.dumps([{"input": "3\n", "output": "6\n", "testtype": "stdin"}]),
        "private_test_cases": packed,
        "metadata": "{}",
    }
    method = base | {
        "question_content": "Sum two numbers.",
        "question_id": "3000",
        "starter_code": "class Solution:\n    def add(self, a: int, b: int) -> int:\n        ",
        "difficulty": "easy",
        "public_test_cases": json.dumps([{"input": "3\n4", "output": "7", "testtype": "functional"}]),
        "private_test_cases": json.dumps([{"input": "-1\n1", "output": "0", "testtype": "functional"}]),
        "metadata": json.dumps({"func_name": "add"}),
    }
    lines(root / "test.jsonl", [stdin, method])


def quixbugs(root: Path) -> None:
    for name, text in {
        "python_programs/half.py": "def half(n):\n    return n // 3\n",
        "correct_python_programs/half.py": "def half(n):\n    return n // 2\n",
        "json_testcases/half.json": "[[4], 2]\n[[7], 3]\n",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def aider_polyglot(root: Path) -> None:
    place = root / "python" / "exercises" / "practice" / "leap"
    files = {"solution": ["leap.py"], "test": ["leap_test.py"], "example": [".meta/example.py"]}
    test = (
        "import unittest\n\nfrom leap import leap_year\n\n\nclass LeapTest(unittest.TestCase):\n"
        "    def test_common(self):\n        self.assertIs(leap_year(2015), False)\n\n"
        "    def test_leap(self):\n        self.assertIs(leap_year(1996), True)\n"
    )
    for name, text in {
        ".docs/instructions.md": "Say whether a year is a leap year.",
        ".meta/config.json": json.dumps({"files": files}),
        ".meta/example.py": "def leap_year(year):\n    return year % 4 == 0\n",
        "leap.py": "def leap_year(year):\n    pass\n",
        "leap_test.py": test,
    }.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)


def swebench(root: Path) -> None:
    repository = root / "repositories" / "own__sums"
    repository.mkdir(parents=True)
    (repository / "sums.py").write_text("def add(a, b):\n    return a - b\n")
    (repository / "test_old.py").write_text("from sums import add\n\n\ndef test_zero():\n    assert add(3, 0) == 3\n")
    git(repository, "init", "-q")
    git(repository, "add", ".")
    git(repository, "commit", "-qm", "first")
    test = "from sums import add\n\n\ndef test_add():\n    assert add(2, 3) == 5\n"
    patch = "--- a/sums.py\n+++ b/sums.py\n@@ -1,2 +1,2 @@\n def add(a, b):\n-    return a - b\n+    return a + b\n"
    added = "".join(f"+{line}\n" for line in test.splitlines())
    row = {
        "repo": "own/sums",
        "instance_id": "own__sums-1",
        "base_commit": git(repository, "rev-parse", "HEAD").strip(),
        "patch": patch,
        "test_patch": f"--- /dev/null\n+++ b/test_new.py\n@@ -0,0 +1,{len(test.splitlines())} @@\n{added}",
        "problem_statement": "add subtracts",
        "hints_text": "",
        "created_at": "2024-01-01",
        "version": "1.0",
        "FAIL_TO_PASS": json.dumps(["test_new.py::test_add"]),
        "PASS_TO_PASS": json.dumps(["test_old.py::test_zero"]),
        "environment_setup_commit": "",
    }
    lines(root / "test.jsonl", [row])


def mmmu(root: Path) -> None:
    none = dict.fromkeys([f"image_{number}" for number in range(3, 8)])
    base = {"image_1": png(), "image_2": png("blue")} | none
    rows = [
        {"id": "validation_Math_1", "question": "Compare <image 1> with <image 2>", "options": "['3', '$4$', \"5'\"]"}
        | base
        | {"answer": "B", "question_type": "multiple-choice", "subfield": "x"},
        {"id": "validation_Math_2", "question": "How long is <image 1>?", "options": "[]"}
        | base
        | {"image_2": None, "answer": "['2.5', '5/2']", "question_type": "open", "subfield": "x"},
    ]
    names = [f"image_{number}" for number in range(1, 8)]
    table(root / "Math" / "validation-00000-of-00001.parquet", rows, names)


def mmmu_pro(root: Path) -> None:
    names = [f"image_{number}" for number in range(1, 8)]
    row = {
        "id": "test_Art_1",
        "question": "Which one is <image 1>?",
        "options": str([f"option {number}" for number in range(10)]),
        "answer": "J",
        "subject": "Art",
    }
    row |= dict.fromkeys(names) | {"image_1": png()}
    table(root / "standard (10 options)" / "test-00000-of-00001.parquet", [row], names)


def mathvista(root: Path) -> None:
    (root / "images").mkdir(parents=True)
    (root / "images" / "1.jpg").write_bytes(png())
    base = {"image": "images/1.jpg", "unit": None, "metadata": {}, "choices": None, "precision": None}
    rows = {
        "1": {
            "question": "h?",
            "answer": "1.2",
            "answer_type": "float",
            "question_type": "free_form",
            "precision": 1.0,
        },
        "2": {"question": "n?", "answer": "5", "answer_type": "integer", "question_type": "free_form"},
        "3": {
            "question": "c?",
            "answer": "145°",
            "answer_type": "text",
            "question_type": "multi_choice",
            "choices": ["135°", "140°", "145°"],
        },
        "4": {"question": "l?", "answer": "[3, 4]", "answer_type": "list", "question_type": "free_form"},
    }
    whole = {
        pid: base | {"pid": pid, "query": f"Hint: ...\nQuestion: {row['question']}"} | row for pid, row in rows.items()
    }
    (root / "testmini.json").write_text(json.dumps(whole))


def math_vision_mini(root: Path) -> None:
    (root / "images").mkdir(parents=True)
    (root / "images" / "4.jpg").write_bytes(png())
    base = {"solution": None, "level": 1, "subject": "counting", "image": "images/4.jpg"}
    rows = [
        base | {"id": "4", "question": "How many?\n<image1>", "options": [], "answer": "6"},
        base | {"id": "5", "question": "Which?\n<image1>", "options": ["A", "B", "C", "D", "E"], "answer": "D"},
        base | {"id": "6", "question": "How long?\n<image1>", "options": ["$\\frac{1}{2}$", "2"], "answer": "A"},
    ]
    lines(root / "testmini.jsonl", rows)


def ocrbench(root: Path) -> None:
    base = {"image": png(), "question": "what is written in the image?"}
    rows = [
        {"dataset": "IIIT5K", "question_type": "Regular Text Recognition", "answer": ["CENTRE"]} | base,
        {"dataset": "HME100k", "question_type": "Handwritten Mathematical Expression Recognition", "answer": ["a ^ 2"]}
        | base,
    ]
    table(root / "data" / "test-00000-of-00001.parquet", rows)


def chartqa(root: Path) -> None:
    (root / "test" / "png").mkdir(parents=True)
    (root / "test" / "png" / "1.png").write_bytes(png())
    rows = [
        {"imgname": "1.png", "query": "How many?", "label": "200"},
        {"imgname": "1.png", "query": "Who?", "label": "UK"},
    ]
    (root / "test" / "test_human.json").write_text(json.dumps(rows))
    (root / "test" / "test_augmented.json").write_text(json.dumps(rows[:1]))


def docvqa(root: Path) -> None:
    (root / "documents").mkdir(parents=True)
    (root / "documents" / "xnbl0037_1.png").write_bytes(png())
    base = {"image": "documents/xnbl0037_1.png", "docId": 279, "question_types": ["form"], "data_split": "val"}
    rows = [
        base | {"questionId": 337, "question": "What is the date?", "answers": ["1/8/93", "January 8"]},
        base | {"questionId": 338, "question": "Who?", "answers": ["ms. wright"]},
    ]
    (root / "val_v1.0_withQT.json").write_text(json.dumps({"dataset_name": "docvqa", "data": rows}))


def charxiv(root: Path) -> None:
    base = {"image": png(), "category": "cs", "year": "20", "original_id": "2004.10956", "figure_path": "images/0.jpg"}
    kinds = [(1, "UN"), (2, "Yes"), (3, "0.35"), (4, "12.50")]
    rows = [base | {"reasoning_q": f"q{kind}", "reasoning_a": gold, "reasoning_a_type": kind} for kind, gold in kinds]
    table(root / "val.parquet", rows)


def ai2d(root: Path) -> None:
    row = {"question": "Which eats grass?", "options": ["fox", "hare", "owl", "snake"], "answer": "1", "image": png()}
    table(root / "data" / "test-00000-of-00001.parquet", [row])


def realworldqa(root: Path) -> None:
    first = "Where is the car?\n\nA. Left\nB. Right\nPlease answer directly with only the letter of the correct option."
    rows = [
        {"image": png(), "question": first, "answer": "B"},
        {"image": png(), "question": "Is it red? Please answer yes or no.", "answer": "Yes"},
    ]
    table(root / "data" / "test-00000-of-00001.parquet", rows)


def counting(root: Path) -> None:
    row = {"image": png(), "text": "four cups", "question": "How many cups are there?", "number": 4}
    table(root / "data" / "test-00000-of-00001.parquet", [row])


def pointing(root: Path) -> None:
    (root / "images").mkdir(parents=True)
    (root / "images" / "1.png").write_bytes(png(size=(100, 80)))
    base = {"id": "1", "image": "images/1.png", "label": "cup", "width": 100, "height": 80}
    lines(root / "test.jsonl", [base | {"regions": [[10, 10, 30, 30], [60, 40, 90, 70]]}])


def mnist_t10k(root: Path) -> None:
    root.mkdir(parents=True)
    pixels = bytes(range(256)) * 7  # 28 * 28 * 2 = 1568
    with gzip.open(root / "t10k-images-idx3-ubyte.gz", "wb") as file:
        file.write(struct.pack(">IIII", 0x803, 2, 28, 28) + pixels[: 2 * 784])
    with gzip.open(root / "t10k-labels-idx1-ubyte.gz", "wb") as file:
        file.write(struct.pack(">II", 0x801, 2) + bytes([7, 2]))


def videomme(root: Path) -> None:
    video(root / "data" / "fFjv93ACGo8.mp4")
    base = {"video_id": "001", "duration": "short", "domain": "Knowledge", "sub_category": "x", "url": "u"}
    base |= {"videoID": "fFjv93ACGo8", "task_type": "Counting Problem"}
    options = ["A. Apples.", "B. Candles.", "C. Berries.", "D. The three kinds are of the same number."]
    rows = [base | {"question_id": f"001-{n}", "question": "Which?", "options": options, "answer": "C"} for n in (1, 2)]
    table(root / "videomme" / "test-00000-of-00001.parquet", rows)


def mvbench(root: Path) -> None:
    video(root / "video" / "clevrer" / "video_validation" / "video_10009.mp4")
    video(root / "video" / "star" / "Charades_v1_480" / "ZS9XR.mp4")
    frames = root / "video" / "tvqa" / "frames_fps3_hq" / "castle_s01"
    frames.mkdir(parents=True)
    for number in range(12):
        Image.new("RGB", (32, 24), (20 * number, 0, 0)).save(frames / f"{number:05}.jpg")
    (root / "json").mkdir()
    for name, row in {
        "moving_count": {"video": "video_10009.mp4", "candidates": ["1", "2", "3"], "answer": "2"},
        "action_sequence": {"video": "ZS9XR.mp4", "candidates": ["The bag.", "The cup."], "answer": "The cup."}
        | {"start": 0.5, "end": 2.0},
        "episodic_reasoning": {"video": "castle_s01", "candidates": ["He left.", "He ran."], "answer": "He left."}
        | {"start": 1.0, "end": 3.0},
    }.items():
        (root / "json" / f"{name}.json").write_text(json.dumps([{"question": "What?"} | row]))


def longvideobench(root: Path) -> None:
    video(root / "videos" / "86CxyhFV9MI.mp4")
    row = {
        "video_id": "86CxyhFV9MI",
        "question": "In the first scene, what is shown?",
        "candidates": ["a rose", "a lily", "grass"],
        "correct_choice": 1,
        "position": [1],
        "topic_category": "x",
        "question_category": "TOS",
        "level": "L2",
        "id": "86CxyhFV9MI_0",
        "video_path": "86CxyhFV9MI.mp4",
        "subtitle_path": "86CxyhFV9MI_en.json",
        "duration_group": 15,
        "starting_timestamp_for_subtitles": 0,
        "duration": 3.0,
    }
    (root / "lvb_val.json").write_text(json.dumps([row]))


def gsm8k(root: Path) -> None:
    rows = [{"question": "2 + 2?", "answer": "It is <<2+2=4>>4.\n#### 4"}, {"question": "big?", "answer": "#### 1,250"}]
    lines(root / "test.jsonl", rows)


def math500(root: Path) -> None:
    base = {"solution": "...", "subject": "Algebra", "level": 2}
    rows = [
        base | {"problem": "Half of one?", "answer": "\\frac{1}{2}", "unique_id": "test/algebra/1.json"},
        base
        | {"problem": "A point?", "answer": "\\left( 3, \\frac{\\pi}{2} \\right)", "unique_id": "test/algebra/2.json"},
    ]
    lines(root / "test.jsonl", rows)


def ifeval(root: Path) -> None:
    rows = [
        {
            "key": 1000,
            "prompt": "Write without commas.",
            "instruction_id_list": ["punctuation:no_comma"],
            "kwargs": [{}],
        },
        {
            "key": 1001,
            "prompt": "Say cat twice.",
            "instruction_id_list": ["en:keywords:frequency"],
            "kwargs": [{"relation": "at least", "keyword": "cat", "frequency": 2, "num_words": None}],
        },
    ]
    lines(root / "input_data.jsonl", rows)


def mmlu(root: Path) -> None:
    row = {"question": "Which gas?", "subject": "high_school_physics", "choices": ["0", "4", "2", "6"], "answer": 1}
    table(root / "all" / "test-00000-of-00001.parquet", [row, row | {"answer": 3}])


def mmlu_pro(root: Path) -> None:
    row = {"question_id": 70, "question": "Typical?", "options": [f"o{n}" for n in range(10)], "answer": "I"}
    row |= {"answer_index": 8, "cot_content": "", "category": "business", "src": "x"}
    table(root / "data" / "test-00000-of-00001.parquet", [row])


def gpqa(root: Path) -> None:
    root.mkdir(parents=True)
    with (root / "gpqa_diamond.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        wrong = [f"Incorrect Answer {number}" for number in (1, 2, 3)]
        writer.writerow(["Record ID", "Question", "Correct Answer", *wrong, "Subdomain", "High-level domain"])
        writer.writerow(
            ["rec1", "Which\nof these, then?", "10^-4 eV", "10^-11 eV", "10^-8 eV", "10^-9 eV", "Q", "Physics"]
        )


MAKERS = [
    humaneval,
    humaneval_plus,
    mbpp,
    mbpp_plus,
    cruxeval,
    livecodebench,
    quixbugs,
    aider_polyglot,
    swebench,
    mmmu,
    mmmu_pro,
    mathvista,
    math_vision_mini,
    ocrbench,
    chartqa,
    docvqa,
    charxiv,
    ai2d,
    realworldqa,
    counting,
    pointing,
    mnist_t10k,
    videomme,
    mvbench,
    longvideobench,
    gsm8k,
    math500,
    ifeval,
    mmlu,
    mmlu_pro,
    gpqa,
]


def make_all(root: Path) -> Path:
    """All of them, each in the folder of its name."""
    for maker in MAKERS:
        maker(root / maker.__name__)
    return root
