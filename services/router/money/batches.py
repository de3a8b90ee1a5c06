"""Scripts that wait at the same time go to the ledger together: one write, one read, few fsyncs.

While a batch is on its way the next one gathers, so a lone call goes out at once and a crowd
shares its round trips. A caller that goes away leaves its call in the batch: what it sent
happens, and its reply goes to nobody.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import hiredis
from redis.asyncio import Redis
from redis.commands.core import AsyncScript
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from services.router.money.line import Line, Outcome
from services.router.money.metrics import LedgerMetrics
from services.router.tasks import OwnedTasks
from tidemill.errors import LedgerUnavailable

Part = str | bytes | int

_AT_ONCE = 2  # batches on their way: the ledger works on one while this router reads another
_MOST_CALLS = 16  # in a batch: two of a crowd's, not one with all of it and nothing beside


def unavailable(cause: BaseException) -> LedgerUnavailable:
    """What a caller is told when the ledger did not answer."""
    error = LedgerUnavailable("the ledger does not answer; nothing was charged", retry_after_s=1.0)
    error.__cause__ = cause
    return error


@dataclass(slots=True, eq=False)
class _Call:
    script: AsyncScript
    keys: Sequence[str]
    arguments: Sequence[Part]
    durably: bool
    reply: asyncio.Future[Any]
    whole: bool = False  # the script itself goes: the server does not know it

    def packed(self) -> bytes:
        script = self.script
        named = ("EVAL", str(script.script)) if self.whole else ("EVALSHA", script.sha)
        return _pack(*named, len(self.keys), *self.keys, *self.arguments)

    def answer(self, reply: object) -> None:
        if self.reply.done():
            return
        if isinstance(reply, BaseException):
            self.reply.set_exception(unavailable(reply))
        else:
            self.reply.set_result(reply)


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    calls: Sequence[_Call]
    begun: float

    @property
    def is_durable(self) -> bool:
        return any(call.durably for call in self.calls)


class Batches:
    """`can_wait`: the server knows WAITAOF."""

    def __init__(
        self, redis: Redis, tasks: OwnedTasks, *, timeout_s: float, metrics: LedgerMetrics
    ) -> None:
        self._wait_ms = int(timeout_s * 1000)
        self._metrics = metrics
        self._waiting: list[_Call] = []
        self._sent: dict[Line, _Batch] = {}
        self._free = [
            Line(redis, tasks, timeout_s=timeout_s, done=self._done) for _ in range(_AT_ONCE)
        ]
        self._lines = tuple(self._free)
        self.can_wait = False

    def send(
        self, script: AsyncScript, keys: Sequence[str], arguments: Sequence[Part], *, durably: bool
    ) -> asyncio.Future[Any]:
        """The script's reply; LedgerUnavailable if none comes. It is sent now if it can be."""
        reply = asyncio.get_running_loop().create_future()
        self._waiting.append(_Call(script, keys, arguments, durably and self.can_wait, reply))
        if self._free:
            self._send_next(self._free.pop())
        return reply

    async def close(self, wait_s: float) -> None:
        """Give what is on its way so many seconds, then hang up."""
        calls = [*self._waiting, *(call for batch in self._sent.values() for call in batch.calls)]
        if replies := [call.reply for call in calls if not call.reply.done()]:
            await asyncio.wait(replies, timeout=wait_s)
        for line in self._lines:
            line.close()

    def _send_next(self, line: Line) -> None:
        """What waits, if anything does: the line was taken for it."""
        if not self._waiting:
            self._free.append(line)
            return
        calls = self._waiting[:_MOST_CALLS]
        del self._waiting[:_MOST_CALLS]
        self._send(line, calls)

    def _send(self, line: Line, calls: Sequence[_Call]) -> None:
        batch = self._sent[line] = _Batch(calls, time.monotonic())
        packed = [call.packed() for call in calls]
        if batch.is_durable:  # for what was written on the same connection before it
            packed.append(_pack("WAITAOF", 1, 0, self._wait_ms))
        line.ask(b"".join(packed), len(packed))

    def _done(self, line: Line, outcome: Outcome) -> None:
        batch = self._sent.pop(line)
        replies = _on_disk(outcome) if batch.is_durable else outcome
        if isinstance(replies, asyncio.CancelledError):
            self._answer(batch.calls, replies)
        elif isinstance(replies, BaseException):
            self._metrics.failed()
            # Those that came meanwhile have waited for the same silence.
            waiting, self._waiting = self._waiting, []
            self._answer([*batch.calls, *waiting], replies)
        else:
            self._metrics.answered(time.monotonic() - batch.begun)
            if unknown := self._answer_known(batch.calls, replies):
                self._send(line, unknown)
                return
        # Those just answered often have a next call, which goes with what waited meanwhile:
        # else many small crowds would take turns for ever, each with an fsync of its own.
        asyncio.get_running_loop().call_soon(self._send_next, line)

    def _answer_known(self, calls: Sequence[_Call], replies: Sequence[Any]) -> list[_Call]:
        """Answer; those whose script the server has forgotten are returned, to be sent with it."""
        unknown = []
        for call, reply in zip(calls, replies, strict=False):  # WAITAOF's has no call
            if isinstance(reply, RedisError) and str(reply).startswith("NOSCRIPT"):
                call.whole = True
                unknown.append(call)
            else:
                call.answer(reply)
        return unknown

    @staticmethod
    def _answer(calls: Sequence[_Call], error: BaseException) -> None:
        for call in calls:
            call.answer(error)


def _pack(*parts: Part) -> bytes:
    packed: bytes = hiredis.pack_command(parts)  # type: ignore[arg-type]  # the stub wants one part
    return packed


def _on_disk(outcome: Outcome) -> Outcome:
    """The outcome of a batch that ends with WAITAOF: no reply is good before that one is."""
    if isinstance(outcome, BaseException):
        return outcome
    waited = outcome[-1]
    if isinstance(waited, RedisError):
        return waited
    if waited[0] == 0:
        return RedisTimeoutError("WAITAOF: not on the disk in time")
    return outcome
