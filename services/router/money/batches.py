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

from redis.asyncio import Redis
from redis.commands.core import AsyncScript
from redis.exceptions import NoScriptError, RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

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


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    script: AsyncScript
    keys: Sequence[str]
    arguments: Sequence[Part]
    durably: bool
    reply: asyncio.Future[Any]

    def answer(self, reply: object) -> None:
        if self.reply.done():
            return
        if isinstance(reply, BaseException):
            self.reply.set_exception(unavailable(reply))
        else:
            self.reply.set_result(reply)


class Batches:
    """`can_wait`: the server knows WAITAOF."""

    def __init__(
        self, redis: Redis, tasks: OwnedTasks, *, timeout_s: float, metrics: LedgerMetrics
    ) -> None:
        self._redis = redis
        self._tasks = tasks
        self._wait_ms = int(timeout_s * 1000)
        self._metrics = metrics
        self._waiting: list[_Call] = []
        self._senders = 0
        self.can_wait = False

    async def run(
        self, script: AsyncScript, keys: Sequence[str], arguments: Sequence[Part], *, durably: bool
    ) -> Any:
        """The script's reply; LedgerUnavailable if none came."""
        reply = asyncio.get_running_loop().create_future()
        self._waiting.append(_Call(script, keys, arguments, durably and self.can_wait, reply))
        if self._senders < _AT_ONCE:
            self._add_sender()
        return await reply

    def _add_sender(self) -> None:
        self._senders += 1
        sender = self._tasks.spawn(self._send_all(), name="ledger")
        sender.add_done_callback(self._remove_sender)

    def _remove_sender(self, _: "asyncio.Task[None]") -> None:
        self._senders -= 1
        if self._waiting and not self._senders:  # it was cancelled, and those who wait are not
            self._add_sender()

    async def _send_all(self) -> None:
        while self._waiting:
            batch = self._waiting[:_MOST_CALLS]
            del self._waiting[:_MOST_CALLS]
            await self._send(batch)
            # Those just answered often have a next call, which goes with what waited meanwhile:
            # else many small crowds would take turns for ever, each with an fsync of its own.
            await asyncio.sleep(0)

    async def _send(self, batch: Sequence[_Call]) -> None:
        begun = time.monotonic()
        try:
            replies = await self._execute(batch)
            self._metrics.answered(time.monotonic() - begun)
        except (RedisError, OSError) as error:
            self._metrics.failed()
            # Those that came meanwhile have waited for the same silence.
            batch = [*batch, *self._waiting]
            self._waiting.clear()
            replies = [error] * len(batch)
        except asyncio.CancelledError as error:
            for call in batch:
                call.answer(error)
            raise
        for call, reply in zip(batch, replies, strict=True):
            call.answer(reply)

    async def _execute(self, batch: Sequence[_Call]) -> list[Any]:
        replies = await self._pipeline(batch)
        forgotten = [at for at, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
        if forgotten:
            for script in {batch[at].script for at in forgotten}:
                await self._redis.script_load(script.script)
            again = await self._pipeline([batch[at] for at in forgotten])
            for at, reply in zip(forgotten, again, strict=True):
                replies[at] = reply
        return replies

    async def _pipeline(self, batch: Sequence[_Call]) -> list[Any]:
        pipeline = self._redis.pipeline(transaction=False)
        for call in batch:
            pipeline.evalsha(call.script.sha, len(call.keys), *call.keys, *call.arguments)
        if not any(call.durably for call in batch):
            return await pipeline.execute(raise_on_error=False)
        # For what was written on the same connection before it.
        pipeline.execute_command("WAITAOF", 1, 0, self._wait_ms)
        *replies, waited = await pipeline.execute(raise_on_error=False)
        if isinstance(waited, RedisError):
            raise waited
        if waited[0] == 0:
            raise RedisTimeoutError("WAITAOF: not on the disk in time")
        return replies
