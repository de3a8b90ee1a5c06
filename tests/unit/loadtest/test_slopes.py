from math import exp
from random import Random

import pytest

from loadtest.slopes import slope, student

HOUR_S = 3600.0


def noisy(per_hour: float, *, seed: int, num: int = 360) -> tuple[list[float], list[float]]:
    """Half an hour of samples around a line, each half its predecessor's noise and half its own."""
    rng = Random(seed)
    times = [index * 5.0 for index in range(num)]
    noise, values = 0.0, []
    for at_s in times:
        noise = 0.5 * noise + rng.gauss(0, 5)
        values.append(1000 + per_hour * at_s / HOUR_S + noise)
    return times, values


@pytest.mark.parametrize(
    ("share", "freedom", "quantile"),
    [(0.975, 22, 2.0739), (0.995, 22, 2.8188), (0.9995, 22, 3.7921), (0.975, 10, 2.2281)],
)
def test_student_s_quantiles_are_those_of_the_tables(
    share: float, freedom: int, quantile: float
) -> None:
    assert student(share, freedom) == pytest.approx(quantile, rel=1e-3)


def test_a_leak_is_told_from_zero_and_its_size_is_near() -> None:
    found = slope(*noisy(60, seed=1), confidence=0.99, step=1)
    assert found.grows
    assert found.low < 60 < found.high
    assert found.per_hour == pytest.approx(60, rel=0.2)


def test_noise_about_a_level_grows_no_oftener_than_the_interval_allows() -> None:
    runs = [slope(*noisy(0, seed=seed), confidence=0.9, step=0) for seed in range(400)]
    assert sum(run.grows for run in runs) / len(runs) == pytest.approx(0.05, abs=0.03)


def test_the_late_rise_tells_what_levels_off_from_what_leaks() -> None:
    times, leak = noisy(3600, seed=3)
    found = slope(times, leak, confidence=0.99, step=1)
    assert found.late_rise == pytest.approx(found.rise / 2, rel=0.1)
    level = [
        value - at_s + 1800 * (1 - exp(-at_s / 300))
        for at_s, value in zip(times, leak, strict=True)
    ]
    levels_off = slope(times, level, confidence=0.99, step=1)
    assert levels_off.grows  # still: a longer run shows more, a looser rule would hide leaks
    assert levels_off.late_rise < levels_off.rise / 10


def test_what_shrinks_or_stands_still_does_not_grow() -> None:
    assert not slope(*noisy(-60, seed=2), confidence=0.99, step=1).grows
    still = slope([float(index) for index in range(100)], [26.0] * 100, confidence=0.99, step=1)
    assert (still.per_hour, still.low, still.high, still.grows) == (0, 0, 0, False)


def test_one_step_is_no_growth_wherever_it_comes_and_three_are() -> None:
    times = [index * 5.0 for index in range(360)]
    for at in range(20, 340, 20):
        one = [12.0 + (index >= at) for index in range(360)]
        found = slope(times, one, confidence=0.99, step=1)
        assert not found.grows
        assert 0 < found.rise <= 1.5
    three = [12.0 + index // 90 for index in range(360)]
    assert slope(times, three, confidence=0.99, step=1).grows


def test_too_few_samples_are_no_line() -> None:
    with pytest.raises(ValueError, match="too few"):
        slope([0.0, 1.0], [1.0, 1.0], confidence=0.95, step=1)
