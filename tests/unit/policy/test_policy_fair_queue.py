"""The fair queue: shares in tokens, classes by weight, bounds; nobody starves."""

from collections import deque
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidemill.errors import AlreadyExists, QueueFull
from tidemill.policy import Ahead, FairQueue, Priority, QueueLimits

QUANTUM = 100
STANDARD, BATCH = Priority.STANDARD, Priority.BATCH
requests = st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 1000)), max_size=40)
in_classes = st.lists(
    st.tuples(st.sampled_from("abcd"), st.integers(1, 1000), st.sampled_from(Priority)), max_size=40
)
SETTINGS = {"max_requests": 10**5, "max_requests_per_tenant": 10**5, "max_tokens": 10**9}


def queue(*, saved_turns: int = 0, batch_share: float = 0.25, **limits: int) -> FairQueue[str]:
    return FairQueue(
        QueueLimits(
            quantum_tokens=QUANTUM,
            saved_turns=saved_turns,
            batch_share=batch_share,
            **{**SETTINGS, **limits},
        )
    )


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


@settings(deadline=None)
@given(pushed=requests, saved_turns=st.integers(0, 5))
def test_service_order_is_deficit_round_robin(
    pushed: list[tuple[str, int]], saved_turns: int
) -> None:
    filled = queue(saved_turns=saved_turns)  # all have saved alike
    for number, (tenant, cost) in enumerate(pushed):
        filled.push(str(number), tenant, cost, str(number))
    assert drain(filled) == by_the_book(pushed)


@settings(deadline=None)
@given(
    costs=st.lists(st.lists(st.integers(1, 500), min_size=30, max_size=60), min_size=2, max_size=4)
)
def test_waiting_tenants_get_equal_tokens_within_a_quantum_and_one_request(
    costs: list[list[int]],
) -> None:
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
        assert max(served) - min(served) <= QUANTUM + 500


@settings(deadline=None)
@given(
    steps=st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 500)), max_size=60),
    saved_turns=st.integers(0, 10),
)
def test_a_tenant_is_ahead_of_its_share_by_its_savings_at_most(
    steps: list[tuple[str, int]], saved_turns: int
) -> None:
    shared = queue(saved_turns=saved_turns)
    others = dict.fromkeys("abc", 0)
    constant = 0
    for number in range(1000):  # one that never stops waiting
        shared.push(f"w{number}", "w", 50, "w")
    for number, (tenant, cost) in enumerate(steps):
        shared.push(str(number), tenant, cost, tenant)
        item = shared.pop()
        while item is not None and item != "w":
            others[item] += cost if item == tenant else 0
            item = shared.pop()
        constant += 50
    for tenant, got in others.items():
        assert got <= constant + saved_turns * QUANTUM + 2 * QUANTUM + 500, tenant


def test_a_tenant_with_few_large_requests_gets_as_much_as_one_with_many_small() -> None:
    full = fill([("small", 10)] * 200 + [("large", 400)] * 5)
    served = {"small": 0, "large": 0}
    for _ in range(100):
        number = int(full.pop() or "0")
        served["small" if number < 200 else "large"] += 10 if number < 200 else 400
    assert abs(served["small"] - served["large"]) <= QUANTUM + 400


@settings(deadline=None)
@given(st.sampled_from(Priority), st.sampled_from(Priority), st.integers(1, 20_000))
def test_nobody_starves_beside_a_tenant_that_never_stops(
    patient: Priority, busy: Priority, cost: int
) -> None:
    shared = queue(saved_turns=8)
    shared.push("big", "patient", cost, "big", patient)
    weight = 1 if patient is busy else {STANDARD: 1 / 3, BATCH: 3}[patient]
    for number in range(10_000):
        shared.push(f"s{number}", "busy", 50, "small", busy)
        if shared.pop() == "big":
            break
    assert number * 50 <= weight * cost + 2 * QUANTUM + 100


