"""Whether anything leaks: `python -m loadtest.soak [--minutes 30]`.

Starts the whole stack anew with caches small enough to be full within the warm-up, finds out what
it bears (a run that always has --open requests waiting), and loads it at 70 % of that with
customers who cancel, hang up, read slowly and ask again. Every few seconds it looks at each
process: resident memory, descriptors, threads, KV blocks and other slots held. After the warm-up
(the first fifth) none of these may grow: the run fails if a slope's confidence interval, 95 % for
all series together, lies above zero and the series rose by more than two of its STEPS
(loadtest/slopes.py); if a slot is still held once all is idle; or if the books differ. One series
grows by what it is for and is told, not judged: the memory of the ledger's Redis, which keeps every
receipt.
"""

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loadtest.local import REPORTS, provenance, read_run, run_load, say
from loadtest.slopes import NUM_BATCHES, Slope, slope
from loadtest.soak_report import write_soak
from loadtest.watch import SLOTS, Watch, read_pids
from services.stack.launcher import run_stack
from services.stack.plan import Plan
from tidemill.errors import ConfigError, TidemillError

LOAD = 0.7
WARM_UP = 0.2
CONFIDENCE = 0.95
STEPS = {"RSS": 256 << 10}  # bytes that an allocator takes at a time; anything else is counted
KEEPS = ("redis-ledger", "RSS")  # grows by each receipt, which is its purpose
SMALL = {
    "cache": {"capacity_bytes": 16 << 20, "disk_capacity_bytes": 32 << 20},
    "prefill": {"engine": {"num_blocks": 256}},
    "decode": {"engine": {"num_blocks": 256}},
}
_BEHAVIOUR = ("--cancel-share", "0.2", "--hang-up-share", "0.1", "--again-share", "0.1")
_IDLE_S = 15.0

Judged = dict[tuple[str, str], Slope]


async def find_rate(plan: Plan, arguments: argparse.Namespace, directory: Path) -> float:
    """Requests a second that the stack ends when it always has more to do."""
    output = directory / "capacity.json"
    seconds = str(arguments.calibrate_s)
    bounds = ("--rate", "200", "--most-open", str(arguments.open), "--run-time", f"{seconds}s")
    status = await run_load(plan, [*_BEHAVIOUR, *bounds], output)
    run = await asyncio.to_thread(read_run, output)
    if status or run is None:
        raise ConfigError(f"the run that finds the capacity ended with {status}")
    return capacity(run["requests"])


def capacity(rows: Sequence[dict[str, Any]]) -> float:
    """Requests a second between the first and the last that ended in the middle half of a run."""
    ends = sorted(row["ended_s"] for row in rows if row["end"] in ("whole", "hung up"))
    middle = ends[len(ends) // 4 : len(ends) * 3 // 4]
    if len(middle) < 2:
        raise ConfigError("too few requests ended to tell a rate")
    return float((len(middle) - 1) / (middle[-1] - middle[0]))


async def watch_run(
    plan: Plan, arguments: argparse.Namespace, rate: float, directory: Path
) -> tuple[int, Watch]:
    """The long run, looked at all along, and once more when nothing runs any more."""
    pids = await asyncio.to_thread(read_pids, plan.state.path / "pids")
    watch = Watch(pids, plan.metrics_pages)
    options = [*_BEHAVIOUR, "--rate", f"{rate:.4f}", "--run-time", f"{arguments.minutes * 60:.0f}s"]
    options += ["--most-requests", "100000"]
    running = asyncio.create_task(run_load(plan, options, directory / "soak.json"))
    try:
        while not running.done():
            await asyncio.to_thread(watch.sample)
            await asyncio.wait([running], timeout=arguments.every_s)
        status = await running
    finally:
        running.cancel()
    return status, watch


async def left_over(plan: Plan, pids: dict[str, int]) -> dict[str, float]:
    """Slots that are still held when all should have ended, by process and name."""
    watch = Watch(pids, plan.metrics_pages)
    held: dict[str, float] = {}
    for _ in range(int(_IDLE_S)):
        await asyncio.to_thread(watch.sample)
        held = {
            f"{name}: {what}": value
            for what in SLOTS
            for name, value in watch.last(what).items()
            if value
        }
        if not held:
            break
        await asyncio.sleep(1)
    return held


def judge(watch: Watch, *, run_s: float) -> Judged:
    """Slopes of all series from the end of the warm-up to that of the arrivals."""
    chosen = [index for index, at_s in enumerate(watch.times_s) if WARM_UP * run_s <= at_s <= run_s]
    if len(chosen) < NUM_BATCHES:
        raise ConfigError(f"{len(chosen)} samples are too few to judge: run longer or look oftener")
    times_s = [watch.times_s[index] for index in chosen]
    one = 1 - (1 - CONFIDENCE) / len(watch.series)  # Bonferroni: all intervals hold together
    return {
        (name, what): slope(
            times_s,
            [values[index] for index in chosen],
            confidence=one,
            step=STEPS.get(what, 1),
        )
        for (name, what), values in watch.series.items()
    }


def growing(judged: Judged) -> list[str]:
    """Those series that grow and should not, for people."""
    return [
        f"{name} {what} grows"
        for (name, what), found in judged.items()
        if found.grows and (name, what) != KEEPS
    ]


async def soak(arguments: argparse.Namespace, directory: Path) -> int:
    """The whole of it; 0 if nothing grew, nothing was left and the books agree."""
    status = 1

    async def use(plan: Plan) -> None:
        nonlocal status
        say("\n== what it bears")
        most = await find_rate(plan, arguments, directory)
        rate = LOAD * most
        say(f"\n== {most:.2f} requests/s; {arguments.minutes:g} minutes at {rate:.2f}")
        status, watch = await watch_run(plan, arguments, rate, directory)
        held = await left_over(plan, dict(watch.pids))
        judged = judge(watch, run_s=arguments.minutes * 60)
        problems = growing(judged) + [f"{each} still held: {held[each]:g}" for each in held]
        if status:
            problems.append(f"the load's run ended with {status}")
        run = await asyncio.to_thread(read_run, directory / "soak.json")
        source = provenance("loadtest.soak", arguments, sys.argv[1:])
        found = {"capacity": most, "rate": rate, "minutes": arguments.minutes, "problems": problems}
        found["slopes"] = judged
        page = await asyncio.to_thread(write_soak, found, watch, run, source, arguments.reports)
        say("\n".join(["", *problems, f"{len(problems)} problems; report: {page}"]))
        status = 1 if problems else 0

    await run_stack(
        directory / "stack",
        use,
        say=say,
        model_dir=arguments.model,
        both=arguments.both,
        settings={name: SMALL[name] for name in SMALL if name != "prefill" or not arguments.both},
    )
    return status


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--every-s", type=float, default=5.0, help="seconds between two looks")
    parser.add_argument("--calibrate-s", type=int, default=45, help="to find what the stack bears")
    parser.add_argument("--open", type=int, default=24, help="requests open meanwhile")
    parser.add_argument("--model", type=Path, help="Hugging Face folder; default: models/demo")
    parser.add_argument("--both", action="store_true", help="one worker that prefills and decodes")
    parser.add_argument("--reports", type=Path, default=REPORTS, help="folder of the report")
    arguments = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory(prefix="tidemill-soak-") as directory:
            return asyncio.run(soak(arguments, Path(directory)))
    except TidemillError as error:
        say(f"soak: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
