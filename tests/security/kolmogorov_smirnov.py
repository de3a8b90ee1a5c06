"""Whether two samples can come from one distribution: the two-sample Kolmogorov-Smirnov test."""

import math
from collections.abc import Sequence


def largest_distance(one: Sequence[float], other: Sequence[float]) -> float:
    """Most by which the samples' cumulative distributions differ, from 0 to 1."""
    left, right = sorted(one), sorted(other)
    i = j = 0
    most = 0.0
    while i < len(left) and j < len(right):
        value = min(left[i], right[j])
        while i < len(left) and left[i] == value:
            i += 1
        while j < len(right) and right[j] == value:
            j += 1
        most = max(most, abs(i / len(left) - j / len(right)))
    return most


def p_value(one: Sequence[float], other: Sequence[float]) -> float:
    """Chance of a distance at least as large between two samples of one distribution.

    By Kolmogorov's limit with Stephens' correction (Numerical Recipes, 3rd ed., 14.3.3), good
    from some four observations on.
    """
    size = math.sqrt(len(one) * len(other) / (len(one) + len(other)))
    reach = (size + 0.12 + 0.11 / size) * largest_distance(one, other)
    if reach < 0.2:
        return 1.0
    terms = ((-1) ** (k - 1) * math.exp(-2 * (k * reach) ** 2) for k in range(1, 101))
    return min(1.0, max(0.0, 2 * math.fsum(terms)))
