"""Tidemill's errors <-> google.rpc.Status in a call's trailers.

The details follow AIP-193: ErrorInfo (reason, domain, metadata) always; BadRequest, QuotaFailure,
RetryInfo and RequestInfo where the error has them.
"""

from collections.abc import Iterable
from typing import Any, NoReturn, Protocol, TypeVar, cast

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from tidemill.errors import (
    Internal,
    InvalidRequest,
    LimitExceeded,
    TidemillError,
    error_class,
)

DOMAIN = "tidemill"

# Trailers share the peer's metadata limit (8 KB by default), so lists and texts are cut.
_MAX_DETAILS = 16
_MAX_TEXT = 256
_MAX_MESSAGE = 1024

_DETAILS_KEY = "grpc-status-details-bin"
_CODES = {code.value[0]: code for code in grpc.StatusCode}

M = TypeVar("M", bound=Message)


class _FailedCall(Protocol):
    """What both grpc.RpcError (once raised by a call) and grpc.aio.AioRpcError offer."""

    def code(self) -> grpc.StatusCode: ...
    def details(self) -> str | None: ...
    def trailing_metadata(self) -> Iterable[tuple[str, str | bytes]] | None: ...


def to_status(error: TidemillError) -> Status:
    """The status that carries `error` over the wire; overlong texts and lists are cut."""
    status = Status(code=error.code.value[0], message=str(error)[:_MAX_MESSAGE])
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)
    for key, value in list(error.metadata.items())[:_MAX_DETAILS]:
        info.metadata[key] = value[:_MAX_TEXT]
    details: list[Message] = [info]
    if isinstance(error, InvalidRequest) and error.violations:
        details.append(_bad_request(error))
    if isinstance(error, LimitExceeded) and error.quotas:
        details.append(_quota_failure(error))
    if error.retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(round(max(error.retry_after_s, 0.0) * 1e9))
        details.append(retry)
    if error.request_id is not None:
        details.append(error_details_pb2.RequestInfo(request_id=error.request_id))
    for detail in details:
        status.details.add().Pack(detail)
    return status


def from_status(status: Status) -> TidemillError:
    """The error that `status` carries: its class by reason, else by code, else Internal."""
    code = _CODES.get(status.code, grpc.StatusCode.UNKNOWN)
    info = _detail(status, error_details_pb2.ErrorInfo)
    ours = info is not None and info.domain == DOMAIN
    reason = info.reason if info is not None and ours else ""
    cls = error_class(reason, code)
    if not reason and cls is Internal:
        reason = code.name  # UNIMPLEMENTED, DATA_LOSS: codes that the tree does not draw
    fields: dict[str, Any] = {"reason": reason or None}
    if info is not None and ours:
        fields["metadata"] = dict(info.metadata)
    retry = _detail(status, error_details_pb2.RetryInfo)
    if retry is not None:
        fields["retry_after_s"] = retry.retry_delay.ToNanoseconds() / 1e9
    request = _detail(status, error_details_pb2.RequestInfo)
    if request is not None:
        fields["request_id"] = request.request_id
    bad_request = _detail(status, error_details_pb2.BadRequest)
    if bad_request is not None and issubclass(cls, InvalidRequest):
        fields["violations"] = [(v.field, v.description) for v in bad_request.field_violations]
    quota = _detail(status, error_details_pb2.QuotaFailure)
    if quota is not None and issubclass(cls, LimitExceeded):
        fields["quotas"] = [(v.subject, v.description) for v in quota.violations]
    return cls(status.message or code.name, **fields)


def from_rpc_error(error: grpc.RpcError) -> TidemillError:
    """The error behind a failed call of either stack.

    Without a readable status in the trailers (the connection broke, a deadline ran out here, a
    proxy answered) the class follows from the code alone.
    """
    if not hasattr(error, "code"):
        return Internal(str(error) or type(error).__name__)
    call = cast(_FailedCall, error)
    code = call.code()
    for key, value in call.trailing_metadata() or ():
        if key == _DETAILS_KEY and isinstance(value, bytes):
            status = _parse(value)
            if status is not None and status.code == code.value[0]:
                return from_status(status)
    return from_status(Status(code=code.value[0], message=call.details() or ""))


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: TidemillError) -> NoReturn:
    """End the call of `context` with `error`; never returns."""
    await context.abort_with_status(rpc_status.to_status(to_status(error)))
    raise AssertionError("abort returned")


def _bad_request(error: InvalidRequest) -> error_details_pb2.BadRequest:
    detail = error_details_pb2.BadRequest()
    for field, description in error.violations[:_MAX_DETAILS]:
        detail.field_violations.add(field=field[:_MAX_TEXT], description=description[:_MAX_TEXT])
    return detail


def _quota_failure(error: LimitExceeded) -> error_details_pb2.QuotaFailure:
    detail = error_details_pb2.QuotaFailure()
    for subject, description in error.quotas[:_MAX_DETAILS]:
        detail.violations.add(subject=subject[:_MAX_TEXT], description=description[:_MAX_TEXT])
    return detail


def _detail(status: Status, kind: type[M]) -> M | None:
    for packed in status.details:
        message = kind()
        if packed.Is(message.DESCRIPTOR):
            try:
                packed.Unpack(message)
            except DecodeError:
                return None
            return message
    return None


def _parse(data: bytes) -> Status | None:
    try:
        return Status.FromString(data)
    except DecodeError:
        return None
