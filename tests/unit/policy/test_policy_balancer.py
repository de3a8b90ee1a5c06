"""What each balancer evens out, and whom it never picks."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidemill.policy import (
    BalancerConfig,
    InFlight,
    Placement,
    TierOverlap,
    Work,
    WorkerLoad,
    pick_decode,
    pick_prefill,
    room_in_s,
)

NOW = 100.0
Pick = Callable[..., WorkerLoad | None]
PICKS: list[Pick] = [pick_prefill, pick_decode]


def worker(name: str, **changes: int | float | bool) -> WorkerLoad:
    figures: dict[str, int | float | bool] = {
        "epoch": 1,
        "sequence": 1,
        "observed_at": NOW,
        "free_blocks": 1000,
        "total_blocks": 1000,
    }
    return WorkerLoad(worker_id=name, **(figures | changes))  # type: ignore[arg-type]


def sent_and_done(in_flight: InFlight, name: str, tokens: int, *, at: float = NOW) -> None:
    in_flight.add("done", name, at=at, tokens=tokens, pairs=tokens * (tokens + 1) // 2)
    in_flight.remove("done")


A_PROMPT = Placement(num_prompt_tokens=1000)


def pick_of(
    pick: Pick,
    loads: list[WorkerLoad],
    in_flight: InFlight | None = None,
    seed: int = 0,
    request: Placement = A_PROMPT,
) -> str | None:
    in_flight = in_flight if in_flight is not None else InFlight()
    load = pick(loads, request, in_flight, Random(seed), now=NOW)
    return name_of(load)


def prefill(
    loads: list[WorkerLoad], request: Placement, in_flight: InFlight | None = None, seed: int = 0
) -> str | None:
    return pick_of(pick_prefill, loads, in_flight, seed, request)


def decode(
    loads: list[WorkerLoad], request: Placement, in_flight: InFlight | None = None, seed: int = 0
) -> str | None:
    return pick_of(pick_decode, loads, in_flight, seed, request)


def name_of(load: WorkerLoad | None) -> str | None:
    return None if load is None else load.worker_id


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
    saved = 10 * 64
    held = Placement(num_prompt_tokens=1000, overlap={"b": TierOverlap(10)})
    shorter, longer = 20 * saved, 25 * saved  # what is computed twice delays all that come after
    assert prefill([worker("a"), worker("b", queued_uncached_tokens=shorter)], held) == "b"
    assert prefill([worker("a"), worker("b", queued_uncached_tokens=longer)], held) == "a"
    nobodys = Placement(num_prompt_tokens=1000)
    assert prefill([worker("a"), worker("b", queued_uncached_tokens=2000)], nobodys) == "a"


def test_what_many_ask_for_is_computed_in_several_places() -> None:
    loads = [worker("a"), worker("b", queued_uncached_tokens=2000)]
    overlap = {"b": TierOverlap(10)}
    rare = Placement(num_prompt_tokens=1000, overlap=overlap, num_alike=1)
    assert prefill(loads, rare) == "b"
    popular = Placement(num_prompt_tokens=1000, overlap=overlap, num_alike=50)
    assert prefill(loads, popular) == "a"


def test_a_holder_has_room_for_what_it_spares_others() -> None:
    full = [worker("a", queued_uncached_tokens=9000), worker("b", queued_uncached_tokens=9000)]
    assert prefill(full, Placement(num_prompt_tokens=1000)) is None
    assert prefill(full, Placement(num_prompt_tokens=1000, overlap={"b": TierOverlap(10)})) == "b"
    assert (
        prefill(full, Placement(num_prompt_tokens=1000, overlap={"b": TierOverlap(0, 10)})) == "b"
    )


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


def test_prefill_among_near_ties_goes_where_less_was_given_lately() -> None:
    loads = [worker(name, queued_uncached_tokens=number) for number, name in enumerate("abcd")]
    in_flight = InFlight()
    for name in "acd":
        sent_and_done(in_flight, name, 500)
    picked = {
        prefill(loads, Placement(num_prompt_tokens=100), in_flight, seed) for seed in range(9)
    }
    assert picked == {"b"}
    fresh = Counter(prefill(loads, Placement(num_prompt_tokens=100), seed=s) for s in range(400))
    assert fresh.keys() == set("abcd"), "nobody was given anything: any will do"
    assert min(fresh.values()) > 50


def test_prefill_evens_out_attention_and_tokens_at_once() -> None:
    """One prompt of 9,000 tokens attends to nine times as much as nine of 1,000."""
    loads = [worker("one"), worker("many")]
    in_flight = InFlight()
    sent_and_done(in_flight, "one", 9000)
    for _ in range(10):
        sent_and_done(in_flight, "many", 1000)
    assert prefill(loads, Placement(num_prompt_tokens=6000), in_flight) == "many"
    for _ in range(20):
        sent_and_done(in_flight, "many", 1000)
    assert prefill(loads, Placement(num_prompt_tokens=50), in_flight) == "one"


def test_what_was_given_fades() -> None:
    in_flight = InFlight(half_life_s=10)
    in_flight.add("r", "a", at=NOW - 20, tokens=1000, pairs=400, blocks=16)
    assert in_flight.given("a", now=NOW) == Work(0.25, 250, 100, 4)
    assert in_flight.given("b", now=NOW) == Work()
    in_flight.forget("a")
    assert in_flight.given("a", now=NOW) == Work()


def test_a_worker_has_computed_since_its_report() -> None:
    old = worker("a", queued_uncached_tokens=4600, observed_at=NOW - 0.5)
    loads = [old, worker("b", queued_uncached_tokens=400, prefill_tokens_per_s=9000)]
    request = Placement(num_prompt_tokens=100)
    assert prefill(loads, request) == "b"
    assert prefill([replace(old, prefill_tokens_per_s=9000), loads[1]], request) == "a"


def test_a_worker_has_not_computed_what_it_got_only_now() -> None:
    idle = worker("a", observed_at=NOW - 0.5, prefill_tokens_per_s=10_000)
    busy = worker("b", queued_uncached_tokens=200, prefill_tokens_per_s=10_000)
    in_flight = InFlight()
    in_flight.add("r", "a", at=NOW, tokens=400)
    assert prefill([idle, busy], Placement(num_prompt_tokens=100), in_flight) == "b"


@pytest.mark.parametrize(("reported", "picked"), [(10, "a"), (40, "b")])
def test_other_routers_are_taken_to_send_as_much_as_this_one(reported: int, picked: str) -> None:
    """Ten of the reported requests are its own, so with 40 in all there are about four routers."""
    in_flight = InFlight()
    for number in range(10):
        in_flight.add(f"old {number}", "b", at=NOW - 5)
    in_flight.add("new", "a", at=NOW, tokens=1000, blocks=10)
    loads = [worker("a"), worker("b", queued_uncached_tokens=2000, prefilling=reported)]
    assert prefill(loads, Placement(num_prompt_tokens=1000), in_flight) == picked


def test_prefill_counts_in_time_where_paces_differ() -> None:
    loads = [
        worker("slower", prefill_tokens_per_s=6000, queued_uncached_tokens=240),
        worker("faster", prefill_tokens_per_s=10_000, queued_uncached_tokens=360),
        worker("also", prefill_tokens_per_s=10_000, queued_uncached_tokens=500),
    ]
    assert prefill(loads, Placement(num_prompt_tokens=100)) == "faster"
    unknown = [replace(loads[0], prefill_tokens_per_s=0), *loads[1:]]
    assert prefill(unknown, Placement(num_prompt_tokens=100)) == "slower"


SLOW = {
    pick_prefill: {"prefill_tokens_per_s": 4000},
    pick_decode: {"decode_step_us": 45_000},
}
SOUND = {"prefill_tokens_per_s": 9000, "decode_step_us": 20_000}


@pytest.mark.parametrize("pick", PICKS)
def test_a_slow_worker_gets_nothing_while_others_have_room(pick: Pick) -> None:
    slow = worker("slow", **(SOUND | SLOW[pick]), running=1, prefilling=1)
    others = {"queued_uncached_tokens": 400, "running": 60, "free_blocks": 300}
    loads = [slow, worker("a", **SOUND, **others), worker("b", **SOUND, **others)]
    assert {pick_of(pick, loads, seed=seed) for seed in range(20)} == {"a", "b"}
    full = {"queued_uncached_tokens": 9000, "free_blocks": 0}
    loads = [slow, worker("a", **SOUND, **full), worker("b", **SOUND, **full)]
    assert pick_of(pick, loads) == "slow"


@pytest.mark.parametrize("pick", PICKS)
def test_a_slow_worker_that_is_idle_gets_one_request_now_and_then(pick: Pick) -> None:
    loads = [worker("slow", **(SOUND | SLOW[pick])), worker("a", **SOUND), worker("b", **SOUND)]
    in_flight = InFlight()
    assert pick_of(pick, loads, in_flight) == "slow", "this router never tried it"
    in_flight.add("try", "slow", at=NOW - 60)
    assert pick_of(pick, loads, in_flight) != "slow", "its try is not over"
    in_flight.remove("try")
    assert pick_of(pick, loads, in_flight) == "slow", "the try was long ago"
    sent_and_done(in_flight, "slow", 1, at=NOW - 4.9)
    assert pick_of(pick, loads, in_flight) != "slow"
    busy = [replace(loads[0], running=1, prefilling=1), *loads[1:]]
    assert pick_of(pick, busy, InFlight()) != "slow", "it is busy with another router's"


def test_prefill_prefers_blocks_on_the_device_to_blocks_in_host_memory() -> None:
    overlap = {"host": TierOverlap(0, 700), "device": TierOverlap(700)}
    loads = [worker("host"), worker("device")]
    request = Placement(num_prompt_tokens=700 * 64 + 1, overlap=overlap)
    assert {prefill(loads, request, seed=seed) for seed in range(20)} == {"device"}
    loads = [worker("host"), worker("device", queued_uncached_tokens=500)]
    assert prefill(loads, request) == "host"


def test_a_prefill_worker_with_a_long_queue_has_no_room() -> None:
    full = worker("a", queued_uncached_tokens=8192)
    assert prefill([full], Placement(num_prompt_tokens=10)) is None
    almost = worker("a", queued_uncached_tokens=8191)
    assert prefill([almost], Placement(num_prompt_tokens=60_000)) == "a"
    in_flight = InFlight()
    in_flight.add("r", "a", at=NOW, tokens=1)
    assert prefill([almost], Placement(num_prompt_tokens=10), in_flight) is None


@pytest.mark.parametrize(("pace", "room"), [(1000, 512), (100_000, 1000), (10_000_000, 8192)])
def test_a_worker_has_room_for_what_it_computes_in_a_moment_and_for_a_step(
    pace: int, room: int
) -> None:
    almost = worker("a", prefill_tokens_per_s=pace, queued_uncached_tokens=room - 1)
    assert prefill([almost], Placement(num_prompt_tokens=60_000)) == "a"
    full = replace(almost, queued_uncached_tokens=room)
    assert prefill([full], Placement(num_prompt_tokens=1)) is None


def test_when_there_will_be_room_is_told_by_pace() -> None:
    def room_s(*loads: WorkerLoad) -> float:
        return room_in_s(loads, A_PROMPT, InFlight(), now=NOW)

    full = worker("a", prefill_tokens_per_s=100_000, queued_uncached_tokens=6000)
    assert room_s(full) == pytest.approx(0.05)
    assert room_s(full, worker("b", prefill_tokens_per_s=80_000)) == pytest.approx(0.05)
    slower = worker("c", prefill_tokens_per_s=90_000, queued_uncached_tokens=4500)
    assert room_s(full, slower) == pytest.approx(0.04)
    assert room_s(replace(full, queued_uncached_tokens=900)) == math.inf
    assert room_s(worker("d", queued_uncached_tokens=10_000)) == math.inf


def test_what_was_sent_just_before_a_report_leaves_room_when_it_is_computed() -> None:
    """It may be in the report: were it to count twice, the worker would fall idle."""
    load = worker("a", prefill_tokens_per_s=50_000, queued_uncached_tokens=1000, prefilling=1)
    in_flight = InFlight()
    in_flight.add("r", "a", at=NOW - 0.01, tokens=1500)
    later = NOW + 0.012
    assert pick_prefill([load], A_PROMPT, in_flight, Random(1), now=NOW) is None
    assert pick_prefill([load], A_PROMPT, in_flight, Random(1), now=later) is load
    missed = replace(load, queued_uncached_tokens=0, prefilling=0)
    assert pick_prefill([missed], A_PROMPT, in_flight, Random(1), now=NOW) is None


@pytest.mark.parametrize(("queued", "picked"), [(600, None), (9000, "slow")])
def test_a_request_waits_for_others_rather_than_go_to_a_slow_worker(
    queued: int, picked: str | None
) -> None:
    """Unless they have much to do."""
    slow = worker("slow", **(SOUND | SLOW[pick_prefill]), prefilling=1)
    loads = [slow, *(worker(name, **SOUND, queued_uncached_tokens=queued) for name in "ab")]
    assert prefill(loads, A_PROMPT) == picked


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
    loads = [
        worker("a", running=30, waiting=2, free_blocks=500),
        worker("b", running=10, free_blocks=500),
        worker("c", running=31, free_blocks=500),
    ]
    assert {decode(loads, Placement(num_prompt_tokens=100), seed=seed) for seed in range(20)} == {
        "b"
    }


def test_a_long_prompt_goes_by_kv_use_and_a_short_one_by_request_count() -> None:
    loads = [
        worker("few", running=20, free_blocks=300),
        worker("light", running=30, free_blocks=500),
    ]
    assert decode(loads, Placement(num_prompt_tokens=8000)) == "light"
    assert decode(loads, Placement(num_prompt_tokens=100)) == "few"


def test_own_unreported_requests_count_for_decode_at_once() -> None:
    loads = [worker("a", running=10, free_blocks=500), worker("b", running=14, free_blocks=500)]
    in_flight = InFlight()
    assert decode(loads, Placement(num_prompt_tokens=100), in_flight) == "a"
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


def test_decode_leaves_a_worker_that_will_run_out_of_blocks_as_its_requests_grow() -> None:
    """40 requests of 100 tokens more need 63 blocks; each pool has more than that free now."""
    loads = [worker("many", running=40, free_blocks=70), worker("few", running=4, free_blocks=65)]
    request = Placement(num_prompt_tokens=640)
    assert decode(loads, request) is not None
    growing = replace(request, output_tokens=200, growth_tokens=100.0)
    assert {decode(loads, growing, seed=seed) for seed in range(20)} == {"few"}
    endless = replace(request, output_tokens=20_000, growth_tokens=10_000.0)
    assert decode(loads, endless) is not None, "all will: then they swap"


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
def test_who_cannot_take_it_is_never_picked(pick: Pick, unfit: WorkerLoad) -> None:
    request = Placement(num_prompt_tokens=100, excluded=frozenset({"refused"}))
    arguments: dict[str, Any] = {"in_flight": InFlight(), "rng": Random(0), "now": NOW}
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
        own_work = tokens + tokens * (tokens + 1) / 2 / config.attention_parity_tokens
        best = min(load.queued_uncached_tokens for load in roomy) + own_work
        score = by_name[picked].queued_uncached_tokens + own_work
        assert score <= best + max(config.near_tie_tokens, best * config.prefill_tie_ratio)
    assert prefill(loads, request, seed=seed) == picked
    decoding = decode(loads, request, seed=seed)
    assert decoding is None or by_name[decoding].free_blocks >= -(-(tokens + 64) // 64)


def test_cached_tokens_never_reach_the_last_token() -> None:
    request = Placement(num_prompt_tokens=128, overlap={"a": TierOverlap(2), "b": TierOverlap(99)})
    assert (request.cached_tokens("a"), request.uncached_tokens("a")) == (127, 1)
    assert (request.cached_tokens("b"), request.cached_tokens("c")) == (127, 0)
    assert (request.num_blocks, request.new_blocks("a"), request.new_blocks("c")) == (2, 0, 2)
