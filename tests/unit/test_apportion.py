import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidemill.apportion import apportion, round_together

WEIGHTS = st.lists(st.integers(0, 10**18), min_size=1, max_size=40)


@given(st.integers(-(10**15), 10**15), WEIGHTS)
def test_the_parts_are_the_whole_and_each_is_within_one_of_its_share(
    whole: int, weights: list[int]
) -> None:
    parts = apportion(whole, weights)
    assert sum(parts) == whole
    total = sum(weights)
    if total:
        assert all(
            abs(part * total - whole * weight) < total
            for part, weight in zip(parts, weights, strict=True)
        )


def test_what_is_left_goes_to_the_largest_remainders_and_of_equals_to_the_first() -> None:
    assert apportion(10, [1, 1, 1]) == [4, 3, 3]
    assert apportion(7, [10, 25, 65]) == [1, 2, 4]


def test_nothing_to_go_by_means_equal_parts() -> None:
    assert apportion(5, [0, 0]) == [3, 2]


@pytest.mark.parametrize("weights", [[], [3, -1]])
def test_weights_that_mean_nothing_are_refused(weights: list[int]) -> None:
    with pytest.raises(ValueError, match="cannot split"):
        apportion(1, weights)


@given(st.lists(st.integers(-(10**15), 10**15), max_size=40), st.integers(1, 10**12))
def test_numbers_rounded_together_sum_to_their_sum_rounded_once(
    numerators: list[int], denominator: int
) -> None:
    parts = round_together(numerators, denominator)
    exact = sum(numerators)
    assert -denominator <= 2 * (exact - sum(parts) * denominator) < denominator
    assert all(
        abs(part * denominator - numerator) < denominator
        for part, numerator in zip(parts, numerators, strict=True)
    )
