"""Writing TOML, and changing what is to be written: as much as a generated configuration needs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def dumps(document: Mapping[str, Any]) -> str:
    """Nested tables of strings, numbers, booleans, paths and lists; None leaves a key out."""
    return "\n".join(_table((), document)).strip() + "\n"


def merged(document: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy with `changes` laid over it, table by table; None takes a key out."""
    result = dict(document)
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
            result[key] = merged(result[key], value)
        elif value is None:
            result.pop(key, None)
        else:
            result[key] = value
    return result


def _table(path: tuple[str, ...], table: Mapping[str, Any]) -> list[str]:
    lines = []
    for key, value in table.items():
        if value is not None and not isinstance(value, Mapping) and not _is_tables(value):
            lines.append(f"{key} = {_value(value)}")
    for key, value in table.items():
        inner = (*path, key)
        if isinstance(value, Mapping):
            lines += ["", f"[{'.'.join(inner)}]", *_table(inner, value)]
        elif _is_tables(value):
            for each in value:
                lines += ["", f"[[{'.'.join(inner)}]]", *_table(inner, each)]
    return lines


def _is_tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def _value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, str | Path):
        return json.dumps(str(value), ensure_ascii=False)  # TOML's basic strings are JSON's
    return json.dumps(value)
