"""DeepSeek's published tables, line by line, and the edges of their windows."""

import datetime as dt
from pathlib import Path

import pytest

from tidemill.billing import Decides, PriceBook, Tariff, Usage, compute_charge, load_price_book
from tidemill.billing.calendar_check import doubts
from tidemill.billing.integers import format_per_million

PRICES = Path(__file__).parents[3] / "prices"
HISTORY = load_price_book(PRICES / "deepseek.toml")
FEBRUARY = load_price_book(PRICES / "deepseek-2025-02.toml")
BEIJING = dt.timezone(dt.timedelta(hours=8))
CHAT, REASONER, FLASH, PRO = (
    "deepseek-chat",
    "deepseek-reasoner",
    "deepseek-v4-flash",
    "deepseek-v4-pro",
)


def ms(instant: str) -> int:
    """Milliseconds of an ISO time, in Beijing unless it says otherwise."""
    parsed = dt.datetime.fromisoformat(instant)
    aware = parsed if parsed.tzinfo else parsed.replace(tzinfo=BEIJING)
    return (aware - dt.datetime(1970, 1, 1, tzinfo=dt.UTC)) // dt.timedelta(milliseconds=1)


def window_at(instant: str, model: str, book: PriceBook = HISTORY) -> str:
    return book.tariff_at(model, ms(instant)).window_at(ms(instant)).name


# Hit, miss and output per million tokens at noon or, off-peak, at four in the morning.
@pytest.mark.parametrize(
    ("model", "instant", "window", "cny", "usd"),
    [
        # From 2 August 2024: V2, and V3 until 8 February 2025, 16:00 UTC.
        (CHAT, "2024-08-02 00:00", "standard", "0.1 1 2", "0.014 0.14 0.28"),
        (CHAT, "2025-02-08 15:59:59.999Z", "standard", "0.1 1 2", "0.014 0.14 0.28"),
        # V3 and R1 before the night discount.
        (CHAT, "2025-02-08 16:00Z", "standard", "0.5 2 8", "0.07 0.27 1.1"),
        (CHAT, "2025-02-25 04:00", "standard", "0.5 2 8", "0.07 0.27 1.1"),
        (REASONER, "2025-02-25 04:00", "standard", "1 4 16", "0.14 0.55 2.19"),
        # With it, from 26 February until 5 September 2025, 16:00 UTC.
        (CHAT, "2025-02-26 12:00", "standard", "0.5 2 8", "0.07 0.27 1.1"),
        (CHAT, "2025-02-26 04:00", "off-peak", "0.25 1 4", "0.035 0.135 0.55"),
        (REASONER, "2025-02-26 12:00", "standard", "1 4 16", "0.14 0.55 2.19"),
        (REASONER, "2025-02-26 04:00", "off-peak", "0.25 1 4", "0.035 0.135 0.55"),
        (REASONER, "2025-09-05 15:59:59.999Z", "standard", "1 4 16", "0.14 0.55 2.19"),
        # V3.1: one price.
        (CHAT, "2025-09-05 16:00Z", "standard", "0.5 4 12", "0.07 0.56 1.68"),
        (REASONER, "2025-09-05 17:00Z", "standard", "0.5 4 12", "0.07 0.56 1.68"),
        # V3.2-Exp.
        (CHAT, "2025-09-29 12:00", "standard", "0.2 2 3", "0.028 0.28 0.42"),
        (REASONER, "2025-09-29 04:00", "standard", "0.2 2 3", "0.028 0.28 0.42"),
        # V4 from 16 August 2026, 16:00 UTC.
        (FLASH, "2026-08-16 16:00Z", "off-peak", "0.05 1.5 4.5", "0.007 0.22 0.66"),
        (FLASH, "2026-08-17 10:00", "peak", "0.1 3 9", "0.014 0.44 1.32"),
        (PRO, "2026-08-16 16:00Z", "off-peak", "0.15 4.5 13.5", "0.022 0.66 1.98"),
        (PRO, "2026-08-17 10:00", "peak", "0.3 9 27", "0.044 1.32 3.96"),
        (PRO, "2026-10-08 10:00", "peak", "0.3 9 27", "0.044 1.32 3.96"),
        (PRO, "2026-10-08 13:00", "off-peak", "0.15 4.5 13.5", "0.022 0.66 1.98"),
        # V4.1 Flash from 10 September 2026, 04:00 UTC; the old name is charged alike.
        (FLASH, "2026-09-10 11:59:59.999", "peak", "0.1 3 9", "0.014 0.44 1.32"),
        (FLASH, "2026-09-10 12:00", "off-peak", "0.02 1 4", "0.003 0.15 0.6"),
        (FLASH, "2026-09-10 14:00", "peak", "0.04 2 8", "0.006 0.3 1.2"),
        ("deepseek-flash", "2026-09-10 12:00", "off-peak", "0.02 1 4", "0.003 0.15 0.6"),
        ("deepseek-flash", "2026-09-10 14:00", "peak", "0.04 2 8", "0.006 0.3 1.2"),
    ],
)
def test_every_line_of_the_published_tables(
    model: str, instant: str, window: str, cny: str, usd: str
) -> None:
    found = HISTORY.tariff_at(model, ms(instant)).window_at(ms(instant))
    assert found.name == window
    for currency, expected in (("CNY", cny), ("USD", usd)):
        prices = found.prices_in(currency)
        row = (prices.hit, prices.miss, prices.output)
        assert " ".join(map(format_per_million, row)) == expected


