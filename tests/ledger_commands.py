"""Commands to an account with most fields filled in, and how to send one to a real ledger."""

import hashlib
from typing import Any

from services.router.money.accounts import Accounts
from tidemill.billing import ledger as rules

LEASE_MS = 15_000
NOON_MS = 1_700_049_600_000  # 2023-11-15 12:00 UTC


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def reserve(request_id: str = "r1", **given: Any) -> rules.Reserve:
    fields: dict[str, Any] = {
        "key_id": "k1",
        "body_sha256": sha256("body"),
        "owner": "router-a",
        "now_ms": NOON_MS,
        "lease_ms": LEASE_MS,
        "full_nano": 100,
        "least_nano": 10,
        "prompt_tokens": 5,
        "max_tokens": 15,
        "deadline_ms": NOON_MS + 60_000,
        "terms": '{"model":"demo"}',
    }
    return rules.Reserve(request_id=request_id, **fields | given)


def settle(request_id: str = "r1", **given: Any) -> rules.Settle:
    fields: dict[str, Any] = {
        "fence": 1,
        "now_ms": NOON_MS,
        "decided_at_ms": NOON_MS,
        "amount_nano": 30,
        "content_sha256": sha256(request_id),
        "record": f'{{"receipt":"{request_id}"}}',
        "total_tokens": 8,
    }
    return rules.Settle(request_id=request_id, **fields | given)


def release(request_id: str = "r1", **given: Any) -> rules.Release:
    fields: dict[str, Any] = {
        "fence": 1,
        "now_ms": NOON_MS,
        "unbilled": '{"lost":3}',
        "reason": "SERVER_FAULT",
    }
    return rules.Release(request_id=request_id, **fields | given)


def orphan(request_id: str = "r1", **given: Any) -> rules.Orphan:
    fields: dict[str, Any] = {
        "now_ms": NOON_MS,
        "lease_ms": LEASE_MS,
        "owner": "resolver",
        "ledger_up_since_ms": NOON_MS - 3_600_000,
    }
    return rules.Orphan(request_id=request_id, **fields | given)


async def send(accounts: Accounts, tenant_id: str, command: rules.Command) -> rules.Reply:
    """By the method of `accounts` that the command is for."""
    methods: dict[type[Any], Any] = {
        rules.Reserve: accounts.reserve,
        rules.Extend: accounts.extend,
        rules.Checkpoint: accounts.checkpoint,
        rules.Renew: accounts.renew,
        rules.Settle: accounts.settle,
        rules.Release: accounts.release,
        rules.Orphan: accounts.orphan,
        rules.TopUp: accounts.top_up,
        rules.Grant: accounts.grant,
        rules.Refund: accounts.refund,
        rules.SetLimits: accounts.set_limits,
    }
    reply: rules.Reply = await methods[type(command)](tenant_id, command)
    return reply


def after(books: rules.Account, *commands: rules.Command) -> tuple[rules.Account, rules.Reply]:
    """The account after these commands, whole after each of them, and the last one's reply."""
    reply: rules.Reply | None = None
    for command in commands:
        books, reply = rules.apply(books, command)
        assert rules.check(books) == []
    assert reply is not None
    return books, reply
