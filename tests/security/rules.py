"""The bounds that the protos declare, read from the descriptors, and messages made by them."""

import re
from collections.abc import Iterator
from typing import Any

from google.protobuf import descriptor_pb2, duration_pb2, field_mask_pb2, timestamp_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor, OneofDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass, GetMessageClassesForFiles
from protovalidate._gen.buf.validate import validate_pb  # the only copy of the rules in a wheel

from tests.security.surface import is_map

_SAMPLES = ("a", "USD", "0" * 32)
_WHOLE_NUMBERS = {
    FieldDescriptor.CPPTYPE_INT32,
    FieldDescriptor.CPPTYPE_INT64,
    FieldDescriptor.CPPTYPE_UINT32,
    FieldDescriptor.CPPTYPE_UINT64,
}
_UNSIGNED = {FieldDescriptor.CPPTYPE_UINT32, FieldDescriptor.CPPTYPE_UINT64}
_FLOATS = {FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE}
NUMBERS = _WHOLE_NUMBERS | _FLOATS


def _rules_pool() -> DescriptorPool:
    """A pool of our own: no wheel has validate.proto's module, so ours must meet no other."""
    pool = DescriptorPool()
    for module in (descriptor_pb2, duration_pb2, timestamp_pb2, field_mask_pb2):
        pool.AddSerializedFile(module.DESCRIPTOR.serialized_pb)
    pool.AddSerializedFile(validate_pb.desc().proto.to_binary())
    GetMessageClassesForFiles(["buf/validate/validate.proto"], pool)
    return pool


_POOL = _rules_pool()
_FIELD_OPTIONS: Any = GetMessageClass(_POOL.FindMessageTypeByName("google.protobuf.FieldOptions"))
_ONEOF_OPTIONS: Any = GetMessageClass(_POOL.FindMessageTypeByName("google.protobuf.OneofOptions"))
_FIELD = _POOL.FindExtensionByName("buf.validate.field")
_ONEOF = _POOL.FindExtensionByName("buf.validate.oneof")


def rules_of(field: FieldDescriptor) -> Any:
    """Its buf.validate.FieldRules; empty where none are declared."""
    options = _FIELD_OPTIONS.FromString(field.GetOptions().SerializeToString())
    return options.Extensions[_FIELD]


def is_required(oneof: OneofDescriptor) -> bool:
    """Whether one of it must be set."""
    options = _ONEOF_OPTIONS.FromString(oneof.GetOptions().SerializeToString())
    return bool(options.Extensions[_ONEOF].required)


def kind_of(rules: Any) -> Any:
    """The rules for the field's own kind (StringRules, ...); None without any."""
    name = rules.WhichOneof("type")
    return None if name is None else getattr(rules, name)


def element_rules(field: FieldDescriptor) -> Any:
    """Rules for the elements of a list."""
    return rules_of(field).repeated.items


def reachable(*roots: Descriptor) -> dict[str, Descriptor]:
    """These messages and all that stand in their fields, by full name; entries of maps left out."""
    found: dict[str, Descriptor] = {}
    left = list(roots)
    while left:
        descriptor = left.pop()
        if descriptor.full_name not in found:
            found[descriptor.full_name] = descriptor
            inner = [map_value(field) if is_map(field) else field for field in descriptor.fields]
            left += [field.message_type for field in inner if field.message_type is not None]
    return found


def map_value(field: FieldDescriptor) -> FieldDescriptor:
    """The field of a map's values."""
    assert field.message_type is not None
    return field.message_type.fields_by_name["value"]


def _numbers(field: FieldDescriptor) -> list[int]:
    assert field.enum_type is not None
    return [each.number for each in field.enum_type.values]


