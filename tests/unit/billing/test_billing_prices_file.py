"""What a price book's file may say, and where a refusal points."""

import inspect
from pathlib import Path

import pytest

from tidemill.billing import Day, PriceBook, load_price_book, parse_price_book, price_file
from tidemill.errors import ConfigError

SMALL = """
schema = 2
id = "small"
version = 3
rounding = "half-up-nano"
currencies = ["USD"]

[calendars.home]
covers = [2025]
holidays = [2025-05-01]

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
NO_CALENDAR = (
    SMALL.replace('calendar = "home"\n', "")
    .replace("[calendars.home]\ncovers = [2025]\nholidays = [2025-05-01]\n", "")
    .replace(', "holiday"', "")
)


def small(old: str = "", new: str = "", *, text: str = SMALL) -> PriceBook:
    assert old in text
    return parse_price_book(text.replace(old, new, 1), source="small.toml")


def test_the_documented_examples_are_sound() -> None:
    docs = (Path(__file__).parents[3] / "docs" / "billing.md").read_text(encoding="utf-8")
    example = docs.split("```toml\n")[1].split("```\n")[0]
    assert parse_price_book(example, source="docs/billing.md").id == "house"
    text = inspect.getdoc(price_file) or ""
    example = text[text.index("schema =") : text.index("\nA span holds")]
    assert parse_price_book(example, source="price_file.py").id == "example"


def test_days_are_all_days_unless_given() -> None:
    text = """
