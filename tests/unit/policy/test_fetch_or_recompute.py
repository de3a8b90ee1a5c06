"""Fetching is chosen when it is quicker, and never costs much more than computing."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidemill.policy import CostLine, FetchConfig, FetchOrRecompute, Run, Source

RAM = Source("cache", "cache_ram")
DISK = Source("cache", "cache_disk")
PEER = Source("peer", "peer")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def make_policy(**config: float) -> tuple[FetchOrRecompute, Clock]:
    """A policy that has seen 10 ms of compute a block."""
    clock = Clock()
    policy = FetchOrRecompute(FetchConfig(**{"margin": 1.0, **config}), clock=clock)
    policy.computed(10, 0.1)
    return policy, clock


def test_before_anything_is_known_all_is_fetched_without_a_budget() -> None:
    policy = FetchOrRecompute(FetchConfig(), clock=Clock())
    assert policy.worth_asking("cache", 8)
    assert policy.choose([Run(RAM, 5), Run(DISK, 3)]) == 8
    assert policy.budget(8).allowed_s(0) == math.inf


def test_an_unknown_source_is_tried_within_the_budget() -> None:
    policy, _ = make_policy(slack=0.1)
    assert policy.choose([Run(RAM, 8)]) == 8
    budget = policy.budget(8)
    assert budget.allowed_s(0) == pytest.approx(0.008 + 0.01)
    assert budget.allowed_s(7) == pytest.approx(0.008 + 0.08)


def test_a_quick_source_is_fetched_and_a_slow_one_is_not() -> None:
    policy, _ = make_policy()
    policy.fetched(RAM, 10, 0.01)
    policy.fetched(DISK, 10, 0.3)
    assert policy.choose([Run(RAM, 8)]) == 8
    assert policy.choose([Run(DISK, 8)]) == 0
    assert policy.choose([Run(RAM, 8), Run(DISK, 4)]) == 8
    # What follows the slow run is worth the wait, or not.
    assert policy.choose([Run(DISK, 2), Run(RAM, 20)]) == 22
    assert policy.choose([Run(DISK, 20), Run(RAM, 2)]) == 0


def test_latency_makes_short_chains_not_worth_it() -> None:
    policy, _ = make_policy()
    policy.fetched(PEER, 2, 0.052)
    policy.fetched(PEER, 40, 0.09)
    assert policy.choose([Run(PEER, 3)]) == 0
    assert policy.choose([Run(PEER, 30)]) == 30


def test_a_cut_fetch_counts_as_if_it_had_gone_on_at_that_pace() -> None:
    policy, _ = make_policy()
    policy.cut(RAM, 20, num_landed=1, seconds=0.1)
    assert policy.fetch_s(RAM, 20) == pytest.approx(1.0)
    assert policy.choose([Run(RAM, 20)]) == 0


def test_a_store_that_turns_slow_is_left_after_a_few_fetches() -> None:
    policy, _ = make_policy()
    for _ in range(50):
        policy.fetched(RAM, 20, 0.02)
    cuts = 0
    while policy.choose([Run(RAM, 20)]):
        policy.cut(RAM, 20, num_landed=0, seconds=0.02)
        cuts += 1
    assert 1 <= cuts <= 4


def test_a_slow_source_is_tried_again_rarely_and_ever_more_rarely() -> None:
    policy, clock = make_policy(probe_s=10, most_probe_s=40)
    policy.fetched(RAM, 20, 2.0)
    tries = []
    for _ in range(2000):
        clock.now += 0.1
        if policy.worth_asking("cache", 20) and policy.choose([Run(RAM, 20)]):
            assert not policy.choose([Run(RAM, 20)]), "one caller tries, the others compute"
            policy.cut(RAM, 20, num_landed=0, seconds=0.02)
            tries.append(round(clock.now - 1000))
    assert tries == pytest.approx([10, 30, 70, 110, 150, 190], abs=1)


def test_whoever_does_not_even_answer_is_left_alone_until_it_does() -> None:
    policy, clock = make_policy(probe_s=10)
    policy.stalled("cache", 20, 0.02)
    assert not policy.worth_asking("cache", 20)
    assert policy.worth_asking("peer", 20)
    clock.now += 10
    assert policy.worth_asking("cache", 20)
    assert policy.choose([Run(RAM, 20)]) == 20
    policy.fetched(RAM, 20, 0.3)
    clock.now += 9
    assert not policy.worth_asking("cache", 20), "the stall is forgotten, the slow fetch is not"
    policy.fetched(RAM, 20, 0.001)
    policy.stalled("cache", 20, 0.02)
    assert (policy.fetch_s(RAM, 20) or 0) > 0.1, "what is known of it has become slow"


def test_a_recovered_source_is_believed_at_once() -> None:
    policy, clock = make_policy(probe_s=10)
    for _ in range(20):
        policy.fetched(RAM, 20, 2.0)
    assert not policy.worth_asking("cache", 20)
    clock.now += 300
    assert policy.choose([Run(RAM, 20)]) == 20
    policy.fetched(RAM, 20, 0.02)
    assert policy.choose([Run(RAM, 20)]) == 20


def test_a_large_margin_always_fetches() -> None:
    policy, _ = make_policy(margin=1e6)
    for _ in range(5):
        policy.fetched(RAM, 1, 5.0)
    assert policy.choose([Run(RAM, 1)]) == 1
    assert policy.budget(1).allowed_s(0) > 1000


def test_short_suffixes_do_not_hide_what_a_long_prompt_costs() -> None:
    """A step costs 40 ms however short, and 5 ms a block: only the latter could be saved."""
    policy = FetchOrRecompute(FetchConfig(), clock=Clock())
    for num_blocks in (30, 20, 40, *[1] * 200):
        policy.computed(num_blocks, 0.04 + 0.005 * num_blocks)
    assert policy.compute_s(10) == pytest.approx(0.05, rel=0.05)


def test_equal_amounts_give_a_plain_rate() -> None:
    line = CostLine()
    for seconds in (0.9, 1.1, 1.0):
        line.add(10, seconds, kept=1.0)
    assert line.fit() == pytest.approx((0.0, 0.1))


@given(
    latency=st.floats(0, 0.1),
    unit=st.floats(1e-5, 0.1),
    amounts=st.lists(st.integers(1, 500), min_size=1, max_size=30),
    seed=st.integers(0, 1000),
)
def test_a_line_is_never_negative_and_near_its_samples(
    latency: float, unit: float, amounts: list[int], seed: int
) -> None:
    rng = random.Random(seed)
    line = CostLine()
    for amount in amounts:
        line.add(amount, (latency + unit * amount) * rng.uniform(0.8, 1.2), kept=0.9)
    fitted_latency, fitted_unit = line.fit()
    assert fitted_latency >= 0
    assert fitted_unit >= 0
    mean = sum(amounts) / len(amounts)
    assert 0.0 < line.seconds(mean) < 4 * (latency + unit * max(amounts))


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="margin must be above 0"):
        FetchConfig(margin=0)
    with pytest.raises(ValueError, match="at most most_probe_s"):
        FetchConfig(probe_s=10, most_probe_s=1)
