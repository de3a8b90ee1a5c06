import json
from typing import Any

import pytest

from tidemill.api.router.v1 import router_service_pb2 as pb
from tidemill.client import MaxCost, Message
from tidemill.client.request import prepare_chat, prepare_prompt
from tidemill.errors import InvalidRequest


def test_unset_options_stay_unset() -> None:
    message = prepare_prompt("demo", "p", None, {"temperature": None}).message
    assert not message.HasField("sampling")
    assert not message.HasField("max_cost")
    assert not message.HasField("first_token_timeout_ms")
    assert not message.HasField("total_timeout_ms")
    assert len(message.request_id) == 36


def test_zero_is_not_unset() -> None:
    message = prepare_prompt("demo", "p", None, {"temperature": 0, "top_k": 0, "seed": 0}).message
    sampling = message.sampling
    assert all(sampling.HasField(name) for name in ("temperature", "top_k", "seed"))


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"max_tokens": -1}, "sampling.max_tokens"),
        ({"top_k": 2**32}, "sampling.top_k"),
        ({"seed": -1}, "sampling.seed"),
        ({"stop_token_ids": [-5]}, "sampling.stop_token_ids"),
        ({"n": -1}, "sampling.n"),
        ({"logprobs": -1}, "sampling.logprobs"),
        ({"min_tokens": 2**32}, "sampling.min_tokens"),
        ({"logit_bias": {-1: 1.0}}, "sampling.logit_bias"),
        (
            {"response_format": {"const": float("nan")}},
            "response_format.json_schema.schema",
        ),
        ({"stop": ["ok", "\ud800"]}, "stop"),
        ({"max_cost": MaxCost("USD", -1)}, "max_cost"),
        ({"timeout": -1.0}, "total_timeout_ms"),
        ({"timeout": float("inf")}, "total_timeout_ms"),
        ({"first_token_timeout": float("nan")}, "first_token_timeout_ms"),
        ({"request_id": "\udfff"}, "request_id"),
    ],
)
def test_what_cannot_be_written_down_is_named(options: Any, field: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        prepare_prompt("demo", "p", None, options)
    assert [path for path, _ in raised.value.violations] == [field]


def test_text_that_is_not_unicode_is_named() -> None:
    with pytest.raises(InvalidRequest) as raised:
        prepare_prompt("demo", "half a \ud83d", None, {})
    assert raised.value.violations[0][0] == "prompt"
    with pytest.raises(InvalidRequest) as raised:
        prepare_chat("demo", [Message("user", "a"), Message("user", "\ud83d")], {})
    assert raised.value.violations[0][0] == "chat.messages[1].content"


def test_a_request_over_four_mebibytes_is_refused_before_it_is_sent() -> None:
    with pytest.raises(InvalidRequest) as raised:
        prepare_prompt("demo", "x" * (4 << 20), None, {})
    assert raised.value.reason == "MESSAGE_TOO_LARGE"
    assert raised.value.request_id


def test_a_format_is_any_json_object_or_a_schema() -> None:
    plain = prepare_prompt("demo", "p", None, {"response_format": "json"}).message
    assert plain.response_format.WhichOneof("kind") == "json_object"
    schema = {"type": "object", "properties": {"größe": {"type": "integer"}}}
    bound = prepare_prompt("demo", "p", None, {"response_format": schema}).message
    assert json.loads(bound.response_format.json_schema.schema) == schema
    free = prepare_prompt("demo", "p", None, {"response_format": None}).message
    assert not free.HasField("response_format")
    wrong: Any = {"response_format": "xml"}
    with pytest.raises(TypeError, match="is 'xml'"):
        prepare_prompt("demo", "p", None, wrong)


def test_an_unknown_role_is_named() -> None:
    with pytest.raises(InvalidRequest, match=r"chat\.messages\[0\]\.role: 'robot'"):
        prepare_chat("demo", [Message("robot", "hi")], {})


def test_an_empty_prompt_and_empty_lists_are_left_to_the_router() -> None:
    assert prepare_prompt("demo", "", None, {}).message.WhichOneof("input") == "prompt"
    assert prepare_prompt("demo", None, [], {}).message.WhichOneof("input") == "tokens"
    assert prepare_chat("demo", [], {}).message.WhichOneof("input") == "chat"


def test_priority_is_said_by_name() -> None:
    priorities: list[Any] = [None, "standard", "batch"]
    messages = [
        prepare_prompt("demo", "p", None, {"priority": each}).message for each in priorities
    ]
    assert [each.priority for each in messages] == [
        pb.PRIORITY_UNSPECIFIED,
        pb.PRIORITY_STANDARD,
        pb.PRIORITY_BATCH,
    ]
    wrong: Any = {"priority": "urgent"}
    with pytest.raises(InvalidRequest, match="'urgent' is neither 'standard' nor 'batch'"):
        prepare_prompt("demo", "p", None, wrong)


def test_misuse_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="either a prompt or token_ids"):
        prepare_prompt("demo", "p", [1], {})
    with pytest.raises(TypeError, match="either a prompt or token_ids"):
        prepare_prompt("demo", None, None, {})
    options: Any = {"max_token": 5}
    with pytest.raises(TypeError, match="unknown options: max_token"):
        prepare_prompt("demo", "p", None, options)
    with pytest.raises(TypeError, match="must have role and content"):
        prepare_chat("demo", [{"role": "user", "text": "hi"}], {})


def test_this_side_waits_a_little_longer_than_the_router() -> None:
    assert prepare_prompt("demo", "p", None, {"timeout": 10.0}).timeout_s == 12.0
    short = prepare_prompt("demo", "p", None, {"timeout": 0.5})
    assert short.timeout_s == 1.0
    assert short.message.total_timeout_ms == 500
