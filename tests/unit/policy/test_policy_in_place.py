"""When a prompt is prefilled where it will be decoded, and when not."""

from dataclasses import replace

from tidemill.policy import (
    BalancerConfig,
    InFlight,
    Placement,
    TierOverlap,
    WorkerLoad,
    pick_in_place,
)

NOW = 100.0
HELD = TierOverlap(10)  # 640 of the prompt's 700 tokens
FOLLOW_UP = Placement(num_prompt_tokens=700, overlap={"d0": HELD, "p0": HELD})
REST = 60


def worker(name: str, *, running: int = 0, queued: int = 0, draining: bool = False) -> WorkerLoad:
    return WorkerLoad(
        worker_id=name,
        epoch=1,
        sequence=1,
        observed_at=NOW,
        running=running,
        queued_uncached_tokens=queued,
        free_blocks=1000,
        total_blocks=1000,
        draining=draining,
    )


def pick(
    *loads: WorkerLoad,
    request: Placement = FOLLOW_UP,
    most: int = REST,
    prefilling: InFlight | None = None,
    decoding: InFlight | None = None,
) -> str | None:
    chosen = pick_in_place(
        loads,
        request,
        prefilling or InFlight(),
        decoding or InFlight(),
        {load.worker_id: most for load in loads},
        now=NOW,
        config=BalancerConfig(),
    )
    return None if chosen is None else chosen.worker_id


def test_the_decode_worker_that_holds_the_prompts_start_prefills_the_rest() -> None:
    assert pick(worker("d0"), worker("d1")) == "d0"


def test_a_prompt_that_nobody_holds_is_prefilled_elsewhere_however_short() -> None:
    assert pick(worker("d0"), request=Placement(num_prompt_tokens=10)) is None


def test_a_rest_that_is_longer_than_the_worker_allows_is_prefilled_elsewhere() -> None:
    assert pick(worker("d0"), most=REST - 1) is None
    assert pick(worker("d0"), most=0) is None


def test_what_a_worker_is_prefilling_already_counts_reported_or_not() -> None:
    assert pick(worker("d0", queued=1)) is None
    assert pick(worker("d0", queued=1), most=REST + 1) == "d0"
    sent = InFlight()
    sent.add("other", "d0", at=NOW, tokens=1)
    assert pick(worker("d0"), prefilling=sent) is None


def test_nothing_is_computed_that_another_worker_holds() -> None:
    longer = replace(FOLLOW_UP, overlap={"d0": TierOverlap(9), "p0": HELD})
    assert pick(worker("d0"), request=longer, most=1000) is None


def test_a_holder_with_far_more_to_do_than_others_gets_no_more_for_it() -> None:
    assert pick(worker("d0", running=4), worker("d1")) == "d0"
    assert pick(worker("d0", running=5), worker("d1")) is None
    sent = InFlight()
    for number in range(5):
        sent.add(str(number), "d0", at=NOW, blocks=1)
    assert pick(worker("d0"), worker("d1"), decoding=sent) is None


def test_of_several_holders_the_least_loaded_is_chosen() -> None:
    both = replace(FOLLOW_UP, overlap={"d0": HELD, "d1": HELD})
    assert pick(worker("d0", running=2), worker("d1", running=1), request=both) == "d1"


def test_a_holder_that_refused_the_request_or_drains_is_left_alone() -> None:
    refused = replace(FOLLOW_UP, excluded=frozenset({"d0"}))
    assert pick(worker("d0"), worker("d1"), request=refused) is None
    assert pick(worker("d0", draining=True), worker("d1")) is None
    assert pick() is None
