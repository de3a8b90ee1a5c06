"""Reads a price book from TOML, strictly: what is not understood is refused, never skipped.

schema = 1
id = "example-2025-02"
version = 1
rounding = "half-up-nano"
currencies = ["USD"]

[[models.some-model.tariffs]]
effective_from = 2025-02-26T00:00:00+08:00
decides = "completion"               # or "arrival"
zone = "Asia/Shanghai"               # IANA name

[[models.some-model.tariffs.windows]]
name = "standard"
start = 08:30:00                     # belongs to the window
end = 00:30:00                       # does not; before start: wraps midnight
prices.USD = { hit = 70_000, miss = 270_000, output = 1_100_000 }   # pico-units per token
"""

from __future__ import annotations

import datetime as dt
import tomllib
from collections.abc import Callable, Mapping
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar
from zoneinfo import ZoneInfo

from tidemill.billing.prices import SCHEMA, Decides, PriceBook, Prices, Rounding, Tariff, Window
from tidemill.errors import ConfigError

_DAY_S = 24 * 60 * 60
_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_Value = TypeVar("_Value")
_Choice = TypeVar("_Choice", bound=StrEnum)


def load_price_book(path: Path | str) -> PriceBook:
    """Read a TOML file; ConfigError names the file and the path of the key at fault."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"price book {path} cannot be read: {error}") from error
    return parse_price_book(text, source=str(path))


def parse_price_book(text: str, *, source: str) -> PriceBook:
    """Read TOML text; `source` is what errors call it."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"price book {source} is not TOML: {error}") from error
    return _book(_Table(document, source, ""))


class _Table:
    """A TOML table that knows its file and path, and which of its keys were asked for."""

    def __init__(self, content: object, source: str, path: str) -> None:
        self._source = source
        self._path = path
        if not isinstance(content, dict):
            self.refuse("must be a table")
        self._content: dict[str, Any] = content
        self._unread = set(content)

    def refuse(self, problem: str, key: str = "") -> NoReturn:
        """Raise ConfigError for this table or one of its keys."""
        raise ConfigError(f"{self._source}: {self._at(key) or 'the document'} {problem}")

    def take(self, key: str, kind: type[_Value]) -> _Value:
        """The value of a required key, which must be exactly of type `kind`."""
        self._unread.discard(key)
        if key not in self._content:
            self.refuse("is missing", key)
        value = self._content[key]
        if type(value) is not kind:
            self.refuse(f"must be of type {kind.__name__}, got {type(value).__name__}", key)
        return value

    def text(self, key: str) -> str:
        """A string with something in it."""
        value = self.take(key, str)
        if not value.strip():
            self.refuse("is empty", key)
        return value

    def choice(self, key: str, kind: type[_Choice]) -> _Choice:
        """One of an enumeration's values."""
        value = self.take(key, str)
        try:
            return kind(value)
        except ValueError:
            allowed = ", ".join(repr(member.value) for member in kind)
            self.refuse(f"must be one of {allowed}, got {value!r}", key)

    def table(self, key: str) -> _Table:
        """A table below this one."""
        return _Table(self.take(key, dict), self._source, self._at(key))

    def tables(self, key: str) -> list[_Table]:
        """A list of at least one table below this one."""
        items = self.take(key, list)
        if not items:
            self.refuse("is empty", key)
        return [
            _Table(item, self._source, f"{self._at(key)}[{index}]")
            for index, item in enumerate(items)
        ]

    def each(self, read: Callable[[_Table], _Value]) -> Mapping[str, _Value]:
        """Every key of this table, whatever its name, as a table read by `read`."""
        if not self._content:
            self.refuse("is empty")
        return MappingProxyType({key: read(self.table(key)) for key in self._content})

    def done(self) -> None:
        """Refuse the keys that nobody asked for."""
        for key in sorted(self._unread):
            self.refuse("is not a known key", key)

    def _at(self, key: str) -> str:
        return f"{self._path}.{key}".strip(".")


def _book(table: _Table) -> PriceBook:
    if (schema := table.take("schema", int)) != SCHEMA:
        table.refuse(f"must be {SCHEMA}, got {schema}", "schema")
    currencies = _currencies(table)
    book = PriceBook(
        id=table.text("id"),
        version=_at_least(table, "version", 1),
        rounding=table.choice("rounding", Rounding),
        currencies=currencies,
        models=table.table("models").each(lambda model: _model(model, currencies)),
    )
    table.done()
    return book


