"""What a request may cost, told before it runs: bounds, expectations and cheaper hours."""

import datetime as dt
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidemill.billing import (
    Cheaper,
    Prices,
    Reuse,
    Tokens,
    Usage,
    cheaper_window,
    compute_charge,
    dearest,
    expected_nano,
    hold_nano,
    load_price_book,
    parse_price_book,
    payable_output_tokens,
    reachable_windows,
    worst_case_nano,
)
from tidemill.errors import ConfigError

PRICES = Path(__file__).parents[3] / "prices"
BOOK = load_price_book(PRICES / "deepseek-2025-02.toml")
HISTORY = load_price_book(PRICES / "deepseek.toml")
HOUR_MS = 3_600_000


def at(clock: str, *, day: str = "2025-07-01") -> int:
    """Milliseconds of a time in Shanghai."""
    return int(dt.datetime.fromisoformat(f"{day}T{clock}+08:00").timestamp() * 1000)


@pytest.mark.parametrize(
    ("admitted", "hours", "names"),
    [
        ("12:00", 1, ["standard"]),
        ("03:00", 1, ["off-peak"]),
        ("08:00", 1, ["off-peak", "standard"]),
        ("08:00", 0.5, ["off-peak", "standard"]),
        ("08:00", 0.49, ["off-peak"]),
        ("23:59", 2, ["standard", "off-peak"]),
        ("08:00", 18, ["off-peak", "standard", "off-peak"]),
    ],
)
def test_windows_that_the_end_may_fall_into(admitted: str, hours: float, names: list[str]) -> None:
    start = at(admitted)
    tariff = BOOK.tariff_at("deepseek-chat", start)
    found = reachable_windows(tariff, start, start + int(hours * HOUR_MS))
    assert [window.name for window in found] == names


def test_only_the_window_of_admission_is_reached_where_arrival_decides() -> None:
    text = (PRICES / "deepseek-2025-02.toml").read_text(encoding="utf-8")
    book = parse_price_book(text.replace('"completion"', '"arrival"'), source="arrival.toml")
    tariff = book.tariff_at("deepseek-chat", at("08:00"))
    reached = reachable_windows(tariff, at("08:00"), at("20:00"))
    assert [window.name for window in reached] == ["off-peak"]


