"""The receipt: what was used and charged, in a form anyone can recompute (DESIGN.md 4: M5).

Canonical bytes: `canonical.canonical_bytes` of the flat `to_fields` object, that is UTF-8
JSON with sorted keys, no white space, only strings and integers. `content_sha256` is their
SHA-256 in hexadecimal. Together with the public price book of `book_digest` the counts and the
two instants give every price and amount again. The place in the account's chain, the signature
and the balances that paid are no content: the ledger adds them to what it is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace

from tidemill.billing.canonical import canonical_bytes, sha256_hex
from tidemill.billing.charge import Charge, compute_charge
from tidemill.billing.integers import require_int
from tidemill.billing.prices import PriceBook
from tidemill.billing.usage import Reuse, Unbilled, Usage
from tidemill.errors import ConfigError, ReceiptError, UsageError

FORMAT = "tidemill.receipt.v2"


@dataclass(frozen=True, kw_only=True, slots=True)
class Receipt:
    """One settled request. `model` is the served name, `charge.model` the price book's.

    `key_id` is the API key's public part, `hold_nano` the most that was held for the request.
    `content_sha256` is as claimed; `verify` says whether it is true.
    """

    request_id: str
    tenant_id: str
    key_id: str
    model: str
    admitted_at_ms: int
    decided_at_ms: int
    attempts: int
    hold_nano: int
    usage: Usage
    charge: Charge
    content_sha256: str

    def to_fields(self) -> dict[str, str | int]:
        """The flat content, without `content_sha256`; its key names are part of the format."""
        usage, charged = self.usage, asdict(self.charge)
        return {
            "format": FORMAT,
            "request_id": self.request_id,
            "tenant_id": self.tenant_id,
            "key_id": self.key_id,
            "model": self.model,
            "admitted_at_ms": self.admitted_at_ms,
            "decided_at_ms": self.decided_at_ms,
            "attempts": self.attempts,
            "hold_nano": self.hold_nano,
            "prompt_tokens": usage.prompt_tokens,
            "computed_tokens": usage.computed_tokens,
            **{f"reused_{tier}_tokens": count for tier, count in asdict(usage.reused).items()},
            "cache_hit_tokens": usage.cache_hit_tokens,
            "cache_miss_tokens": usage.cache_miss_tokens,
            "completion_tokens": usage.completion_tokens,
            "reasoning_tokens": usage.reasoning_tokens,
            "generated_tokens": usage.generated_tokens,
            **{f"unbilled_{why}_tokens": count for why, count in asdict(usage.unbilled).items()},
            "drafted_tokens": usage.drafted_tokens,
            "accepted_tokens": usage.accepted_tokens,
            "price_model": charged.pop("model"),
            **charged,
        }

    def canonical_bytes(self) -> bytes:
        """The bytes that `content_sha256` is the hash of."""
        return canonical_bytes(self.to_fields())

    @classmethod
    def from_fields(cls, content: Mapping[str, str | int], *, content_sha256: str) -> Receipt:
        """The receipt of a flat content, not yet verified.

        ReceiptError if a field is missing, unknown, of the wrong type or at odds with another.
        """
        try:
            receipt = _parse(content, content_sha256)
        except (KeyError, TypeError, UsageError) as error:
            raise ReceiptError(f"not a receipt: {error}") from error
        if differing := _differences(content, receipt.to_fields()):
            raise ReceiptError(f"receipt is at odds with itself: {_phrase(differing)}")
        return receipt


def issue_receipt(
    book: PriceBook,
    *,
    request_id: str,
    tenant_id: str,
    key_id: str,
    model: str,
    price_model: str,
    currency: str,
    usage: Usage,
    admitted_at_ms: int,
    decided_at_ms: int,
    hold_nano: int,
    attempts: int = 1,
) -> Receipt:
    """Price a finished request and write its receipt; errors are `compute_charge`'s."""
    charge = compute_charge(
        book,
        model=price_model,
        currency=currency,
        usage=usage,
        admitted_at_ms=admitted_at_ms,
        decided_at_ms=decided_at_ms,
    )
    receipt = Receipt(
        request_id=request_id,
        tenant_id=tenant_id,
        key_id=key_id,
        model=model,
        admitted_at_ms=admitted_at_ms,
        decided_at_ms=decided_at_ms,
        attempts=attempts,
        hold_nano=hold_nano,
        usage=usage,
        charge=charge,
        content_sha256="",
    )
    return replace(receipt, content_sha256=sha256_hex(receipt.canonical_bytes()))


def verify(receipt: Receipt, book: PriceBook) -> None:
    """Recompute the receipt from its counts, its instants and `book`.

    ReceiptError names every field that differs with the value it should have. The book must be
    the one that the receipt's digest names.
    """
    if faults := content_faults(receipt.to_fields(), receipt.content_sha256, book):
        raise ReceiptError(f"receipt does not verify: {_phrase(faults)}")


