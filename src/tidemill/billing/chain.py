"""The chain of an account's receipts: what makes a missing or altered one show (DESIGN.md 4: M5).

Hashes are 64 lower-case hexadecimal digits.
"""

import hashlib
from dataclasses import dataclass

FIRST_CHAIN = "00" * 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Chained:
    """Where the ledger put a receipt, and from which balances it took the charge.

    `position` counts the account's receipts from 1; `granted_nano` + `topped_up_nano` is the
    amount.
    """

    position: int
    previous_chain: str
    chain: str
    granted_nano: int
    topped_up_nano: int


def next_chain(previous_chain: str, content_sha256: str) -> str:
    """SHA-256 over both, 32 bytes each; ValueError if one is no hexadecimal."""
    link = bytes.fromhex(previous_chain) + bytes.fromhex(content_sha256)
    return hashlib.sha256(link).hexdigest()
