"""Whatever is asked of the running stack, the answer is a typed error, and it serves on."""

import math
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from services.stack.plan import MODEL
from tests.stack_harness import Stack, words
from tidemill.api.router.v1 import router_service_pb2 as pb
from tidemill.client import AsyncClient, MaxCost
from tidemill.errors import (
    FailedPrecondition,
    InvalidRequest,
    NotFound,
    ResourceExhausted,
    TidemillError,
    Unauthenticated,
)
from tidemill.rpc.status import from_rpc_error

pytestmark = [pytest.mark.e2e, pytest.mark.redis]

GENERATE = "/tidemill.api.router.v1.RouterService/Generate"
MEBIBYTE = 1 << 20


@pytest.fixture(autouse=True)
async def serves_on(client: AsyncClient) -> AsyncIterator[None]:
    """After every refusal a good request is answered."""
    yield
    completion = await client.generate("still here?", model=MODEL, max_tokens=3, temperature=0.0)
    assert completion.usage.completion_tokens == 3
    completion.usage.check()


async def refusal(client: AsyncClient, **request: Any) -> TidemillError:
    """What a request is refused with."""
    wanted = {"prompt": "hello", "model": MODEL, "max_tokens": 4, **request}
    if "token_ids" in wanted:
        del wanted["prompt"]
    with pytest.raises(TidemillError) as raised:
        await client.generate(**wanted)
    return raised.value


