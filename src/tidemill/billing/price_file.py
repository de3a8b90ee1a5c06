"""Reads a price book from TOML, strictly: what is not understood is refused, never skipped.

schema = 2
id = "example"
version = 1
rounding = "half-up-nano"
currencies = ["USD"]

[calendars.cn]                       # optional: dates that are holidays, for whole years
covers = [2026]
holidays = [2026-10-01, 2026-10-02]

[[models.some-model.tariffs]]
effective_from = 2026-08-23T00:00:00+08:00
decides = "completion"               # or "arrival"
zone = "Asia/Shanghai"               # IANA name
calendar = "cn"                      # optional: without it no date is a holiday
currencies = ["USD"]                 # optional: those of the book's that it is sold in

[[models.some-model.tariffs.windows]]
name = "peak"
spans = [{ days = ["mon", "tue", "wed", "thu", "fri"], start = 09:00:00, end = 12:00:00 }]
prices.USD = { hit = 14_000, miss = 440_000, output = 1_320_000 }   # pico-units per token

[[models.some-model.tariffs.windows]]
name = "off-peak"
spans = [
    { days = ["mon", "tue", "wed", "thu", "fri"], start = 12:00:00, end = 09:00:00 },
    { days = ["sat", "sun", "holiday"], start = 00:00:00, end = 00:00:00 },
]
prices.USD = { hit = 7_000, miss = 220_000, output = 660_000 }

A span holds its `start` and not its `end`; see `week.Span` for those that wrap midnight. `days` is
every day unless given. For each type of day the spans of all windows cover 24 hours exactly once.
"""

from __future__ import annotations

import datetime as dt
import tomllib
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from zoneinfo import ZoneInfo

from tidemill.billing.calendars import ALL_DAYS, WEEKDAYS, Calendar, Day
from tidemill.billing.prices import SCHEMA, Decides, PriceBook, Prices, Rounding, Tariff, Window
from tidemill.billing.toml_table import Table
from tidemill.billing.week import Span, lay_out
from tidemill.errors import ConfigError

_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_MAX_PRICE_PICO = 10**12  # whatever a request costs then fits its fields


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
    return _book(Table(document, source))


def _book(table: Table) -> PriceBook:
    if (schema := table.take("schema", int)) != SCHEMA:
        table.refuse(f"must be {SCHEMA}, got {schema}", "schema")
    currencies = _currencies(table)
    calendars: Mapping[str, Calendar] = {}
    if "calendars" in table:
        calendars = table.table("calendars").each(_calendar)
    models = table.table("models").each(lambda _, model: _model(model, currencies, calendars))
    book = PriceBook(
        id=table.text("id"),
        version=_at_least(table, "version", 1),
        rounding=table.choice("rounding", Rounding),
        currencies=currencies,
        models=models,
    )
    _require_use(table, book, calendars)
    table.done()
    return book


def _require_use(table: Table, book: PriceBook, calendars: Mapping[str, Calendar]) -> None:
    tariffs = [tariff for rows in book.models.values() for tariff in rows]
    for name in sorted(calendars.keys() - book.calendars.keys()):
        table.refuse("is not used by any tariff", f"calendars.{name}")
    sold = {currency for tariff in tariffs for currency in tariff.currencies}
    for currency in sorted(set(book.currencies) - sold):
        table.refuse(f"has {currency}, in which nothing is sold", "currencies")


def _currencies(table: Table) -> tuple[str, ...]:
    names = table.distinct("currencies", str)
    for name in names:
        if not (len(name) == 3 and name.isascii() and name.isupper()):
            table.refuse(f"must hold three-letter ISO 4217 codes, got {name!r}", "currencies")
    return tuple(sorted(names))


def _calendar(name: str, table: Table) -> Calendar:
    years = frozenset(table.distinct("covers", int))
    holidays = frozenset(table.distinct("holidays", dt.date))
    if outside := sorted(date for date in holidays if date.year not in years):
        table.refuse(f"has {outside[0]}, whose year is not in covers", "holidays")
    table.done()
    return Calendar(name, years, holidays)


def _model(
    table: Table, currencies: tuple[str, ...], calendars: Mapping[str, Calendar]
) -> tuple[Tariff, ...]:
    tariffs = [_tariff(row, currencies, calendars) for row in table.tables("tariffs")]
    tariffs.sort(key=lambda tariff: tariff.effective_from_ms)
    for earlier, later in pairwise(tariffs):
        if earlier.effective_from_ms == later.effective_from_ms:
            table.refuse("has two tariffs effective from the same instant", "tariffs")
    table.done()
    return tuple(tariffs)


