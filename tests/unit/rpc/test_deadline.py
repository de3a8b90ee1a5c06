import grpc
import pytest

from tests.unit.rpc.serving import method, serving
from tidemill.errors import DeadlineExceeded
from tidemill.rpc.channel import sdk_aio_channel
from tidemill.rpc.deadline import remaining_s

Context = grpc.aio.ServicerContext[bytes, bytes]


async def granted(timeout: float | None, *, cap_s: float, reserve_s: float = 0.0) -> float:
    """What a handler may give downstream, for a caller with that timeout."""
    found: list[float] = []

    async def ask(request: bytes, context: Context) -> bytes:
        try:
            found.append(remaining_s(context, cap_s=cap_s, reserve_s=reserve_s))
        except DeadlineExceeded:
            found.append(-1)
        return b""

    async with (
        serving(unary=ask) as server,
        sdk_aio_channel(server.address, insecure=True) as channel,
    ):
        await method(channel, "Unary")(b"", timeout=timeout)
    return found[0]


async def test_without_a_deadline_the_cap_holds() -> None:
    assert await granted(None, cap_s=7) == 7


async def test_the_callers_deadline_is_passed_on_less_what_we_need() -> None:
    assert await granted(20, cap_s=60, reserve_s=5) == pytest.approx(15, abs=1)


async def test_a_cap_below_the_deadline_holds() -> None:
    assert await granted(20, cap_s=3) == 3


async def test_no_time_left_is_deadline_exceeded() -> None:
    assert await granted(5, cap_s=60, reserve_s=10) == -1
