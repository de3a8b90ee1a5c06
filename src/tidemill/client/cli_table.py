"""How the commands print what people read: tables, amounts and instants."""

import argparse
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from typing import TypeVar
from zoneinfo import ZoneInfo

from tidemill.errors import ConfigError

Name = TypeVar("Name", bound=StrEnum)

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_NUMBER = re.compile(r"-?[\d,.]*\d(?: [A-Z]{3})?")


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Aligned columns; those that hold numbers alone stand to the right."""
    cells = [list(header), *([str(cell) for cell in row] for row in rows)]
    columns = list(zip(*cells, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [all(map(_NUMBER.fullmatch, column[1:])) for column in columns]
    lines = [
        "  ".join(
            cell.rjust(width) if numeric else cell.ljust(width)
            for cell, width, numeric in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in cells
    ]
    return "\n".join(lines)


def instant(at_ms: int) -> str:
    """UTC, to the millisecond."""
    at = _EPOCH + timedelta(milliseconds=at_ms)
    return at.isoformat(sep=" ", timespec="milliseconds").replace("+00:00", "Z")


def nano(text: str) -> int:
    """Parse an exact decimal amount, e.g. "12.50"; nothing finer than 10^-9."""
    if re.fullmatch(r"\d{1,9}(?:\.\d{1,9})?", text) is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not an amount such as 12.50, below 10^9, with at most nine decimals"
        )
    return int(Decimal(text).scaleb(9))


def names_of(kind: type[Name]) -> Callable[[str], list[Name]]:
    """A parser of comma-separated values of `kind`, for an argument."""

    def parse(text: str) -> list[Name]:
        try:
            return [kind(name) for name in text.split(",")]
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{error}; choose from {', '.join(kind)}") from error

    return parse


def identifier(text: str) -> str:
    """An argument that names something: an empty one would be taken for none."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def instant_ms(name: str, text: str, zone: str | None) -> int:
    """Parse a date or an ISO 8601 instant; without an offset it is of `zone`, or UTC.

    ConfigError, with the argument's `name`, if it is neither; also if there is no such zone.
    """
    try:
        local = ZoneInfo(zone or "UTC")
    except (KeyError, OSError, ValueError) as error:
        raise ConfigError(f"--zone is no IANA time zone: {error}") from error
    try:
        at = datetime.fromisoformat(text)
    except ValueError as error:
        raise ConfigError(
            f"{name} is no instant such as 2026-01-31 or 2026-01-31T08:00+01:00: {error}"
        ) from error
    if at.tzinfo is None:
        at = at.replace(tzinfo=local)
    return (at - _EPOCH) // timedelta(milliseconds=1)
