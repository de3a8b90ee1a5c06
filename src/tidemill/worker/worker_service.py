"""WorkerService: what a worker is, its load as it changes, and which KV blocks it holds."""

import asyncio
import time
from collections.abc import AsyncIterator

from tidemill.api.worker.v1 import worker_service_pb2 as pb
from tidemill.api.worker.v1.worker_service_pb2_grpc import WorkerServiceServicer
from tidemill.rpc.interceptors import Context
from tidemill.rpc.validation import validate
from tidemill.worker.worker import Worker

DEFAULT_INTERVAL_MS = 100
MAX_SILENCE_S = 1.0
KV_INTERVAL_S = 0.05


class WorkerService(WorkerServiceServicer):
    """Serves DescribeWorker, WatchLoad and WatchKv for one worker."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    async def DescribeWorker(
        self, request: pb.DescribeWorkerRequest, context: Context
    ) -> pb.DescribeWorkerResponse:
        """What the worker is."""
        return self._worker.describe()

    async def WatchLoad(
        self, request: pb.WatchLoadRequest, context: Context
    ) -> AsyncIterator[pb.WatchLoadResponse]:
        """The load now, then whenever it changed, and at least each second; ends when draining.

        Passing time alone is no change, nor is a new pace.
        """
        validate(request)
        interval_ms = request.min_interval_ms if request.HasField("min_interval_ms") else 0
        interval_s = (interval_ms or DEFAULT_INTERVAL_MS) / 1000
        sequence = 0
        last: pb.WatchLoadResponse | None = None
        sent_at = 0.0
        while True:
            load = self._worker.load()
            if load != last or time.monotonic() - sent_at >= MAX_SILENCE_S:
                sequence += 1
                last, sent_at = load, time.monotonic()
                hours, pace = self._worker.thread.hours, self._worker.thread.pace
                message = pb.WatchLoadResponse(
                    epoch=self._worker.epoch,
                    sequence=sequence,
                    prefill_busy_us=hours.busy.prefill_ns // 1000,
                    decode_busy_us=hours.busy.decode_ns // 1000,
                    uptime_us=hours.uptime_ns // 1000,
                    prefill_tokens_per_s=pace.prefill_tokens_per_s,
                    decode_step_us=pace.decode_step_us,
                )
                message.MergeFrom(load)
                yield message
            if load.draining:
                return
            await asyncio.sleep(min(interval_s, MAX_SILENCE_S))

    async def WatchKv(
        self, request: pb.WatchKvRequest, context: Context
    ) -> AsyncIterator[pb.WatchKvResponse]:
        """All that the worker holds, or what the caller has missed, then every change.

        Changes of 50 ms go together; ends when draining.
        """
        validate(request)
        epoch = request.epoch if request.HasField("epoch") else None
        sequence = request.after_sequence
        while not self._worker.draining:
            for message in self._worker.kv_events.after(epoch, sequence):
                yield message
                epoch, sequence = message.epoch, message.sequence
            await asyncio.sleep(KV_INTERVAL_S)
