"""One loader per benchmark: its files as published in, items with a gold and a grader out.

    LOADERS["docvqa"](Source("docvqa", folder))   ->   Item, Item, ...

A loader's docstring is the layout that its folder must have; evals.suites prints it when the data is missing. Each
broken row is a ValueError with file and line. Prompts are not made here: an item has fields, the YAML has the words.
"""

import base64
import inspect
import io
import json
import pickle
import random
import re
import subprocess
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from typing import Any

from evals.graders import LETTERS, Task
from evals.rows import Ref, Row, Source, idx


@dataclass(frozen=True)
class Item:
    """One question. fields: what the prompt's template may name; where: its row, for messages."""

    id: str
    task: Task
    fields: Mapping[str, Any]
    where: str
    media: tuple[Ref, ...] = ()
    cluster: str = ""
    answer: str = ""
    tests: str = ""
    editable: tuple[str, ...] = ()  # the reply is whole files of these names


LOADERS: dict[str, Callable[..., Iterator[Item]]] = {}


def loader(make: Callable[..., Iterator[Item]]) -> Callable[..., Iterator[Item]]:
    LOADERS[make.__name__] = make
    return make


def layout(suite: str) -> str:
    """What the folder of a suite must hold. Raises ValueError for an unknown suite."""
    if suite not in LOADERS:
        raise ValueError(f"no loader {suite!r}; known: {', '.join(LOADERS)}")
    return inspect.getdoc(LOADERS[suite]) or ""


def lettered(options: list[Any]) -> str:
    """Options as lines "A. text"."""
    return "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))


def choice(row: Row, options: list[Any], *answer: str) -> Task:
    """A multiple-choice task. ValueError for fewer than two options or an answer that names none."""
    if not 2 <= len(options) <= len(LETTERS):
        raise row.wrong(f"a choice needs 2 to {len(LETTERS)} options, got {len(options)}")
    texts = [str(option).strip() or f"({letter})" for letter, option in zip(LETTERS, options, strict=False)]
    return Task("choice", row.letter(options, *answer), {"options": texts})


# ---- coding


@loader
def humaneval(source: Source) -> Iterator[Item]:
    """HumanEval.jsonl(.gz), HumanEvalPlus.jsonl(.gz), or the hub's *.parquet, rows:
    {"task_id", "prompt", "entry_point", "canonical_solution", "test"}
    "test" defines check(candidate). EvalPlus' own release without "test" is not read; the hub's evalplus sets are.
    """
    for row in source.rows("HumanEval*.jsonl*", "*.jsonl*", "**/*.parquet"):
        prompt, entry = row.text("prompt"), row.text("entry_point")
        data = {"prompt": prompt, "test": row.text("test"), "entry_point": entry}
        gold = prompt + row.text("canonical_solution")
        yield Item(
            row.text("task_id"), Task("function", gold, data), {"prompt": prompt, "entry_point": entry}, row.where
        )


@loader
def mbpp(source: Source, first: int | None = None, last: int | None = None) -> Iterator[Item]:
    """mbpp.jsonl, or the hub's *.parquet, rows:
    {"task_id", "text" (or "prompt"), "code", "test_list": ["assert ..."], "test_setup_code"}; MBPP+: also "test"
    """
    for row in source.rows("mbpp.jsonl*", "Mbpp*.jsonl*", "*.jsonl*", "full/test*.parquet", "**/test*.parquet"):
        number = row.whole("task_id")
        if (first is not None and number < first) or (last is not None and number > last):
            continue
        tests = [str(test) for test in row.list("test_list")]
        if not tests:
            raise row.wrong("'test_list' is empty")
        setup = row.get("test_setup_code") or "\n".join(
            row.list("test_imports") if row.get("test_imports") is not None else []
        )
        named = re.search(r"(?<![\w.])(?!assert\b|set\b|sorted\b|len\b|math\b)([A-Za-z_]\w*)\s*\(", tests[0])
        if not named:
            raise row.wrong(f"no call in the test {tests[0][:80]!r}")
        gold = row.text("code").replace("\r\n", "\n")
        defined = re.findall(r"^def\s+(\w+)", gold, re.MULTILINE)
        called = [name for name in re.findall(r"([A-Za-z_]\w*)\s*\(", tests[0]) if name in defined]
        data: dict[str, Any] = {"prompt": "", "entry_point": called[0] if called else named[1], "setup": setup}
        if row.get("test"):
            data["test"] = row.text("test")
        else:
            data["tests"] = tests
        fields = {"text": row.text("text", "prompt"), "tests": "\n".join(tests)}
        yield Item(f"MBPP/{number}", Task("function", gold, data), fields, row.where)


@loader
def cruxeval(source: Source, asks: str) -> Iterator[Item]:
    """cruxeval.jsonl, rows: {"id", "code" (defines f), "input", "output"}"""
    for row in source.rows("cruxeval.jsonl*", "*.jsonl*", "**/*.parquet"):
        code, given, output = row.text("code"), row.text("input", empty=True), row.text("output", empty=True)
        if "def f(" not in code:
            raise row.wrong("'code' does not define f")
        fields = {"code": code, "input": given, "output": output}
        task = Task("function", fields[asks], {"predict": asks} | fields)
        yield Item(f"{row.text('id')}/{asks}", task, fields, row.where, cluster=row.text("id"), answer=fields[asks])


