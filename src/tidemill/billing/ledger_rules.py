"""What each command does to an account: pure, one function per command."""

from dataclasses import replace

from tidemill.billing.chain import next_chain
from tidemill.billing.ledger_account import (
    GRANTED,
    HOLD,
    REVENUE,
    TENANT,
    TOPPED_UP,
    Account,
    JournalEntry,
    Request,
    Use,
    key_scope,
)
from tidemill.billing.ledger_commands import (
    Checkpoint,
    Command,
    Extend,
    Limits,
    Orphan,
    Release,
    Renew,
    Reserve,
    Settle,
)
from tidemill.billing.ledger_limits import (
    DAY_MS,
    Scoped,
    budget_left,
    budget_refusal,
    concurrency_refusal,
    put_back,
    rate_refusal,
    rolled,
    spent,
    taken,
)
from tidemill.billing.ledger_operations import apply_operation
from tidemill.billing.ledger_posting import posted, release_detail
from tidemill.billing.ledger_replies import (
    AboveHold,
    CheckpointReply,
    Done,
    Extended,
    ExtendReply,
    Held,
    InProgress,
    NotYet,
    Orphaned,
    OrphanReply,
    OtherBody,
    Posted,
    Reason,
    Refused,
    Released,
    ReleaseReply,
    Renewed,
    Reply,
    ReserveReply,
    Settled,
    SettleReply,
    Stale,
    State,
)


def apply(account: Account, command: Command) -> tuple[Account, Reply]:
    """(the account after `command`, the reply); a refused command leaves it as it was."""
    match command:
        case Reserve():
            return _reserve(account, command)
        case Extend():
            return _extend(account, command)
        case Checkpoint():
            return _checkpoint(account, command)
        case Renew():
            return _renew(account, command)
        case Settle():
            return _settle(account, command)
        case Release():
            return _release(account, command)
        case Orphan():
            return _orphan(account, command)
        case _:
            return apply_operation(account, command)


def _reserve(account: Account, command: Reserve) -> tuple[Account, ReserveReply]:
    known = account.requests.get(command.request_id)
    if known is not None:
        if known.body_sha256 != command.body_sha256:
            return account, OtherBody()
        if known.posted is not None:
            return account, Settled(replace(known.posted, duplicate=True))
        if known.live:
            kept_until_ms = _kept_until_ms(known, command)
            if kept_until_ms > command.now_ms:
                return account, InProgress(kept_until_ms)
            return _take_over(account, command, known)
    return _first_hold(account, command, known.fence if known else 0)


def _take_over(account: Account, command: Reserve, known: Request) -> tuple[Account, Held]:
    request = replace(
        known,
        state=State.OPEN,
        fence=known.fence + 1,
        owner=command.owner,
        lease_until_ms=command.now_ms + command.lease_ms,
        orphaned_at_ms=0,
    )
    return _with(account, request), _held(request)


