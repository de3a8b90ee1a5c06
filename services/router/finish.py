"""How a completion ends, and what is told about it."""

from dataclasses import dataclass
from enum import IntEnum

from tidemill.billing import Receipt, Usage


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
    """The last word on a request: why its last choice ended, its usage and its bill."""

    finish: Finish
    usage: Usage
    site: PrefillSite
    receipt: Receipt
    seed: int
    timing: Timing
    num_choices: int = 1
