"""Which JSON schemas bind a completion in full.

The compiler takes some keywords without enforcing them, alone or beside others. Here such schemas
are refused, so that whatever comes out of a schema that was taken also fits it.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

MAX_DEPTH = 64  # of the schema's own JSON

_NUMBER = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
_STRING = {"minLength", "maxLength", "pattern"}
_ARRAY = {"minItems", "maxItems", "prefixItems"}
_OBJECT = {"patternProperties", "propertyNames", "maxProperties"}
_NEED_A_TYPE = _NUMBER | _STRING | _ARRAY | _OBJECT
_KINDS = ("$ref", "anyOf", "oneOf", "allOf", "enum", "const")
_ENFORCED = _NEED_A_TYPE | {
    *_KINDS,
    "type",
    "items",
    "properties",
    "required",
    "additionalProperties",
}
_IGNORED = {
    "not", "if", "then", "else", "multipleOf", "contains", "minContains", "maxContains",
    "dependentRequired", "dependentSchemas", "dependencies", "unevaluatedItems",
    "unevaluatedProperties", "minProperties", "$dynamicRef", "$recursiveRef",
}  # fmt: skip

# In a pattern the compiler takes these to the letter, though JSON must escape them.
_UNESCAPED = re.compile(r'["\x00-\x1f]|\\[\\"nrtfv0c]|\\x[01]|\\u00[01]|\\u\{')


def check_schema(text: str) -> None:
    """Raises ValueError with what is wrong, and where, as a JSON pointer.

    Runs regular expressions of the schema's author: only where that may be killed.
    """
    try:
        schema = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"is no JSON: {error}") from None
    if not isinstance(schema, dict):
        raise ValueError("must be a JSON object")
    if _depth(schema) > MAX_DEPTH:
        raise ValueError(f"is nested more than {MAX_DEPTH} levels deep")
    _check(schema, "#")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _depth(value: object) -> int:
    """Levels of nesting, without recursion: the parser bounds it, the stack must not."""
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return depth


def _check(schema: object, where: str) -> None:
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise ValueError(f"{where} is neither an object nor a boolean")
    for keyword in sorted(_IGNORED & schema.keys()):
        raise ValueError(f"{where}/{keyword} is not supported")
    if schema.get("uniqueItems"):
        raise ValueError(f"{where}/uniqueItems is not supported")
    _check_company(schema, where)
    _check_values(schema, where)
    _check_object(schema, where)
    if "pattern" in schema:
        _check_pattern(schema["pattern"], f"{where}/pattern")
    for inner, place in _inner(schema, where):
        _check(inner, place)


def _check_company(schema: dict[str, Any], where: str) -> None:
    """Of `$ref`, `anyOf` and kin only one counts, and what stands beside it does not."""
    kind = next((keyword for keyword in _KINDS if keyword in schema), None)
    if kind is not None:
        others = (_ENFORCED & schema.keys()) - {kind}
        if kind in {"enum", "const"}:
            others -= {"type"}
        for other in sorted(others):
            raise ValueError(f"{where}/{other} is not supported beside {kind}")
    elif "type" not in schema:
        for keyword in sorted(_NEED_A_TYPE & schema.keys()):
            raise ValueError(f"{where}/{keyword} is not supported without a type")


def _check_values(schema: dict[str, Any], where: str) -> None:
    if "type" not in schema:
        return
    types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    for keyword, values in (("enum", schema.get("enum", [])), ("const", [schema.get("const")])):
        if keyword not in schema:
            continue
        if not isinstance(values, list):
            raise ValueError(f"{where}/{keyword} is no list")
        for value in values:
            if not any(_is_of(value, name) for name in types):
                raise ValueError(f"{where}/{keyword} holds a value that is not of its type")


def _is_of(value: object, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    if isinstance(value, int):
        return name in {"integer", "number"}
    if isinstance(value, float):
        return name == "number" or (name == "integer" and value.is_integer())
    kinds: dict[str, type] = {"string": str, "array": list, "object": dict, "null": type(None)}
    return name in kinds and isinstance(value, kinds[name])


def _check_object(schema: dict[str, Any], where: str) -> None:
    named = schema.get("properties", {})
    patterns = schema.get("patternProperties", {})
    if not isinstance(named, dict) or not isinstance(patterns, dict):
        raise ValueError(f"{where}: properties and patternProperties must be objects")
    required = schema.get("required", [])
    if not isinstance(required, list):
        raise ValueError(f"{where}/required is no list")
    for name in required:
        if name not in named:
            raise ValueError(f"{where}/required names {name!r}, which is not in properties")
    if len(patterns) > 1:
        raise ValueError(f"{where}/patternProperties is supported with one pattern")
    if "propertyNames" in schema and (named or patterns):
        raise ValueError(f"{where}/propertyNames is not supported beside properties")
    for pattern in patterns:
        place = f"{where}/patternProperties"
        _check_pattern(pattern, place)
        try:
            shared = [name for name in named if re.search(pattern, name)]
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{place} is no regular expression: {error}") from None
        if shared:
            raise ValueError(f"{place} matches {shared[0]!r}, which is in properties too")


def _check_pattern(pattern: object, where: str) -> None:
    if not isinstance(pattern, str):
        raise ValueError(f"{where} is no string")
    if _UNESCAPED.search(pattern):
        raise ValueError(f"{where} names a character that JSON must escape")


def _inner(schema: dict[str, Any], where: str) -> Iterator[tuple[object, str]]:
    """Schemas inside a schema, and where they stand."""
    for keyword in ("items", "additionalProperties", "propertyNames"):
        if keyword in schema:
            yield schema[keyword], f"{where}/{keyword}"
    for keyword in ("properties", "patternProperties", "$defs", "definitions"):
        inner = schema.get(keyword, {})
        if not isinstance(inner, dict):
            raise ValueError(f"{where}/{keyword} is no object")
        for name, value in inner.items():
            yield value, f"{where}/{keyword}/{name}"
    for keyword in ("anyOf", "oneOf", "allOf", "prefixItems"):
        values = schema.get(keyword, [])
        if not isinstance(values, list):
            raise ValueError(f"{where}/{keyword} is no list")
        for index, value in enumerate(values):
            yield value, f"{where}/{keyword}/{index}"
