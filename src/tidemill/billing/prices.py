"""The price book: effective-dated tariffs with windows of the week in a time zone (M1, M6).

`price_file` reads and checks the TOML form; see `prices/` in the repository for books.
Instants are integer milliseconds since the Unix epoch.
"""

import datetime as dt
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from zoneinfo import ZoneInfo

from tidemill.billing.calendars import Calendar, Day, weekday
from tidemill.billing.canonical import canonical_bytes, sha256_hex
from tidemill.billing.integers import require_int
from tidemill.errors import ConfigError

SCHEMA = 2

_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_MS = dt.timedelta(milliseconds=1)
_HORIZON_MS = 366 * 24 * 3_600_000


class Decides(StrEnum):
    """The instant that picks the window of a request; one request has one window."""

    COMPLETION = "completion"
    ARRIVAL = "arrival"


class Rounding(StrEnum):
    """How a request's exact pico-unit total becomes an amount."""

    HALF_UP_NANO = "half-up-nano"


@dataclass(frozen=True, slots=True)
class Prices:
    """Pico-units (1e-12 of the currency's unit) per token."""

    hit: int
    miss: int
    output: int


@dataclass(frozen=True, slots=True)
class Window:
    """Prices that hold at certain times of the week, by currency."""

    name: str
    prices: Mapping[str, Prices]

    def prices_in(self, currency: str) -> Prices:
        """The prices in a currency; ConfigError if nothing is sold in it here."""
        if currency not in self.prices:
            raise ConfigError(f"window {self.name!r} has no prices in {currency!r}")
        return self.prices[currency]


@dataclass(frozen=True, slots=True)
class Turn:
    """From `start` on, by the clock on the wall, the window of that name is in force."""

    start: dt.time
    window: str


@dataclass(frozen=True, slots=True)
class Tariff:
    """One model's prices from `effective_from_ms` until its next tariff.

    `week` says for each type of day which window takes over when; the first turn is at midnight,
    and a turn's own instant belongs to it. An instant is read as the date and time that clocks in
    `zone` show, so a time that a clock change skips has no price and one that it repeats has the
    same price twice. Without a calendar no date is a holiday.
    """

    effective_from_ms: int
    decides: Decides
    zone: str
    windows: tuple[Window, ...]
    week: Mapping[Day, tuple[Turn, ...]]
    calendar: Calendar | None = None

    @property
    def currencies(self) -> frozenset[str]:
        """What it is sold in; the same in every window."""
        return frozenset(self.windows[0].prices)

    def knows(self, instant_ms: int) -> bool:
        """Whether the calendar, if there is one, covers the local date of an instant."""
        return self.calendar is None or self.calendar.covers(self._local(instant_ms).date())

    def window_at(self, instant_ms: int) -> Window:
        """The window in force at an instant; ConfigError for a date the calendar does not cover."""
        local = self._local(instant_ms)
        now = local.time()
        turns = self._turns(local.date())
        name = next(turn.window for turn in reversed(turns) if turn.start <= now)
        return next(window for window in self.windows if window.name == name)

    def window_ends_at(self, instant_ms: int) -> int | None:
        """The next instant at which another window is in force, or the calendar knows no further.

        None if there is no such instant for 366 days.
        """
        if len(self.windows) == 1 and self.calendar is None:
            return None
        name = self.window_at(instant_ms).name
        instant, horizon = instant_ms, instant_ms + _HORIZON_MS
        while instant < horizon:
            instant = self._next_edge(instant)
            if not self.knows(instant) or self.window_at(instant).name != name:
                return instant
        return None

    def _next_edge(self, instant_ms: int) -> int:
        """The first later instant at which wall clocks reach a turn or midnight, or are changed."""
        local = self._local(instant_ms)
        date, now = local.date(), local.time()
        later = [turn.start for turn in self._turns(date) if turn.start > now]
        if later:
            wall = dt.datetime.combine(date, later[0])
        else:
            wall = dt.datetime.combine(date + dt.timedelta(days=1), dt.time())
        edge = instant_ms + (wall - local.replace(tzinfo=None)) // _MS
        if self._local(edge).utcoffset() == local.utcoffset():
            return edge
        before = instant_ms
        while edge - before > 1:  # no zone changes its clocks twice within a day
            middle = (before + edge) // 2
            if self._local(middle).utcoffset() == local.utcoffset():
                before = middle
            else:
                edge = middle
        return edge

    def _turns(self, date: dt.date) -> tuple[Turn, ...]:
        return self.week[weekday(date) if self.calendar is None else self.calendar.day(date)]

    def _local(self, instant_ms: int) -> dt.datetime:
        elapsed = require_int(instant_ms, "instant_ms") * _MS
        return (_EPOCH + elapsed).astimezone(ZoneInfo(self.zone))


