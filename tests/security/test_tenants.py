"""What one tenant can learn or do by another's names: nothing."""

import asyncio
from typing import Any

import grpc
import pytest

from services.router.paging import page_token
from tests.router_harness import ADMIN_KEY, bearer
from tests.router_workers import ask
from tests.security.deployment import Deployment
from tests.worker_harness import slow_down
from tidemill.api.billing.v1 import account_pb2
from tidemill.api.billing.v1 import billing_service_pb2 as billing_pb2
from tidemill.api.router.v1 import admin_service_pb2 as admin_pb2
from tidemill.errors import TidemillError
from tidemill.rpc.status import from_rpc_error

pytestmark = pytest.mark.redis

ALWAYS: dict[str, Any] = {"from_ms": 0, "to_ms": 253_402_300_800_000}


async def error_of(call: Any) -> TidemillError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value)


async def test_a_request_is_cancelled_by_its_own_tenant_alone(deployment: Deployment) -> None:
    router = deployment.router
    eve = await router.make_tenant("eve")
    slow_down(deployment.worker, 0.05)
    running = asyncio.create_task(router.generate(ask("r1", max_tokens=40)))
    await router.until(lambda: len(router.process.requests) == 1)
    assert not await router.cancel("r1", key=eve)
    theirs = await router.generate(ask("r1", 70, max_tokens=2), key=eve)
    assert theirs.completed.receipt.amount_nano > 0, "the id is free in every tenant"
    heard = await running
    assert len(heard.token_ids) == 40


async def test_no_bill_is_read_by_another_tenant(deployment: Deployment) -> None:
    router = deployment.router
    eve = bearer(await router.make_tenant("eve"))
    key_id = router.key.removeprefix("tm_").partition(".")[0]
    for number in range(3):
        assert (await router.generate(ask(f"r{number}", max_tokens=2))).error is None
    billing = router.billing
    error = await error_of(
        billing.GetReceipt(billing_pb2.GetReceiptRequest(request_id="r1"), metadata=eve)
    )
    assert error.code is grpc.StatusCode.NOT_FOUND
    unknown = await error_of(
        billing.GetReceipt(billing_pb2.GetReceiptRequest(request_id="r9"), metadata=eve)
    )
    assert str(unknown) == str(error).replace("r1", "r9"), "as one that never was"
    for span in (ALWAYS, {**ALWAYS, "key_id": key_id}):
        asked = billing_pb2.ListReceiptsRequest(**span)
        assert not (await billing.ListReceipts(asked, metadata=eve)).receipts
        usage = billing_pb2.ListUsageRequest(**span)
        rows = (await billing.ListUsage(usage, metadata=eve)).rows
        assert not any(row.requests or row.amount_nano for row in rows)
    balance = await billing.GetBalance(billing_pb2.GetBalanceRequest(), metadata=eve)
    assert balance.balance.topped_up_nano == 1000 * 10**9


async def test_a_page_token_leads_nobody_into_anothers_pages(deployment: Deployment) -> None:
    router = deployment.router
    eve = await router.make_tenant("eve")
    for number in range(3):
        assert (await router.generate(ask(f"r{number}", max_tokens=2))).error is None
    assert (await router.generate(ask("mine", max_tokens=2), key=eve)).error is None
    asked = billing_pb2.ListReceiptsRequest(**ALWAYS, page_size=1)
    first = await router.billing.ListReceipts(asked, metadata=bearer(router.key))
    asked.page_token = first.next_page_token
    rest = await router.billing.ListReceipts(asked, metadata=bearer(eve))
    assert {each.request_id for each in rest.receipts} <= {"mine"}


@pytest.mark.parametrize("number", [0, 1, 1 << 31, 1 << 53, (1 << 63) - 1])
async def test_a_page_token_that_somebody_made_up_leads_into_his_own_pages(
    deployment: Deployment, number: int
) -> None:
    router = deployment.router
    assert (await router.generate(ask("r1", max_tokens=2))).error is None
    receipts = billing_pb2.ListReceiptsRequest(**ALWAYS)
    state: dict[str, int | str] = {"position": number, "after_ms": number, "after_id": "r0"}
    receipts.page_token = page_token(receipts, state)
    answer = await router.billing.ListReceipts(receipts, metadata=bearer(router.key))
    assert {each.request_id for each in answer.receipts} <= {"r1"}
    usage = billing_pb2.ListUsageRequest(**ALWAYS)
    usage.page_token = page_token(usage, {"position": number, "at_ms": number, "row": number})
    rows = (await router.billing.ListUsage(usage, metadata=bearer(router.key))).rows
    assert len(rows) <= 1


async def test_a_quote_tells_nothing_of_what_others_have_asked(deployment: Deployment) -> None:
    router = deployment.router
    eve = await router.make_tenant("eve")
    await router.generate(ask("r1"))
    asked = billing_pb2.QuoteRequest(request=ask("r2"))
    own = await router.billing.Quote(asked, metadata=bearer(router.key))
    theirs = await router.billing.Quote(asked, metadata=bearer(eve))
    assert own.expected_hit_tokens == 192
    assert theirs.expected_hit_tokens == 0


async def test_the_operator_too_must_name_the_right_tenant(deployment: Deployment) -> None:
    router = deployment.router
    await router.make_tenant("eve")
    await router.generate(ask("r1", max_tokens=2))
    key_id = router.key.removeprefix("tm_").partition(".")[0]
    limits = account_pb2.Limits(concurrency=1)
    wrong_key = admin_pb2.SetLimitsRequest(
        tenant_id="eve", key_id=key_id, operation_id="o1", limits=limits
    )
    error = await error_of(router.admin.SetLimits(wrong_key, metadata=bearer(ADMIN_KEY)))
    assert error.reason == "KEY_NOT_FOUND"
    wrong_tenant = admin_pb2.RefundRequest(tenant_id="eve", operation_id="o2", request_id="r1")
    error = await error_of(router.admin.Refund(wrong_tenant, metadata=bearer(ADMIN_KEY)))
    assert error.reason == "RECEIPT_NOT_FOUND"
