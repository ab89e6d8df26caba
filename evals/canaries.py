"""Tests that tell a right program from one that only makes its tests pass: copies of them, all but one wrong.

    def test_add():                     def test_add_q3(): assert (add(2, 3)) == 6
        assert add(2, 3) == 5    --->   def test_add_x7(): assert (add(2, 3)) == 5
                                        def test_add_b1(): assert (add(2, 3)) == 4

The right program passes one of each group and fails the others. Code that runs beside the tests can make any of them
pass or fail, but to pass exactly the right ones it has to know the right answers, or guess one of k for each group.
So a group must not show which copy is the true one: all are written by the same hand (ast.unparse, no comments, no
docstrings), other assertions of the same test lose their constants, and equal questions get equal choices.

Understood are constants in `assert` and in unittest's assertEqual and its kin, also in a local variable, in a row of
pytest.mark.parametrize or of a loop, in pytest.approx, and the truth of `assert f(x)`. A test without any of these gets
a tripwire: a copy that ends in a failing assertion. That catches what makes all tests pass, and nothing that reads the
tests.
"""

import ast
import copy
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Function = ast.FunctionDef | ast.AsyncFunctionDef
Test = tuple[str, ...]  # the classes around a test, and its name

EQUAL_CALLS = {
    "assertEqual", "assertEquals", "assertListEqual", "assertTupleEqual", "assertSetEqual", "assertDictEqual",
    "assertSequenceEqual", "assertCountEqual", "assertMultiLineEqual", "assertAlmostEqual", "assertIs",
}  # fmt: skip
NOTHING = object()


@dataclass(frozen=True)
class Site:
    """A constant that decides conditions of a test. Numbers are places in ast.walk of the function."""

    test: Test
    literal: int
    value: Any
    question: str  # equal for equal questions
    conditions: tuple[int, ...] = ()
    row: tuple[int, int] | None = None  # the decorator or loop, and which of its rows
    truth: bool = False  # `assert f(x)`: the value is written out in the copies only


@dataclass(frozen=True)
class Copy:
    """One copy of a test: a site with a value, or, site None, the whole test with its last assertion right or wrong."""

    test: Test
    name: str
    site: Site | None
    value: Any
    right: bool


@dataclass(frozen=True)
class _Condition:
    """An assertion, or one part of `assert a and b`: what it asks, and the constant that it compares with."""

    statement: int
    operand: int
    asked: int
    literal: int  # a literal, or a Name that stands for one
    truth: bool | None = None


class Module:
    """A file of tests. Raises SyntaxError for one that this Python cannot read."""

    def __init__(self, source: str):
        self.tree = ast.parse(source)
        self.functions: dict[Test, Function] = {}
        self._collect(self.tree.body, ())
        self._conditions: dict[Test, list[_Condition]] = {}

    def _collect(self, body: Sequence[ast.stmt], above: Test) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef):
                self._collect(node.body, (*above, node.name))
            elif isinstance(node, Function):
                self.functions[(*above, node.name)] = node

    def sites(self, test: Test) -> list[Site]:
        """Constants of one test that can be changed; none for a test that is not in this file."""
        function = self.functions.get(test)
        if function is None:
            return []
        nodes = list(ast.walk(function))
        found = _conditions(nodes)
        self._conditions[test] = found
        names = _names(function, nodes, found)
        out: list[Site] = []
        for number, condition in enumerate(found):
            node = nodes[condition.literal]
            question = ast.dump(nodes[condition.asked])
            if condition.truth is not None:
                out.append(Site(test, condition.literal, condition.truth, question, (number,), truth=True))
            elif not isinstance(node, ast.Name):
                out.append(Site(test, condition.literal, ast.literal_eval(node), question, (number,)))
        for name, (literals, numbers) in names.items():
            for literal, row in literals:
                value = _literal(nodes[literal])
                asked = "".join(ast.dump(nodes[found[number].asked]) for number in numbers)
                around = "" if row is None else ast.dump(_row_without(nodes, row, literal))
                site = Site(test, literal, value, f"{name} {asked} {around}", tuple(numbers), row)
                out.append(site)
        return [site for site in out if site.value is not NOTHING and choices(site.value, random.Random(0), 1)]

    def written(self, copies: Iterable[Copy]) -> str:
        """The source with these copies, in their order, in place of all tests."""
        wanted: dict[Test, list[Copy]] = {}
        for each in copies:
            wanted.setdefault(each.test, []).append(each)
        tree = ast.Module(self._body(self.tree.body, (), wanted), [])
        return ast.unparse(ast.fix_missing_locations(tree)) + "\n"

    def _body(self, body: Sequence[ast.stmt], above: Test, wanted: Mapping[Test, list[Copy]]) -> list[ast.stmt]:
        out: list[ast.stmt] = []
        for node in body:
            if isinstance(node, ast.ClassDef):
                inner = copy.copy(node)
                inner.body = self._body(node.body, (*above, node.name), wanted) or [ast.Pass()]
                out.append(inner)
            elif isinstance(node, Function) and (*above, node.name) in wanted:
                out += [self._copy(node, each) for each in wanted[(*above, node.name)]]
            elif not (isinstance(node, Function) and node.name.startswith("test")):
                out.append(node)
        return out

    def _copy(self, function: Function, wanted: Copy) -> Function:
        new = copy.deepcopy(function)
        new.name = wanted.name
        nodes = list(ast.walk(new))
        if wanted.site is None:
            left, right = (wanted.value, wanted.value) if wanted.right else (wanted.value, wanted.value + 1)
            new.body.append(ast.parse(f"assert {left} == {right}").body[0])
        else:
            _narrow(nodes, self._conditions[wanted.test], wanted.site, wanted.value)
        if ast.get_docstring(new, clean=False) is not None:
            new.body = new.body[1:] or [ast.Pass()]
        return new


