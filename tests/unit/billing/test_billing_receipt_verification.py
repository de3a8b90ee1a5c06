"""M5: an export is checked offline, and whatever was changed in it is named."""

import json

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.receipt_ledger import BOOK_FILE, BOOKS, KEY, KEYS, PUBLIC, Document, Ledger, pending
from tidemill.billing import PriceBook, next_chain, parse_price_book
from tidemill.billing.canonical import canonical_bytes, sha256_hex
from tidemill.billing.chain import FIRST_CHAIN
from tidemill.billing.signature import parse_public_key, signed_bytes, signing_key_id
from tidemill.billing.verification import Gap, Verdict, verify_documents
from tidemill.errors import ConfigError


def verdict(*documents: Document, keys: dict[str, bytes] | None = KEYS) -> Verdict:
    return verify_documents(documents, BOOKS, keys)


def faults(*documents: Document, keys: dict[str, bytes] | None = KEYS) -> set[tuple[str, str]]:
    return {(fault.request_id, fault.field) for fault in verdict(*documents, keys=keys).faults}


def test_what_was_settled_verifies_also_as_json() -> None:
    ledger = Ledger()
    receipts = [ledger.settle(f"r{number}") for number in range(3)]
    travelled = [json.loads(json.dumps(receipt)) for receipt in receipts]
    assert verdict(*travelled, pending()) == Verdict(4, (), [], signatures_checked=True)


def changed(value: str | int) -> str | int:
    if isinstance(value, int):
        return value + 1
    return value[:-1] + ("0" if value[-1] != "0" else "1") if value else "x"


@pytest.mark.parametrize("field", sorted(Ledger().settle("r")))
def test_any_changed_field_is_found(field: str) -> None:
    ledger = Ledger()
    first, second, third = (ledger.settle(f"r{number}") for number in range(3))
    second[field] = changed(second[field])
    found = verdict(first, second, third)
    assert {fault.line for fault in found.faults} == {2}
    assert all(fault.problem for fault in found.faults)


KEYLESS = {"position", "signature", "signing_key_id"}
"""Nothing but the signature binds these of a single receipt."""


@pytest.mark.parametrize("field", sorted(Ledger().settle("r").keys() - KEYLESS))
def test_all_but_the_signed_place_is_found_without_a_key(field: str) -> None:
    receipt = Ledger().settle("r")
    receipt[field] = changed(receipt[field])
    assert verdict(receipt, keys=None).faults
    assert not verdict(Ledger().settle("r"), keys=None).signatures_checked


@pytest.mark.parametrize("field", sorted(Ledger().settle("r")))
@pytest.mark.parametrize("value", [None, 1.5, True, [], "missing"])
def test_a_field_of_another_kind_is_named(field: str, value: object) -> None:
    receipt = Ledger().settle("r")
    if value == "missing":
        del receipt[field]
    else:
        receipt[field] = value
    found = [(fault.field, *fault.problem.split()) for fault in verdict(receipt).faults]
    assert any(field in words for words in found), found


WEIRD: list[str | int] = [-1, 0, 2**63, 2**64, 10**30, "", "x", "0" * 64, "\ud800", "\0", "settled"]


@pytest.mark.parametrize("field", sorted(Ledger().settle("r")))
def test_no_value_is_too_strange_to_be_judged(field: str) -> None:
    for value in WEIRD:
        receipt = Ledger().settle("r")
        if receipt[field] != value:
            assert verdict(receipt | {field: value}).faults, value
            verdict(receipt | {field: value}, keys=None)