def test_a_tenant_that_asks_for_less_than_its_share_goes_first() -> None:
    shared = queue(saved_turns=4)
    for number in range(100):
        shared.push(f"h{number}", "heavy", 100, "heavy")
    for _ in range(10):
        assert shared.pop() == "heavy"
    for number in range(6):
        shared.push(f"l{number}", "light", 100, "light")
    own_turn = 1
    assert [shared.pop() for _ in range(8)] == (
        ["light"] * (4 + own_turn) + ["heavy", "light", "heavy"]
    )


def test_savings_are_bounded_by_the_configured_turns() -> None:
    shared = queue(saved_turns=3)
    for number in range(1000):
        shared.push(f"h{number}", "heavy", 100, "heavy")
    for _ in range(500):
        shared.pop()
    for number in range(50):
        shared.push(f"l{number}", "light", 100, "light")
    order = [shared.pop() for _ in range(30)]
    assert order[:4] == ["light"] * 4
    assert abs(order[4:].count("light") - order[4:].count("heavy")) <= 1


def test_without_savings_a_tenant_gains_nothing_by_having_nothing_waiting() -> None:
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


@settings(deadline=None)
@given(
    costs=st.lists(st.tuples(st.integers(1, 500), st.integers(1, 500)), min_size=50, max_size=99),
    share=st.floats(0.05, 0.95),
)
def test_classes_keep_their_weights_while_both_wait(
    costs: list[tuple[int, int]], share: float
) -> None:
    both = queue(batch_share=share)
    weights = {STANDARD: 1 - share, BATCH: share}
    for number, pair in enumerate(costs):
        for priority, cost in zip(Priority, pair, strict=True):
            both.push(f"{priority}{number}", f"t{number % 3}", cost, f"{priority} {cost}", priority)
    got = dict.fromkeys(Priority, 0.0)
    left = dict.fromkeys(Priority, len(costs))
    while all(left.values()):
        name, _, cost_text = (both.pop() or "").partition(" ")
        got[Priority(name)] += int(cost_text) / weights[Priority(name)]
        left[Priority(name)] -= 1
        assert abs(got[STANDARD] - got[BATCH]) <= sum(500 / each for each in weights.values())


def test_a_class_alone_gets_everything_and_owes_nothing_for_it() -> None:
    both = queue(batch_share=0.25)
    for number in range(40):
        both.push(f"b{number}", "b", 100, "batch", BATCH)
    assert [both.pop() for _ in range(20)] == ["batch"] * 20
    for number in range(40):
        both.push(f"s{number}", "s", 100, "standard")
    order = [both.pop() for _ in range(16)]
    assert order.count("standard") == 12
    assert order.count("batch") == 4
    assert all(one != "batch" or other != "batch" for one, other in pairwise(order))


def test_an_order_inside_a_class_is_kept_when_classes_alternate() -> None:
    both = queue()
    for number in range(10):
        both.push(f"s{number}", "a", 10, f"s{number}")
        both.push(f"b{number}", "a", 10, f"b{number}", BATCH)
    order = drain(both)
    for name in "sb":
        assert [each for each in order if each[0] == name] == [f"{name}{n}" for n in range(10)]


@settings(deadline=None)
@given(pushed=in_classes, data=st.data())
def test_what_is_ahead_is_the_order_of_service(
    pushed: list[tuple[str, int, Priority]], data: st.DataObject
) -> None:
    full = queue(saved_turns=data.draw(st.integers(0, 9)))
    for number, (tenant, cost, priority) in enumerate(pushed):
        full.push(str(number), tenant, cost, str(number), priority)
        if data.draw(st.booleans()):
            full.pop()
    promised = full.all_ahead()
    assert [each.requests for each in promised.values()] == list(range(len(full)))
    assert promised == {key: full.ahead(key) for key in promised}
    order = drain(full)
    assert order == list(promised)
    tokens = 0
    own: dict[tuple[str, Priority], int] = {}
    for item in order:
        tenant, cost, priority = pushed[int(item)]
        spent = own.get((tenant, priority), 0)
        assert (promised[item].tokens, promised[item].own_tokens) == (tokens, spent)
        tokens += cost
        own[tenant, priority] = spent + cost


