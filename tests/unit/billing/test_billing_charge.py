"""M1 and M6: which price applies, exact amounts, one rounding, no float."""

import datetime as dt
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidemill.billing import (
    Charge,
    PriceBook,
    Reuse,
    Usage,
    clamp_decided_at,
    compute_charge,
    format_amount,
    load_price_book,
    parse_price_book,
)
from tidemill.errors import ConfigError

BOOK = load_price_book(Path(__file__).parents[3] / "prices" / "deepseek-2025-02.toml")
BEIJING = dt.timezone(dt.timedelta(hours=8))

TWO_TARIFFS = """
schema = 2
id = "rising"
version = 1
rounding = "half-up-nano"
currencies = ["USD"]

[[models.m.tariffs]]
effective_from = 2025-01-01T00:00:00Z
decides = "{decides}"
zone = "UTC"
[[models.m.tariffs.windows]]
name = "day"
spans = [{{ start = 06:00:00, end = 18:00:00 }}]
prices.USD = {{ hit = 0, miss = 1_000, output = 1_000 }}
[[models.m.tariffs.windows]]
name = "night"
spans = [{{ start = 18:00:00, end = 06:00:00 }}]
prices.USD = {{ hit = 0, miss = 0, output = 500 }}

[[models.m.tariffs]]
effective_from = 2025-06-01T12:00:00Z
decides = "{decides}"
zone = "UTC"
[[models.m.tariffs.windows]]
name = "always"
spans = [{{ start = 00:00:00, end = 00:00:00 }}]
prices.USD = {{ hit = 0, miss = 9_000, output = 9_000 }}
"""


def ms(instant: dt.datetime) -> int:
    return (instant - dt.datetime(1970, 1, 1, tzinfo=dt.UTC)) // dt.timedelta(milliseconds=1)


NOON = ms(dt.datetime(2025, 3, 1, 12, tzinfo=BEIJING))


def usage(hits: int = 0, misses: int = 0, output: int = 0) -> Usage:
    return Usage(
        prompt_tokens=hits + misses,
        computed_tokens=misses,
        reused=Reuse(device=hits),
        completion_tokens=output,
        generated_tokens=output,
    )


def price(
    used: Usage, book: PriceBook = BOOK, *, model: str = "deepseek-chat", **at: int
) -> Charge:
    return compute_charge(
        book,
        model=model,
        currency="USD",
        usage=used,
        admitted_at_ms=at.get("admitted", NOON),
        decided_at_ms=at.get("decided", at.get("admitted", NOON)),
    )


def test_the_published_day_of_deepseek() -> None:
    """608 B input tokens, 342 B of them hits, 168 B output, all at R1's standard price."""
    day = usage(hits=342 * 10**9, misses=266 * 10**9, output=168 * 10**9)
    assert day.cache_hit_tokens == 342 * 10**9
    charge = price(day, model="deepseek-reasoner")
    assert charge.hit_cost_pico == 47_880 * 10**12
    assert charge.miss_cost_pico == 146_300 * 10**12
    assert charge.output_cost_pico == 367_920 * 10**12
    assert charge.amount_nano == 562_100 * 10**9
    # DeepSeek published 562,027 from unrounded counts; its table gives them to the nearest billion,
    # so each of the three classes may be off by half a billion tokens.
    rounding_nano = (140_000 + 550_000 + 2_190_000) * 10**9 // 2 // 1000
    assert abs(charge.amount_nano - 562_027 * 10**9) <= rounding_nano


def test_one_request_by_hand() -> None:
    charge = price(usage(hits=128, misses=72, output=50))
    assert (charge.price_hit_pico, charge.price_miss_pico, charge.price_output_pico) == (
        70_000,
        270_000,
        1_100_000,
    )
    assert charge.hit_cost_pico == 8_960_000
    assert charge.miss_cost_pico == 19_440_000
    assert charge.output_cost_pico == 55_000_000
    assert charge.amount_nano == 83_400
    assert charge.saved_nano == 128 * 200
    assert (charge.book_id, charge.book_version) == ("deepseek-2025-02", 1)
    assert charge.book_digest == BOOK.digest


@pytest.mark.parametrize(
    ("clock", "window"),
    [
        ((0, 29, 59, 999_000), "standard"),
        ((0, 30, 0, 0), "off-peak"),
        ((8, 29, 59, 999_000), "off-peak"),
        ((8, 30, 0, 0), "standard"),
    ],
)
def test_completion_decides_at_the_edges_of_the_night(
    clock: tuple[int, int, int, int], window: str
) -> None:
    admitted = ms(dt.datetime(2025, 3, 1, 0, 0, tzinfo=BEIJING))
    decided = ms(dt.datetime(2025, 3, 1, *clock, tzinfo=BEIJING))
    charge = price(usage(misses=1), admitted=admitted, decided=decided)
    assert charge.window == window
    assert charge.decided_by == "completion"
    assert charge.price_miss_pico == {"standard": 270_000, "off-peak": 135_000}[window]


