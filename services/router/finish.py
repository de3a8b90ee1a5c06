"""How a completion ends, and what is told about it."""

from dataclasses import dataclass
from enum import IntEnum

from tidemill.billing import Chained, Receipt, Usage


class Finish(IntEnum):
    """Why a completion ended; numbers are those of the proto's FinishReason."""

    STOP = 1
    LENGTH = 2
    BUDGET = 3
    CANCELLED = 4
    DEADLINE = 5
    SLOW_READER = 6
    SERVER_FAULT = 7


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Where the time went: microseconds of the router's clock, and the workers' own figures."""

    queued_us: int = 0
    first_token_us: int = 0
    total_us: int = 0
    prefill_us: int = 0
    decode_busy_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillSite:
    """Who prefilled: the authority on the prompt's split (U3). `in_place`: the decode worker."""

    worker_id: str = ""
    in_place: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Completed:
    """The last word on a request: why its last choice ended, its usage and its bill.

    `chained` is where the ledger put the receipt, None while it waits for that or where there was
    nothing to charge; `signature` [64 bytes] is over what is known, by the key `signing_key_id`.
    `again`: the request had been settled before this call.
    """

    finish: Finish
    usage: Usage
    site: PrefillSite
    receipt: Receipt
    seed: int
    timing: Timing
    num_choices: int = 1
    chained: Chained | None = None
    pending: bool = False
    signature: bytes = b""
    signing_key_id: str = ""
    again: bool = False
