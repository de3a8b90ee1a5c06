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