def test_admission_picks_the_tariff_and_the_decision_the_window_in_it() -> None:
    before = ms(dt.datetime(2025, 6, 1, 11, 59, 59, tzinfo=dt.UTC))
    after = ms(dt.datetime(2025, 6, 1, 18, 0, tzinfo=dt.UTC))
    by_completion = parse_price_book(TWO_TARIFFS.format(decides="completion"), source="x")
    by_arrival = parse_price_book(TWO_TARIFFS.format(decides="arrival"), source="x")
    used = usage(output=1)
    assert price(used, by_completion, model="m", admitted=before, decided=after).window == "night"
    assert price(used, by_arrival, model="m", admitted=before, decided=after).window == "day"
    later = price(used, by_arrival, model="m", admitted=before + 1000, decided=after)
    assert later.window == "always"
    assert later.tariff_from_ms == before + 1000


@pytest.mark.parametrize(("now", "decided"), [(5, 10), (10, 10), (15, 15), (20, 20), (25, 20)])
def test_decision_is_clamped_to_admission_and_deadline(now: int, decided: int) -> None:
    assert clamp_decided_at(now, admitted_at_ms=10, deadline_ms=20) == decided


def test_decision_before_admission_is_refused() -> None:
    with pytest.raises(ValueError, match="before admission"):
        price(usage(), admitted=NOON, decided=NOON - 1)


@pytest.mark.parametrize(
    ("output_tokens", "pico_per_token", "nano"),
    [(1, 499, 0), (1, 500, 1), (1, 1_499, 1), (3, 500, 2), (2, 499, 1), (5, 1_000, 5)],
)
def test_half_a_nano_unit_rounds_up_once_per_request(
    output_tokens: int, pico_per_token: int, nano: int
) -> None:
    text = TWO_TARIFFS.format(decides="arrival").replace(
        "output = 9_000", f"output = {pico_per_token}"
    )
    late = ms(dt.datetime(2025, 7, 1, tzinfo=dt.UTC))
    charge = price(
        usage(output=output_tokens), parse_price_book(text, source="x"), model="m", admitted=late
    )
    assert charge.amount_nano == nano


@given(
    blocks=st.integers(0, 10**5),
    misses=st.integers(1, 10**6),
    output=st.integers(0, 10**6),
    model=st.sampled_from(["deepseek-chat", "deepseek-reasoner"]),
    offset_ms=st.integers(0, 3 * 24 * 3600 * 1000),
)
def test_amount_is_the_rounded_sum_of_its_classes(
    blocks: int, misses: int, output: int, model: str, offset_ms: int
) -> None:
    charge = price(usage(64 * blocks, misses, output), model=model, admitted=NOON + offset_ms)
    exact = charge.hit_cost_pico + charge.miss_cost_pico + charge.output_cost_pico
    assert exact == (
        64 * blocks * charge.price_hit_pico
        + misses * charge.price_miss_pico
        + output * charge.price_output_pico
    )
    assert (
        -500 < exact - 1000 * charge.amount_nano <= 499 or exact - 1000 * charge.amount_nano == -500
    )
    as_misses = price(
        usage(0, 64 * blocks + misses, output), model=model, admitted=NOON + offset_ms
    )
    assert abs(as_misses.amount_nano - charge.amount_nano - charge.saved_nano) <= 1


def test_a_float_anywhere_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="decided_at_ms must be an int"):
        price(usage(misses=1), decided=NOON + 0.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="admitted_at_ms must be an int"):
        price(usage(misses=1), admitted=float(NOON))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="now_ms must be an int"):
        clamp_decided_at(1.0, admitted_at_ms=1, deadline_ms=2)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="amount_nano must be an int"):
        format_amount(0.1, "USD")  # type: ignore[arg-type]


def test_currency_that_the_book_lacks_is_named() -> None:
    with pytest.raises(ConfigError, match="no prices in 'EUR'"):
        compute_charge(
            BOOK,
            model="deepseek-chat",
            currency="EUR",
            usage=usage(),
            admitted_at_ms=NOON,
            decided_at_ms=NOON,
        )


@pytest.mark.parametrize(
    ("nano", "shown"),
    [
        (0, "0.000000000 USD"),
        (83_400, "0.000083400 USD"),
        (562_100 * 10**9, "562100.000000000 USD"),
        (-1, "-0.000000001 USD"),
        (-1_500_000_000, "-1.500000000 USD"),
    ],
)
def test_amounts_are_shown_with_all_nine_decimals(nano: int, shown: str) -> None:
    assert format_amount(nano, "USD") == shown