@loader
def livecodebench(source: Source, after: str = "", before: str = "") -> Iterator[Item]:
    """test*.jsonl of livecodebench/code_generation_lite, rows:
    {"question_id", "question_title", "question_content", "starter_code", "contest_date", "difficulty", "platform",
     "public_test_cases", "private_test_cases" (JSON, or base64 of zlib of a pickled text), "metadata": {"func_name"}}
    """
    from evals.code import LIVE_PRELUDE

    for row in source.rows("test*.jsonl*", "*.jsonl*", "**/*.parquet"):
        date = str(row.get("contest_date", ""))[:10]
        if (after and date < after) or (before and date >= before):
            continue
        tests = _contest_tests(row, "public_test_cases") + _contest_tests(row, "private_test_cases")
        if not tests:
            raise row.wrong("no test cases")
        metadata = row.get("metadata") or {}
        metadata = row.parsed("metadata", metadata) if isinstance(metadata, str) else metadata
        starter = str(row.get("starter_code", "") or "")
        method = metadata.get("func_name")
        io_ = [{"input": str(test["input"]), "output": str(test["output"])} for test in tests]
        data: dict[str, Any] = {"io": io_, "prelude": LIVE_PRELUDE, "unchecked": True}
        if any(test.get("testtype") == "functional" for test in tests):
            if not method:
                raise row.wrong("functional tests need metadata's 'func_name'")
            data["entry_point"] = f"Solution.{method}"
        fields = {"question": row.text("question_content"), "starter": starter}
        name, level = f"livecodebench/{row.text('question_id')}", str(row.get("difficulty", ""))
        yield Item(name, Task("function", None, data), fields, row.where, tests=level, answer="-")


def _contest_tests(row: Row, key: str) -> list[dict[str, Any]]:
    text = row.get(key)
    if text is None or text == "":
        return []
    tests = text
    if isinstance(text, str):
        try:
            tests = json.loads(text)
        except ValueError:
            tests = _unpacked(row, key, text)
    if not isinstance(tests, list) or any(not isinstance(one, dict) or {"input", "output"} - set(one) for one in tests):
        raise row.wrong(f"{key!r} must be a list of {{'input', 'output', 'testtype'}}")
    return tests


class _TextOnly(pickle.Unpickler):
    """A pickle may run anything; the published ones hold one text, so no other object is made."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"holds {module}.{name}, wanted a text")


def _unpacked(row: Row, key: str, text: str) -> Any:
    try:
        inner = _TextOnly(io.BytesIO(zlib.decompress(base64.b64decode(text, validate=True)))).load()
        return json.loads(inner)
    except (ValueError, TypeError, zlib.error, pickle.UnpicklingError, EOFError, IndexError, KeyError) as error:
        raise row.wrong(f"{key!r} is neither JSON nor a packed text: {error}") from None


# ---- repositories and repairs


@loader
def quixbugs(source: Source) -> Iterator[Item]:
    """A copy of github.com/jkoppel/QuixBugs: python_programs/NAME.py, correct_python_programs/NAME.py and
    json_testcases/NAME.json (a line each: [arguments, result]); programs without such a file are left out
    """
    from evals.repositories import quixbugs as read

    for problem in read(_folder(source)):
        yield Item(problem.id, problem.task, {"question": problem.prompt}, problem.id, cluster=problem.cluster)


@loader
def aider_polyglot(source: Source, language: str = "python") -> Iterator[Item]:
    """A copy of github.com/Aider-AI/polyglot-benchmark: LANGUAGE/exercises/practice/NAME with .docs/instructions.md,
    .meta/config.json (files.solution, files.test, files.example) and those files
    """
    from evals.repositories import aider_polyglot as read

    for problem in read(_folder(source), language):
        fields = {"question": problem.prompt}
        yield Item(
            f"polyglot/{problem.id}",
            problem.task,
            fields,
            problem.id,
            cluster=problem.cluster,
            answer="-",
            tests=language,
            editable=problem.editable,
        )


def swe_problems(source: Source) -> Iterator[tuple[Row, Any]]:
    """Rows of SWE-bench's format with their evals.repositories.Problem, for an agent's loop."""
    from evals.repositories import swe_bench

    folder = _folder(source)
    environments = folder / "environments"
    for row in source.rows("*.jsonl*", "**/test*.parquet", "*.json"):
        given = environments if environments.is_dir() else None
        try:
            problem = next(swe_bench([row.values], folder / "repositories", given))
        except ValueError as error:
            raise row.wrong(str(error)) from None
        yield row, problem


@loader
def swebench(source: Source) -> Iterator[Item]:
    """*.jsonl or data/test*.parquet of princeton-nlp/SWE-bench_Verified (or another of its form), rows:
    {"instance_id", "repo": "owner/name", "base_commit", "problem_statement", "patch", "test_patch",
     "FAIL_TO_PASS", "PASS_TO_PASS", "version"}; repositories/owner__name(.git): git repositories that have the commits;
    environments/ID or owner__name__VERSION: packages that the tests need (see evals/repository.py)
    """
    for row, problem in swe_problems(source):
        fields = {"question": problem.prompt, "code": _touched(row, problem)}
        yield Item(
            problem.id, problem.task, fields, row.where, cluster=problem.cluster, answer="-", tests=row.text("repo")
        )


def _folder(source: Source) -> Path:
    if source.folder is None:
        raise ValueError(f"{source.name} is a folder of files; layout:\n{source.layout}")
    return source.folder


def _touched(row: Row, problem: Any) -> str:
    """The files that the gold patch changes, as they are at the commit: SWE-bench's "oracle" retrieval."""
    data, parts = problem.task.data, []
    for path in dict.fromkeys(re.findall(r"^--- a/(.+?)\s*$", row.text("patch"), re.MULTILINE)):
        shown = subprocess.run(
            ["git", "-C", data["repository"], "show", f"{data['commit']}:{path}"], capture_output=True, check=False
        )
        if shown.returncode:
            raise row.wrong(f"{path} at {data['commit']}: {shown.stderr.decode()[:200].strip()}")
        parts.append(f"[start of {path}]\n{shown.stdout.decode('utf-8', 'replace')}\n[end of {path}]")
    return "\n".join(parts)