def _currencies(table: _Table) -> tuple[str, ...]:
    names = table.take("currencies", list)
    for name in names:
        if not (isinstance(name, str) and len(name) == 3 and name.isascii() and name.isupper()):
            table.refuse(f"must hold three-letter ISO 4217 codes, got {name!r}", "currencies")
    if not names or len(set(names)) != len(names):
        table.refuse("must name at least one currency, each once", "currencies")
    return tuple(sorted(names))


def _model(table: _Table, currencies: tuple[str, ...]) -> tuple[Tariff, ...]:
    tariffs = [_tariff(row, currencies) for row in table.tables("tariffs")]
    tariffs.sort(key=lambda tariff: tariff.effective_from_ms)
    for earlier, later in pairwise(tariffs):
        if earlier.effective_from_ms == later.effective_from_ms:
            table.refuse("has two tariffs effective from the same instant", "tariffs")
    table.done()
    return tuple(tariffs)


def _tariff(table: _Table, currencies: tuple[str, ...]) -> Tariff:
    tariff = Tariff(
        effective_from_ms=_instant_ms(table, "effective_from"),
        decides=table.choice("decides", Decides),
        zone=_zone(table),
        windows=tuple(_window(row, currencies) for row in table.tables("windows")),
    )
    _require_whole_day(table, tariff.windows)
    table.done()
    return tariff


def _window(table: _Table, currencies: tuple[str, ...]) -> Window:
    window = Window(
        name=table.text("name"),
        start=_clock_time(table, "start"),
        end=_clock_time(table, "end"),
        prices=_prices(table.table("prices"), currencies),
    )
    table.done()
    return window


def _prices(table: _Table, currencies: tuple[str, ...]) -> Mapping[str, Prices]:
    rows = {currency: _row(table.table(currency)) for currency in currencies}
    table.done()
    return MappingProxyType(rows)


def _row(table: _Table) -> Prices:
    prices = Prices(**{key: _at_least(table, key, 0) for key in ("hit", "miss", "output")})
    if prices.hit > prices.miss:
        # A hold assumes the worst case to be that every prompt token is a miss.
        table.refuse(f"{prices.hit} is above the miss price {prices.miss}", "hit")
    table.done()
    return prices


def _at_least(table: _Table, key: str, minimum: int) -> int:
    value = table.take(key, int)
    if value < minimum:
        table.refuse(f"must be at least {minimum}, got {value}", key)
    return value


def _instant_ms(table: _Table, key: str) -> int:
    instant = table.take(key, dt.datetime)
    if instant.tzinfo is None:
        table.refuse("needs an offset from UTC", key)
    elapsed_ms, rest = divmod(instant - _EPOCH, dt.timedelta(milliseconds=1))
    if rest:
        table.refuse("must be a whole number of milliseconds", key)
    return elapsed_ms


def _clock_time(table: _Table, key: str) -> dt.time:
    value = table.take(key, dt.time)
    if value.microsecond:
        table.refuse("must be a whole number of seconds", key)
    return value


def _zone(table: _Table) -> str:
    name = table.text("zone")
    try:
        ZoneInfo(name)
    except (KeyError, OSError, ValueError):
        table.refuse(f"is no IANA time zone: {name!r}", "zone")
    return name


def _require_whole_day(table: _Table, windows: tuple[Window, ...]) -> None:
    """Refuse windows that leave a second of the local day without exactly one price."""
    spans: list[tuple[int, int, str]] = []
    for window in windows:
        start, end = _second_of_day(window.start), _second_of_day(window.end)
        if start < end:
            spans.append((start, end, window.name))
        else:
            spans.extend(((start, _DAY_S, window.name), (0, end, window.name)))
    covered_until, covered_by = 0, ""
    for start, end, name in sorted(span for span in spans if span[0] < span[1]):
        if start > covered_until:
            table.refuse(f"leave a gap before {name!r} starts", "windows")
        if start < covered_until:
            table.refuse(f"overlap: {covered_by!r} and {name!r}", "windows")
        covered_until, covered_by = end, name
    if covered_until < _DAY_S:
        table.refuse(f"leave a gap after {covered_by!r} ends", "windows")
    if len({window.name for window in windows}) != len(windows):
        table.refuse("must have different names", "windows")


def _second_of_day(time: dt.time) -> int:
    return (time.hour * 60 + time.minute) * 60 + time.second
