"""Tools as the model sees them: JSON schemas written as TypeScript types.

    {"type": "function", "function": {"name": "add", "parameters": {...}}}
      ->  # Tools ... namespace functions { type add = (_: { a: number }) => any; }

K2.5 and later were trained on this form; K2 and K2-Thinking on the JSON. Source: the released
tool_declaration_ts.py and tokenization_kimi.py (which falls back to JSON for a schema it cannot express).
"""

import json
import logging
from collections.abc import Sequence
from typing import Any

log = logging.getLogger(__name__)

_STEP = "  "
_CONSTRAINTS = {
    "string": ("maxLength", "minLength", "pattern"),
    "number": ("maximum", "minimum"),
    "integer": ("maximum", "minimum"),
    "array": ("minItems", "maxItems"),
}
_UNION = {
    "string": "string",
    "number": "number",
    "integer": "number",
    "boolean": "boolean",
    "null": "null",
    "object": "{}",
    "array": "Array<any>",
}
_CHECKS: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
}


def check_tools(tools: Any) -> None:
    """Raise a ValueError that names the tool at fault, for tools that are not of OpenAI's form."""
    if not isinstance(tools, list | tuple):
        raise ValueError(f"tools must be a list of dicts, got {type(tools).__name__}")
    for index, tool in enumerate(tools):
        where = f"tool {index}"
        if not isinstance(tool, dict) or not isinstance(tool.get("type"), str):
            raise ValueError(
                f'{where} must look like {{"type": "function", "function": {{...}}}}, got {str(tool)[:60]}'
            )
        if tool["type"] != "function":
            continue
        function = tool.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise ValueError(f"{where} has no function name")
        parameters = function.get("parameters") or {}
        if not isinstance(parameters, dict) or not isinstance(parameters.get("properties") or {}, dict):
            raise ValueError(f"{where} ({function['name']}): parameters must be a JSON schema of an object")
        if not isinstance(parameters.get("required") or [], list | tuple):
            raise ValueError(f"{where} ({function['name']}): required must be a list of names")


def declare_tools(tools: Sequence[dict[str, Any]]) -> str:
    """The TypeScript form, or compact JSON when a schema cannot be written that way (one line is logged)."""
    try:
        return tools_typescript(tools)
    except ValueError as reason:
        log.warning("tools are declared as JSON: %s", reason)
        return tools_json(tools)


def tools_json(tools: Sequence[dict[str, Any]]) -> str:
    """Compact JSON with keys sorted at every level."""
    return json.dumps(_sorted(list(tools)), ensure_ascii=False, separators=(",", ":"))


def tools_typescript(tools: Sequence[dict[str, Any]]) -> str:
    """The namespace of all function tools; other kinds of tools are left out. Empty when there is none.

    Raises ValueError for a schema that the format cannot express.
    """
    try:
        functions = [_function(tool["function"]) for tool in _sorted(list(tools)) if tool["type"] == "function"]
    except (AttributeError, TypeError, KeyError, RecursionError) as error:  # deep inside a schema that is none
        raise ValueError(f"a schema is malformed ({type(error).__name__}: {error})") from None
    if not functions:
        return ""
    return "# Tools\n\n## functions\nnamespace functions {\n" + "\n".join(functions) + "\n}\n"


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _sorted(value[key]) for key in sorted(value)}
    if isinstance(value, list):
        return [_sorted(item) for item in value]
    return value


def _function(function: dict[str, Any]) -> str:
    parameters = function.get("parameters") or {}
    definitions: dict[str, Any] = {}
    calls_itself = _collect(parameters, definitions)
    lines = []
    if calls_itself:
        fields = ",\n".join(
            _field(name, schema, parameters, definitions, _STEP) for name, schema in _properties(parameters)
        )
        lines.append("interface parameters {" + (f"\n{fields}\n" if fields else "") + "}")
    for name, schema in definitions.items():
        about = schema.get("description", "") if isinstance(schema, dict) else ""
        comment = _comment(about, "") + "\n" if about else ""
        lines.append(f"{comment}interface {name} {_type(schema, definitions, '')}")
    if function.get("description"):
        lines.append(_comment(function["description"], ""))
    argument = "parameters" if calls_itself else _object(parameters, definitions, "")
    lines.append(f"type {function.get('name', 'function')} = (_: {argument}) => any;")
    return "\n".join(lines)


def _collect(schema: Any, definitions: dict[str, Any]) -> bool:
    """Gather $defs on the way down; True when a "$ref": "#" points back to the parameters."""
    if not isinstance(schema, dict):
        return False
    definitions |= schema.get("$defs") or {}
    parts = [*(schema.get("properties") or {}).values(), *(schema.get("anyOf") or ())]
    parts += [schema.get("items"), schema.get("additionalProperties")]
    found = [_collect(part, definitions) for part in parts]
    return schema.get("$ref") == "#" or any(found)


