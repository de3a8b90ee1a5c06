"""M5: anyone can recompute a receipt, and no field of it can be changed unnoticed."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidemill.billing import (
    Receipt,
    Reuse,
    Unbilled,
    Usage,
    issue_receipt,
    load_price_book,
    parse_price_book,
    verify,
)
from tidemill.billing.canonical import canonical_bytes
from tidemill.errors import ReceiptError

BOOK_FILE = Path(__file__).parents[3] / "prices" / "deepseek-2025-02.toml"
BOOK = load_price_book(BOOK_FILE)
BOOK_FROM_MS = 1_740_499_200_000

counts = st.integers(0, 10**6)


@st.composite
def usages(draw: st.DrawFn) -> Usage:
    reused = Reuse(
        device=draw(counts),
        host=draw(counts),
        cache_ram=draw(counts),
        cache_disk=draw(counts),
        peer=draw(counts),
    )
    unbilled = Unbilled(
        overrun=draw(counts),
        failover_redo=draw(counts),
        lost=draw(counts),
        server_fault=draw(counts),
    )
    computed, completion, accepted = draw(counts), draw(counts), draw(counts)
    return Usage(
        prompt_tokens=computed + reused.total,
        computed_tokens=computed,
        reused=reused,
        completion_tokens=completion,
        reasoning_tokens=draw(st.integers(0, completion)),
        generated_tokens=completion + unbilled.total,
        unbilled=unbilled,
        drafted_tokens=accepted + draw(counts),
        accepted_tokens=accepted,
    )


@st.composite
def receipts(draw: st.DrawFn) -> Receipt:
    admitted = BOOK_FROM_MS + draw(st.integers(0, 10**10))
    return issue_receipt(
        BOOK,
        request_id=draw(st.text(min_size=1, max_size=20)),
        tenant_id=draw(st.text(min_size=1, max_size=20)),
        key_id="k1",
        model="demo",
        price_model=draw(st.sampled_from(["deepseek-chat", "deepseek-reasoner"])),
        currency=draw(st.sampled_from(["USD", "CNY"])),
        usage=draw(usages()),
        admitted_at_ms=admitted,
        decided_at_ms=admitted + draw(st.integers(0, 30 * 60 * 1000)),
        attempts=draw(st.integers(1, 3)),
        hold_nano=10**12,
    )


def sample() -> Receipt:
    return issue_receipt(
        BOOK,
        request_id="r-1",
        tenant_id="acme",
        key_id="k1",
        model="demo",
        price_model="deepseek-chat",
        currency="USD",
        usage=Usage(
            prompt_tokens=200,
            computed_tokens=72,
            reused=Reuse(device=64, cache_ram=64),
            completion_tokens=50,
            reasoning_tokens=10,
            generated_tokens=53,
            unbilled=Unbilled(overrun=3),
            drafted_tokens=4,
            accepted_tokens=2,
        ),
        admitted_at_ms=BOOK_FROM_MS + 40_000_000,
        decided_at_ms=BOOK_FROM_MS + 40_001_234,
        hold_nano=90_000,
    )


def reopen(fields: dict[str, str | int], content_sha256: str) -> Receipt:
    return Receipt.from_fields(fields, content_sha256=content_sha256)


def test_canonical_bytes_are_pinned() -> None:
    receipt = sample()
    assert receipt.canonical_bytes() == (
        b'{"accepted_tokens":2,"admitted_at_ms":1740539200000,"amount_nano":83400,"attempts":1,'
        b'"book_digest":"' + BOOK.digest.encode() + b'","book_id":"deepseek-2025-02",'
        b'"book_version":1,"cache_hit_tokens":128,"cache_miss_tokens":72,"completion_tokens":50,'
        b'"computed_tokens":72,"currency":"USD","decided_at_ms":1740539201234,'
        b'"decided_by":"completion","drafted_tokens":4,"format":"tidemill.receipt.v2",'
        b'"generated_tokens":53,"hit_cost_pico":8960000,"hold_nano":90000,"key_id":"k1",'
        b'"miss_cost_pico":19440000,"model":"demo",'
        b'"output_cost_pico":55000000,"price_hit_pico":70000,"price_miss_pico":270000,'
        b'"price_model":"deepseek-chat","price_output_pico":1100000,"prompt_tokens":200,'
        b'"reasoning_tokens":10,"request_id":"r-1","reused_cache_disk_tokens":0,'
        b'"reused_cache_ram_tokens":64,"reused_device_tokens":64,"reused_host_tokens":0,'
        b'"reused_peer_tokens":0,"saved_nano":25600,"tariff_from_ms":1740499200000,'
        b'"tenant_id":"acme","unbilled_failover_redo_tokens":0,"unbilled_lost_tokens":0,'
        b'"unbilled_overrun_tokens":3,"unbilled_server_fault_tokens":0,"window":"standard"}'
    )
    assert receipt.content_sha256 == hashlib.sha256(receipt.canonical_bytes()).hexdigest()


@given(receipts())
def test_every_issued_receipt_verifies_also_after_travelling_as_json(receipt: Receipt) -> None:
    verify(receipt, BOOK)
    travelled = reopen(json.loads(receipt.canonical_bytes()), receipt.content_sha256)
    assert travelled == receipt
    verify(travelled, BOOK)


@settings(max_examples=25)
@given(receipts(), st.integers(1, 10**6))
def test_any_single_altered_field_fails(receipt: Receipt, step: int) -> None:
    for name, value in receipt.to_fields().items():
        altered = receipt.to_fields()
        altered[name] = value + step if isinstance(value, int) else value + "x"
        with pytest.raises(ReceiptError):
            verify(reopen(altered, receipt.content_sha256), BOOK)


NOT_RECOMPUTABLE = {
    "request_id",
    "tenant_id",
    "model",
    "attempts",
    "hold_nano",
    "key_id",
    "reasoning_tokens",
    "drafted_tokens",
    "accepted_tokens",
}
"""No price depends on these: only the hash binds them."""


@pytest.mark.parametrize("name", sorted(sample().to_fields().keys() - NOT_RECOMPUTABLE))
def test_a_new_hash_does_not_hide_an_altered_figure(name: str) -> None:
    altered = sample().to_fields()
    value = altered[name]
    altered[name] = value + 1 if isinstance(value, int) else value + "x"
    if name.endswith("_at_ms"):  # into the next night, or before the book
        altered[name] = BOOK_FROM_MS + 28 * 3600 * 1000 if name == "decided_at_ms" else 0
    new_hash = hashlib.sha256(canonical_bytes(altered)).hexdigest()
    with pytest.raises(ReceiptError):
        verify(reopen(altered, new_hash), BOOK)


def test_the_error_names_the_field_with_both_values() -> None:
    receipt = sample()
    cheaper = replace(receipt, charge=replace(receipt.charge, amount_nano=1))
    with pytest.raises(ReceiptError, match="amount_nano is 1, should be 83400"):
        verify(cheaper, BOOK)


def test_a_charge_above_the_hold_is_named() -> None:
    with pytest.raises(ReceiptError, match="hold_nano is 83399, below the amount of 83400"):
        verify(replace(sample(), hold_nano=83_399), BOOK)


def test_a_forged_hash_is_named() -> None:
    with pytest.raises(ReceiptError, match="content_sha256 is '00', should be"):
        verify(replace(sample(), content_sha256="00"), BOOK)


def test_another_book_does_not_verify_it() -> None:
    text = BOOK_FILE.read_text(encoding="utf-8")
    other = parse_price_book(text.replace("version = 1", "version = 2"), source="other")
    with pytest.raises(ReceiptError, match=r"book_digest is .*; book_version is 1, should be 2"):
        verify(sample(), other)
    nobodys = parse_price_book(text.replace("deepseek-chat", "deepseek-talk"), source="nobodys")
    with pytest.raises(ReceiptError, match=r"cannot be recomputed: .* no model 'deepseek-chat'"):
        verify(sample(), nobodys)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"vat": 19}, "vat is 19, should be None"),
        ({"prompt_tokens": 200.0}, "prompt_tokens must be an int"),
        ({"window": 7}, "window must be a string"),
        ({"format": "tidemill.receipt.v1"}, "format is 'tidemill.receipt.v1'"),
        ({"computed_tokens": 73}, "U1 does not hold"),
        ({"cache_hit_tokens": 64}, "cache_hit_tokens is 64, should be 128"),
    ],
)
def test_what_is_no_receipt_is_refused(change: dict[str, str | int], problem: str) -> None:
    with pytest.raises(ReceiptError, match=problem):
        reopen(sample().to_fields() | change, "")


def test_a_missing_field_is_refused() -> None:
    fields = sample().to_fields()
    del fields["currency"]
    with pytest.raises(ReceiptError, match="not a receipt: 'currency'"):
        reopen(fields, "")


@pytest.mark.parametrize("value", [1.0, None, True, [1.5], {"a": 0.1}, {1: "a"}, b"x"])
def test_canonical_form_holds_strings_and_ints_only(value: object) -> None:
    with pytest.raises(TypeError):
        canonical_bytes({"field": value})
