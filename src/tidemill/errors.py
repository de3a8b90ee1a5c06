"""Every error that Tidemill raises on purpose.

TidemillError
├── InvalidRequest          INVALID_ARGUMENT     names each bad field
├── Unauthenticated         UNAUTHENTICATED
├── PermissionDenied        PERMISSION_DENIED
├── NotFound                NOT_FOUND
│   └── ModelNotFound
├── AlreadyExists           ALREADY_EXISTS       a request id reused with another body
├── ResourceExhausted       RESOURCE_EXHAUSTED
│   ├── Overloaded                               try again after retry_after_s
│   │   ├── QueueFull
│   │   ├── DeadlineUnreachable                  the queue is too long for its deadline
│   │   ├── PrefillFull
│   │   └── DecodeFull
│   └── LimitExceeded                            a tenant's own limit, named in quotas
├── FailedPrecondition      FAILED_PRECONDITION
│   └── InsufficientBalance
├── Aborted                 ABORTED
│   └── RequestInProgress                        another router owns this request id
├── DeadlineExceeded        DEADLINE_EXCEEDED
├── Cancelled               CANCELLED
├── Unavailable             UNAVAILABLE
│   ├── WorkerLost
│   ├── CacheUnavailable
│   └── LedgerUnavailable
├── Internal                INTERNAL             error_id is in the log
└── LocalError              never crosses a wire as itself
    ├── ConfigError
    ├── CheckpointError
    ├── PoolExhausted
    ├── PoolCorrupted                            a bug: the pool's books do not balance
    ├── TransferError
    ├── UsageError                               counts that cannot all be true
    └── ReceiptError                             a receipt that does not verify

`reason` is the machine-readable name (UPPER_SNAKE) that travels in google.rpc.ErrorInfo;
tidemill.rpc.status carries these errors over gRPC in both directions.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, TypedDict, Unpack

from grpc import StatusCode


class _Common(TypedDict, total=False):
    reason: str | None
    metadata: Mapping[str, str] | None
    request_id: str | None
    retry_after_s: float | None


class TidemillError(Exception):
    """Base of the tree.

    `metadata` holds facts for programs (at most a few short strings, no secrets, no prompts);
    `request_id` is known once the call that failed is; `retry_after_s` in seconds is set where
    trying again may help.
    """

    code: ClassVar[StatusCode] = StatusCode.INTERNAL
    reason: str = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
        request_id: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        if reason is not None:
            self.reason = reason
        self.metadata: dict[str, str] = dict(metadata or {})
        self.request_id = request_id
        self.retry_after_s = retry_after_s

    @property
    def message(self) -> str:
        """What went wrong, for people."""
        return str(self)


class InvalidRequest(TidemillError):
    """The request itself is wrong; `violations` holds (field path, description) pairs."""

    code = StatusCode.INVALID_ARGUMENT
    reason = "INVALID_REQUEST"

    def __init__(
        self,
        message: str,
        *,
        violations: Sequence[tuple[str, str]] = (),
        **common: Unpack[_Common],
    ) -> None:
        super().__init__(message, **common)
        self.violations = list(violations)


class Unauthenticated(TidemillError):
    """No credentials, or credentials that nobody was given."""

    code = StatusCode.UNAUTHENTICATED
    reason = "UNAUTHENTICATED"


class PermissionDenied(TidemillError):
    """Known caller, forbidden act."""

    code = StatusCode.PERMISSION_DENIED
    reason = "PERMISSION_DENIED"


class NotFound(TidemillError):
    """The thing named does not exist, or not for this caller."""

    code = StatusCode.NOT_FOUND
    reason = "NOT_FOUND"


class ModelNotFound(NotFound):
    """No pool serves a model of that name."""

    reason = "MODEL_NOT_FOUND"


class AlreadyExists(TidemillError):
    """The request id was used before, with another body."""

    code = StatusCode.ALREADY_EXISTS
    reason = "ALREADY_EXISTS"


class ResourceExhausted(TidemillError):
    """Something finite is used up."""

    code = StatusCode.RESOURCE_EXHAUSTED
    reason = "RESOURCE_EXHAUSTED"


class Overloaded(ResourceExhausted):
    """The service is full; trying again after `retry_after_s` may succeed."""

    reason = "OVERLOADED"


class QueueFull(Overloaded):
    """The router's queue has no place left."""

    reason = "QUEUE_FULL"


class DeadlineUnreachable(Overloaded):
    """The request's first token would come too late; `metadata` says when it was expected."""

    reason = "DEADLINE_UNREACHABLE"


class PrefillFull(Overloaded):
    """The prefill worker admits no more work; another may."""

    reason = "PREFILL_FULL"


class DecodeFull(Overloaded):
    """The decode worker admits no more work; another may."""

    reason = "DECODE_FULL"


