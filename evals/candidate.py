"""The process that a model's code runs in. It answers calls, and knows nothing of what is expected.

    judge ── call f(2, 3) ──> this process ── f(2, 3) ──> the model's code
          <── value 5 ──            "

    asked     [token, "call", target, [arguments], {keywords}]  target: ["name", n] or ["object", number]
              [token, "attribute", number, name] and the like: see the methods on_...
    answered  [token, "value", value, {position: argument}]     with the arguments that the call has changed
              [token, "raised", [class names, nearest first], text, [arguments]]
              [token, "broken", text]                           the code does not load, or has left by sys.exit
              [token, "calls", number, [arguments], {keywords}] a function that the judge gave is called; then, as
                                                                an answer from the judge: [token, "value" | "raised"]

Its standard input is empty and what it prints goes nowhere. Everything that stands here can be taken over by the code
that it runs: a forged answer is just an answer. The token makes an answer that comes twice, or early, the last one.

Sent into a sandbox with evals/values.py; it runs under Python 3.9 or newer.
"""

from __future__ import annotations

import builtins
import sys

from evals.values import Pipe, Unreadable, Writer, found_by_name, parse, private_pipe, read, revive

TYPE_CHECKING = False
if TYPE_CHECKING:  # as in typing, which takes long to import
    from collections.abc import Callable, Iterator
    from typing import Any, NoReturn

LONGEST_ASKED, LONGEST_ANSWER = 64 * 2**20, 4 * 2**20  # bytes
MUTABLE = (list, dict, set, bytearray)
MOST = 4096  # items of an iterator that are sent at once
CUTS = 200  # ends of a rambling completion that are tried


# ---- which part of an answer is the program


def choose(order: dict[str, Any]) -> str:
    """The program that an answer means. order: prompt, entry (the name that it must define, or None), options (the
    texts to try, best first), or program, taken as it is. Where nothing compiles, the first option."""
    if "program" in order:
        return str(order["program"])
    prompt, entry = order.get("prompt") or "", order.get("entry")
    head = next((f"{text}\n" for text in (prompt, prompt + "    pass\n") if _compiles(text)), "")
    whole = [option for option in order["options"] if _defines(option, entry)]
    parts = [option for option in order["options"] if prompt and option not in whole]  # go on where the prompt ends
    for option in whole:
        if _compiles(head + option):
            return head + str(option)
    for option in parts:
        as_it_is = [option] if option[:1].isspace() or not prompt.endswith("\n") else []
        for text in (*as_it_is, "    " + option.lstrip(), _indented(option)):
            if _compiles(prompt + text):
                return prompt + text
    cut = [(head, option, True) for option in whole] + [(prompt, option, False) for option in parts]
    for base, option, complete in cut:
        for text in _shorter(option, complete):
            if _compiles(base + text) and (not complete or _defines(text, entry)):
                return base + text
    first = order["options"][0] if order["options"] else ""
    return first if _defines(first, entry) else prompt + first


