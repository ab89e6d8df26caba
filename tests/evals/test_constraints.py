"""Constraints: the published rules, the same verdicts as lm-eval's, and nothing that is said takes long.

pytest tests/evals/test_constraints.py
"""

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest

from evals import constraints
from evals.constraints import RULES, instructions, language_of, sentences, versions
from evals.graders import Task, grade

FOLLOWED: list[tuple[str, dict[str, Any], str, str]] = [
    ("keywords:existence", {"keywords": ["C++", "rust"]}, "Rust or c++", "Rust or C"),
    ("keywords:frequency", {"keyword": "a", "frequency": 2, "relation": "less than"}, "a b c", "a b a"),
    ("keywords:forbidden_words", {"forbidden_words": ["rock"]}, "rocket", "a Rock."),
    ("keywords:letter_frequency", {"letter": "#", "let_frequency": 2, "let_relation": "at least"}, "# and #", "# no"),
    ("language:response_language", {"language": "de"}, "Das ist ein ganz gewöhnlicher Satz.", "This is English."),
    ("language:response_language", {"language": "de"}, "Noch ein deutscher Satz, der lang ist.", "1234 5678"),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"}, "One. Two.", "Dr. No is 3."),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb", "a\n***\n***\nb"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, "one two-three", "one two"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Weekend"},
        "a\n\n'weekend, b",
        "weekend\n\nb",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[a] [b c]", "[a [b]"),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "x\np. p. s bye", "P.S. bye"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b", "* a\n** b"),
    ("detectable_format:constrained_response", {}, "My answer is no. Because", "no"),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and *b c*", "*a* and * *"),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Section", "num_sections": 2},
        "Section 1 Section2",
        "Section 1",
    ),
    ("detectable_format:json_format", {}, '```json\n{"a": [1]}\n```', "{a: 1}"),
    ("detectable_format:title", {}, "<<a poem>>", "<< >>"),
    ("combination:two_responses", {}, "a\n******\nb", "a\n******\na"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say hi."}, "say hi. Hi!", "Hi! Say hi."),
    ("startend:end_checker", {"end_phrase": "Bye now."}, 'x "bye now."', "Bye now. x"),
    ("startend:quotation", {}, '"all of it"', '"part" of it'),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        "NASA, USA.",
        "NASA",
    ),
    ("change_case:english_capital", {}, "THIS IS THE ANSWER THAT YOU WANTED FROM ME", "THIS IS the answer"),
    ("change_case:english_lowercase", {}, "this is the answer that you wanted", "This is the answer"),
    ("punctuation:no_comma", {}, "a b", "a, b"),
    ("es:length_constraints:number_words", {"num_words": 2, "relation": "como máximo"}, "* uno\n* dos", "uno dos tres"),
    ("es:punctuation:question_marks", {}, "¿Qué?", "Que?"),
    ("es:special_character:enie", {"let_frequency": 1}, "el niño", "el nino"),
    ("es:special_character:tildes", {"num_words": 1, "relation": "al menos"}, "está", "esta"),
    ("fr:detectable_content:informal_address", {}, "Je t'écris", "Je vous écris"),
    ("fr:special_character:accents", {"word_to_accentuate": {"deja": "déjà"}}, "c'est déjà", "c'est deja"),
    ("fr:special_character:no_accents", {}, "oui", "là"),
    ("fr:special_character:ethel_or_cedilla", {"forbidden_char": "œ"}, "coeur", "cŒur"),
    ("fr:startend:quotation", {}, "«oui»", "«oui"),
    ("ja:letters:kanji", {"kanji_limit": 2, "relation": "以上"}, "日本", "日ほん"),
    ("ja:letters:furigana", {}, "漢字（かんじ）", "漢字"),
    ("ja:letters:hiragana_only", {}, "ひらがな。", "カナ"),
    ("ja:startend:sentence_unified_end", {"ending": "です"}, "本です。猫です。", "本です。猫だ。"),
    ("ja:detectable_format:nominal_ending", {"count": 1}, "美しい富士山。", "山は高い。"),
    ("ja:detectable_format:multiple_sections", {"section_spliter": "章", "num_sections": 2}, "第1章 第２章", "第1章"),
]


@pytest.mark.parametrize(("name", "given", "right", "wrong"), FOLLOWED)
def test_each_rule_holds_and_breaks(name: str, given: dict[str, Any], right: str, wrong: str) -> None:
    task = Task("constraints", None, {"instruction_id_list": [name], "kwargs": [given]})
    assert grade(task, right).score == 1 and grade(task, wrong).score == 0


