"""How evenly experts are placed, how soon, and how much of it a bounded number of moves gets.

    python -m benchmarks.policy.placement [--layers 58] [--moves 4,8,16,32]

256 experts in 8 groups with 32 redundant copies, as DeepSeek-V3 serves them, under synthetic skew:
loads drawn from a lognormal distribution of that sigma, or of Zipf's law with that exponent in
random order. Balancedness is the mean over the greatest load of a GPU, averaged over layers;
1 is even. EP8 and EP32 divide the groups among nodes of 8 GPUs and are placed hierarchically, EP72
and EP144 globally.

`without` is the baseline: no redundant copies, experts in order (only where GPUs divide 256).
`reference` is what the reference implementation gave us earlier, over 8 layers of other draws (for
EP72 the lower end of its 0.96 to 0.98). `refined` is `placed` after at most 32 moves a layer.
`bound` no placement can exceed: some GPU holds the hottest copy, and copies are coolest if each
further one goes to the hottest expert; some node holds the most loaded groups, and with two groups
a node that is least if the heaviest shares with the lightest.
The goals: placed at least as even as the reference, and all layers in 0.3 s.

Then loads drift (each times exp(N(0, 0.3))): balancedness if nothing moves, if at most so many
experts a layer are loaded anew, and if all is placed from nothing, which moves most of them.
"""

import argparse
import heapq
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

from benchmarks.provenance import commit, device
from tidemill.policy import Topology, balancedness, move_experts, num_moves, place_experts
from tidemill.policy.placement import Slots

RESULT = Path(__file__).with_name("results") / "placement.json"
NUM_EXPERTS, NUM_SLOTS, NUM_GROUPS, NODE_GPUS = 256, 288, 8, 8
GPUS = (8, 32, 72, 144)
DRIFT = 0.3
REFINING_MOVES = 32

Loads = list[float]
Draw = Callable[[Random], Loads]


def lognormal(sigma: float) -> Draw:
    return lambda rng: [rng.lognormvariate(0, sigma) for _ in range(NUM_EXPERTS)]


def zipf(exponent: float) -> Draw:
    def draw(rng: Random) -> Loads:
        loads = [(rank + 1) ** -exponent for rank in range(NUM_EXPERTS)]
        rng.shuffle(loads)
        return loads

    return draw


SKEWS = {
    "lognormal 0.5": lognormal(0.5),
    "lognormal 1": lognormal(1),
    "zipf 0.5": zipf(0.5),
    "zipf 1": zipf(1),
}
REFERENCE = {
    ("lognormal 1", 8): 1.00,
    ("lognormal 1", 32): 0.95,
    ("lognormal 1", 72): 0.96,
    ("lognormal 1", 144): 0.76,
    ("lognormal 0.5", 72): 0.96,
    ("lognormal 0.5", 144): 0.97,
    ("zipf 0.5", 8): 1.00,
    ("zipf 0.5", 32): 0.98,
    ("zipf 0.5", 72): 0.96,
    ("zipf 0.5", 144): 0.80,
    ("zipf 1", 8): 1.00,
    ("zipf 1", 32): 0.70,
    ("zipf 1", 72): 0.88,
    ("zipf 1", 144): 0.49,
}


