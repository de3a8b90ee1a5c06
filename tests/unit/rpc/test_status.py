import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest
from google.rpc import error_details_pb2
from google.rpc.status_pb2 import Status

from tests.unit.rpc.serving import method, serving
from tidemill import errors
from tidemill.rpc.channel import sdk_aio_channel
from tidemill.rpc.status import from_rpc_error, from_status, to_status


def wire_classes(base: type[errors.TidemillError]) -> list[type[errors.TidemillError]]:
    found = [cls for cls in base.__subclasses__() if cls is not errors.LocalError]
    return found + [deeper for cls in found for deeper in wire_classes(cls)]


@pytest.mark.parametrize("cls", wire_classes(errors.TidemillError))
def test_every_class_survives_the_wire(cls: type[errors.TidemillError]) -> None:
    sent = cls("it broke", metadata={"model": "m"}, request_id="r-1", retry_after_s=1.5)
    read = from_status(Status.FromString(to_status(sent).SerializeToString()))
    assert type(read) is cls
    assert read.message == "it broke"
    assert (read.reason, read.metadata) == (cls.reason, {"model": "m"})
    assert (read.request_id, read.retry_after_s) == ("r-1", 1.5)


def test_field_violations_and_quotas_survive_the_wire() -> None:
    invalid = errors.InvalidRequest("bad", violations=[("sampling.top_p", "must be at most 1")])
    read = from_status(to_status(invalid))
    assert isinstance(read, errors.InvalidRequest)
    assert read.violations == [("sampling.top_p", "must be at most 1")]
    limited = errors.LimitExceeded("slow down", quotas=[("tenant:a", "60 requests a minute")])
    read = from_status(to_status(limited))
    assert isinstance(read, errors.LimitExceeded)
    assert read.quotas == [("tenant:a", "60 requests a minute")]


def test_own_reason_of_one_error_survives_the_wire() -> None:
    read = from_status(to_status(errors.NotFound("gone", reason="KEY_NOT_FOUND")))
    assert type(read) is errors.NotFound
    assert read.reason == "KEY_NOT_FOUND"


def test_details_use_the_standard_messages() -> None:
    status = to_status(errors.QueueFull("full", retry_after_s=2))
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    assert status.details[0].Unpack(info)
    assert status.details[1].Unpack(retry)
    assert (info.reason, info.domain) == ("QUEUE_FULL", "tidemill")
    assert retry.retry_delay.seconds == 2


def test_a_huge_error_still_fits_in_trailers() -> None:
    error = errors.InvalidRequest(
        "x" * 100_000,
        metadata={f"key{i}": "v" * 10_000 for i in range(3)},
        violations=[(f"stop[{i}]", "d" * 100) for i in range(10_000)],
    )
    assert len(to_status(error).SerializeToString()) < 8192


def test_a_foreign_domain_gives_no_reason() -> None:
    status = Status(code=grpc.StatusCode.UNAVAILABLE.value[0], message="down")
    info = error_details_pb2.ErrorInfo(reason="WORKER_LOST", domain="example.com")
    status.details.add().Pack(info)
    read = from_status(status)
    assert type(read) is errors.Unavailable
    assert read.reason == "UNAVAILABLE"


def test_codes_outside_the_tree_become_internal_and_keep_their_name() -> None:
    read = from_status(Status(code=grpc.StatusCode.UNIMPLEMENTED.value[0], message=""))
    assert type(read) is errors.Internal
    assert (read.reason, read.message) == ("UNIMPLEMENTED", "UNIMPLEMENTED")


async def failing_call(address: str, stack: str) -> grpc.RpcError:
    """The exception that a call of Unary raises, on either stack."""
    if stack == "aio":
        async with sdk_aio_channel(address, insecure=True) as channel:
            with pytest.raises(grpc.RpcError) as caught:
                await method(channel, "Unary")(b"", timeout=30)
            return caught.value
    return await asyncio.to_thread(failing_sync_call, address)


def failing_sync_call(address: str) -> grpc.RpcError:
    with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as caught:
        method(channel, "Unary")(b"", timeout=30)
    return caught.value


@pytest.mark.parametrize("stack", ["sync", "aio"])
async def test_a_failed_call_gives_back_what_the_handler_raised(stack: str) -> None:
    async def refuse(request: bytes, context: object) -> bytes:
        raise errors.PrefillFull("no room", retry_after_s=0.25, metadata={"worker": "p0"})

    async with serving(unary=refuse) as server:
        read = from_rpc_error(await failing_call(server.address, stack))
    assert type(read) is errors.PrefillFull
    assert (read.retry_after_s, read.metadata) == (0.25, {"worker": "p0"})


@pytest.mark.parametrize("stack", ["sync", "aio"])
async def test_nobody_listening_is_unavailable(stack: str, unused_address: str) -> None:
    read = from_rpc_error(await failing_call(unused_address, stack))
    assert type(read) is errors.Unavailable


async def test_a_deadline_that_ran_out_here_is_deadline_exceeded() -> None:
    async def hang(request: bytes, context: object) -> AsyncIterator[bytes]:
        await asyncio.sleep(60)
        yield b""

    async with (
        serving(stream=hang) as server,
        sdk_aio_channel(server.address, insecure=True) as channel,
    ):
        with pytest.raises(grpc.RpcError) as caught:
            await method(channel, "Stream")(b"", timeout=0.1).read()
    assert type(from_rpc_error(caught.value)) is errors.DeadlineExceeded


async def test_unreadable_details_leave_the_code_and_the_text() -> None:
    async def mangle(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        trailers = (("grpc-status-details-bin", b"\xff\xff\xff"),)
        await context.abort(grpc.StatusCode.NOT_FOUND, "no such thing", trailers)

    async with serving(unary=mangle) as server:
        read = from_rpc_error(await failing_call(server.address, "aio"))
    assert type(read) is errors.NotFound
    assert read.message == "no such thing"


def test_an_rpc_error_without_a_code_is_internal() -> None:
    assert type(from_rpc_error(grpc.RpcError("odd"))) is errors.Internal
