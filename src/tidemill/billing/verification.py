"""Checks exported receipts offline: every figure, hash, link of the chain and signature (M5).

A document is one receipt as exports hold it: the flat content of `Receipt.to_fields`, and beside it
`content_sha256`, `state`, `position`, `previous_chain`, `chain`, `granted_nano`, `topped_up_nano`,
`signature` and `signing_key_id`; hashes and signature in hexadecimal.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from tidemill.billing.chain import FIRST_CHAIN, next_chain
from tidemill.billing.prices import PriceBook
from tidemill.billing.receipt import content_faults
from tidemill.billing.signature import is_signed, signed_bytes

Document = Mapping[str, object]

SETTLED = "settled"
_UNSETTLED = ("priced", "pending")
_HASHES = ("content_sha256", "previous_chain", "chain", "signature")
_TEXTS = (*_HASHES, "state", "signing_key_id")
_MOST = 1 << 64
_NO_OBJECT = "is no JSON object (is it a CSV export? only JSONL can be verified)"
_COUNTS = ("position", "granted_nano", "topped_up_nano")


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with one field of one receipt; `line` counts the documents from 1.

    Both names are "" where the whole line is at fault.
    """

    line: int
    request_id: str
    field: str
    problem: str


@dataclass(frozen=True, slots=True)
class Gap:
    """Positions of a tenant's chain that are not there, both ends included."""

    tenant_id: str
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of checking `num_receipts` documents; they verify if there is no fault.

    A gap is none: an export is a span of time, and the chain is in order of settlement.
    """

    num_receipts: int
    faults: Sequence[Fault]
    gaps: Sequence[Gap]
    signatures_checked: bool


def verify_documents(
    documents: Iterable[Document | None],
    books: Mapping[str, PriceBook],
    public_keys: Mapping[str, bytes] | None = None,
) -> Verdict:
    """Check every document by itself, and the chains that they are links of.

    None stands for a line that holds no document, which is one fault. `books` are keyed by
    digest, `public_keys` by signing key id; without keys no signature is checked. ConfigError if
    one is to be and `cryptography` is missing.
    """
    lines = list(enumerate(documents, start=1))
    faults = [Fault(line, "", "", _NO_OBJECT) for line, document in lines if document is None]
    numbered = [(line, document) for line, document in lines if document is not None]
    faults += [
        Fault(line, _request_id(document), field, problem)
        for line, document in numbered
        for field, problem in document_faults(document, books, public_keys).items()
    ]
    at_fault = {fault.line for fault in faults}
    sound = [entry for entry in numbered if entry[0] not in at_fault]
    links, gaps = _follow(sound)
    return Verdict(len(lines), (*faults, *links), gaps, public_keys is not None)


def document_faults(
    document: Document,
    books: Mapping[str, PriceBook],
    public_keys: Mapping[str, bytes] | None = None,
) -> dict[str, str]:
    """What is wrong with one document, by field."""
    if ill_formed := _form_faults(document):
        return ill_formed
    content = {
        name: value
        for name, value in document.items()
        if name not in (*_TEXTS, *_COUNTS) and isinstance(value, str | int)
    }
    content_sha256 = str(document["content_sha256"])
    book = books.get(str(document.get("book_digest")))
    if book is None:
        faults = {"book_digest": f"{document.get('book_digest')} is of no price book given"}
    else:
        faults = content_faults(content, content_sha256, book)
    faults |= _standing_faults(document)
    if public_keys is not None:
        faults |= _signature_faults(document, public_keys)
    return faults


def _form_faults(document: Document) -> dict[str, str]:
    faults = {name: "is missing" for name in (*_TEXTS, *_COUNTS) if name not in document}
    for name, value in document.items():
        if type(value) not in (str, int):
            faults[name] = f"must be a string or an integer, got {type(value).__name__}"
        elif name in _COUNTS and (type(value) is not int or not 0 <= value < _MOST):
            faults[name] = f"must be an integer of 64 bits, got {value!r}"
        elif name in _TEXTS and not isinstance(value, str):
            faults[name] = f"must be a string, got {value!r}"
        elif name in _HASHES and not _is_hex(str(value), 64 if name == "signature" else 32):
            faults[name] = f"is no hash in lower-case hexadecimal: {value!r}"
    return faults


def _is_hex(text: str, num_bytes: int) -> bool:
    return not text or (len(text) == 2 * num_bytes and set(text) <= set("0123456789abcdef"))


def _standing_faults(document: Document) -> dict[str, str]:
    """Whether its place in the chain and what was paid fit its state."""
    state, amount = document["state"], document.get("amount_nano")
    if state in _UNSETTLED:
        set_early = [*_COUNTS, "previous_chain", "chain"]
        faults = {name: f"is set, but {state}" for name in set_early if document[name]}
        if state == "priced" and amount:
            faults["state"] = f"is priced, but there is an amount of {amount}"
        return faults
    if state != SETTLED:
        return {"state": f"is {state!r}, must be settled, pending or priced"}
    position, previous = document["position"], str(document["previous_chain"])
    paid = _count(document, "granted_nano") + _count(document, "topped_up_nano")
    chain = next_chain(previous or FIRST_CHAIN, str(document["content_sha256"]))
    faults = {}
    if position == 0:
        faults["position"] = "is 0, but settled"
    if (position == 1) != (previous == FIRST_CHAIN):
        faults["previous_chain"] = f"is {previous}, which position {position} does not have"
    if document["chain"] != chain:
        faults["chain"] = f"is {document['chain']}, should be {chain}"
    if paid != amount:
        faults["granted_nano"] = f"and topped_up_nano are {paid}, should be the amount of {amount}"
    return faults


def _signature_faults(document: Document, public_keys: Mapping[str, bytes]) -> dict[str, str]:
    key_id = str(document["signing_key_id"])
    if key_id not in public_keys:
        return {"signing_key_id": f"is {key_id!r}, of no public key given"}
    message = signed_bytes(
        str(document["content_sha256"]), str(document["chain"]), _count(document, "position")
    )
    if is_signed(message, bytes.fromhex(str(document["signature"])), public_keys[key_id]):
        return {}
    return {"signature": f"is not that of key {key_id}"}


def _follow(numbered: Sequence[tuple[int, Document]]) -> tuple[list[Fault], list[Gap]]:
    """Where the chains of sound documents break, and which of their positions are missing."""
    chains: dict[str, list[tuple[int, int, Document]]] = {}
    for line, document in numbered:
        if document["state"] == SETTLED:
            links = chains.setdefault(str(document["tenant_id"]), [])
            links.append((_count(document, "position"), line, document))
    faults: list[Fault] = []
    gaps: list[Gap] = []
    for tenant_id, links in sorted(chains.items()):
        links.sort(key=lambda link: link[:2])
        for (before, _, earlier), (position, line, later) in pairwise(links):
            request_id = _request_id(later)
            if position == before:
                faults.append(Fault(line, request_id, "position", f"{position} is there twice"))
            elif position > before + 1:
                gaps.append(Gap(tenant_id, before + 1, position - 1))
            elif later["previous_chain"] != earlier["chain"]:
                problem = f"is not the chain of position {before}, {earlier['chain']}"
                faults.append(Fault(line, request_id, "previous_chain", problem))
    return faults, gaps


def _count(document: Document, name: str) -> int:
    value = document[name]
    assert isinstance(value, int)
    return value


def _request_id(document: Document) -> str:
    return str(document.get("request_id", ""))
