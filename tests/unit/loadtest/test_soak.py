import gc
import os
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Gauge

from loadtest.slopes import NUM_BATCHES
from loadtest.soak import KEEPS, capacity, growing, judge
from loadtest.watch import Watch, read_pids, slots
from tidemill.errors import ConfigError
from tidemill.rpc.metrics import serve_metrics

RUN_S = 100.0


def watched(series: dict[tuple[str, str], list[float]]) -> Watch:
    watch = Watch({}, {})
    watch.times_s = [float(index) for index in range(int(RUN_S) + 10)]
    watch.series = series
    return watch


def climb(start: int, each: float = 1 << 20) -> list[float]:
    """Level until `start`, then `each` a second."""
    return [max(index - start, 0) * each for index in range(int(RUN_S) + 10)]


def test_growth_is_a_problem_but_in_the_warm_up_and_of_what_is_kept() -> None:
    flat = [5.0] * (int(RUN_S) + 10)
    warming = [min(float(index), 15.0) for index in range(int(RUN_S) + 10)]
    judged = judge(
        watched(
            {
                ("router", "RSS"): climb(0),
                ("router", "descriptors"): flat,
                ("cache", "RSS"): warming,
                ("cache", "threads"): [12.0 + (at > 60) for at in range(int(RUN_S) + 10)],
                ("prefill", "RSS"): climb(0, each=4096),  # less than an allocator's two steps
                ("prefill", "holds"): climb(0, each=0.1),
                KEEPS: climb(0),
            }
        ),
        run_s=RUN_S,
    )
    assert growing(judged) == ["router RSS grows", "prefill holds grows"]
    assert judged[KEEPS].grows


def test_a_run_too_short_to_judge_is_refused() -> None:
    watch = Watch({}, {})
    watch.times_s = [float(index) for index in range(NUM_BATCHES)]
    watch.series = {("router", "RSS"): [1.0] * NUM_BATCHES}
    with pytest.raises(ConfigError, match="too few"):
        judge(watch, run_s=float(NUM_BATCHES))


def test_descriptors_and_memory_of_a_process_are_seen_to_grow() -> None:
    gc.collect()
    watch = Watch({"me": os.getpid()}, {})
    watch.sample()
    held = bytearray(os.urandom(1 << 20) * 32)
    files = [os.open(os.devnull, os.O_RDONLY) for _ in range(5)]
    watch.sample()
    for file in files:
        os.close(file)
    before, after = watch.series["me", "descriptors"]
    assert after - before == 5
    before, after = watch.series["me", "RSS"]
    assert after - before > len(held) * 0.9
    assert watch.last("threads")["me"] >= 1


def test_slots_are_read_from_a_metrics_page() -> None:
    registry = CollectorRegistry()
    Gauge("tidemill_worker_blocks", "", registry=registry).set(64)
    Gauge("tidemill_worker_blocks_free", "", registry=registry).set(60)
    holds = Gauge("tidemill_router_holds", "", ["state"], registry=registry)
    holds.labels("running").set(2)
    holds.labels("resolving").set(1)
    endpoint = serve_metrics("127.0.0.1:0", registry=registry)
    try:
        found = slots(f"http://127.0.0.1:{endpoint.port}/metrics")
    finally:
        endpoint.close()
    assert found == {"blocks": 4, "holds": 3}


def test_the_stack_s_pids_are_read(tmp_path: Path) -> None:
    path = tmp_path / "pids"
    path.write_text("12 redis-cache\n13 router\n")
    assert read_pids(path) == {"redis-cache": 12, "router": 13}


def test_capacity_is_the_rate_of_ends_between_start_and_tail() -> None:
    rows = [{"ended_s": at_s, "end": "whole"} for at_s in (0.0, 5.0, 10.0, 10.5, 11.0, 11.5, 20.0)]
    rows += [{"ended_s": 0.1, "end": "refused"}, {"ended_s": 50.0, "end": "whole"}]
    assert capacity(rows) == pytest.approx(2.0, rel=0.01)
