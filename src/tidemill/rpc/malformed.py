"""Requests out of bytes, once the caller has been let in.

gRPC by itself would read and parse a request before any handler runs: a caller without
credentials would have megabytes parsed for him, and could hold a place by sending nothing. So
every method is served as one that takes a stream, whose first message is asked for inside the
guards; on the wire there is no difference. Bytes that are no message are a clear refusal in place
of gRPC's INTERNAL.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from google.protobuf.message import DecodeError

from tidemill.errors import DeadlineExceeded, InvalidRequest

REQUEST_S = 10.0  # for the one message of a call to arrive in

Parse = Callable[[bytes], Any] | None


async def only(requests: AsyncIterator[bytes], parse: Parse) -> Any:
    """The request of a call that has one. Raises InvalidRequest, DeadlineExceeded."""
    try:
        async with asyncio.timeout(REQUEST_S):
            data = await anext(requests)
    except StopAsyncIteration:
        raise InvalidRequest("there is no request", reason="MALFORMED_REQUEST") from None
    except TimeoutError:
        raise DeadlineExceeded(f"no request came for {REQUEST_S:g} s") from None
    return _parsed(data, parse)


async def each(requests: AsyncIterator[bytes], parse: Parse) -> AsyncIterator[Any]:
    """Each request of a stream as it is read; InvalidRequest at the first that is none."""
    async for data in requests:
        yield _parsed(data, parse)


def _parsed(data: bytes, parse: Parse) -> Any:
    if parse is None:
        return data
    try:
        return parse(data)
    except DecodeError:
        raise InvalidRequest(
            "the request is no message of this method, or a string in it is not UTF-8",
            reason="MALFORMED_REQUEST",
        ) from None
