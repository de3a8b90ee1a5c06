"""Requests that nobody should send: made from descriptors, broken at bounds, mangled as bytes."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message_factory import GetMessageClass

from tests.security.rules import (
    NUMBERS,
    bad_values,
    element_rules,
    map_value,
    rules_of,
    valid,
    valid_value,
)
from tests.security.surface import is_map

Hints = Mapping[str, Sequence[Any]]

_TEXTS = (
    "",
    "\0",
    "\u202e\ufeff",
    "\U0010ffff" * 8,
    "a" * 1000,
    "../../etc/passwd",
    "%s%n{0}",
    '{"a":' * 400,
    '{"type": "object"}',
    "tm:key:*",
    "-inf",
    "9" * 400,
)
_WHOLE = (0, 1, 63, 64, 65, 255, 1 << 20, (1 << 31) - 1, (1 << 32) - 1, (1 << 53), (1 << 63) - 1)
_REAL = (0.0, -0.0, 1e-320, 1e308, float("nan"), float("inf"), -float("inf"), 0.5)
_MOST = {
    FieldDescriptor.CPPTYPE_INT32: (1 << 31) - 1,
    FieldDescriptor.CPPTYPE_UINT32: (1 << 32) - 1,
    FieldDescriptor.CPPTYPE_INT64: (1 << 63) - 1,
    FieldDescriptor.CPPTYPE_UINT64: (1 << 64) - 1,
}


class Fuzzer:
    """Bodies of requests; the same for the same seed.

    `hints` are values by field name that lead past the first checks: names that exist, digests
    that match.
    """

    def __init__(self, seed: int, hints: Hints) -> None:
        self._rng = random.Random(seed)
        self._hints = hints

    def bodies(self, descriptor: Descriptor, *, streaming: bool) -> list[bytes]:
        """The messages of one call."""
        rng = self._rng
        num_bodies = rng.choice((1, 1, 2, 4)) if streaming else rng.choice((1,) * 30 + (0, 2))
        return [self._body(descriptor) for _ in range(num_bodies)]

    def _body(self, descriptor: Descriptor) -> bytes:
        rng = self._rng
        kind = rng.random()
        if kind < 0.08:
            return rng.randbytes(rng.randrange(300))
        if kind < 0.16:
            sound: bytes = valid(descriptor).SerializeToString()
            return self._mangled(sound)
        body: bytes = self._message(descriptor).SerializeToString()
        return self._mangled(body) if kind < 0.4 else body

    def _mangled(self, body: bytes) -> bytes:
        rng, data = self._rng, bytearray(body)
        for _ in range(rng.randrange(1, 4)):
            start = rng.randrange(len(data) + 1)
            end = min(len(data), start + rng.randrange(1, 9))
            kind = rng.randrange(5)
            if kind == 0 and data:
                data[start - 1] ^= 1 << rng.randrange(8)
            elif kind == 1:
                del data[start:end]
            elif kind == 2:
                data[start:start] = rng.randbytes(rng.randrange(1, 9))
            elif kind == 3:
                data[start:start] = data[: rng.randrange(len(data) + 1)]
            else:
                del data[start:]
        return bytes(data)

    def _message(self, descriptor: Descriptor) -> Any:
        message: Any = GetMessageClass(descriptor)()
        for field in descriptor.fields:
            if self._rng.random() < 0.75:
                self._fill(message, field)
        return message

    def _fill(self, message: Any, field: FieldDescriptor) -> None:
        rng = self._rng
        if is_map(field):
            entries = getattr(message, field.name)
            for _ in range(rng.randrange(4)):
                entries[rng.randrange(600)] = self._value(
                    map_value(field), rules_of(field).map.values
                )
        elif field.is_repeated:
            values = getattr(message, field.name)
            for _ in range(rng.choice((0, 1, 1, 3, 70))):
                if field.message_type is not None:
                    values.add().CopyFrom(self._message(field.message_type))
                else:
                    values.append(self._value(field, element_rules(field)))
        elif field.message_type is not None:
            getattr(message, field.name).CopyFrom(self._message(field.message_type))
            getattr(message, field.name).SetInParent()
        else:
            setattr(message, field.name, self._value(field, rules_of(field)))

    def _value(self, field: FieldDescriptor, rules: Any) -> Any:
        rng = self._rng
        kind = rng.random()
        if field.name in self._hints and kind < 0.8:
            return rng.choice(self._hints[field.name])
        if kind < 0.9 or field.name == "address":  # never one that could be dialled
            return valid_value(field, rules)
        if kind < 0.95 and (bad := list(bad_values(field, rules))):
            return rng.choice(bad)[1]
        return self._strange(field)

    def _strange(self, field: FieldDescriptor) -> Any:
        rng = self._rng
        if field.type == FieldDescriptor.TYPE_BYTES:
            return rng.randbytes(rng.choice((0, 1, 16, 32, 33, 1000)))
        if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
            return rng.choice(_TEXTS)
        if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
            return True
        if field.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
            return rng.choice((0, 1, 2, 99, -1))
        if field.cpp_type in _MOST:
            return min(rng.choice(_WHOLE), _MOST[field.cpp_type])
        assert field.cpp_type in NUMBERS
        return rng.choice(_REAL)
