"""Whether to fetch KV blocks or to compute them again, by what both have cost lately."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

_KEPT_OF_FETCHES = 0.7  # weight of the past after one fetch
_HALF_LIFE_BLOCKS = 256  # computed blocks that halve the weight of the past
_LEAST_SPREAD = 0.5  # of the amounts, relative to their mean, below which no latency is fitted


class Source(NamedTuple):
    """Where blocks come from, as far as it tells what they cost: who is asked, from which tier.

    `remote` says that whoever was asked has to send us on to another holder.
    """

    asked: str
    tier: str
    remote: bool = False


class Run(NamedTuple):
    """Consecutive blocks of a chain that one source holds."""

    source: Source
    num_blocks: int


@dataclass(frozen=True)
class FetchConfig:
    """What fetching may cost, relative to computing the same blocks.

    A fetch is begun if it should take less than `margin` times as long as computing, and is cut
    when it falls behind that by `slack` times the whole chain's compute time. A source that was
    too slow is tried again after `probe_s`, doubling up to `most_probe_s`. The default leaves room
    for the averages' error, so that a slow store costs less than a tenth; a large `margin` always
    fetches, which spares compute at any price.
    """

    margin: float = 0.85
    slack: float = 0.05
    probe_s: float = 10.0
    most_probe_s: float = 300.0

    def __post_init__(self) -> None:
        if not (self.margin > 0 and self.slack >= 0):
            raise ValueError("fetch margin must be above 0 and slack not below it")
        if not 0 < self.probe_s <= self.most_probe_s:
            raise ValueError("fetch probe_s must be above 0 and at most most_probe_s")


class Budget(NamedTuple):
    """How long the fetch of one chain may take: an allowance, and more with every landed block."""

    slack_s: float
    block_s: float

    def allowed_s(self, num_landed: int) -> float:
        """Seconds from the fetch's beginning within which one more block than these must land."""
        return self.slack_s + (num_landed + 1) * self.block_s


class CostLine:
    """Seconds as latency + amount * unit: a least-squares line through samples, old ones fading.

    While all amounts are much the same no latency can be told, and it is taken for 0.
    """

    def __init__(self) -> None:
        self._weight = self._x = self._t = self._xx = self._xt = 0.0

    @property
    def known(self) -> bool:
        """Whether there is any sample."""
        return self._weight > 0

    def add(self, amount: float, seconds: float, *, kept: float) -> None:
        """One sample, `amount` above 0; `kept` is the weight that is left to the past."""
        fresh = (1.0, amount, seconds, amount * amount, amount * seconds)
        past = (self._weight, self._x, self._t, self._xx, self._xt)
        self._weight, self._x, self._t, self._xx, self._xt = (
            kept * old + new for old, new in zip(past, fresh, strict=True)
        )

    def fit(self) -> tuple[float, float]:
        """(latency, unit), neither below 0."""
        mean, mean_s = self._x / self._weight, self._t / self._weight
        spread = self._xx / self._weight - mean * mean
        if spread <= (_LEAST_SPREAD * mean) ** 2:
            return 0.0, mean_s / mean
        unit = (self._xt / self._weight - mean * mean_s) / spread
        latency = mean_s - unit * mean
        if unit <= 0:  # noise: less took longer
            return 0.0, mean_s / mean
        return (latency, unit) if latency >= 0 else (0.0, self._xt / self._xx)

    def seconds(self, amount: float) -> float:
        """What `amount` should take."""
        latency, unit = self.fit()
        return latency + amount * unit


@dataclass
class _Past:
    """What is known of one source.

    `tried_at` is when it was last asked for blocks; `retried` that it was, though known as slow.
    """

    cost: CostLine = field(default_factory=CostLine)
    pause_s: float = 0.0
    tried_at: float = -math.inf
    retried: bool = False


