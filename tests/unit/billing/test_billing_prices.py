"""The price book: DeepSeek's table, the edges of its windows, and everything that is refused."""

import datetime as dt
from pathlib import Path

import pytest

from tidemill.billing import Decides, PriceBook, Prices, load_price_book, parse_price_book
from tidemill.errors import ConfigError

BOOK_FILE = Path(__file__).parents[3] / "prices" / "deepseek-2025-02.toml"
BEIJING = dt.timezone(dt.timedelta(hours=8))

SMALL = """
schema = 1
id = "small"
version = 3
rounding = "half-up-nano"
currencies = ["USD"]

[[models.m.tariffs]]
effective_from = 2025-01-01T00:00:00Z
decides = "arrival"
zone = "UTC"

[[models.m.tariffs.windows]]
name = "day"
start = 08:00:00
end = 20:00:00
prices.USD = { hit = 1, miss = 2, output = 3 }

[[models.m.tariffs.windows]]
name = "night"
start = 20:00:00
end = 08:00:00
prices.USD = { hit = 1, miss = 1, output = 2 }
"""

LATER_TARIFF = """
[[models.m.tariffs]]
effective_from = 2025-06-01T00:00:00Z
decides = "completion"
zone = "Europe/Berlin"

[[models.m.tariffs.windows]]
name = "always"
start = 00:00:00
end = 00:00:00
prices.USD = { hit = 5, miss = 6, output = 7 }
"""


@pytest.fixture(scope="module")
def book() -> PriceBook:
    return load_price_book(BOOK_FILE)


def small(old: str = "", new: str = "") -> PriceBook:
    assert old in SMALL
    return parse_price_book(SMALL.replace(old, new, 1), source="small.toml")


def ms(instant: dt.datetime) -> int:
    return (instant - dt.datetime(1970, 1, 1, tzinfo=dt.UTC)) // dt.timedelta(milliseconds=1)


def beijing(local: str) -> int:
    return ms(dt.datetime.fromisoformat(local).replace(tzinfo=BEIJING))


def mills_per_million(prices: Prices) -> tuple[int, int, int]:
    """Thousandths of a unit per million tokens, the unit of the published table times 1000."""
    return prices.hit // 1000, prices.miss // 1000, prices.output // 1000


@pytest.mark.parametrize(
    ("model", "window", "currency", "published"),
    [
        ("deepseek-chat", "standard", "CNY", (500, 2000, 8000)),
        ("deepseek-chat", "standard", "USD", (70, 270, 1100)),
        ("deepseek-chat", "off-peak", "CNY", (250, 1000, 4000)),
        ("deepseek-chat", "off-peak", "USD", (35, 135, 550)),
        ("deepseek-reasoner", "standard", "CNY", (1000, 4000, 16000)),
        ("deepseek-reasoner", "standard", "USD", (140, 550, 2190)),
        ("deepseek-reasoner", "off-peak", "CNY", (250, 1000, 4000)),
        ("deepseek-reasoner", "off-peak", "USD", (35, 135, 550)),
    ],
)
def test_every_line_of_deepseeks_table(
    book: PriceBook, model: str, window: str, currency: str, published: tuple[int, int, int]
) -> None:
    clock = {"standard": "12:00", "off-peak": "04:00"}[window]
    tariff = book.tariff_at(model, beijing("2025-03-01"))
    found = tariff.window_at(beijing(f"2025-03-01 {clock}"))
    assert found.name == window
    assert mills_per_million(found.prices[currency]) == published


@pytest.mark.parametrize(
    ("clock", "window"),
    [
        ("00:29:59.999", "standard"),
        ("00:30", "off-peak"),
        ("08:29:59.999", "off-peak"),
        ("08:30", "standard"),
        ("00:00", "standard"),
        ("23:59:59.999", "standard"),
    ],
)
@pytest.mark.parametrize("day", ["2025-02-27", "2025-12-31", "2028-02-29"])
def test_windows_hold_their_start_and_not_their_end(
    book: PriceBook, day: str, clock: str, window: str
) -> None:
    instant = beijing(f"{day} {clock}")
    assert book.tariff_at("deepseek-chat", instant).window_at(instant).name == window


def test_off_peak_starts_at_16_30_utc(book: PriceBook) -> None:
    tariff = book.tariff_at("deepseek-chat", beijing("2025-03-01"))
    edge = ms(dt.datetime(2025, 3, 1, 16, 30, tzinfo=dt.UTC))
    assert [tariff.window_at(edge + step).name for step in (-1, 0)] == ["standard", "off-peak"]
    assert tariff.decides is Decides.COMPLETION


