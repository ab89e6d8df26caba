"""Were the instructions followed? Kind "constraints" of evals/graders.py: IFEval's, and M-IFEval's in es, fr and ja.

    data = {"prompt": "...", "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
            "kwargs": [{}, {"relation": "at least", "num_words": 300}], "strict": True}
    grade(Task("constraints", None, data), reply)   ->   1 if all of them are followed, else 0

    reply --+-- as it is ---------------------------------------- each instruction: "strict" --+-- all of them?
            +-- also without its first or last line, without * -- each instruction: "loose" ---+   data["strict"]

The evidence has the instructions with both results, from which rates by instruction are made. There is no gold: a
task is broken when an instruction is unknown, or its arguments are missing, of another kind, or none of its own.

An id may start with its language ("fr:keywords:existence"); without one it is English. The rules are those of Zhou et
al. 2023 (arXiv 2311.07911) as its published program has them, and agree with lm-eval's, but for this:
- A keyword is text here, not a pattern ("C++"). A letter to be counted may be any character; "#" is in the data, and
  is replaced by a random letter there.
- A text without any letter is in no language. There it is in every language.
- Sentences are found by NLTK's Punkt with the abbreviations below, without a download; words in capitals by NLTK's
  word tokenizer. Languages are told by langdetect with a fixed seed, so that a reply has the same score every time.
- Blank lines before the reply, which a chat template leaves after a thought, do not count.
In Spanish, words are runs of letters and digits. In Japanese, keywords are found as text, and a sentence that ends in
kanji or katakana ends in a noun: that is near to what a morphological analysis says, and needs none.
"""

import json
import operator
import re
import threading
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

RELATIONS: dict[str, Callable[[int, int], bool]] = {
    "less than": operator.lt,
    "at least": operator.ge,
    "at most": operator.le,
    "al menos": operator.ge,
    "como máximo": operator.le,
    "au moins": operator.ge,
    "moins de": operator.lt,
    "au plus": operator.le,
    "以上": operator.ge,
    "未満": operator.lt,
    "以下": operator.le,
}
OPTIONS = {
    "en": ("My answer is yes.", "My answer is no.", "My answer is maybe."),
    "es": ("Sí.", "No.", "Quizás."),
    "fr": ("Oui.", "Non.", "Peut-être."),
    "ja": ("はい、そうです。", "いいえ、違います。", "どちらとも言えません。"),
}
# of nltk's Punkt: what ends in a full stop without ending a sentence
ABBREVIATIONS = (
    "mr mrs ms dr prof rev gen col capt lt sgt cpl adm gov sen rep hon pres st ave blvd rd mt ft inc ltd co corp bros "
    "jr sr esq vs etc e.g i.e cf al fig no nos vol p pp ed eds est approx dept u.s u.k u.n u.s.a d.c a.m p.m ph.d m.d "
    "b.a m.a b.c a.d jan feb mar apr jun jul aug sep sept oct nov dec mon tue wed thu fri sat sun sra srta dña ud uds "
    "pág págs av núm tel art m mm mme mlle env ex"
).split()

LONGEST = 100_000  # characters of a reply that are read
# ---- text


@lru_cache(maxsize=1)
def _punkt() -> Any:
    from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer

    parameters = PunktParameters()
    parameters.abbrev_types = set(ABBREVIATIONS)
    return PunktSentenceTokenizer(parameters)


def sentences(text: str, language: str = "en") -> list[str]:
    """The sentences of a text."""
    if language == "ja":
        return [part for part in re.split(r"[。！？!?\n]", text) if part.strip()]
    if language == "es":
        text = _unlisted(text)
    found: list[str] = _punkt().tokenize(text)
    return found


def _unlisted(text: str) -> str:
    """Without the signs and numbers of lists."""
    return re.sub(r"^[^\S\n]*(?:\d+\.|[-*])[^\S\n]*", "", text, flags=re.MULTILINE)


def tokens(text: str) -> list[str]:
    """Words and signs, as NLTK's word_tokenize has them."""
    from nltk.tokenize import NLTKWordTokenizer

    tokenizer = NLTKWordTokenizer()
    return [token for sentence in sentences(text) for token in tokenizer.tokenize(sentence)]