def _tariff(table: Table, currencies: tuple[str, ...], calendars: Mapping[str, Calendar]) -> Tariff:
    if "currencies" in table:
        sold = _currencies(table)
        if unknown := sorted(set(sold) - set(currencies)):
            table.refuse(f"has {unknown[0]}, which the book does not have", "currencies")
        currencies = sold
    calendar = _named(table, calendars) if "calendar" in table else None
    days = WEEKDAYS if calendar is None else ALL_DAYS
    windows, spans = [], []
    for row in table.tables("windows"):
        window, its_spans = _window(row, currencies, days)
        windows.append(window)
        spans.extend(its_spans)
    if len({window.name for window in windows}) != len(windows):
        table.refuse("must have different names", "windows")
    tariff = Tariff(
        effective_from_ms=_instant_ms(table, "effective_from"),
        decides=table.choice("decides", Decides),
        zone=_zone(table),
        windows=tuple(sorted(windows, key=lambda window: window.name)),
        week=lay_out(spans, days, lambda problem: table.refuse(problem, "windows")),
        calendar=calendar,
    )
    if not tariff.knows(tariff.effective_from_ms):
        table.refuse("lies in a year that the calendar does not cover", "effective_from")
    table.done()
    return tariff


def _named(table: Table, calendars: Mapping[str, Calendar]) -> Calendar:
    name = table.text("calendar")
    if name not in calendars:
        table.refuse(f"names {name!r}, of which there is no table in calendars", "calendar")
    return calendars[name]


def _window(
    table: Table, currencies: tuple[str, ...], days: tuple[Day, ...]
) -> tuple[Window, list[Span]]:
    name = table.text("name")
    spans = [_span(row, name, days) for row in table.tables("spans")]
    prices = _prices(table.table("prices"), currencies)
    table.done()
    return Window(name, prices), spans


def _span(table: Table, window: str, days: tuple[Day, ...]) -> Span:
    chosen = table.choices("days", Day) if "days" in table else frozenset(days)
    if not chosen.issubset(days):
        table.refuse("has 'holiday', but the tariff has no calendar", "days")
    span = Span(
        window=window,
        days=chosen,
        start=_clock_time(table, "start"),
        end=_clock_time(table, "end"),
        where=table.at(""),
    )
    table.done()
    return span


def _prices(table: Table, currencies: tuple[str, ...]) -> Mapping[str, Prices]:
    rows = {currency: _row(table.table(currency)) for currency in currencies}
    table.done()
    return MappingProxyType(rows)


def _row(table: Table) -> Prices:
    prices = Prices(**{key: _price(table, key) for key in ("hit", "miss", "output")})
    if prices.hit > prices.miss:
        # A hold assumes the worst case to be that every prompt token is a miss.
        table.refuse(f"{prices.hit} is above the miss price {prices.miss}", "hit")
    table.done()
    return prices


def _price(table: Table, key: str) -> int:
    value = _at_least(table, key, 0)
    if value > _MAX_PRICE_PICO:
        table.refuse(f"must be at most {_MAX_PRICE_PICO}, one unit a token, got {value}", key)
    return value


def _at_least(table: Table, key: str, minimum: int) -> int:
    value = table.take(key, int)
    if value < minimum:
        table.refuse(f"must be at least {minimum}, got {value}", key)
    return value


def _instant_ms(table: Table, key: str) -> int:
    instant = table.take(key, dt.datetime)
    if instant.tzinfo is None:
        table.refuse("needs an offset from UTC", key)
    elapsed_ms, rest = divmod(instant - _EPOCH, dt.timedelta(milliseconds=1))
    if rest:
        table.refuse("must be a whole number of milliseconds", key)
    return elapsed_ms


def _clock_time(table: Table, key: str) -> dt.time:
    value = table.take(key, dt.time)
    if value.microsecond:
        table.refuse("must be a whole number of seconds", key)
    return value


def _zone(table: Table) -> str:
    name = table.text("zone")
    try:
        ZoneInfo(name)
    except (KeyError, OSError, ValueError):
        table.refuse(f"is no IANA time zone: {name!r}", "zone")
    return name