def content_faults(
    content: Mapping[str, str | int], content_sha256: str, book: PriceBook
) -> dict[str, str]:
    """What is wrong with a flat content that claims this hash, by field; empty: it verifies."""
    try:
        receipt = _parse(content, content_sha256)
    except KeyError as error:
        return {str(error.args[0]): "is missing"}
    except TypeError as error:
        return {"content": str(error)}
    except UsageError as error:
        return {"usage": str(error)} | _hash_faults(content, content_sha256)
    try:
        faults = _differences(content, _issued_again(receipt, book).to_fields())
    except (ConfigError, OverflowError, ValueError) as error:
        faults = {"content": f"cannot be recomputed: {error}"}
    if receipt.charge.amount_nano > receipt.hold_nano:
        faults["hold_nano"] = (
            f"is {receipt.hold_nano}, below the amount of {receipt.charge.amount_nano} (M3)"
        )
    return faults | _hash_faults(content, content_sha256)


def _issued_again(receipt: Receipt, book: PriceBook) -> Receipt:
    return issue_receipt(
        book,
        request_id=receipt.request_id,
        tenant_id=receipt.tenant_id,
        key_id=receipt.key_id,
        model=receipt.model,
        price_model=receipt.charge.model,
        currency=receipt.charge.currency,
        usage=receipt.usage,
        admitted_at_ms=receipt.admitted_at_ms,
        decided_at_ms=receipt.decided_at_ms,
        attempts=receipt.attempts,
        hold_nano=receipt.hold_nano,
    )


def _hash_faults(content: Mapping[str, str | int], claimed: str) -> dict[str, str]:
    true_hash = sha256_hex(canonical_bytes(dict(content)))
    if claimed == true_hash:
        return {}
    return {"content_sha256": f"is {claimed!r}, should be {true_hash!r}"}


def _parse(content: Mapping[str, str | int], content_sha256: str) -> Receipt:
    return Receipt(
        request_id=_text(content, "request_id"),
        tenant_id=_text(content, "tenant_id"),
        key_id=_text(content, "key_id"),
        model=_text(content, "model"),
        admitted_at_ms=_int(content, "admitted_at_ms"),
        decided_at_ms=_int(content, "decided_at_ms"),
        attempts=_int(content, "attempts"),
        hold_nano=_int(content, "hold_nano"),
        usage=_usage(content),
        charge=_charge(content),
        content_sha256=content_sha256,
    )


def _usage(content: Mapping[str, str | int]) -> Usage:
    return Usage(
        prompt_tokens=_int(content, "prompt_tokens"),
        computed_tokens=_int(content, "computed_tokens"),
        reused=Reuse(
            **{tier.name: _int(content, f"reused_{tier.name}_tokens") for tier in fields(Reuse)}
        ),
        completion_tokens=_int(content, "completion_tokens"),
        reasoning_tokens=_int(content, "reasoning_tokens"),
        generated_tokens=_int(content, "generated_tokens"),
        unbilled=Unbilled(
            **{
                reason.name: _int(content, f"unbilled_{reason.name}_tokens")
                for reason in fields(Unbilled)
            }
        ),
        drafted_tokens=_int(content, "drafted_tokens"),
        accepted_tokens=_int(content, "accepted_tokens"),
    )


def _charge(content: Mapping[str, str | int]) -> Charge:
    return Charge(
        model=_text(content, "price_model"),
        currency=_text(content, "currency"),
        book_id=_text(content, "book_id"),
        book_version=_int(content, "book_version"),
        book_digest=_text(content, "book_digest"),
        tariff_from_ms=_int(content, "tariff_from_ms"),
        window=_text(content, "window"),
        decided_by=_text(content, "decided_by"),
        price_hit_pico=_int(content, "price_hit_pico"),
        price_miss_pico=_int(content, "price_miss_pico"),
        price_output_pico=_int(content, "price_output_pico"),
        hit_cost_pico=_int(content, "hit_cost_pico"),
        miss_cost_pico=_int(content, "miss_cost_pico"),
        output_cost_pico=_int(content, "output_cost_pico"),
        amount_nano=_int(content, "amount_nano"),
        saved_nano=_int(content, "saved_nano"),
    )


def _int(content: Mapping[str, str | int], name: str) -> int:
    return require_int(content[name], name)


def _text(content: Mapping[str, str | int], name: str) -> str:
    value = content[name]
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {type(value).__name__}")
    return value


def _differences(
    found: Mapping[str, str | int], expected: Mapping[str, str | int]
) -> dict[str, str]:
    """What is wrong with each field whose value is not the expected one."""
    return {
        name: f"is {found.get(name)!r}, should be {expected.get(name)!r}"
        for name in sorted(found.keys() | expected.keys())
        if found.get(name) != expected.get(name)
    }


def _phrase(faults: Mapping[str, str]) -> str:
    return "; ".join(f"{name} {problem}" for name, problem in faults.items())
