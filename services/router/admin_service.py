"""AdminService: tenants, keys and money, for whoever holds the admin key."""

import re
from collections.abc import Callable
from typing import Any

from services.router.billing_messages import balance_message, limits_message, limits_of
from services.router.keys import ApiKey, KeyStore, Tenant
from services.router.margin import MarginReports
from services.router.money.accounts import Accounts
from tidemill.api.billing.v1 import account_pb2
from tidemill.api.router.v1 import admin_service_pb2 as admin_pb2
from tidemill.api.router.v1 import admin_service_pb2_grpc
from tidemill.billing import PriceBook, format_amount
from tidemill.billing import ledger as rules
from tidemill.errors import AlreadyExists, FailedPrecondition, InvalidRequest, NotFound
from tidemill.rpc.validation import validate

_PAGE_SIZE = 100
_ENTRY_ID = re.compile(r"[0-9]{1,19}-[0-9]{1,19}")


class AdminService(admin_service_pb2_grpc.AdminServiceServicer):
    """Translates between protos, the key store and the tenants' accounts."""

    def __init__(
        self,
        *,
        store: KeyStore,
        accounts: Accounts,
        book: PriceBook,
        margin: MarginReports,
        now_ms: Callable[[], int],
    ) -> None:
        self._store = store
        self._accounts = accounts
        self._book = book
        self._margin = margin
        self._now_ms = now_ms

    async def CreateTenant(
        self, request: admin_pb2.CreateTenantRequest, context: Any
    ) -> admin_pb2.CreateTenantResponse:
        """Make a tenant whose account is in a currency that the price book knows."""
        validate(request)
        self._check_sold(request.currency)
        created = await self._store.create_tenant(request.tenant_id, request.currency)
        return admin_pb2.CreateTenantResponse(created=created)

    async def CreateKey(
        self, request: admin_pb2.CreateKeyRequest, context: Any
    ) -> admin_pb2.CreateKeyResponse:
        """Make a key and show it this once."""
        validate(request)
        key_id, key = await self._store.create_key(request.tenant_id, request.label)
        return admin_pb2.CreateKeyResponse(key_id=key_id, key=key)

    async def RevokeKey(
        self, request: admin_pb2.RevokeKeyRequest, context: Any
    ) -> admin_pb2.RevokeKeyResponse:
        """Take a key out of force."""
        validate(request)
        return admin_pb2.RevokeKeyResponse(revoked=await self._store.revoke_key(request.key_id))

    async def ListKeys(
        self, request: admin_pb2.ListKeysRequest, context: Any
    ) -> admin_pb2.ListKeysResponse:
        """One page of keys."""
        validate(request)
        tenant_id = request.tenant_id if request.HasField("tenant_id") else None
        if tenant_id is not None:
            await self._store.tenant(tenant_id)
        keys, after = await self._store.list_keys(
            tenant_id,
            after=request.page_token,
            limit=request.page_size if request.HasField("page_size") else _PAGE_SIZE,
        )
        return admin_pb2.ListKeysResponse(keys=map(_key_info, keys), next_page_token=after)

    async def TopUp(self, request: admin_pb2.TopUpRequest, context: Any) -> admin_pb2.TopUpResponse:
        """Add money that was paid."""
        validate(request)
        tenant = await self._store.tenant(request.tenant_id)
        command = rules.TopUp(
            operation_id=request.operation_id,
            now_ms=self._now_ms(),
            amount_nano=request.amount_nano,
            note=request.note,
        )
        applied = _applied(await self._accounts.top_up(tenant.id, command), tenant.currency)
        return admin_pb2.TopUpResponse(
            applied=applied.applied, balance=balance_message(applied.balance, tenant.currency)
        )

    async def Grant(self, request: admin_pb2.GrantRequest, context: Any) -> admin_pb2.GrantResponse:
        """Add money that is given."""
        validate(request)
        tenant = await self._store.tenant(request.tenant_id)
        command = rules.Grant(
            operation_id=request.operation_id,
            now_ms=self._now_ms(),
            amount_nano=request.amount_nano,
            note=request.note,
        )
        applied = _applied(await self._accounts.grant(tenant.id, command), tenant.currency)
        return admin_pb2.GrantResponse(
            applied=applied.applied, balance=balance_message(applied.balance, tenant.currency)
        )

    async def Refund(
        self, request: admin_pb2.RefundRequest, context: Any
    ) -> admin_pb2.RefundResponse:
        """Give back a settled charge, in part or whole."""
        validate(request)
        tenant = await self._store.tenant(request.tenant_id)
        command = rules.Refund(
            operation_id=request.operation_id,
            now_ms=self._now_ms(),
            request_id=request.request_id,
            amount_nano=request.amount_nano if request.HasField("amount_nano") else None,
            note=request.note,
        )
        reply = await self._accounts.refund(tenant.id, command)
        if reply == rules.TooMuch(0):
            raise FailedPrecondition(
                "nothing is left to give back: the charge is wholly refunded",
                reason="AMOUNT_TOO_HIGH",
                metadata={"most_nano": "0", "currency": tenant.currency},
            )
        applied = _applied(reply, tenant.currency)
        return admin_pb2.RefundResponse(
            applied=applied.applied,
            amount_nano=applied.amount_nano,
            balance=balance_message(applied.balance, tenant.currency),
        )

    async def SetLimits(
        self, request: admin_pb2.SetLimitsRequest, context: Any
    ) -> admin_pb2.SetLimitsResponse:
        """Replace the limits of a tenant or of one of its keys."""
        validate(request)
        tenant = await self._store.tenant(request.tenant_id)
        key_id = request.key_id if request.HasField("key_id") else None
        if key_id is not None:
            await self._check_key(tenant, key_id)
        command = rules.SetLimits(
            operation_id=request.operation_id,
            now_ms=self._now_ms(),
            key_id=key_id,
            limits=limits_of(request.limits),
        )
        applied = _applied(await self._accounts.set_limits(tenant.id, command), tenant.currency)
        return admin_pb2.SetLimitsResponse(applied=applied.applied)

    async def GetAccount(
        self, request: admin_pb2.GetAccountRequest, context: Any
    ) -> admin_pb2.GetAccountResponse:
        """Balances, limits and live holds."""
        validate(request)
        tenant = await self._store.tenant(request.tenant_id)
        balance = await self._accounts.balance(tenant.id)
        limits = {
            scope: limits_message(each)
            for scope, (each, _) in (await self._accounts.limits(tenant.id)).items()
        }
        holds = await self._accounts.holds(tenant.id)
        return admin_pb2.GetAccountResponse(
            balance=balance_message(balance, tenant.currency),
            limits=limits.pop(rules.TENANT),
            key_limits=_by_key(limits),
            holds={state.value: count for state, count in holds.items()},
        )

    async def ListJournal(
        self, request: admin_pb2.ListJournalRequest, context: Any
    ) -> admin_pb2.ListJournalResponse:
        """One page of an account's journal."""
        validate(request)
        after = request.page_token
        if after and not _ENTRY_ID.fullmatch(after):
            raise InvalidRequest(
                "page_token is not of this request",
                violations=[("page_token", "must be the last answer's")],
            )
        tenant = await self._store.tenant(request.tenant_id)
        size = request.page_size if request.HasField("page_size") else _PAGE_SIZE
        entries = await self._accounts.journal(tenant.id, after=after, limit=size + 1)
        page = entries[:size]
        return admin_pb2.ListJournalResponse(
            entries=[_journal_entry(entry_id, entry) for entry_id, entry in page],
            next_page_token=page[-1][0] if len(entries) > size else "",
        )

    async def GetMargin(
        self, request: admin_pb2.GetMarginRequest, context: Any
    ) -> admin_pb2.GetMarginResponse:
        """Cost, revenue and margin."""
        validate(request)
        self._check_sold(request.currency)
        return await self._margin.report(request)

    def _check_sold(self, currency: str) -> None:
        if currency not in self._book.currencies:
            sold = ", ".join(self._book.currencies)
            raise InvalidRequest(
                f"nothing is sold in {currency} here",
                violations=[("currency", f"must be one of {sold}")],
            )

    async def _check_key(self, tenant: Tenant, key_id: str) -> None:
        record = await self._store.find(key_id)
        if record is None or record.tenant.id != tenant.id:
            raise NotFound(f"{tenant.id} has no key {key_id}", reason="KEY_NOT_FOUND")


