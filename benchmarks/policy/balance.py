"""How evenly the balancers load prefill and decode workers, with what their routers know.

    python -m benchmarks.policy.balance [--trace FILE.csv] [--busy 0.7]

The lengths of the Azure 2023 conversation trace (../shared/data unless told otherwise), in its
order, once (without the file: of a look-alike), on 8 prefill and 8 decode workers on a virtual
clock; fleet.py states the model. Nothing is cached, so what overlap is worth is not seen here.
Figures are the load of the most loaded worker over the mean, 1 being even, of four objectives:

    tokens, pairs  prompt tokens and attention pairs given to a prefill worker within a minute,
                   averaged over minutes (`_10s`: within ten seconds)
    kv, requests   KV tokens and requests on a decode worker at one instant, sampled every 100 ms
                   and averaged; `_p99` is exceeded in one sample of a hundred

Rows: `fresh` has four routers that hear of each worker every 100 ms; `one` a single router, the
floor for the same policy; `every_500ms` and `late_500ms` four routers whose view is up to and
always 500 ms old, `untold_500ms` the latter without their knowing. Beside them round robin and
least requests (each router's own, the better of two drawn, as proxies do it), which use no report.
The goals: each objective at most 1.1 in `fresh`, at most 1.3 in the three stale rows.

`slow`: half-way one prefill and one decode worker become four times as slow. Its figures are
the slow worker's share of what is given from five seconds later on, where 0.125 is its equal part.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from random import Random
from statistics import fmean, quantiles
from typing import Any

from benchmarks.policy.fleet import MAX_TOKENS, SAMPLE_S, Fleet, Request, Router, Seen, View
from benchmarks.provenance import ROOT, commit, device
from loadtest.traces import Lengths, look_alike, read_trace
from tidemill.policy import (
    BalancerConfig,
    InFlight,
    OutputLengths,
    Placement,
    pick_decode,
    pick_prefill,
    room_in_s,
)

RESULT = Path(__file__).with_name("results") / "balance.json"
TRACE = ROOT.parent / "shared" / "data" / "azure_llm_2023_conv.csv"
NUM_LOOK_ALIKE = 19_366
SLOWER, SETTLED_S = 4, 5.0
FRESH = View()
STALE = {
    "every_500ms": View(every_s=0.5),
    "late_500ms": View(delay_s=0.5),
    "untold_500ms": View(delay_s=0.5, told=False),
}
OBJECTIVES = ("tokens", "pairs", "kv", "requests")

MakeRouter = Callable[[int, int, Random], Router]


class Balanced(Router):
    """The policy under test, as the router's dispatcher uses it."""

    def __init__(self, number: int, workers: int, rng: Random) -> None:
        super().__init__(number, workers, rng)
        self.prefilling, self.decoding = InFlight(), InFlight()
        self.answers = OutputLengths()
        self.config = BalancerConfig()

    def place(self, request: Request, now: float) -> tuple[int, int] | None:
        placement = self._placement(request)
        known: dict[str, Any] = {"rng": self.rng, "now": now, "config": self.config}
        prefill = pick_prefill(self.prefills, placement, self.prefilling, **known)
        decode = pick_decode(self.decodes, placement, self.decoding, **known)
        if prefill is None or decode is None:
            return None
        self.prefilling.add(
            request.key,
            prefill.worker_id,
            at=now,
            tokens=placement.uncached_tokens(prefill.worker_id),
            pairs=placement.attention_pairs(prefill.worker_id),
            blocks=placement.new_blocks(prefill.worker_id),
        )
        blocks = placement.new_blocks(
            decode.worker_id, extra_tokens=self.config.decode_reserve_tokens
        )
        self.decoding.add(request.key, decode.worker_id, at=now, blocks=blocks)
        return int(prefill.worker_id[1:]), int(decode.worker_id[1:])

    def room_in_s(self, request: Request, now: float) -> float:
        return room_in_s(
            self.prefills,
            self._placement(request),
            self.prefilling,
            now=now,
            config=self.config,
        )

    def _placement(self, request: Request) -> Placement:
        return Placement(
            num_prompt_tokens=request.tokens,
            output_tokens=self.answers.expected(MAX_TOKENS),
            growth_tokens=self.answers.remaining,
        )

    def prefilled(self, request: Request) -> None:
        self.prefilling.remove(request.key)

    def ended(self, request: Request) -> None:
        self.decoding.remove(request.key)
        self.answers.add(request.lengths.num_output_tokens)


class RoundRobin(Router):
    def __init__(self, number: int, workers: int, rng: Random) -> None:
        super().__init__(number, workers, rng)
        self.next = rng.randrange(workers)

    def place(self, request: Request, now: float) -> tuple[int, int]:  # noqa: ARG002 - blind
        self.next = (self.next + 1) % len(self.prefills)
        return self.next, self.next