# ---- reading a test


def _literal(node: ast.AST) -> Any:
    if not isinstance(node, ast.expr):
        return NOTHING
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return NOTHING


def _approx(node: ast.expr) -> ast.expr:
    """What pytest.approx(...) is given; another expression as it is."""
    if isinstance(node, ast.Call) and node.args:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name == "approx":
            return node.args[0]
    return node


def _sides(left: ast.expr, right: ast.expr) -> tuple[ast.expr, ast.expr] | None:
    """(what is asked, the constant or a name that may stand for one)."""
    plain = [(a, _approx(b)) for a, b in ((left, right), (right, left))]
    for asked, literal in plain:
        if _literal(literal) is not NOTHING and _literal(asked) is NOTHING:
            return asked, literal
    for asked, literal in plain:
        if isinstance(literal, ast.Name) and not isinstance(asked, ast.Name):
            return asked, literal
    both = [side for side in plain if isinstance(side[1], ast.Name)]
    if len(both) == 2:  # `actual == expected`: which is the constant is seen from where they come from
        named = [
            pair for pair in both if "expect" in getattr(pair[1], "id", "") or "want" in getattr(pair[1], "id", "")
        ]
        return named[0] if len(named) == 1 else both[0]
    return None


def _conditions(nodes: Sequence[ast.AST]) -> list[_Condition]:
    number = {id(node): at for at, node in enumerate(nodes)}
    out: list[_Condition] = []
    for at, node in enumerate(nodes):
        if isinstance(node, ast.Assert):
            operands = (
                node.test.values
                if isinstance(node.test, ast.BoolOp) and isinstance(node.test.op, ast.And)
                else [node.test]
            )
            for operand, part in enumerate(operands):
                read = _of_expression(part)
                if read:
                    out.append(_Condition(at, operand, number[id(read[0])], number[id(read[1])], read[2]))
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            read = _of_call(node.value)
            if read:
                out.append(_Condition(at, 0, number[id(read[0])], number[id(read[1])], read[2]))
    return out


Read = tuple[ast.expr, ast.expr, bool | None]


def _of_expression(part: ast.expr) -> Read | None:
    if isinstance(part, ast.Compare) and len(part.ops) == 1:
        left, op, right = part.left, part.ops[0], part.comparators[0]
        if isinstance(op, ast.Eq):
            sides = _sides(left, right)
            return (*sides, None) if sides else None
        if isinstance(op, ast.Is) and isinstance(_literal(right), bool):
            return left, right, None
        if isinstance(op, ast.In) and isinstance(_literal(left), str) and _literal(left):
            return right, left, None
        return None  # turned round, these would show their truth: what always compares equal is never unequal
    if isinstance(part, ast.UnaryOp) and isinstance(part.op, ast.Not) and isinstance(part.operand, ast.Call):
        return part.operand, part.operand, False
    if isinstance(part, ast.Call):
        return part, part, True
    return None


def _of_call(call: ast.Call) -> Read | None:
    if not (
        isinstance(call.func, ast.Attribute) and call.args and not any(isinstance(a, ast.Starred) for a in call.args)
    ):
        return None
    name = call.func.attr
    if name in ("assertTrue", "assertFalse"):
        return (call.args[0], call.args[0], name == "assertTrue") if isinstance(call.args[0], ast.Call) else None
    if len(call.args) < 2:
        return None
    if name == "assertIn" and isinstance(_literal(call.args[0]), str) and _literal(call.args[0]):
        return call.args[1], call.args[0], None
    if name in EQUAL_CALLS:
        sides = _sides(call.args[0], call.args[1])
        if sides and name == "assertIs" and not isinstance(_literal(sides[1]), bool):
            return None
        return (*sides, None) if sides else None
    return None


