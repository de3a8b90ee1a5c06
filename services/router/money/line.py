"""A connection to the ledger that one batch of commands after the other goes over.

redis-py opens it, with all that its address says; from then on the socket is ours. A batch is
written in the caller's own step and its replies are handed on in the step that reads them, where
redis-py takes some ten turns of the event loop: the caller may be a request that waits for nothing
else.
"""

import asyncio
from collections.abc import Callable
from typing import Any, cast

import hiredis
from redis.asyncio import Connection, Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import InvalidResponse, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from services.router.money.patience import Alarm
from services.router.tasks import OwnedTasks

# A reply for each command, errors among them, or why there are none.
Outcome = list[Any] | BaseException

_MORE = object()


class Line(asyncio.Protocol):
    """Asks one batch at a time and hands `done` its outcome; opened when first used.

    A batch is sent once more where the connection is lost before all its replies came. After
    `timeout_s` seconds of silence it has failed, and the connection with it.
    """

    def __init__(
        self,
        redis: Redis,
        tasks: OwnedTasks,
        *,
        timeout_s: float,
        done: Callable[["Line", Outcome], None],
    ) -> None:
        self._redis = redis
        self._tasks = tasks
        self._timeout_s = timeout_s
        self._done = done
        self._transport: asyncio.Transport | None = None
        self._writer: asyncio.StreamWriter | None = None  # it would close what it was made for
        self._opening: asyncio.Task[None] | None = None
        self._packed = b""
        self._num_due = 0
        self._replies: list[Any] = []
        self._is_repeated = False
        self._alarm: Alarm | None = None

    def ask(self, packed: bytes, num_replies: int) -> None:
        """Send the commands at once, or as soon as there is a connection; none may be under way."""
        assert not self._num_due
        self._packed, self._num_due = packed, num_replies
        self._is_repeated = False
        self._send()

    def close(self) -> None:
        """Drop the connection; a batch under way ends in CancelledError."""
        self._fail(asyncio.CancelledError())

    def data_received(self, data: bytes) -> None:
        """Some of the replies."""
        self._reader.feed(data)
        while (reply := self._reader.gets()) is not _MORE:
            if not isinstance(reply, hiredis.PushNotification):
                assert self._num_due, "a reply to nothing"
                self._replies.append(reply)
                if len(self._replies) == self._num_due:
                    self._finish(self._replies)

    def connection_lost(self, error: Exception | None) -> None:
        """By the server, or by `_fail`, which leaves nothing under way."""
        self._transport = None
        if not self._num_due:
            return
        if self._is_repeated:
            self._finish(error or RedisConnectionError("the server hung up"))
        else:
            self._is_repeated = True
            self._send()

    def _send(self) -> None:
        self._replies = []
        if self._transport is None or self._transport.is_closing():
            self._opening = self._tasks.spawn(self._open(), name="ledger")
        else:
            self._write(self._transport)

    def _write(self, transport: asyncio.Transport) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm = Alarm(self._timeout_s, self._be_silent)
        transport.write(self._packed)

    async def _open(self) -> None:
        make: Callable[[], Connection] = self._redis.connection_pool.make_connection
        connection: Any = make()
        try:
            await connection.connect()
        except (RedisError, OSError) as error:
            self._finish(error)
            return
        except asyncio.CancelledError as error:
            if self._opening is asyncio.current_task():  # not `close`, which has said so
                self._finish(error)
            raise
        writer, connection._writer, connection._reader = connection._writer, None, None
        assert writer is not None
        self._writer, transport = writer, cast(asyncio.Transport, writer.transport)
        self._reader = hiredis.Reader(
            protocolError=InvalidResponse, replyError=ResponseError, notEnoughData=_MORE
        )
        transport.set_protocol(self)
        self._transport = transport
        self._write(transport)

    def _be_silent(self) -> None:
        self._fail(RedisTimeoutError("the ledger did not reply in time"))

    def _fail(self, error: BaseException) -> None:
        transport, self._transport = self._transport, None
        opening, self._opening = self._opening, None
        if transport is not None:
            transport.abort()
        if opening is not None:
            opening.cancel()
        if self._num_due:
            self._finish(error)

    def _finish(self, outcome: Outcome) -> None:
        self._num_due = 0
        if self._alarm is not None:
            self._alarm.cancel()
        self._done(self, outcome)
