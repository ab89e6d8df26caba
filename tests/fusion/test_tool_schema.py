"""Tools as TypeScript: the released encoder's spelling, and JSON where it has none.

pytest tests/fusion/test_tool_schema.py
"""

import json
from typing import Any

import pytest

from fusion.tool_schema import check_tools, declare_tools, tools_json, tools_typescript


def tool(parameters: Any, name: str = "f", description: str | None = None) -> dict[str, Any]:
    function = {"name": name, "parameters": parameters} | ({"description": description} if description else {})
    return {"type": "function", "function": function}


def argument(parameters: dict[str, Any]) -> str:
    """What stands between (_: and ) => any."""
    out = tools_typescript([tool({"type": "object"} | parameters)])
    return out.split("(_: ", 1)[1].rsplit(") => any;", 1)[0]


def field(schema: Any) -> str:
    return argument({"properties": {"x": schema}, "required": ["x"]}).removeprefix("{\n  ").removesuffix("\n}")


def test_whole_declaration() -> None:
    weather = tool(
        {
            "type": "object",
            "properties": {
                "unit": {"type": "string", "enum": ["c", "f"], "default": "c"},
                "place": {"type": "string", "description": "City.\n\nOr village.", "minLength": 1, "maxLength": 9},
                "days": {"type": "integer", "minimum": 1, "default": 3},
            },
            "required": ["place"],
        },
        "get_weather",
        "Tells the weather.\nSlowly.",
    )
    assert tools_typescript([weather, tool({}, "nothing")]) == (
        "# Tools\n\n## functions\nnamespace functions {\n"
        "// Tells the weather.\n// Slowly.\n"
        "type get_weather = (_: {\n"
        "  // City.\n\n  // Or village.\n  // maxLength: 9, minLength: 1\n  place: string,\n"
        "  // minimum: 1\n  // Default: 3\n  days?: number,\n"
        '  // Default: "c"\n  unit?: "c" | "f"\n'
        "}) => any;\n"
        "type nothing = (_: {}) => any;\n}\n"
    )


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"type": "string"}, "x: string"),
        ({"type": "integer"}, "x: number"),
        ({"type": "number"}, "x: number"),
        ({"type": "boolean", "default": True}, "// Default: True\n  x: boolean"),
        ({"type": "null"}, "x: null"),
        ({}, "x: any"),
        (True, "x: any"),
        (False, "x: null"),
        ({"type": ["string", "null"]}, "x: string | null"),
        ({"type": ["object", "array", "integer"]}, "x: {} | Array<any> | number"),
        ({"enum": ["a", 1, None]}, 'x: "a" | 1 | None'),
        ({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "integer"}}]}, "x: string | Array<number>"),
        ({"type": "array"}, "x: Array<any>"),
        ({"type": "array", "minItems": 2}, "// minItems: 2\n  x: Array<any>"),
        (
            {"type": "array", "items": {"type": "string", "description": "one"}},
            "x: Array<\n    // one\n    string\n  >",
        ),
        ({"type": "object", "properties": {"b": {}, "a": {}}}, "x: {\n    a?: any,\n    b?: any\n  }"),
        ({"type": "object", "additionalProperties": True}, "x: {\n    [k: string]: any\n  }"),
        ({"type": "object", "additionalProperties": False}, "x: {\n    [k: string]: never\n  }"),
        ({"type": "object", "additionalProperties": {"type": "integer"}}, "x: {\n    [k: string]: number\n  }"),
    ],
)
def test_types(schema: Any, expected: str) -> None:
    assert field(schema) == expected


def test_references_become_interfaces() -> None:
    tree = {
        "type": "object",
        "properties": {"root": {"$ref": "#/$defs/Node"}},
        "$defs": {"Node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/Node"}}, "description": "One."}},
    }
    out = tools_typescript([tool(tree)])
    assert "// One.\ninterface Node {\n  next?: Node\n}\n" in out and "root?: Node" in out
    own = {"type": "object", "properties": {"child": {"$ref": "#"}}}
    out = tools_typescript([tool(own)])
    assert "interface parameters {\n  child?: parameters\n}" in out and "(_: parameters) => any;" in out


@pytest.mark.parametrize(
    "schema",
    [
        {"title": "no type at all"},
        {"$ref": "#/$defs/Gone"},
        {"type": ["thing"]},
        {"type": "integer", "enum": ["a"]},
        {"type": "array", "items": 5},
        {"type": "object", "additionalProperties": 5},
    ],
)
def test_what_typescript_cannot_say_is_declared_as_json(schema: Any, caplog: pytest.LogCaptureFixture) -> None:
    tools = [tool({"type": "object", "properties": {"x": schema}})]
    with pytest.raises(ValueError):
        tools_typescript(tools)
    assert json.loads(declare_tools(tools)) == tools
    assert "declared as JSON" in caplog.text


def test_json_is_compact_and_sorted_at_every_level() -> None:
    assert tools_json([{"b": {"d": 1, "c": ["é", {"z": 1, "a": 2}]}, "a": 0}]) == (
        '[{"a":0,"b":{"c":["é",{"a":2,"z":1}],"d":1}}]'
    )


def test_other_kinds_of_tools_are_left_out() -> None:
    assert tools_typescript([{"type": "builtin_function", "function": {"name": "$web_search"}}]) == ""


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    "schema", [{"type": "object", "properties": [1]}, {"anyOf": 5}, {"enum": 5}, {"type": 5}, {"$ref": 5}, deep(90)]
)
def test_malformed_schemas_deep_inside_fall_back_to_json_or_are_written(schema: Any) -> None:
    assert declare_tools([tool({"type": "object", "properties": {"x": {"type": "array", "items": schema}}})])


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ("x", "must be a list of dicts, got str"),
        ({"a": 1}, "must be a list of dicts, got dict"),
        ([5], "tool 0 must look like"),
        ([{}], "tool 0 must look like"),
        ([tool({}), {"type": "function"}], "tool 1 has no function name"),
        ([{"type": "function", "function": {"name": 5}}], "tool 0 has no function name"),
        ([tool(5)], r"tool 0 \(f\): parameters must be"),
        ([tool({"properties": [1]})], "parameters must be"),
        ([tool({"required": 5})], "required must be a list"),
    ],
)
def test_tools_of_another_form_are_refused(tools: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_tools(tools)
