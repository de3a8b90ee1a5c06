"""How fast the prefix index takes in what workers tell, and answers; and what a block costs in it.

    python -m benchmarks.policy.prefix_index [--sizes 50000,200000,1000000] [--rounds 12000]

8 workers hold chains of 64 blocks, each block at one of them. A round is a question about a chain
that is held, the eviction of the oldest chain and the arrival of a new one: 3 x 64 block-ops, in
the messages of one WatchKv stream each. Questions about a chain drawn at random find little of it
in the processor's caches, as a router's would. `floor` is the same three on a bare dict, which
knows no workers: `get` of 64 names by map, `pop` of 64, `update` with 64, each one call in C; the
index asks for fewer names than that, so its questions may be below the floor.

Goals: 2 M block-ops/s mixed, 5 M hoped for; a question in 20 us. `stall_ms` is the slowest single
call: when a dict has grown full it is copied.
"""

import argparse
import json
import time
import tracemalloc
from collections import deque
from collections.abc import Callable
from itertools import cycle, repeat
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.provenance import commit, device
from tidemill.policy import KvChange, PrefixIndex

RESULT = Path(__file__).with_name("results") / "prefix_index.json"
NUM_WORKERS, CHAIN = 8, 64
WORKERS = [f"w{number}" for number in range(NUM_WORKERS)]
GOALS = {"mixed_m_s": 2.0, "question_us": 20.0}

Chain = list[int]


class Told:
    """An index, and the sequence of what each worker has told it."""

    def __init__(self) -> None:
        self.index = PrefixIndex()
        self._sequences = dict.fromkeys(WORKERS, 1)
        for worker in WORKERS:
            self.index.hear(worker, (), epoch=1, sequence=1, resets=True)

    def tell(self, worker: str, names: Chain, *, removed: bool = False) -> None:
        self._sequences[worker] += 1
        change = KvChange(names, removed=removed)
        assert self.index.hear(worker, (change,), epoch=1, sequence=self._sequences[worker])


class Timer:
    """Seconds in calls of one kind: all of them, and the slowest."""

    def __init__(self) -> None:
        self.total = self.slowest = 0.0

    def __call__(self, call: Callable[..., object], *arguments: Any, **named: Any) -> None:
        began = time.perf_counter()
        call(*arguments, **named)
        took = time.perf_counter() - began
        self.total += took
        self.slowest = max(self.slowest, took)


def chains(rng: Random, num_blocks: int) -> list[Chain]:
    return [[rng.getrandbits(64) for _ in range(CHAIN)] for _ in range(num_blocks // CHAIN)]


def measure(num_blocks: int, num_rounds: int) -> dict[str, Any]:
    rng = Random(num_blocks)
    held, fresh = chains(rng, num_blocks), chains(rng, num_rounds * CHAIN)
    asked = [list(rng.choice(held)) for _ in range(num_rounds)]
    told, bare = Told(), dict[int, int]()
    order: deque[tuple[str, Chain]] = deque(zip(cycle(WORKERS), held, strict=False))
    for worker, chain in order:
        told.tell(worker, chain)
        bare.update(dict.fromkeys(chain, 1))
    question, eviction, arrival = Timer(), Timer(), Timer()
    for names, new in zip(asked, fresh, strict=True):
        question(told.index.overlap, names, 0.0)
        worker, old = order.popleft()
        eviction(told.tell, worker, old, removed=True)
        arrival(told.tell, worker, new)
        order.append((worker, new))
    bare_get, bare_pop, bare_set = Timer(), Timer(), Timer()
    for names, old, new in zip(asked, held, fresh, strict=False):
        bare_get(lambda: list(map(bare.get, names)))  # noqa: B023 - called at once
        bare_pop(lambda: list(map(bare.pop, old, repeat(0))))  # noqa: B023
        bare_set(lambda: bare.update(dict.fromkeys(new, 1)))  # noqa: B023
    num_bare = min(num_rounds, len(held))
    whole = question.total + eviction.total + arrival.total
    bare_s = bare_get.total + bare_pop.total + bare_set.total
    block_ns = 1e9 / CHAIN
    return {
        "blocks": num_blocks,
        "mixed_m_s": 3 * num_rounds * CHAIN / whole / 1e6,
        "floor_m_s": 3 * num_bare * CHAIN / bare_s / 1e6,
        "question_us": question.total / num_rounds * 1e6,
        "floor_question_us": bare_get.total / num_bare * 1e6,
        "arrival_ns": arrival.total / num_rounds * block_ns,
        "floor_arrival_ns": bare_set.total / num_bare * block_ns,
        "eviction_ns": eviction.total / num_rounds * block_ns,
        "floor_eviction_ns": bare_pop.total / num_bare * block_ns,
        "stall_ms": 1e3 * max(arrival.slowest, eviction.slowest, question.slowest),
        "bytes_a_block": bytes_a_block(num_blocks),
    }


def bytes_a_block(num_blocks: int) -> float:
    """All that the index keeps of a block, its name included."""
    rng = Random(1)
    told = Told()
    tracemalloc.start()
    for worker, _ in zip(cycle(WORKERS), range(num_blocks // CHAIN), strict=False):
        told.tell(worker, [rng.getrandbits(64) for _ in range(CHAIN)])
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return kept / num_blocks


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sizes", default="50000,200000,1000000")
    parser.add_argument("--rounds", type=int, default=12_000)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    rows = [measure(int(size), arguments.rounds) for size in arguments.sizes.split(",")]
    print("  ".join(f"{column:>17}" for column in rows[0]))
    for row in rows:
        print("  ".join(f"{value:17.2f}" for value in row.values()))
    report = {
        "command": f"python -m benchmarks.policy.prefix_index --sizes {arguments.sizes} "
        f"--rounds {arguments.rounds}",
        "commit": commit(),
        "device": device(),
        "goals": GOALS,
        "rows": [{name: round(value, 2) for name, value in row.items()} for row in rows],
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    met = all(
        row["mixed_m_s"] >= GOALS["mixed_m_s"] and row["question_us"] <= GOALS["question_us"]
        for row in rows
    )
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
