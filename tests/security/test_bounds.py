"""Every field of every request is bounded, and each port refuses what is out of bounds."""

from collections.abc import Iterable

import grpc
import protovalidate
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from tests.router_harness import ADMIN_KEY
from tests.security import surface
from tests.security.breakages import Breakage, breakages
from tests.security.deployment import Deployment, Port
from tests.security.rules import NUMBERS, element_rules, kind_of, reachable, rules_of, valid
from tests.security.surface import Method, call, is_map
from tidemill.rpc.options import INTERNAL_MESSAGE_BYTES, PUBLIC_MESSAGE_BYTES

INVALID = grpc.StatusCode.INVALID_ARGUMENT
TOO_LARGE = grpc.StatusCode.RESOURCE_EXHAUSTED

# Numbers of which every value means something: drawn, counted, or only compared.
ANY_NUMBER = {
    "Sampling.seed",
    "ResolvedSampling.seed",
    "ResolvedSampling.stop_token_ids",
    "Sampling.stop_token_ids",
    "TokenInput.token_ids",
    "WorkerTask.token_ids",
    "HandoverRef.epoch",
    "WatchKvRequest.epoch",
    "WatchKvRequest.after_sequence",
}


def unbounded(descriptor: Descriptor) -> Iterable[str]:
    for field in descriptor.fields:
        rules = rules_of(field)
        name = f"{descriptor.name}.{field.name}"
        if is_map(field):
            if not rules.map.HasField("max_pairs"):
                yield name
        elif field.is_repeated:
            if not rules.repeated.HasField("max_items") or not bounded(field, element_rules(field)):
                yield name
        elif not bounded(field, rules):
            yield name


def bounded(field: FieldDescriptor, rules: object) -> bool:
    kind = kind_of(rules)
    if field.message_type is not None or field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return True
    if kind is None:
        return False
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        pattern = getattr(kind, "pattern", "")
        whole = pattern.startswith("^") and pattern.endswith("$") and not set("*+") & set(pattern)
        most = ("len", "max_len", "max_bytes")
        return (
            whole
            or bool(getattr(kind, "in"))
            or any(hasattr(kind, name) and kind.HasField(name) for name in most)
        )
    if field.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
        return bool(kind.defined_only)
    assert field.cpp_type in NUMBERS
    return any(kind.HasField(name) for name in ("lt", "lte", "gt", "gte"))


def test_every_field_of_every_request_is_bounded() -> None:
    requests = [method.descriptor.input_type for method in surface.methods()]
    found = {name for each in reachable(*requests).values() for name in unbounded(each)}
    assert found - ANY_NUMBER == set()


def test_what_the_generator_calls_valid_is_and_what_it_breaks_breaks_one_bound() -> None:
    validator = protovalidate.Validator()
    num_broken = 0
    for method in surface.methods():
        assert validator.collect_violations(valid(method.descriptor.input_type)) == []
        for broken in breakages(method.descriptor.input_type):
            num_broken += 1
            found = validator.collect_violations(broken.message, fail_fast=True)
            assert len(found) == 1, f"{method.path} {broken}"
    assert num_broken > 400


@pytest.mark.redis
async def test_no_port_lets_anything_beyond_its_bounds_in(deployment: Deployment) -> None:
    router, wrong = deployment.router, []
    for method in surface.methods(surface.ROUTER, surface.BILLING):
        wrong += await accepted(router.channel, method, PUBLIC_MESSAGE_BYTES, key=router.key)
    for method in surface.methods(surface.ADMIN):
        wrong += await accepted(router.channel, method, PUBLIC_MESSAGE_BYTES, key=ADMIN_KEY)
    for port, certificate, names in internal(deployment):
        async with deployment.holding(port, certificate) as channel:
            for method in surface.methods(*names):
                if not closed(port, method):
                    wrong += await accepted(channel, method, INTERNAL_MESSAGE_BYTES)
    assert "\n".join(wrong) == ""


def internal(deployment: Deployment) -> list[tuple[Port, str, tuple[str, ...]]]:
    worker, cache = deployment.worker_port, deployment.cache_port
    return [
        (worker, "router", (surface.WORKER, surface.DECODE)),
        (worker, "decode", (surface.PREFILL, surface.CACHE)),
        (cache, "prefill", (surface.CACHE,)),
    ]


def closed(port: Port, method: Method) -> bool:
    """A worker stores nothing for others, and keeps no statistics."""
    return port.role != "cache" and method.descriptor.name in {"StoreBlocks", "GetCacheStats"}


async def accepted(
    channel: grpc.aio.Channel, method: Method, most_bytes: int, *, key: str | None = None
) -> list[str]:
    """What the method did not refuse as it should have."""
    wrong = []
    for broken in breakages(method.descriptor.input_type):
        answered = await call(channel, method.path, bodies(method, broken), key=key)
        if broken.message.ByteSize() > most_bytes:
            right = answered.code is TOO_LARGE
        else:
            right = answered.code is INVALID and broken.named_by(answered.fields)
        if not right:
            wrong.append(f"{method.path} {broken}: {answered.code.name} {answered.fields}")
    return wrong


def bodies(method: Method, broken: Breakage) -> list[Message]:
    """Pieces of blocks come after whose they are."""
    if method.descriptor.name == "StoreBlocks" and broken.path.startswith("piece"):
        return [valid(method.descriptor.input_type), broken.message]
    return [broken.message]
