"""One request is one trace, from the caller's span to the prefill worker's."""

import json
from typing import TYPE_CHECKING, cast

import pytest

from services.stack.plan import MODEL
from tests.otlp_collector import Collector, Span
from tests.stack_harness import Stack, eventually, words
from tidemill.api.common.v1 import sampling_pb2
from tidemill.api.router.v1 import router_service_pb2 as pb
from tidemill.api.router.v1.router_service_pb2_grpc import RouterServiceStub

if TYPE_CHECKING:  # the name exists in the stubs alone
    from tidemill.api.router.v1.router_service_pb2_grpc import RouterServiceAsyncStub

pytestmark = [pytest.mark.e2e, pytest.mark.redis]

TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
NAMES = ("router", "decode", "prefill")
SECRET = "nobody may read this"


async def test_a_request_is_one_trace_through_router_decode_and_prefill(
    stack: Stack, collector: Collector
) -> None:
    key = await stack.key_of("traced")
    request = pb.GenerateRequest(
        request_id="traced",
        model=MODEL,
        prompt=f"{SECRET} {words(40)}",
        sampling=sampling_pb2.Sampling(max_tokens=4),
    )
    metadata = (
        ("authorization", f"Bearer {key}"),
        ("traceparent", f"00-{TRACE_ID}-{PARENT_ID}-01"),
    )
    async with stack.raw() as channel:
        stub = cast("RouterServiceAsyncStub", RouterServiceStub(channel))
        events = [each async for each in stub.Generate(request, metadata=metadata)]
    completed = events[-1].completed

    def mine() -> dict[str, Span]:
        return {each.service: each for each in collector.spans if each.trace_id == TRACE_ID}

    async def are_all_there() -> bool:
        return len(mine()) == 3

    await eventually(are_all_there)
    router, decode, prefill = (mine()[f"tidemill-{name}"] for name in NAMES)
    assert [each.parent_id for each in (router, decode, prefill)] == [
        PARENT_ID,
        router.span_id,
        decode.span_id,
    ]
    assert router.name == "tidemill.api.router.v1.RouterService/Generate"
    assert router.attributes["gen_ai.request.model"] == MODEL
    assert router.attributes["gen_ai.usage.input_tokens"] == completed.usage.prompt.prompt_tokens
    assert router.attributes["gen_ai.usage.output_tokens"] == 4
    assert router.attributes["tidemill.amount_nano"] == completed.receipt.amount_nano > 0
    assert decode.attributes["tidemill.request_id"]
    told = json.dumps([dict(each.attributes) for each in collector.spans], default=str)
    assert SECRET not in told
    assert key not in told
