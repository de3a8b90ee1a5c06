"""A name server for one name, whose addresses tests may change."""

import asyncio
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from ipaddress import IPv4Address
from typing import cast

_A = 1
_ANSWER = 0x8580  # a response, authoritative, recursion available
_NO_SUCH_NAME = 3
_POINTER_TO_QUESTION = 0xC00C
_IN = 1


class NameServer(asyncio.DatagramProtocol):
    """Answers for `name` with `addresses` (IPv4, TTL 0); `queries` counts what was asked of it."""

    def __init__(self, name: str, addresses: Sequence[str]) -> None:
        self.name = name
        self.addresses = list(addresses)
        self.queries = 0
        self.port = 0
        self._transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio has opened the socket."""
        self._transport = cast(asyncio.DatagramTransport, transport)
        self.port = transport.get_extra_info("sockname")[1]

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        """One question, one answer."""
        assert self._transport is not None
        self._transport.sendto(self._answer(data), addr)

    def target(self, port: int) -> str:
        """What a gRPC client is given to ask here for `name`."""
        return f"dns://127.0.0.1:{self.port}/{self.name}:{port}"

    def _answer(self, query: bytes) -> bytes:
        self.queries += 1
        labels, end = [], 12
        while length := query[end]:
            labels.append(query[end + 1 : end + 1 + length].decode())
            end += 1 + length
        (kind,) = struct.unpack("!H", query[end + 1 : end + 3])
        question = query[12 : end + 5]
        known = ".".join(labels).lower() == self.name
        found = self.addresses if known and kind == _A else []
        flags = _ANSWER if known else _ANSWER | _NO_SUCH_NAME
        head = query[:2] + struct.pack("!5H", flags, 1, len(found), 0, 0)
        record = struct.pack("!HHHIH", _POINTER_TO_QUESTION, _A, _IN, 0, 4)
        return head + question + b"".join(record + IPv4Address(each).packed for each in found)


@asynccontextmanager
async def name_server(name: str, addresses: Sequence[str]) -> AsyncIterator[NameServer]:
    """A server on a free loopback port."""
    loop = asyncio.get_running_loop()
    transport, server = await loop.create_datagram_endpoint(
        lambda: NameServer(name, addresses), local_addr=("127.0.0.1", 0)
    )
    try:
        yield server
    finally:
        transport.close()
