"""The price book: effective-dated tariffs with daily windows in a time zone, as data (M1, M6).

`price_file` reads and checks the TOML form; see `prices/` in the repository for books.
Instants are integer milliseconds since the Unix epoch.
"""

import datetime as dt
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from zoneinfo import ZoneInfo

from tidemill.billing.canonical import canonical_bytes, sha256_hex
from tidemill.billing.integers import require_int
from tidemill.errors import ConfigError

SCHEMA = 1

_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)


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
    """A daily span of local time, half-open: `start` belongs to it, `end` does not.

    It wraps midnight when `end` lies before `start`; equal ends mean the whole day.
    `prices` is keyed by currency.
    """

    name: str
    start: dt.time
    end: dt.time
    prices: Mapping[str, Prices]

    def covers(self, local: dt.time) -> bool:
        """Whether the wall-clock time `local` lies in the window."""
        if self.start < self.end:
            return self.start <= local < self.end
        return local >= self.start or local < self.end

    def prices_in(self, currency: str) -> Prices:
        """The prices in a currency; ConfigError if nothing is sold in it here."""
        if currency not in self.prices:
            raise ConfigError(f"window {self.name!r} has no prices in {currency!r}")
        return self.prices[currency]


@dataclass(frozen=True, slots=True)
class Tariff:
    """One model's prices from `effective_from_ms` until its next tariff.

    The windows cover the local day of `zone` exactly once. A wall-clock time that a zone's
    clock change skips or repeats is priced by what the clock on the wall shows.
    """

    effective_from_ms: int
    decides: Decides
    zone: str
    windows: tuple[Window, ...]

    def window_at(self, instant_ms: int) -> Window:
        """The window in force at an instant."""
        local = self._local(instant_ms).time()
        return next(window for window in self.windows if window.covers(local))

    def window_ends_at(self, instant_ms: int) -> int | None:
        """When the window in force at an instant ends; None if it is the only one."""
        if len(self.windows) == 1:
            return None
        local, end = self._local(instant_ms), self.window_at(instant_ms).end
        days_ahead = 0 if local.time() < end else 1
        day = local.date() + dt.timedelta(days=days_ahead)
        instant = dt.datetime.combine(day, end, tzinfo=ZoneInfo(self.zone))
        return (instant - _EPOCH) // dt.timedelta(milliseconds=1)

    def _local(self, instant_ms: int) -> dt.datetime:
        elapsed = dt.timedelta(milliseconds=require_int(instant_ms, "instant_ms"))
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
        raise ConfigError(f"price book {self.id} has no tariff for {model!r} at {admitted_at_ms}")

    def window_ends_at(self, model: str, instant_ms: int) -> int | None:
        """When the prices of a request admitted and decided at an instant end; None: never."""
        tariff = self.tariff_at(model, instant_ms)
        starts = [row.effective_from_ms for row in self.models[model]]
        ends = [start for start in starts if start > instant_ms]
        if (window_end := tariff.window_ends_at(instant_ms)) is not None:
            ends.append(window_end)
        return min(ends, default=None)

    @cached_property
    def digest(self) -> str:
        """SHA-256 in hexadecimal over the canonical form: equal for equal meaning."""
        return sha256_hex(canonical_bytes(self._canonical()))

    def _canonical(self) -> dict[str, object]:
        return {
            "schema": SCHEMA,
            "id": self.id,
            "version": self.version,
            "rounding": self.rounding.value,
            "currencies": sorted(self.currencies),
            "models": {
                model: [_canonical_tariff(tariff) for tariff in tariffs]
                for model, tariffs in self.models.items()
            },
        }


def _canonical_tariff(tariff: Tariff) -> dict[str, object]:
    return {
        "effective_from_ms": tariff.effective_from_ms,
        "decides": tariff.decides.value,
        "zone": tariff.zone,
        "windows": [
            {
                "name": window.name,
                "start": window.start.isoformat(),
                "end": window.end.isoformat(),
                "prices": {
                    currency: {"hit": prices.hit, "miss": prices.miss, "output": prices.output}
                    for currency, prices in window.prices.items()
                },
            }
            for window in sorted(tariff.windows, key=lambda window: window.start)
        ],
    }