# ---- text


@loader
def gsm8k(source: Source) -> Iterator[Item]:
    """test.jsonl, or the hub's main/test*.parquet, rows: {"question", "answer"}; the answer ends with "#### 18" """
    for row in source.rows("test.jsonl*", "main/test*.parquet", "test*.parquet"):
        _, found, gold = row.text("answer").rpartition("####")
        if not found or not gold.strip():
            raise row.wrong("'answer' has no '#### number' at its end")
        name = f"gsm8k/test/{row.where.rpartition(':')[2]}"
        yield Item(
            name, Task("number", gold.strip()), {"question": row.text("question")}, row.where, answer=gold.strip()
        )


@loader
def math500(source: Source) -> Iterator[Item]:
    """test.jsonl of HuggingFaceH4/MATH-500, rows: {"problem", "solution", "answer", "subject", "level", "unique_id"}"""
    for row in source.rows("test.jsonl*", "*.jsonl*", "**/*.parquet"):
        task, name = Task("math", row.text("answer")), f"math500/{row.text('unique_id')}"
        yield Item(name, task, {"problem": row.text("problem")}, row.where, tests=str(row.get("subject", "")))


@loader
def ifeval(source: Source, language: str = "en") -> Iterator[Item]:
    """input_data.jsonl or en_input_data.jsonl, rows:
    {"key", "prompt", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}; for another language (option
    language: es, fr, ja) es_input_data.jsonl with "es:punctuation:..." and so on
    """
    files: tuple[str, ...] = (f"{language}_input_data.jsonl*",)
    if language == "en":
        files = ("input_data.jsonl*", *files, "ifeval_input_data.jsonl*", "*.jsonl*")
    for row in source.rows(*files):
        wanted = [str(name).removeprefix("en:") for name in row.list("instruction_id_list")]
        kwargs = row.list("kwargs")
        if not wanted or len(wanted) != len(kwargs) or not all(isinstance(one, dict) for one in kwargs):
            raise row.wrong(f"{len(wanted)} instructions with {len(kwargs)} kwargs; each needs its own mapping")
        given = [{key: value for key, value in one.items() if value is not None} for one in kwargs]
        prompt = row.text("prompt")
        data = {"prompt": prompt, "instruction_id_list": wanted, "kwargs": given, "strict": True}
        name = f"ifeval/{row.text('key')}" if language == "en" else f"ifeval/{language}/{row.text('key')}"
        yield Item(name, Task("constraints", None, data), {"prompt": prompt}, row.where, answer=", ".join(wanted))


@loader
def mmlu(source: Source) -> Iterator[Item]:
    """all/test*.parquet of cais/mmlu, or test.jsonl, rows: {"question", "subject", "choices": [4], "answer": 0}"""
    for row in source.rows("all/test*.parquet", "test*.parquet", "test.jsonl*"):
        choices, subject = row.list("choices"), row.text("subject")
        if not 0 <= row.whole("answer") < len(choices):
            raise row.wrong(f"'answer' {row.whole('answer')} names none of the {len(choices)} choices")
        task = Task("choice", LETTERS[row.whole("answer")], {"options": [str(one) or "-" for one in choices]})
        fields = {"question": row.text("question"), "choices": choices, "subject_words": subject.replace("_", " ")}
        yield Item(f"mmlu/{subject}/{row.where.rpartition(':')[2]}", task, fields, row.where, tests=subject)