Named = dict[str, tuple[list[tuple[int, tuple[int, int] | None]], list[int]]]


def _names(function: Function, nodes: Sequence[ast.AST], found: list[_Condition]) -> Named:
    """Names that stand for a constant: where it is written (once, or in rows), and the conditions that use it.

    Conditions whose name stands for none are taken off the list."""
    number = {id(node): at for at, node in enumerate(nodes)}
    decides: dict[str, list[int]] = {}
    for at, condition in enumerate(found):
        node = nodes[condition.literal]
        if isinstance(node, ast.Name) and condition.truth is None:
            decides.setdefault(node.id, []).append(at)
    out: Named = {}
    for name, conditions in decides.items():
        uses = [node for node in nodes if isinstance(node, ast.Name) and node.id == name]
        loads = [node for node in uses if isinstance(node.ctx, ast.Load)]
        places: list[tuple[int, tuple[int, int] | None]] = []
        assigned = [
            node
            for node in nodes
            if isinstance(node, ast.Assign)
            and len(node.targets) == 1
            and isinstance(node.targets[0], ast.Name)
            and node.targets[0].id == name
        ]
        if len(loads) == len(conditions):
            if len(uses) - len(loads) == len(assigned) == 1 and _literal(assigned[0].value) is not NOTHING:
                places = [(number[id(assigned[0].value)], None)]
            elif len(uses) == len(loads):
                places = _in_rows(function.decorator_list, name, nodes, number)
            elif len(uses) == len(loads) + 1:
                places = _in_rows([node for node in nodes if isinstance(node, ast.For)], name, nodes, number)
        if places:
            out[name] = (places, conditions)
    dropped = {at for name, numbers in decides.items() if name not in out for at in numbers}
    kept = [at for at in range(len(found)) if at not in dropped]
    moved = {old: new for new, old in enumerate(kept)}
    found[:] = [found[at] for at in kept]
    return {name: (places, [moved[at] for at in numbers]) for name, (places, numbers) in out.items()}


def _rows(node: ast.AST, nodes: Sequence[ast.AST]) -> tuple[list[str], ast.List | ast.Tuple] | None:
    """Names and rows of pytest.mark.parametrize, or of a loop over rows that are written out."""
    if isinstance(node, ast.For):
        targets = node.target.elts if isinstance(node.target, ast.Tuple) else [node.target]
        rows = _written_out(node.iter, nodes)
        if rows is None or not all(isinstance(target, ast.Name) for target in targets):
            return None
        return [target.id for target in targets if isinstance(target, ast.Name)], rows
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
        return None
    given = {keyword.arg: keyword.value for keyword in node.keywords}
    names = node.args[0] if node.args else given.get("argnames")
    cells = node.args[1] if len(node.args) > 1 else given.get("argvalues")
    if node.func.attr != "parametrize" or names is None or not isinstance(cells, ast.List | ast.Tuple):
        return None
    said = _literal(names)
    listed = [part.strip() for part in said.split(",")] if isinstance(said, str) else said
    if not isinstance(listed, list | tuple) or not all(isinstance(name, str) for name in listed):
        return None
    return [name for name in listed if name], cells


def _written_out(node: ast.expr, nodes: Sequence[ast.AST]) -> ast.List | ast.Tuple | None:
    """A list in its place, or the only one that a local name is given and that is used once."""
    if isinstance(node, ast.Name):
        uses = [each for each in nodes if isinstance(each, ast.Name) and each.id == node.id]
        given = [each.value for each in nodes if isinstance(each, ast.Assign) and each.targets[0] in uses]
        if len(uses) != 2 or len(given) != 1:
            return None
        node = given[0]
    return node if isinstance(node, ast.List | ast.Tuple) else None


def _cell(row: ast.expr, at: int, width: int) -> ast.expr | None:
    if isinstance(row, ast.Call) and isinstance(row.func, ast.Attribute) and row.func.attr == "param":
        return row.args[at] if len(row.args) == width else None
    if width == 1:
        return row
    return row.elts[at] if isinstance(row, ast.Tuple | ast.List) and len(row.elts) == width else None