class LimitExceeded(ResourceExhausted):
    """A limit set for the caller is reached; `quotas` holds (subject, description) pairs."""

    reason = "LIMIT_EXCEEDED"

    def __init__(
        self,
        message: str,
        *,
        quotas: Sequence[tuple[str, str]] = (),
        **common: Unpack[_Common],
    ) -> None:
        super().__init__(message, **common)
        self.quotas = list(quotas)


class FailedPrecondition(TidemillError):
    """The system is not in the state that the request needs."""

    code = StatusCode.FAILED_PRECONDITION
    reason = "FAILED_PRECONDITION"


class InsufficientBalance(FailedPrecondition):
    """The account cannot pay for the least that the request may cost."""

    reason = "INSUFFICIENT_BALANCE"


class Aborted(TidemillError):
    """Another party got there first."""

    code = StatusCode.ABORTED
    reason = "ABORTED"


class RequestInProgress(Aborted):
    """A live router is serving this request id already."""

    reason = "REQUEST_IN_PROGRESS"


class DeadlineExceeded(TidemillError):
    """The caller's time ran out."""

    code = StatusCode.DEADLINE_EXCEEDED
    reason = "DEADLINE_EXCEEDED"


class Cancelled(TidemillError):
    """The caller, or the far side, gave the call up."""

    code = StatusCode.CANCELLED
    reason = "CANCELLED"


class Unavailable(TidemillError):
    """The service cannot be reached just now; trying again may succeed."""

    code = StatusCode.UNAVAILABLE
    reason = "UNAVAILABLE"


class WorkerLost(Unavailable):
    """A prefill or decode worker vanished in the middle of the work."""

    reason = "WORKER_LOST"


class CacheUnavailable(Unavailable):
    """The context cache, or its Redis, does not answer."""

    reason = "CACHE_UNAVAILABLE"


class LedgerUnavailable(Unavailable):
    """The ledger's Redis does not answer: no money can be held or settled."""

    reason = "LEDGER_UNAVAILABLE"


class Internal(TidemillError):
    """A true surprise; the log line with `error_id` holds its traceback."""

    code = StatusCode.INTERNAL
    reason = "INTERNAL"

    def __init__(
        self, message: str, *, error_id: str | None = None, **common: Unpack[_Common]
    ) -> None:
        super().__init__(message, **common)
        if error_id is not None:
            self.metadata["error_id"] = error_id

    @property
    def error_id(self) -> str | None:
        """Names the log line of the far side that tells what happened."""
        return self.metadata.get("error_id")


class LocalError(TidemillError):
    """Meant for the process that it happens in; over gRPC it becomes Internal."""


class ConfigError(LocalError):
    """The configuration is wrong; the message names the key and the file."""

    reason = "CONFIG_ERROR"


class CheckpointError(LocalError):
    """A checkpoint does not hold what its configuration promises.

    `tensor` is the tensor's name, `shape` what was found, `expected` what should be there; each
    is None where the error is not about a tensor, or where nothing was found.
    """

    reason = "CHECKPOINT_ERROR"

    def __init__(
        self,
        message: str,
        *,
        tensor: str | None = None,
        shape: tuple[int, ...] | None = None,
        expected: tuple[int, ...] | None = None,
        **common: Unpack[_Common],
    ) -> None:
        super().__init__(message, **common)
        self.tensor = tensor
        self.shape = shape
        self.expected = expected


class PoolExhausted(LocalError):
    """No free block is left, and none that may be evicted."""

    reason = "POOL_EXHAUSTED"


class PoolCorrupted(LocalError):
    """A block pool's books do not balance: a bug, found by check_integrity() or at the deed."""

    reason = "POOL_CORRUPTED"


class TransferError(LocalError):
    """A KV hand-over broke: lease, epoch, fingerprint or checksum."""

    reason = "TRANSFER_ERROR"


class UsageError(LocalError):
    """Token counts break an invariant that the message names: they must not be billed."""

    reason = "USAGE_ERROR"


class ReceiptError(LocalError):
    """A receipt is malformed or differs from its recomputation; the message names the fields."""

    reason = "RECEIPT_ERROR"


def error_class(reason: str, code: StatusCode) -> type[TidemillError]:
    """The class that `reason` names, else the general one for `code`, else Internal.

    A reason counts only together with its own code, so a peer cannot turn a refusal into
    something that looks retryable. Local errors are never returned.
    """
    general: type[TidemillError] = Internal
    for cls in _wire_classes(TidemillError):
        if cls.code == code:
            if cls.reason == reason:
                return cls
            if cls.__base__ is TidemillError:
                general = cls
    return general


def _wire_classes(base: type[TidemillError]) -> Iterator[type[TidemillError]]:
    for cls in base.__subclasses__():
        if cls is not LocalError:
            yield cls
            yield from _wire_classes(cls)
