import itertools
import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidemill.billing import BusyPart
from tidemill.billing.margin import (
    HOUR_MS,
    Cell,
    Dimension,
    Figures,
    Margin,
    WorkerHour,
    hour_of,
)

HOUR_NANO = 2_000_000_000  # 2 dollars
HOUR_US = 3_600_000_000
NOON = 1_740_657_600_000  # 27 February 2025, 12:00 UTC


def record(
    *,
    at_ms: int = NOON,
    model: str = "m",
    hit: int = 0,
    miss: int = 0,
    output: int = 0,
    reused: dict[str, int] | None = None,
    prices: tuple[int, int, int] = (140_000, 550_000, 2_190_000),
    busy: Sequence[BusyPart] = (),
) -> dict[str, Any]:
    """As the ledger keeps it; prices are pico-units a token."""
    pico = [tokens * price for tokens, price in zip((hit, miss, output), prices, strict=True)]
    tiers = dict.fromkeys(("device", "host", "cache_ram", "cache_disk", "peer"), 0)
    tiers |= {"device": hit} if reused is None else reused
    return {
        "model": model,
        "decided_at_ms": at_ms,
        "cache_hit_tokens": hit,
        "cache_miss_tokens": miss,
        "completion_tokens": output,
        **{f"reused_{tier}_tokens": count for tier, count in tiers.items()},
        **dict(zip(("hit_cost_pico", "miss_cost_pico", "output_cost_pico"), pico, strict=True)),
        "amount_nano": (sum(pico) + 500) // 1000,
        "busy": [part.to_json() for part in busy],
    }


def busy(prefill_us: int, decode_us: int, accelerators: int = 1) -> list[BusyPart]:
    return [
        BusyPart("w", "prefill", prefill_us, accelerators),
        BusyPart("w", "decode", decode_us, accelerators),
    ]


def settle(margin: Margin, tenant_id: str, found: dict[str, Any]) -> None:
    margin.work(tenant_id, found)
    margin.charge(tenant_id, found)


def worker_hour(
    prefill_us: int, decode_us: int, uptime_us: int = HOUR_US, **fields: Any
) -> WorkerHour:
    fields = {"worker_id": "w", "model": "m", "hour_ms": NOON, "accelerators": 1, **fields}
    return WorkerHour(prefill_us=prefill_us, decode_us=decode_us, uptime_us=uptime_us, **fields)


def total(rows: list[tuple[Cell, Figures]]) -> Figures:
    return sum((figures for _, figures in rows), Figures())


