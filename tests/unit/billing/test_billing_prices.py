"""Which tariff, which window, until when; and the digest that names all of it."""

import datetime as dt
import sys
from pathlib import Path

import pytest

from tidemill.billing import Decides, PriceBook, Prices, decode_book, parse_price_book
from tidemill.billing.calendar_check import doubts
from tidemill.billing.canonical import sha256_hex
from tidemill.errors import ConfigError

PRICES = Path(__file__).parents[3] / "prices"

SMALL = """
schema = 2
id = "small"
version = 3
rounding = "half-up-nano"
currencies = ["USD"]

[calendars.home]
covers = [2025]
holidays = [2025-05-01, 2025-05-02]

[[models.m.tariffs]]
effective_from = 2025-01-01T00:00:00Z
decides = "arrival"
zone = "UTC"
calendar = "home"

[[models.m.tariffs.windows]]
name = "day"
spans = [{ days = ["mon", "tue", "wed", "thu", "fri"], start = 08:00:00, end = 20:00:00 }]
prices.USD = { hit = 1, miss = 2, output = 3 }

[[models.m.tariffs.windows]]
name = "night"
spans = [
    { days = ["mon", "tue", "wed", "thu", "fri"], start = 20:00:00, end = 08:00:00 },
    { days = ["sat", "sun", "holiday"], start = 00:00:00, end = 00:00:00 },
]
prices.USD = { hit = 1, miss = 1, output = 2 }
"""

LATER_TARIFF = """
[[models.m.tariffs]]
effective_from = 2025-06-02T10:00:00Z
decides = "completion"
zone = "Europe/Berlin"

[[models.m.tariffs.windows]]
name = "always"
spans = [{ start = 00:00:00, end = 00:00:00 }]
prices.USD = { hit = 5, miss = 6, output = 7 }
"""


def small(old: str = "", new: str = "") -> PriceBook:
    assert old in SMALL
    return parse_price_book(SMALL.replace(old, new, 1), source="small.toml")


def ms(instant: str) -> int:
    """Milliseconds of an ISO time, UTC unless it says otherwise."""
    parsed = dt.datetime.fromisoformat(instant)
    aware = parsed if parsed.tzinfo else parsed.replace(tzinfo=dt.UTC)
    return (aware - dt.datetime(1970, 1, 1, tzinfo=dt.UTC)) // dt.timedelta(milliseconds=1)


@pytest.mark.parametrize(
    ("instant", "window"),
    [
        ("2025-04-30 07:59:59.999", "night"),  # a Wednesday
        ("2025-04-30 08:00", "day"),
        ("2025-04-30 19:59:59.999", "day"),
        ("2025-04-30 20:00", "night"),
        ("2025-05-01 12:00", "night"),  # a holiday
        ("2025-05-02 23:59:59.999", "night"),
        ("2025-05-03 12:00", "night"),  # a Saturday
        ("2025-05-05 07:59:59.999", "night"),
        ("2025-05-05 08:00", "day"),
    ],
)
def test_weekdays_and_holidays_have_windows_of_their_own(instant: str, window: str) -> None:
    assert small().models["m"][0].window_at(ms(instant)).name == window


def test_the_end_of_a_window_is_told_across_holidays_and_weekends() -> None:
    book = small()
    assert book.window_ends_at("m", ms("2025-04-30 08:00")) == ms("2025-04-30 20:00")
    assert book.window_ends_at("m", ms("2025-04-30 20:00")) == ms("2025-05-05 08:00")
    assert book.window_ends_at("m", ms("2025-05-05 07:59:59.999")) == ms("2025-05-05 08:00")


def test_beyond_the_years_of_the_calendar_there_is_no_price() -> None:
    book = small()
    end = ms("2026-01-01")
    assert book.window_ends_at("m", ms("2025-12-31 20:00")) == end
    tariff = book.tariff_at("m", end)
    assert [tariff.knows(instant) for instant in (end - 1, end)] == [True, False]
    with pytest.raises(
        ConfigError, match=r"calendar 'home' does not cover 2026, asked for 2026-01-01"
    ):
        tariff.window_at(end)


def test_the_year_of_a_calendar_is_that_of_the_local_date() -> None:
    tariff = small('zone = "UTC"', 'zone = "Asia/Shanghai"').models["m"][0]
    assert [tariff.knows(ms(f"2025-12-31 {time}")) for time in ("15:59", "16:00")] == [True, False]


def test_no_tariff_before_the_first_is_effective() -> None:
    start = ms("2025-01-01")
    assert small().tariff_at("m", start).effective_from_ms == start
    with pytest.raises(ConfigError, match="has no tariff for 'm' at"):
        small().tariff_at("m", start - 1)


