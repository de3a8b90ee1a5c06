import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from services.router.finish import Completed, Finish, PrefillSite, Timing
from services.router.money.hold import Hold
from tests.money_desk import BOOK, Desk, admitted, desk, progress, settle, system_ms, usage
from tests.redis_process import RedisProcess
from tests.router_harness import DURABLE
from tidemill.billing import Unbilled, verify
from tidemill.billing import ledger as rules
from tidemill.billing.hold_size import STEP_TOKENS
from tidemill.errors import (
    AlreadyExists,
    FailedPrecondition,
    InsufficientBalance,
    Internal,
    LimitExceeded,
    RequestInProgress,
)

pytestmark = pytest.mark.redis


@pytest.fixture
async def own(redis_server: Callable[..., RedisProcess], tmp_path: Path) -> AsyncIterator[Desk]:
    async with desk(redis_server(**DURABLE), tmp_path, lease_s=5.0) as opened:
        yield opened


async def full_nano(desk: Desk, **fields: int) -> int:
    """What is held for a request like this one where there is money enough."""
    await desk.top_up(10**12, tenant_id="rich")
    hold = await desk.hold("size", tenant_id="rich", **fields)
    request = await desk.money.accounts.request("rich", "size")
    assert request is not None
    await hold.release(usage(0, prompt_tokens=0, host=0), Internal("not run"))
    return request.amount_nano


async def test_a_request_is_held_in_full_and_charged_what_it_used(own: Desk) -> None:
    await own.top_up(10**9)
    hold = await own.hold("r1")
    assert hold.funded_tokens == 64
    held = (await own.account()).balance.held_nano
    completed = await settle(hold, 10)
    verify(completed.receipt, BOOK)
    assert completed.chained is not None
    assert (completed.chained.position, completed.pending, completed.again) == (1, False, False)
    assert len(completed.signature) == 64
    account = await own.account()
    amount = completed.receipt.charge.amount_nano
    assert 0 < amount < held == completed.receipt.hold_nano
    assert account.balance == rules.Balance(0, 10**9 - amount, 0)
    assert own.metric("tidemill_router_settlements_total", outcome="settled") == 1


async def test_of_200_requests_at_once_as_many_run_as_the_balance_pays_for(own: Desk) -> None:
    await own.top_up(20 * await full_nano(own))
    opened = await asyncio.gather(
        *(own.open(f"r{index}") for index in range(200)), return_exceptions=True
    )
    holds = [each for each in opened if isinstance(each, Hold)]
    refused = [each for each in opened if isinstance(each, InsufficientBalance)]
    assert (len(holds), len(refused)) == (20, 180)
    assert (await own.account()).balance.topped_up_nano == 0
    completed = await asyncio.gather(*(settle(hold, 64) for hold in holds))
    account = await own.account()
    charged = sum(each.receipt.charge.amount_nano for each in completed)
    assert account.balances["revenue"] == charged
    assert account.position == 20


async def test_an_empty_account_is_told_from_a_limit(own: Desk) -> None:
    with pytest.raises(InsufficientBalance) as refused:
        await own.open("r1")
    assert refused.value.metadata["currency"] == "USD"
    assert int(refused.value.metadata["need_nano"]) > 0
    assert refused.value.metadata["available_nano"] == "0"


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (rules.Limits(requests_per_minute=1), "RATE_LIMITED"),
        (rules.Limits(tokens_per_minute=200), "RATE_LIMITED"),
        (rules.Limits(concurrency=1), "CONCURRENCY_LIMITED"),
        (rules.Limits(daily_budget_nano=150_000), "BUDGET_EXCEEDED"),
    ],
)
@pytest.mark.parametrize("key_id", [None, "k1"])
async def test_each_limit_has_a_refusal_of_its_own_that_says_when_it_ends(
    own: Desk, limits: rules.Limits, reason: str, key_id: str | None
) -> None:
    await own.top_up(10**9)
    command = rules.SetLimits(operation_id="l", now_ms=system_ms(), key_id=key_id, limits=limits)
    await own.money.accounts.set_limits("acme", command)
    held = await own.hold("r1")
    with pytest.raises(LimitExceeded) as refused:
        await own.open("r2")
    error = refused.value
    assert error.reason == reason
    assert error.quotas[0][0] == ("tenant:acme" if key_id is None else "key:k1")
    assert error.retry_after_s is not None
    if reason == "CONCURRENCY_LIMITED":
        await settle(held, 1)
        await own.hold("r2")
    else:
        assert int(error.metadata["resets_at_ms"]) > system_ms()


async def test_max_cost_is_refused_only_where_it_does_not_pay_for_one_token(own: Desk) -> None:
    await own.top_up(10**9)
    one = await full_nano(own, max_tokens=1)
    with pytest.raises(FailedPrecondition) as refused:
        await own.open("r1", cap_nano=one - 1)
    assert refused.value.reason == "MAX_COST_EXCEEDED"
    assert refused.value.metadata["least_nano"] == str(one)
    hold = await own.hold("r2", cap_nano=one)
    assert hold.funded_tokens == 1
    with pytest.raises(FailedPrecondition):
        await own.open("r3", cap_nano=one, n=2)


async def test_max_cost_bounds_what_is_funded_while_the_stream_goes_on(own: Desk) -> None:
    await own.top_up(10**9)
    cap = await full_nano(own, max_tokens=700)
    hold = await own.hold("r1", max_tokens=4000, cap_nano=cap)
    assert hold.funded_tokens == 700
    assert not hold.fund_due(700)
    assert await hold.fund(progress(700)) is None
    completed = await settle(hold, 720)
    assert completed.usage.completion_tokens == 700
    assert completed.usage.unbilled == Unbilled(overrun=20)
    assert completed.receipt.charge.amount_nano <= cap