@pytest.mark.parametrize("admitted", ["08:00", "12:00", "03:00", "00:29"])
@pytest.mark.parametrize("currency", ["USD", "CNY"])
def test_no_charge_exceeds_the_worst_case(admitted: str, currency: str) -> None:
    start = at(admitted)
    deadline = start + HOUR_MS
    worst = worst_case_nano(
        BOOK,
        model="deepseek-chat",
        currency=currency,
        num_prompt_tokens=1001,
        max_tokens=333,
        admitted_at_ms=start,
        deadline_ms=deadline,
    )
    usage = Usage(
        prompt_tokens=1001, computed_tokens=1001, completion_tokens=333, generated_tokens=333
    )
    charges = [
        compute_charge(
            BOOK,
            model="deepseek-chat",
            currency=currency,
            usage=usage,
            admitted_at_ms=start,
            decided_at_ms=decided,
        ).amount_nano
        for decided in (start, start + HOUR_MS // 2, deadline)
    ]
    assert max(charges) == worst


@given(
    hits=st.integers(0, 50).map(lambda blocks: blocks * 64),
    misses=st.integers(1, 5000),
    output=st.integers(0, 5000),
    admitted=st.integers(0, 24 * HOUR_MS),
    lasts=st.integers(0, 24 * HOUR_MS),
    model=st.sampled_from(sorted(BOOK.models)),
)
def test_what_is_held_at_the_dearest_prices_pays_every_charge(
    *, hits: int, misses: int, output: int, admitted: int, lasts: int, model: str
) -> None:
    start = at("00:00") + admitted
    prices = dearest(
        BOOK, model=model, currency="USD", admitted_at_ms=start, deadline_ms=start + lasts
    )
    held = hold_nano(prices, num_prompt_tokens=hits + misses, num_output_tokens=output)
    charge = compute_charge(
        BOOK,
        model=model,
        currency="USD",
        usage=Usage(
            prompt_tokens=hits + misses,
            computed_tokens=misses,
            reused=Reuse(device=hits),
            completion_tokens=output,
            generated_tokens=output,
        ),
        admitted_at_ms=start,
        decided_at_ms=start + lasts,
    )
    assert charge.amount_nano <= held


def test_dearest_takes_each_class_from_the_windows_within_reach() -> None:
    night, day = at("03:00"), at("12:00")
    chat = {"model": "deepseek-chat", "currency": "USD"}
    low = Prices(hit=35_000, miss=135_000, output=550_000)
    high = Prices(hit=70_000, miss=270_000, output=1_100_000)
    assert dearest(BOOK, **chat, admitted_at_ms=night, deadline_ms=at("08:29")) == low
    assert dearest(BOOK, **chat, admitted_at_ms=night, deadline_ms=at("08:30")) == high
    assert dearest(BOOK, **chat, admitted_at_ms=day, deadline_ms=day + 24 * HOUR_MS) == high
    with pytest.raises(ConfigError, match="has no prices in 'EUR'"):
        dearest(BOOK, model="deepseek-chat", currency="EUR", admitted_at_ms=day, deadline_ms=day)


def test_a_hold_is_rounded_up() -> None:
    prices = Prices(hit=0, miss=1, output=1)
    assert hold_nano(prices, num_prompt_tokens=0, num_output_tokens=0) == 0
    assert hold_nano(prices, num_prompt_tokens=1, num_output_tokens=0) == 1
    assert hold_nano(prices, num_prompt_tokens=600, num_output_tokens=400) == 1
    assert hold_nano(prices, num_prompt_tokens=601, num_output_tokens=400) == 2


@given(
    miss=st.integers(0, 10_000),
    output=st.integers(1, 10_000),
    prompt=st.integers(0, 1000),
    held=st.integers(0, 100_000),
)
def test_payable_tokens_are_the_most_that_a_hold_pays_for(
    miss: int, output: int, prompt: int, held: int
) -> None:
    prices = Prices(hit=0, miss=miss, output=output)
    tokens = payable_output_tokens(prices, held_nano=held, num_prompt_tokens=prompt)
    assert tokens is not None
    assert (tokens >= 0) == (
        hold_nano(prices, num_prompt_tokens=prompt, num_output_tokens=0) <= held
    )
    if tokens >= 0:
        costs = [
            hold_nano(prices, num_prompt_tokens=prompt, num_output_tokens=tokens + more)
            for more in (0, 1)
        ]
        assert costs[0] <= held < costs[1]


def test_free_output_is_payable_without_end_once_the_prompt_is() -> None:
    prices = Prices(hit=0, miss=1000, output=0)
    assert payable_output_tokens(prices, held_nano=5, num_prompt_tokens=5) is None
    assert payable_output_tokens(prices, held_nano=4, num_prompt_tokens=5) == -1


@pytest.mark.parametrize("clock", ["00:00", "00:30", "12:00"])
def test_what_is_expected_is_what_is_charged(clock: str) -> None:
    instant = at(clock)
    expected = expected_nano(
        BOOK,
        model="deepseek-reasoner",
        currency="CNY",
        tokens=Tokens(hit=64, miss=37, output=11),
        at_ms=instant,
    )
    usage = Usage(
        prompt_tokens=101,
        computed_tokens=37,
        reused=Reuse(device=64),
        completion_tokens=11,
        generated_tokens=11,
    )
    charge = compute_charge(
        BOOK,
        model="deepseek-reasoner",
        currency="CNY",
        usage=usage,
        admitted_at_ms=instant,
        decided_at_ms=instant,
    )
    assert expected == charge.amount_nano


def cheaper(clock: str, hours: int, tokens: Tokens) -> Cheaper | None:
    return cheaper_window(
        BOOK,
        model="deepseek-chat",
        currency="USD",
        tokens=tokens,
        at_ms=at(clock),
        horizon_ms=at(clock) + hours * HOUR_MS,
    )


def test_the_next_cheaper_window_is_named_with_its_price() -> None:
    found = cheaper("12:00", 24, Tokens(miss=1000, output=1000))
    assert found == Cheaper(
        starts_at_ms=at("00:30", day="2025-07-02"), window="off-peak", amount_nano=685_000
    )


def test_a_window_that_starts_at_the_horizon_counts() -> None:
    found = [
        cheaper_window(
            BOOK,
            model="deepseek-chat",
            currency="USD",
            tokens=Tokens(output=1),
            at_ms=at("12:00"),
            horizon_ms=at("00:30", day="2025-07-02") + late_ms,
        )
        for late_ms in (-1, 0)
    ]
    assert [each is not None for each in found] == [False, True]


def test_no_cheaper_window_is_none() -> None:
    assert cheaper("03:00", 48, Tokens(output=1)) is None  # the cheapest already
    assert cheaper("12:00", 12, Tokens(output=1)) is None  # half an hour beyond the horizon
    assert cheaper("12:00", 24, Tokens()) is None  # nothing costs nothing at any hour


def cheaper_in_history(model: str, day: str, clock: str, *, days: int) -> Cheaper | None:
    return cheaper_window(
        HISTORY,
        model=model,
        currency="USD",
        tokens=Tokens(output=1_000_000),
        at_ms=at(clock, day=day),
        horizon_ms=at(clock, day=day) + days * 24 * HOUR_MS,
    )


def test_a_price_list_to_come_counts_as_cheaper() -> None:
    found = cheaper_in_history("deepseek-chat", "2025-09-28", "12:00", days=7)
    start = at("00:00", day="2025-09-29")
    assert found == Cheaper(starts_at_ms=start, window="standard", amount_nano=420_000_000)


def test_nothing_is_known_to_be_cheaper_beyond_the_calendar() -> None:
    found = cheaper_in_history("deepseek-flash", "2026-12-31", "17:00", days=7)
    assert found is not None
    assert found.starts_at_ms == at("18:00", day="2026-12-31")
    assert cheaper_in_history("deepseek-flash", "2026-12-31", "18:00", days=7) is None


def test_a_price_list_in_other_currencies_is_no_offer() -> None:
    text = (PRICES / "deepseek.toml").read_text(encoding="utf-8")
    later = text.index("effective_from = 2025-09-29")
    usd = text.index("prices.USD", later)
    in_yuan = (
        text[:later] + 'currencies = ["CNY"]\n' + text[later:usd] + text[text.index("\n", usd) :]
    )
    book = parse_price_book(in_yuan, source="yuan.toml")
    now = at("12:00", day="2025-09-28")
    for currency, amount in (("CNY", 3 * 10**9), ("USD", None)):
        found = cheaper_window(
            book,
            model="deepseek-chat",
            currency=currency,
            tokens=Tokens(output=1_000_000),
            at_ms=now,
            horizon_ms=now + 24 * HOUR_MS,
        )
        assert (found.amount_nano if found else None) == amount


def test_no_hold_is_sized_across_the_end_of_the_calendar() -> None:
    late = at("23:50", day="2026-12-31")
    flash = {"model": "deepseek-flash", "currency": "USD"}
    end = at("23:59", day="2026-12-31")
    assert dearest(HISTORY, **flash, admitted_at_ms=late, deadline_ms=end).output == 600_000
    with pytest.raises(ConfigError, match="calendar 'cn' does not cover 2027"):
        dearest(HISTORY, **flash, admitted_at_ms=late, deadline_ms=late + HOUR_MS)