def test_all_must_be_followed_strictly_or_loosely() -> None:
    names = ["punctuation:no_comma", "startend:quotation"]
    for strict, score in ((True, 0), (False, 1)):
        task = Task("constraints", None, {"instruction_id_list": names, "kwargs": [{}, {}], "strict": strict})
        verdict = grade(task, 'Sure, here it is:\n"the answer"')
        assert verdict.score == score
        assert verdict.evidence == {"instructions": names, "strict": [False, False], "loose": [True, True]}
    assert len(versions("a\n*b*\nc")) == 8 and versions("a\n*b*\nc")[-1] == "b"
    task = Task("constraints", None, {"instruction_id_list": names[1:], "kwargs": [{"num_words": None}]})
    with pytest.raises(ValueError, match="no argument"):
        grade(Task("constraints", None, {"instruction_id_list": names[1:], "kwargs": [{"num_words": 3}]}), "x")
    assert grade(task, '<think>\n</think>\n\n"a"').score == 1, "arguments that are None are none"


@pytest.mark.parametrize("language", ["en", "es", "fr", "ja"])
def test_every_published_task_is_well_formed(language: str, data: Path) -> None:
    path = data / "ifeval" / f"{language}_input_data.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(rows) > 100
    for row in rows:
        found = instructions(row)
        assert [one.id for one in found] == row["instruction_id_list"]
        constraints.constraints(None, row, row["prompt"])


HOSTILE = [
    "[",
    "*",
    "\n",
    " \n",
    "<<",
    "- ",
    ".",
    "。",
    "a",
    "A. ",
    "【",
    "******",
    '"',
    "\\",
    "{",
    "P.",
    "¿",
    "\U0001f600",
]


@pytest.mark.parametrize("sign", HOSTILE)
def test_no_text_takes_long(sign: str) -> None:
    text, start = (sign * 50_000)[:50_000], time.process_time()
    for name, given, right, _ in FOLLOWED:
        if "language" not in name and "change_case:e" not in name:
            constraints.instructions({"instruction_id_list": [name], "kwargs": [given]})[0].followed(text + right)
    assert time.process_time() - start < 10


def test_pieces() -> None:
    assert len(sentences("Mr. Smith went to the U.S. in May. He, e.g., bought 3.5 kg! Why?")) == 3
    assert language_of("12") is None and language_of("This is plain English text.") == "en"
    assert {name for name, *_ in FOLLOWED} >= {name for name, rule in RULES.items() if not rule.only}


def test_the_same_verdicts_as_lm_evals(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strict and loose, each instruction, over replies that were made from the prompts. Sentences are split by the same
    splitter on both sides, since lm-eval downloads its own; letters that it replaces by random ones are left out."""
    nltk = pytest.importorskip("nltk")
    monkeypatch.setattr(nltk, "download", lambda *_, **__: False)
    import langdetect

    utils = pytest.importorskip("lm_eval.tasks.ifeval.utils")
    from lm_eval.tasks.ifeval import instructions_util

    monkeypatch.setattr(instructions_util, "_get_sentence_tokenizer", constraints._punkt)
    monkeypatch.setattr("nltk.tokenize.sent_tokenize", lambda text, language="english": constraints.sentences(text))
    langdetect.DetectorFactory.seed = 0
    path = data / "ifeval" / "en_input_data.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    chance, compared = random.Random(0), 0
    for row in chance.sample(rows, 120):
        ids = [name.removeprefix("en:") for name in row["instruction_id_list"]]
        reply = _reply(row, chance)
        item = utils.InputExample(row["key"], ids, row["prompt"], row["kwargs"])
        strict = utils.test_instruction_following_strict(item, reply).follow_instruction_list
        loose = utils.test_instruction_following_loose(item, reply).follow_instruction_list
        _, ours = constraints.constraints(None, row, reply)
        for at, given in enumerate(row["kwargs"]):
            if str(given.get("letter", "a")).isalpha():
                assert (ours["strict"][at], ours["loose"][at]) == (bool(strict[at]), bool(loose[at])), (ids[at], reply)
                compared += 1
    assert compared > 150


def _reply(row: dict[str, Any], chance: random.Random) -> str:
    words = [
        *row["prompt"].split(" "),
        "NASA",
        "\n",
        "\n\n",
        "* a point\n",
        "*light*",
        "<<Title>>",
        "P.S. x",
        "***",
        '"',
    ]
    for given in row["kwargs"]:
        for argument in given.values():
            words += argument if isinstance(argument, list) else [str(argument)] * 5
    text = " ".join(chance.choice(words) for _ in range(chance.choice([5, 40, 200])))
    text = chance.choice([text, row["prompt"], text.lower(), text.upper(), f'"{text}"', f"Sure!\n{text}\nBye"])
    return text.strip() or "yes"
