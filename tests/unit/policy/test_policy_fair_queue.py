"""Deficit round robin: fair in tokens, bounded, nobody starves, positions are what happens."""

from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidemill.errors import AlreadyExists, QueueFull
from tidemill.policy import FairQueue, QueueLimits

QUANTUM = 100
requests = st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 1000)), max_size=40)


def queue(limits: QueueLimits | None = None, clock: list[float] | None = None) -> FairQueue[str]:
    now = clock if clock is not None else [0.0]
    return FairQueue(limits or QueueLimits(), quantum=QUANTUM, clock=lambda: now[0])


def fill(pushed: list[tuple[str, int]]) -> FairQueue[str]:
    filled = queue()
    for number, (tenant, cost) in enumerate(pushed):
        filled.push(str(number), tenant, cost, str(number))
    return filled


def drain(full: FairQueue[str]) -> list[str]:
    order = []
    while (item := full.pop()) is not None:
        order.append(item)
    return order


def by_the_book(pushed: list[tuple[str, int]]) -> list[str]:
    """Deficit round robin as published, turn by turn."""
    waiting: dict[str, deque[tuple[int, str]]] = {}
    for number, (tenant, cost) in enumerate(pushed):
        waiting.setdefault(tenant, deque()).append((cost, str(number)))
    turns = deque(waiting)
    deficit = dict.fromkeys(waiting, 0)
    order = []
    while turns:
        tenant = turns.popleft()
        deficit[tenant] += QUANTUM
        while waiting[tenant] and waiting[tenant][0][0] <= deficit[tenant]:
            cost, number_text = waiting[tenant].popleft()
            deficit[tenant] -= cost
            order.append(number_text)
        if waiting[tenant]:
            turns.append(tenant)
    return order


@given(requests)
def test_service_order_is_deficit_round_robin(pushed: list[tuple[str, int]]) -> None:
    assert drain(fill(pushed)) == by_the_book(pushed)


def test_a_tenant_with_few_large_requests_gets_as_much_as_one_with_many_small() -> None:
    full = fill([("small", 10)] * 200 + [("large", 400)] * 5)
    served = {"small": 0, "large": 0}
    for _ in range(100):
        number = int(full.pop() or "0")
        served["small" if number < 200 else "large"] += 10 if number < 200 else 400
    assert abs(served["small"] - served["large"]) <= QUANTUM + 2 * 400


@given(
    costs=st.lists(st.lists(st.integers(1, 500), min_size=30, max_size=60), min_size=2, max_size=4)
)
def test_waiting_tenants_get_equal_tokens(costs: list[list[int]]) -> None:
    pushed = [(str(tenant), cost) for tenant, own in enumerate(costs) for cost in own]
    full = fill(pushed)
    left = [len(own) for own in costs]
    served = [0] * len(costs)
    while all(left):
        item = full.pop()
        assert item is not None
        tenant, cost = pushed[int(item)]
        left[int(tenant)] -= 1
        served[int(tenant)] += cost
        assert max(served) - min(served) <= QUANTUM + 2 * 500


def test_nobody_starves_beside_a_tenant_that_never_stops() -> None:
    shared = queue()
    shared.push("big", "patient", 5_000, "big")
    for number in range(10_000):
        shared.push(f"s{number}", "busy", 50, "small")
        if shared.pop() == "big":
            break
    assert number <= 5_000 / 50 + 5


def test_a_tenant_cannot_save_up_turns_while_it_has_nothing_waiting() -> None:
    shared = queue()
    for number in range(50):  # "a" alone, emptied each time, leaves no credit behind
        shared.push(f"x{number}", "a", 1, "x")
        assert shared.pop() == "x"
    for number in range(20):
        shared.push(f"a{number}", "a", 50, "a")
        shared.push(f"b{number}", "b", 50, "b")
    first = [shared.pop() for _ in range(8)]
    assert first.count("a") == first.count("b") == 4


def test_requests_of_one_tenant_keep_their_order() -> None:
    assert drain(fill([("a", cost) for cost in (900, 1, 50, 700)])) == ["0", "1", "2", "3"]


@given(pushed=requests, data=st.data())
def test_positions_are_the_order_of_service(
    pushed: list[tuple[str, int]], data: st.DataObject
) -> None:
    full = fill(pushed)
    for _ in range(data.draw(st.integers(0, len(pushed)))):
        full.pop()
    promised = full.positions()
    assert list(promised.values()) == list(range(len(full)))
    assert drain(full) == list(promised)


