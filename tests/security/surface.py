"""Every method of every service, from the descriptors, and calls that send what no SDK would."""

import importlib
import pkgutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from tests.router_harness import bearer
from tidemill import api
from tidemill.errors import TidemillError
from tidemill.rpc.status import from_rpc_error

ROUTER = "tidemill.api.router.v1.RouterService"
ADMIN = "tidemill.api.router.v1.AdminService"
BILLING = "tidemill.api.billing.v1.BillingService"
WORKER = "tidemill.api.worker.v1.WorkerService"
PREFILL = "tidemill.api.prefill.v1.PrefillService"
DECODE = "tidemill.api.decode.v1.DecodeService"
CACHE = "tidemill.api.cache.v1.CacheService"


# What gRPC says here, and not the server, when a body meets a call that the server has ended.
_CUT_IN_WRITING = "Internal error from Core"


@dataclass(frozen=True)
class Method:
    """One method of one service."""

    descriptor: MethodDescriptor

    @property
    def service(self) -> str:
        """Full name of its service."""
        return self.descriptor.containing_service.full_name

    @property
    def path(self) -> str:
        """As it stands on the wire."""
        return f"/{self.service}/{self.descriptor.name}"

    @property
    def request(self) -> type[Message]:
        """Class of what it takes."""
        return GetMessageClass(self.descriptor.input_type)


def services() -> dict[str, ServiceDescriptor]:
    """All services of the protos, by full name."""
    modules = pkgutil.walk_packages(api.__path__, f"{api.__name__}.")
    files = [
        importlib.import_module(module.name).DESCRIPTOR
        for module in modules
        if module.name.endswith("_pb2")
    ]
    return {
        service.full_name: service for file in files for service in file.services_by_name.values()
    }


def methods(*names: str) -> list[Method]:
    """All methods of these services; of every service if none is named."""
    found = services()
    return [Method(method) for name in names or sorted(found) for method in found[name].methods]


def is_map(field: FieldDescriptor) -> bool:
    """Whether it is a map, which descriptors show as a list of entries."""
    kind = field.message_type
    return kind is not None and bool(kind.GetOptions().map_entry)


@dataclass(frozen=True)
class Answered:
    """How a call went: code OK means that the server let it in and answered."""

    code: grpc.StatusCode
    error: TidemillError | None = None

    @property
    def fields(self) -> list[str]:
        """Paths of the fields that were refused."""
        return [path for path, _ in getattr(self.error, "violations", ())]


async def call(
    channel: grpc.aio.Channel,
    path: str,
    bodies: Iterable[bytes | Message] = (b"",),
    *,
    key: str | None = None,
    timeout: float = 20.0,
) -> Answered:
    """Send the bodies and close, whatever kind of method it is; wait for the first answer."""
    stream: Any = channel.stream_stream(path)
    metadata = () if key is None else bearer(key)
    answer = stream(_wire(bodies), metadata=metadata, timeout=timeout)
    try:
        await answer.read()
    except grpc.aio.AioRpcError as error:
        if error.details() == _CUT_IN_WRITING:
            return Answered(grpc.StatusCode.ABORTED)
        return Answered(error.code(), from_rpc_error(error))
    answer.cancel()
    return Answered(grpc.StatusCode.OK)


def _wire(bodies: Iterable[bytes | Message]) -> Iterator[bytes]:
    for body in bodies:
        yield body if isinstance(body, bytes) else body.SerializeToString()