def test_no_tariff_before_the_first_is_effective(book: PriceBook) -> None:
    start = beijing("2025-02-26")
    assert book.tariff_at("deepseek-chat", start).effective_from_ms == start
    with pytest.raises(ConfigError, match="has no tariff for 'deepseek-chat' at"):
        book.tariff_at("deepseek-chat", start - 1)


def test_the_order_of_tariffs_in_the_file_does_not_matter() -> None:
    head, tariffs = SMALL.split("[[models.m.tariffs]]", 1)
    swapped = parse_price_book(
        f"{head}{LATER_TARIFF}[[models.m.tariffs]]{tariffs}", source="swapped.toml"
    )
    in_order = parse_price_book(SMALL + LATER_TARIFF, source="two.toml")
    assert swapped.models == in_order.models
    assert swapped.digest == in_order.digest


def test_the_end_of_a_window_is_told_in_advance(book: PriceBook) -> None:
    ends = [
        book.window_ends_at("deepseek-chat", beijing(f"2025-03-01 {clock}"))
        for clock in ("00:29:59.999", "00:30", "08:30", "23:00")
    ]
    assert ends == [
        beijing("2025-03-01 00:30"),
        beijing("2025-03-01 08:30"),
        beijing("2025-03-02 00:30"),
        beijing("2025-03-02 00:30"),
    ]


def test_a_window_ends_early_where_the_next_tariff_starts() -> None:
    book = parse_price_book(SMALL + LATER_TARIFF, source="two.toml")
    start = ms(dt.datetime(2025, 6, 1, tzinfo=dt.UTC))
    assert book.window_ends_at("m", start - 1) == start
    assert book.window_ends_at("m", start) is None  # one window, all day, no later tariff


def test_unknown_model_is_named(book: PriceBook) -> None:
    with pytest.raises(ConfigError, match="has no model 'gpt'"):
        book.tariff_at("gpt", beijing("2025-03-01"))


def test_later_tariff_replaces_the_earlier_from_its_instant_on() -> None:
    book = parse_price_book(SMALL + LATER_TARIFF, source="two.toml")
    start = ms(dt.datetime(2025, 6, 1, tzinfo=dt.UTC))
    assert book.tariff_at("m", start - 1).decides is Decides.ARRIVAL
    later = book.tariff_at("m", start)
    assert later.window_at(start).prices["USD"] == Prices(hit=5, miss=6, output=7)


def test_wall_clock_decides_where_a_zone_skips_or_repeats_an_hour() -> None:
    text = SMALL.replace('"UTC"', '"Europe/Berlin"')
    text = text.replace("08:00:00", "02:30:00").replace("20:00:00", "03:00:00")
    tariff = parse_price_book(text, source="dst.toml").tariff_at("m", beijing("2025-03-01"))
    names = [
        tariff.window_at(ms(dt.datetime(2025, month, day, 0, 30 + minute, tzinfo=dt.UTC))).name
        for month, day in ((3, 30), (10, 26))
        for minute in (0, 29)
    ]
    # 30 March 00:30 UTC is 01:30; 26 October 00:30 UTC is the first 02:30
    assert names == ["night", "night", "day", "day"]
    spring_gap = ms(dt.datetime(2025, 3, 30, 1, 0, tzinfo=dt.UTC))  # 02:00 became 03:00
    assert tariff.window_at(spring_gap).name == "night"
    second_0230 = ms(dt.datetime(2025, 10, 26, 1, 30, tzinfo=dt.UTC))
    assert tariff.window_at(second_0230).name == "day"


def test_digest_is_of_the_meaning_and_not_of_the_text() -> None:
    commented = "# a comment\n" + SMALL.replace("hit = 1, miss = 2", "miss = 2, hit = 1")
    assert parse_price_book(commented, source="other name").digest == small().digest
    assert small("output = 3", "output = 4").digest != small().digest
    assert small("version = 3", "version = 4").digest != small().digest