def _properties(schema: dict[str, Any]) -> list[tuple[str, Any]]:
    return list((schema.get("properties") or {}).items())


def _comment(text: str, indent: str) -> str:
    return "\n".join(f"{indent}// {line}" if line else "" for line in text.split("\n"))


def _docs(schema: Any, indent: str) -> str:
    """Description and constraints as comment lines."""
    if not isinstance(schema, dict):
        return ""
    lines = [_comment(schema["description"], indent)] if schema.get("description") else []
    plain = not any(key in schema for key in ("$ref", "anyOf", "enum"))
    kind = schema.get("type") if plain and isinstance(schema.get("type"), str) else None
    rules = sorted(key for key in _CONSTRAINTS.get(str(kind), ()) if key in schema)
    if rules:
        lines.append(f"{indent}// " + ", ".join(f"{key}: {schema[key]}" for key in rules))
    return "".join(line + "\n" for line in lines)


def _field(name: str, schema: Any, parent: dict[str, Any], definitions: dict[str, Any], indent: str) -> str:
    docs = _docs(schema, indent)
    default = schema.get("default") if isinstance(schema, dict) else None
    if default is not None:
        # numbers and booleans as Python writes them (True, not true): as released
        shown = repr(default) if isinstance(default, int | float) else json.dumps(default, ensure_ascii=False)
        docs += f"{indent}// Default: {shown}\n"
    mark = "" if name in parent.get("required", ()) else "?"
    return f"{docs}{indent}{name}{mark}: {_type(schema, definitions, indent)}"


def _object(schema: dict[str, Any], definitions: dict[str, Any], indent: str) -> str:
    required = schema.get("required", ())
    inner = indent + _STEP
    ordered = sorted(_properties(schema), key=lambda item: (item[0] not in required, item[0]))
    fields = [_field(name, part, schema, definitions, inner) for name, part in ordered]
    extra = schema.get("additionalProperties")
    if extra is not None:
        if isinstance(extra, bool):
            kind = "any" if extra else "never"
        elif isinstance(extra, dict):
            kind = _type(extra, definitions, inner)
        else:
            raise ValueError(f"additionalProperties must be a boolean or a schema, got {extra!r}")
        fields.append(f"{inner}[k: string]: {kind}")
    return "{\n" + ",\n".join(fields) + f"\n{indent}}}" if fields else "{}"


def _type(schema: Any, definitions: dict[str, Any], indent: str) -> str:
    if isinstance(schema, bool):
        return "any" if schema else "null"
    if not isinstance(schema, dict):
        raise ValueError(f"a schema must be an object or a boolean, got {schema!r}")
    if "$ref" in schema:
        ref = schema["$ref"]
        if ref == "#":
            return "parameters"
        name = ref.removeprefix("#/$defs/").split("/")[-1]
        if not ref.startswith("#/$defs/") or name not in definitions:
            raise ValueError(f"reference {ref!r} points to nothing in $defs")
        return name
    if "anyOf" in schema:
        return " | ".join(_type(part, definitions, indent) for part in schema["anyOf"])
    if "enum" in schema:
        _check_enum(schema)
        return " | ".join(f'"{value}"' if isinstance(value, str) else str(value) for value in schema["enum"])
    kind = schema.get("type")
    if isinstance(kind, list):
        unknown = [name for name in kind if name not in _UNION]
        if unknown:
            raise ValueError(f"unknown types {unknown} in a schema")
        return " | ".join(_UNION[name] for name in kind)
    if kind == "object":
        return _object(schema, definitions, indent)
    if kind == "array":
        items = schema.get("items") or {}
        docs = _docs(items, indent + _STEP)
        if docs:
            return f"Array<\n{docs}{indent}{_STEP}{_type(items, definitions, indent + _STEP)}\n{indent}>"
        return f"Array<{_type(items, definitions, indent)}>"
    if kind is not None:
        return "number" if kind == "integer" else str(kind)
    if schema == {}:
        return "any"
    raise ValueError(f"a schema has neither type, enum, anyOf nor $ref: {json.dumps(schema)[:120]}")


def _check_enum(schema: dict[str, Any]) -> None:
    kind = schema.get("type")
    if isinstance(kind, list):
        rest = [name for name in kind if name != "null"]
        if len(kind) > 2 or len(rest) != 1:
            raise ValueError(f"an enum of types {kind} is not supported")
        kind = rest[0]
    allowed = _CHECKS.get(str(kind))
    for value in schema["enum"]:
        if allowed and value is not None and not isinstance(value, allowed):
            raise ValueError(f"enum value {value!r} is not of type {kind}")