@dataclass(frozen=True)
class PriceBook:
    """Every tariff of one seller, identified by `digest`; made by `load_price_book`."""

    id: str
    version: int
    rounding: Rounding
    currencies: tuple[str, ...]
    models: Mapping[str, tuple[Tariff, ...]]

    def tariff_at(self, model: str, admitted_at_ms: int) -> Tariff:
        """The tariff a request admitted at that instant has for good (M6).

        ConfigError if the book does not sell `model` or not yet at that instant.
        """
        require_int(admitted_at_ms, "admitted_at_ms")
        if model not in self.models:
            raise ConfigError(f"price book {self.id} has no model {model!r}")
        for tariff in reversed(self.models[model]):
            if tariff.effective_from_ms <= admitted_at_ms:
                return tariff
        instant = _EPOCH + admitted_at_ms * _MS
        raise ConfigError(f"price book {self.id} has no tariff for {model!r} at {instant}")

    def window_ends_at(self, model: str, instant_ms: int) -> int | None:
        """When the prices of a request admitted and decided at an instant end; None: never."""
        tariff = self.tariff_at(model, instant_ms)
        starts = [row.effective_from_ms for row in self.models[model]]
        ends = [start for start in starts if start > instant_ms]
        if (window_end := tariff.window_ends_at(instant_ms)) is not None:
            ends.append(window_end)
        return min(ends, default=None)

    @property
    def calendars(self) -> Mapping[str, Calendar]:
        """The calendars that its tariffs use, by name."""
        tariffs = [tariff for rows in self.models.values() for tariff in rows]
        return {each.calendar.name: each.calendar for each in tariffs if each.calendar is not None}

    @cached_property
    def digest(self) -> str:
        """SHA-256 of `canonical_bytes` in hexadecimal."""
        return sha256_hex(self.canonical_bytes)

    @cached_property
    def canonical_bytes(self) -> bytes:
        """All that the book means, equal for equal meaning; `price_json` reads it back."""
        return canonical_bytes(self._canonical())

    def _canonical(self) -> dict[str, object]:
        return {
            "schema": SCHEMA,
            "id": self.id,
            "version": self.version,
            "rounding": self.rounding.value,
            "currencies": sorted(self.currencies),
            "calendars": {
                name: {
                    "covers": sorted(calendar.years),
                    "holidays": [date.isoformat() for date in sorted(calendar.holidays)],
                }
                for name, calendar in self.calendars.items()
            },
            "models": {
                model: [_canonical_tariff(tariff) for tariff in rows]
                for model, rows in self.models.items()
            },
        }


def _canonical_tariff(tariff: Tariff) -> dict[str, object]:
    return {
        "effective_from_ms": tariff.effective_from_ms,
        "decides": tariff.decides.value,
        "zone": tariff.zone,
        "calendar": "" if tariff.calendar is None else tariff.calendar.name,
        "windows": {
            window.name: {
                currency: {"hit": prices.hit, "miss": prices.miss, "output": prices.output}
                for currency, prices in window.prices.items()
            }
            for window in tariff.windows
        },
        "week": {
            day.value: [[turn.start.isoformat(), turn.window] for turn in turns]
            for day, turns in tariff.week.items()
        },
    }