def test_later_tariff_replaces_the_earlier_from_its_instant_on() -> None:
    book = parse_price_book(SMALL + LATER_TARIFF, source="two.toml")
    start = ms("2025-06-02 10:00")
    assert book.tariff_at("m", start - 1).decides is Decides.ARRIVAL
    later = book.tariff_at("m", start)
    assert later.window_at(start).prices["USD"] == Prices(hit=5, miss=6, output=7)


def test_a_window_ends_early_where_the_next_tariff_starts() -> None:
    book = parse_price_book(SMALL + LATER_TARIFF, source="two.toml")
    start = ms("2025-06-02 10:00")
    assert book.window_ends_at("m", start - 1) == start
    assert book.tariff_at("m", start - 1).window_ends_at(start - 1) == ms("2025-06-02 20:00")
    assert book.window_ends_at("m", start) is None  # one window, all day, no later tariff


def test_the_order_of_tariffs_in_the_file_does_not_matter() -> None:
    head, tariffs = SMALL.split("[[models.m.tariffs]]", 1)
    swapped = parse_price_book(
        f"{head}{LATER_TARIFF}[[models.m.tariffs]]{tariffs}", source="swapped.toml"
    )
    in_order = parse_price_book(SMALL + LATER_TARIFF, source="two.toml")
    assert swapped.models == in_order.models
    assert swapped.digest == in_order.digest


def test_unknown_model_is_named() -> None:
    with pytest.raises(ConfigError, match="has no model 'gpt'"):
        small().tariff_at("gpt", ms("2025-03-01"))


def test_digest_is_of_the_meaning_and_not_of_the_text() -> None:
    other_words = "# a comment\n" + SMALL.replace("hit = 1, miss = 2", "miss = 2, hit = 1").replace(
        "[{ days", "[{ start = 08:00:00, end = 09:00:00 }, { days"
    ).replace("[{ start", '[{ days = ["mon", "tue", "wed", "thu", "fri"], start').replace(
        "start = 08:00:00, end = 20:00:00", "start = 09:00:00, end = 20:00:00"
    )
    assert parse_price_book(other_words, source="other name").digest == small().digest
    assert small("output = 3", "output = 4").digest != small().digest
    assert small("version = 3", "version = 4").digest != small().digest


def test_the_digest_covers_the_holidays() -> None:
    assert small("2025-05-02", "2025-05-08").digest != small().digest
    assert small("covers = [2025]", "covers = [2025, 2026]").digest != small().digest


@pytest.mark.parametrize("name", ["deepseek", "deepseek-2025-02"])
def test_a_book_is_read_back_from_its_canonical_bytes(name: str) -> None:
    text = (PRICES / f"{name}.toml").read_text(encoding="utf-8")
    book = parse_price_book(text, source=name)
    again = decode_book(book.canonical_bytes, digest=book.digest)
    assert again == book
    assert again.digest == book.digest


def test_bytes_of_another_digest_are_no_book() -> None:
    book = small()
    with pytest.raises(ConfigError, match=f"price book {book.digest} has other content"):
        decode_book(book.canonical_bytes.replace(b'"miss":2', b'"miss":1'), digest=book.digest)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('"schema":2', '"schema":1', "has schema 1, not 2"),
        ('"covers":', '"cover":', "cannot be read: KeyError"),
        ('"miss":2', '"miss":2.5', "cannot be read: TypeError.* got float"),
        ('"miss":2', '"miss":2,"vat":1', "cannot be read: TypeError"),
        ('"08:00:00"', '"8 o clock"', "cannot be read: ValueError"),
        ('"windows":{', '"windows":[{', "cannot be read: JSONDecodeError"),
        ('"id":"small"', '"id":"small","note":"x"', "is not in its canonical form"),
        ('"id":"small"', '"id": "small"', "is not in its canonical form"),
    ],
)
def test_bytes_that_no_book_has_written_are_refused(old: str, new: str, problem: str) -> None:
    text = small().canonical_bytes.decode()
    assert old in text
    content = text.replace(old, new, 1).encode()
    with pytest.raises(ConfigError, match=problem):
        decode_book(content, digest=sha256_hex(content))


def test_an_instant_that_is_a_float_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="admitted_at_ms must be an int"):
        small().tariff_at("m", 1.75e12)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="instant_ms must be an int"):
        small().models["m"][0].window_at(1.75e12)  # type: ignore[arg-type]


def test_a_calendar_that_cannot_be_compared_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    calendar = small().calendars["home"]
    assert doubts(calendar) == ["not compared: the package holidays has no country 'HOME'"]
    monkeypatch.setitem(sys.modules, "holidays", None)
    assert doubts(calendar) == ["not compared: the package holidays is not installed"]