def _applied(reply: rules.RefundReply, currency: str) -> rules.Applied:
    """What the ledger did; else why it refused, raised."""
    match reply:
        case rules.Applied():
            return reply
        case rules.OtherContent():
            raise AlreadyExists(
                "this operation id was used for another operation", reason="OPERATION_ID_REUSED"
            )
        case rules.TooMuch(most_nano=most_nano):
            raise FailedPrecondition(
                f"the amount is too high: at most {format_amount(most_nano, currency)} is possible",
                reason="AMOUNT_TOO_HIGH",
                metadata={"most_nano": str(most_nano), "currency": currency},
            )
        case rules.NotSettled(state=rules.State.UNKNOWN):
            raise NotFound("nothing was settled under this request id", reason="RECEIPT_NOT_FOUND")
        case rules.NotSettled(state=state):
            raise FailedPrecondition(
                "nothing was charged for this request",
                reason="NOT_SETTLED",
                metadata={"state": state.value},
            )


def _by_key(limits: dict[str, account_pb2.Limits]) -> dict[str, account_pb2.Limits]:
    """Limits of keys, from scopes to key ids."""
    prefix = rules.key_scope("")
    return {scope.removeprefix(prefix): message for scope, message in limits.items()}


def _journal_entry(entry_id: str, entry: rules.JournalEntry) -> admin_pb2.JournalEntry:
    return admin_pb2.JournalEntry(
        entry_id=entry_id,
        kind=entry.kind,
        subject=entry.subject,
        at_ms=entry.at_ms,
        postings=dict(entry.postings),
        detail_json=entry.detail,
    )


def _key_info(key: ApiKey) -> admin_pb2.KeyInfo:
    return admin_pb2.KeyInfo(
        key_id=key.id,
        tenant_id=key.tenant_id,
        label=key.label,
        created_at_ms=key.created_at_ms,
        revoked=key.revoked,
    )
