"""Other workers, as far as they hold blocks that this one wants."""

from collections import OrderedDict
from collections.abc import Callable

import grpc

from tidemill.api.common.v1.lifecycle_pb2 import KvPeer
from tidemill.kv.cache_client import CacheClient, CacheClientConfig

MOST_PEERS = 64

Connect = Callable[[str, str], grpc.aio.Channel]


class KvPeers:
    """Clients by address, opened when first needed; beyond MOST_PEERS the longest unused closes.

    `connect(address, role)` opens a channel to a worker whose certificate must have that role.
    """

    def __init__(self, connect: Connect, config: CacheClientConfig) -> None:
        self._connect = connect
        self._config = config
        self._clients: OrderedDict[tuple[str, str], CacheClient] = OrderedDict()

    async def at(self, peer: KvPeer) -> CacheClient:
        """The client of one worker."""
        key = (peer.address, peer.role)
        client = self._clients.get(key)
        if client is None:
            channel = self._connect(peer.address, peer.role)
            client = self._clients[key] = CacheClient(channel, self._config, peer=True)
        self._clients.move_to_end(key)
        if len(self._clients) > MOST_PEERS:
            _, unused = self._clients.popitem(last=False)
            await unused.close()
        return client

    async def close(self) -> None:
        """Close all."""
        while self._clients:
            _, client = self._clients.popitem()
            await client.close()