def topology(num_gpus: int) -> Topology:
    return Topology(NUM_SLOTS, num_gpus, num_gpus // NODE_GPUS, NUM_GROUPS)


def without(loads: Loads, num_gpus: int) -> float:
    if NUM_EXPERTS % num_gpus:
        return math.nan
    return balancedness(range(NUM_EXPERTS), loads, Topology(NUM_EXPERTS, num_gpus))


def bound(loads: Loads, num_gpus: int) -> float:
    mean = sum(loads) / num_gpus
    copies = [(-load, load, 1) for load in loads]
    heapq.heapify(copies)
    for _ in range(NUM_SLOTS - NUM_EXPERTS):
        _, load, count = copies[0]
        heapq.heapreplace(copies, (-load / (count + 1), load, count + 1))
    return mean / max(-copies[0][0], mean, _least_of_busiest_node(loads, num_gpus) / NODE_GPUS)


def _least_of_busiest_node(loads: Loads, num_gpus: int) -> float:
    """0 where groups may be split."""
    if topology(num_gpus).num_islands * 2 != NUM_GROUPS:
        return 0.0
    size = NUM_EXPERTS // NUM_GROUPS
    groups = sorted(sum(loads[first : first + size]) for first in range(0, NUM_EXPERTS, size))
    return max(light + heavy for light, heavy in zip(groups, reversed(groups), strict=True))


def evenness(placed: Sequence[Slots], loads: Sequence[Loads], num_gpus: int) -> float:
    where = topology(num_gpus)
    return fmean(
        balancedness(slots, each, where) for slots, each in zip(placed, loads, strict=True)
    )


def place_row(name: str, num_gpus: int, num_layers: int) -> dict[str, Any]:
    rng = Random(f"{name} {num_gpus}")
    loads = [SKEWS[name](rng) for _ in range(num_layers)]
    started = time.perf_counter()
    placed = [place_experts(each, topology(num_gpus)) for each in loads]
    seconds = time.perf_counter() - started
    refined = [
        move_experts(slots, each, topology(num_gpus), max_moves=REFINING_MOVES)
        for slots, each in zip(placed, loads, strict=True)
    ]
    reference = REFERENCE.get((name, num_gpus), math.nan)
    even = evenness(placed, loads, num_gpus)
    return {
        "skew": name,
        "gpus": num_gpus,
        "without": fmean(without(each, num_gpus) for each in loads),
        "placed": even,
        "reference": reference,
        "ratio": even / reference,
        "refined": evenness(refined, loads, num_gpus),
        "bound": fmean(bound(each, num_gpus) for each in loads),
        "seconds": seconds,
    }


def move_row(name: str, num_gpus: int, num_layers: int, budgets: list[int]) -> dict[str, Any]:
    rng = Random(f"{name} {num_gpus} moves")
    where = topology(num_gpus)
    before = [SKEWS[name](rng) for _ in range(num_layers)]
    after = [[load * rng.lognormvariate(0, DRIFT) for load in each] for each in before]
    placed = [place_experts(each, where) for each in before]
    fresh = [place_experts(each, where) for each in after]
    row: dict[str, Any] = {
        "skew": name,
        "gpus": num_gpus,
        "stay": evenness(placed, after, num_gpus),
        "fresh": evenness(fresh, after, num_gpus),
        "fresh_moves": fmean(
            num_moves(old, new, where) for old, new in zip(placed, fresh, strict=True)
        ),
    }
    for budget in budgets:
        started = time.perf_counter()
        moved = [
            move_experts(old, each, where, max_moves=budget)
            for old, each in zip(placed, after, strict=True)
        ]
        row[f"moves_{budget}"] = evenness(moved, after, num_gpus)
        row[f"moves_{budget}_ms_a_layer"] = 1e3 * (time.perf_counter() - started) / num_layers
    return row


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    """For people and for JSON, which has no NaN."""
    return {
        key: (None if math.isnan(value) else round(value, 4)) if isinstance(value, float) else value
        for key, value in row.items()
    }


def show(rows: list[dict[str, Any]], columns: list[str]) -> None:
    print("  ".join(f"{column:>13}" for column in columns))
    for row in rows:
        cells = ("" if row[column] is None else row[column] for column in columns)
        print(
            "  ".join(
                f"{cell:13.3f}" if isinstance(cell, float) else f"{cell!s:>13}" for cell in cells
            )
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=58)
    parser.add_argument("--moves", default="4,8,16,32")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    budgets = [int(each) for each in arguments.moves.split(",")]
    placed = [
        rounded(place_row(name, num_gpus, arguments.layers)) for name in SKEWS for num_gpus in GPUS
    ]
    moved = [
        rounded(move_row(name, num_gpus, max(arguments.layers // 8, 1), budgets))
        for name in ("lognormal 1", "zipf 1")
        for num_gpus in GPUS[1:]
    ]
    show(placed, ["skew", "gpus", "without", "placed", "reference", "refined", "bound", "seconds"])
    show(moved, ["skew", "gpus", "stay", *(f"moves_{each}" for each in budgets), "fresh"])
    report = {
        "command": f"python -m benchmarks.policy.placement --layers {arguments.layers} "
        f"--moves {arguments.moves}",
        "commit": commit(),
        "device": device(),
        "placed": placed,
        "moved": moved,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
