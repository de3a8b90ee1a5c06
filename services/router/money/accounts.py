"""Accounts in the ledger Redis: every command of `tidemill.billing.ledger` as one script.

Each call raises LedgerUnavailable when the ledger does not answer; whether the command took
effect is then unknown, and sending it again is safe for all but Extend, which may hold twice.
"""

from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Any

from services.router.money import layout, reads, replies
from services.router.money.layout import key, request_key
from services.router.money.ledger import Ledger
from tidemill.billing import ledger as rules
from tidemill.billing.chain import FIRST_CHAIN, next_chain
from tidemill.billing.ledger_operations import operation_content
from tidemill.billing.ledger_posting import operation_detail, release_detail

Cursor = reads.Cursor
Arguments = list[str | bytes | int]

_FOLDER = Path(__file__).parent
_SCRIPTS = {  # name -> what it comes after
    "reserve": ("account", "posted"),
    "extend": ("account",),
    "checkpoint": (),
    "renew": (),
    "settle": ("account", "ending", "posted", "sha256"),
    "release": ("account", "ending"),
    "orphan": (),
    "credit": ("account", "operation"),
    "refund": ("account", "operation"),
    "set_limits": ("operation",),
}
_CHAIN_ENDS = 10_000  # accounts whose chain is remembered
_RENEWED_AT_ONCE = 200  # a script blocks everybody while it runs