_one_at_a_time = threading.Lock()  # langdetect loads its profiles at the first call


def language_of(text: str) -> str | None:
    """ISO 639-1, with the script for Chinese ("zh-cn"); None for a text without letters."""
    import langdetect

    with _one_at_a_time:
        langdetect.DetectorFactory.seed = 0
        try:
            return str(langdetect.detect(text))
        except langdetect.LangDetectException:
            return None


def _within(count: int, relation: str, number: int) -> bool:
    return RELATIONS[relation](count, number)


# ---- the rules: (text, arguments, language) -> followed?

Arguments = Mapping[str, Any]


def _existence(text: str, given: Arguments, language: str) -> bool:
    return all(re.search(re.escape(word), text, re.IGNORECASE) for word in given["keywords"])


def _frequency(text: str, given: Arguments, language: str) -> bool:
    found = len(re.findall(re.escape(given["keyword"].strip()), text, re.IGNORECASE))
    return _within(found, given["relation"], given["frequency"])


def _forbidden(text: str, given: Arguments, language: str) -> bool:
    if language == "ja":
        return not any(word in text for word in given["forbidden_words"])
    return not any(re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in given["forbidden_words"])


def _letter(text: str, given: Arguments, language: str) -> bool:
    letter = given["letter"].strip().lower()
    found = text.lower().count(letter)
    if language == "ja" and "ぁ" <= letter <= "ん":
        found += text.count(chr(ord(letter) + 96))  # the same sound in katakana
    return _within(found, given["let_relation"], given["let_frequency"])


def _language(text: str, given: Arguments, language: str) -> bool:
    found = language_of(text)
    return found is not None and (found == given["language"] or found.split("-")[0] == given["language"])


def _sentences(text: str, given: Arguments, language: str) -> bool:
    return _within(len(sentences(text, language)), given["relation"], given["num_sentences"])


def _paragraphs(text: str, given: Arguments, language: str) -> bool:
    parts = re.split(r"\s?\*\*\*\s?", text)
    if any(not part.strip() for part in parts[1:-1]):
        return False
    return sum(bool(part.strip()) for part in parts) == given["num_paragraphs"]


def _words(text: str, given: Arguments, language: str) -> bool:
    text = _unlisted(text) if language == "es" else text
    return _within(len(re.findall(r"\w+", text)), given["relation"], given["num_words"])


def _letters(text: str, given: Arguments, language: str) -> bool:
    return _within(len(text), given["relation"], given["num_letters"])


def _first_word(text: str, given: Arguments, language: str) -> bool:
    parts = text.split("\n\n")
    count, at = sum(bool(part.strip()) for part in parts), given["nth_paragraph"]
    if count != given["num_paragraphs"] or at > count or not parts[at - 1].strip():
        return False
    part, wanted = parts[at - 1].strip(), given["first_word"].lower()
    if language == "ja":
        return part.lstrip("「").lstrip("『").startswith(given["first_word"])
    if language == "es":
        plain = [re.sub(r"[!-/:-@\[-`{-~]", "", word).lower() for word in part.split()]
        return plain[: len(wanted.split())] == wanted.split()
    word = part.split()[0].lstrip("'").lstrip('"')
    return re.split(r"[.,?!'\"]", word)[0].lower() == wanted


def _placeholders(text: str, given: Arguments, language: str) -> bool:
    return len(re.findall(r"\[[^\[\]\n]*\]", text)) >= given["num_placeholders"]


def _postscript(text: str, given: Arguments, language: str) -> bool:
    known = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\.", "P.D.": r"p\.\s?d\."}
    marker = given["postscript_marker"].strip()
    return re.search(known.get(marker, re.escape(marker.lower())), text.lower()) is not None


def _bullets(text: str, given: Arguments, language: str) -> bool:
    if language == "ja":
        found = len(re.findall(r"^[^\S\n]*・[^・].*$", text, re.MULTILINE))
    else:
        found = len(re.findall(r"^[^\S\n]*\*[^*].*$", text, re.MULTILINE))
        if language != "es":
            found += len(re.findall(r"^[^\S\n]*-.*$", text, re.MULTILINE))
    return found == given["num_bullets"]


