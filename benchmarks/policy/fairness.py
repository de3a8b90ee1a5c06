"""What one tenant at ten times its load does to the others' wait: fair queue and first come.

    python -m benchmarks.policy.fairness [--seconds 60] [--seeds 2]

On a virtual clock: ten tenants send alike, then the same nine beside one that sends ten times as
much, to prefill workers at the rate that DeepSeek published for a node (73,700 tokens/s). Workers
take a prompt while fewer than `BalancerConfig.max_queued_tokens` wait there, as the router's
dispatcher has it; prompts are lognormal (mean 4,000 tokens, at most 32,768), arrivals Poisson.

Waits are from arrival to the start of prefill, the worker's own queue included, p95 over the nine
tenants and all seeds. `moved` is with the heavy tenant over without, goal: below 1.2. Three queues:
`fifo` (first come, first served, without bounds), `drr` (deficit round robin that saves no turns)
and `fair` (as configured by default), whose bounds refuse part of what the heavy tenant sends.
`refused` counts what was refused of the others.

Floor: work that has begun is not interrupted, and a pool that the heavy tenant keeps busy has no
idle worker left. At a base load of 0.7 the p95 wait without it is less than two prompts take, so
there it can hardly stay.

`told_off` is how far the wait told on arrival was from the wait in the queue, in seconds, for the
heavy tenant and for the others beside it. Arrivals to come are not known to it, nor when the next
worker has room.
"""

import argparse
import heapq
import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from benchmarks.provenance import commit
from tidemill.errors import QueueFull
from tidemill.policy import BalancerConfig, FairQueue, QueueLimits, QueueModel

RESULT = Path(__file__).with_name("results") / "fairness.json"
GOAL = 1.2
TENANTS, WORKERS, TOKENS_PER_S = 10, 4, 73_700.0
MEAN_TOKENS, SIGMA, MOST_TOKENS = 4000, 1.2, 32_768
WORKER_QUEUE = BalancerConfig().max_queued_tokens
BASE_LOADS = (0.7, 0.8, 0.9, 0.95)
QUEUES = {
    "fifo": QueueLimits(10**9, 10**9, 10**15),
    "drr": QueueLimits(saved_turns=0),
    "fair": QueueLimits(),
}


@dataclass(order=True)
class Arrival:
    at: float
    tenant: int = field(compare=False)
    tokens: int = field(compare=False)
    expected_s: float | None = field(default=None, compare=False)


@dataclass
class Waits:
    """Seconds to the start of prefill, by tenant, and how far what they were told was off.

    `refused` are requests of other tenants than the heavy one.
    """

    refused: int = 0
    by_tenant: list[list[float]] = field(default_factory=lambda: [[] for _ in range(TENANTS)])
    told: list[tuple[int, float]] = field(default_factory=list)


def arrivals(load: float, heavy: float, seconds: float, seed: int) -> Iterator[Arrival]:
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
    """A router's queue in front of the workers."""

    def __init__(self, name: str) -> None:
        self.waits = Waits()
        self._queue: FairQueue[tuple[str, Arrival]] = FairQueue(QUEUES[name])
        self._fifo = name == "fifo"
        self._now = 0.0
        self._model = QueueModel(lambda: self._now)
        self._free_at = [0.0] * WORKERS
        self._number = 0

    def run(self, coming: Iterator[Arrival]) -> Waits:
        for arrival in coming:
            while len(self._queue) and self._room_at() <= arrival.at:
                self._now = max(self._room_at(), self._now)
                self._place()
            self._now = arrival.at
            self._enter(arrival)
            self._place()
        while len(self._queue):
            self._now = max(self._room_at(), self._now)
            self._place()
        return self.waits

    def _enter(self, arrival: Arrival) -> None:
        self._number += 1
        name, tenant = str(self._number), "" if self._fifo else str(arrival.tenant)
        try:
            self._queue.push(name, tenant, arrival.tokens, (tenant, arrival))
        except QueueFull:
            self.waits.refused += arrival.tenant > 0
            return
        self._model.entered(tenant)
        if not self._fifo:
            arrival.expected_s = self._model.wait_s(tenant, self._queue.ahead(name))

    def _room_at(self) -> float:
        """When a worker has fewer tokens left than it may have waiting."""
        return min(self._free_at) - WORKER_QUEUE / TOKENS_PER_S + 1e-9

    def _place(self) -> None:
        while len(self._queue) and self._room_at() <= self._now:
            popped = self._queue.pop()
            assert popped is not None
            tenant, arrival = popped
            self._model.left(tenant, arrival.tokens)
            worker = self._free_at.index(min(self._free_at))
            begins = max(self._free_at[worker], self._now)
            self._free_at[worker] = begins + arrival.tokens / TOKENS_PER_S
            self.waits.by_tenant[arrival.tenant].append(begins - arrival.at)
            if arrival.expected_s is not None:
                off_s = abs(arrival.expected_s - (self._now - arrival.at))
                self.waits.told.append((arrival.tenant, off_s))
        if len(self._queue):
            self._model.sticks(0.0)
        else:
            self._model.moves()


def p95(values: list[float]) -> float:
    return statistics.quantiles(values, n=20)[-1]


def measure(name: str, load: float, seconds: float, seeds: int) -> dict[str, object]:
    """One row: all seeds, without and with the heavy tenant."""
    waits = {
        heavy: [Pool(name).run(arrivals(load, heavy, seconds, seed)) for seed in range(seeds)]
        for heavy in (1, 10)
    }
    others = {
        heavy: p95([wait for one in runs for tenant in one.by_tenant[1:] for wait in tenant])
        for heavy, runs in waits.items()
    }
    off = {
        name: sorted(s for one in waits[10] for tenant, s in one.told if (tenant == 0) is heavy)
        for name, heavy in (("others", False), ("heavy", True))
    }
    return {
        "queue": name,
        "base_load": load,
        "p95_without_s": round(others[1], 4),
        "p95_with_s": round(others[10], 4),
        "moved": round(others[10] / others[1], 3),
        "refused": sum(one.refused for runs in waits.values() for one in runs),
        "heavy_p95_s": round(p95([wait for one in waits[10] for wait in one.by_tenant[0]]), 2),
        **{
            f"told_off_{name}_p{percent}_s": round(each[len(each) * percent // 100], 3)
            for name, each in off.items()
            for percent in (50, 90)
            if each
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    rows = []
    for load in BASE_LOADS:
        for name in QUEUES:
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
