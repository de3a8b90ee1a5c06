import datetime as dt
from pathlib import Path

import pytest

from services.router.quote import reachable_windows, worst_case_nano
from tidemill.billing import PriceBook, Usage, compute_charge, load_price_book

BOOK_PATH = Path(__file__).parents[3] / "prices" / "deepseek-2025-02.toml"
HOUR_MS = 3_600_000


@pytest.fixture(scope="module")
def book() -> PriceBook:
    return load_price_book(BOOK_PATH)


def at(clock: str) -> int:
    """Milliseconds of a time in Shanghai on 1 July 2025."""
    return int(dt.datetime.fromisoformat(f"2025-07-01T{clock}+08:00").timestamp() * 1000)


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
def test_windows_that_the_end_may_fall_into(
    book: PriceBook, admitted: str, hours: float, names: list[str]
) -> None:
    start = at(admitted)
    tariff = book.tariff_at("deepseek-chat", start)
    found = reachable_windows(tariff, start, start + int(hours * HOUR_MS))
    assert [window.name for window in found] == names


@pytest.mark.parametrize("admitted", ["08:00", "12:00", "03:00", "00:29"])
@pytest.mark.parametrize("currency", ["USD", "CNY"])
def test_no_charge_exceeds_the_worst_case(book: PriceBook, admitted: str, currency: str) -> None:
    start = at(admitted)
    deadline = start + HOUR_MS
    worst = worst_case_nano(
        book,
        price_model="deepseek-chat",
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
            book,
            model="deepseek-chat",
            currency=currency,
            usage=usage,
            admitted_at_ms=start,
            decided_at_ms=decided,
        ).amount_nano
        for decided in (start, start + HOUR_MS // 2, deadline)
    ]
    assert max(charges) == worst