@pytest.mark.parametrize(
    ("clock", "window"),
    [
        ("00:00", "standard"),
        ("00:29:59.999", "standard"),
        ("00:30", "off-peak"),
        ("08:29:59.999", "off-peak"),
        ("08:30", "standard"),
        ("23:59:59.999", "standard"),
    ],
)
@pytest.mark.parametrize("day", ["2025-02-27", "2025-12-31", "2028-02-29"])
def test_the_night_discount_holds_its_start_and_not_its_end(
    day: str, clock: str, window: str
) -> None:
    assert window_at(f"{day} {clock}", CHAT, FEBRUARY) == window


def test_the_night_discount_is_16_30_to_00_30_utc_and_completion_decides() -> None:
    assert window_at("2025-03-01 16:29:59.999Z", CHAT) == "standard"
    assert window_at("2025-03-01 16:30Z", CHAT) == "off-peak"
    assert window_at("2025-03-02 00:29:59.999Z", CHAT) == "off-peak"
    assert window_at("2025-03-02 00:30Z", CHAT) == "standard"
    assert HISTORY.tariff_at(CHAT, ms("2025-03-01")).decides is Decides.COMPLETION


@pytest.mark.parametrize("model", [CHAT, REASONER])
def test_the_book_of_february_is_a_part_of_the_history(model: str) -> None:
    def since_february(book: PriceBook) -> Tariff:
        return book.tariff_at(model, ms("2025-02-26 00:00"))

    assert since_february(FEBRUARY) == since_february(HISTORY)


@pytest.mark.parametrize(
    ("instant", "window"),
    [
        ("2026-08-21 10:00", "peak"),  # a Friday
        ("2026-08-22 10:00", "peak"),  # a Saturday, before weekends became off-peak
        ("2026-08-22 23:59:59.999", "off-peak"),
        ("2026-08-23 10:00", "off-peak"),  # a Sunday
        ("2026-08-24 08:59:59.999", "off-peak"),  # a Monday
        ("2026-08-24 09:00", "peak"),
        ("2026-08-24 11:59:59.999", "peak"),
        ("2026-08-24 12:00", "off-peak"),
        ("2026-08-24 13:59:59.999", "off-peak"),
        ("2026-08-24 14:00", "peak"),
        ("2026-08-24 17:59:59.999", "peak"),
        ("2026-08-24 18:00", "off-peak"),
        ("2026-08-29 09:00", "off-peak"),  # a Saturday
        ("2026-09-20 10:00", "off-peak"),  # a Sunday on which work is made up for
        ("2026-09-24 17:59:59.999", "peak"),  # the day before Mid-Autumn
        ("2026-09-25 09:00", "off-peak"),  # Mid-Autumn, a Friday
        ("2026-09-28 09:00", "peak"),
        ("2026-10-01 09:00", "off-peak"),  # National Day, a Thursday
        ("2026-10-06 09:00", "off-peak"),  # a Tuesday off, in exchange for a weekend
        ("2026-10-07 17:59:59.999", "off-peak"),
        ("2026-10-08 09:00", "peak"),
        ("2026-10-10 10:00", "off-peak"),  # a Saturday on which work is made up for
        ("2026-12-31 23:59:59.999", "off-peak"),
    ],
)
@pytest.mark.parametrize("model", [FLASH, PRO])
def test_peak_hours_of_2026_are_on_working_weekdays(model: str, instant: str, window: str) -> None:
    assert window_at(instant, model) == window


def test_weekdays_are_those_of_beijing() -> None:
    assert window_at("2026-08-28 16:30Z", PRO) == "off-peak"  # Saturday there
    assert HISTORY.window_ends_at(PRO, ms("2026-08-28 10:00Z")) == ms("2026-08-31 09:00")


def test_off_peak_lasts_over_the_national_holidays() -> None:
    assert HISTORY.window_ends_at(PRO, ms("2026-09-30 18:00")) == ms("2026-10-08 09:00")


@pytest.mark.parametrize(
    ("admitted", "decided", "tariff", "window"),
    [
        ("2025-06-01 08:29:59", "2025-06-01 08:29:59.999", "2025-02-26 00:00", "off-peak"),
        ("2025-06-01 08:29:59", "2025-06-01 08:30", "2025-02-26 00:00", "standard"),
        # The price list changes under way, and the request keeps that of its admission.
        ("2025-09-05 23:59:59.999", "2025-09-06 00:29", "2025-02-26 00:00", "standard"),
        ("2025-09-05 23:59:59.999", "2025-09-06 00:30", "2025-02-26 00:00", "off-peak"),
        ("2025-09-06 00:00", "2025-09-06 00:30", "2025-09-06 00:00", "standard"),
    ],
)
def test_admission_picks_the_tariff_and_completion_the_window(
    admitted: str, decided: str, tariff: str, window: str
) -> None:
    charge = compute_charge(
        HISTORY,
        model=REASONER,
        currency="USD",
        usage=Usage(prompt_tokens=1, computed_tokens=1),
        admitted_at_ms=ms(admitted),
        decided_at_ms=ms(decided),
    )
    assert (charge.tariff_from_ms, charge.window) == (ms(tariff), window)


def test_the_listed_holidays_are_those_of_the_holidays_package() -> None:
    assert {name: doubts(each) for name, each in HISTORY.calendars.items()} == {"cn": []}


@pytest.mark.parametrize(
    ("book", "digest"),
    [
        (FEBRUARY, "b94462f118c7e1edf46d05e9ca5db423230d4ad42138ca8007eac457acdf3e53"),
        (HISTORY, "d0021a0296c14216e36c841bca508f2379efc52239aab27fad52aace64df9205"),
    ],
)
def test_shipped_books_digests_are_pinned_since_receipts_carry_them(
    book: PriceBook, digest: str
) -> None:
    assert book.digest == digest
