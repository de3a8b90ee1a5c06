"""The operator's account operations over the wire: idempotent, bounded, and all in the journal."""

import json
from collections import Counter
from typing import Any

import grpc
import pytest

from tests.bank import Bank
from tests.router_harness import ADMIN_KEY, OPENING_NANO, bearer
from tidemill.api.billing.v1 import account_pb2
from tidemill.api.billing.v1 import billing_service_pb2 as billing_pb
from tidemill.api.router.v1 import admin_service_pb2 as pb
from tidemill.billing import format_amount

pytestmark = pytest.mark.redis

MONEY = ("TopUp", "Grant", "Refund", "SetLimits", "GetAccount", "ListJournal")


def credit(bank: Bank, kind: str, operation_id: str, amount_nano: int, note: str = "") -> Any:
    request = {"TopUp": pb.TopUpRequest, "Grant": pb.GrantRequest}[kind]
    return request(
        tenant_id=bank.tenant_id, operation_id=operation_id, amount_nano=amount_nano, note=note
    )


def refund(bank: Bank, operation_id: str, amount_nano: int | None = None) -> pb.RefundRequest:
    return pb.RefundRequest(
        tenant_id=bank.tenant_id,
        operation_id=operation_id,
        request_id="one",
        amount_nano=amount_nano,
    )


async def balance(bank: Bank) -> account_pb2.Balance:
    account = await bank.admin("GetAccount", pb.GetAccountRequest(tenant_id=bank.tenant_id))
    found: account_pb2.Balance = account.balance
    return found


async def journal(bank: Bank, *, page_size: int = 1000) -> list[pb.JournalEntry]:
    request = pb.ListJournalRequest(tenant_id=bank.tenant_id, page_size=page_size)
    found = []
    while True:
        answer = await bank.admin("ListJournal", request)
        assert len(answer.entries) <= page_size
        found += answer.entries
        request.page_token = answer.next_page_token
        if not answer.next_page_token:
            return found


@pytest.mark.parametrize(
    ("kind", "field"), [("TopUp", "topped_up_nano"), ("Grant", "granted_nano")]
)
async def test_money_is_added_once_for_each_operation(bank: Bank, kind: str, field: str) -> None:
    before = getattr(await balance(bank), field)
    first = await bank.admin(kind, credit(bank, kind, "op-1", 250, "paid"))
    again = await bank.admin(kind, credit(bank, kind, "op-1", 250, "paid"))
    assert (first.applied, again.applied) == (True, False)
    assert getattr(first.balance, field) == getattr(again.balance, field) == before + 250
    assert first.balance.currency == "USD"
    for other in (
        credit(bank, kind, "op-1", 251, "paid"),
        credit(bank, "Grant" if kind == "TopUp" else "TopUp", "op-1", 250, "paid"),
    ):
        method = type(other).__name__.removesuffix("Request")
        error = await bank.admin_refused(method, other)
        assert (error.code, error.reason) == (
            grpc.StatusCode.ALREADY_EXISTS,
            "OPERATION_ID_REUSED",
        )
    assert getattr(await balance(bank), field) == before + 250


async def test_operations_of_two_tenants_do_not_meet(bank: Bank) -> None:
    await bank.router.make_tenant(f"{bank.tenant_id}-b")
    other = pb.TopUpRequest(tenant_id=f"{bank.tenant_id}-b", operation_id="same", amount_nano=1)
    assert (await bank.admin("TopUp", credit(bank, "TopUp", "same", 2))).applied
    assert (await bank.admin("TopUp", other)).applied


async def test_a_balance_never_exceeds_what_the_ledger_counts_exactly(bank: Bank) -> None:
    error = await bank.admin_refused("TopUp", credit(bank, "TopUp", "op", 2**53 - 1))
    assert (error.code, error.reason) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "AMOUNT_TOO_HIGH",
    )
    most = int(error.metadata["most_nano"])
    assert (await bank.admin("TopUp", credit(bank, "TopUp", "op", most))).applied


@pytest.mark.parametrize("amount_nano", [0, 2**53])
async def test_an_amount_out_of_bounds_is_refused(bank: Bank, amount_nano: int) -> None:
    error = await bank.admin_refused("TopUp", credit(bank, "TopUp", "op", amount_nano))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_refund_gives_back_no_more_than_was_charged(bank: Bank) -> None:
    settled = await bank.settle(request_id="one")
    charged = settled.receipt.charge.amount_nano
    part = await bank.admin("Refund", refund(bank, "part", 100))
    assert (part.applied, part.amount_nano) == (True, 100)
    error = await bank.admin_refused("Refund", refund(bank, "more", charged - 99))
    assert (error.reason, error.metadata["most_nano"]) == ("AMOUNT_TOO_HIGH", str(charged - 100))
    assert f"at most {format_amount(charged - 100, 'USD')} is possible" in str(error)
    rest = await bank.admin("Refund", refund(bank, "rest"))
    assert (rest.applied, rest.amount_nano) == (True, charged - 100)
    again = await bank.admin("Refund", refund(bank, "rest"))
    assert (again.applied, again.amount_nano) == (False, charged - 100)
    for amount_nano in (1, None):
        nothing_left = await bank.admin_refused("Refund", refund(bank, "one-more", amount_nano))
        assert nothing_left.reason == "AMOUNT_TOO_HIGH"
        assert "wholly refunded" in str(nothing_left)
    assert await balance(bank) == account_pb2.Balance(currency="USD", topped_up_nano=OPENING_NANO)