def _numbered(text: str, given: Arguments, language: str) -> bool:
    return len(re.findall(r"^[^\S\n]*\d+\.\s.*$", text, re.MULTILINE)) == given["num_items"]


def _options(text: str, given: Arguments, language: str) -> bool:
    return any(option in text for option in OPTIONS[language])


def _highlights(text: str, given: Arguments, language: str) -> bool:
    if language == "ja":
        found = sum(bool(part.strip()) for part in re.findall(r"《([^\n《》]*)》", text))
    else:
        found = sum(bool(part.strip()) for part in re.findall(r"\*([^\n*]*)\*", text))
        found += sum(bool(part.strip()) for part in re.findall(r"\*\*([^\n*]*)\*\*", text))
    return found >= given["num_highlights"]


def _sections(text: str, given: Arguments, language: str) -> bool:
    marker = re.escape(given["section_spliter"].strip())
    pattern = rf"第\d+{marker}" if language == "ja" else rf"{marker}\s?\d+"
    return len(re.findall(pattern, text)) >= given["num_sections"]


def _json(text: str, given: Arguments, language: str) -> bool:
    plain = re.sub(r"^```(?:json|Json|JSON)?", "", text.strip()).removesuffix("```").strip()
    try:
        json.loads(plain)
    except (ValueError, RecursionError):
        return False
    return True


def _title(text: str, given: Arguments, language: str) -> bool:
    marks = {"ja": [("『", "』")], "fr": [("##", "##"), ("<<", ">>")]}.get(language, [("<<", ">>")])
    for line in text.split("\n"):
        for left, right in marks:
            first, last = line.find(left), line.rfind(right)
            if 0 <= first < last - len(left) and line[first:last].strip(left + right).strip():
                return True
    return False


def _two(text: str, given: Arguments, language: str) -> bool:
    parts = text.split("******")
    if any(not part.strip() for part in parts[1:-1]):
        return False
    said = [part.strip() for part in parts if part.strip()]
    return len(said) == 2 and said[0] != said[1]


def _repeat(text: str, given: Arguments, language: str) -> bool:
    return text.strip().lower().startswith(given["prompt_to_repeat"].strip().lower())


def _end(text: str, given: Arguments, language: str) -> bool:
    quotes = "」』" if language == "ja" else '"'
    said, wanted = text.strip().strip(quotes).lower(), given["end_phrase"].strip().lower()
    if language == "ja":
        wanted = wanted.strip(quotes)
    return said.endswith(wanted) or (language == "es" and said.removesuffix(".").endswith(wanted))


def _quotation(text: str, given: Arguments, language: str) -> bool:
    pairs = {"ja": ["「」"], "fr": ['""', "''", "«»"]}.get(language, ['""'])
    said = text.strip()
    return len(said) > 1 and said[0] + said[-1] in pairs


def _capital_words(text: str, given: Arguments, language: str) -> bool:
    found = sum(token.isupper() for token in tokens(text))
    return _within(found, given["capital_relation"], given["capital_frequency"])


def _capital(text: str, given: Arguments, language: str) -> bool:
    if language == "es":
        return _base(text).isupper() and language_of(text.lower()) == "es"
    return text.isupper() and language_of(text) == language


def _lowercase(text: str, given: Arguments, language: str) -> bool:
    if language == "es":
        return _base(text).islower() and language_of(text) == "es"
    return text.islower() and language_of(text) == language


def _base(text: str) -> str:
    """Without accents."""
    return "".join(sign for sign in unicodedata.normalize("NFKD", text) if not unicodedata.combining(sign))


def _no_comma(text: str, given: Arguments, language: str) -> bool:
    return ("、" if language == "ja" else ",") not in text


def _spanish(letters: str) -> Callable[[str, Arguments, str], bool]:
    def count(text: str, given: Arguments, language: str) -> bool:
        found = sum(any(sign in letters for sign in word.lower()) for word in re.findall(r"\w+", text))
        if "let_frequency" in given:
            return bool(found == given["let_frequency"])
        return _within(found, given["relation"], given["num_words"])

    return count


