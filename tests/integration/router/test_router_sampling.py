"""Sampling and formats on their way from client to worker; the workers are scripted."""

from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.router_harness import EOS_ID, MODEL, RouterHarness, spell
from tests.scripted_worker import ScriptedWorker, Talk, answer, likelihood
from tidemill.api.common.v1 import lifecycle_pb2, sampling_pb2
from tidemill.api.decode.v1 import decode_service_pb2 as decode_pb2
from tidemill.api.router.v1 import router_service_pb2 as router_pb2
from tidemill.errors import FailedPrecondition, InvalidRequest
from tidemill.text import Tokenizer

pytestmark = pytest.mark.redis


def ask(request_id: str = "r1", **fields: Any) -> router_pb2.GenerateRequest:
    return router_pb2.GenerateRequest(
        request_id=request_id, model=MODEL, prompt="x" * 100, **fields
    )


def sampled(request_id: str = "r1", **fields: Any) -> router_pb2.GenerateRequest:
    return ask(request_id, sampling=sampling_pb2.Sampling(**fields))


def schema(text: str) -> router_pb2.ResponseFormat:
    return router_pb2.ResponseFormat(json_schema=lifecycle_pb2.JsonSchema(schema=text))


async def test_every_sampling_field_reaches_the_worker(
    router: RouterHarness, decode: ScriptedWorker
) -> None:
    given: dict[str, Any] = {
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 3,
        "seed": 11,
        "max_tokens": 9,
        "min_p": 0.125,
        "repetition_penalty": 1.5,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.75,
        "logprobs": 2,
        "prompt_logprobs": 0,
        "min_tokens": 4,
    }
    await router.generate(sampled(**given, logit_bias={5: 1.5, 9: -100.0}))
    resolved = decode.starts[0].task.sampling
    assert {name: getattr(resolved, name) for name in given} == given
    assert dict(resolved.logit_bias) == {5: 1.5, 9: -100.0}
    assert resolved.n == 1


async def test_what_is_not_asked_for_is_off_or_the_models_own(
    router: RouterHarness, decode: ScriptedWorker
) -> None:
    await router.generate(ask())
    resolved = decode.starts[0].task.sampling
    assert (resolved.temperature, resolved.top_p, resolved.top_k) == (0.6, 0.95, 0)
    assert (resolved.min_p, resolved.repetition_penalty) == (0.0, 1.0)
    assert (resolved.presence_penalty, resolved.frequency_penalty) == (0.0, 0.0)
    assert not resolved.HasField("logprobs")
    assert not resolved.HasField("prompt_logprobs")
    assert not decode.starts[0].task.HasField("grammar")


async def test_ignoring_eos_leaves_only_the_clients_stop_tokens(
    router: RouterHarness, decode: ScriptedWorker
) -> None:
    await router.generate(sampled("r1", ignore_eos=True, stop_token_ids=[9]))
    await router.generate(sampled("r2", stop_token_ids=[9]))
    found = [list(start.task.sampling.stop_token_ids) for start in decode.starts]
    assert found == [[9], [EOS_ID, 9]]


async def test_a_stop_string_waits_for_the_least_number_of_tokens(
    router: RouterHarness, decode: ScriptedWorker, model_dir: Path
) -> None:
    ids = spell(model_dir, "a. b. c. d.")
    decode.scripts = [answer(ids)]
    sampling = sampling_pb2.Sampling(min_tokens=4)
    heard = await router.generate(ask(sampling=sampling, stop=["."]))
    assert heard.text == "a. b"
    assert heard.completed.usage.completion_tokens == 5


async def test_log_probabilities_arrive_with_their_tokens(
    router: RouterHarness, decode: ScriptedWorker, model_dir: Path
) -> None:
    ids = spell(model_dir, "one STOP two three four")

    async def play(talk: Talk) -> None:
        await talk.prefill_done(ids[0])
        await talk.tokens(ids[1:18])  # more than one message holds, cut off within
        await talk.stopped
        await talk.final("STOP")

    decode.scripts = [play]
    heard = await router.generate(ask(sampling=sampling_pb2.Sampling(logprobs=3), stop=["two"]))
    assert heard.token_ids == ids[:12]
    for chunk in heard.chunks:
        assert list(chunk.logprobs) == [likelihood(each, 3) for each in chunk.token_ids]