def valid(descriptor: Descriptor, choose: FieldDescriptor | None = None) -> Any:
    """The least message that is within all bounds; `choose` is what a oneof is set to."""
    message: Any = GetMessageClass(descriptor)()
    for field in descriptor.fields:
        oneof = field.containing_oneof
        if oneof is not None:
            wanted = choose if choose is not None and choose.containing_oneof is oneof else None
            if field is not wanted and not (
                wanted is None and is_required(oneof) and field is oneof.fields[0]
            ):
                continue
        if field.is_repeated and not is_map(field):
            for _ in range(rules_of(field).repeated.min_items):
                add_valid(message, field)
        elif field.message_type is not None and not field.is_repeated:
            if rules_of(field).required or oneof is not None:
                getattr(message, field.name).CopyFrom(valid(field.message_type))
                getattr(message, field.name).SetInParent()
        elif not field.is_repeated:
            setattr(message, field.name, valid_value(field, rules_of(field)))
    return message


def add_valid(message: Any, field: FieldDescriptor) -> None:
    """One more sound element in a list."""
    values = getattr(message, field.name)
    if field.message_type is not None:
        values.add().CopyFrom(valid(field.message_type))
    else:
        values.append(valid_value(field, element_rules(field)))


def valid_value(field: FieldDescriptor, rules: Any) -> Any:
    """A value within the rules of a field or element that is no message."""
    kind = kind_of(rules)
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return _valid_text(field, kind)
    if field.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
        banned = set(kind.not_in) if kind is not None else set()
        return next(number for number in _numbers(field) if number not in banned)
    if field.cpp_type in NUMBERS and kind is not None:
        if kind.HasField("gt"):
            return kind.lte
        return kind.gte if kind.HasField("gte") else 0
    return 0


def _valid_text(field: FieldDescriptor, kind: Any) -> Any:
    if field.type == FieldDescriptor.TYPE_BYTES:
        return b"x" * (max(kind.len, kind.min_len) if kind is not None else 0)
    if kind is None:
        return ""
    if getattr(kind, "in"):
        return getattr(kind, "in")[0]
    if kind.pattern:
        return _sample_of(kind.pattern)
    return "a" * max(kind.len, kind.min_len)


def bad_values(field: FieldDescriptor, rules: Any) -> Iterator[tuple[str, Any]]:
    """(what is wrong, value) just outside of each bound of a field or element."""
    kind = kind_of(rules)
    if kind is None:
        return
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        yield from _bad_texts(field, kind)
    elif field.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
        if kind.defined_only:
            yield "defined_only", 1 + max(_numbers(field))
        yield from (("not_in", number) for number in kind.not_in)
    elif field.cpp_type in NUMBERS:
        yield from _bad_numbers(field, kind)


def _bad_texts(field: FieldDescriptor, kind: Any) -> Iterator[tuple[str, Any]]:
    one: Any = b"x" if field.type == FieldDescriptor.TYPE_BYTES else "a"
    for name in ("len", "max_len", "max_bytes"):
        if hasattr(kind, name) and kind.HasField(name):
            yield name, one * (getattr(kind, name) + 1)
    for name in ("len", "min_len", "min_bytes"):
        if hasattr(kind, name) and getattr(kind, name):
            yield f"{name} ", one * (getattr(kind, name) - 1)
    if kind.pattern:
        yield "pattern", "\n"
        yield "length by pattern", _sample_of(kind.pattern) * 300
    if getattr(kind, "in"):
        yield "in", "no such thing"


def _sample_of(pattern: str) -> str:
    return next(each for each in _SAMPLES if re.search(pattern, each))


def _bad_numbers(field: FieldDescriptor, kind: Any) -> Iterator[tuple[str, Any]]:
    step = 1 if field.cpp_type in _WHOLE_NUMBERS else 0.5
    smallest = 0 if field.cpp_type in _UNSIGNED else None
    for name, delta in (("gt", 0), ("gte", -step), ("lt", 0), ("lte", step)):
        if kind.HasField(name):
            value = getattr(kind, name) + delta
            if smallest is None or value >= smallest:
                yield name, value
    if field.cpp_type in _FLOATS:
        for value in (float("nan"), float("inf")):
            yield "finite", value