def test_shipped_books_digest_is_pinned_since_receipts_carry_it(book: PriceBook) -> None:
    assert book.digest == "3fa8078be03eead24a2979d30a6fd4ea33b6ee8ddbb4e390e7e80376f25f95dd"


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("schema = 1", "schema = 2", "schema must be 1, got 2"),
        ("schema = 1", "", "schema is missing"),
        ("version = 3", "version = 0", "version must be at least 1"),
        ("version = 3", "version = true", "version must be of type int, got bool"),
        ('id = "small"', 'id = " "', "id is empty"),
        ("half-up-nano", "banker", "rounding must be one of 'half-up-nano', got 'banker'"),
        ('["USD"]', '["USD", "USD"]', "currencies must name at least one currency, each once"),
        ('["USD"]', '["usd"]', "currencies must hold three-letter ISO 4217 codes"),
        ('["USD"]', "[]", "currencies must name at least one"),
        ('["USD"]', '["USD", "CNY"]', r"windows\[0\].prices.CNY is missing"),
        ("version = 3", "version = 3\nvat = 19", "vat is not a known key"),
        ("decides =", 'weekdays = "all"\ndecides =', r"tariffs\[0\].weekdays is not a known key"),
        ('"arrival"', '"later"', "decides must be one of 'completion', 'arrival', got 'later'"),
        ('"UTC"', '"Mars/Olympus"', r"tariffs\[0\].zone is no IANA time zone: 'Mars/Olympus'"),
        ('"UTC"', '"../../etc/passwd"', "zone is no IANA time zone"),
        ("00:00:00Z", "00:00:00", "effective_from needs an offset from UTC"),
        ("00:00:00Z", "00:00:00.0005Z", "effective_from must be a whole number of milliseconds"),
        ("2025-01-01T00:00:00Z", '"2025"', "effective_from must be of type datetime, got str"),
        ("08:00:00", "08:00:00.5", r"windows\[0\].start must be a whole number of seconds"),
        ("miss = 2", "miss = 2.0", r"windows\[0\].prices.USD.miss must be of type int, got float"),
        ("miss = 2", "miss = true", "miss must be of type int, got bool"),
        ("miss = 2", "miss = -2", "miss must be at least 0"),
        ("miss = 2", "miss = 0", "hit 1 is above the miss price 0"),
        ("miss = 2", "mis = 2", "miss is missing"),
        ("output = 3 }", "output = 3, think = 4 }", "prices.USD.think is not a known key"),
        ("end = 20:00:00", "end = 19:00:00", "windows leave a gap before 'night' starts"),
        ("end = 20:00:00", "end = 21:00:00", "windows overlap: 'day' and 'night'"),
        ("end = 08:00:00", "end = 07:00:00", "windows leave a gap before 'day' starts"),
        ("end = 08:00:00", "end = 00:00:00", "windows leave a gap before 'day' starts"),
        ('"night"', '"day"', "windows must have different names"),
        (
            "[[models.m.tariffs]]",
            "[models]\n[[m.tariffs]]",
            "models.m.tariffs must be of type list",
        ),
        ("schema = 1", "schema = ", "is not TOML"),
    ],
)
def test_what_is_not_understood_is_refused_with_file_and_key(
    old: str, new: str, problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        small(old, new)
    assert "small.toml" in str(caught.value)


def test_a_gap_at_the_end_of_the_day_is_refused() -> None:
    head, _, _ = SMALL.partition('[[models.m.tariffs.windows]]\nname = "night"')
    text = head.replace("08:00:00", "00:00:00")
    with pytest.raises(ConfigError, match="windows leave a gap after 'day' ends"):
        parse_price_book(text, source="x")


def test_two_tariffs_from_one_instant_are_refused() -> None:
    text = SMALL + LATER_TARIFF.replace("2025-06-01", "2025-01-01")
    with pytest.raises(ConfigError, match=r"models\.m\.tariffs has two tariffs effective from"):
        parse_price_book(text, source="x")


def test_a_missing_or_undecodable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml cannot be read"):
        load_price_book(tmp_path / "absent.toml")
    (tmp_path / "latin.toml").write_bytes(b'id = "\xe9"')
    with pytest.raises(ConfigError, match=r"latin\.toml cannot be read"):
        load_price_book(tmp_path / "latin.toml")


@pytest.mark.parametrize(
    "text", ["", "models = 1", 'models = {}\nschema = 1\nid = "x"\nversion = 1']
)
def test_a_document_of_the_wrong_shape_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_price_book(text, source="x")


def test_an_instant_that_is_a_float_is_a_type_error(book: PriceBook) -> None:
    with pytest.raises(TypeError, match="admitted_at_ms must be an int"):
        book.tariff_at("deepseek-chat", 1.75e12)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="instant_ms must be an int"):
        book.models["deepseek-chat"][0].window_at(1.75e12)  # type: ignore[arg-type]