@loader
def mmlu_pro(source: Source) -> Iterator[Item]:
    """data/test*.parquet of TIGER-Lab/MMLU-Pro, or test.jsonl, rows:
    {"question_id", "question", "options": [up to 10], "answer": "A", "answer_index", "cot_content", "category"}
    """
    for row in source.rows("data/test*.parquet", "test*.parquet", "test.jsonl*"):
        options, category = [str(one) for one in row.list("options")], row.text("category")
        fields = {"question": row.text("question"), "options": options, "category": category}
        name = f"mmlu_pro/{row.text('question_id')}"
        yield Item(name, choice(row, options, "answer"), fields, row.where, tests=category)


@loader
def gpqa(source: Source) -> Iterator[Item]:
    """gpqa_diamond.csv, columns: "Record ID", "Question", "Correct Answer", "Incorrect Answer 1", ... 2, ... 3,
    "Subdomain", "High-level domain"
    """
    for row in source.rows("gpqa_diamond.csv", "dataset/gpqa_diamond.csv", "*diamond*.csv", "*diamond*.jsonl*"):
        right = row.text("Correct Answer").strip()
        options = [right, *(row.text(f"Incorrect Answer {number}").strip() for number in (1, 2, 3))]
        name = str(row.get("Record ID") or row.where.rpartition(":")[2])
        random.Random(f"gpqa/{name}").shuffle(options)
        task = Task("choice", LETTERS[options.index(right)], {"options": options})
        fields = {"Question": row.text("Question").strip()} | {f"choice{n}": one for n, one in enumerate(options, 1)}
        yield Item(f"gpqa/{name}", task, fields, row.where, tests=str(row.get("High-level domain", "")))


# ---- vision


@loader
def mnist(source: Source) -> Iterator[Item]:
    """t10k-images-idx3-ubyte(.gz) and t10k-labels-idx1-ubyte(.gz), as LeCun published them"""
    images, labels = source.files("t10k-images*ubyte*")[0], source.files("t10k-labels*ubyte*")[0]
    digits, count = idx(labels), len(idx(images))
    if len(digits) != count:
        raise ValueError(f"{labels}: {len(digits)} labels for {count} pictures")
    for number, digit in enumerate(digits):
        where = f"{labels}:{number + 1}"
        if digit > 9:
            raise ValueError(f"{where}: the label {digit} is no digit")
        ref = Ref(source.name, source.inside(images), number, "pixels")
        yield Item(
            f"mnist/t10k/{number}", Task("count", int(digit)), {}, where, (ref,), answer=str(digit), tests=str(digit)
        )


@loader
def mathvision(source: Source) -> Iterator[Item]:
    """test.jsonl or testmini.jsonl with images/, or the hub's data/testmini*.parquet, rows:
    {"id", "question", "options": [...] (empty: free answer), "image": "images/1.jpg", "answer", "level", "subject"}
    """
    for row in source.rows("testmini.jsonl*", "test.jsonl*", "**/testmini*.parquet", "**/test*.parquet"):
        options = row.list("options") if row.get("options") is not None else []
        if options:
            task = choice(row, options, "answer")
        else:
            task = Task("math", row.text("answer"))
        same = [str(option).strip() for option in options] == list(LETTERS[: len(options)])
        fields = {
            "question": row.text("question"),
            "options": "" if same else lettered(options),
            "choice": bool(options),
        }
        picture = row.picture("decoded_image", "image")
        name = f"mathvision/{row.text('id')}"
        yield Item(name, task, fields, row.where, (picture,), tests=str(row.get("subject", "")))


def _pictures(row: Row, *columns: str) -> tuple[Ref, ...]:
    found = (row.maybe_picture(column) for column in columns)
    media = tuple(ref for ref in found if ref is not None)
    if not media:
        raise row.wrong(f"no picture under {columns[0]!r}")
    return media


IMAGES = tuple(f"image_{number}" for number in range(1, 8))
SUBJECTS = """Accounting Agriculture Architecture_and_Engineering Art Art_Theory Basic_Medical_Science Biology Chemistry
Clinical_Medicine Computer_Science Design Diagnostics_and_Laboratory_Medicine Economics Electronics Energy_and_Power
Finance Geography History Literature Manage Marketing Materials Math Mechanical_Engineering Music Pharmacy Physics
Psychology Public_Health Sociology""".split()


@loader
def mmmu(source: Source) -> Iterator[Item]:
    """SUBJECT/validation*.parquet of MMMU/MMMU, or validation.jsonl, rows:
    {"id", "question" (with "<image 1>"), "options": "['3', '4']", "answer", "question_type": "multiple-choice" or
     "open", "image_1", ..., "image_7", "subfield"}
    """
    parts = [source] if source.folder else [replace(source, config=subject) for subject in SUBJECTS]
    for part in parts:
        for row in part.rows("*/validation*.parquet", "**/validation*.parquet", "validation.jsonl*"):
            options = [str(one) for one in row.list("options")] if row.get("options") not in (None, "") else []
            if row.get("question_type") == "multiple-choice" or options:
                task = choice(row, options, "answer")
            else:
                task = Task("relaxed", _answers(row, "answer"), {"tolerance": 0.005})
            name = row.text("id")
            shown = "\n".join(f"({letter}) {one}" for letter, one in zip(LETTERS, options, strict=False))
            fields = {"question": row.text("question"), "options": shown}
            subject = name.removeprefix("validation_").rpartition("_")[0]
            yield Item(f"mmmu/{name}", task, fields, row.where, _pictures(row, *IMAGES), tests=subject)


