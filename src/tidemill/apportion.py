"""Parts that add up to the whole, in integers: the largest-remainder method."""

from collections.abc import Sequence


def apportion(whole: int, weights: Sequence[int]) -> list[int]:
    """Split `whole` in proportion to `weights`, none of them negative; the parts sum to `whole`.

    Each part is its exact share rounded down, or one more. Weights that are all 0 count as equal.
    Raises ValueError for a negative weight, or none at all.
    """
    if not weights or min(weights) < 0:
        raise ValueError(f"cannot split by {list(weights)}")
    total = sum(weights)
    if total == 0:
        weights, total = [1] * len(weights), len(weights)
    return round_together([whole * weight for weight in weights], total)


def round_together(numerators: Sequence[int], denominator: int) -> list[int]:
    """Each numerator / `denominator`, above 0, as a whole number: they sum to their rounded sum.

    The sum is rounded half up, each part is rounded down, or one more: what is left goes to the
    largest remainders, of equal ones to the first.
    """
    shares = [divmod(numerator, denominator) for numerator in numerators]
    parts = [part for part, _ in shares]
    left = (2 * sum(numerators) + denominator) // (2 * denominator) - sum(parts)
    if left:
        by_remainder = sorted(range(len(shares)), key=lambda index: -shares[index][1])
        for index in by_remainder[:left]:
            parts[index] += 1
    return parts
