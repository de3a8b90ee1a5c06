"""Replies of the scripts on accounts, as `tidemill.billing.ledger` names them."""

from collections.abc import Callable, Mapping
from typing import Any

from tidemill.billing import ledger as rules

Raw = list[Any]  # a tag in capitals, then integers and byte strings


def decode(raw: Raw) -> Any:
    """The reply that `raw` stands for."""
    return _DECODERS[raw[0]](raw)


def decode_reserve(raw: Raw) -> rules.ReserveReply:
    """As `decode`; what was posted before reads as Settled."""
    reply: rules.ReserveReply = rules.Settled(_posted(raw)) if raw[0] == b"POSTED" else decode(raw)
    return reply


def _held(raw: Raw) -> rules.Held:
    _, fence, held, in_full, admitted_at, terms, checkpoint, attempts, first_fence = raw
    return rules.Held(
        fence,
        held,
        in_full == 1,
        admitted_at,
        terms.decode(),
        checkpoint.decode(),
        attempts,
        first_fence,
    )


def _refused(raw: Raw) -> rules.Refused:
    _, reason, limit, scope, resets_at, need, available = raw
    return rules.Refused(
        rules.Reason(reason.decode()), limit.decode(), scope.decode(), resets_at, need, available
    )


def _posted(raw: Raw) -> rules.Posted:
    _, position, previous, chain, granted, topped_up, held, duplicate, record = raw
    return rules.Posted(
        position,
        previous.hex(),
        chain.hex(),
        granted,
        topped_up,
        held,
        duplicate == 1,
        record.decode(),
    )


def _orphaned(raw: Raw) -> rules.Orphaned:
    _, fence, terms, checkpoint, attempts, held, admitted_at, orphaned_at, first_fence = raw
    return rules.Orphaned(
        fence,
        terms.decode(),
        checkpoint.decode(),
        attempts,
        held,
        admitted_at,
        orphaned_at,
        first_fence,
    )


def _applied(raw: Raw) -> rules.Applied:
    _, first, amount, granted, topped_up, held = raw
    return rules.Applied(first == 1, amount, rules.Balance(granted, topped_up, held))


_DECODERS: Mapping[bytes, Callable[[Raw], rules.Reply]] = {
    b"HELD": _held,
    b"REFUSED": _refused,
    b"IN_PROGRESS": lambda raw: rules.InProgress(raw[1]),
    b"OTHER_BODY": lambda _: rules.OtherBody(),
    b"EXTENDED": lambda raw: rules.Extended(raw[1]),
    b"STALE": lambda raw: rules.Stale(raw[1], rules.State(raw[2].decode())),
    b"DONE": lambda _: rules.Done(),
    b"POSTED": _posted,
    b"ABOVE_HOLD": lambda raw: rules.AboveHold(raw[1]),
    b"RELEASED": lambda _: rules.Released(),
    b"NOT_YET": lambda _: rules.NotYet(),
    b"ORPHANED": _orphaned,
    b"APPLIED": _applied,
    b"OTHER_CONTENT": lambda _: rules.OtherContent(),
    b"TOO_MUCH": lambda raw: rules.TooMuch(raw[1]),
    b"NOT_SETTLED": lambda raw: rules.NotSettled(rules.State(raw[1].decode())),
}
