"""What each balancer evens out, and whom it never picks."""

from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidemill.policy import (
    BalancerConfig,
    InFlight,
    Placement,
    TierOverlap,
    WorkerLoad,
    pick_decode,
    pick_prefill,
)

NOW = 100.0
PICKS = [pick_prefill, pick_decode]


def worker(name: str, **changes: int | float | bool) -> WorkerLoad:
    figures: dict[str, int | float | bool] = {
        "epoch": 1,
        "sequence": 1,
        "observed_at": NOW,
        "free_blocks": 1000,
        "total_blocks": 1000,
    }
    return WorkerLoad(worker_id=name, **(figures | changes))  # type: ignore[arg-type]


def name_of(load: WorkerLoad | None) -> str | None:
    return None if load is None else load.worker_id


def prefill(
    loads: list[WorkerLoad], request: Placement, in_flight: InFlight | None = None, seed: int = 0
) -> str | None:
    return name_of(pick_prefill(loads, request, in_flight or InFlight(), Random(seed), now=NOW))


def decode(
    loads: list[WorkerLoad], request: Placement, in_flight: InFlight | None = None, seed: int = 0
) -> str | None:
    return name_of(pick_decode(loads, request, in_flight or InFlight(), Random(seed), now=NOW))


def test_prefill_goes_where_fewer_uncached_tokens_are_queued() -> None:
    loads = [worker("a", queued_uncached_tokens=3000), worker("b", queued_uncached_tokens=500)]
    assert {prefill(loads, Placement(num_prompt_tokens=100), seed=seed) for seed in range(20)} == {
        "b"
    }


def test_prefill_prefers_cached_blocks_to_an_equal_queue() -> None:
    loads = [worker("a"), worker("b"), worker("c")]
    request = Placement(num_prompt_tokens=1000, overlap={"b": TierOverlap(10)})
    assert {prefill(loads, request, seed=seed) for seed in range(20)} == {"b"}


def test_prefill_leaves_the_cached_worker_when_its_queue_costs_more_than_the_cache_saves() -> None:
    loads = [worker("a"), worker("b", queued_uncached_tokens=2000)]
    assert prefill(loads, Placement(num_prompt_tokens=1000, overlap={"b": TierOverlap(10)})) == "a"


def test_attention_makes_a_cached_beginning_worth_less_than_a_cached_whole() -> None:
    """1000 tokens at the end of a 100k prompt attend to 100k each: worth 7,700 tokens' work."""
    long = Placement(
        num_prompt_tokens=100_000, overlap={"a": TierOverlap(1546), "b": TierOverlap(1562)}
    )
    assert long.uncached_tokens("a") - long.uncached_tokens("b") == 1024
    loads = [
        worker("a", total_blocks=2000, free_blocks=2000),
        worker("b", total_blocks=2000, free_blocks=2000, queued_uncached_tokens=5000),
    ]
    assert prefill(loads, long) == "b"


def test_own_unreported_work_counts_at_once() -> None:
    loads = [worker("a"), worker("b")]
    in_flight = InFlight()
    picked = Counter[str | None]()
    for number in range(8):
        name = prefill(loads, Placement(num_prompt_tokens=1000), in_flight, seed=number)
        assert name is not None
        in_flight.add(str(number), name, at=NOW, tokens=1000)
        picked[name] += 1
    assert picked == {"a": 4, "b": 4}


def test_among_near_ties_the_better_of_two_random_ones_is_taken() -> None:
    loads = [worker(str(number), queued_uncached_tokens=number) for number in range(4)]
    picked = Counter(
        prefill(loads, Placement(num_prompt_tokens=100), seed=seed) for seed in range(600)
    )
    assert picked.keys() == {"0", "1", "2"}  # the worst of four never wins a pair
    assert picked["0"] > picked["1"] > picked["2"] > 50


def test_a_prefill_worker_with_a_long_queue_has_no_room() -> None:
    full = worker("a", queued_uncached_tokens=8192)
    assert prefill([full], Placement(num_prompt_tokens=10)) is None
    almost = worker("a", queued_uncached_tokens=8191)
    assert prefill([almost], Placement(num_prompt_tokens=60_000)) == "a"
    in_flight = InFlight()
    in_flight.add("r", "a", at=NOW, tokens=1)
    assert prefill([almost], Placement(num_prompt_tokens=10), in_flight) is None


def test_prefill_needs_free_blocks_for_what_it_does_not_hold() -> None:
    request = Placement(num_prompt_tokens=640)
    assert prefill([worker("a", free_blocks=9)], request) is None
    assert prefill([worker("a", free_blocks=10)], request) == "a"
    in_flight = InFlight()
    in_flight.add("r", "a", at=NOW, blocks=1)
    assert prefill([worker("a", free_blocks=10)], request, in_flight) is None
    held = Placement(num_prompt_tokens=640, overlap={"a": TierOverlap(4)})
    assert prefill([worker("a", free_blocks=6)], held) == "a"