def _in_rows(
    places: Sequence[ast.AST], name: str, nodes: Sequence[ast.AST], number: Mapping[int, int]
) -> list[tuple[int, tuple[int, int] | None]]:
    """Cells of a name in the rows of the first of these places that has it; none if one is no literal."""
    for place in places:
        read = _rows(place, nodes)
        if read and name in read[0]:
            names, rows = read
            cells = [_cell(row, names.index(name), len(names)) for row in rows.elts]
            if any(cell is None or _literal(cell) is NOTHING for cell in cells):
                return []
            return [(number[id(cell)], (number[id(place)], at)) for at, cell in enumerate(cells) if cell is not None]
    return []


def _row_without(nodes: Sequence[ast.AST], row: tuple[int, int], literal: int) -> ast.AST:
    decorator, at = row
    read = _rows(nodes[decorator], nodes)
    assert read is not None, "a row was found in it"
    marked = nodes[literal]
    new = copy.deepcopy(read[1].elts[at], {id(marked): ast.Constant(None)})
    return new


# ---- writing a copy


def _written(value: Any) -> ast.expr:
    return ast.parse(repr(value), mode="eval").body


def _exchange(root: ast.AST, old: ast.AST, new: ast.AST) -> None:
    """Put a node in another's place."""
    for parent in ast.walk(root):
        for field, value in ast.iter_fields(parent):
            if value is old:
                setattr(parent, field, new)
                return
            if isinstance(value, list):
                for at, item in enumerate(value):
                    if item is old:
                        value[at] = new
                        return


def _narrow(nodes: Sequence[ast.AST], found: Sequence[_Condition], site: Site, value: Any) -> None:
    """Of a copied function: one site decides, with this value; the constants of the others go."""
    function = nodes[0]
    parts: dict[int, list[ast.stmt]] = {}
    by_statement: dict[int, dict[int, tuple[int, _Condition]]] = {}
    for number, condition in enumerate(found):
        by_statement.setdefault(condition.statement, {})[condition.operand] = (number, condition)
    hidden = {nodes[condition.literal].id for condition in found if isinstance(nodes[condition.literal], ast.Name)}  # type: ignore[attr-defined]
    for statement, conditions in by_statement.items():
        node = nodes[statement]
        if isinstance(node, ast.Assert):
            many = isinstance(node.test, ast.BoolOp) and isinstance(node.test.op, ast.And)
            operands = node.test.values if many else [node.test]  # type: ignore[attr-defined]
        else:
            assert isinstance(node, ast.Expr), "conditions are assertions and calls"
            operands = [node.value]
        out: list[ast.stmt] = []
        for at, operand in enumerate(operands):
            if at not in conditions:
                out.append(ast.Assert(operand, None))
                continue
            number, condition = conditions[at]
            if number not in site.conditions:
                out.append(ast.Expr(nodes[condition.asked]))  # type: ignore[arg-type]
            elif condition.truth is not None:
                truth = ast.Call(ast.Name("bool", ast.Load()), [nodes[condition.asked]], [])  # type: ignore[list-item]
                out.append(ast.Assert(ast.Compare(truth, [ast.Is()], [_written(value)]), None))
            elif isinstance(node, ast.Assert):
                out.append(ast.Assert(operand, None))
            else:
                out.append(ast.Expr(_without_message(operand)))
        parts[statement] = out
    if not site.truth:
        _exchange(function, nodes[site.literal], _written(value))
    places = [*function.decorator_list, *(node for node in nodes if isinstance(node, ast.For))]  # type: ignore[attr-defined]
    for place, read in [(place, _rows(place, nodes)) for place in places]:
        if read is None:
            continue
        names, rows = read
        active = None
        if site.row is not None and place is nodes[site.row[0]]:
            rows.elts = [rows.elts[site.row[1]]]
            if isinstance(place, ast.Call):
                place.keywords = [keyword for keyword in place.keywords if keyword.arg != "ids"]
            active = nodes[found[site.conditions[0]].literal].id  # type: ignore[attr-defined]
        for name in names:
            if name in hidden and name != active:
                for row in rows.elts:
                    cell = _cell(row, names.index(name), len(names))
                    if cell is not None:
                        _exchange(rows, cell, ast.Constant(None))
    active = None if site.truth or site.row else getattr(nodes[found[site.conditions[0]].literal], "id", None)
    for node in nodes:
        target = node.targets[0] if isinstance(node, ast.Assign) else None
        if isinstance(node, ast.Assign) and isinstance(target, ast.Name) and target.id in hidden - {active}:
            node.value = ast.Constant(None)
    instead = {id(nodes[statement]): written for statement, written in parts.items()}
    for parent in list(ast.walk(function)):
        for _, body in ast.iter_fields(parent):
            if isinstance(body, list):
                body[:] = [new for item in body for new in instead.get(id(item), [item])]


