import grpc
import pytest

from tests.unit.rpc.serving import SERVICE, method, serving
from tidemill.errors import ConfigError, Unavailable
from tidemill.rpc.address import is_loopback, split_address
from tidemill.rpc.channel import sdk_aio_channel, sdk_channel
from tidemill.rpc.options import SDK_CLIENT

Context = grpc.aio.ServicerContext[bytes, bytes]


@pytest.mark.parametrize("make", [sdk_channel, sdk_aio_channel])
async def test_a_key_never_leaves_the_machine_in_plaintext(make: type) -> None:
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1:443 without TLS"):
        make("192.0.2.1:443", insecure=True)


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("127.0.0.1:1", True),
        ("127.8.9.1:1", True),
        ("[::1]:1", True),
        ("localhost:1", True),
        ("unix:/run/x.sock", True),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("10.0.0.1:1", False),
        ("localhost.example.com:1", False),
    ],
)
def test_loopback_is_told_from_the_rest(address: str, loopback: bool) -> None:
    assert is_loopback(address) is loopback


@pytest.mark.parametrize("address", ["", "host", ":1", "host:", "host:x", "host:-1", "h:65536"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="is not host:port"):
        split_address(address)


def test_an_address_is_split_into_host_and_port() -> None:
    assert split_address("[::1]:80") == ("::1", 80)
    assert split_address("router:0") == ("router", 0)


def retrying(options: tuple[tuple[str, str | int], ...]) -> tuple[tuple[str, str | int], ...]:
    """The same options, for the test's service instead of the router's."""
    router = "tidemill.api.router.v1.RouterService"
    return tuple(
        (name, value.replace(router, SERVICE) if isinstance(value, str) else value)
        for name, value in options
    )


async def test_a_call_that_was_refused_before_headers_is_retried_by_grpc() -> None:
    attempts = 0

    async def flaky(request: bytes, context: Context) -> bytes:
        nonlocal attempts
        attempts += 1
        if attempts < 3:
            raise Unavailable("not yet")
        return request

    async with (
        serving(unary=flaky) as server,
        sdk_aio_channel(server.address, insecure=True, options=retrying(SDK_CLIENT)) as channel,
    ):
        assert await method(channel, "Unary")(b"x", timeout=30) == b"x"
    assert attempts == 3


async def test_a_call_is_not_retried_once_headers_were_sent() -> None:
    attempts = 0

    async def late(request: bytes, context: Context) -> bytes:
        nonlocal attempts
        attempts += 1
        await context.send_initial_metadata(())
        raise Unavailable("too late")

    async with (
        serving(unary=late) as server,
        sdk_aio_channel(server.address, insecure=True, options=retrying(SDK_CLIENT)) as channel,
    ):
        with pytest.raises(grpc.aio.AioRpcError):
            await method(channel, "Unary")(b"x", timeout=30)
    assert attempts == 1
