"""Streams on which nothing happens: what each costs a router, and who is turned away how.

They wait for workers that have no room, or for tokens that do not come, or nobody reads them.
"""

import asyncio
import ssl
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.attacked_router import MB, Victim, attacked, note, open_stream
from tests.mock_worker import MockConfig
from tests.router_harness import MODEL, RouterCaller, bearer
from tidemill.api.router.v1 import router_service_pb2 as router_pb2
from tidemill.errors import Overloaded
from tidemill.rpc.address import split_address
from tidemill.rpc.status import from_rpc_error
from tidemill.rpc.tls import TlsFiles

pytestmark = pytest.mark.redis

KB = 1 << 10
CONNECTION = 250  # streams of each; a connection may have 256
TENANTS = 8
GENERATE = "/tidemill.api.router.v1.RouterService/Generate"


async def fate(call: Any) -> str:
    """What a stream's first word is; all that are turned away are told when to come again."""
    try:
        message = await call.read()
    except grpc.aio.AioRpcError as failed:
        error = from_rpc_error(failed)
        assert isinstance(error, Overloaded), repr(error)
        assert error.retry_after_s
        return error.reason
    return str(message.WhichOneof("event"))


async def flood(
    victim: Victim, keys: list[str], number: int, name: str, *, most_answered: int
) -> Counter[str]:
    """Open so many streams at once, hold what there is to be held, and let it go again."""
    before, begun, cpu_s = victim.resident, time.monotonic(), victim.cpu_s
    async with AsyncExitStack() as stack:
        calls = []
        for connection in range(number // CONNECTION):
            channel = await stack.enter_async_context(victim.channel())
            key = keys[connection % len(keys)]
            calls += [
                open_stream(channel, key, f"{name}-{connection}-{each}", max_tokens=4)
                for each in range(CONNECTION)
            ]
        fates = Counter(await asyncio.gather(*map(fate, calls)))
        await victim.until_running(min(fates["accepted"], most_answered))
        peak, opened_s = victim.resident, time.monotonic() - begun
        others_s = await others_wait(victim)
        for call in calls:
            call.cancel()
    held = fates["accepted"]
    note(
        f"{name} flood of idle streams",
        number=number,
        **{key.lower(): count for key, count in fates.items()},
        opened_s=opened_s,
        cpu_s=victim.cpu_s - cpu_s,
        others_s=others_s,
        grown_mb=(peak - before) / MB,
        kb_each=(peak - before) / max(held, 1) / KB,
    )
    return fates


async def others_wait(victim: Victim) -> float:
    """Seconds until somebody else, who has a connection and places of his own, is answered."""
    begun = time.monotonic()
    async with victim.channel() as channel:
        request = router_pb2.ListModelsRequest()
        metadata = bearer(victim.router.key)
        answer = await RouterCaller(channel).stub.ListModels(request, metadata=metadata)
    assert [model.name for model in answer.models] == [MODEL]
    return time.monotonic() - begun


@pytest.mark.parametrize("answered", [1, 1000])
@pytest.mark.parametrize(
    ("number", "places"),
    [
        (500, 256),
        pytest.param(10_000, 2048, marks=[pytest.mark.slow, pytest.mark.timeout(300)]),
    ],
)
async def test_idle_streams_take_the_places_there_are_and_leave_some_to_others(  # noqa: PLR0917 - fixtures
    number: int,
    places: int,
    answered: int,
    write: Callable[..., Path],
    dev_certs: Path,
    tls_files: Callable[[str], TlsFiles],
) -> None:
    """They wait for a worker with room, or for its tokens; a second flood costs no more."""
    config = MockConfig(worker_id="b", role="both", num_blocks=2 * answered)
    async with attacked(write, dev_certs, tls_files, config, places=places) as victim:
        await victim.mock.change("b", decode_step_s=100.0)
        keys = [await victim.router.make_tenant(f"idle-{each}") for each in range(TENANTS)]
        before = victim.resident
        fates = await flood(victim, keys, number, "first", most_answered=answered)
        grown = victim.resident - before
        assert fates.total() == number
        assert places // 8 < fates["accepted"] <= places
        assert grown < fates["accepted"] * 160 * KB + number * 8 * KB
        await flood(victim, keys, number, "second", most_answered=answered)
        again = victim.resident - before - grown
        note("second flood", grown_mb=again / MB)
        assert again < grown / 2 + 16 * MB
        await victim.mock.change("b", decode_step_s=0.0, num_blocks=1 << 20)
        await victim.serves("after")
        await victim.until_idle()


async def test_who_stops_reading_keeps_his_places_and_nobody_elses(
    write: Callable[..., Path], dev_certs: Path, tls_files: Callable[[str], TlsFiles]
) -> None:
    """gRPC cannot end a stream whose client takes in nothing, so it counts until he goes."""
    config = MockConfig(worker_id="b", role="both", tokens_per_message=8)
    places, num_tokens = 32, 30_000
    async with (
        attacked(write, dev_certs, tls_files, config, slow_reader_s=0.5, places=places) as victim,
        victim.channel() as channel,
    ):
        thief = await victim.router.make_tenant("thief")
        calls = [
            open_stream(channel, thief, f"stopped-{each}", max_tokens=num_tokens)
            for each in range(places)
        ]
        firsts = Counter(await asyncio.gather(*map(fate, calls)))
        assert firsts == {"accepted": places // 2, "OVERLOADED": places // 2}
        await victim.until_idle()  # all are let go and billed
        late = open_stream(channel, thief, "one-more", max_tokens=4)
        assert await fate(late) == "OVERLOADED"
        heard = await victim.ask("honest")
        assert heard.completed.usage.completion_tokens == 4
        for call in calls:
            call.cancel()
        async with asyncio.timeout(10):
            again = "OVERLOADED"
            while again == "OVERLOADED":
                again = await fate(open_stream(channel, thief, "again", max_tokens=4))
        assert again == "accepted"


async def test_calls_without_a_request_and_connections_without_a_call_cost_little(
    write: Callable[..., Path], dev_certs: Path, tls_files: Callable[[str], TlsFiles]
) -> None:
    number = 200
    config = MockConfig(worker_id="b", role="both")
    async with attacked(write, dev_certs, tls_files, config) as victim, AsyncExitStack() as stack:
        before = victim.resident
        host, port = split_address(victim.address)
        context = ssl.create_default_context(cafile=str(victim.ca))
        context.set_alpn_protocols(["h2"])
        for _ in range(number):
            _, writer = await asyncio.open_connection(host, port, ssl=context)
            stack.callback(writer.close)
        connected = victim.resident - before
        channel = await stack.enter_async_context(victim.channel())
        open_call: Any = channel.stream_stream(GENERATE)
        calls = [open_call(metadata=bearer(victim.router.key)) for _ in range(number)]
        await asyncio.gather(*(call.wait_for_connection() for call in calls))
        heard = await victim.ask("honest")
        called = victim.resident - before - connected
        note(
            "nothing said",
            number=number,
            kb_each_connection=connected / number / KB,
            kb_each_call=called / number / KB,
        )
        assert heard.completed.usage.completion_tokens == 4
        assert connected < number * 256 * KB
        assert called < number * 128 * KB
        for call in calls:
            call.cancel()
