"""Client and AsyncClient against a router on a real port: one suite for both."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar

import pytest

from tests.scripted_router import (
    REUSE,
    ScriptedRouter,
    after_waiting,
    answer,
    break_after,
    choices,
    refuse,
    scripted_admin,
    serve,
    silence,
    skip_a_chunk,
    until_cancelled,
)
from tidemill import errors
from tidemill.client import (
    Accepted,
    AsyncClient,
    Client,
    Completed,
    Completion,
    Event,
    FinishReason,
    Message,
    Queued,
    RetryPolicy,
    Stream,
    TextChunk,
    TokenLogprobs,
)
from tidemill.client.generation import Progress

T = TypeVar("T")
QUICK = RetryPolicy(initial_s=0.01, cap_s=0.02)
PATIENT = RetryPolicy(initial_s=0.4)


class Face(Protocol):
    """Either client, seen by these tests."""

    async def call(self, act: Callable[[Any], Any]) -> Any:
        """act(client), awaited where that is needed."""

    async def stream(self, *, cancel_at: int | None = None) -> tuple[list[Event], Progress]:
        """All events of one streamed answer; cancelled on the event with that index."""


class SyncFace:
    def __init__(self, client: Client) -> None:
        self.client = client

    async def call(self, act: Callable[[Any], Any]) -> Any:
        return await asyncio.to_thread(act, self.client)

    async def stream(self, *, cancel_at: int | None = None) -> tuple[list[Event], Progress]:
        def read() -> tuple[list[Event], Stream]:
            events = []
            with self.client.generate("p", model="demo", stream=True) as stream:
                for event in stream:
                    events.append(event)
                    if len(events) - 1 == cancel_at:
                        assert stream.cancel()
            return events, stream

        return await asyncio.to_thread(read)


class AioFace:
    def __init__(self, client: AsyncClient) -> None:
        self.client = client

    async def call(self, act: Callable[[Any], Awaitable[T]]) -> T:
        return await act(self.client)

    async def stream(self, *, cancel_at: int | None = None) -> tuple[list[Event], Progress]:
        events = []
        async with await self.client.generate("p", model="demo", stream=True) as stream:
            async for event in stream:
                events.append(event)
                if len(events) - 1 == cancel_at:
                    assert await stream.cancel()
        return events, stream


@pytest.fixture(params=["sync", "aio"])
def face_of(request: pytest.FixtureRequest) -> Callable[..., Face]:
    def make(address: str, retry: RetryPolicy = QUICK) -> Face:
        if request.param == "sync":
            return SyncFace(Client(address, api_key="tm_key.secret", retry=retry))
        return AioFace(AsyncClient(address, api_key="tm_key.secret", retry=retry))

    return make


FaceOf = Callable[..., Face]


async def test_the_expected_wait_is_told_where_the_router_knows_it(face_of: FaceOf) -> None:
    async with serve(ScriptedRouter([after_waiting((3, None), (2, 1.25), (0, 0.0))])) as address:
        events, _ = await face_of(address).stream()
    accepted, *queued = events[:3]
    assert isinstance(accepted, Accepted)
    assert (accepted.position, accepted.expected_wait_s) == (3, None)
    assert queued == [
        Queued(position=2, expected_wait_s=1.25),
        Queued(position=0, expected_wait_s=0),
    ]


async def test_a_completion_is_the_whole_answer_with_a_bill_that_verifies(face_of: FaceOf) -> None:
    router = ScriptedRouter([answer("Tide ", "mills ", "grind.")])
    async with serve(router) as address:
        completion: Completion = await face_of(address).call(
            lambda client: client.chat("What?", model="demo", max_tokens=8)
        )
    assert completion.text == "Tide mills grind."
    assert completion.token_ids == (100, 101, 102)
    assert completion.finish_reason is FinishReason.STOP
    assert completion.usage.reuse == REUSE
    assert completion.usage.cache_hit_tokens == 128
    completion.usage.check()
    assert completion.receipt is not None
    completion.receipt.verify(router.book)
    assert completion.timing.total_s == pytest.approx(0.05)
    assert completion.request_id == router.requests[0].request_id
    assert router.metadata[0]["authorization"] == "Bearer tm_key.secret"


async def test_a_stream_yields_typed_events_in_order(face_of: FaceOf) -> None:
    async with serve(ScriptedRouter([answer("a", "b")])) as address:
        events, stream = await face_of(address).stream()
    assert [type(event) for event in events] == [
        Accepted,
        Queued,
        TextChunk,
        TextChunk,
        Completed,
    ]
    assert stream.text == "ab"
    assert stream.completed is events[-1]
    assert stream.accepted is events[0]
    assert stream.ttft_s is not None
    assert stream.ttft_s > 0


async def test_a_stream_left_at_its_last_event_still_gives_the_completion(face_of: FaceOf) -> None:
    def leave(client: Client) -> Completion:
        with client.generate("p", model="demo", stream=True) as stream:
            while stream.completed is None:
                next(stream)
        return stream.completion()

    async def leave_aio(client: AsyncClient) -> Completion:
        async with await client.generate("p", model="demo", stream=True) as stream:
            while stream.completed is None:
                await anext(stream)
        return await stream.completion()

    async with serve(ScriptedRouter([answer("a", "b")])) as address:
        face = face_of(address)
        completion = await face.call(leave if isinstance(face, SyncFace) else leave_aio)
    assert completion.text == "ab"


async def test_choices_come_apart_with_their_ends_and_log_probabilities(face_of: FaceOf) -> None:
    async with serve(ScriptedRouter([choices("ab", "c")])) as address:
        face = face_of(address)
        completion = await face.call(
            lambda client: client.generate("p", model="demo", n=2, logprobs=2, prompt_logprobs=2)
        )
    first, second = completion.choices
    assert (first.text, first.token_ids, first.finish_reason) == ("ab", (100, 101), "length")
    assert (second.text, second.token_ids, second.finish_reason) == ("c", (100,), "stop")
    assert (completion.text, completion.token_ids) == ("ab", (100, 101))
    assert completion.finish_reason is FinishReason.LENGTH
    assert completion.logprobs == first.logprobs
    assert first.logprobs[1] == TokenLogprobs(101, -101.0, ((1, -0.5), (2, -1.5)))
    assert [scored.token_id for scored in completion.prompt_logprobs] == [1, 2, 3, 4]
    assert completion.usage.completion_tokens == 3


async def test_a_choice_that_was_not_asked_for_is_an_error(face_of: FaceOf) -> None:
    async with serve(ScriptedRouter([choices("ab", "c")])) as address:
        face = face_of(address)
        with pytest.raises(errors.Internal) as raised:
            await face.call(lambda client: client.generate("p", model="demo"))
    assert raised.value.reason == "SEQUENCE_GAP"


async def test_cancel_ends_the_stream_with_its_bill(face_of: FaceOf) -> None:
    async with serve(ScriptedRouter([until_cancelled()])) as address:
        events, stream = await face_of(address).stream(cancel_at=3)
    assert isinstance(events[-1], Completed)
    assert events[-1].finish_reason is FinishReason.CANCELLED
    assert events[-1].usage.completion_tokens == len(stream.token_ids)
    events[-1].usage.check()


async def test_leaving_a_stream_early_ends_the_call_on_the_server(face_of: FaceOf) -> None:
    router = ScriptedRouter([until_cancelled()])
    async with serve(router) as address:
        face = face_of(address)

        def leave(client: Client) -> None:
            with client.generate("p", model="demo", stream=True):
                return

        async def leave_aio(client: AsyncClient) -> None:
            async with await client.generate("p", model="demo", stream=True):
                return

        await face.call(leave if isinstance(face, SyncFace) else leave_aio)
        await asyncio.wait_for(router.gone.wait(), 5)


@pytest.mark.parametrize(
    "error",
    [
        errors.Unavailable("restarting"),
        errors.LedgerUnavailable("no ledger", retry_after_s=0.01),
        errors.QueueFull("full", retry_after_s=0.01),
        errors.LimitExceeded("60 a minute", retry_after_s=0.01),
    ],
    ids=lambda error: error.reason,
)
async def test_a_passing_refusal_is_retried_with_the_same_body(
    face_of: FaceOf, error: errors.TidemillError
) -> None:
    router = ScriptedRouter([refuse(error), refuse(error), answer("ok")])
    async with serve(router) as address:
        completion = await face_of(address).call(
            lambda client: client.generate("p", model="demo", temperature=0.0)
        )
    assert completion.text == "ok"
    assert len(router.requests) == 3
    assert router.requests[0] == router.requests[1] == router.requests[2]


async def test_retrying_stops_after_two(face_of: FaceOf) -> None:
    router = ScriptedRouter([refuse(errors.QueueFull("full", retry_after_s=0.01))])
    async with serve(router) as address:
        with pytest.raises(errors.QueueFull) as raised:
            await face_of(address).call(lambda client: client.generate("p", model="demo"))
    assert len(router.requests) == 3
    assert raised.value.request_id == router.requests[0].request_id


@pytest.mark.parametrize(
    "error",
    [
        errors.InvalidRequest("no", violations=[("sampling.top_p", "must be in (0, 1]")]),
        errors.Unauthenticated("who?"),
        errors.ModelNotFound("no such model"),
        errors.InsufficientBalance("0.01 USD left"),
        errors.LimitExceeded("100 at once", quotas=[("acme", "requests")]),
        errors.RequestInProgress("served elsewhere", retry_after_s=0.01),
        errors.Internal("a surprise", error_id="e-1"),
    ],
    ids=lambda error: error.reason,
)
async def test_other_refusals_are_raised_at_once_as_what_they_are(
    face_of: FaceOf, error: errors.TidemillError
) -> None:
    router = ScriptedRouter([refuse(error)])
    async with serve(router) as address:
        with pytest.raises(type(error)) as raised:
            await face_of(address).call(
                lambda client: client.generate("p", model="demo", request_id="r-1")
            )
    assert len(router.requests) == 1
    assert type(raised.value) is type(error)
    assert raised.value.reason == error.reason
    assert str(raised.value) == str(error)
    assert raised.value.request_id == "r-1"
    if isinstance(error, errors.InvalidRequest):
        assert isinstance(raised.value, errors.InvalidRequest)
        assert raised.value.violations == error.violations


async def test_a_retry_waits_for_its_predecessor(face_of: FaceOf) -> None:
    in_progress = refuse(errors.RequestInProgress("served elsewhere", retry_after_s=0.01))
    router = ScriptedRouter([refuse(errors.Unavailable("gone")), *[in_progress] * 4, answer("ok")])
    async with serve(router) as address:
        completion = await face_of(address).call(lambda client: client.generate("p", model="demo"))
    assert completion.text == "ok"
    assert len({request.request_id for request in router.requests}) == 1


@pytest.mark.parametrize("messages", [1, 3])
async def test_an_accepted_request_is_never_sent_again(face_of: FaceOf, messages: int) -> None:
    router = ScriptedRouter([break_after(messages, errors.WorkerLost("decode-0")), answer("no")])
    async with serve(router) as address:
        with pytest.raises(errors.WorkerLost) as raised:
            await face_of(address).call(lambda client: client.generate("p", model="demo"))
    assert len(router.requests) == 1
    assert raised.value.request_id == router.requests[0].request_id


async def test_a_lost_chunk_is_an_error(face_of: FaceOf) -> None:
    async with serve(ScriptedRouter([skip_a_chunk()])) as address:
        with pytest.raises(errors.Internal) as raised:
            await face_of(address).stream()
    assert raised.value.reason == "SEQUENCE_GAP"
    assert raised.value.request_id


async def test_a_stream_without_its_end_is_an_error(face_of: FaceOf) -> None:
    async with serve(ScriptedRouter([break_after(3, None)])) as address:
        with pytest.raises(errors.Internal) as raised:
            await face_of(address).stream()
    assert raised.value.reason == "STREAM_TRUNCATED"


async def test_the_timeout_reaches_the_router_and_holds_here(face_of: FaceOf) -> None:
    router = ScriptedRouter([silence()])
    async with serve(router) as address:
        with pytest.raises(errors.DeadlineExceeded) as raised:
            await face_of(address).call(
                lambda client: client.generate("p", model="demo", timeout=0.2)
            )
    assert router.requests[0].total_timeout_ms == 200
    assert raised.value.request_id == router.requests[0].request_id


async def test_no_retry_is_begun_that_would_end_after_the_deadline(face_of: FaceOf) -> None:
    router = ScriptedRouter([refuse(errors.QueueFull("full", retry_after_s=30.0))])
    async with serve(router) as address:
        with pytest.raises(errors.QueueFull):
            await face_of(address).call(
                lambda client: client.generate("p", model="demo", timeout=5.0)
            )
    assert len(router.requests) == 1


async def test_nobody_listening_is_unavailable(
    face_of: FaceOf, free_port: Callable[[], int]
) -> None:
    with pytest.raises(errors.Unavailable) as raised:
        await face_of(f"127.0.0.1:{free_port()}").call(
            lambda client: client.generate("p", model="demo", request_id="r-2")
        )
    assert raised.value.request_id == "r-2"


async def test_a_router_that_comes_late_is_found_by_a_retry(
    face_of: FaceOf, free_port: Callable[[], int]
) -> None:
    port = free_port()
    call = asyncio.create_task(
        face_of(f"127.0.0.1:{port}", PATIENT).call(
            lambda client: client.generate("p", model="demo")
        )
    )
    await asyncio.sleep(0.1)
    async with serve(ScriptedRouter([answer("ok")]), port=port):
        assert (await call).text == "ok"


async def test_models_and_keys_are_plain_values(face_of: FaceOf) -> None:
    async with serve(ScriptedRouter([answer("ok")]), scripted_admin()) as address:
        face = face_of(address)
        models = await face.call(lambda client: client.models())
        assert await face.call(lambda client: client.admin.create_tenant("mill", currency="CNY"))
        assert not await face.call(lambda client: client.admin.create_tenant("mill"))
        made = [
            await face.call(lambda client: client.admin.create_key("acme", label="ci"))
            for _ in range(5)
        ]
        assert await face.call(lambda client: client.admin.revoke_key("key3"))
        keys = await face.call(lambda client: client.admin.list_keys())
    assert [model.name for model in models] == ["demo"]
    assert models[0].prices.miss == 270_000
    assert models[0].window_ends_at_ms is None
    assert made[0].key == "tm_key0.secret"
    assert "secret" not in repr(made[0])
    assert [key.key_id for key in keys] == [f"key{index}" for index in range(5)]
    assert [key.revoked for key in keys] == [False, False, False, True, False]


async def test_what_is_asked_reaches_the_router_field_by_field(face_of: FaceOf) -> None:
    router = ScriptedRouter([answer("ok")])
    async with serve(router) as address:
        await face_of(address).call(
            lambda client: client.chat(
                [Message("system", "be brief"), {"role": "user", "content": "hi"}],
                model="demo",
                max_tokens=5,
                temperature=0.0,
                top_p=0.5,
                top_k=3,
                seed=2**64 - 1,
                stop="END",
                stop_token_ids=[7],
                first_token_timeout=1.5,
            )
        )
    (request,) = router.requests
    assert [message.content for message in request.chat.messages] == ["be brief", "hi"]
    assert request.sampling.HasField("temperature")
    assert request.sampling.temperature == 0.0
    assert request.sampling.seed == 2**64 - 1
    assert list(request.stop) == ["END"]
    assert list(request.sampling.stop_token_ids) == [7]
    assert request.first_token_timeout_ms == 1500