def _asked(text: str, given: Arguments, language: str) -> bool:
    return any(part.strip("¿? \n\t") for part in re.findall(r"¿([^?¿]*)\?", text))


def _exclaimed(text: str, given: Arguments, language: str) -> bool:
    return any(part.strip("¡! \n\t") for part in re.findall(r"¡([^!¡]*)!", text))


def _informal(text: str, given: Arguments, language: str) -> bool:
    return re.search(r"\b(?:tu|te|toi|ton|ta|tes)\b|\bt['’]", text, re.IGNORECASE) is not None


def _no_digits(text: str, given: Arguments, language: str) -> bool:
    return re.search(r"\d", text) is None


def _no_accents(text: str, given: Arguments, language: str) -> bool:
    return not any(unicodedata.combining(sign) for sign in unicodedata.normalize("NFD", text))


def _accents(text: str, given: Arguments, language: str) -> bool:
    said = set(re.findall(r"\w+", unicodedata.normalize("NFC", text.lower())))
    pairs = given["word_to_accentuate"].items()
    return all(right.lower() in said and wrong.lower() not in said for wrong, right in pairs)


def _no_letter(text: str, given: Arguments, language: str) -> bool:
    return given["forbidden_char"].lower() not in text.lower()


_KANJI = r"[\u4e00-\u9faf]"


def _furigana(text: str, given: Arguments, language: str) -> bool:
    return len(re.findall(rf"{_KANJI}+", text)) == len(re.findall(rf"{_KANJI}+（[ぁ-ん]+）", text))


def _kanji(text: str, given: Arguments, language: str) -> bool:
    return _within(len(re.findall(_KANJI, text)), given["relation"], given["kanji_limit"])


def _only(first: str, last: str, also: str) -> Callable[[str, Arguments, str], bool]:
    def check(text: str, given: Arguments, language: str) -> bool:
        letters = [sign for sign in text if unicodedata.category(sign).startswith("L")]
        return bool(letters) and all(first <= sign <= last or sign in also for sign in letters)

    return check


def _without(pattern: str) -> Callable[[str, Arguments, str], bool]:
    return lambda text, given, language: re.search(pattern, text) is None


def _unquoted(text: str) -> str:
    return re.sub(r"「[^「」\n]*」|『[^『』\n]*』", "", text)


def _one_end(text: str, given: Arguments, language: str) -> bool:
    parts = [part.strip() for part in re.split(r"[。！？]", _unquoted(text)) if part.strip()]
    return bool(parts) and all(part.endswith(given["ending"]) for part in parts)


def _nominal(text: str, given: Arguments, language: str) -> bool:
    return len(re.findall(r"[\u4e00-\u9fafァ-ヺー々][。！？]", _unquoted(text))) >= given["count"]


# ---- which there are


class Rule(NamedTuple):
    """wants: the arguments and what kind each is of; may: those that can be left out."""

    check: Callable[[str, Arguments, str], bool]
    wants: Mapping[str, str] = {}
    may: Mapping[str, str] = {}
    only: str = ""  # languages; all if empty