def _first_hold(account: Account, command: Reserve, fence: int) -> tuple[Account, Held | Refused]:
    tenant_use = account.use.get(TENANT, Use())
    day = max(command.now_ms // DAY_MS, tenant_use.day)
    scoped = _scoped(account, command.key_id, day)
    tokens = command.prompt_tokens + command.max_tokens
    free = account.balances[GRANTED] + account.balances[TOPPED_UP]
    room = min(free, *(budget_left(limits, use, day) for _, limits, use in scoped))
    amount = command.full_nano if command.full_nano <= room else command.least_nano
    refusal = (
        rate_refusal(scoped, tokens, command.now_ms)
        or concurrency_refusal(scoped)
        or budget_refusal(scoped, day, amount, (day + 1) * DAY_MS)
        or _balance_refusal(amount, free)
    )
    if refusal is not None:
        return account, refusal
    granted = min(amount, account.balances[GRANTED])
    request = Request(
        request_id=command.request_id,
        key_id=command.key_id,
        body_sha256=command.body_sha256,
        state=State.OPEN,
        fence=fence + 1,
        owner=command.owner,
        admitted_at_ms=command.now_ms,
        day=day,
        lease_until_ms=command.now_ms + command.lease_ms,
        in_full=amount == command.full_nano,
        tokens=tokens,
        tokens_taken=tuple(scope for scope, limits, _ in scoped if limits.tokens_per_minute),
        granted_nano=granted,
        topped_up_nano=amount - granted,
        terms=command.terms,
        first_fence=fence + 1,
    )
    use = {
        scope: replace(
            spent(taken(limits, use, tokens, command.now_ms), day, amount), open=use.open + 1
        )
        for scope, limits, use in scoped
    }
    account = replace(_with(account, request), use={**account.use, **use})
    moves = {GRANTED: -granted, TOPPED_UP: granted - amount, HOLD: amount}
    entry = JournalEntry("reserve", command.request_id, command.now_ms, moves)
    return posted(account, entry), _held(request)


def _extend(account: Account, command: Extend) -> tuple[Account, ExtendReply]:
    request = account.requests.get(command.request_id)
    if request is None or not request.live or request.fence != command.fence:
        return account, _stale(request)
    request = replace(request, checkpoint=command.checkpoint)
    account = _with(account, request)
    scoped = _scoped(account, request.key_id, request.day)
    free = account.balances[GRANTED] + account.balances[TOPPED_UP]
    add = command.add_nano
    refusal = budget_refusal(scoped, request.day, add, 0) or _balance_refusal(add, free)
    if refusal is not None:
        return account, refusal
    granted = min(add, account.balances[GRANTED])
    request = replace(
        request,
        granted_nano=request.granted_nano + granted,
        topped_up_nano=request.topped_up_nano + add - granted,
    )
    use = {scope: spent(use, request.day, add) for scope, _, use in scoped}
    account = replace(_with(account, request), use={**account.use, **use})
    moves = {GRANTED: -granted, TOPPED_UP: granted - add, HOLD: add}
    entry = JournalEntry("extend", request.request_id, command.now_ms, moves)
    return posted(account, entry), Extended(request.amount_nano)


def _checkpoint(account: Account, command: Checkpoint) -> tuple[Account, CheckpointReply]:
    request = account.requests.get(command.request_id)
    if request is None or not request.live or request.fence != command.fence:
        return account, _stale(request)
    request = replace(request, checkpoint=command.checkpoint, attempts=command.attempts)
    return _with(account, request), Done()


def _renew(account: Account, command: Renew) -> tuple[Account, Renewed]:
    lost = []
    for request_id, fence in command.holds:
        request = account.requests.get(request_id)
        if (
            request is not None
            and request.live
            and request.fence == fence
            and request.owner == command.owner
        ):
            until = command.now_ms + command.lease_ms
            account = _with(account, replace(request, lease_until_ms=until))
        else:
            lost.append(request_id)
    return account, Renewed(tuple(lost))


def _settle(account: Account, command: Settle) -> tuple[Account, SettleReply]:
    request = account.requests.get(command.request_id)
    if request is not None and request.posted is not None:
        return account, replace(request.posted, duplicate=True)
    if request is None or not _may_end(request, command.fence):
        return account, _stale(request)
    if command.amount_nano > request.amount_nano:
        return account, AboveHold(request.amount_nano)
    granted = min(command.amount_nano, request.granted_nano)
    topped_up = command.amount_nano - granted
    reply = Posted(
        position=account.position + 1,
        previous_chain=account.chain,
        chain=next_chain(account.chain, command.content_sha256),
        granted_nano=granted,
        topped_up_nano=topped_up,
        held_nano=request.amount_nano,
        duplicate=False,
        record=command.record,
    )
    ended = replace(
        request,
        state=State.SETTLED,
        granted_nano=granted,
        topped_up_nano=topped_up,
        decided_at_ms=command.decided_at_ms,
        content_sha256=command.content_sha256.lower(),
        posted=reply,
    )
    unused = max(request.tokens - command.total_tokens, 0)
    account = _ended(account, request, ended, unused, command.now_ms)
    account = replace(account, position=reply.position, chain=reply.chain)
    moves = _moves(request, ended) | {REVENUE: command.amount_nano}
    entry = JournalEntry("settle", request.request_id, command.now_ms, moves, command.record)
    return posted(account, entry), reply


def _release(account: Account, command: Release) -> tuple[Account, ReleaseReply]:
    request = account.requests.get(command.request_id)
    if request is not None and request.state == State.RELEASED and command.fence <= request.fence:
        return account, Released()
    if request is None or not _may_end(request, command.fence):
        return account, _stale(request)
    ended = replace(request, state=State.RELEASED, granted_nano=0, topped_up_nano=0)
    account = _ended(account, request, ended, request.tokens, command.now_ms)
    moves, detail = _moves(request, ended), release_detail(command)
    entry = JournalEntry("release", request.request_id, command.now_ms, moves, detail)
    return posted(account, entry), Released()


def _orphan(account: Account, command: Orphan) -> tuple[Account, OrphanReply]:
    request = account.requests.get(command.request_id)
    if request is None or not request.live or _kept_until_ms(request, command) > command.now_ms:
        return account, NotYet()
    first = request.state == State.OPEN
    request = replace(
        request,
        state=State.ORPHAN,
        fence=request.fence + 1,
        owner=command.owner,
        lease_until_ms=command.now_ms + command.lease_ms,
        orphaned_at_ms=command.now_ms if first else request.orphaned_at_ms,
    )
    return _with(account, request), Orphaned(
        fence=request.fence,
        terms=request.terms,
        checkpoint=request.checkpoint,
        attempts=request.attempts,
        held_nano=request.amount_nano,
        admitted_at_ms=request.admitted_at_ms,
        orphaned_at_ms=request.orphaned_at_ms,
        first_fence=request.first_fence,
    )


def _kept_until_ms(request: Request, command: Reserve | Orphan) -> int:
    """Until when nobody may take it: while the ledger was away, its owner could not renew."""
    if request.state == State.ORPHAN:
        return request.lease_until_ms
    return max(request.lease_until_ms, command.ledger_up_since_ms + command.lease_ms)


def _may_end(request: Request, fence: int) -> bool:
    """The owner may; of an orphan also those who had it before: they know what was generated."""
    if request.state == State.ORPHAN:
        return request.first_fence <= fence <= request.fence
    return request.state == State.OPEN and fence == request.fence


def _ended(account: Account, was: Request, ended: Request, unused: int, now_ms: int) -> Account:
    """The hold is over: a place is free, and what was not used goes back to buckets and budgets."""
    ended = replace(ended, lease_until_ms=0, terms="", checkpoint="")
    use = {}
    for scope, limits, before in _scoped(account, was.key_id, was.day):
        after = spent(before, was.day, ended.amount_nano - was.amount_nano)
        if scope in was.tokens_taken:
            after = put_back(limits, after, unused, now_ms)
        use[scope] = replace(after, open=before.open - 1)
    return replace(_with(account, ended), use={**account.use, **use})


def _moves(was: Request, ended: Request) -> dict[str, int]:
    return {
        GRANTED: was.granted_nano - ended.granted_nano,
        TOPPED_UP: was.topped_up_nano - ended.topped_up_nano,
        HOLD: -was.amount_nano,
    }


def _scoped(account: Account, key_id: str, day: int) -> tuple[Scoped, ...]:
    """The account's own limits and use, then the key's, as of `day` or their newest."""
    return tuple(
        (scope, account.limits.get(scope, Limits()), rolled(account.use.get(scope, Use()), day))
        for scope in (TENANT, key_scope(key_id))
    )


def _balance_refusal(need: int, free: int) -> Refused | None:
    if need <= free:
        return None
    return Refused(Reason.INSUFFICIENT_BALANCE, "", TENANT, 0, need, free)


def _stale(request: Request | None) -> Stale:
    return Stale(request.fence, request.state) if request else Stale(0, State.UNKNOWN)


def _held(request: Request) -> Held:
    return Held(
        fence=request.fence,
        held_nano=request.amount_nano,
        in_full=request.in_full,
        admitted_at_ms=request.admitted_at_ms,
        terms=request.terms,
        checkpoint=request.checkpoint,
        attempts=request.attempts,
        first_fence=request.first_fence,
    )


def _with(account: Account, request: Request) -> Account:
    return replace(account, requests={**account.requests, request.request_id: request})