async def test_a_refund_goes_back_to_where_the_charge_came_from(bank: Bank) -> None:
    await bank.admin("Grant", credit(bank, "Grant", "gift", 10))
    await bank.settle(request_id="one")  # 10 of it are granted
    await bank.admin("Refund", refund(bank, "all"))
    assert await balance(bank) == account_pb2.Balance(
        currency="USD", granted_nano=10, topped_up_nano=OPENING_NANO
    )


async def test_what_was_never_charged_is_not_given_back(bank: Bank) -> None:
    error = await bank.admin_refused("Refund", refund(bank, "op"))
    assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, "RECEIPT_NOT_FOUND")


async def test_limits_are_replaced_as_a_whole(bank: Bank) -> None:
    def change(operation_id: str, limits: account_pb2.Limits, key_id: str | None = None) -> Any:
        return pb.SetLimitsRequest(
            tenant_id=bank.tenant_id, operation_id=operation_id, limits=limits, key_id=key_id
        )

    wide = account_pb2.Limits(concurrency=5, requests_per_minute=10)
    narrow = account_pb2.Limits(tokens_per_minute=7)
    assert (await bank.admin("SetLimits", change("a", wide))).applied
    assert not (await bank.admin("SetLimits", change("a", wide))).applied
    assert (await bank.admin_refused("SetLimits", change("a", narrow))).reason == (
        "OPERATION_ID_REUSED"
    )
    assert (await bank.admin("SetLimits", change("b", narrow))).applied
    assert (await bank.admin("SetLimits", change("c", wide, bank.key_id))).applied
    account = await bank.admin("GetAccount", pb.GetAccountRequest(tenant_id=bank.tenant_id))
    assert account.limits == narrow
    assert dict(account.key_limits) == {bank.key_id: wide}
    assert (await bank.admin("SetLimits", change("d", account_pb2.Limits()))).applied
    account = await bank.admin("GetAccount", pb.GetAccountRequest(tenant_id=bank.tenant_id))
    assert account.limits == account_pb2.Limits()


async def test_a_key_is_bound_only_through_its_own_tenant(bank: Bank) -> None:
    key = await bank.router.make_tenant(f"{bank.tenant_id}-c")
    foreign = key.removeprefix("tm_").partition(".")[0]
    for key_id in (foreign, "nosuchkey"):
        request = pb.SetLimitsRequest(tenant_id=bank.tenant_id, operation_id="op", key_id=key_id)
        error = await bank.admin_refused("SetLimits", request)
        assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, "KEY_NOT_FOUND")


async def test_an_unknown_tenant_has_no_account(bank: Bank) -> None:
    for method in MONEY:
        request = getattr(pb, f"{method}Request")(tenant_id="nobody-here")
        fields = {field.name for field in request.DESCRIPTOR.fields}
        if "operation_id" in fields:
            request.operation_id = "op"
        if method in {"TopUp", "Grant"}:
            request.amount_nano = 1
        if method == "Refund":
            request.request_id = "one"
        error = await bank.admin_refused(method, request)
        assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, "TENANT_NOT_FOUND"), method


async def test_the_journal_tells_every_posting_and_adds_up_to_the_balances(bank: Bank) -> None:
    await bank.admin("Grant", credit(bank, "Grant", "gift", 10, "welcome"))
    settled = await bank.settle(request_id="one")
    await bank.admin("Refund", refund(bank, "back", 3))
    entries = await journal(bank)
    assert [(entry.kind, entry.subject) for entry in entries] == [
        ("top_up", "opening"),
        ("grant", "gift"),
        ("reserve", "one"),
        ("settle", "one"),
        ("refund", "back"),
    ]
    assert all(sum(entry.postings.values()) == 0 for entry in entries)
    sums: Counter[str] = Counter()
    for entry in entries:
        sums.update(entry.postings)
    now = await balance(bank)
    assert (sums["granted"], sums["topped_up"], sums["hold"]) == (
        now.granted_nano,
        now.topped_up_nano,
        now.held_nano,
    )
    assert json.loads(entries[3].detail_json)["amount_nano"] == settled.receipt.charge.amount_nano
    assert json.loads(entries[1].detail_json)["note"] == "welcome"
    assert await journal(bank, page_size=2) == entries


@pytest.mark.parametrize("token", ["x", "1", "-", "1-", "1-1-1", "$", "+", "(1-0", "9" * 40 + "-0"])
async def test_a_journal_page_token_that_was_never_given_is_refused(bank: Bank, token: str) -> None:
    request = pb.ListJournalRequest(tenant_id=bank.tenant_id, page_token=token)
    error = await bank.admin_refused("ListJournal", request)
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT


async def test_live_holds_are_told_by_state(bank: Bank) -> None:
    account = await bank.admin("GetAccount", pb.GetAccountRequest(tenant_id=bank.tenant_id))
    assert not any(account.holds.values())


async def test_money_moves_by_the_admin_key_alone(bank: Bank) -> None:
    for method in MONEY:
        request = getattr(pb, f"{method}Request")(tenant_id=bank.tenant_id)
        for metadata in ((), bank.metadata, bearer("wrong")):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await getattr(bank.router.admin, method)(request, metadata=metadata)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await bank.router.billing.GetBalance(
            billing_pb.GetBalanceRequest(), metadata=bearer(ADMIN_KEY)
        )
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
