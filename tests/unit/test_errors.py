import grpc
import pytest

from tidemill import errors
from tidemill.errors import TidemillError


def all_classes() -> list[type[TidemillError]]:
    """The tree as errors.py defines it; a program may have local errors of its own."""
    found = [cls for cls in vars(errors).values() if isinstance(cls, type)]
    return [cls for cls in found if issubclass(cls, TidemillError)]


def test_every_error_is_drawn_in_the_tree() -> None:
    drawing = errors.__doc__ or ""
    drawn = {word for line in drawing.splitlines() for word in line.split()}
    assert {cls.__name__ for cls in all_classes()} <= drawn


def test_reasons_are_unique_and_upper_snake() -> None:
    reasons = [cls.reason for cls in all_classes() if cls not in (TidemillError, errors.LocalError)]
    assert len(reasons) == len(set(reasons))
    assert all(reason == reason.upper() and " " not in reason for reason in reasons)


def test_children_keep_the_code_of_their_parent() -> None:
    for cls in all_classes():
        if cls is not TidemillError and cls.__base__ is not TidemillError:
            assert cls.__base__ is not None
            assert issubclass(cls.__base__, TidemillError)
            assert cls.code == cls.__base__.code


def test_reason_names_the_class_it_came_from() -> None:
    for cls in all_classes():
        if cls is not TidemillError and not issubclass(cls, errors.LocalError):
            assert errors.error_class(cls.reason, cls.code) is cls


def test_unknown_reason_falls_back_on_the_code() -> None:
    unavailable = grpc.StatusCode.UNAVAILABLE
    assert errors.error_class("SOMETHING_NEW", unavailable) is errors.Unavailable
    assert errors.error_class("X", grpc.StatusCode.DATA_LOSS) is errors.Internal


def test_reason_with_a_foreign_code_is_not_believed() -> None:
    found = errors.error_class("QUEUE_FULL", grpc.StatusCode.PERMISSION_DENIED)
    assert found is errors.PermissionDenied


@pytest.mark.parametrize("reason", ["CONFIG_ERROR", "CHECKPOINT_ERROR", "POOL_EXHAUSTED"])
def test_local_errors_never_come_from_a_wire(reason: str) -> None:
    assert errors.error_class(reason, grpc.StatusCode.INTERNAL) is errors.Internal


def test_one_error_may_carry_its_own_reason_and_facts() -> None:
    error = errors.NotFound("no such key", reason="KEY_NOT_FOUND", metadata={"key": "tm_1"})
    assert error.reason == "KEY_NOT_FOUND"
    assert errors.NotFound.reason == "NOT_FOUND"
    assert error.metadata == {"key": "tm_1"}
    assert error.message == str(error) == "no such key"


def test_internal_error_id_travels_in_the_metadata() -> None:
    assert errors.Internal("oops", error_id="e1").metadata == {"error_id": "e1"}
    assert errors.Internal("oops").error_id is None