async def test_a_hold_grows_by_steps_when_half_of_the_last_is_used(own: Desk) -> None:
    await own.top_up(await full_nano(own, max_tokens=STEP_TOKENS) + 1000)
    hold = await own.hold("r1", max_tokens=2000)
    assert hold.funded_tokens == STEP_TOKENS
    assert not hold.fund_due(255)
    assert hold.fund_due(256)
    assert await hold.fund(progress(256)) is None, "there is no money for more"
    assert not hold.fund_due(300)
    assert hold.fund_due(384), "half of what is left"
    await own.top_up(10**9)
    assert await hold.fund(progress(384)) == 2 * STEP_TOKENS
    assert (await own.account()).requests["r1"].attempts in {0, 1}
    assert not hold.fund_due(767)
    assert hold.fund_due(768)
    assert await hold.fund(progress(768)) == 3 * STEP_TOKENS
    assert await hold.fund(progress(1300)) == 2000
    assert not hold.fund_due(2000)
    await settle(hold, 2000)
    await own.account()


async def test_funds_are_due_while_a_checkpoint_is_being_written_too(own: Desk) -> None:
    await own.top_up(await full_nano(own, max_tokens=STEP_TOKENS))
    hold = await own.hold("r1", max_tokens=2000)
    await own.top_up(10**9)
    hold.checkpoint(lambda: progress(1))
    await asyncio.sleep(0)
    assert hold.fund_due(STEP_TOKENS), "a worker without funds says nothing more"
    assert await hold.fund(progress(STEP_TOKENS)) == 2 * STEP_TOKENS
    await settle(hold, STEP_TOKENS)


async def test_a_hold_grows_by_what_is_left_where_that_is_no_whole_step(own: Desk) -> None:
    await own.top_up(await full_nano(own, max_tokens=STEP_TOKENS + 40))
    hold = await own.hold("r1", max_tokens=2000)
    assert await hold.fund(progress(256)) == STEP_TOKENS + 40
    assert (await own.account()).balance.topped_up_nano == 0
    assert await hold.fund(progress(STEP_TOKENS + 30)) is None


async def test_every_step_writes_how_far_the_request_is(own: Desk) -> None:
    await own.top_up(await full_nano(own, max_tokens=STEP_TOKENS))
    hold = await own.hold("r1", max_tokens=2000)
    hold.checkpoint(lambda: progress(1))
    await own.tasks.join(1.0)
    first = (await own.account()).requests["r1"].checkpoint
    assert '"completion_tokens":1,' in first
    assert await hold.fund(progress(300)) is None
    assert '"completion_tokens":300,' in (await own.account()).requests["r1"].checkpoint


async def test_a_settled_id_is_answered_with_the_same_receipt(own: Desk) -> None:
    await own.top_up(10**9)
    first = await settle(await own.hold("r1"), 10)
    again = await own.open("r1")
    assert isinstance(again, Completed)
    assert again.again
    assert (again.receipt, again.chained, again.signature) == (
        first.receipt,
        first.chained,
        first.signature,
    )
    assert again.timing == first.timing
    with pytest.raises(AlreadyExists):
        await own.open("r1", text="another body")


async def test_a_running_id_is_told_to_come_back(own: Desk) -> None:
    await own.top_up(10**9)
    await own.hold("r1")
    with pytest.raises(RequestInProgress) as refused:
        await own.open("r1")
    assert refused.value.retry_after_s is not None
    assert 0 < refused.value.retry_after_s <= 5.0


async def test_what_came_to_nothing_frees_its_hold_and_journals_what_nobody_pays(own: Desk) -> None:
    await own.top_up(10**9)
    hold = await own.hold("r1")
    await hold.release(usage(7), Internal("a worker failed", reason="WORKER_FAULT"))
    account = await own.account()
    assert account.balance == rules.Balance(0, 10**9, 0)
    entry = account.journal[-1]
    assert entry.kind == "release"
    assert '"server_fault":7' in entry.detail
    assert '"reason":"WORKER_FAULT"' in entry.detail
    hold = await own.hold("r1")
    assert hold.fence == 2, "the id lives anew"


async def test_a_request_that_ended_before_its_prefill_is_priced_and_not_charged(own: Desk) -> None:
    await own.top_up(10**9)
    hold = await own.hold("r1")
    completed = await hold.settle(
        usage(0, prompt_tokens=0, host=0),
        finish=Finish.CANCELLED,
        site=PrefillSite(),
        timing=Timing(),
        attempts=1,
        busy=(),
    )
    assert (completed.receipt.charge.amount_nano, completed.chained, completed.pending) == (
        0,
        None,
        False,
    )
    assert await own.state("r1") is rules.State.RELEASED


async def test_a_second_settlement_charges_nothing(own: Desk) -> None:
    await own.top_up(10**9)
    hold = await own.hold("r1")
    first = await settle(hold, 10)
    second = await settle(hold, 20)
    assert second.receipt == first.receipt
    assert (await own.account()).position == 1


async def test_the_instants_that_decide_a_price_are_the_holds(own: Desk) -> None:
    await own.top_up(10**9)
    request = admitted("r1", total_timeout_s=0.05)
    await asyncio.sleep(0.02)
    hold = await own.money.treasury.open(request)
    assert isinstance(hold, Hold)
    assert hold.admitted.admitted_at_ms > request.admitted_at_ms
    await asyncio.sleep(0.1)
    completed = await settle(hold, 3)
    assert completed.receipt.admitted_at_ms == hold.admitted.admitted_at_ms
    assert completed.receipt.decided_at_ms == hold.admitted.admitted_at_ms + 50
