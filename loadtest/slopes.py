"""Whether a series grows: a straight line through it, and how sure its slope is. Pure.

Samples taken seconds apart resemble each other, which would make a line through all of them look
surer than it is. So the line goes through the means of NUM_BATCHES stretches of equal length (the
method of batch means), and its interval is Student's for that many points.

Memory and threads come in steps, and a step that some late peak of load took for good is a rise of
which a line is certain. So a series grows only if it also rose by more than two of its steps: a
line through a single one rises by one and a half at most.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist, fmean

NUM_BATCHES = 24
_LATE = slice(NUM_BATCHES // 2, None)


@dataclass(frozen=True, slots=True)
class Slope:
    """Units an hour, with a confidence interval around it; `mean` is the series' own.

    `rise` is the line's in all, `late_rise` that of a line through the second half alone: half of
    `rise` where something leaks, next to nothing where it levels off; told, and no part of the
    verdict, since half the samples are too few to tell a small leak from none. `step` is the least
    by which the series changes.
    """

    mean: float
    per_hour: float
    low: float
    high: float
    rise: float
    late_rise: float
    step: float

    @property
    def grows(self) -> bool:
        """Whether it is told from zero, upwards, and from a single step."""
        return self.low > 0 and self.rise > 2 * self.step


def slope(
    times_s: Sequence[float], values: Sequence[float], *, confidence: float, step: float
) -> Slope:
    """Least squares over batch means. ValueError for fewer than NUM_BATCHES samples."""
    if len(times_s) < NUM_BATCHES:
        raise ValueError(f"{len(times_s)} samples are too few for {NUM_BATCHES} batches")
    xs, ys = _batch_means(times_s, values)
    mean_x, mean_y, spread, tilt = _line(xs, ys)
    rest = sum((y - mean_y - tilt * (x - mean_x)) ** 2 for x, y in zip(xs, ys, strict=True))
    freedom = NUM_BATCHES - 2
    reach = student(0.5 + confidence / 2, freedom) * sqrt(rest / freedom / spread)
    return Slope(
        mean=fmean(values),
        per_hour=tilt * 3600,
        low=(tilt - reach) * 3600,
        high=(tilt + reach) * 3600,
        rise=tilt * (times_s[-1] - times_s[0]),
        late_rise=_line(xs[_LATE], ys[_LATE])[-1] * (times_s[-1] - times_s[len(times_s) // 2]),
        step=step,
    )


def student(share: float, freedom: int) -> float:
    """Quantile of Student's t, by the normal's and four terms (Abramowitz and Stegun 26.7.5).

    Within a thousandth of the true value from ten degrees of freedom on, up to the 99.9th percent.
    """
    z = NormalDist().inv_cdf(share)
    terms: tuple[float, ...] = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / float(freedom**power) for power, term in enumerate(terms, start=1))


def _line(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float, float, float]:
    """Least squares: mean x, mean y, the xs' sum of squares about their mean, the slope."""
    mean_x, mean_y = fmean(xs), fmean(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    tilt = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread
    return mean_x, mean_y, spread, tilt


def _batch_means(
    times_s: Sequence[float], values: Sequence[float]
) -> tuple[list[float], list[float]]:
    edges = [len(times_s) * index // NUM_BATCHES for index in range(NUM_BATCHES + 1)]
    batches = [slice(edges[index], edges[index + 1]) for index in range(NUM_BATCHES)]
    return [fmean(times_s[each]) for each in batches], [fmean(values[each]) for each in batches]