async def test_the_prompt_is_scored_in_messages_of_bounded_size_before_the_first_chunk(
    router: RouterHarness, decode: ScriptedWorker
) -> None:
    prompt = [2 + (7 * index) % 250 for index in range(700)]
    request = router_pb2.GenerateRequest(
        request_id="r1",
        model=MODEL,
        tokens=router_pb2.TokenInput(token_ids=prompt),
        sampling=sampling_pb2.Sampling(prompt_logprobs=2),
    )
    heard = await router.generate(request)
    assert heard.kinds == ["accepted", "prompt_scored", "chunk", "completed"]
    scored = [each.prompt_scored for each in heard.messages if each.HasField("prompt_scored")]
    assert max(len(each.token_ids) for each in scored) <= 256
    position = 1
    for each in scored:
        assert each.first_index == position
        assert list(each.logprobs) == [likelihood(token, 2) for token in each.token_ids]
        assert list(each.token_ids) == prompt[position : position + len(each.token_ids)]
        position += len(each.token_ids)
    assert position == 700


@pytest.mark.parametrize("part", ["first", "chunk", "prompt"])
async def test_log_probabilities_that_a_worker_withholds_end_the_request(
    router: RouterHarness, decode: ScriptedWorker, part: str
) -> None:
    async def withhold(talk: Talk) -> None:
        if part == "first":
            talk.sampling.ClearField("logprobs")
        if part == "prompt":
            talk.sampling.ClearField("prompt_logprobs")
        await talk.prefill_done(50)
        talk.sampling.ClearField("logprobs")
        await talk.tokens([51])
        await talk.stopped
        await talk.final("SERVER_FAULT")

    decode.scripts = [withhold]
    heard = await router.generate(sampled(logprobs=1, prompt_logprobs=1))
    assert heard.error is not None
    assert heard.error.reason == "WORKER_FAULT"


async def test_a_format_goes_to_the_worker_with_the_vocabulary_s_digest(
    router: RouterHarness, decode: ScriptedWorker, model_dir: Path
) -> None:
    text = '{"type": "object"}'
    json_object = router_pb2.ResponseFormat(json_object=lifecycle_pb2.JsonObject())
    await router.generate(ask("r1", response_format=schema(text)))
    await router.generate(ask("r2", response_format=json_object))
    first, second = [start.task.grammar for start in decode.starts]
    assert first.json_schema.schema == text
    assert second.WhichOneof("kind") == "json_object"
    digest = Tokenizer.load(model_dir).vocabulary_digest
    assert {first.vocabulary_digest, second.vocabulary_digest} == {digest}


BAD_FORMATS: dict[str, tuple[router_pb2.ResponseFormat, dict[str, Any], str]] = {
    "no kind": (router_pb2.ResponseFormat(), {}, "response_format.kind"),
    "no JSON": (schema("{type: object}"), {}, "response_format.json_schema.schema"),
    "half a JSON": (schema('{"type": '), {}, "response_format.json_schema.schema"),
    "no JSON value": (schema('{"const": NaN}'), {}, "response_format.json_schema.schema"),
    "no object": (schema('["object"]'), {}, "response_format.json_schema.schema"),
    "too deep": (schema("[" * 30_000), {}, "response_format.json_schema.schema"),
    "too long": (schema('{"a": "%s"}' % ("b" * 65536)), {}, "response_format.json_schema.schema"),
    "without an end": (schema("{}"), {"ignore_eos": True}, "response_format"),
    "with a late end": (schema("{}"), {"min_tokens": 5}, "response_format"),
}


