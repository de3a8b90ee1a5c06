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


class _Socket(asyncio.Protocol):
    """One connection of a line, which hears nothing more of it once it has left it."""

    def __init__(self, line: "Line", writer: asyncio.StreamWriter) -> None:
        self._line: Line | None = line
        self._writer = writer  # it would close what it was made for
        self._transport = cast(asyncio.Transport, writer.transport)
        self._transport.set_protocol(self)
        self._reader = hiredis.Reader(
            protocolError=InvalidResponse, replyError=ResponseError, notEnoughData=_MORE
        )

    @property
    def is_open(self) -> bool:
        """False as soon as the other side has closed, before `connection_lost` tells."""
        return not self._transport.is_closing()

    def write(self, packed: bytes) -> None:
        self._transport.write(packed)

    def leave(self) -> None:
        """Close at once; the line hears nothing more."""
        self._line = None
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        """Some of the replies."""
        self._reader.feed(data)
        while self._line is not None and (reply := self._reader.gets()) is not _MORE:
            if not isinstance(reply, hiredis.PushNotification):
                self._line.replied(reply)

    def connection_lost(self, error: Exception | None) -> None:
        """By the server, or for what it sent."""
        if self._line is not None:
            self._line.lost(error)


class Line:
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
        # One of the two, or none: a batch on two connections has twice its replies.
        self._socket: _Socket | None = None
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

    def replied(self, reply: object) -> None:
        """To one of the commands, by the present connection."""
        assert self._num_due, "a reply to nothing"
        self._replies.append(reply)
        if len(self._replies) == self._num_due:
            self._finish(self._replies)

    def lost(self, error: Exception | None) -> None:
        """The present connection."""
        self._hang_up()
        if not self._num_due:
            return
        if self._is_repeated:
            self._finish(error or RedisConnectionError("the server hung up"))
        else:
            self._is_repeated = True
            self._send()

    def _send(self) -> None:
        self._replies = []
        if self._socket is not None and self._socket.is_open:
            self._write(self._socket)
        else:
            self._hang_up()
            self._opening = self._tasks.spawn(self._open(), name="ledger")

    def _write(self, socket: _Socket) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm = Alarm(self._timeout_s, self._be_silent)
        socket.write(self._packed)

    async def _open(self) -> None:
        make: Callable[[], Connection] = self._redis.connection_pool.make_connection
        connection: Any = make()
        try:
            await connection.connect()
        except (RedisError, OSError) as error:
            self._opening = None
            self._finish(error)
            return
        except asyncio.CancelledError as error:
            if self._opening is asyncio.current_task():  # not by `_hang_up`
                self._opening = None
                self._finish(error)
            raise
        writer, reader = connection._writer, connection._reader
        connection._writer = connection._reader = None
        self._opening = None
        self._socket = _Socket(self, writer)
        if reader.at_eof() or not self._socket.is_open:  # of which it will not be told again
            self.lost(None)
        else:
            self._write(self._socket)

    def _be_silent(self) -> None:
        self._fail(RedisTimeoutError("the ledger did not reply in time"))

    def _fail(self, error: BaseException) -> None:
        self._hang_up()
        if self._num_due:
            self._finish(error)

    def _hang_up(self) -> None:
        socket, self._socket = self._socket, None
        opening, self._opening = self._opening, None
        if socket is not None:
            socket.leave()
        if opening is not None:
            opening.cancel()

    def _finish(self, outcome: Outcome) -> None:
        self._num_due = 0
        if self._alarm is not None:
            self._alarm.cancel()
        self._done(self, outcome)