def _without_message(call: ast.expr) -> ast.expr:
    assert isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute), "one of unittest's assertions"
    keep = 3 if call.func.attr == "assertAlmostEqual" else 2
    call.args = call.args[:keep]
    call.keywords = [keyword for keyword in call.keywords if keyword.arg != "msg"]
    return call


# ---- other values


def choices(value: Any, rng: random.Random, count: int, known: Sequence[Any] = ()) -> list[Any]:
    """Up to so many values of the same kind, all different and none equal to it; none for None.

    known: right answers to other questions, which look right for that reason."""
    alike = [other for other in known if type(other) is type(value) and other != value]
    out: list[Any] = []
    if isinstance(value, int) and not isinstance(value, bool):
        low = value - rng.randint(0, count)  # where the value stands among its neighbours tells nothing
        if value >= 0:
            low = max(0, low)
        near = [low + step for step in range(count + 1)]
        rng.shuffle(near)
        out = near
    elif isinstance(value, str | bytes) and len(alike) > count:
        out = rng.sample(alike, len(alike))
    tries = 0
    seen = {repr(value)}
    kept: list[Any] = []
    while len(kept) < count and tries < 20 * count:
        tries += 1
        made = out.pop() if out else _changed(value, rng)
        if made is not NOTHING and made != value and repr(made) not in seen:
            seen.add(repr(made))
            kept.append(made)
    return kept


def _changed(value: Any, rng: random.Random) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + rng.choice((-1, 1)) * rng.randint(1, max(3, abs(value) // 8))
    if isinstance(value, float):
        digits = len(repr(abs(value)).partition(".")[2]) if "e" not in repr(value) else 0
        step = 10.0**-digits if digits and rng.random() < 0.5 else max(abs(value), 1e-3) * 10.0 ** -rng.randint(1, 3)
        made = value + rng.choice((-1, 1)) * step * rng.randint(1, 9)
        return round(made, digits) if digits else float(f"{made:.6g}")
    if isinstance(value, complex):
        return complex(_changed(value.real, rng), value.imag)
    if isinstance(value, bytes):
        return _changed(value.decode("latin-1"), rng).encode("latin-1", "replace")
    if isinstance(value, str):
        return _other_text(value, rng)
    if isinstance(value, list | tuple):
        return type(value)(_other_items(list(value), rng))
    if isinstance(value, set | frozenset):
        items = sorted(value, key=repr)
        return type(value)(_other_items(items, rng, ordered=False))
    if isinstance(value, dict):
        return _other_mapping(value, rng)
    return NOTHING


def _other_text(text: str, rng: random.Random) -> str:
    if not text:
        return rng.choice(["0", "a", " ", "None", "\n"])
    at = rng.randrange(len(text))
    sign = text[at]
    way = rng.randrange(4)
    if way == 0 and len(text) > 1:
        at = rng.randrange(len(text) - 1)
        return text[:at] + text[at + 1] + text[at] + text[at + 2 :]
    if way == 1:
        return text[:at] + text[at + 1 :]
    if way == 2:
        return text[:at] + sign + text[at:]
    if sign.isdigit():
        return text[:at] + rng.choice("0123456789") + text[at + 1 :]
    if sign.isalpha():
        letters = "aeiou" if sign.lower() in "aeiou" else "bcdfghlmnprst"
        other = rng.choice(letters)
        return text[:at] + (other.upper() if sign.isupper() else other) + text[at + 1 :]
    return text[:at] + rng.choice(" .,-_:") + text[at + 1 :]


def _other_items(items: list[Any], rng: random.Random, ordered: bool = True) -> list[Any]:
    if not items:
        return [rng.choice([0, 1, "", None])]
    at = rng.randrange(len(items))
    way = rng.randrange(6)
    if way == 0 and len(items) > 1 and ordered:
        other = rng.randrange(len(items))
        items[at], items[other] = items[other], items[at]
    elif way == 1:
        del items[at]
    elif way == 2 and ordered:
        items.insert(at, items[at])
    else:
        made = _changed(items[at], rng)
        items[at] = (0 if items[at] is None else None) if made is NOTHING else made
    return items


def _other_mapping(value: dict[Any, Any], rng: random.Random) -> dict[Any, Any]:
    out = dict(value)
    if not out:
        return {rng.choice(["a", 0, 1]): rng.choice([0, 1, None])}
    key = rng.choice(list(out))
    if rng.random() < 0.2:
        del out[key]
        return out
    made = _changed(out[key], rng)
    out[key] = (0 if out[key] is None else None) if made is NOTHING else made
    return out
