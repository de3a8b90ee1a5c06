"""Every method of every port: without credentials, with each wrong one, and with the right one.

The tables say who may call what, apart from the code that decides it. A method that stands in no
table fails `test_no_method_is_forgotten`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.router_harness import ADMIN_KEY, bearer
from tests.security import surface
from tests.security.deployment import Deployment, Port
from tests.security.surface import Answered, Method, call
from tidemill.certs import ROLES, make_dev_certs
from tidemill.rpc.probe import probe
from tidemill.rpc.tls import TlsFiles

pytestmark = pytest.mark.redis

OK = grpc.StatusCode.OK
DENIED = grpc.StatusCode.PERMISSION_DENIED
UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
UNIMPLEMENTED = grpc.StatusCode.UNIMPLEMENTED
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
POOLS = {"prefill", "decode"}

# Roles by service, and where one of its methods differs.
OPEN_TO: dict[str, set[str]] = {
    surface.WORKER: {"router", *POOLS},
    surface.PREFILL: {"decode"},
    surface.DECODE: {"router"},
}
WATCH_KV_OPEN_TO = {"router"}
CACHE_OPEN_TO = {
    "LookupBlocks": POOLS,
    "FetchBlocks": POOLS,
    "StoreBlocks": POOLS,
    "GetCacheStats": {"router", *POOLS},
}
WORKER_CACHE_OPEN_TO: dict[str, set[str]] = {
    "LookupBlocks": POOLS,
    "FetchBlocks": POOLS,
    "StoreBlocks": set(),
    "GetCacheStats": set(),
}
KEYS = {surface.ROUTER: "tenant", surface.BILLING: "tenant", surface.ADMIN: "admin"}


def roles_for(port: Port, method: Method) -> set[str]:
    if method.descriptor.name == "WatchKv":
        return WATCH_KV_OPEN_TO
    if method.service != surface.CACHE:
        return OPEN_TO[method.service]
    table = CACHE_OPEN_TO if port.role == "cache" else WORKER_CACHE_OPEN_TO
    return table[method.descriptor.name]


def test_no_method_is_forgotten() -> None:
    assert set(surface.services()) == {*OPEN_TO, surface.CACHE, *KEYS}
    caches = {method.descriptor.name for method in surface.methods(surface.CACHE)}
    assert caches == set(CACHE_OPEN_TO) == set(WORKER_CACHE_OPEN_TO)


@pytest.mark.parametrize("certificate", ROLES)
async def test_a_certificate_opens_what_its_roles_may_call_and_nothing_else(
    deployment: Deployment, certificate: str
) -> None:
    wrong: dict[str, grpc.StatusCode] = {}
    for port in deployment.internal_ports:
        async with deployment.holding(port, certificate) as channel:
            for method in port.methods:
                code = (await call(channel, method.path)).code
                allowed = bool(roles_for(port, method) & set(ROLES[certificate]))
                if (code is DENIED) == allowed or code in {UNAUTHENTICATED, UNIMPLEMENTED}:
                    wrong[f"{port.role}{method.path}"] = code
            assert (await call(channel, REFLECTION)).code in {DENIED, UNIMPLEMENTED}
            assert await probe(channel) == "SERVING"
    assert wrong == {}


async def test_an_internal_port_shakes_no_hands_without_one_of_our_certificates(
    deployment: Deployment, tmp_path: Path, tls_files: Callable[[str], TlsFiles]
) -> None:
    make_dev_certs(tmp_path)  # of an authority that is not ours
    ours = tls_files("router")
    foreign = TlsFiles(cert=tmp_path / "router.pem", key=tmp_path / "router.key", ca=ours.ca)
    for port in deployment.internal_ports:
        async with (
            deployment.without_certificate(port) as bare,
            deployment.presenting(port, foreign) as stranger,
            grpc.aio.insecure_channel(port.address) as plain,
        ):
            for channel in (bare, stranger, plain):
                codes = {(await call(channel, each.path)).code for each in port.methods}
                assert codes == {UNAVAILABLE}
                assert await probe(channel) == "UNAVAILABLE"


async def test_each_method_of_the_front_door_opens_to_its_kind_of_key_alone(
    deployment: Deployment,
) -> None:
    router = deployment.router
    keys = {
        "none": None,
        "empty": "",
        "unknown": "tm_abcdefabcdef." + "x" * 32,
        "wrong secret": router.key[:-1] + "~",
        "no key at all": "~" * 4000,
        "tenant": router.key,
        "admin": ADMIN_KEY,
    }
    wrong: dict[str, Answered] = {}
    for method in surface.methods(*KEYS):
        for name, key in keys.items():
            answered = await call(router.channel, method.path, key=key)
            if (answered.code is UNAUTHENTICATED) == (name == KEYS[method.service]):
                wrong[f"{method.path} {name}"] = answered
            assert answered.code not in {DENIED, UNIMPLEMENTED}, method.path
    assert wrong == {}


async def test_health_and_nothing_else_answers_without_a_key(deployment: Deployment) -> None:
    channel = deployment.router.channel
    assert await probe(channel) == "SERVING"
    for name in ("Watch", "List"):
        assert (await call(channel, f"/grpc.health.v1.Health/{name}")).code is OK
    for path in ("/grpc.health.v1.Health/Other", "/grpc.health.v1.Health/../Check", "/", "//"):
        assert (await call(channel, path)).code is UNIMPLEMENTED
    assert (await call(channel, REFLECTION)).code is UNAUTHENTICATED
    assert (await call(channel, REFLECTION, key=ADMIN_KEY)).code is UNAUTHENTICATED


async def test_a_port_serves_no_service_but_its_own(deployment: Deployment) -> None:
    everything = surface.methods()
    router = deployment.router
    for method in everything:
        if method.service not in KEYS:
            assert (await call(router.channel, method.path, key=router.key)).code is UNIMPLEMENTED
    for port in deployment.internal_ports:
        async with deployment.holding(port, "worker") as channel:
            for method in everything:
                if method.service not in port.services:
                    assert (await call(channel, method.path)).code is UNIMPLEMENTED


async def test_reflection_tells_whoever_has_a_key_of_the_same_doors(
    deployment: Deployment,
) -> None:
    stub = cast(Any, reflection_pb2_grpc.ServerReflectionStub)(deployment.router.channel)
    asked = reflection_pb2.ServerReflectionRequest(list_services="")
    answers = stub.ServerReflectionInfo(iter([asked]), metadata=bearer(deployment.router.key))
    listed = {each.name for each in (await answers.read()).list_services_response.service}
    ours = {name for name in listed if name.startswith("tidemill.")}
    assert ours == set(KEYS)
    assert listed - ours == {"grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