def _answers(row: Row, key: str, *others: str) -> list[str]:
    """One answer, or several as a list."""
    value = row.need(key, *others)
    if isinstance(value, str) and value.strip().startswith("[") and value.strip().endswith("]"):
        value = row.parsed(key, value)
    answers = [str(one) for one in (value if isinstance(value, list | tuple) else [value])]
    if not answers or not all(one.strip() for one in answers):
        raise row.wrong(f"{key!r} holds no answer")
    return answers


@loader
def mmmu_pro(source: Source) -> Iterator[Item]:
    """ "standard (10 options)/test*.parquet" of MMMU/MMMU_Pro, or test.jsonl, rows:
    {"id", "question" (with "<image 1>"), "options": "['3', ...]", "answer": "A", "image_1", ..., "image_7", "subject"}
    """
    for row in source.rows("standard (10 options)/test*.parquet", "test*.parquet", "test.jsonl*"):
        options = [str(one) for one in row.list("options")]
        fields = {"question": row.text("question"), "options": lettered(options)}
        name, pictures = f"mmmu_pro/{row.text('id')}", _pictures(row, *IMAGES)
        yield Item(name, choice(row, options, "answer"), fields, row.where, pictures, tests=str(row.get("subject", "")))


@loader
def mathvista(source: Source) -> Iterator[Item]:
    """testmini.json (a map from pid) with images/, or data/testmini*.parquet of AI4Math/MathVista, rows:
    {"pid", "question", "image": "images/1.jpg", "decoded_image", "choices": [...] | null, "answer", "precision",
     "question_type": "multi_choice" | "free_form", "answer_type": "text" | "integer" | "float" | "list", "query"}
    """
    for row in source.rows("testmini.json*", "**/testmini*.parquet", "*.jsonl*"):
        options = [str(one) for one in row.list("choices")] if row.get("choices") is not None else []
        answer, kind = row.text("answer"), row.text("answer_type")
        if row.text("question_type") == "multi_choice":
            task = choice(row, options, "answer")
        elif kind == "integer":
            task = Task("number", answer)
        elif kind == "float":
            digits = int(row.number("precision")) if row.get("precision") not in (None, "") else 2
            task = Task("number", answer, {"absolute": 0.5 * 10**-digits})
        else:
            task = Task("literal" if kind == "list" else "exact", answer)
        fields = {"question": row.text("query", "question")}
        picture = row.picture("decoded_image", "image")
        yield Item(f"mathvista/{row.text('pid', 'key')}", task, fields, row.where, (picture,), tests=kind)


@loader
def ocrbench(source: Source) -> Iterator[Item]:
    """data/test*.parquet of echo840/OCRBench, or test.jsonl with images, rows:
    {"dataset", "question", "question_type", "answer": ["..."], "image"}; the original OCRBench.json has
    {"dataset_name", "question", "type", "answers", "image_path"}; or a TSV with base64 pictures: index, image,
    question, answer, category
    """
    for row in source.rows("**/test*.parquet", "test.jsonl*", "OCRBench.json", "*.tsv"):
        kind = row.text("question_type", "type", "category")
        formula = "handwritten math" in kind.lower() or str(row.get("dataset", row.get("dataset_name"))) == "HME100k"
        task = Task("contains", _answers(row, "answer", "answers"))
        if formula:
            task = Task("contains", task.gold, {"spaces": False})
        name, picture = f"ocrbench/{row.where.rpartition(':')[2]}", row.picture("image", "image_path")
        fields = {"question": row.text("question")}
        yield Item(name, task, fields, row.where, (picture,), answer=task.gold[0], tests=kind)


@loader
def chartqa(source: Source) -> Iterator[Item]:
    """data/test*.parquet of HuggingFaceM4/ChartQA: {"image", "query", "label": ["14"], "human_or_machine"}, or of
    lmms-lab/ChartQA: {"type": "human_test", "image", "question", "answer"}; or the original's test/test_human.json and
    test/test_augmented.json beside test/png/: {"imgname", "query", "label"}; or a TSV with base64 pictures: index,
    image, question, answer, split
    """
    for row in source.rows("**/test*.parquet", "test/test_*.json", "test_*.json", "test.jsonl*", "*.tsv"):
        golds = _answers(row, "label", "answer")
        picture = row.picture("image", "imgname")
        file, _, number = row.where.rpartition(":")
        named = Path(file).name + str(row.get("split", "")) + str(row.get("type", ""))
        human = "human" in named or row.get("human_or_machine") in (0, "human")
        shown = row.get("imgname") or (row.get("image").get("path") if isinstance(row.get("image"), dict) else None)
        part = "human" if human else "augmented"
        name = f"chartqa/{part}/{number}"
        cluster = f"chartqa/{shown}" if shown else name
        fields = {"question": row.text("query", "question")}
        task = Task("relaxed", golds, {"tolerance": 0.05})
        yield Item(name, task, fields, row.where, (picture,), cluster, golds[0], part)


