"""Accounts in the ledger Redis: every command of `tidemill.billing.ledger` as one script.

Each call raises LedgerUnavailable when the ledger does not answer; whether the command took
effect is then unknown, and sending it again is safe for all but Extend, which may hold twice.
"""

from services.router.money.ledger import Ledger
from tidemill.billing import ledger as rules

Cursor = tuple[int, str]


class Accounts:
    """One method per command, and what can be read."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    async def reserve(self, tenant_id: str, command: rules.Reserve) -> rules.ReserveReply:
        """Take a hold."""
        raise NotImplementedError

    async def extend(self, tenant_id: str, command: rules.Extend) -> rules.ExtendReply:
        """Hold more, and write a checkpoint."""
        raise NotImplementedError

    async def checkpoint(self, tenant_id: str, command: rules.Checkpoint) -> rules.CheckpointReply:
        """Write a checkpoint."""
        raise NotImplementedError

    async def renew(self, tenant_id: str, command: rules.Renew) -> rules.Renewed:
        """Keep holds of this account."""
        raise NotImplementedError

    async def settle(self, tenant_id: str, command: rules.Settle) -> rules.SettleReply:
        """Charge a request, once; on Valkey answered only when it is on the disk."""
        raise NotImplementedError

    async def release(self, tenant_id: str, command: rules.Release) -> rules.ReleaseReply:
        """Free a hold: nothing is billed."""
        raise NotImplementedError

    async def orphan(self, tenant_id: str, command: rules.Orphan) -> rules.OrphanReply:
        """Take a hold whose owner has vanished."""
        raise NotImplementedError

    async def top_up(self, tenant_id: str, command: rules.TopUp) -> rules.OperationReply:
        """Add money that was paid in."""
        raise NotImplementedError

    async def grant(self, tenant_id: str, command: rules.Grant) -> rules.OperationReply:
        """Add money that the operator gives."""
        raise NotImplementedError

    async def refund(self, tenant_id: str, command: rules.Refund) -> rules.RefundReply:
        """Give a charge back, in part or whole."""
        raise NotImplementedError

    async def set_limits(self, tenant_id: str, command: rules.SetLimits) -> rules.OperationReply:
        """Replace the limits of the account or of one key; never TooMuch."""
        raise NotImplementedError

    async def balance(self, tenant_id: str) -> rules.Balance:
        """All 0 for an account that nothing has happened to."""
        raise NotImplementedError

    async def limits(self, tenant_id: str) -> dict[str, tuple[rules.Limits, rules.Use]]:
        """Scope (TENANT, or key_scope(key id)) -> limits and their use; TENANT is always there."""
        raise NotImplementedError

    async def request(self, tenant_id: str, request_id: str) -> rules.Request | None:
        """What the ledger knows of a request, with its refunds; None: nothing."""
        raise NotImplementedError

    async def open_requests(
        self, tenant_id: str, *, until_ms: int | None = None, limit: int = 1000
    ) -> list[tuple[str, int]]:
        """(request id, lease end) of OPEN and ORPHAN holds, soonest first, up to `until_ms`."""
        raise NotImplementedError

    async def holds(self, tenant_id: str) -> dict[rules.State, int]:
        """How many holds are OPEN and how many ORPHAN."""
        raise NotImplementedError

    async def receipts(
        self, tenant_id: str, *, from_ms: int, to_ms: int, after: Cursor | None, limit: int
    ) -> tuple[list[rules.Request], Cursor | None]:
        """Settled requests with from_ms <= decided_at_ms < to_ms, in order of (that, request id).

        Up to `limit` of those that follow `after`, and the cursor of the last; None: no more.
        """
        raise NotImplementedError

    async def journal(
        self, tenant_id: str, *, after: str, limit: int
    ) -> list[tuple[str, rules.JournalEntry]]:
        """(entry id, entry) of up to `limit` entries that follow the id `after` ("": the first)."""
        raise NotImplementedError

    async def tenants(self) -> list[str]:
        """Every tenant that ever had a hold, money or limits, sorted."""
        raise NotImplementedError

    async def put_book(self, digest: str, canonical_json: bytes) -> None:
        """Keep a price book for ever under its digest (hex)."""
        raise NotImplementedError

    async def get_book(self, digest: str) -> bytes | None:
        """The canonical JSON of the book with this digest (hex)."""
        raise NotImplementedError
