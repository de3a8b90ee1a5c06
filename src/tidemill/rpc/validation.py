"""Requests against the bounds that the protos declare. Imported by servers only.

The generated modules carry the rules as unknown option bytes, without importing
buf/validate/validate.proto; protovalidate reads them in that form.
"""

import protovalidate
from google.protobuf.message import Message

from tidemill.errors import InvalidRequest

_MAX_VIOLATIONS = 16  # as many as a status carries

# Each violation takes some 15 us to put together, and two bytes can be one: a message of the
# largest size would keep the process from everybody else for half a minute.
_SMALL_BYTES = 4096

_validator = protovalidate.Validator()


def validate(message: Message) -> None:
    """Raise InvalidRequest, naming the fields of `message` that are out of bounds.

    Of a large message the first one only. Lists are measured before their elements are looked at.
    """
    found = _validator.collect_violations(message, fail_fast=True)
    if not found:
        return
    if message.ByteSize() <= _SMALL_BYTES:
        found = _validator.collect_violations(message)
    violations = [(_path(each), each.proto.message) for each in found[:_MAX_VIOLATIONS]]
    field, description = violations[0]
    raise InvalidRequest(f"{field}: {description}" if field else description, violations=violations)


def _path(violation: protovalidate.Violation) -> str:
    """`sampling.top_p`, `chat.messages[3].content`; empty for a rule about the whole message."""
    if violation.proto.field is None:
        return ""
    path = ""
    for element in violation.proto.field.elements:
        path += f".{element.field_name}"
        if element.subscript is not None:
            path += f"[{element.subscript.value}]"
    return path.removeprefix(".")