@loader
def docvqa(source: Source) -> Iterator[Item]:
    """DocVQA/validation*.parquet of lmms-lab/DocVQA, or the original's val_v1.0_withQT.json with documents/, rows:
    {"questionId", "question", "image": "documents/xnbl0037_1.png", "docId", "answers": ["..."], "question_types"}; or a
    TSV with base64 pictures: index, image, question, answer
    """
    patterns = ("**/validation*.parquet", "val_v1.0*.json", "**/val_v1.0*.json", "validation.jsonl*", "*.tsv")
    for row in source.rows(*patterns):
        golds, number = _answers(row, "answers", "answer"), row.text("questionId", "index")
        name, document = f"docvqa/{number}", f"docvqa/document/{row.get('docId', number)}"
        fields, picture = {"question": row.text("question")}, row.picture("image")
        yield Item(name, Task("anls", golds), fields, row.where, (picture,), document, golds[0])


CHARXIV = {
    1: "Your final answer must be grounded to some text that is explicitly written and relevant to the question in the "
    "chart. If you need to answer multiple terms, separate them with commas. Unless specified in the question (such as "
    "answering with a letter), you are required to answer the full names of subplots and/or labels by default.",
    2: "If there are options in the question, your final answer must conform to one of the options. If there are "
    "additional instructions in the question, follow them accordingly. If there are neither options nor additional "
    "instructions, you are allowed to respond with a short phrase only.",
    3: "Your final answer must be grounded to a number that is explicitly written and relevant to the question in the "
    "chart, even if it's an approximate value. You are allowed to extract numbers within some text when needed.",
    4: "Your final answer must be a number{digits}.",
}
CHARXIV_TYPES = {"text-in-chart": 1, "text-in-general": 2, "number-in-chart": 3, "number-in-general": 4}


@loader
def charxiv(source: Source) -> Iterator[Item]:
    """val.parquet of princeton-nlp/CharXiv, or val.jsonl with images/, rows:
    {"original_id", "image", "reasoning_q", "reasoning_a", "reasoning_a_type": 1 to 4 (text or number, in chart or
     general), "category", "figure_path"}
    """
    for row in source.rows("val*.parquet", "**/val*.parquet", "val*.jsonl*"):
        said, answer = row.need("reasoning_a_type"), row.text("reasoning_a")
        kind = CHARXIV_TYPES.get(str(said).strip().lower().replace(" ", "-"), said)
        if str(kind) not in ("1", "2", "3", "4"):
            raise row.wrong(f"'reasoning_a_type' must be 1 to 4, got {said!r}")
        decimals = len(answer.partition(".")[2]) if re.fullmatch(r"-?[\d,]+(\.\d+)?", answer.strip()) else 0
        digits = f" with {decimals} decimal places" if decimals else " (an exact integer where it is one)"
        task = Task("relaxed", [answer], {"tolerance": 0.0}) if int(kind) > 2 else Task("exact", answer)
        fields = {"question": row.text("reasoning_q"), "instruction": CHARXIV[int(kind)].format(digits=digits)}
        name = f"charxiv/{row.text('figure_path', 'original_id')}/{row.where.rpartition(':')[2]}"
        yield Item(name, task, fields, row.where, (row.picture("image"),), answer=answer, tests=str(kind))


def _columns(row: Row) -> list[str]:
    """Options that a table keeps in columns A, B, ...; an empty cell ends them."""
    cells = takewhile(bool, (str(row.get(letter, "")).strip() for letter in LETTERS))
    return list(cells)


@loader
def ai2d(source: Source) -> Iterator[Item]:
    """data/test*.parquet of lmms-lab/ai2d, or test.jsonl, rows: {"question", "options": [4], "answer": "2", "image"};
    or a TSV with base64 pictures: index, image, question, A, B, C, D, answer (a letter)
    """
    for row in source.rows("**/test*.parquet", "test.jsonl*", "*.tsv"):
        columns = _columns(row)
        options = columns or [str(one) for one in row.list("options")]
        number = LETTERS.index(row.letter(columns, "answer")) if columns else row.whole("answer")
        if not 0 <= number < len(options):
            raise row.wrong(f"'answer' {number} names none of the {len(options)} options")
        task = Task("choice", LETTERS[number], {"options": [one.strip() or "-" for one in options]})
        fields, picture = {"question": row.text("question"), "options": lettered(options)}, row.picture("image")
        yield Item(f"ai2d/{row.where.rpartition(':')[2]}", task, fields, row.where, (picture,))


