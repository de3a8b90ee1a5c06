"""Following which KV blocks a worker holds, into the router's prefix index."""

import asyncio
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

import grpc

from tidemill.api.worker.v1 import worker_service_pb2 as pb
from tidemill.policy import KvChange, PrefixIndex

if TYPE_CHECKING:  # the name exists in the stubs alone
    from tidemill.api.worker.v1.worker_service_pb2_grpc import WorkerServiceAsyncStub

_AGAIN_S = 0.2

logger = logging.getLogger(__name__)


async def watch_kv(stub: "WorkerServiceAsyncStub", worker_id: str, index: PrefixIndex) -> None:
    """Keep the index true to the worker until cancelled, or if it has no such method.

    A stream that ends, or in which messages are missing, is resumed after what was heard.
    """
    while True:
        try:
            async for message in stub.WatchKv(_request(index, worker_id)):
                if not index.hear(
                    worker_id,
                    _changes(message),
                    epoch=message.epoch,
                    sequence=message.sequence,
                    resets=message.resets,
                ):
                    logger.warning("KV events are missing", extra={"worker_id": worker_id})
                    break
        except grpc.aio.AioRpcError as error:
            if error.code() == grpc.StatusCode.UNIMPLEMENTED:
                return
        await asyncio.sleep(_AGAIN_S)


def _request(index: PrefixIndex, worker_id: str) -> pb.WatchKvRequest:
    heard = index.heard(worker_id)
    if heard is None:
        return pb.WatchKvRequest()
    epoch, sequence = heard
    return pb.WatchKvRequest(epoch=epoch, after_sequence=sequence)


def _changes(message: pb.WatchKvResponse) -> Iterator[KvChange]:
    for change in message.changes:
        if change.tier in (pb.KV_TIER_DEVICE, pb.KV_TIER_HOST):
            host = change.tier == pb.KV_TIER_HOST
            yield KvChange(list(change.blocks), host=host, removed=change.removed)
