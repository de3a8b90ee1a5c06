import json
from typing import Any

import pytest

from tidemill.engine.grammar_schema import MAX_DEPTH, check_schema


def nested(levels: int) -> str:
    return '{"items":' * levels + "{}" + "}" * levels


@pytest.mark.parametrize(
    "schema",
    [
        {},
        {"type": "object"},
        {"title": "T", "type": "object", "properties": {"a": {"type": "integer", "minimum": 3}}},
        {"properties": {"a": {"type": "string"}}, "required": ["a"], "additionalProperties": False},
        {"type": ["integer", "null"], "maximum": 9},
        {"enum": ["a", 1, None]},
        {"type": "string", "enum": ["a", "b"], "description": "one of two"},
        {"type": "integer", "const": 4},
        {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None},
        {"$ref": "#/$defs/a", "$defs": {"a": {"type": "array", "items": {"type": "boolean"}}}},
        {"type": "string", "pattern": r"^[^@\s]+@\d+$"},
        {"type": "object", "patternProperties": {"^x-": {"type": "integer"}}},
        {"type": "array", "uniqueItems": False, "prefixItems": [{"type": "null"}]},
    ],
    ids=str,
)
def test_what_binds_in_full_is_taken(schema: dict[str, Any]) -> None:
    check_schema(json.dumps(schema))


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        ({"not": {"type": "string"}}, "#/not is not supported"),
        ({"properties": {"a": {"multipleOf": 3}}}, "#/properties/a/multipleOf is not supported"),
        ({"type": "array", "uniqueItems": True}, "#/uniqueItems is not supported"),
        ({"$ref": "#", "minimum": 3}, "#/minimum is not supported beside $ref"),
        ({"anyOf": [{}], "properties": {}}, "#/properties is not supported beside anyOf"),
        ({"minimum": 3}, "#/minimum is not supported without a type"),
        ({"items": {"pattern": "a"}}, "#/items/pattern is not supported without a type"),
        ({"type": "integer", "enum": [1, "a"]}, "holds a value that is not of its type"),
        ({"type": "integer", "const": True}, "holds a value that is not of its type"),
        ({"required": ["b"], "properties": {"a": {}}}, "names 'b', which is not in properties"),
        ({"type": "string", "pattern": 'say "hi"'}, "a character that JSON must escape"),
        ({"type": "string", "pattern": r"\n"}, "a character that JSON must escape"),
        (
            {"type": "object", "properties": {"ab": {}}, "patternProperties": {"^a": {}}},
            "matches 'ab', which is in properties too",
        ),
        ({"type": "object", "patternProperties": {"(": {}}, "properties": {"a": {}}}, "regular"),
        ({"anyOf": {}}, "#/anyOf is no list"),
        ({"properties": []}, "must be objects"),
        ({"required": "a"}, "#/required is no list"),
        ({"items": [3]}, "#/items is neither an object nor a boolean"),
        ({"type": "string", "pattern": 3}, "#/pattern is no string"),
    ],
    ids=str,
)
def test_what_would_bind_in_part_is_refused_by_place(schema: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        check_schema(json.dumps(schema))
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("nonsense", "is no JSON"),
        ('{"minimum": NaN}', "NaN is no JSON number"),
        ("[]", "must be a JSON object"),
        ("true", "must be a JSON object"),
        (nested(MAX_DEPTH), "levels deep"),
        (nested(20_000), "too deeply"),
    ],
    ids=lambda value: value[:20],
)
def test_what_is_no_schema_is_refused(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        check_schema(text)


def test_depth_up_to_the_bound_is_taken() -> None:
    check_schema(nested(MAX_DEPTH - 1))
