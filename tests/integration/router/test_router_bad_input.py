"""Bad input: the right code and reason, and a router that lives on."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.redis_process import RedisProcess
from tests.router_harness import (
    MODEL,
    RouterHarness,
    bearer,
    router_config,
    running_router,
    scripted,
)
from tests.scripted_worker import ScriptedWorker, answer
from tidemill.api.common.v1 import sampling_pb2
from tidemill.api.router.v1 import router_service_pb2 as router_pb2
from tidemill.errors import InvalidRequest, QueueFull
from tidemill.rpc.status import from_rpc_error
from tidemill.rpc.tls import TlsFiles

pytestmark = pytest.mark.redis

INVALID = grpc.StatusCode.INVALID_ARGUMENT
GENERATE = "/tidemill.api.router.v1.RouterService/Generate"


def ask(request_id: str = "r1", **fields: Any) -> router_pb2.GenerateRequest:
    given = {"model": MODEL, **fields}
    if not given.keys() & {"prompt", "chat", "tokens"}:
        given["prompt"] = "hello"
    return router_pb2.GenerateRequest(request_id=request_id, **given)


def sampled(**fields: Any) -> router_pb2.GenerateRequest:
    return ask(sampling=sampling_pb2.Sampling(**fields))


def chat(*contents: str) -> router_pb2.GenerateRequest:
    messages = [
        router_pb2.ChatMessage(role=router_pb2.CHAT_ROLE_USER, content=content)
        for content in contents
    ]
    return ask(chat=router_pb2.ChatInput(messages=messages))


BAD_REQUESTS = {
    "no input": (router_pb2.GenerateRequest(request_id="r1", model=MODEL), "input"),
    "empty prompt": (ask(prompt=""), "prompt"),
    "empty chat": (chat(), "chat.messages"),
    "empty chat message": (chat(""), "messages"),
    "no token ids": (ask(tokens=router_pb2.TokenInput()), "tokens.token_ids"),
    "unknown token ids": (ask(tokens=router_pb2.TokenInput(token_ids=[5, 9999])), "tokens"),
    "over the context": (ask(prompt="x" * 1024), "input"),
    "over the byte cap": (ask(prompt="x" * 2_000_000), "prompt"),
    "no request id": (ask(""), "request_id"),
    "a long request id": (ask("r" * 65), "request_id"),
    "a strange request id": (ask("r 1\n"), "request_id"),
    "no model": (ask(model=""), "model"),
    "NaN temperature": (sampled(temperature=float("nan")), "sampling.temperature"),
    "infinite temperature": (sampled(temperature=float("inf")), "sampling.temperature"),
    "negative temperature": (sampled(temperature=-0.1), "sampling.temperature"),
    "zero top_p": (sampled(top_p=0), "sampling.top_p"),
    "top_p over one": (sampled(top_p=1.5), "sampling.top_p"),
    "huge top_k": (sampled(top_k=1 << 31), "sampling.top_k"),
    "no tokens wanted": (sampled(max_tokens=0), "sampling.max_tokens"),
    "too many tokens wanted": (sampled(max_tokens=40_000), "sampling.max_tokens"),
    "an unknown stop token": (sampled(stop_token_ids=[7777]), "sampling.stop_token_ids"),
    "too many stop tokens": (sampled(stop_token_ids=range(65)), "sampling.stop_token_ids"),
    "min_p over one": (sampled(min_p=1.5), "sampling.min_p"),
    "no repetition penalty": (sampled(repetition_penalty=0), "sampling.repetition_penalty"),
    "NaN repetition penalty": (
        sampled(repetition_penalty=float("nan")),
        "sampling.repetition_penalty",
    ),
    "a huge presence penalty": (sampled(presence_penalty=2.5), "sampling.presence_penalty"),
    "a huge frequency penalty": (sampled(frequency_penalty=-9), "sampling.frequency_penalty"),
    "a biased token that is none": (sampled(logit_bias={9999: 1.0}), "sampling.logit_bias"),
    "a huge bias": (sampled(logit_bias={5: 101.0}), "sampling.logit_bias"),
    "too many biases": (
        sampled(logit_bias=dict.fromkeys(range(1025), 1.0)),
        "sampling.logit_bias",
    ),
    "too many alternatives": (sampled(logprobs=21), "sampling.logprobs"),
    "too many prompt alternatives": (sampled(prompt_logprobs=21), "sampling.prompt_logprobs"),
    "more tokens at least than at most": (
        sampled(min_tokens=9, max_tokens=8),
        "sampling.min_tokens",
    ),
    "more tokens at least than the context leaves": (
        ask(prompt="x" * 1000, sampling=sampling_pb2.Sampling(min_tokens=30)),
        "sampling.min_tokens",
    ),
    "no choices": (sampled(n=0), "sampling.n"),
    "too many choices": (sampled(n=17), "sampling.n"),
    "10,000 stop strings": (ask(stop=["s"] * 10_000), "stop"),
    "an empty stop string": (ask(stop=["ok", ""]), "stop[1]"),
    "a long stop string": (ask(stop=["s" * 257]), "stop[0]"),
    "another currency": (
        ask(max_cost=router_pb2.MaxCost(currency="CNY", nano=10**12)),
        "max_cost.currency",
    ),
    "no time": (ask(first_token_timeout_ms=0), "first_token_timeout_ms"),
    "too much time": (ask(total_timeout_ms=7_200_001), "total_timeout_ms"),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
async def test_a_bad_request_names_its_field(router: RouterHarness, name: str) -> None:
    request, field = BAD_REQUESTS[name]
    heard = await router.generate(request)
    assert heard.messages == []
    assert isinstance(heard.error, InvalidRequest)
    assert heard.error.reason in {"INVALID_REQUEST", "CONTEXT_EXCEEDED"}
    assert any(path.startswith(field) for path, _ in heard.error.violations)
    await lives_on(router)


async def lives_on(router: RouterHarness) -> None:
    heard = await router.generate(ask("after"))
    assert heard.error is None


async def test_an_unknown_model_is_not_found(router: RouterHarness) -> None:
    heard = await router.generate(ask(model="gpt-17"))
    assert heard.error is not None
    assert (heard.error.code, heard.error.reason) == (
        grpc.StatusCode.NOT_FOUND,
        "MODEL_NOT_FOUND",
    )
    assert heard.error.metadata["models"] == MODEL
    assert heard.error.request_id == "r1"
    await lives_on(router)


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xff\xff\xff",
        b"\x0a\x02r1\x12\x04tiny\x22\x02\xff\xfe",
        b"\x0a\xff\xff\xff\xff\x0f",
    ],
    ids=["garbage", "prompt that is not UTF-8", "length beyond the end"],
)
async def test_bytes_that_are_no_message_are_malformed(router: RouterHarness, data: bytes) -> None:
    generate: Any = router.channel.unary_stream(GENERATE)
    call = generate(data, metadata=bearer(router.key))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    error = from_rpc_error(caught.value)
    assert (error.code, error.reason) == (INVALID, "MALFORMED_REQUEST")
    await lives_on(router)


async def test_a_message_over_four_mebibytes_is_refused(router: RouterHarness) -> None:
    big = "x" * ((4 << 20) + 1)
    metadata = bearer(router.key)
    channel = grpc.aio.insecure_channel(
        router.process.server.address, options=[("grpc.max_send_message_length", -1)]
    )
    async with channel:
        generate: Any = channel.unary_stream(GENERATE)
        call = generate(ask(prompt=big).SerializeToString(), metadata=metadata)
        assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await lives_on(router)


async def test_metadata_beyond_its_limit_is_refused(router: RouterHarness) -> None:
    metadata = (*bearer(router.key), ("x-much", "y" * 100_000))
    call = router.stub.Generate(ask(), metadata=metadata)
    assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await lives_on(router)


async def test_max_cost_must_pay_for_the_prompt_and_a_token_of_every_choice(
    router: RouterHarness,
) -> None:
    def limited(nano: int, request_id: str, n: int = 1) -> router_pb2.GenerateRequest:
        cost = router_pb2.MaxCost(currency="USD", nano=nano)
        return ask(request_id, max_cost=cost, sampling=sampling_pb2.Sampling(max_tokens=10, n=n))

    least = []
    for n in (1, 2, 4):
        heard = await router.generate(limited(1, f"refused-{n}", n))
        assert heard.error is not None
        assert (heard.error.code, heard.error.reason) == (
            grpc.StatusCode.FAILED_PRECONDITION,
            "MAX_COST_EXCEEDED",
        )
        least.append(int(heard.error.metadata["least_nano"]))
    one, two, four = least
    assert abs((four - two) - 2 * (two - one)) <= 2  # rounded up to whole nano-units
    assert two > one
    assert (await router.generate(limited(one - 1, "r2"))).error is not None
    paid = await router.generate(limited(one, "r3"))
    assert paid.completed.receipt.amount_nano <= one


async def test_cancel_generation_is_validated_too(router: RouterHarness) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await router.cancel("not an id")
    assert from_rpc_error(caught.value).code is INVALID


class TestFullQueue:
    @pytest.fixture
    async def router(
        self,
        model_dir: Path,
        ledger: RedisProcess,
        tls_files: Callable[[str], TlsFiles],
        decode: ScriptedWorker,
    ) -> AsyncIterator[RouterHarness]:
        decode.free_blocks = 0
        workers = [ScriptedWorker("prefill-0", "prefill"), decode]
        async with scripted(workers, tls_files) as endpoints:
            config = router_config(
                model_dir, ledger, endpoints, tls_files("router"), queue_requests=3
            )
            async with running_router(config) as harness:
                yield harness

    async def test_a_full_queue_says_so_before_any_header(
        self, router: RouterHarness, decode: ScriptedWorker
    ) -> None:
        decode.scripts = [answer([50, 51])]
        calls = [router.call(ask(f"r{number}")) for number in range(2)]
        for call in calls:
            await call.read()
        heard = await router.generate(ask("r2"))
        assert isinstance(heard.error, QueueFull)
        assert heard.error.retry_after_s is not None
        assert heard.messages == []
        unread = ask("r3", tokens=router_pb2.TokenInput(token_ids=[10**6]))  # no such token
        assert isinstance((await router.generate(unread)).error, QueueFull)
        for number in range(2):
            assert await router.cancel(f"r{number}")
        for call in calls:
            await call.read()
        decode.free_blocks = 100
        assert (await router.generate(ask("r2"))).error is None
