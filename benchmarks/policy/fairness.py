"""What one tenant at ten times its load does to the others' wait: fair queue and first come.

    python -m benchmarks.policy.fairness [--seconds 60] [--seeds 2]

On a virtual clock: ten tenants send alike, then the same nine beside one that sends ten times as
much, to prefill workers at the rate that DeepSeek published for a node (73,700 tokens/s). Prompts
are lognormal (mean 4,000 tokens, at most 32,768), arrivals Poisson. A worker computes one prompt
after the other and is given the next while less than its bound waits there; what it is given
reaches it `HAND_S` later.

Waits are from arrival to the start of prefill, the worker's own queue included, p95 over the nine
tenants and all seeds. `moved` is with the heavy tenant over without, goal: below 1.2;
`ttft_moved` the same of the p95 time to the first token, a prompt's own prefill included.
`given` is how much of what the workers could do they did, with the heavy tenant there. Rows:

    fifo      first come, first served, without bounds
    drr       deficit round robin that saves no turns
    deep      as configured, but workers take what comes up to `max_queued_tokens`
    fair      as configured by default: workers take what comes up to `max_queued_s`
    at_once   as `fair`, but workers take what comes when they are idle, and it is there at once
    nine      the same with the nine before the heavy tenant, always
    chunks    the same if each step of a worker went to whose turn it is, so that the heavy tenant
              is not there for the others

`at_once` is the floor of what a bound at the worker can do. Since `nine` is no better, what is left
there is that a prompt which has begun is not interrupted.

The bounds of `drr`, `deep` and `fair` refuse part of what the heavy tenant sends; `refused` counts
what was refused of the others.

`told_off` is how far the wait told on arrival was from the wait in the queue, in seconds, for the
heavy tenant and for the others beside it. Arrivals to come are not known to it, nor when the next
worker has room.
"""

import argparse
import heapq
import json
import math
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from benchmarks.provenance import commit
from tidemill.errors import QueueFull
from tidemill.policy import BalancerConfig, FairQueue, Priority, QueueLimits, QueueModel

RESULT = Path(__file__).with_name("results") / "fairness.json"
GOAL = 1.2
TENANTS, WORKERS, TOKENS_PER_S = 10, 4, 73_700.0
MEAN_TOKENS, SIGMA, MOST_TOKENS = 4000, 1.2, 32_768
HAND_S = 0.005
BALANCER = BalancerConfig()
DEEP_S = BALANCER.max_queued_tokens / TOKENS_PER_S
BOUND_S = min(max(BALANCER.max_queued_s, BALANCER.min_queued_tokens / TOKENS_PER_S), DEEP_S)
BASE_LOADS = (0.7, 0.8, 0.9, 0.95)
UNBOUNDED = QueueLimits(10**9, 10**9, 10**15)


@dataclass(frozen=True)
class Discipline:
    """How tenants share the queue, and how long what waits at a worker may take."""

    limits: QueueLimits = field(default_factory=QueueLimits)
    bound_s: float = BOUND_S
    hand_s: float = HAND_S
    fair: bool = True


IDEAL = Discipline(QueueLimits(batch_share=1e-6), bound_s=0.0, hand_s=0.0)
DISCIPLINES = {
    "fifo": Discipline(UNBOUNDED, fair=False),
    "drr": Discipline(QueueLimits(saved_turns=0)),
    "deep": Discipline(bound_s=DEEP_S),
    "fair": Discipline(),
    "at_once": Discipline(bound_s=0.0, hand_s=0.0),
    "nine": IDEAL,
    "chunks": IDEAL,
}
LIGHT, HEAVY = 1.0, 10.0
TOLD = ("drr", "deep", "fair")


@dataclass(order=True)
class Arrival:
    at: float
    tenant: int = field(compare=False)
    tokens: int = field(compare=False)
    expected_s: float | None = field(default=None, compare=False)


@dataclass
class Waits:
    """Seconds to the start of prefill, by tenant, and how far what they were told was off.

    `first_token_s` are those of other tenants than the heavy one, and so are the requests
    `refused`. `given` is the part of the workers' time that they computed.
    """

    refused: int = 0
    given: float = 0.0
    by_tenant: list[list[float]] = field(default_factory=lambda: [[] for _ in range(TENANTS)])
    first_token_s: list[float] = field(default_factory=list)
    told: list[tuple[int, float]] = field(default_factory=list)

    @property
    def others(self) -> list[float]:
        """Of all tenants but the heavy one."""
        return [wait for tenant in self.by_tenant[1:] for wait in tenant]


def arrivals(load: float, heavy: float, seconds: float, seed: int) -> Iterable[Arrival]:
    """In order; tenant 0 sends `heavy` times what the others do, whose prompts do not change."""
    mean = Random(0)
    drawn = [prompt(mean) for _ in range(100_000)]
    rate = load * WORKERS * TOKENS_PER_S / statistics.fmean(drawn) / TENANTS
    streams = [
        poisson(tenant, rate * (heavy if tenant == 0 else 1), seconds, seed)
        for tenant in range(TENANTS)
    ]
    return heapq.merge(*streams)


def poisson(tenant: int, rate: float, seconds: float, seed: int) -> Iterator[Arrival]:
    rng = Random(f"{seed} {tenant}")
    at = rng.expovariate(rate)
    while at < seconds:
        yield Arrival(at, tenant, prompt(rng))
        at += rng.expovariate(rate)


def prompt(rng: Random) -> int:
    median: float = MEAN_TOKENS / math.exp(SIGMA * SIGMA / 2)
    return max(1, min(round(median * rng.lognormvariate(0, SIGMA)), MOST_TOKENS))


