import random

import pytest

from tests.security.kolmogorov_smirnov import largest_distance, p_value


def test_the_distance_is_that_of_the_cumulative_distributions() -> None:
    assert largest_distance([1, 2, 3], [1, 2, 3]) == 0
    assert largest_distance([1, 2], [3, 4]) == 1
    assert largest_distance(range(10), range(5, 15)) == pytest.approx(0.5)
    assert largest_distance([1, 1, 1, 2], [1, 2, 2, 2]) == pytest.approx(0.5), "ties count once"


def test_the_chance_of_a_distance_is_the_published_one() -> None:
    """Smirnov's table: at 5 % the critical distance is 1.358 sqrt((n + m) / nm), at 0.1 % 1.949."""
    for reach, chance in ((1.358, 0.05), (1.628, 0.01), (1.949, 0.001)):
        shift = round(reach * (2 / 10_000) ** 0.5 * 10_000)
        one, other = range(10_000), range(shift, 10_000 + shift)
        assert p_value(one, other) == pytest.approx(chance, rel=0.05)


def test_equal_distributions_are_told_apart_as_rarely_as_the_chance_says() -> None:
    rng = random.Random(5)
    chances = [
        p_value([rng.gauss(0, 1) for _ in range(80)], [rng.gauss(0, 1) for _ in range(80)])
        for _ in range(400)
    ]
    assert 4 <= sum(chance < 0.05 for chance in chances) <= 36


def test_a_shift_of_a_third_of_the_spread_is_certain_from_two_thousand() -> None:
    rng = random.Random(6)
    one = [rng.gauss(0, 6) for _ in range(2000)]
    other = [rng.gauss(2, 6) for _ in range(2000)]
    assert p_value(one, other) < 1e-12
