"""Reads a price book back from its canonical bytes, as ledgers and archives keep it by digest."""

import datetime as dt
import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from tidemill.billing.calendars import Calendar, Day
from tidemill.billing.canonical import sha256_hex
from tidemill.billing.prices import (
    SCHEMA,
    Decides,
    PriceBook,
    Prices,
    Rounding,
    Tariff,
    Turn,
    Window,
)
from tidemill.errors import ConfigError


def decode_book(content: bytes, *, digest: str) -> PriceBook:
    """The book whose `canonical_bytes` these are.

    ConfigError if they have another digest or are no canonical form of schema 2. What a price book
    may say is checked where it is written, in `price_file`, and not again here.
    """
    if sha256_hex(content) != digest:
        raise ConfigError(f"price book {digest} has other content: {sha256_hex(content)}")
    try:
        document = json.loads(content)
        if (schema := document["schema"]) != SCHEMA:
            raise ConfigError(f"price book {digest} has schema {schema}, not {SCHEMA}")
        book = _book(document)
        canonical = book.canonical_bytes
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"price book {digest} cannot be read: {error!r}") from error
    if canonical != content:
        raise ConfigError(f"price book {digest} is not in its canonical form")
    return book


def _book(document: Mapping[str, Any]) -> PriceBook:
    calendars = {
        name: Calendar(
            name,
            frozenset(row["covers"]),
            frozenset(dt.date.fromisoformat(date) for date in row["holidays"]),
        )
        for name, row in document["calendars"].items()
    }
    models = {
        model: tuple(_tariff(row, calendars) for row in rows)
        for model, rows in document["models"].items()
    }
    return PriceBook(
        id=document["id"],
        version=document["version"],
        rounding=Rounding(document["rounding"]),
        currencies=tuple(document["currencies"]),
        models=MappingProxyType(models),
    )


def _tariff(row: Mapping[str, Any], calendars: Mapping[str, Calendar]) -> Tariff:
    windows = tuple(
        Window(
            name,
            MappingProxyType({currency: Prices(**each) for currency, each in prices.items()}),
        )
        for name, prices in row["windows"].items()
    )
    week = {
        Day(day): tuple(Turn(dt.time.fromisoformat(start), window) for start, window in turns)
        for day, turns in row["week"].items()
    }
    return Tariff(
        effective_from_ms=row["effective_from_ms"],
        decides=Decides(row["decides"]),
        zone=row["zone"],
        windows=windows,
        week=MappingProxyType(week),
        calendar=calendars[row["calendar"]] if row["calendar"] else None,
    )