schema = 2
id = "flat"
version = 1
rounding = "half-up-nano"
currencies = ["USD"]
[[models.m.tariffs]]
effective_from = 2025-01-01T00:00:00Z
decides = "arrival"
zone = "UTC"
[[models.m.tariffs.windows]]
name = "always"
spans = [{ start = 00:00:00, end = 00:00:00 }]
prices.USD = { hit = 1, miss = 2, output = 3 }
"""
    week = small(text=text).models["m"][0].week
    assert set(week) == set(Day) - {Day.HOLIDAY}  # without a calendar there is no such day
    assert {turn.window for turns in week.values() for turn in turns} == {"always"}


def test_any_time_at_which_a_day_starts_over_is_the_whole_day() -> None:
    whole = "start = 00:00:00, end = 00:00:00"
    assert small(whole, "start = 13:37:00, end = 13:37:00").digest == small().digest


def test_a_span_may_end_at_midnight() -> None:
    book = small(
        "start = 20:00:00, end = 08:00:00 }",
        "start = 20:00:00, end = 00:00:00 }",
        text=NO_CALENDAR.replace("start = 08:00:00, end = 20", "start = 00:00:00, end = 20"),
    )
    turns = book.models["m"][0].week[Day.MON]
    assert [(turn.start.hour, turn.window) for turn in turns] == [(0, "day"), (20, "night")]


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("schema = 2", "schema = 1", "schema must be 2, got 1"),
        ("schema = 2", "", "schema is missing"),
        ("version = 3", "version = 0", "version must be at least 1"),
        ("version = 3", "version = true", "version must be of type int, got bool"),
        ('id = "small"', 'id = " "', "id is empty"),
        ("half-up-nano", "banker", "rounding must be one of 'half-up-nano', got 'banker'"),
        ('["USD"]', '["USD", "USD"]', "currencies has USD twice"),
        ('["USD"]', '["usd"]', "currencies must hold three-letter ISO 4217 codes"),
        ('["USD"]', "[840]", r"currencies\[0\] must be of type str, got int"),
        ('["USD"]', "[]", "currencies is empty"),
        ('["USD"]', '["USD", "CNY"]', r"windows\[0\].prices.CNY is missing"),
        ("version = 3", "version = 3\nvat = 19", "vat is not a known key"),
        ("decides =", 'weekdays = "all"\ndecides =', r"tariffs\[0\].weekdays is not a known key"),
        ('"arrival"', '"later"', "decides must be one of 'completion', 'arrival', got 'later'"),
        ('"UTC"', '"Mars/Olympus"', r"tariffs\[0\].zone is no IANA time zone: 'Mars/Olympus'"),
        ('"UTC"', '"../../etc/passwd"', "zone is no IANA time zone"),
        ("00:00:00Z", "00:00:00", "effective_from needs an offset from UTC"),
        ("00:00:00Z", "00:00:00.0005Z", "effective_from must be a whole number of milliseconds"),
        ("2025-01-01T00:00:00Z", '"2025"', "effective_from must be of type datetime, got str"),
        ("08:00:00", "08:00:00.5", r"spans\[0\].start must be a whole number of seconds"),
        ("08:00:00", '"08:00"', r"spans\[0\].start must be of type time, got str"),
        ("miss = 2", "miss = 2.0", r"windows\[0\].prices.USD.miss must be of type int, got float"),
        ("miss = 2", "miss = true", "miss must be of type int, got bool"),
        ("miss = 2", "miss = -2", "miss must be at least 0"),
        ("miss = 2", "miss = 1_000_000_000_001", "miss must be at most 1000000000000"),
        ("miss = 2", "miss = 0", "hit 1 is above the miss price 0"),
        ("miss = 2", "mis = 2", "miss is missing"),
        ("output = 3 }", "output = 3, think = 4 }", "prices.USD.think is not a known key"),
        ('"night"', '"day"', "windows must have different names"),
        ('"night"\nspans', '"night"\nstart = 1\nspans', r"windows\[1\].start is not a known key"),
        ("end = 20:00:00 }", "end = 20:00:00, price = 1 }", r"spans\[0\].price is not a known key"),
        ('["mon", "tue"', '["mon", "mon"', r"windows\[0\].spans\[0\].days has mon twice"),
        ('["mon", "tue"', '["mon", "Tue"', "days must be one of 'mon', .* got 'Tue'"),
        ('["mon", "tue", "wed", "thu", "fri"]', "[]", r"spans\[0\].days is empty"),
        ("covers = [2025]", "covers = []", "calendars.home.covers is empty"),
        ("covers = [2025]", 'covers = ["2025"]', r"home.covers\[0\] must be of type int, got str"),
        ("covers = [2025]", "covers = [2025, 2025]", "covers has 2025 twice"),
        ("2025-05-01]", "2025-05-01, 2026-01-01]", "holidays has 2026-01-01, whose year is not in"),
        ("2025-05-01]", "2025-05-01, 2025-05-01]", "holidays has 2025-05-01 twice"),
        ("[2025-05-01]", '["2025-05-01"]', r"holidays\[0\] must be of type date, got str"),
        ("2025-05-01]", "2025-05-01T00:00:00Z]", r"holidays\[0\] must be of type date, got datet"),
        ("covers =", "country = 1\ncovers =", "calendars.home.country is not a known key"),
        (
            'calendar = "home"',
            'calendar = "cn"',
            r"calendar names 'cn', of which there is no table",
        ),
        ('calendar = "home"\n', "", r"spans\[1\].days has 'holiday', but the tariff has no calen"),
        ("2025-01-01T", "2024-12-31T", "effective_from lies in a year that the calendar does not"),
        (
            "[[models.m.tariffs]]",
            "[models]\n[[m.tariffs]]",
            "models.m.tariffs must be of type list",
        ),
        ("schema = 2", "schema = ", "is not TOML"),
    ],
)
def test_what_is_not_understood_is_refused_with_file_and_key(
    old: str, new: str, problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        small(old, new)
    assert "small.toml" in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("end = 20:00:00", "end = 19:00:00", "leave mon without a price from 19:00:00 to 20:00:00"),
        ("end = 08:00:00", "end = 07:59:59", "leave mon without a price from 07:59:59 to 08:00:00"),
        ("end = 08:00:00", "end = 00:00:00", "leave mon without a price from 00:00:00 to 08:00:00"),
        ("start = 20:00:00", "start = 21:00:00", "leave mon without .* from 20:00:00 to 21:00:00"),
        ('"sat", "sun", "holiday"', '"sat", "sun"', "leave holiday without a price from 00:00:00 "),
        ('"sat", "sun", "holiday"', '"sun", "holiday"', "leave sat without .* to 24:00:00"),
        (
            "start = 00:00:00, end = 00:00:00 }",
            "start = 00:00:00, end = 23:00:00 }",
            "leave sat without a price from 23:00:00 to 24:00:00",
        ),
        (
            "end = 20:00:00",
            "end = 21:00:00",
            r"overlap on mon from 20:00:00 to 21:00:00: 'day' "
            r"\(models.m.tariffs\[0\].windows\[0\].spans\[0\]\) and 'night' \(.*\[1\].spans\[0\]\)",
        ),
        (
            '["sat", "sun", "holiday"]',
            '["fri", "sat", "sun", "holiday"]',
            r"overlap on fri from 00:00:00 to 08:00:00: 'night' \(.*spans\[0\]\) and 'night' \(",
        ),
    ],
)
def test_each_type_of_day_is_covered_exactly_once(old: str, new: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=rf"small.toml: models.m.tariffs\[0\].windows {problem}"):
        small(old, new)


def test_a_calendar_that_nobody_uses_is_refused() -> None:
    assert small(text=NO_CALENDAR).models["m"][0].calendar is None
    unused = "\n[calendars.cn]\ncovers = [2025]\nholidays = [2025-01-01]\n"
    with pytest.raises(ConfigError, match=r"calendars\.cn is not used by any tariff"):
        parse_price_book(NO_CALENDAR + unused, source="x")


def test_a_tariff_may_be_sold_in_fewer_currencies_than_the_book() -> None:
    text = NO_CALENDAR.replace('["USD"]', '["USD", "CNY"]')
    with pytest.raises(ConfigError, match=r"windows\[0\].prices.CNY is missing"):
        small(text=text)
    text = text.replace('zone = "UTC"', 'zone = "UTC"\ncurrencies = ["USD"]')
    with pytest.raises(ConfigError, match="currencies has CNY, in which nothing is sold"):
        small(text=text)
    other = NO_CALENDAR[NO_CALENDAR.index("[[models") :].replace("models.m", "models.other")
    both = small(
        text=text
        + other.replace("prices.USD", "prices.CNY").replace(
            'zone = "UTC"', 'zone = "UTC"\ncurrencies = ["CNY"]'
        )
    )
    assert both.currencies == ("CNY", "USD")
    assert [both.models[name][0].currencies for name in ("m", "other")] == [{"USD"}, {"CNY"}]


def test_a_currency_that_the_book_does_not_declare_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"tariffs\[0\].currencies has EUR, which the book does"):
        small('zone = "UTC"', 'zone = "UTC"\ncurrencies = ["EUR"]')
    with pytest.raises(ConfigError, match=r"windows\[0\].prices.EUR is not a known key"):
        small("prices.USD", "prices.EUR = { hit = 1, miss = 2, output = 3 }\nprices.USD")


def test_two_tariffs_from_one_instant_are_refused() -> None:
    tariff = SMALL[SMALL.index("[[models") :]
    with pytest.raises(ConfigError, match=r"models\.m\.tariffs has two tariffs effective from"):
        parse_price_book(SMALL + tariff, source="x")


def test_a_missing_or_undecodable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml cannot be read"):
        load_price_book(tmp_path / "absent.toml")
    (tmp_path / "latin.toml").write_bytes(b'id = "\xe9"')
    with pytest.raises(ConfigError, match=r"latin\.toml cannot be read"):
        load_price_book(tmp_path / "latin.toml")


@pytest.mark.parametrize(
    "text", ["", "models = 1", 'models = {}\nschema = 2\nid = "x"\nversion = 1']
)
def test_a_document_of_the_wrong_shape_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_price_book(text, source="x")
