"""The day that DeepSeek published (27 to 28 February 2025): tokens, nodes, revenue and cost.

open-infra-index, 202502OpenSourceWeek, day 6: 608 B input tokens of which 342 B were hits, 168 B
output tokens, 226.75 nodes of 8 H800 at $2 an hour; $562,027 if all were sold at R1's price,
$87,072 spent, a margin of 545 %.
"""

import datetime as dt
from pathlib import Path

from tidemill.billing import Reuse, Usage, compute_charge, load_price_book

BOOK = load_price_book(Path(__file__).parents[3] / "prices" / "deepseek.toml")
NOON = int(dt.datetime(2025, 2, 27, 4, tzinfo=dt.UTC).timestamp() * 1000)
BILLION, NANO = 10**9, 10**9
HALF = BILLION // 2  # counts are published in whole billions

INPUT, HITS, OUTPUT = 608 * BILLION, 342 * BILLION, 168 * BILLION
REVENUE, COST, MARGIN_PERCENT = 562_027, 87_072, 545

# Nodes in use by Beijing time, read off the published chart: until that hour, so many.
NODES = [
    ("01:15", 218), ("02:00", 188), ("02:45", 158), ("03:00", 128), ("03:30", 98), ("06:30", 68),
    ("07:00", 98), ("07:30", 128), ("08:00", 188), ("08:30", 218), ("24:00", 278),
]  # fmt: skip


def revenue_nano(model: str, *, inputs: int, hits: int, output: int) -> int:
    usage = Usage(
        prompt_tokens=inputs,
        computed_tokens=inputs - hits,
        reused=Reuse(cache_disk=hits),
        completion_tokens=output,
        generated_tokens=output,
    )
    charge = compute_charge(
        BOOK,
        model=model,
        currency="USD",
        usage=usage,
        admitted_at_ms=NOON,
        decided_at_ms=NOON,
    )
    return charge.amount_nano


def test_the_published_revenue_lies_where_rounded_counts_allow() -> None:
    model = "deepseek-reasoner"
    rounded = revenue_nano(model, inputs=INPUT, hits=HITS, output=OUTPUT)
    least = revenue_nano(model, inputs=INPUT - HALF, hits=HITS + HALF, output=OUTPUT - HALF)
    most = revenue_nano(model, inputs=INPUT + HALF, hits=HITS - HALF, output=OUTPUT + HALF)
    assert (least, rounded, most) == (560_525 * NANO, 562_100 * NANO, 563_675 * NANO)
    assert least <= REVENUE * NANO <= most
    # One set of counts that rounds to the published ones and gives the dollar that was published:
    output = OUTPUT - 33_333_333
    assert (output + HALF) // BILLION == OUTPUT // BILLION
    exact = revenue_nano(model, inputs=INPUT, hits=HITS, output=output)
    assert abs(exact - REVENUE * NANO) < NANO // 2


def test_all_of_it_at_the_price_of_v3() -> None:
    amount = revenue_nano("deepseek-chat", inputs=INPUT, hits=HITS, output=OUTPUT)
    assert amount == 280_560 * NANO


def test_nodes_times_hours_cost_what_was_published() -> None:
    quarter_hours, begin = 0, 0
    for clock, nodes in NODES:
        hours, minutes = map(int, clock.split(":"))
        end = hours * 4 + minutes // 15
        quarter_hours += nodes * (end - begin)
        begin = end
    assert quarter_hours == 226.75 * 96  # the mean over the day, exactly
    assert quarter_hours * 8 * 2 / 4 == COST  # 8 GPUs, $2 an hour


def test_the_margin_is_profit_over_cost() -> None:
    assert (REVENUE - COST) * 100 // COST == MARGIN_PERCENT