def test_decode_evens_out_kv_use() -> None:
    loads = [worker("a", free_blocks=200), worker("b", free_blocks=600)]
    assert {decode(loads, Placement(num_prompt_tokens=100), seed=seed) for seed in range(20)} == {
        "b"
    }


def test_decode_evens_out_requests_where_kv_use_is_equal() -> None:
    loads = [worker("a", running=30, waiting=2), worker("b", running=10), worker("c", running=31)]
    assert {decode(loads, Placement(num_prompt_tokens=100), seed=seed) for seed in range(20)} == {
        "b"
    }


def test_own_unreported_requests_count_for_decode_at_once() -> None:
    loads = [worker("a", running=10), worker("b", running=12)]
    in_flight = InFlight()
    for number in range(8):
        in_flight.add(str(number), "a", at=NOW)
    assert decode(loads, Placement(num_prompt_tokens=100), in_flight) == "b"


def test_decode_compares_shares_of_unequal_pools() -> None:
    loads = [
        worker("small", total_blocks=100, free_blocks=50),
        worker("large", total_blocks=1000, free_blocks=400),
    ]
    assert decode(loads, Placement(num_prompt_tokens=640)) == "small"
    assert decode(loads, Placement(num_prompt_tokens=2560)) == "large"


def test_decode_needs_room_for_the_prompt_and_its_reserve() -> None:
    request = Placement(num_prompt_tokens=640)
    assert decode([worker("a", free_blocks=10)], request) is None
    assert decode([worker("a", free_blocks=11)], request) == "a"
    in_flight = InFlight()
    in_flight.add("r", "a", at=NOW, blocks=1)
    assert decode([worker("a", free_blocks=11)], request, in_flight) is None


@pytest.mark.parametrize("pick", PICKS)
@pytest.mark.parametrize(
    "unfit",
    [
        worker("x", draining=True),
        worker("x", observed_at=NOW - 3.1),
        worker("x", free_blocks=0),
        worker("x", free_blocks=0, total_blocks=0),
        worker("refused"),
    ],
)
def test_who_cannot_take_it_is_never_picked(pick: object, unfit: WorkerLoad) -> None:
    assert callable(pick)
    request = Placement(num_prompt_tokens=100, excluded=frozenset({"refused"}))
    arguments = {"in_flight": InFlight(), "rng": Random(0), "now": NOW}
    assert pick(loads=[unfit], request=request, **arguments) is None
    busy = worker("fit", queued_uncached_tokens=8000, running=500, free_blocks=500)
    assert name_of(pick(loads=[unfit, busy], request=request, **arguments)) == "fit"
    assert pick(loads=[], request=request, **arguments) is None


@given(
    figures=st.lists(
        st.tuples(st.integers(0, 10_000), st.integers(0, 300), st.integers(0, 1000)),
        min_size=1,
        max_size=6,
    ),
    tokens=st.integers(1, 20_000),
    seed=st.integers(0, 2**32),
)
def test_a_pick_fits_is_near_the_best_and_repeats_with_its_seed(
    figures: list[tuple[int, int, int]], tokens: int, seed: int
) -> None:
    loads = [
        worker(str(number), queued_uncached_tokens=queued, running=running, free_blocks=free)
        for number, (queued, running, free) in enumerate(figures)
    ]
    request = Placement(num_prompt_tokens=tokens)
    config = BalancerConfig()
    by_name = {load.worker_id: load for load in loads}
    picked = prefill(loads, request, seed=seed)
    roomy = [
        load
        for load in loads
        if load.free_blocks >= request.num_blocks
        and load.queued_uncached_tokens < config.max_queued_tokens
    ]
    assert (picked is None) == (not roomy)
    if picked is not None:
        assert by_name[picked] in roomy
        own_work = tokens + tokens * tokens / 2 / config.attention_parity_tokens
        best = min(load.queued_uncached_tokens for load in roomy) + own_work
        score = by_name[picked].queued_uncached_tokens + own_work
        assert score <= best + max(config.near_tie_tokens, best * config.near_tie_ratio)
    assert prefill(loads, request, seed=seed) == picked
    decoding = decode(loads, request, seed=seed)
    assert decoding is None or by_name[decoding].free_blocks >= -(-(tokens + 64) // 64)


def test_cached_tokens_never_reach_the_last_token() -> None:
    request = Placement(num_prompt_tokens=128, overlap={"a": TierOverlap(2), "b": TierOverlap(99)})
    assert (request.cached_tokens("a"), request.uncached_tokens("a")) == (127, 1)
    assert (request.cached_tokens("b"), request.cached_tokens("c")) == (127, 0)
    assert (request.num_blocks, request.new_blocks("a"), request.new_blocks("c")) == (2, 0, 2)
