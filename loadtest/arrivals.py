"""When requests arrive: open loop, whatever became of those before them.

Each function yields instants in seconds from the run's start, in order and without an end, near
`rate` requests a second on average. Pure: the random source is passed in.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from random import Random

Arrivals = Callable[[float, float, Random], Iterator[float]]  # rate, the run's seconds, random

BURST_SIZE = 8.0
_SWING = 0.9  # of the mean rate: at noon 1.9 times the mean, at midnight a tenth of it


def poisson(rate: float, run_s: float, rng: Random) -> Iterator[float]:
    """Independent customers."""
    del run_s
    at_s = 0.0
    while True:
        at_s += rng.expovariate(rate)
        yield at_s


def bursts(rate: float, run_s: float, rng: Random) -> Iterator[float]:
    """Groups of BURST_SIZE on average (geometric) at one instant; the groups are Poisson."""
    for at_s in poisson(rate / BURST_SIZE, run_s, rng):
        yield at_s
        while rng.random() >= 1 / BURST_SIZE:
            yield at_s


def diurnal(rate: float, run_s: float, rng: Random) -> Iterator[float]:
    """A day from midnight to midnight pressed into the run: a sine, by thinning."""
    peak = rate * (1 + _SWING)
    for at_s in poisson(peak, run_s, rng):
        now = rate * (1 - _SWING * math.cos(2 * math.pi * at_s / run_s))
        if rng.random() * peak < now:
            yield at_s


def replay(instants_s: Sequence[float], rate: float) -> Iterator[float]:
    """A trace's own instants, stretched to `rate`, over and over."""
    span_s = max(instants_s[-1] - instants_s[0], 1e-9)
    stretch = len(instants_s) / rate / span_s
    round_s = span_s * stretch
    for turn in count():
        for instant_s in instants_s:
            yield turn * round_s + (instant_s - instants_s[0]) * stretch
