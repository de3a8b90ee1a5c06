import pytest

from services.router.money.clock import offset_ms


@pytest.mark.parametrize(
    ("asked", "ledger", "answered", "expected"),
    [
        (1000, 1000, 1000, 0),
        (1000, 1004, 1010, 0),
        (1000, 400, 1010, 600),
        (1000, 1610, 1010, -600),
    ],
)
def test_an_offset_is_what_the_time_on_the_way_does_not_explain(
    asked: int, ledger: int, answered: int, expected: int
) -> None:
    assert offset_ms(asked, ledger, answered) == expected
