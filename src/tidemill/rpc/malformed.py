"""Bytes that are no message of their method: a clear refusal in place of gRPC's INTERNAL.

gRPC parses a request before any handler runs, so a failure is carried as a value to where the
guards are entered: a caller without credentials is refused for that first.
"""

from collections.abc import AsyncIterator, Callable
from typing import Any

from google.protobuf.message import DecodeError

from tidemill.errors import InvalidRequest


class _Malformed:
    """Stands for a request that could not be parsed."""


def tolerant(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    """`deserialize`, with a value that `parsed` refuses in place of DecodeError."""
    if deserialize is None:
        return None

    def parse(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError:
            return _Malformed()

    return parse


def parsed(request: Any) -> Any:
    """The request, or each request of a stream as it is read; InvalidRequest if malformed."""
    if isinstance(request, AsyncIterator):
        return _each_parsed(request)
    return _parsed(request)


async def _each_parsed(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _parsed(request)


def _parsed(request: Any) -> Any:
    if isinstance(request, _Malformed):
        raise InvalidRequest(
            "the request is no message of this method, or a string in it is not UTF-8",
            reason="MALFORMED_REQUEST",
        )
    return request
