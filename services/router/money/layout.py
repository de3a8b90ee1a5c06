"""What lies where in the ledger Redis, and how it reads.

All keys of an account share the hash tag {T}, T being the tenant's id, so that a cluster keeps
them together. Numbers are decimal strings, instants milliseconds since the Unix epoch.

tm:{T}:account      hash: the six sub-accounts by name (revenue, adjustment and paid_in as 64-bit
                    counters), position and chain (32 bytes) of the last receipt, journal_ms (of
                    the last entry's id), and for each scope, "tenant" or "key:<key id>":
  <scope>:limits    "requests_per_minute tokens_per_minute concurrency daily_budget_nano"
  <scope>:use       "open day used used_before requests_level requests_at tokens_level tokens_at"
                    ("-" where Limits or Use has None)
tm:{T}:req:<id>     hash: a request, see `request_of`; "refund:<operation id>" holds
                    "<refunded before> <amount> <at> <note>"
tm:{T}:open         sorted set: ids of requests that are OPEN or ORPHAN, by the end of their lease
tm:{T}:receipts     sorted set: ids of requests that are SETTLED, by decided_at
tm:{T}:journal      stream: kind, subject, at, postings by sub-account, detail
tm:{T}:operations   hash: operation id -> "<amount> <content>"
tm:accounts         set: every T
tm:book:<digest>    a price book's canonical JSON
tm:cancel:<router>  list: requests that this router is to end, see services.router.cancellations
tm:up:<run id>      when a router first reached this process of the server
"""

from collections.abc import Mapping

from tidemill.billing import ledger as rules
from tidemill.billing.chain import FIRST_CHAIN

ACCOUNTS = "tm:accounts"

Fields = Mapping[bytes, bytes]

_LIMITS = ("requests_per_minute", "tokens_per_minute", "concurrency", "daily_budget_nano")
_REFUND = b"refund:"


def key(tenant_id: str, what: str) -> str:
    """The Redis key of one part of an account."""
    return f"tm:{{{tenant_id}}}:{what}"


def request_key(tenant_id: str, request_id: str) -> str:
    """The Redis key of one request."""
    return f"tm:{{{tenant_id}}}:req:{request_id}"


def book_key(digest: str) -> str:
    """The Redis key of a price book."""
    return f"tm:book:{digest}"


def limits_text(limits: rules.Limits) -> str:
    """As kept under <scope>:limits."""
    values = (getattr(limits, name) for name in _LIMITS)
    return " ".join("-" if value is None else str(value) for value in values)


def scopes_of(fields: Fields) -> dict[str, tuple[rules.Limits, rules.Use]]:
    """Limits and use by scope, from an account's hash."""
    limits = _of_scopes(fields, b":limits")
    use = _of_scopes(fields, b":use")
    return {
        scope: (_limits(limits.get(scope)), _use(use.get(scope)))
        for scope in {rules.TENANT, *limits, *use}
    }


def balances_of(fields: Fields) -> dict[str, int]:
    """Every sub-account, from an account's hash."""
    return {name: _int(fields, name) for name in rules.SUB_ACCOUNTS}


def chain_of(fields: Fields) -> tuple[int, str]:
    """(position of the last receipt, the chain's value there in hex), from an account's hash."""
    chain = fields.get(b"chain")
    return _int(fields, "position"), chain.hex() if chain else FIRST_CHAIN


def request_of(request_id: str, fields: Fields, lease_until_ms: int = 0) -> rules.Request:
    """A request from its hash."""
    return rules.Request(
        request_id=request_id,
        key_id=_str(fields, "key_id"),
        body_sha256=_str(fields, "body"),
        state=rules.State(_str(fields, "state")),
        fence=_int(fields, "fence"),
        owner=_str(fields, "owner"),
        admitted_at_ms=_int(fields, "admitted_at"),
        day=_int(fields, "day"),
        lease_until_ms=lease_until_ms,
        in_full=_int(fields, "in_full") == 1,
        tokens=_int(fields, "tokens"),
        tokens_taken=tuple(_str(fields, "tokens_taken").split()),
        granted_nano=_int(fields, "granted"),
        topped_up_nano=_int(fields, "topped_up"),
        terms=_str(fields, "terms"),
        checkpoint=_str(fields, "checkpoint"),
        attempts=_int(fields, "attempts"),
        orphaned_at_ms=_int(fields, "orphaned_at"),
        decided_at_ms=_int(fields, "decided_at"),
        content_sha256=fields.get(b"content", b"").hex(),
        posted=_posted(fields) if b"position" in fields else None,
        refunds=_refunds(fields),
        first_fence=_int(fields, "first_fence"),
    )


def entry_of(fields: Fields) -> rules.JournalEntry:
    """A journal entry from its fields in the stream."""
    postings = {name: _int(fields, name) for name in rules.SUB_ACCOUNTS if name.encode() in fields}
    return rules.JournalEntry(
        _str(fields, "kind"),
        _str(fields, "subject"),
        _int(fields, "at"),
        postings,
        _str(fields, "detail"),
    )


def operation_of(value: bytes) -> tuple[str, int]:
    """(content, amount) of an operation that was done."""
    amount, _, content = value.decode().partition(" ")
    return content, int(amount)


def _posted(fields: Fields) -> rules.Posted:
    return rules.Posted(
        position=_int(fields, "position"),
        previous_chain=fields[b"previous_chain"].hex(),
        chain=fields[b"chain"].hex(),
        granted_nano=_int(fields, "granted"),
        topped_up_nano=_int(fields, "topped_up"),
        held_nano=_int(fields, "held"),
        duplicate=False,
        record=_str(fields, "record"),
    )


def _refunds(fields: Fields) -> tuple[rules.Refunded, ...]:
    found = []
    for name, value in fields.items():
        if name.startswith(_REFUND):
            before, amount, at_ms, note = value.decode().split(" ", 3)
            operation_id = name.removeprefix(_REFUND).decode()
            refund = rules.Refunded(operation_id, int(amount), int(at_ms), note)
            found.append((int(before), refund))
    return tuple(refund for _, refund in sorted(found, key=lambda pair: pair[0]))


def _of_scopes(fields: Fields, suffix: bytes) -> dict[str, bytes]:
    return {
        name.removesuffix(suffix).decode(): value
        for name, value in fields.items()
        if name.endswith(suffix)
    }


def _limits(text: bytes | None) -> rules.Limits:
    if text is None:
        return rules.Limits()
    values = (_optional(part) for part in text.split())
    return rules.Limits(**dict(zip(_LIMITS, values, strict=True)))


def _use(text: bytes | None) -> rules.Use:
    if text is None:
        return rules.Use()
    parts = text.split()
    return rules.Use(
        open=int(parts[0]),
        day=int(parts[1]),
        used_nano=int(parts[2]),
        used_before_nano=int(parts[3]),
        requests_level=_optional(parts[4]),
        requests_at_ms=int(parts[5]),
        tokens_level=_optional(parts[6]),
        tokens_at_ms=int(parts[7]),
    )


def _optional(text: bytes) -> int | None:
    return None if text == b"-" else int(text)


def _int(fields: Fields, name: str) -> int:
    return int(fields.get(name.encode(), 0))


def _str(fields: Fields, name: str) -> str:
    return fields.get(name.encode(), b"").decode()