class Pool:
    """A router's queue in front of the workers; `heavy_last` serves tenant 0 after all others."""

    def __init__(self, discipline: Discipline, *, heavy_last: bool = False) -> None:
        self.waits = Waits()
        self._discipline = discipline
        self._heavy_last = heavy_last
        self._queue: FairQueue[tuple[str, Arrival]] = FairQueue(discipline.limits)
        self._now = 0.0
        self._model = QueueModel(lambda: self._now)
        self._free_at = [0.0] * WORKERS
        self._idle_s = 0.0
        self._number = 0

    def run(self, coming: Iterable[Arrival]) -> Waits:
        for arrival in coming:
            self._until(arrival.at)
            self._now = arrival.at
            self._enter(arrival)
            self._place()
        self.waits.given = 1 - self._idle_s / (WORKERS * self._now)
        self._until(math.inf)
        return self.waits

    def _until(self, instant: float) -> None:
        while len(self._queue) and self._room_at() <= instant:
            self._now = max(self._room_at(), self._now)
            self._place()

    def _enter(self, arrival: Arrival) -> None:
        self._number += 1
        name, tenant = str(self._number), str(arrival.tenant) if self._discipline.fair else ""
        last = self._heavy_last and arrival.tenant == 0
        priority = Priority.BATCH if last else Priority.STANDARD
        try:
            self._queue.push(name, tenant, arrival.tokens, (tenant, arrival), priority)
        except QueueFull:
            self.waits.refused += arrival.tenant > 0
            return
        self._model.entered(tenant)
        if self._discipline.fair:
            arrival.expected_s = self._model.wait_s(tenant, self._queue.ahead(name))

    def _room_at(self) -> float:
        """When a worker has less work left than it may have waiting."""
        return min(self._free_at) - self._discipline.bound_s + 1e-9

    def _place(self) -> None:
        while len(self._queue) and self._room_at() <= self._now:
            popped = self._queue.pop()
            assert popped is not None
            tenant, arrival = popped
            self._model.left(tenant, arrival.tokens)
            worker = self._free_at.index(min(self._free_at))
            begins = max(self._free_at[worker], self._now + self._discipline.hand_s)
            self._idle_s += begins - self._free_at[worker]
            ends = self._free_at[worker] = begins + arrival.tokens / TOKENS_PER_S
            self._note(arrival, begins, ends)
        if len(self._queue):
            self._model.sticks(0.0)
        else:
            self._model.moves()

    def _note(self, arrival: Arrival, begins: float, ends: float) -> None:
        waits = self.waits
        waits.by_tenant[arrival.tenant].append(begins - arrival.at)
        if arrival.tenant:
            waits.first_token_s.append(ends - arrival.at)
        if arrival.expected_s is not None:
            off_s = abs(arrival.expected_s - (self._now - arrival.at))
            waits.told.append((arrival.tenant, off_s))


def p95(values: list[float]) -> float:
    return statistics.quantiles(values, n=20)[-1]


def measure(name: str, load: float, seconds: float, seeds: int) -> dict[str, object]:
    """One row: all seeds, without and with the heavy tenant."""
    discipline = DISCIPLINES[name]

    def run(heavy: float, seed: int) -> Waits:
        coming = arrivals(load, heavy, seconds, seed)
        last = name == "nine" and heavy == HEAVY
        if name == "chunks" and heavy == HEAVY:
            coming = (arrival for arrival in coming if arrival.tenant)
        return Pool(discipline, heavy_last=last).run(coming)

    without = [run(LIGHT, seed) for seed in range(seeds)]
    beside = [run(HEAVY, seed) for seed in range(seeds)]
    wait_s = [p95([s for one in runs for s in one.others]) for runs in (without, beside)]
    ttft_s = [p95([s for one in runs for s in one.first_token_s]) for runs in (without, beside)]
    heavy_s = [s for one in beside for s in one.by_tenant[0]]
    row: dict[str, object] = {
        "queue": name,
        "base_load": load,
        "p95_without_s": round(wait_s[0], 4),
        "p95_with_s": round(wait_s[1], 4),
        "moved": round(wait_s[1] / wait_s[0], 3),
        "ttft_p95_without_s": round(ttft_s[0], 4),
        "ttft_p95_with_s": round(ttft_s[1], 4),
        "ttft_moved": round(ttft_s[1] / ttft_s[0], 3),
        "refused": sum(one.refused for one in (*without, *beside)),
    }
    if heavy_s:
        row["given"] = round(min(one.given for one in beside), 3)
        row["heavy_p95_s"] = round(p95(heavy_s), 2)
    if name in TOLD:
        row |= told_off(beside)
    return row


def told_off(beside: list[Waits]) -> dict[str, float]:
    off = {
        name: sorted(s for one in beside for tenant, s in one.told if (tenant == 0) is heavy)
        for name, heavy in (("others", False), ("heavy", True))
    }
    return {
        f"told_off_{name}_p{percent}_s": round(each[len(each) * percent // 100], 3)
        for name, each in off.items()
        for percent in (50, 90)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    rows = []
    for load in BASE_LOADS:
        for name in DISCIPLINES:
            row = measure(name, load, arguments.seconds, arguments.seeds)
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            rows.append(row)
    report = {
        "command": f"python -m benchmarks.policy.fairness --seconds {arguments.seconds:g} "
        f"--seeds {arguments.seeds}",
        "commit": commit(),
        "device": "a virtual clock",
        "goal": GOAL,
        "rows": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
