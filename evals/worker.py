"""The inside of one worker of evals/workers.py, which starts it: one line of JSON in, one out, until the input ends.

    compare  {"gold": "\\\\sqrt{8}", "answer": "2\\\\sqrt{2}"}  ->  {"parsed": true, "read": true, "equal": true}
    render   {"svg": "<svg ...>", "size": 256}               ->  {"png": "iVBO..."}, or {"refused": why}

It imports nothing of ours, so that it starts as fast as its library does. The kernel holds the limits: memory for the
process, processor time for each line.

    python evals/worker.py DUTY MEGABYTES SECONDS
"""

import base64
import json
import os
import sys
from collections.abc import Callable
from typing import Any


def main(duty: str, memory_mb: int, seconds: int) -> None:
    """Answer lines until there are none. The first line out says that it is ready."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # what a library prints is no reply
    os.dup2(nowhere, 2)
    import logging
    import resource

    logging.disable(logging.CRITICAL)

    def say(what: dict[str, Any]) -> None:
        replies.write(json.dumps(what) + "\n")
        replies.flush()

    work, first = DUTIES[duty]
    try:
        work(**first)  # imports its library and fills its tables, before the limits
    except ImportError as error:
        say({"missing": str(error)})
        return
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (memory_mb * 2**20, memory_mb * 2**20))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if hasattr(sys, "set_int_max_str_digits"):
        sys.set_int_max_str_digits(5000)
    say({"ready": duty})
    for line in sys.stdin:
        used = resource.getrusage(resource.RUSAGE_SELF)
        most = int(used.ru_utime + used.ru_stime) + seconds + 1
        resource.setrlimit(resource.RLIMIT_CPU, (most, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        try:
            said = work(**json.loads(line))
        except MemoryError:
            said = {"error": "memory"}
        except RecursionError:
            said = {"error": "nesting"}
        except Exception as error:  # noqa: BLE001 - sympy raises whatever it likes for what is no mathematics
            said = {"error": type(error).__name__}
        say(said)


def compare(gold: str, answer: str | None = None) -> dict[str, Any]:
    """parsed: the gold is mathematics; read: the answer is; equal: they are the same by math-verify's rules."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    def formulas(text: str) -> list[Any]:
        found = parse(
            f"${text}$",
            [LatexExtractionConfig(boxed_match_priority=-1), ExprExtractionConfig()],
            fallback_mode="no_fallback",
            parsing_timeout=None,
        )
        return [one for one in found if not isinstance(one, str)]

    golds = formulas(gold)
    answers = formulas(answer) if answer is not None and golds else []
    equal = bool(golds and answers) and verify(golds, answers, allow_set_relation_comp=True, timeout_seconds=None)
    return {"parsed": bool(golds), "read": bool(answers), "equal": bool(equal)}


def render(svg: str, size: int, fonts: str = "") -> dict[str, Any]:
    """A drawing as PNG, size by size pixels on white. fonts: the only folder that they are taken from."""
    import resvg_py

    lettered = "<text" in svg or ":text" in svg
    try:
        png = resvg_py.svg_to_bytes(
            svg_string=svg,
            background="#ffffff",
            width=size,
            height=size,
            skip_system_fonts=True,  # every machine draws the same letters
            font_dirs=[fonts] if fonts and lettered else None,
            font_family="DejaVu Sans",
            sans_serif_family="DejaVu Sans",
            serif_family="DejaVu Serif",
            monospace_family="DejaVu Sans Mono",
            cursive_family="DejaVu Sans",
            fantasy_family="DejaVu Sans",
        )
    except ValueError as error:
        return {"refused": str(error)[:300]}
    return {"png": base64.b64encode(png).decode()}


Work = Callable[..., dict[str, Any]]
DUTIES: dict[str, tuple[Work, dict[str, Any]]] = {
    "compare": (compare, {"gold": r"\frac{\sqrt{2}}{2}", "answer": r"x = \sqrt{\frac{1}{2}}"}),
    "render": (render, {"svg": '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1 1"/>', "size": 8}),
}


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