def test_position_of_one_request() -> None:
    full = fill([("a", 100), ("a", 100), ("b", 100)])
    assert [full.position(str(number)) for number in range(3)] == [0, 2, 1]
    with pytest.raises(KeyError):
        full.position("9")


@given(st.lists(st.tuples(st.sampled_from("+-pk"), st.sampled_from("abc"), st.integers(1, 900))))
def test_every_request_leaves_exactly_once_and_counts_are_kept(
    steps: list[tuple[str, str, int]],
) -> None:
    mixed = queue()
    waiting: dict[str, int] = {}
    left: list[str] = []
    for number, (action, tenant, cost) in enumerate(steps):
        if action == "+":
            mixed.push(str(number), tenant, cost, str(number))
            waiting[str(number)] = cost
        elif action == "-":
            gone = next(iter(waiting), "none")
            assert mixed.remove(gone) is (gone in waiting)
            waiting.pop(gone, None)
        else:
            promised = mixed.peek()
            if action == "p":
                item = mixed.pop()
                assert item == promised
                if item is not None:
                    left.append(item)
                    del waiting[item]
        assert len(mixed) == len(waiting)
        assert mixed.queued_tokens == sum(waiting.values())
        assert mixed.positions().keys() == waiting.keys()
    left += drain(mixed)
    assert len(left) == len(set(left))
    assert not waiting.keys() - set(left)


def test_a_full_queue_refuses_and_says_when_to_return() -> None:
    clock = [100.0]
    full = queue(QueueLimits(max_requests=4), clock)
    for number in range(4):
        full.push(str(number), str(number), 1000, "x")
    with pytest.raises(QueueFull, match="4 requests are waiting") as caught:
        full.push("5", "e", 1, "x")
    assert caught.value.retry_after_s == 1.0  # no pace known yet
    clock[0] = 110.0
    full.pop()
    full.push("4", "d", 1000, "x")
    with pytest.raises(QueueFull) as caught:
        full.push("5", "e", 1, "x")
    assert caught.value.retry_after_s == pytest.approx(40.0)  # 4000 tokens at 1000 in 10 s
    clock[0] = 1000.0
    with pytest.raises(QueueFull) as caught:
        full.push("5", "e", 1, "x")
    assert caught.value.retry_after_s == 60.0
    assert len(full) == 4


def test_a_tenant_at_its_own_limit_does_not_shut_out_the_others() -> None:
    shared = queue(QueueLimits(max_requests_per_tenant=2))
    shared.push("1", "a", 10, "x")
    shared.push("2", "a", 10, "x")
    with pytest.raises(QueueFull, match="tenant a has 2 requests waiting"):
        shared.push("3", "a", 10, "x")
    shared.push("4", "b", 10, "x")
    shared.pop()
    shared.push("3", "a", 10, "x")


def test_tokens_are_bounded_but_a_lone_request_always_fits() -> None:
    small = queue(QueueLimits(max_tokens=100))
    small.push("1", "a", 5_000, "huge")
    with pytest.raises(QueueFull, match="5000 prompt tokens are waiting"):
        small.push("2", "b", 1, "x")
    assert small.pop() == "huge"
    small.push("2", "b", 1, "x")


def test_a_queued_id_is_refused_and_a_served_one_may_return() -> None:
    once = queue()
    once.push("1", "a", 10, "x")
    with pytest.raises(AlreadyExists):
        once.push("1", "b", 10, "y")
    once.pop()
    once.push("1", "b", 10, "y")
    assert once.peek() == "y"


def test_an_empty_queue_has_nothing_to_give() -> None:
    empty = queue()
    assert (empty.peek(), empty.pop(), empty.remove("1"), len(empty)) == (None, None, False, 0)


def test_costs_and_quanta_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="cost_tokens must be at least 1"):
        queue().push("1", "a", 0, "x")
    with pytest.raises(ValueError, match="quantum must be at least 1"):
        FairQueue[str](quantum=0, clock=lambda: 0.0)


def test_a_request_far_beyond_the_quantum_is_reached_without_counting_turns() -> None:
    full = queue(QueueLimits(max_tokens=10**13))
    for tenant in "ab":
        full.push(tenant, tenant, 10**12, tenant)
    assert drain(full) == ["a", "b"]