def test_every_figure_at_fault_is_named_with_the_true_value() -> None:
    receipt = Ledger().settle("r") | {"amount_nano": 1, "price_hit_pico": 7, "window": "night"}
    found = {fault.field: fault.problem for fault in verdict(receipt).faults}
    assert found["amount_nano"] == "is 1, should be 83400"
    assert found["price_hit_pico"] == "is 7, should be 70000"
    assert found["window"] == "is 'night', should be 'standard'"
    assert "content_sha256" in found


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"computed_tokens": 73}, "U1"),
        ({"generated_tokens": 58}, "M4"),
        ({"cache_hit_tokens": 64, "cache_miss_tokens": 136}, "should be 128"),
        ({"hold_nano": 83_399}, "M3"),
    ],
)
def test_a_forger_who_hashes_and_chains_anew_meets_the_count_rules(
    change: Document, rule: str
) -> None:
    receipt = Ledger().settle("r") | change
    beside = {
        "content_sha256", "state", "position", "previous_chain", "chain", "granted_nano",
        "topped_up_nano", "signature", "signing_key_id",
    }  # fmt: skip
    content = {name: value for name, value in receipt.items() if name not in beside}
    receipt["content_sha256"] = sha256_hex(canonical_bytes(content))
    receipt["chain"] = next_chain(FIRST_CHAIN, receipt["content_sha256"])
    assert any(rule in fault.problem for fault in verdict(receipt, keys=None).faults)
    assert ("r", "signature") in faults(receipt)


def test_a_broken_chain_a_repeated_place_and_a_gap_are_told_apart() -> None:
    ledger, other = Ledger(), Ledger()
    receipts = [ledger.settle(f"r{number}") for number in range(5)]
    elsewhere = [other.settle(f"o{number}", prompt_tokens=300) for number in range(2)]
    assert faults(receipts[0], elsewhere[1]) == {("o1", "previous_chain")}
    assert faults(receipts[0], receipts[1], elsewhere[1]) == {("o1", "position")}
    gapped = verdict(receipts[0], receipts[4], receipts[3])
    assert not gapped.faults
    assert gapped.gaps == [Gap("acme", 2, 3)]


def test_each_tenant_has_a_chain_of_its_own() -> None:
    one, other = Ledger("one"), Ledger("other")
    mixed = [ledger.settle(f"r{number}") for number in range(2) for ledger in (one, other)]
    assert verdict(*mixed) == Verdict(4, (), [], signatures_checked=True)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"state": "settled"}, "position"),
        ({"position": 1}, "position"),
        ({"chain": "00" * 32}, "chain"),
        ({"granted_nano": 5}, "granted_nano"),
        ({"state": "priced"}, "state"),
        ({"state": "free"}, "state"),
    ],
)
def test_what_is_pending_has_no_place_and_nobody_paid(change: Document, field: str) -> None:
    assert ("p", field) in faults(pending() | change)


def test_a_book_that_was_not_given_is_named() -> None:
    receipt = Ledger().settle("r")
    text = BOOK_FILE.read_text(encoding="utf-8").replace("version = 1", "version = 2")
    other: PriceBook = parse_price_book(text, source="other")
    (fault,) = verify_documents([receipt], {other.digest: other}).faults
    assert (fault.field, "no price book given" in fault.problem) == ("book_digest", True)


def test_a_signature_of_another_key_is_found() -> None:
    stranger = Ed25519PrivateKey.from_private_bytes(b"s" * 32).public_key().public_bytes_raw()
    assert faults(Ledger().settle("r"), keys={signing_key_id(stranger): stranger}) == {
        ("r", "signing_key_id")
    }
    assert faults(Ledger().settle("r"), keys={signing_key_id(PUBLIC): stranger}) == {
        ("r", "signature")
    }


def test_a_public_key_is_read_from_hexadecimal_and_pem() -> None:
    pem = KEY.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    assert parse_public_key(f" {PUBLIC.hex()}\n") == PUBLIC
    assert parse_public_key(pem.decode()) == PUBLIC
    for wrong in ("", "zz", PUBLIC.hex()[2:], "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END"):
        with pytest.raises(ConfigError, match="public key"):
            parse_public_key(wrong)


def test_the_signed_bytes_are_pinned() -> None:
    assert signed_bytes("11" * 32, "22" * 32, 3) == (
        b"tidemill.receipt.v2\0" + b"\x11" * 32 + b"\x22" * 32 + b"\0\0\0\0\0\0\0\x03"
    )
    assert signed_bytes("11" * 32) == b"tidemill.receipt.v2\0" + b"\x11" * 32 + bytes(40)
