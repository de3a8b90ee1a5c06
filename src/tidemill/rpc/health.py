"""grpc.health.v1, with the answer taken from a readiness function (R2).

Our own servicer rather than grpcio-health-checking's: that one sends to its watchers under the lock
which a change of status needs, so one watcher that does not read would freeze the answer to all.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

Readiness = Callable[[], str | None]

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
_LAST_WORD_S = 0.05  # for NOT_SERVING to reach those who watch

logger = logging.getLogger(__name__)


class Health(health_pb2_grpc.HealthServicer):
    """Check, List and Watch for "" and the services named at the start."""

    def __init__(self, readiness: Readiness) -> None:
        self._readiness = readiness
        self._names = {""}
        self._reason: str | None = "starting"
        self._turned = asyncio.Event()  # a new one after each change
        self._drained = asyncio.Event()

    def start(self, names: Sequence[str]) -> None:
        """Answer for these services too, from now on."""
        self._names.update(names)
        self.refresh()

    async def follow(self, period_s: float) -> None:
        """Ask `readiness` every `period_s` seconds, until cancelled."""
        while True:
            await asyncio.sleep(period_s)
            self.refresh()

    def refresh(self) -> None:
        """Ask `readiness` now."""
        self._become(self._ask())

    async def end(self) -> None:
        """Tell everyone NOT_SERVING, then end the watches: they would outlast any drain."""
        self._become("stopping")
        await asyncio.sleep(_LAST_WORD_S)
        self._drained.set()

    async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802 - gRPC's name
        """The status; NOT_FOUND for a service that this port does not have."""
        if request.service not in self._names:
            await context.abort(grpc.StatusCode.NOT_FOUND, "there is no such service here")
        return health_pb2.HealthCheckResponse(status=self._status(request.service))

    async def List(self, request: Any, context: Any) -> Any:  # noqa: ARG002, N802 - gRPC's name
        """The status of each; asked for only where grpc.health.v1 is new enough to have it."""
        each = {
            name: health_pb2.HealthCheckResponse(status=self._status(name)) for name in self._names
        }
        return health_pb2.HealthListResponse(statuses=each)  # type: ignore[attr-defined]  # newer than the stubs

    async def Watch(self, request: Any, context: Any) -> None:  # noqa: N802 - gRPC's name
        """Stream the status until the caller leaves or the server drains."""
        watching = asyncio.ensure_future(self._tell(request.service, context))
        drained = asyncio.ensure_future(self._drained.wait())
        try:
            await asyncio.wait({watching, drained}, return_when=asyncio.FIRST_COMPLETED)
            if watching.done():
                await watching  # raises what ended it
        finally:
            watching.cancel()
            drained.cancel()

    async def _tell(self, service: str, context: Any) -> None:
        told = None
        while True:
            turned, status = self._turned, self._status(service)
            if status != told:
                await context.write(health_pb2.HealthCheckResponse(status=status))
                told = status
            await turned.wait()

    def _status(self, service: str) -> Any:
        if service not in self._names:
            return _UNKNOWN
        return _NOT_SERVING if self._reason else _SERVING

    def _become(self, reason: str | None) -> None:
        if reason != self._reason:
            logger.info("not ready" if reason else "ready", extra={"why": reason})
        self._reason = reason
        turned, self._turned = self._turned, asyncio.Event()
        turned.set()

    def _ask(self) -> str | None:
        try:
            return self._readiness()
        except Exception as error:  # a readiness check that breaks is an answer: not ready
            if self._reason != repr(error):
                logger.exception("readiness check failed")
            return repr(error)