def test_what_is_ahead_of_one_request() -> None:
    full = fill([("a", 100), ("a", 100), ("b", 100)])
    assert [full.ahead(str(number)) for number in range(3)] == [
        Ahead(0, 0, 0),
        Ahead(2, 200, 100),
        Ahead(1, 100, 0),
    ]
    with pytest.raises(KeyError):
        full.ahead("9")


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from("+-pk"),
            st.sampled_from("abc"),
            st.integers(1, 900),
            st.sampled_from(Priority),
        )
    )
)
def test_every_request_leaves_exactly_once_and_counts_are_kept(
    steps: list[tuple[str, str, int, Priority]],
) -> None:
    mixed = queue(saved_turns=2)
    waiting: dict[str, int] = {}
    left: list[str] = []
    for number, (action, tenant, cost, priority) in enumerate(steps):
        if action == "+":
            mixed.push(str(number), tenant, cost, str(number), priority)
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
        assert mixed.all_ahead().keys() == waiting.keys()
    left += drain(mixed)
    assert len(left) == len(set(left))
    assert not waiting.keys() - set(left)


def test_a_full_queue_refuses() -> None:
    full = queue(max_requests=4)
    for number in range(4):
        full.push(str(number), str(number), 1000, "x")
    with pytest.raises(QueueFull, match="4 requests are waiting"):
        full.push("5", "e", 1, "x")
    full.pop()
    full.push("5", "e", 1, "x")
    assert len(full) == 4


def test_a_tenant_at_its_own_limit_does_not_shut_out_the_others() -> None:
    shared = queue(max_requests_per_tenant=2)
    shared.push("1", "a", 10, "x")
    shared.push("2", "a", 10, "x")
    with pytest.raises(QueueFull, match="tenant a has 2 requests waiting"):
        shared.push("3", "a", 10, "x")
    shared.push("4", "b", 10, "x")
    shared.pop()
    shared.push("3", "a", 10, "x")


@settings(deadline=None)
@given(crowd=st.integers(1, 9), cost=st.integers(1, 5000))
def test_a_few_tenants_that_crowd_leave_room_for_the_next(crowd: int, cost: int) -> None:
    shared = queue(max_requests=100, max_tokens=100_000)
    for number in range(100 * crowd):
        try:
            shared.push(f"{number}", f"t{number % crowd}", cost, "x")
        except QueueFull:
            continue
    shared.push("newcomer", "n", cost, "x")


def test_tokens_are_bounded_but_a_lone_request_always_fits() -> None:
    small = queue(max_tokens=100)
    small.push("1", "a", 5_000, "huge")
    with pytest.raises(QueueFull, match="5000 prompt tokens are waiting"):
        small.push("2", "b", 1, "x")
    assert small.pop() == "huge"
    small.push("2", "b", 40, "x")
    with pytest.raises(QueueFull, match="tenant b has 40 prompt tokens waiting"):
        small.push("3", "b", 30, "x")
    small.push("3", "c", 30, "x")


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
    assert empty.all_ahead() == {}


def test_costs_and_limits_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="cost_tokens must be at least 1"):
        queue().push("1", "a", 0, "x")
    with pytest.raises(ValueError, match="quantum_tokens must be at least 1"):
        QueueLimits(quantum_tokens=0)
    with pytest.raises(ValueError, match="saved_turns must be at least 0"):
        QueueLimits(saved_turns=-1)
    for share in (0, 1):
        with pytest.raises(ValueError, match="batch_share must lie between 0 and 1"):
            QueueLimits(batch_share=share)


def test_a_request_far_beyond_the_quantum_is_reached_without_counting_turns() -> None:
    full = queue(max_tokens=10**13)
    for tenant in "ab":
        full.push(tenant, tenant, 10**12, tenant)
    assert drain(full) == ["a", "b"]


def test_a_tenant_long_gone_is_forgotten() -> None:
    many = queue()
    for number in range(5000):
        many.push("x", f"t{number}", 1, "x")
        many.pop()
    assert len(many._classes[STANDARD]._resting) == 4096
