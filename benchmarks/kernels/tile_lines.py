"""Rewrites single lines of a file of tiles: all others, and the comments between them, stay.

A line is `{ most_rows = 4, rows = 16, ... },  # how it was found`.
"""

import json
import re
import tomllib
from dataclasses import MISSING, fields
from typing import Any

from tidemill.kernels.device import DeviceClass

_ENTRY = re.compile(r"^\s*(\{[^}]*\})")


def line_of(tile: Any, most_rows: int | None, note: str) -> str:
    """The tile as a line; fields that have their default are left out."""
    given = {} if most_rows is None else {"most_rows": most_rows}
    for field in fields(tile):
        value = getattr(tile, field.name)
        if field.default is MISSING or value != field.default:
            given[field.name] = value
    body = ", ".join(f"{name} = {json.dumps(value)}" for name, value in given.items())
    return f"  {{ {body} }},  # {note}\n"


def rewrite(text: str, table: str, most_rows: int | None, tile: Any, note: str) -> str:
    """The file with that line of that table replaced; LookupError if it has no such line."""
    lines = text.splitlines(keepends=True)
    at = next((at for at, line in enumerate(lines) if line.startswith(f"{table} = [")), len(lines))
    for place in range(at + 1, len(lines)):
        if lines[place].startswith("]"):
            break
        entry = _ENTRY.match(lines[place])
        if entry and tomllib.loads(f"tile = {entry[1]}")["tile"].get("most_rows") == most_rows:
            lines[place] = line_of(tile, most_rows, note)
            return "".join(lines)
    raise LookupError(f"{table} has no line of its own for most_rows = {most_rows}")


def for_device(text: str, device: DeviceClass, name: str) -> str:
    """A new device class's file, from an H100's: the first line tells the class."""
    major, minor = device.capability
    head = (
        f"# Compute capability {major}.{minor}, {device.num_sms} multiprocessors, "
        f"{device.bandwidth} TB/s: {name}.\n"
    )
    return head + text.partition("\n")[2]