@loader
def realworldqa(source: Source) -> Iterator[Item]:
    """data/test*.parquet of xai-org/RealworldQA, or test.jsonl, rows: {"question", "answer", "image"}; options stand
    in the question, as lines "A. left"; or a TSV with base64 pictures: index, image, question, A, B, ..., answer
    """
    for row in source.rows("**/test*.parquet", "test.jsonl*", "annotations.json", "*.tsv"):
        question, answer = row.text("question"), row.text("answer").strip()
        if _columns(row):
            question += "\n" + lettered(_columns(row))
        options = re.findall(r"^\s*([A-Z])[.)]\s+(.+?)\s*$", question, re.MULTILINE)
        named = [letter for letter, _ in options]
        if re.fullmatch(r"[A-Z]", answer) and len(options) > 1 and named == list(LETTERS[: len(named)]):
            task = choice(row, [text for _, text in options], "answer")
        else:
            task = Task("exact", answer)
        name = f"realworldqa/{row.where.rpartition(':')[2]}"
        yield Item(name, task, {"question": question}, row.where, (row.picture("image"),), answer=answer)


@loader
def counting(source: Source) -> Iterator[Item]:
    """data/test*.parquet of vikhyatk/CountBenchQA, or test.jsonl, rows: {"question", "number": 4, "image"}"""
    for row in source.rows("**/test*.parquet", "test.jsonl*", "**/*.parquet"):
        number = row.whole("number", "count")
        if number < 0:
            raise row.wrong(f"'number' is {number}")
        fields = {"question": row.text("question")}
        name, picture = f"counting/{row.where.rpartition(':')[2]}", row.picture("image")
        yield Item(name, Task("count", number), fields, row.where, (picture,), answer=str(number), tests=str(number))


@loader
def pointing(source: Source) -> Iterator[Item]:
    """test.jsonl with images/, rows: {"id", "image": "images/1.jpg", "label": "cup", "width", "height",
    "regions": [[left, top, right, bottom], ...]} in pixels, one region per thing
    """
    for row in source.rows("test.jsonl*", "*.jsonl*", "**/*.parquet"):
        regions = row.list("regions")
        if not regions or not all(isinstance(one, list | tuple) and len(one) == 4 for one in regions):
            raise row.wrong("'regions' must be [left, top, right, bottom], one or more")
        width, height = row.whole("width"), row.whole("height")
        if any(one[0] < 0 or one[1] < 0 or one[2] > width or one[3] > height for one in regions):
            raise row.wrong(f"a region lies outside of the picture of {width} x {height}")
        fields = {"label": row.text("label"), "width": width, "height": height}
        name, picture = f"pointing/{row.text('id')}", row.picture("image")
        yield Item(name, Task("points", regions), fields, row.where, (picture,), answer=str(regions))


# ---- video


def _film(source: Source, row: Row, name: str, *folders: str) -> Ref:
    """A video by its name, with or without an ending, in the first of these folders that has it."""
    assert source.folder is not None, "videos are files"
    for folder in folders:
        for ending in ("", ".mp4", ".MP4", ".webm", ".mkv", ".avi", ".mov", ".gif"):
            path = source.folder / folder / f"{name}{ending}"
            if path.exists() and (path.is_file() or not ending):
                return Ref(source.name, source.inside(path))
    raise row.wrong(f"the video {name!r} is not in {' or '.join(str(source.folder / one) for one in folders)}")


def _bare(option: Any) -> str:
    """An option without the letter that it was published with."""
    return re.sub(r"^\s*\(?[A-Z][.)]\s*", "", str(option)).strip()


@loader
def videomme(source: Source) -> Iterator[Item]:
    """videomme/test*.parquet of lmms-lab/Video-MME, or test.jsonl, with data/VIDEOID.mp4, rows:
    {"video_id", "videoID", "question_id", "question", "options": ["A. ...", ...], "answer": "C", "duration",
     "domain", "task_type"}
    """
    source.files("**/test*.parquet", "test.jsonl*")
    for row in source.rows("**/test*.parquet", "test.jsonl*"):
        options = [_bare(one) for one in row.list("options")]
        film = _film(source, row, row.text("videoID"), "data", "videos", "")
        fields = {"question": row.text("question"), "options": lettered(options)}
        name, cluster = f"videomme/{row.text('question_id')}", f"videomme/{row.text('videoID')}"
        task = choice(row, options, "answer")
        yield Item(name, task, fields, row.where, (film,), cluster, tests=str(row.get("duration", "")))


MVBENCH = {
    "action_sequence": "star/Charades_v1_480",
    "action_prediction": "star/Charades_v1_480",
    "action_antonym": "ssv2_video",
    "fine_grained_action": "Moments_in_Time_Raw/videos",
    "unexpected_action": "FunQA_test/test",
    "object_existence": "clevrer/video_validation",
    "object_interaction": "star/Charades_v1_480",
    "object_shuffle": "perception/videos",
    "moving_direction": "clevrer/video_validation",
    "action_localization": "sta/sta_video",
    "scene_transition": "scene_qa/video",
    "action_count": "perception/videos",
    "moving_count": "clevrer/video_validation",
    "moving_attribute": "clevrer/video_validation",
    "state_change": "perception/videos",
    "fine_grained_pose": "nturgbd",
    "character_order": "perception/videos",
    "egocentric_navigation": "vlnqa",
    "episodic_reasoning": "tvqa/frames_fps3_hq",
    "counterfactual_inference": "clevrer/video_validation",
}
"""Under video/, where each task's clips are; those of episodic_reasoning are folders of frames, three a second."""


