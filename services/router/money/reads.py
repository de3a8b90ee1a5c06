"""What is read of accounts, as commands on a Redis connection."""

from collections.abc import Awaitable, Sequence
from typing import Any

from redis.asyncio import Redis

from services.router.money import layout
from services.router.money.layout import key, request_key
from tidemill.billing import ledger as rules

Cursor = tuple[int, str]

_PAGE = 1000
_TENANTS_AT_ONCE = 256


def account_fields(redis: Redis, tenant_id: str, *names: str) -> Awaitable[list[bytes | None]]:
    """Some fields of the account."""
    answer: Any = redis.hmget(key(tenant_id, "account"), names)
    return answer  # type: ignore[no-any-return]  # redis-py types one method for both stacks


def account(redis: Redis, tenant_id: str) -> Awaitable[dict[bytes, bytes]]:
    """Every field of the account."""
    answer: Any = redis.hgetall(key(tenant_id, "account"))
    return answer  # type: ignore[no-any-return]  # as above


def list_account(redis: Redis, tenant_id: str) -> Awaitable[int]:
    """Make the account one of `tenants`."""
    answer: Any = redis.sadd(layout.ACCOUNTS, tenant_id)
    return answer  # type: ignore[no-any-return]  # as above


async def requests(redis: Redis, tenant_id: str, request_ids: Sequence[str]) -> list[rules.Request]:
    """Those of the requests that there are."""
    if not request_ids:
        return []
    pipeline = redis.pipeline(transaction=False)
    for request_id in request_ids:
        pipeline.hgetall(request_key(tenant_id, request_id))
        pipeline.zscore(key(tenant_id, "open"), request_id)
    found = await pipeline.execute()
    return [
        layout.request_of(request_id, fields, int(lease or 0))
        for request_id, fields, lease in zip(request_ids, found[::2], found[1::2], strict=True)
        if fields
    ]


async def late_requests(redis: Redis, until_ms: int, limit: int) -> list[tuple[str, str]]:
    """(tenant id, request id) of leases that ended by `until_ms`, at most `limit` a tenant.

    A round trip for every 256 tenants, however few of them have any.
    """
    late: list[tuple[str, str]] = []
    everybody = await tenants(redis)
    for start in range(0, len(everybody), _TENANTS_AT_ONCE):
        some = everybody[start : start + _TENANTS_AT_ONCE]
        pipeline = redis.pipeline(transaction=False)
        for tenant_id in some:
            pipeline.zrangebyscore(key(tenant_id, "open"), "-inf", until_ms, start=0, num=limit)
        for tenant_id, found in zip(some, await pipeline.execute(), strict=True):
            late += [(tenant_id, request_id.decode()) for request_id in found]
    return late


async def open_states(redis: Redis, tenant_id: str) -> list[str]:
    """The state of each request that was live when this was called."""
    ids: Any = await redis.zrange(key(tenant_id, "open"), 0, -1)
    pipeline = redis.pipeline(transaction=False)
    for request_id in ids:
        pipeline.hget(request_key(tenant_id, request_id.decode()), "state")
    return [state.decode() for state in await pipeline.execute()]


async def receipt_ids(
    redis: Redis, tenant_id: str, span: tuple[int, int], after: Cursor | None, limit: int
) -> list[Cursor]:
    """Up to `limit` (decided_at, request id) in a half-open span of time that follow `after`."""
    from_ms, to_ms = span
    found: list[Cursor] = []
    if after is not None and after[0] >= from_ms:
        from_ms, same_ms = after[0] + 1, (after[0], after[0])
        at_once = await _by_score(redis, tenant_id, same_ms, 0, -1)
        found = [cursor for cursor in at_once if cursor > after and cursor[0] < to_ms][:limit]
    if len(found) < limit and from_ms < to_ms:
        found += await _by_score(redis, tenant_id, (from_ms, to_ms - 1), 0, limit - len(found))
    return found


async def _by_score(
    redis: Redis, tenant_id: str, scores: tuple[int, int], start: int, num: int
) -> list[Cursor]:
    found: Any = await redis.zrangebyscore(
        key(tenant_id, "receipts"), *scores, start=start, num=num, withscores=True
    )
    return [(int(score), request_id.decode()) for request_id, score in found]


async def journal(
    redis: Redis, tenant_id: str, after: str, limit: int
) -> list[tuple[str, rules.JournalEntry]]:
    """Up to `limit` (entry id, entry) that follow the id `after`."""
    start = f"({after}" if after else "-"
    found: Any = await redis.xrange(key(tenant_id, "journal"), min=start, count=limit)
    return [(entry_id.decode(), layout.entry_of(fields)) for entry_id, fields in found]


async def tenants(redis: Redis) -> list[str]:
    """Every account's tenant, sorted."""
    answer: Any = redis.smembers(layout.ACCOUNTS)
    return sorted(tenant_id.decode() for tenant_id in await answer)


async def whole(redis: Redis, tenant_id: str) -> rules.Account:
    """Everything of an account that is at rest: it is read in many parts."""
    fields = await account(redis, tenant_id)
    scopes = layout.scopes_of(fields)
    position, chain = layout.chain_of(fields)
    operations: Any = redis.hgetall(key(tenant_id, "operations"))
    entries = await _whole_journal(redis, tenant_id)
    subjects = {e.subject: None for e in entries if e.kind == "reserve"}
    return rules.Account(
        balances=layout.balances_of(fields),
        limits={scope: limits for scope, (limits, _) in scopes.items()},
        use={scope: use for scope, (_, use) in scopes.items()},
        requests={r.request_id: r for r in await requests(redis, tenant_id, list(subjects))},
        operations={
            name.decode(): layout.operation_of(value) for name, value in (await operations).items()
        },
        journal=tuple(entries),
        position=position,
        chain=chain,
    )


async def _whole_journal(redis: Redis, tenant_id: str) -> list[rules.JournalEntry]:
    entries: list[rules.JournalEntry] = []
    last = ""
    while page := await journal(redis, tenant_id, last, _PAGE):
        entries += [entry for _, entry in page]
        last = page[-1][0]
    return entries
