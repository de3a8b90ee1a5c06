"""What an account answers. Amounts and clocks are as `tidemill.billing.ledger` says."""

from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """Of a request's hold. UNKNOWN: there never was one."""

    UNKNOWN = "UNKNOWN"
    OPEN = "OPEN"
    ORPHAN = "ORPHAN"
    SETTLED = "SETTLED"
    RELEASED = "RELEASED"


class Reason(StrEnum):
    """Why money or a place was refused."""

    RATE_LIMITED = "RATE_LIMITED"
    CONCURRENCY_LIMITED = "CONCURRENCY_LIMITED"
    BUDGET_EXCEEDED = "BUDGET_EXCEEDED"
    INSUFFICIENT_BALANCE = "INSUFFICIENT_BALANCE"


@dataclass(frozen=True, slots=True)
class Balance:
    """What is free to spend, and what is held."""

    granted_nano: int
    topped_up_nano: int
    held_nano: int


@dataclass(frozen=True, slots=True)
class Held:
    """To Reserve: the hold is the caller's, under `fence`.

    After a takeover all but the fence is as its first owner had it, and `checkpoint` (JSON, or
    "") and `attempts` tell how far that one came. Fences below `first_fence` were those of an
    earlier hold under this request id, which was released.
    """

    fence: int
    held_nano: int
    in_full: bool
    admitted_at_ms: int
    terms: str
    checkpoint: str
    attempts: int
    first_fence: int = 1


@dataclass(frozen=True, slots=True)
class Refused:
    """Nothing was taken. `limit` names a field of Limits, or is "" for the balance.

    `resets_at_ms`: when the same request would pass if nothing else happened; 0 where that
    depends on other requests' ends or on money being paid in.
    """

    reason: Reason
    limit: str
    scope: str
    resets_at_ms: int
    need_nano: int
    available_nano: int


@dataclass(frozen=True, slots=True)
class InProgress:
    """Somebody has the request, at least until `lease_until_ms`."""

    lease_until_ms: int


@dataclass(frozen=True, slots=True)
class OtherBody:
    """The request id was used with another body."""


@dataclass(frozen=True, slots=True)
class Posted:
    """A settled request: what was charged to which balance, and its link in the chain (hex).

    `duplicate`: it was settled before, and this is what was posted then.
    """

    position: int
    previous_chain: str
    chain: str
    granted_nano: int
    topped_up_nano: int
    held_nano: int
    duplicate: bool
    record: str


@dataclass(frozen=True, slots=True)
class Settled:
    """To Reserve: the request was settled before."""

    posted: Posted

    @property
    def record(self) -> str:
        """As Settle gave it."""
        return self.posted.record


@dataclass(frozen=True, slots=True)
class Extended:
    """To Extend: what is held now, in all."""

    held_nano: int


@dataclass(frozen=True, slots=True)
class Stale:
    """The hold is not the caller's any more; `fence` and `state` are the present ones."""

    fence: int
    state: State


@dataclass(frozen=True, slots=True)
class Done:
    """To Checkpoint: written."""


@dataclass(frozen=True, slots=True)
class Renewed:
    """To Renew: the request ids whose holds are no longer the caller's."""

    lost: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AboveHold:
    """To Settle: refused, the amount is more than was held (M3)."""

    held_nano: int


@dataclass(frozen=True, slots=True)
class Released:
    """To Release: nothing is held any more."""


@dataclass(frozen=True, slots=True)
class NotYet:
    """To Orphan: the owner may still live, or there is nothing to resolve."""


@dataclass(frozen=True, slots=True)
class Orphaned:
    """To Orphan: the caller's to resolve, under `fence`; `first_fence` as in `Held`."""

    fence: int
    terms: str
    checkpoint: str
    attempts: int
    held_nano: int
    admitted_at_ms: int
    orphaned_at_ms: int
    first_fence: int = 1


@dataclass(frozen=True, slots=True)
class Applied:
    """To an operation; `applied` is False if it was done before. `amount_nano` is what moved."""

    applied: bool
    amount_nano: int
    balance: Balance


@dataclass(frozen=True, slots=True)
class OtherContent:
    """The operation id was used for something else."""


@dataclass(frozen=True, slots=True)
class NotSettled:
    """To Refund: nothing was charged under that request id."""

    state: State


@dataclass(frozen=True, slots=True)
class TooMuch:
    """Refused: at most `most_nano` could be added, or is left to give back."""

    most_nano: int


ReserveReply = Held | Refused | InProgress | Settled | OtherBody
ExtendReply = Extended | Refused | Stale
CheckpointReply = Done | Stale
SettleReply = Posted | AboveHold | Stale
ReleaseReply = Released | Stale
OrphanReply = Orphaned | NotYet
OperationReply = Applied | OtherContent | TooMuch
RefundReply = OperationReply | NotSettled
Reply = (
    ReserveReply
    | ExtendReply
    | CheckpointReply
    | Renewed
    | SettleReply
    | ReleaseReply
    | OrphanReply
    | RefundReply
)
