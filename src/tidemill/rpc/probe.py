"""Ask a port for its health: `python -m tidemill.rpc.probe ADDRESS ...`, for container checks."""

import argparse
import asyncio
import sys
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tidemill.errors import ConfigError
from tidemill.rpc.channel import internal_channel, sdk_aio_channel
from tidemill.rpc.tls import TlsFiles


async def probe(channel: grpc.aio.Channel, *, service: str = "", timeout_s: float = 10.0) -> str:
    """The status name that `service` reports (SERVING, ...), else the code of the failure."""
    stub = health_pb2_grpc.HealthStub(channel)
    request = health_pb2.HealthCheckRequest(service=service)
    try:
        response = await stub.Check(request, timeout=timeout_s)  # type: ignore[attr-defined]  # not in the stubs
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(response.status))


async def _main(arguments: argparse.Namespace) -> int:
    async with _channel(arguments) as channel:
        status = await probe(channel, service=arguments.service, timeout_s=arguments.timeout)
    sys.stdout.write(f"{status}\n")
    return 0 if status == "SERVING" else 1


def _channel(arguments: argparse.Namespace) -> grpc.aio.Channel:
    if arguments.role is None:
        return sdk_aio_channel(arguments.address, ca=arguments.ca, insecure=arguments.insecure)
    if not (arguments.cert and arguments.key and arguments.ca):
        raise ConfigError("--role needs --cert, --key and --ca")
    tls = TlsFiles(cert=arguments.cert, key=arguments.key, ca=arguments.ca)
    return internal_channel(arguments.address, role=arguments.role, tls=tls)


def main() -> int:
    """Exit 0 when the port says SERVING, 1 when it does not, 2 when it cannot be asked."""
    parser = argparse.ArgumentParser(prog="python -m tidemill.rpc.probe", description=__doc__)
    parser.add_argument("address", help="host:port")
    parser.add_argument("--service", default="", help="one service instead of the process")
    parser.add_argument("--role", help="role the process must prove (internal ports)")
    parser.add_argument("--ca", type=Path, help="authority to trust; unset: the system's")
    parser.add_argument("--cert", type=Path)
    parser.add_argument("--key", type=Path)
    parser.add_argument("--insecure", action="store_true", help="no TLS, on loopback only")
    parser.add_argument("--timeout", type=float, default=2.0, help="seconds")
    try:
        return asyncio.run(_main(parser.parse_args()))
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