def _compiles(source: str) -> bool:
    if not source.strip():
        return False
    try:
        compile(source, "<answer>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError):
        return False
    return True


def _defines(source: str, entry: str | None) -> bool:
    if not entry:
        return True
    starts = (f"def {entry}(", f"def {entry} ", f"async def {entry}(", f"class {entry}", f"{entry} =", f"{entry}=")
    return any(line.startswith(starts) for line in source.splitlines())


def _indented(source: str) -> str:
    return "\n".join("    " + line for line in source.splitlines())


def _shorter(text: str, whole: bool) -> Iterator[str]:
    """Without what a model has added behind the code; and, of a whole program, what stands before it."""
    lines = text.splitlines()
    code = ("def ", "class ", "import ", "from ", "@", "async def ")
    begin = next((at for at, line in enumerate(lines) if line.startswith(code)), 0) if whole else 0
    ends = [at for at, line in enumerate(lines) if at > begin and line and not line[0].isspace()]
    for end in [len(lines), *reversed(ends)][:CUTS]:
        yield "\n".join(lines[begin:end]) + "\n"


# ---- the program


def leave(code: object = None) -> NoReturn:
    raise SystemExit(code)


def load(source: str, name: str) -> dict[str, Any]:
    """Run a program as a module of that name; its names."""
    module = type(sys)(name)
    sys.modules[name] = module
    for known in ("exit", "quit"):
        setattr(builtins, known, leave)  # the interpreter was started without site
    exec(compile(source, f"<{name}>", "exec", dont_inherit=True), module.__dict__)
    return module.__dict__


def run_program(order: dict[str, Any]) -> None:
    """For tasks that are read from standard input: the whole program, as python would run it."""
    load(choose(order), "__main__")


# ---- answering


class Server:
    def __init__(self, pipe: Pipe) -> None:
        self.pipe = pipe
        self.objects: dict[int, Any] = {}
        self.numbers: dict[int, int] = {}
        self.given: dict[int, Any] = {}
        self.names: dict[str, Any] = {}
        self.trouble: str | None = None
        self.token = ""

    def load(self, order: dict[str, Any]) -> None:
        try:
            self.names = load(choose(order), "solution")
        except BaseException as error:
            self.trouble = f"{type(error).__name__}: {_text(error)}"

    def run(self) -> None:
        while True:
            text = self.pipe.receive()
            if text is None:
                return
            self.serve(text)

    def serve(self, text: str) -> None:
        parts = parse(text)
        token, what, rest = parts[0], parts[1], parts[2:]
        self.token = token
        if self.trouble is not None:
            self.answer(token, "broken", self.trouble)
            return
        try:
            body = getattr(self, "on_" + what)(*rest)
        except Exception as error:
            self.raised(token, error)
        except BaseException as error:
            self.answer(token, "broken", f"{type(error).__name__}: {_text(error)}")
        else:
            self.pipe.send(f'["{token}","value",{body}]')

    def answer(self, token: str, what: str, *parts: Any) -> None:
        writer = Writer(LONGEST_ANSWER)
        self.pipe.send(f'["{token}","{what}",' + ",".join(writer.write(part) for part in parts) + "]")

    def raised(self, token: str, error: BaseException) -> None:
        names = [kind.__name__ for kind in type(error).__mro__ if issubclass(kind, BaseException)][:20]
        writer = Writer(100_000)
        try:
            arguments = writer.write(list(error.args))
        except Exception:
            arguments = '["l"]'
        self.pipe.send(f'["{token}","raised",{writer.write(names)},{Writer(100_000).write(_text(error))},{arguments}]')

    # ---- what can be asked

    def on_get(self, name: str) -> str:
        return self.written(self.by_name(name)) + ",[]"

    def on_call(self, target: list[Any], arguments: list[str], keywords: list[list[str]]) -> str:
        called = self.target(target)
        values = [self.value(text) for text in arguments]
        value = called(*values, **{name: self.value(text) for name, text in keywords})
        written = self.written(value)  # before the arguments: an iterator may still read them
        changed = []
        for at, (old, now) in enumerate(zip(arguments, values)):
            if isinstance(now, (*MUTABLE, tuple)):
                text = self.written(now)
                if text != old:
                    changed.append(f"[{at},{text}]")
        return written + ",[" + ",".join(changed) + "]"

    def on_attribute(self, number: int, name: str) -> str:
        return self.written(getattr(self.objects[number], name)) + ",[]"

    def on_set(self, number: int, name: str, text: str) -> str:
        setattr(self.objects[number], name, self.value(text))
        return "null,[]"

    def on_item(self, number: int, text: str) -> str:
        return self.written(self.objects[number][self.value(text)]) + ",[]"

    def on_put(self, number: int, key: str, text: str) -> str:
        self.objects[number][self.value(key)] = self.value(text)
        return "null,[]"

    def on_length(self, number: int) -> str:
        return self.written(len(self.objects[number])) + ",[]"

    def on_text(self, number: int) -> str:
        return self.written(str(self.objects[number])) + ",[]"

    def on_truth(self, number: int) -> str:
        return self.written(bool(self.objects[number])) + ",[]"

    def on_instance(self, number: int, name: str) -> str:
        return self.written(isinstance(self.objects[number], self.by_name(name))) + ",[]"

    def on_iterate(self, number: int) -> str:
        return self.written(iter(self.objects[number])) + ",[]"

    def on_more(self, number: int, count: int) -> str:
        items, ended = self.batch(self.objects[number], min(count, MOST))
        return self.written([items, ended]) + ",[]"

    # ---- values

    def by_name(self, name: str) -> Any:
        first, _, method = name.partition(".")
        if first not in self.names:
            if first in vars(builtins):
                return vars(builtins)[first]
            raise NameError(f"name {first!r} is not defined")
        found = self.names[first]
        return getattr(found() if isinstance(found, type) else found, method) if method else found

    def target(self, target: list[Any]) -> Callable[..., Any]:
        kind, which = target
        called: Callable[..., Any] = self.by_name(which) if kind == "name" else self.objects[which]
        return called

    def value(self, parts: Any) -> Any:
        return read(parts, self.theirs)

    def theirs(self, tag: str, parts: list[Any]) -> Any:
        """What the judge means by a tag that no plain value has."""
        if tag == "o":
            return self.objects[parts[0]]
        if tag == "n":
            return found_by_name(parts[0])
        if tag == "g":
            return iter([revive(part, self.theirs) for part in parts])
        if tag == "k":
            return self.callback(parts[0])
        raise Unreadable(f"the tag {tag}")

    def callback(self, number: int) -> Callable[..., Any]:
        if number not in self.given:

            def given(*arguments: Any, **keywords: Any) -> Any:
                token = self.token
                texts = [self.written(self.written(value)) for value in arguments]
                pairs = [f"[{self.written(name)},{self.written(self.written(v))}]" for name, v in keywords.items()]
                self.pipe.send(f'["{token}","calls",{number},[{",".join(texts)}],[{",".join(pairs)}]]')
                while True:
                    text = self.pipe.receive()
                    if text is None:
                        raise SystemExit
                    parts = parse(text)
                    if parts[1] in ("value", "raised"):
                        break
                    self.serve(text)
                self.token = token
                if parts[1] == "raised":
                    kind = getattr(builtins, parts[2], Exception)
                    raise kind(parts[3])
                return self.value(parts[2])

            self.given[number] = given
        return self.given[number]

    def written(self, value: Any) -> str:
        return Writer(LONGEST_ANSWER, self.mine).write(value)

    def mine(self, value: Any) -> str | None:
        """An object that stays here; the judge gets its number, and asks for what it wants of it. A number of numpy's
        is the plain one that it equals."""
        kind = type(value)
        if kind.__module__ == "numpy" and hasattr(kind, "item") and getattr(value, "shape", None) == ():
            return self.written(value.item())
        for number, given in self.given.items():
            if given is value:
                return f'["k",{number}]'
        number = self.numbers.setdefault(id(value), len(self.numbers))
        self.objects[number] = value
        if hasattr(type(value), "__next__"):
            return f'["g",{number}]'
        return f'["o",{number},{self.written(type(value).__name__)}]'

    def batch(self, iterator: Any, count: int) -> tuple[list[Any], Any]:
        """Some items, and whether that was all; an error that ended it as [class names, text]."""
        items = []
        try:
            for _ in range(count):
                items.append(next(iterator))
        except StopIteration:
            return items, True
        except Exception as error:
            return items, [[kind.__name__ for kind in type(error).__mro__][:20], _text(error)]
        return items, False


def _text(error: BaseException) -> str:
    try:
        return str(error)[:2000]
    except Exception:
        return ""


def main() -> None:
    pipe = private_pipe(LONGEST_ASKED)
    order = pipe.receive()
    assert order is not None, "an order comes first"
    server = Server(pipe)
    server.load(read(order))
    server.run()
