import time

import pytest

from tidemill.api.router.v1.router_service_pb2 import GenerateRequest
from tidemill.errors import InvalidRequest
from tidemill.rpc.validation import validate


def valid() -> GenerateRequest:
    request = GenerateRequest(request_id="r-1", model="demo", prompt="hello")
    request.sampling.temperature = 0.5
    return request


def violations(request: GenerateRequest) -> list[str]:
    with pytest.raises(InvalidRequest) as caught:
        validate(request)
    assert caught.value.violations[0][0] in caught.value.message
    return [field for field, _ in caught.value.violations]


def test_a_request_within_bounds_passes() -> None:
    validate(valid())


def test_every_bad_field_is_named_by_its_path() -> None:
    request = valid()
    request.model = ""
    request.sampling.temperature = float("nan")
    assert {"model", "sampling.temperature"} <= set(violations(request))


def test_an_element_of_a_list_is_named_by_its_index() -> None:
    request = valid()
    request.stop.extend(["END", ""])
    assert violations(request) == ["stop[1]"]


def test_many_bad_elements_make_a_short_error() -> None:
    request = valid()
    request.stop.extend([""] * 10_000)
    assert len(violations(request)) <= 16


def test_a_missing_choice_is_named() -> None:
    request = valid()
    request.ClearField("prompt")
    assert violations(request) == ["input"]


def test_a_message_full_of_bad_elements_keeps_nobody_waiting() -> None:
    """Two million empty chat messages fit into 4 MiB; each would be a violation of its own."""
    chat = b"\x0a\x00" * 2_000_000
    request = GenerateRequest.FromString(b"\x1a" + _varint(len(chat)) + chat)
    began = time.thread_time()
    assert violations(request)
    assert time.thread_time() - began < 10.0  # 34 s if all were named


def test_of_a_large_message_only_the_first_bad_field_is_named() -> None:
    request = valid()
    request.prompt = "x" * 5000
    request.model = ""
    request.sampling.temperature = 3
    assert len(violations(request)) == 1


def _varint(number: int) -> bytes:
    return (
        number.to_bytes(1, "little")
        if number < 128
        else bytes([number & 127 | 128]) + _varint(number >> 7)
    )