def test_a_day_of_deepseek_costs_87072_dollars_and_earns_545_percent_over_cost() -> None:
    """226.75 nodes of 8 H800 at 2 dollars an hour (open-infra-index, day 6), 42:58 by phase."""
    margin = Margin()
    for number in range(24):
        at_ms = NOON + number * HOUR_MS
        spent = busy(HOUR_US * 42 // 100, HOUR_US * 58 // 100, accelerators=1814)
        margin.work("all", record(at_ms=at_ms, busy=spent))
    sold = record(hit=342 * 10**9, miss=266 * 10**9, output=168 * 10**9)
    sold["amount_nano"] = 562_027 * 10**9  # published; 562,100 of the rounded counts
    margin.charge("all", sold)
    ((_, day),) = margin.rows([], hour_nano=HOUR_NANO)
    assert day.cost_nano == 87_072 * 10**9
    assert day.margin_nano == 474_955 * 10**9
    assert day.margin_nano * 100 // day.cost_nano == 545
    (decode, prefill) = margin.rows([Dimension.PHASE], hour_nano=HOUR_NANO)
    assert decode[1].cost_nano == 87_072 * 10**9 * 58 // 100
    assert prefill[1].revenue_nano + decode[1].revenue_nano == 562_027 * 10**9


def test_a_request_is_booked_by_phase_and_tier() -> None:
    margin = Margin()
    reused = {"device": 64, "cache_disk": 128}
    settle(
        margin,
        "acme",
        record(hit=192, miss=8, output=10, reused=reused, busy=busy(3_000_000, 9_000_000, 4)),
    )
    rows = {
        (cell.phase, cell.tier): figures
        for cell, figures in margin.rows([Dimension.PHASE, Dimension.TIER], hour_nano=HOUR_NANO)
    }
    assert rows == {
        ("prefill", "device"): Figures(tokens=64, revenue_nano=8_960),
        ("prefill", "cache_disk"): Figures(tokens=128, revenue_nano=17_920),
        ("prefill", "computed"): Figures(
            tokens=8, accelerator_us=12_000_000, cost_nano=6_666_667, revenue_nano=4_400
        ),
        ("decode", "output"): Figures(
            tokens=10, accelerator_us=36_000_000, cost_nano=20_000_000, revenue_nano=21_900
        ),
    }


def test_what_nobody_pays_for_costs_as_well() -> None:
    margin = Margin()
    margin.work(
        "acme",
        {
            "model": "m",
            "decided_at_ms": NOON,
            "busy": [part.to_json() for part in busy(0, 18_000_000)],
        },
    )
    ((cell, lost),) = margin.rows([Dimension.TENANT], hour_nano=HOUR_NANO)
    assert cell.tenant_id == "acme"
    assert (lost.cost_nano, lost.revenue_nano, lost.margin_nano) == (10**7, 0, -(10**7))


def test_a_refund_lessens_the_revenue_of_its_own_hour_as_the_charge_was_split() -> None:
    margin = Margin()
    charged = record(hit=64, miss=36, output=100)
    settle(margin, "acme", charged)
    margin.refund("acme", charged, at_ms=NOON + HOUR_MS + 5, amount_nano=charged["amount_nano"])
    rows = margin.rows([Dimension.HOUR, Dimension.TIER], hour_nano=HOUR_NANO)
    first = {cell.tier: figures.revenue_nano for cell, figures in rows if cell.hour_ms == NOON}
    second = {cell.tier: figures.revenue_nano for cell, figures in rows if cell.hour_ms > NOON}
    assert first == {"device": 8_960, "computed": 19_800, "output": 219_000}
    assert second == {tier: -nano for tier, nano in first.items()}
    assert total(rows).revenue_nano == 0


def test_time_that_no_request_tells_of_and_idle_time_are_rows_of_their_own() -> None:
    margin = Margin()
    margin.worker_hour(worker_hour(10_000, 20_000, accelerators=8))
    margin.work("acme", record(busy=busy(9_000, 18_500, 8)))
    rows = margin.rows([Dimension.TENANT], hour_nano=HOUR_NANO)
    by_name = {cell.tenant_id or cell.phase: figures.accelerator_us for cell, figures in rows}
    assert by_name == {
        "acme": 8 * 27_500,
        "unattributed": 8 * 2_500,
        "idle": 8 * (HOUR_US - 30_000),
    }
    assert total(rows).cost_nano == 8 * HOUR_NANO


def test_work_told_of_in_the_hour_after_it_is_made_up_for_there() -> None:
    margin = Margin()
    margin.worker_hour(worker_hour(0, 5_000))
    margin.worker_hour(worker_hour(0, 0, hour_ms=NOON + HOUR_MS))
    margin.work("acme", record(at_ms=NOON + HOUR_MS, busy=busy(0, 5_000)))
    rows = margin.rows([Dimension.HOUR], hour_nano=HOUR_NANO)
    untold = {c.hour_ms: f.accelerator_us for c, f in rows if c.phase == "unattributed"}
    assert untold == {NOON: 5_000, NOON + HOUR_MS: -5_000}
    assert total(rows).cost_nano == 2 * HOUR_NANO


def test_work_for_accounts_of_another_currency_is_told_of_and_not_shown() -> None:
    margin = Margin()
    margin.worker_hour(worker_hour(0, 7_000))
    margin.work("euro", record(busy=busy(0, 6_000)), of_currency=False)
    rows = margin.rows([Dimension.TENANT, Dimension.PHASE], hour_nano=HOUR_NANO)
    assert {cell.phase: figures.accelerator_us for cell, figures in rows} == {
        "unattributed": 1_000,
        "idle": HOUR_US - 7_000,
    }


BYS = [by for n in range(6) for by in itertools.combinations(Dimension, n)]


@given(st.integers(0, 2**32), st.integers(0, 10**13))
def test_sums_over_any_dimensions_agree_to_the_nano_unit(seed: int, hour_nano: int) -> None:
    rng = random.Random(seed)
    margin = Margin()
    for _ in range(rng.randint(1, 8)):
        spent = busy(rng.randrange(10**7), rng.randrange(10**7), rng.randint(1, 8))
        found = record(
            at_ms=NOON + rng.randrange(3) * HOUR_MS,
            model=rng.choice("mn"),
            hit=64 * rng.randrange(3),
            miss=rng.randrange(100),
            output=rng.randrange(100),
            prices=(rng.randrange(10**6), rng.randrange(10**6), rng.randrange(10**7)),
            busy=spent,
        )
        settle(margin, rng.choice(["acme", "bob"]), found)
        if rng.random() < 0.3 and found["amount_nano"]:
            margin.refund(
                "acme", found, at_ms=NOON, amount_nano=rng.randint(1, found["amount_nano"])
            )
    for hour in range(3):
        prefill_us, decode_us = (rng.randrange(10**9) for _ in range(2))
        margin.worker_hour(worker_hour(prefill_us, decode_us, hour_ms=NOON + hour * HOUR_MS))
    cells = margin.rows(list(Dimension), hour_nano=hour_nano)
    for by in BYS:
        rows = margin.rows(by, hour_nano=hour_nano)
        assert total(rows) == total(cells)
        for cell, figures in rows:
            assert total([(c, f) for c, f in cells if c.only(by) == cell]) == figures
    for hour in range(3):
        of_hour = total([row for row in cells if row[0].hour_ms == NOON + hour * HOUR_MS])
        exact = of_hour.accelerator_us * hour_nano
        assert of_hour.cost_nano == (2 * exact + HOUR_US) // (2 * HOUR_US)


def test_hours_begin_at_the_full_hour_of_utc() -> None:
    assert hour_of(NOON) == hour_of(NOON + HOUR_MS - 1) == NOON
    assert hour_of(NOON - 1) == NOON - HOUR_MS


@pytest.mark.parametrize(
    "fields", [("p", "idle", 1, 1), ("p", "prefill", -1, 1), ("p", "decode", 1, 0)]
)
def test_a_busy_part_that_cannot_be_is_refused(fields: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match=r"phase|negative|accelerators"):
        BusyPart(*fields)
    with pytest.raises(TypeError):
        BusyPart("p", "prefill", 0.5)  # type: ignore[arg-type]


def test_a_busy_part_survives_the_journal() -> None:
    part = BusyPart("p", "prefill", 17, 8)
    assert BusyPart.from_json(part.to_json()) == part