_RELATED = {"relation": "relation"}
RULES: dict[str, Rule] = {
    "keywords:existence": Rule(_existence, {"keywords": "texts"}),
    "keywords:frequency": Rule(_frequency, {"keyword": "text", "frequency": "count", "relation": "relation"}),
    "keywords:forbidden_words": Rule(_forbidden, {"forbidden_words": "texts"}),
    "keywords:letter_frequency": Rule(
        _letter, {"letter": "letter", "let_frequency": "count", "let_relation": "relation"}
    ),
    "language:response_language": Rule(_language, {"language": "text"}),
    "length_constraints:number_sentences": Rule(_sentences, {"num_sentences": "count", "relation": "relation"}),
    "length_constraints:number_paragraphs": Rule(_paragraphs, {"num_paragraphs": "count"}),
    "length_constraints:number_words": Rule(_words, {"num_words": "count", "relation": "relation"}),
    "length_constraints:number_letters": Rule(_letters, {"num_letters": "count", "relation": "relation"}, only="ja"),
    "length_constraints:nth_paragraph_first_word": Rule(
        _first_word, {"num_paragraphs": "count", "nth_paragraph": "place", "first_word": "text"}
    ),
    "detectable_content:number_placeholders": Rule(_placeholders, {"num_placeholders": "count"}, _RELATED),
    "detectable_content:postscript": Rule(_postscript, {"postscript_marker": "text"}),
    "detectable_content:informal_address": Rule(_informal, only="fr"),
    "detectable_content:no_digits": Rule(_no_digits, only="fr"),
    "detectable_format:number_bullet_lists": Rule(_bullets, {"num_bullets": "count"}),
    "detectable_format:number_numbered_lists": Rule(_numbered, {"num_items": "count"}, only="ja"),
    "detectable_format:constrained_response": Rule(_options),
    "detectable_format:number_highlighted_sections": Rule(_highlights, {"num_highlights": "count"}, _RELATED),
    "detectable_format:multiple_sections": Rule(
        _sections, {"section_spliter": "text", "num_sections": "count"}, _RELATED
    ),
    "detectable_format:json_format": Rule(_json),
    "detectable_format:title": Rule(_title),
    "detectable_format:nominal_ending": Rule(_nominal, {"count": "count"}, only="ja"),
    "combination:two_responses": Rule(_two),
    "combination:repeat_prompt": Rule(_repeat, {"prompt_to_repeat": "text"}),
    "startend:end_checker": Rule(_end, {"end_phrase": "text"}),
    "startend:quotation": Rule(_quotation),
    "startend:sentence_unified_end": Rule(_one_end, {"ending": "text"}, only="ja"),
    "change_case:capital_word_frequency": Rule(
        _capital_words, {"capital_frequency": "count", "capital_relation": "relation"}
    ),
    "change_case:english_capital": Rule(_capital, only="en"),
    "change_case:english_lowercase": Rule(_lowercase, only="en"),
    "change_case:spanish_capital": Rule(_capital, only="es"),
    "change_case:spanish_lowercase": Rule(_lowercase, only="es"),
    "change_case:french_capital": Rule(_capital, only="fr"),
    "change_case:french_lowercase": Rule(_lowercase, only="fr"),
    "punctuation:no_comma": Rule(_no_comma),
    "punctuation:no_period": Rule(_without("。"), only="ja"),
    "punctuation:question_marks": Rule(_asked, only="es"),
    "punctuation:exclamation_marks": Rule(_exclaimed, only="es"),
    "special_character:enie": Rule(_spanish("ñ"), {"let_frequency": "count"}, only="es"),
    "special_character:dieresis": Rule(_spanish("ü"), {"let_frequency": "count"}, only="es"),
    "special_character:tildes": Rule(_spanish("áéíóú"), {"num_words": "count", "relation": "relation"}, only="es"),
    "special_character:accents": Rule(_accents, {"word_to_accentuate": "pairs"}, only="fr"),
    "special_character:no_accents": Rule(_no_accents, only="fr"),
    "special_character:ethel_or_cedilla": Rule(_no_letter, {"forbidden_char": "letter"}, only="fr"),
    "letters:furigana": Rule(_furigana, only="ja"),
    "letters:kanji": Rule(_kanji, {"kanji_limit": "count", "relation": "relation"}, only="ja"),
    "letters:kansuuji": Rule(_no_digits, only="ja"),
    "letters:hiragana_only": Rule(_only("ぁ", "ん", "ー"), only="ja"),
    "letters:katakana_only": Rule(_only("ァ", "ン", "ー・ヴヵヶ"), only="ja"),
    "letters:no_hiragana": Rule(_without("[ぁ-ゖ]"), only="ja"),
    "letters:no_katakana": Rule(_without("[ァ-ヺｦ-ﾟ]"), only="ja"),
}


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _whole(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == int(value) and 0 <= value < 10**9


ARE: dict[str, Callable[[Any], bool]] = {
    "text": _text,
    "texts": lambda value: isinstance(value, list | tuple) and bool(value) and all(map(_text, value)),
    "letter": lambda value: _text(value) and len(value.strip()) == 1,
    "count": _whole,
    "place": lambda value: _whole(value) and value >= 1,
    "relation": lambda value: isinstance(value, str) and value in RELATIONS,
    "pairs": lambda value: isinstance(value, Mapping) and bool(value) and all(map(_text, [*value, *value.values()])),
}


class Instruction(NamedTuple):
    id: str
    language: str
    arguments: dict[str, Any]

    def followed(self, text: str) -> bool:
        """Whether a text follows it. An empty one follows nothing."""
        rule = RULES[self.id.removeprefix(f"{self.language}:")]
        return bool(text.strip()) and bool(rule.check(text, self.arguments, self.language))


def instructions(data: Mapping[str, Any]) -> list[Instruction]:
    """The instructions of a task. Raises ValueError for one that is unknown, or whose arguments are not well formed."""
    ids, kwargs = data.get("instruction_id_list"), data.get("kwargs")
    if not isinstance(ids, list | tuple) or not isinstance(kwargs, list | tuple) or len(ids) != len(kwargs) or not ids:
        raise ValueError(f"constraints: as many instructions as arguments, one or more, got {ids!r} and {kwargs!r}")
    if not isinstance(data.get("strict", True), bool):
        raise ValueError(f"constraints: strict is true or false, got {data['strict']!r}")
    return [_instruction(str(name), given) for name, given in zip(ids, kwargs, strict=True)]


def _instruction(name: str, given: Any) -> Instruction:
    language, _, rest = name.partition(":")
    language, rest = (language, rest) if language in OPTIONS else ("en", name)
    rule = RULES.get(rest)
    if rule is None or (rule.only and rule.only != language):
        raise ValueError(f"constraints: no instruction {name!r}; known: {', '.join(RULES)}")
    if not isinstance(given, Mapping):
        raise ValueError(f"constraints: {name} has arguments by name, got {given!r}")
    held = {key: value for key, value in given.items() if value is not None}  # the hub's table names all for each row
    known = {**rule.wants, **rule.may}
    for key, value in held.items():
        if key not in known:
            raise ValueError(f"constraints: {name} has no argument {key!r}; it has {', '.join(known) or 'none'}")
        if not ARE[known[key]](value):
            raise ValueError(f"constraints: {name}: {key} is no {known[key]}: {value!r}")
    missing = [key for key in rule.wants if key not in held]
    if missing:
        raise ValueError(f"constraints: {name} needs {', '.join(missing)}")
    return Instruction(name, language, {key: value for key, value in held.items() if key in rule.wants})


# ---- the grader


def versions(reply: str) -> list[str]:
    """The eight texts of the loose count: without the first line, the last, both; each also without asterisks."""
    lines = reply.split("\n")
    cut = [reply, "\n".join(lines[1:]).strip(), "\n".join(lines[:-1]).strip(), "\n".join(lines[1:-1]).strip()]
    return [*cut, *(text.replace("*", "") for text in cut)]


def golds(gold: Any, data: Mapping[str, Any]) -> Sequence[str] | None:
    """None: there is no gold. Raises ValueError for a broken task."""
    if gold is not None:
        raise ValueError(f"constraints: there is no gold answer, got {str(gold)[:80]!r}")
    instructions(data)
    return None


def constraints(gold: None, data: Mapping[str, Any], said: str) -> tuple[float, dict[str, Any]]:
    """The grader. evidence: "instructions", and for each of them "strict" and "loose", true if it is followed."""
    wanted = instructions(data)
    reply = re.sub(r"^(?:[^\S\n]*\n)+", "", said)[:LONGEST]
    texts = versions(reply)
    strict = [one.followed(reply) for one in wanted]
    loose = [hit or any(map(one.followed, texts[1:])) for one, hit in zip(wanted, strict, strict=True)]
    evidence = {"instructions": [one.id for one in wanted], "strict": strict, "loose": loose}
    return float(all(strict if data.get("strict", True) else loose)), evidence