class LeastRequests(Router):
    def __init__(self, number: int, workers: int, rng: Random) -> None:
        super().__init__(number, workers, rng)
        self.prefilling, self.decoding = [0] * workers, [0] * workers

    def place(self, request: Request, now: float) -> tuple[int, int]:  # noqa: ARG002 - blind
        return self._better(self.prefilling), self._better(self.decoding)

    def prefilled(self, request: Request) -> None:
        self.prefilling[request.prefill] -= 1

    def ended(self, request: Request) -> None:
        self.decoding[request.decode] -= 1

    def _better(self, counts: list[int]) -> int:
        better = min(self.rng.sample(range(len(counts)), 2), key=lambda each: counts[each])
        counts[better] += 1
        return better


def unevenness(loads: Sequence[float]) -> float:
    return max(loads) * len(loads) / sum(loads) if any(loads) else 1.0


def within(totals: Sequence[Sequence[int]], window_s: float) -> float:
    """Of what was given within each window; what is left at the end is no window."""
    ends = totals[:: round(window_s / SAMPLE_S)]
    given = [
        [after - before for before, after in zip(*window, strict=True)] for window in pairwise(ends)
    ]
    return fmean(unevenness(each) for each in given)


def figures(seen: Seen) -> dict[str, float]:
    kv, requests = [[unevenness(each) for each in all_] for all_ in (seen.kv_tokens, seen.requests)]
    ttft, tpot = quantiles(seen.ttft_s, n=100), quantiles(seen.tpot_s, n=100)
    return {
        "tokens": within(seen.given_tokens, 60),
        "pairs": within(seen.given_pairs, 60),
        "kv": fmean(kv),
        "requests": fmean(requests),
        "tokens_10s": within(seen.given_tokens, 10),
        "pairs_10s": within(seen.given_pairs, 10),
        "kv_p99": quantiles(kv, n=100)[98],
        "requests_p99": quantiles(requests, n=100)[98],
        "ttft_ms_p50": 1e3 * ttft[49],
        "ttft_ms_p99": 1e3 * ttft[98],
        "tpot_ms_p50": 1e3 * tpot[49],
        "tpot_ms_p99": 1e3 * tpot[98],
    }


def balance_row(
    name: str, lengths: Sequence[Lengths], make_router: MakeRouter, view: View, busy: float
) -> dict[str, Any]:
    seen = Fleet(lengths, make_router, view, busy=busy).run()
    return {"row": name, **{key: round(value, 3) for key, value in figures(seen).items()}}


def slow_row(
    name: str, lengths: Sequence[Lengths], make_router: MakeRouter, busy: float
) -> dict[str, Any]:
    fleet = Fleet(lengths, make_router, FRESH, busy=busy)
    duration_s = len(lengths) / fleet.requests_per_s

    def slow_down() -> None:
        fleet.prefills[0].rate //= SLOWER
        fleet.decodes[0].slowness *= SLOWER

    fleet.at(duration_s / 2, slow_down)
    seen = fleet.run()
    settled = round((duration_s / 2 + SETTLED_S - fleet.warm_up_s) / SAMPLE_S)
    shares = {}
    for role, totals in (("prefill", seen.given_tokens), ("decode", seen.given_requests)):
        given = [after - before for before, after in zip(totals[settled], totals[-1], strict=True)]
        shares[f"{role}_share"] = round(given[0] / sum(given), 4)
    late = figures(seen)
    return {
        "row": name,
        **shares,
        **{key: round(late[key], 1) for key in ("ttft_ms_p50", "ttft_ms_p99", "tpot_ms_p99")},
    }


def show(rows: list[dict[str, Any]]) -> None:
    print("  ".join(f"{column:>12}" for column in rows[0]))
    for row in rows:
        print("  ".join(f"{cell!s:>12}" for cell in row.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--trace", type=Path, default=TRACE)
    parser.add_argument("--busy", type=float, default=0.7)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    rng = Random(1)
    traced = arguments.trace.exists()
    lengths = (
        [row.lengths for row in read_trace(arguments.trace)]
        if traced
        else [look_alike(rng) for _ in range(NUM_LOOK_ALIKE)]
    )
    busy = arguments.busy
    rows = [
        balance_row("round_robin", lengths, RoundRobin, FRESH, busy),
        balance_row("least_requests", lengths, LeastRequests, FRESH, busy),
        balance_row("one", lengths, Balanced, View(routers=1), busy),
        balance_row("fresh", lengths, Balanced, FRESH, busy),
        *(balance_row(name, lengths, Balanced, view, busy) for name, view in STALE.items()),
    ]
    slow = [
        slow_row(name, lengths, make_router, busy)
        for name, make_router in (
            ("round_robin", RoundRobin),
            ("least_requests", LeastRequests),
            ("balanced", Balanced),
        )
    ]
    show(rows)
    show(slow)
    named = {row["row"]: row for row in rows}
    goals = {
        "fresh_at_most_1.1": max(named["fresh"][each] for each in OBJECTIVES),
        "stale_at_most_1.3": max(named[name][each] for name in STALE for each in OBJECTIVES),
    }
    print(goals)
    report = {
        "command": f"python -m benchmarks.policy.balance --busy {busy}",
        "commit": commit(),
        "device": device(),
        "lengths": arguments.trace.name if traced else "look-alike",
        "requests": len(lengths),
        "goals": goals,
        "rows": rows,
        "slow": slow,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
