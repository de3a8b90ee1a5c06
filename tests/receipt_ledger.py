"""Settles receipts as a router does, without one: chained, then signed, in the form of exports."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tidemill.billing import Reuse, Unbilled, Usage, issue_receipt, load_price_book, next_chain
from tidemill.billing.chain import FIRST_CHAIN
from tidemill.billing.signature import signed_bytes, signing_key_id

BOOK_FILE = Path(__file__).parents[1] / "prices" / "deepseek-2025-02.toml"
BOOK = load_price_book(BOOK_FILE)
BOOKS = {BOOK.digest: BOOK}
AT_MS = 1_740_539_200_000
KEY = Ed25519PrivateKey.from_private_bytes(b"k" * 32)
PUBLIC = KEY.public_key().public_bytes_raw()
KEYS = {signing_key_id(PUBLIC): PUBLIC}

Document = dict[str, Any]


@dataclass
class Ledger:
    """One account's chain."""

    tenant_id: str = "acme"
    position: int = 0
    chain: str = FIRST_CHAIN

    def settle(self, request_id: str, *, prompt_tokens: int = 200) -> Document:
        """The next receipt."""
        receipt = issue_receipt(
            BOOK,
            request_id=request_id,
            tenant_id=self.tenant_id,
            key_id="k1",
            model="demo",
            price_model="deepseek-chat",
            currency="USD",
            usage=Usage(
                prompt_tokens=prompt_tokens,
                computed_tokens=prompt_tokens - 128,
                reused=Reuse(device=64, cache_ram=64),
                completion_tokens=50,
                reasoning_tokens=10,
                generated_tokens=57,
                unbilled=Unbilled(overrun=3, failover_redo=4),
                drafted_tokens=4,
                accepted_tokens=2,
            ),
            admitted_at_ms=AT_MS,
            decided_at_ms=AT_MS + 1234,
            hold_nano=10**9,
        )
        previous, self.position = self.chain, self.position + 1
        self.chain = next_chain(previous, receipt.content_sha256)
        document = {
            **receipt.to_fields(),
            "content_sha256": receipt.content_sha256,
            "state": "settled",
            "position": self.position,
            "previous_chain": previous,
            "chain": self.chain,
            "granted_nano": 400,
            "topped_up_nano": receipt.charge.amount_nano - 400,
        }
        return signed(document)


def signed(document: Document) -> Document:
    """With the signature that belongs under it."""
    message = signed_bytes(document["content_sha256"], document["chain"], document["position"])
    return document | {
        "signature": KEY.sign(message).hex(),
        "signing_key_id": signing_key_id(PUBLIC),
    }


def pending() -> Document:
    """One that waits for the ledger."""
    document = Ledger().settle("p") | {
        "state": "pending",
        "position": 0,
        "previous_chain": "",
        "chain": "",
        "granted_nano": 0,
        "topped_up_nano": 0,
    }
    return signed(document)