@pytest.mark.parametrize(
    ("request_fields", "reason", "field"),
    [
        ({"prompt": ""}, "INVALID_REQUEST", "prompt"),
        ({"token_ids": []}, "INVALID_REQUEST", "tokens.token_ids"),
        ({"prompt": words(2500)}, "CONTEXT_EXCEEDED", "input"),
        ({"token_ids": [7] * 8192}, "CONTEXT_EXCEEDED", "input"),
        ({"prompt": "x" * (MEBIBYTE + 1)}, "INVALID_REQUEST", None),
        ({"temperature": math.nan}, "INVALID_REQUEST", "sampling.temperature"),
        ({"temperature": math.inf}, "INVALID_REQUEST", "sampling.temperature"),
        ({"temperature": -0.1}, "INVALID_REQUEST", "sampling.temperature"),
        ({"top_p": -0.5}, "INVALID_REQUEST", "sampling.top_p"),
        ({"top_p": math.nan}, "INVALID_REQUEST", "sampling.top_p"),
        ({"top_p": 0.0}, "INVALID_REQUEST", "sampling.top_p"),
        ({"max_tokens": 0}, "INVALID_REQUEST", "sampling.max_tokens"),
        ({"max_tokens": 10**6}, "INVALID_REQUEST", "sampling.max_tokens"),
        ({"stop": ["x"] * 10_000}, "INVALID_REQUEST", "stop"),
        ({"stop": [""]}, "INVALID_REQUEST", "stop[0]"),
        ({"token_ids": [5, 999_999]}, "INVALID_REQUEST", "tokens.token_ids"),
        ({"stop_token_ids": [999_999]}, "INVALID_REQUEST", "sampling.stop_token_ids"),
        ({"request_id": "no spaces"}, "INVALID_REQUEST", "request_id"),
        ({"max_cost": MaxCost("CNY", 10)}, "INVALID_REQUEST", "max_cost.currency"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_a_request_that_cannot_be_served_names_what_is_wrong(
    client: AsyncClient, request_fields: dict[str, Any], reason: str, field: str | None
) -> None:
    error = await refusal(client, **request_fields)
    assert isinstance(error, InvalidRequest)
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.reason == reason
    assert error.request_id
    assert field is None or any(path.startswith(field) for path, _ in error.violations), (
        error.violations
    )


async def test_an_unknown_model_is_not_found(client: AsyncClient) -> None:
    error = await refusal(client, model="no-such-model")
    assert isinstance(error, NotFound)
    assert error.reason == "MODEL_NOT_FOUND"


async def test_a_request_dearer_than_its_bound_is_not_begun(client: AsyncClient) -> None:
    error = await refusal(client, max_cost=MaxCost("USD", 1))
    assert isinstance(error, FailedPrecondition)
    assert error.reason == "MAX_COST_EXCEEDED"


async def test_a_missing_unknown_or_revoked_key_is_refused(stack: Stack) -> None:
    async with AsyncClient(stack.address, ca=stack.ca) as nobody:
        missing = await refusal(nobody)
    async with stack.client("tm_nosuchkey000.secret") as stranger:
        unknown = await refusal(stranger)
    async with AsyncClient(stack.address, stack.admin_key, stack.ca) as operator:
        await operator.admin.create_tenant("erin")
        made = await operator.admin.create_key("erin")
        await operator.admin.revoke_key(made.key_id)
        operators_own = await refusal(operator)
    async with stack.client(made.key) as late:
        revoked = await refusal(late)
        with pytest.raises(Unauthenticated) as no_admin:
            await late.admin.list_keys()
    errors = [missing, unknown, operators_own, revoked, no_admin.value]
    assert all(isinstance(error, Unauthenticated) for error in errors)
    assert [error.reason for error in errors] == [
        "API_KEY_MISSING",
        "API_KEY_UNKNOWN",
        "ADMIN_KEY_HAS_NO_ACCOUNT",
        "API_KEY_REVOKED",
        "ADMIN_KEY_REQUIRED",
    ]


async def test_a_negative_top_k_cannot_even_be_sent(client: AsyncClient) -> None:
    error = await refusal(client, top_k=-1)
    assert isinstance(error, InvalidRequest)
    assert [path for path, _ in error.violations] == ["sampling.top_k"]


async def call_raw(stack: Stack, body: bytes, *, method: str = GENERATE) -> grpc.aio.AioRpcError:
    """Send bytes as they are, as no SDK would."""
    key = await stack.key_of("alice")
    async with stack.raw() as channel:
        call: Any = channel.unary_stream(method)
        metadata = (("authorization", f"Bearer {key}"),)
        answer = call(body, metadata=metadata, timeout=30)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            async for _ in answer:
                pass
    return raised.value


def good_request() -> pb.GenerateRequest:
    return pb.GenerateRequest(request_id="raw-1", model=MODEL, prompt="PROMPT")


async def test_a_prompt_that_is_not_utf8_is_malformed(stack: Stack) -> None:
    body = good_request().SerializeToString().replace(b"PROMPT", b"PR\xff\xfePT")
    error = from_rpc_error(await call_raw(stack, body))
    assert isinstance(error, InvalidRequest)
    assert error.reason == "MALFORMED_REQUEST"


async def test_bytes_that_are_no_message_are_malformed(stack: Stack) -> None:
    error = from_rpc_error(await call_raw(stack, b"\xff" * 100))
    assert isinstance(error, InvalidRequest)
    assert error.reason == "MALFORMED_REQUEST"


async def test_a_message_over_four_mebibytes_is_refused_by_both_ends(
    stack: Stack, client: AsyncClient
) -> None:
    request = good_request()
    request.prompt = "x" * (4 * MEBIBYTE + 1)
    error = from_rpc_error(await call_raw(stack, request.SerializeToString()))
    assert isinstance(error, ResourceExhausted)
    theirs = await refusal(client, prompt="x" * (4 * MEBIBYTE + 1))
    assert isinstance(theirs, InvalidRequest)


async def test_a_prompt_just_below_the_message_limit_is_refused_by_its_bytes(
    stack: Stack,
) -> None:
    request = good_request()
    request.prompt = "x" * (4 * MEBIBYTE - 100)
    error = from_rpc_error(await call_raw(stack, request.SerializeToString()))
    assert isinstance(error, InvalidRequest)


@pytest.mark.parametrize(
    "method",
    [
        "/tidemill.api.decode.v1.DecodeService/Decode",
        "/tidemill.api.router.v1.RouterService/NoSuchMethod",
    ],
)
async def test_a_method_that_the_router_does_not_have_is_unimplemented(
    stack: Stack, method: str
) -> None:
    error = await call_raw(stack, b"", method=method)
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED
