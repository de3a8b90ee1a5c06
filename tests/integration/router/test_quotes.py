"""BillingService.Quote: what a request would cost, without touching anything."""

from dataclasses import replace
from datetime import datetime
from typing import Any

import grpc
import pytest

from services.router.keys import Caller, Tenant
from services.router.messages import ask_of
from services.router.quoting import Quoting
from tests.bank import Bank
from tests.router_harness import MODEL, OPENING_NANO
from tests.scripted_worker import ScriptedWorker, answer
from tests.settlements import BOOK
from tidemill.api.billing.v1 import billing_service_pb2 as pb
from tidemill.api.billing.v1 import receipt_pb2
from tidemill.api.common.v1 import sampling_pb2
from tidemill.api.router.v1 import admin_service_pb2 as admin_pb2
from tidemill.api.router.v1 import router_service_pb2 as router_pb2
from tidemill.billing import Prices

pytestmark = pytest.mark.redis

PROMPT = "x" * 300


def ask(**fields: Any) -> router_pb2.GenerateRequest:
    given: dict[str, Any] = {"request_id": "r1", "model": MODEL, "prompt": PROMPT}
    return router_pb2.GenerateRequest(**given | fields)


def sampling(**fields: Any) -> sampling_pb2.Sampling:
    return sampling_pb2.Sampling(**fields)


async def quote(
    bank: Bank, request: router_pb2.GenerateRequest, expected: int | None = None
) -> pb.QuoteResponse:
    question = pb.QuoteRequest(request=request, expected_completion_tokens=expected)
    answered: pb.QuoteResponse = await bank.call("Quote", question)
    return answered


def cost_nano(
    prices: receipt_pb2.UnitPrices, *, hit: int = 0, miss: int = 0, output: int = 0
) -> int:
    pico = hit * prices.hit_pico + miss * prices.miss_pico + output * prices.output_pico
    return (pico + 500) // 1000


async def test_the_price_now_is_that_of_the_window_in_force(bank: Bank) -> None:
    told = await quote(bank, ask(sampling=sampling(max_tokens=40)), expected=7)
    assert (told.prompt_tokens, told.expected_hit_tokens, told.max_tokens) == (300, 0, 40)
    assert told.now.expected_nano == cost_nano(told.now.prices, miss=300, output=7)
    window = BOOK.tariff_at("deepseek-chat", told.now.starts_at_ms).window_at(told.now.starts_at_ms)
    assert told.now.window == window.name
    prices = told.now.prices
    assert Prices(prices.hit_pico, prices.miss_pico, prices.output_pico) == window.prices["USD"]
    assert told.now.ends_at_ms == BOOK.window_ends_at("deepseek-chat", told.now.starts_at_ms)
    assert (told.currency, told.book_digest.hex()) == ("USD", BOOK.digest)


async def test_without_an_expectation_all_of_max_tokens_is_priced(bank: Bank) -> None:
    told = await quote(bank, ask(sampling=sampling(max_tokens=40, n=2, temperature=1.0)))
    assert told.max_tokens == 80
    assert told.now.expected_nano == cost_nano(told.now.prices, miss=300, output=80)
    capped = await quote(bank, ask(sampling=sampling(max_tokens=40)), expected=1000)
    assert capped.now.expected_nano == cost_nano(told.now.prices, miss=300, output=40)


async def test_what_a_worker_holds_is_expected_to_be_hits(
    bank: Bank, decode: ScriptedWorker
) -> None:
    decode.scripts = [answer([10, 11, 12])]
    heard = await bank.router.generate(ask(), key=bank.key)
    assert heard.error is None
    told = await quote(bank, ask(prompt=PROMPT[:200] + "y" * 100), expected=5)
    assert told.expected_hit_tokens == 192
    assert told.now.expected_nano == cost_nano(told.now.prices, hit=192, miss=108, output=5)
    longer = await quote(bank, ask(prompt=PROMPT[:256]))
    assert longer.expected_hit_tokens == 192  # the last prompt token is never a hit
    chat = router_pb2.ChatInput(
        messages=[router_pb2.ChatMessage(role=router_pb2.CHAT_ROLE_USER, content="else")]
    )
    assert (await quote(bank, ask(prompt=None, chat=chat))).expected_hit_tokens == 0


async def test_another_tenants_prompt_is_no_hit(bank: Bank, decode: ScriptedWorker) -> None:
    decode.scripts = [answer([10])]
    assert (await bank.router.generate(ask())).error is None  # acme's
    assert (await quote(bank, ask())).expected_hit_tokens == 0


@pytest.mark.parametrize(
    ("now", "window", "cheaper"),
    [
        ("2025-06-16T12:00+00:00", "standard", "2025-06-16T16:30+00:00"),
        ("2025-06-16T17:00+00:00", "off-peak", None),
    ],
)
async def test_the_next_cheaper_window_is_told(
    bank: Bank, now: str, window: str, cheaper: str | None
) -> None:
    def now_ms() -> int:
        return int(datetime.fromisoformat(now).timestamp()) * 1000

    process = bank.router.process
    quoting = Quoting(
        admission=replace(process.router._admission, now_ms=now_ms),
        dispatchers=process.dispatchers,
        accounts=bank.settlements.accounts,
        now_ms=now_ms,
    )
    caller = Caller(Tenant(bank.tenant_id, "USD", b"s" * 32), bank.key_id)
    told = await quoting.quote(ask_of(ask()), caller, expected_completion_tokens=10)
    assert (told.now.window, told.now.starts_at_ms) == (window, now_ms())
    if cheaper is None:
        assert told.cheaper is None
        return
    assert told.cheaper is not None
    assert told.cheaper.starts_at_ms == datetime.fromisoformat(cheaper).timestamp() * 1000
    assert told.cheaper.starts_at_ms == told.now.ends_at_ms
    assert told.cheaper.expected_nano < told.now.expected_nano
    assert told.cheaper.window == "off-peak"


async def test_no_charge_exceeds_the_most_that_was_quoted(
    bank: Bank, decode: ScriptedWorker
) -> None:
    decode.scripts = [answer([10] * 40)]
    told = await quote(bank, ask(sampling=sampling(max_tokens=40)))
    assert told.now.expected_nano <= told.max_nano <= told.hold_nano
    heard = await bank.router.generate(ask(sampling=sampling(max_tokens=40)), key=bank.key)
    assert heard.completed.receipt.amount_nano <= told.max_nano


async def test_the_clients_own_bound_caps_what_is_held(bank: Bank) -> None:
    bound = router_pb2.MaxCost(currency="USD", nano=100_000)
    told = await quote(bank, ask(max_cost=bound, sampling=sampling(max_tokens=4000)))
    assert told.max_nano == told.hold_nano == 100_000


async def test_no_price_exceeds_the_clients_own_bound(bank: Bank) -> None:
    bound = router_pb2.MaxCost(currency="USD", nano=100_000)
    told = await quote(bank, ask(max_cost=bound, sampling=sampling(max_tokens=4000)))
    assert told.now.expected_nano == told.max_nano == 100_000
    assert not told.HasField("cheaper") or told.cheaper.expected_nano < 100_000


async def test_a_bound_that_does_not_pay_for_a_first_token_of_each_choice_is_refused_as_it_is_told(
    bank: Bank,
) -> None:
    def bounded(nano: int) -> router_pb2.GenerateRequest:
        bound = router_pb2.MaxCost(currency="USD", nano=nano)
        return ask(max_cost=bound, sampling=sampling(max_tokens=40, n=2))

    error = await bank.refused("Quote", pb.QuoteRequest(request=bounded(1)))
    assert (error.code, error.reason) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "MAX_COST_EXCEEDED",
    )
    heard = await bank.router.generate(bounded(1), key=bank.key)
    assert heard.error is not None
    assert (heard.error.reason, heard.error.metadata) == (error.reason, error.metadata)
    least = int(error.metadata["least_nano"])
    assert (await quote(bank, bounded(least))).max_nano == least
    assert (
        await bank.refused("Quote", pb.QuoteRequest(request=bounded(least - 1)))
    ).reason == "MAX_COST_EXCEEDED"


async def test_a_small_balance_is_held_for_the_prompt_and_a_first_step(bank: Bank) -> None:
    tenant = {"tenant_id": f"{bank.tenant_id}-poor"}
    await bank.admin("CreateTenant", admin_pb2.CreateTenantRequest(**tenant, currency="USD"))
    made = await bank.admin("CreateKey", admin_pb2.CreateKeyRequest(**tenant))
    poor = Bank(bank.router, bank.settlements, made.key)
    told = await quote(poor, ask(sampling=sampling(max_tokens=2000)))
    assert cost_nano(told.now.prices, miss=300, output=512) <= told.hold_nano < told.max_nano
    rich = await quote(bank, ask(sampling=sampling(max_tokens=2000)))
    assert rich.hold_nano >= rich.max_nano


async def test_nothing_is_held_queued_or_remembered(bank: Bank) -> None:
    for _ in range(3):
        await quote(bank, ask())
    account = await bank.admin("GetAccount", admin_pb2.GetAccountRequest(tenant_id=bank.tenant_id))
    assert account.balance.topped_up_nano == OPENING_NANO
    assert account.balance.held_nano == 0
    journal = await bank.admin(
        "ListJournal", admin_pb2.ListJournalRequest(tenant_id=bank.tenant_id)
    )
    assert [entry.kind for entry in journal.entries] == ["top_up"]
    await bank.router.check_idle()


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (ask(model="no-such-model"), "MODEL_NOT_FOUND"),
        (ask(prompt="x" * 5000), "CONTEXT_EXCEEDED"),
        (ask(max_cost=router_pb2.MaxCost(currency="CNY", nano=1)), "INVALID_REQUEST"),
    ],
)
async def test_what_would_be_refused_is_refused_here(
    bank: Bank, request_: router_pb2.GenerateRequest, reason: str
) -> None:
    error = await bank.refused("Quote", pb.QuoteRequest(request=request_))
    assert error.reason == reason
    assert error.code is not grpc.StatusCode.INTERNAL