@loader
def mvbench(source: Source) -> Iterator[Item]:
    """json/TASK.json of OpenGVLab/MVBench with video/ unpacked (video/clevrer/video_validation/video_10009.mp4), rows:
    {"video", "question", "candidates": ["...", ...], "answer": "..." (one of them), "start", "end" (seconds, or none)}
    """
    for path in source.files("json/*.json"):
        name = path.stem
        if name not in MVBENCH:
            raise ValueError(f"{path}: no task {name!r} in MVBench; known: {', '.join(MVBENCH)}")
        for row in source.read(path):
            options = [str(one) for one in row.list("candidates")]
            film = _film(source, row, row.text("video"), f"video/{MVBENCH[name]}", "video", f"video/{name}")
            if row.get("start") is not None and row.get("end") is not None:
                start, end = row.number("start"), row.number("end")
                if not 0 <= start < end:
                    raise row.wrong(f"the part from {start} to {end} s is empty")
                film = replace(film, start=start, end=end)
            shown = "\n".join(f"({letter}) {one}" for letter, one in zip(LETTERS, options, strict=False))
            number, task = row.where.rpartition(":")[2], choice(row, options, "answer")
            fields = {"question": row.text("question"), "options": shown}
            cluster = f"mvbench/{MVBENCH[name]}/{row.text('video')}"
            yield Item(f"mvbench/{name}/{number}", task, fields, row.where, (film,), cluster, tests=name)


@loader
def longvideobench(source: Source) -> Iterator[Item]:
    """lvb_val.json or validation*.parquet of longvideobench/LongVideoBench with videos/, rows:
    {"id", "video_id", "video_path": "86CxyhFV9MI.mp4", "question", "candidates": ["...", ...] (in the Parquet file
     "option0", ..., "option4", "N/A" where there is none), "correct_choice": 1, "question_category", "duration_group"}
    """
    for path in source.files("lvb_val.json", "validation*.parquet", "**/validation*.parquet", "validation.jsonl*"):
        for row in source.read(path):
            if row.get("candidates") is not None:
                options = [str(one) for one in row.list("candidates")]
            else:
                cells = (str(row.get(f"option{number}", "N/A")) for number in range(5))
                options = list(takewhile(lambda cell: cell != "N/A", cells))
                if not options:
                    raise row.wrong("neither 'candidates' nor 'option0'")
            number = row.whole("correct_choice")
            if not 0 <= number < len(options):
                raise row.wrong(f"'correct_choice' {number} names none of the {len(options)} candidates")
            film = _film(source, row, row.text("video_path"), "videos", "")
            task = Task("choice", LETTERS[number], {"options": options})
            fields = {"question": row.text("question"), "options": lettered(options)}
            name, cluster = f"longvideobench/{row.text('id')}", f"longvideobench/{row.text('video_id', 'video_path')}"
            kind = str(row.get("question_category", ""))
            yield Item(name, task, fields, row.where, (film,), cluster, tests=kind)


# ---- the world


@lru_cache(maxsize=256)
def world_sample(place: str) -> Any:
    """The sample of a place "family/split/seed/index/level"."""
    from world import sample

    family, split, seed, index, level = place.split("/")
    return sample(family, int(index), split, int(seed), int(level))  # type: ignore[arg-type]


@loader
def world(
    source: Source, module: str, seed: int = 7, split: str = "heldout", each: int = 100, level: int | None = None
) -> Iterator[Item]:
    """Made here; the same questions as `moonkit score`, families by turns, `each` of every family."""
    from world import families
    from world.sample import Image

    tooled = ("tool", "proxy")  # their questions need tool rounds, which `moonkit score` plays
    chosen = [family for family in families(module) if family not in tooled]
    for index in range(each):
        for family in chosen:
            place = f"{family}/{split}/{seed}/{index}/{level or 1 + index % 2}"
            sample = world_sample(place)
            turn = sample.turns[index % len(sample.turns)]
            if turn.steps or sample.tools or sample.system:
                raise ValueError(
                    f"{family}: its questions need tools or a system prompt, which a plain question has not"
                )
            media = tuple(Ref("world", place, number) for number in range(len(sample.media)))
            check = {"check": turn.check.kind, "data": dict(turn.check.data), "tests": turn.tests}
            if turn.check.kind == "program":
                task = program_task(turn)
            else:
                task = Task("world", turn.answer, json.loads(json.dumps(check)))
            shown = "picture" if sample.media and isinstance(sample.media[0], Image) else "clip"
            fields = {"question": turn.question, "shown": shown}
            cluster = f"{family}/{turn.composition}"
            yield Item(f"world/{place}", task, fields, cluster, media, answer=turn.answer, tests=turn.tests)


def program_task(turn: Any) -> Task:
    """A turn's unit tests as assertions, so that they run in the sandbox like every other program's."""
    name = turn.check.data["name"]
    tests = [
        f"assert {name}({', '.join(map(repr, given))}) == {wanted!r}" for given, wanted in turn.check.data["tests"]
    ]
    return Task("function", turn.answer, {"prompt": "", "entry_point": name, "tests": tests, "setup": ""})