class FetchOrRecompute:
    """Moving averages of both costs, and the choice by them. One worker's; not thread-safe.

    What is not known yet is tried: a source without samples is taken for quick, and as long as no
    prompt has been computed fetches have no budget.
    """

    def __init__(self, config: FetchConfig, *, clock: Callable[[], float]) -> None:
        self._config = config
        self._clock = clock
        self._compute = CostLine()
        self._past: dict[Source, _Past] = {}

    def computed(self, num_blocks: float, seconds: float) -> None:
        """So much was computed in this time; it need not be whole blocks."""
        self._compute.add(num_blocks, seconds, kept=0.5 ** (num_blocks / _HALF_LIFE_BLOCKS))

    def compute_s(self, num_blocks: float) -> float:
        """What computing so much more takes, beside what is computed in any case; inf: unknown."""
        return num_blocks * self._compute.fit()[1] if self._compute.known else math.inf

    def fetched(self, source: Source, num_blocks: int, seconds: float) -> None:
        """So much came from the source in this time.

        When a slow source was tried again and is quick, only that counts.
        """
        past = self._past.setdefault(source, _Past())
        quick = seconds <= self._config.margin * self.compute_s(num_blocks)
        if past.retried and quick:
            past.cost = CostLine()
        past.cost.add(num_blocks, seconds, kept=_KEPT_OF_FETCHES)
        past.tried_at, past.retried = self._clock(), False
        if quick:
            past.pause_s = 0.0
        else:
            longer = max(2 * past.pause_s, self._config.probe_s)
            past.pause_s = min(longer, self._config.most_probe_s)

    def cut(self, source: Source, num_blocks: int, num_landed: int, seconds: float) -> None:
        """Of `num_blocks` so many had landed when time was up; taken as if it had gone on so."""
        self.fetched(source, num_blocks, seconds * num_blocks / (num_landed + 1))

    def stalled(self, asked: str, num_blocks: int, seconds: float) -> None:
        """Whoever was asked had not even said in this time what it holds of so many blocks."""
        known = [source for source in self._past if source.asked == asked]
        for source in known or [_unnamed(asked)]:
            self.cut(source, num_blocks, 0, seconds)

    def fetch_s(self, source: Source, num_blocks: int) -> float | None:
        """What fetching so much from the source should take; None: not known."""
        past = self._past.get(source)
        return past.cost.seconds(num_blocks) if past else None

    def budget(self, num_blocks: int) -> Budget:
        """For fetching a chain of so many blocks, from however many sources."""
        slack_s = self._config.slack * self.compute_s(num_blocks)
        return Budget(slack_s, self._config.margin * self.compute_s(1))

    def worth_asking(self, asked: str, num_blocks: int) -> bool:
        """Whether any source behind `asked` might be quick enough for so many blocks."""
        known = [source for source in self._past if source.asked == asked]
        return not known or any(self._gain(Run(source, num_blocks)) > 0 for source in known)

    def choose(self, runs: Sequence[Run]) -> int:
        """How many blocks of a held chain, from its start on, are worth fetching.

        Costs are lines, so the best place to stop is the end of a run. A source that is due for
        another try counts as free, once.
        """
        best, most, index, gain = 0, 0.0, 0, 0.0
        for run in runs:
            self._past.pop(_unnamed(run.source.asked), None)
            index, gain = index + run.num_blocks, gain + self._gain(run)
            if gain > most or math.isinf(gain):
                best, most = index, gain
        self._note_retries(runs, best)
        return best

    def _note_retries(self, runs: Sequence[Run], num_blocks: int) -> None:
        index = 0
        for run in runs:
            index += run.num_blocks
            if index <= num_blocks and self._is_due(run.source):
                past = self._past[run.source]
                past.tried_at, past.retried = self._clock(), True

    def _gain(self, run: Run) -> float:
        """Seconds saved by fetching the run."""
        free = self._is_due(run.source)
        cost_s = 0.0 if free else self.fetch_s(run.source, run.num_blocks) or 0.0
        return self._config.margin * self.compute_s(run.num_blocks) - cost_s

    def _is_due(self, source: Source) -> bool:
        """Whether another try would tell something new."""
        past = self._past.get(source)
        return past is not None and 0 < past.pause_s <= self._clock() - past.tried_at


def _unnamed(asked: str) -> Source:
    """Stands for all that `asked` may hold until it has said what it holds."""
    return Source(asked, "")
