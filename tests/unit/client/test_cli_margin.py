import pytest

from tidemill.client.cli_margin import _over_cost
from tidemill.client.margin import MarginRow


def total(*, cost_nano: int, revenue_nano: int) -> MarginRow:
    return MarginRow(
        tenant_id="",
        model="",
        hour_ms=0,
        phase="",
        tier="",
        tokens=0,
        accelerator_us=0,
        cost_nano=cost_nano,
        revenue_nano=revenue_nano,
    )


@pytest.mark.parametrize(
    ("margin_nano", "cost_nano", "said"),
    [
        (5, 1, "500.0"),
        (-1, 1, "-100.0"),
        (1, 2000, "0.1"),  # 0.05 %
        (-1, 2000, "-0.1"),
        (-1, 2001, "0.0"),
        (2, 3, "66.7"),
        (-2, 3, "-66.7"),
        (545_000_000_000_000_000_051, 100_000_000_000_000_000_000, "545.0"),
    ],
)
def test_margin_over_cost_is_exact_to_a_tenth_with_halves_away_from_zero(
    margin_nano: int, cost_nano: int, said: str
) -> None:
    row = total(cost_nano=cost_nano, revenue_nano=cost_nano + margin_nano)
    assert _over_cost(row) == f"margin is {said} % of cost, "


def test_nothing_is_said_of_a_margin_over_no_cost() -> None:
    assert not _over_cost(total(cost_nano=0, revenue_nano=7))
