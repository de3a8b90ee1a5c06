"""Deadlines: gRPC Python does not pass a caller's deadline on by itself."""

from typing import Any

import grpc

from tidemill.errors import DeadlineExceeded


def remaining_s(
    context: grpc.aio.ServicerContext[Any, Any], *, cap_s: float, reserve_s: float = 0.0
) -> float:
    """Seconds to give a downstream call (`timeout=`) made on behalf of `context`'s caller.

    At most `cap_s`, and at most what the caller has left less `reserve_s`, kept back for our own
    answer. Raises DeadlineExceeded when nothing is left.
    """
    left: float | None = context.time_remaining()  # None without a deadline: the stubs are wrong
    if left is None:
        return cap_s
    if left <= reserve_s:
        raise DeadlineExceeded("the caller's deadline has passed")
    return min(cap_s, left - reserve_s)