@pytest.mark.parametrize("name", BAD_FORMATS)
async def test_a_format_that_cannot_be_is_refused_before_the_queue(
    router: RouterHarness, decode: ScriptedWorker, name: str
) -> None:
    response_format, sampling, field = BAD_FORMATS[name]
    heard = await router.generate(
        ask(response_format=response_format, sampling=sampling_pb2.Sampling(**sampling))
    )
    assert isinstance(heard.error, InvalidRequest)
    assert heard.error.violations[0][0] == field
    assert heard.messages == []
    assert decode.starts == []


def refuses(error: Exception) -> Any:
    async def play(talk: Talk) -> None:
        raise error

    return play


async def test_a_schema_that_the_worker_cannot_compile_is_the_clients_mistake_and_costs_nothing(
    router: RouterHarness, decode: ScriptedWorker
) -> None:
    why = InvalidRequest("unsupported: patternProperties", reason="GRAMMAR_INVALID")
    decode.scripts = [refuses(why), answer([50, 51])]
    bad = ask(response_format=schema('{"patternProperties": {}}'))
    heard = await router.generate(bad)
    assert isinstance(heard.error, InvalidRequest)
    assert heard.error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert heard.error.reason == "GRAMMAR_INVALID"
    assert heard.error.violations == [
        ("response_format.json_schema.schema", "unsupported: patternProperties")
    ]
    assert heard.error.request_id == "r1"
    assert len(decode.starts) == 1, "it was sent to a worker again"
    await router.check_idle()
    assert router.metric("tidemill_router_revenue_nano_total", model=MODEL, currency="USD") == 0
    good = await router.generate(bad)
    assert good.completed.usage.completion_tokens == 2, "the id was not free again"


async def test_a_format_that_leaves_no_token_to_draw_is_told_and_not_billed(
    router: RouterHarness, decode: ScriptedWorker
) -> None:
    async def play(talk: Talk) -> None:
        await talk.prefill_done(50)
        await talk.final("SERVER_FAULT")
        raise FailedPrecondition("no token is allowed", reason="GRAMMAR_DEAD_END")

    decode.scripts = [play]
    heard = await router.generate(ask(response_format=schema("{}")))
    assert isinstance(heard.error, FailedPrecondition)
    assert heard.error.reason == "GRAMMAR_DEAD_END"
    fault = router.metric("tidemill_router_unbilled_tokens_total", model=MODEL, why="server_fault")
    assert fault == 1


@pytest.mark.parametrize("reason", ["GRAMMAR_UNAVAILABLE", "KV_POOL_TOO_SMALL"])
async def test_what_the_workers_here_cannot_do_is_told_by_name(
    router: RouterHarness, decode: ScriptedWorker, reason: str
) -> None:
    decode.scripts = [refuses(FailedPrecondition("cannot", reason=reason))]
    heard = await router.generate(ask(response_format=schema("{}")))
    assert isinstance(heard.error, FailedPrecondition)
    assert (heard.error.reason, heard.error.request_id) == (reason, "r1")
    assert len(decode.starts) == 1


async def test_a_vocabulary_that_differs_is_the_servers_fault(
    router: RouterHarness, decode: ScriptedWorker
) -> None:
    differs = FailedPrecondition("another vocabulary", reason="VOCABULARY_MISMATCH")
    decode.scripts = [refuses(differs)]
    heard = await router.generate(ask(response_format=schema("{}")))
    assert heard.error is not None
    assert (heard.error.code, heard.error.reason) == (grpc.StatusCode.INTERNAL, "WORKER_FAULT")


async def test_tokens_of_a_choice_that_there_is_not_end_the_request(
    router: RouterHarness, decode: ScriptedWorker
) -> None:
    async def lie(talk: Talk) -> None:
        await talk.prefill_done(50)
        chunk = decode_pb2.Chunk(attempt=1, choice=1, first_index=1, token_ids=[5])
        await talk.send(decode_pb2.DecodeResponse(chunk=chunk))
        await talk.stopped
        await talk.final("SERVER_FAULT")

    decode.scripts = [lie]
    heard = await router.generate(ask())
    assert heard.error is not None
    assert heard.error.reason == "WORKER_FAULT"