class Accounts:
    """One method per command, and what can be read."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._listed: set[str] = set()
        self._chain_ends: dict[str, str] = {}
        self._scripts = {
            name: ledger.script(*(_FOLDER / f"{part}.lua" for part in (*parts, name)))
            for name, parts in _SCRIPTS.items()
        }

    async def reserve(self, tenant_id: str, command: rules.Reserve) -> rules.ReserveReply:
        """Take a hold."""
        return replies.decode_reserve(await self.ask_for_hold(tenant_id, command))

    def ask_for_hold(self, tenant_id: str, command: rules.Reserve) -> Awaitable[replies.Raw]:
        """`reserve`'s answer, undecoded; asked before this returns, but for an account's first.

        Whoever stops waiting for it leaves the hold to nobody.
        """
        if tenant_id in self._listed:
            return self._ask_for_hold(tenant_id, command)
        return self._list_and_ask_for_hold(tenant_id, command)

    def _ask_for_hold(self, tenant_id: str, command: rules.Reserve) -> Awaitable[replies.Raw]:
        return self._ledger.send_script(
            self._scripts["reserve"],
            [*self._request_keys(tenant_id, command.request_id), key(tenant_id, "journal")],
            [
                command.request_id,
                command.key_id,
                command.body_sha256,
                command.owner,
                command.now_ms,
                command.lease_ms,
                command.full_nano,
                command.least_nano,
                command.prompt_tokens + command.max_tokens,
                command.terms,
                command.ledger_up_since_ms,
            ],
        )

    async def _list_and_ask_for_hold(self, tenant_id: str, command: rules.Reserve) -> replies.Raw:
        await self._list(tenant_id)
        return await self._ask_for_hold(tenant_id, command)

    async def extend(self, tenant_id: str, command: rules.Extend) -> rules.ExtendReply:
        """Hold more, and write a checkpoint."""
        account, request, _ = self._request_keys(tenant_id, command.request_id)
        raw = await self._run(
            "extend",
            [account, request, key(tenant_id, "journal")],
            [
                command.request_id,
                command.fence,
                command.now_ms,
                command.add_nano,
                command.checkpoint,
            ],
        )
        reply: rules.ExtendReply = replies.decode(raw)
        return reply

    async def checkpoint(self, tenant_id: str, command: rules.Checkpoint) -> rules.CheckpointReply:
        """Write a checkpoint."""
        raw = await self._run(
            "checkpoint",
            [request_key(tenant_id, command.request_id)],
            [command.fence, command.attempts, command.checkpoint],
        )
        reply: rules.CheckpointReply = replies.decode(raw)
        return reply

    async def renew(self, tenant_id: str, command: rules.Renew) -> rules.Renewed:
        """Keep holds of this account."""
        lost: list[str] = []
        for start in range(0, len(command.holds), _RENEWED_AT_ONCE):
            holds = command.holds[start : start + _RENEWED_AT_ONCE]
            names = [request_key(tenant_id, request_id) for request_id, _ in holds]
            arguments: Arguments = [command.owner, command.now_ms + command.lease_ms]
            for hold in holds:
                arguments.extend(hold)
            raw = await self._run("renew", [key(tenant_id, "open"), *names], arguments)
            lost.extend(request_id.decode() for request_id in raw)
        return rules.Renewed(tuple(lost))

    async def settle(self, tenant_id: str, command: rules.Settle) -> rules.SettleReply:
        """Charge a request, once; on Valkey answered only when it is on the disk.

        SHA-256 takes the ledger longer than all the rest, so the link comes from here wherever the
        chain still ends as this router saw it last.
        """
        end = self._chain_ends.get(tenant_id, FIRST_CHAIN)
        link = next_chain(end, command.content_sha256)
        raw = await self._run(
            "settle",
            [
                *self._request_keys(tenant_id, command.request_id),
                key(tenant_id, "journal"),
                key(tenant_id, "receipts"),
            ],
            [
                command.request_id,
                command.fence,
                command.now_ms,
                command.decided_at_ms,
                command.amount_nano,
                bytes.fromhex(command.content_sha256),
                command.record,
                command.total_tokens,
                bytes.fromhex(end),
                bytes.fromhex(link),
            ],
            durably=True,
        )
        reply: rules.SettleReply = replies.decode(raw)
        if isinstance(reply, rules.Posted) and not reply.duplicate:
            if len(self._chain_ends) >= _CHAIN_ENDS:
                self._chain_ends.clear()
            self._chain_ends[tenant_id] = reply.chain
        return reply

    async def release(self, tenant_id: str, command: rules.Release) -> rules.ReleaseReply:
        """Free a hold: nothing is billed."""
        raw = await self._run(
            "release",
            [*self._request_keys(tenant_id, command.request_id), key(tenant_id, "journal")],
            [command.request_id, command.fence, command.now_ms, release_detail(command)],
        )
        reply: rules.ReleaseReply = replies.decode(raw)
        return reply

    async def orphan(self, tenant_id: str, command: rules.Orphan) -> rules.OrphanReply:
        """Take a hold whose owner has vanished."""
        raw = await self._run(
            "orphan",
            [request_key(tenant_id, command.request_id), key(tenant_id, "open")],
            [
                command.request_id,
                command.now_ms,
                command.lease_ms,
                command.owner,
                command.ledger_up_since_ms,
            ],
        )
        reply: rules.OrphanReply = replies.decode(raw)
        return reply

    async def top_up(self, tenant_id: str, command: rules.TopUp) -> rules.OperationReply:
        """Add money that was paid in."""
        return await self._credit(tenant_id, command, (rules.TOPPED_UP, rules.PAID_IN, "top_up"))

    async def grant(self, tenant_id: str, command: rules.Grant) -> rules.OperationReply:
        """Add money that the operator gives."""
        return await self._credit(tenant_id, command, (rules.GRANTED, rules.ADJUSTMENT, "grant"))

    async def refund(self, tenant_id: str, command: rules.Refund) -> rules.RefundReply:
        """Give a charge back, in part or whole."""
        raw = await self._run(
            "refund",
            [
                *self._operation_keys(tenant_id),
                key(tenant_id, "journal"),
                request_key(tenant_id, command.request_id),
            ],
            [
                command.operation_id,
                operation_content(command),
                command.now_ms,
                "" if command.amount_nano is None else command.amount_nano,
                command.note,
                operation_detail(command),
            ],
        )
        reply: rules.RefundReply = replies.decode(raw)
        return reply

    async def set_limits(self, tenant_id: str, command: rules.SetLimits) -> rules.OperationReply:
        """Replace the limits of the account or of one key; never TooMuch."""
        await self._list(tenant_id)
        scope = rules.TENANT if command.key_id is None else rules.key_scope(command.key_id)
        raw = await self._run(
            "set_limits",
            self._operation_keys(tenant_id),
            [
                command.operation_id,
                operation_content(command),
                scope,
                layout.limits_text(command.limits),
            ],
        )
        reply: rules.OperationReply = replies.decode(raw)
        return reply

    async def balance(self, tenant_id: str) -> rules.Balance:
        """All 0 for an account that nothing has happened to."""
        names = ("granted", "topped_up", "hold")
        found = await self._ledger.run(lambda redis: reads.account_fields(redis, tenant_id, *names))
        return rules.Balance(*(int(nano or 0) for nano in found))

    async def position(self, tenant_id: str) -> int:
        """Of the account's last receipt in its chain; 0: there is none."""
        found = await self._ledger.run(
            lambda redis: reads.account_fields(redis, tenant_id, "position")
        )
        return int(found[0] or 0)

    async def limits(self, tenant_id: str) -> dict[str, tuple[rules.Limits, rules.Use]]:
        """Scope (TENANT, or key_scope(key id)) -> limits and their use; TENANT is always there."""
        fields = await self._ledger.run(lambda redis: reads.account(redis, tenant_id))
        return layout.scopes_of(fields)

    async def request(self, tenant_id: str, request_id: str) -> rules.Request | None:
        """What the ledger knows of a request, with its refunds; None: nothing."""
        found = await self._ledger.run(lambda redis: reads.requests(redis, tenant_id, [request_id]))
        return found[0] if found else None

    async def late_requests(self, until_ms: int, *, limit: int) -> list[tuple[str, str]]:
        """(tenant id, request id) of holds whose lease ended by `until_ms`: `limit` a tenant."""
        return await self._ledger.run(lambda redis: reads.late_requests(redis, until_ms, limit))

    async def holds(self, tenant_id: str) -> dict[rules.State, int]:
        """How many holds are OPEN and how many ORPHAN."""
        states = await self._ledger.run(lambda redis: reads.open_states(redis, tenant_id))
        return {state: states.count(state) for state in (rules.State.OPEN, rules.State.ORPHAN)}

    async def receipts(
        self, tenant_id: str, *, from_ms: int, to_ms: int, after: Cursor | None, limit: int
    ) -> tuple[list[rules.Request], Cursor | None]:
        """Settled requests with from_ms <= decided_at_ms < to_ms, in order of (that, request id).

        Up to `limit` of those that follow `after`, and the cursor of the last; None: no more.
        """
        cursors = await self._ledger.run(
            lambda redis: reads.receipt_ids(redis, tenant_id, (from_ms, to_ms), after, limit + 1)
        )
        page = cursors[:limit]
        ids = [request_id for _, request_id in page]
        found = await self._ledger.run(lambda redis: reads.requests(redis, tenant_id, ids))
        return found, page[-1] if len(cursors) > limit else None

    async def journal(
        self, tenant_id: str, *, after: str, limit: int
    ) -> list[tuple[str, rules.JournalEntry]]:
        """(entry id, entry) of up to `limit` entries that follow the id `after` ("": the first)."""
        return await self._ledger.run(lambda redis: reads.journal(redis, tenant_id, after, limit))

    async def tenants(self) -> list[str]:
        """Every tenant that ever had a hold, money or limits, sorted."""
        return await self._ledger.run(reads.tenants)

    async def put_book(self, digest: str, canonical_json: bytes) -> None:
        """Keep a price book for ever under its digest (hex)."""
        await self._ledger.run(lambda redis: redis.set(layout.book_key(digest), canonical_json))

    async def get_book(self, digest: str) -> bytes | None:
        """The canonical JSON of the book with this digest (hex)."""
        found: Any = await self._ledger.run(lambda redis: redis.get(layout.book_key(digest)))
        return None if found is None else bytes(found)

    async def read(self, tenant_id: str) -> rules.Account:
        """The whole account, for `check`: of one that is at rest, since it is read in parts."""
        return await self._ledger.run(lambda redis: reads.whole(redis, tenant_id))

    async def _credit(
        self, tenant_id: str, command: rules.TopUp | rules.Grant, where: tuple[str, str, str]
    ) -> rules.OperationReply:
        await self._list(tenant_id)
        raw = await self._run(
            "credit",
            [*self._operation_keys(tenant_id), key(tenant_id, "journal")],
            [
                command.operation_id,
                operation_content(command),
                command.now_ms,
                command.amount_nano,
                *where,
                operation_detail(command),
            ],
        )
        reply: rules.OperationReply = replies.decode(raw)
        return reply

    async def _run(
        self, name: str, keys: Sequence[str], arguments: Arguments, *, durably: bool = False
    ) -> Any:
        script = self._scripts[name]
        return await self._ledger.run_script(script, keys, arguments, durably=durably)

    async def _list(self, tenant_id: str) -> None:
        """Before anything is written of an account, so that none is ever overlooked."""
        if tenant_id not in self._listed:
            await self._ledger.run(lambda redis: reads.list_account(redis, tenant_id))
            self._listed.add(tenant_id)

    @staticmethod
    def _request_keys(tenant_id: str, request_id: str) -> list[str]:
        return [
            key(tenant_id, "account"),
            request_key(tenant_id, request_id),
            key(tenant_id, "open"),
        ]

    @staticmethod
    def _operation_keys(tenant_id: str) -> list[str]:
        return [key(tenant_id, "account"), key(tenant_id, "operations")]
