"""Time between the tokens that clients are told of (ITL), counted at next to no cost a message."""

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable
from itertools import accumulate

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1, 2.5, 10)
_LABELS_S = (*(str(float(bound)) for bound in _BOUNDS_S), "+Inf")


class _Gaps:
    """Of one model: how many fell into each bucket, and their sum in seconds."""

    __slots__ = ("counts", "sum_s")

    def __init__(self) -> None:
        self.counts = [0] * len(_LABELS_S)
        self.sum_s = 0.0


class StreamGaps:
    """One stream's messages as they go out to its client."""

    __slots__ = ("_clock", "_gaps", "_last")

    def __init__(self, gaps: _Gaps, clock: Callable[[], float]) -> None:
        self._gaps = gaps
        self._clock = clock
        self._last: dict[int, float] = {}

    def told(self, choice: int) -> None:
        """The client is told of tokens of that choice; how many makes no difference."""
        now = self._clock()
        last = self._last.get(choice)
        self._last[choice] = now
        if last is not None:
            gap, gaps = now - last, self._gaps
            gaps.sum_s += gap
            gaps.counts[bisect_left(_BOUNDS_S, gap)] += 1


class InterTokenLatency(Collector):
    """The histogram of all streams, by model.

    As in vLLM one message with tokens after another of the same choice is one observation, however
    many tokens it brings. Plain lists that streams count into directly: an `observe` for each
    message would cost more than counting its tokens does.
    """

    def __init__(
        self,
        registry: CollectorRegistry = REGISTRY,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._models: dict[str, _Gaps] = {}
        registry.register(self)

    def stream(self, model: str) -> StreamGaps:
        """Count one stream of `model`."""
        gaps = self._models.get(model)
        if gaps is None:
            gaps = self._models[model] = _Gaps()
        return StreamGaps(gaps, self._clock)

    def collect(self) -> Iterable[Metric]:
        """What has been counted so far; read by the thread of the metrics port."""
        family = HistogramMetricFamily(
            "tidemill_router_inter_token_latency_seconds",
            "Between two messages with tokens of a choice, as they go to the client.",
            labels=["model"],
        )
        for model, gaps in list(self._models.items()):
            buckets = list(zip(_LABELS_S, accumulate(gaps.counts), strict=True))
            family.add_metric([model], buckets, gaps.sum_s)
        return [family]
