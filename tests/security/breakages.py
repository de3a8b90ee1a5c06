"""For each bound of each field of a request: a message that breaks this one and no other."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from tests.security.rules import (
    add_valid,
    bad_values,
    element_rules,
    is_required,
    map_value,
    rules_of,
    valid,
    valid_value,
)
from tests.security.surface import is_map


@dataclass(frozen=True)
class Breakage:
    """`path` is the field, `rule` the bound that `message` breaks."""

    path: str
    rule: str
    message: Message

    def __str__(self) -> str:
        return f"{self.path} {self.rule}"

    def named_by(self, fields: list[str]) -> bool:
        """Whether a refusal of these fields is about this one."""
        return any(each.partition("[")[0] == self.path.partition("[")[0] for each in fields)


def breakages(descriptor: Descriptor) -> Iterator[Breakage]:
    """All of them, nested ones included."""
    for oneof in descriptor.oneofs:
        if is_required(oneof):
            message = valid(descriptor)
            message.ClearField(message.WhichOneof(oneof.name))
            yield Breakage(oneof.name, "required", message)
    for field in descriptor.fields:
        if is_map(field):
            yield from _of_map(descriptor, field)
        elif field.is_repeated:
            yield from _of_list(descriptor, field)
        elif field.message_type is not None:
            yield from _of_message(descriptor, field)
        else:
            for rule, value in bad_values(field, rules_of(field)):
                message = valid(descriptor, field)
                setattr(message, field.name, value)
                yield Breakage(field.name, rule, message)


def _of_message(descriptor: Descriptor, field: FieldDescriptor) -> Iterator[Breakage]:
    assert field.message_type is not None
    if rules_of(field).required:
        message = valid(descriptor, field)
        message.ClearField(field.name)
        yield Breakage(field.name, "required", message)
    for inner in breakages(field.message_type):
        message = valid(descriptor, field)
        getattr(message, field.name).CopyFrom(inner.message)
        yield Breakage(f"{field.name}.{inner.path}", inner.rule, message)


def _of_list(descriptor: Descriptor, field: FieldDescriptor) -> Iterator[Breakage]:
    rules = rules_of(field).repeated
    if rules.min_items:
        message = valid(descriptor, field)
        del getattr(message, field.name)[rules.min_items - 1 :]
        yield Breakage(field.name, "min_items", message)
    if rules.HasField("max_items"):
        message = valid(descriptor, field)
        if field.message_type is not None or rules.unique:
            for _ in range(rules.max_items + 1):
                add_valid(message, field)
        else:
            value = valid_value(field, rules.items)
            getattr(message, field.name).extend([value] * (rules.max_items + 1))
        yield Breakage(field.name, "max_items", message)
    if rules.unique:
        message = valid(descriptor, field)
        for _ in range(2):
            add_valid(message, field)
        yield Breakage(field.name, "unique", message)
    if field.message_type is not None:
        for inner in breakages(field.message_type):
            message = valid(descriptor, field)
            values = getattr(message, field.name)
            del values[:]
            values.add().CopyFrom(inner.message)
            yield Breakage(f"{field.name}[0].{inner.path}", inner.rule, message)
        return
    for rule, value in bad_values(field, element_rules(field)):
        message = valid(descriptor, field)
        getattr(message, field.name).append(value)
        yield Breakage(f"{field.name}[]", rule, message)


def _of_map(descriptor: Descriptor, field: FieldDescriptor) -> Iterator[Breakage]:
    assert field.message_type is not None
    key, value = field.message_type.fields_by_name["key"], map_value(field)
    rules = rules_of(field).map
    sound: Any = valid_value(value, rules.values) if value.message_type is None else None
    if rules.HasField("max_pairs"):
        message = valid(descriptor, field)
        pairs = getattr(message, field.name)
        for number in range(rules.max_pairs + 1):
            name: Any = number if key.cpp_type != FieldDescriptor.CPPTYPE_STRING else str(number)
            pairs[name] = sound
        yield Breakage(field.name, "max_pairs", message)
    for rule, bad in bad_values(value, rules.values):
        message = valid(descriptor, field)
        getattr(message, field.name)[1] = bad
        yield Breakage(f"{field.name}[]", rule, message)
