"""The connection to the ledger Redis: commands that a cancelled call cannot tear.

redis-py leaves a connection one reply behind when a command is cancelled between request and
reply, so every command runs in a task of its own and callers only wait for it. Scripts, which is
all that requests wait for, go over `Batches`.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry
from redis.asyncio import BlockingConnectionPool, Connection, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.commands.core import AsyncScript
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from services.router.config import LedgerConfig
from services.router.money.batches import Batches, Part, unavailable
from services.router.money.metrics import LedgerMetrics
from services.router.money.patience import patience
from services.router.tasks import OwnedTasks
from tidemill.errors import ConfigError, LedgerUnavailable

T = TypeVar("T")

REQUIRED_SETTINGS = {
    "maxmemory-policy": "noeviction",
    "appendonly": "yes",
    "appendfsync": "always",
}
_UP_SINCE_S = 7 * 86_400  # when forgotten, the wait after a restart is only repeated


class _Connection(Connection):
    """redis-py's, made safe under uvloop.

    A server that hangs up before a command is written is a lost connection: uvloop raises
    RuntimeError for that, which redis-py does not know. And a reply that came while this process
    stood still is read: redis-py would give it up.
    """

    async def read_response(
        self, disable_decoding: bool = False, timeout: float | None = None, **options: Any
    ) -> Any:
        if timeout is not None or self.socket_timeout is None:
            return await super().read_response(disable_decoding, timeout, **options)
        try:
            async with patience(self.socket_timeout):
                return await super().read_response(disable_decoding, math.inf, **options)
        except TimeoutError as error:
            raise RedisTimeoutError("the ledger did not reply in time") from error

    async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        writer = self._writer
        try:
            await super().send_packed_command(command, check_health)
        except RuntimeError as error:
            if writer is None or not writer.transport.is_closing():
                raise
            await self.disconnect(nowait=True)
            raise RedisConnectionError("the server hung up") from error


class Ledger:
    """One pool of connections to the ledger; raises LedgerUnavailable when it does not answer."""

    def __init__(self, config: LedgerConfig, metrics: LedgerMetrics | None = None) -> None:
        pool = BlockingConnectionPool.from_url(
            config.url,
            connection_class=_Connection,
            max_connections=config.max_connections,
            timeout=config.timeout_s,
            socket_timeout=config.timeout_s,
            socket_connect_timeout=config.timeout_s,
            retry=Retry(NoBackoff(), 1, supported_errors=(RedisConnectionError,)),  # for stale ones
            decode_responses=False,
        )
        self._redis: Redis = Redis(connection_pool=pool)
        self._commands = OwnedTasks()
        self._batches = Batches(
            self._redis,
            self._commands,
            timeout_s=config.timeout_s,
            metrics=metrics or LedgerMetrics(CollectorRegistry()),
        )

    async def run(self, command: Callable[[Redis], Awaitable[T]]) -> T:
        """Run `command` to its end even if the caller is cancelled meanwhile."""
        return await asyncio.shield(self._commands.spawn(self._guarded(command), name="ledger"))

    def script(self, *parts: Path) -> AsyncScript:
        """One Lua script of these files, one after the other, for use inside `run`."""
        source = "\n".join(part.read_text(encoding="utf-8") for part in parts)
        script: AsyncScript = self._redis.register_script(source)
        return script

    async def run_script(
        self,
        script: AsyncScript,
        keys: Sequence[str],
        arguments: Sequence[Part],
        *,
        durably: bool = False,
    ) -> Any:
        """The script's reply; `durably`: not before its effects are on the server's disk.

        AOF `always` sees to that by itself; where the server can be asked (Valkey), it is. A
        caller that is cancelled leaves the script running, as with `run`.
        """
        return await self.send_script(script, keys, arguments, durably=durably)

    def send_script(
        self,
        script: AsyncScript,
        keys: Sequence[str],
        arguments: Sequence[Part],
        *,
        durably: bool = False,
    ) -> asyncio.Future[Any]:
        """As `run_script`, and sent before it returns where nothing else is on its way."""
        return self._batches.send(script, keys, arguments, durably=durably)

    async def up_since_ms(self, now_ms: int) -> int:
        """When a router first reached the ledger's present process; `now_ms` if none did yet.

        Not when that process started: owners cannot renew while it loads its file either.
        """
        return await self.run(lambda redis: _up_since_ms(redis, now_ms))

    async def check_settings(self) -> None:
        """Refuse a Redis that may lose or evict money; ConfigError names the setting.

        ConfigError too, with what Redis said, when it does not let this router in.
        """
        try:
            found = await self.run(_settings)
            self._batches.can_wait = await self.run(_can_wait)
        except LedgerUnavailable as error:
            raise ConfigError(
                f"ledger Redis cannot be used: {error.__cause__}", reason="LEDGER_UNAVAILABLE"
            ) from error
        for name, required in REQUIRED_SETTINGS.items():
            if found.get(name) != required:
                raise ConfigError(
                    f"ledger Redis: {name} is {found.get(name)!r}, must be {required!r}",
                    reason="LEDGER_NOT_DURABLE",
                )

    async def close(self, wait_s: float = 1.0) -> None:
        """Give commands on their way `wait_s` seconds, then close every connection."""
        # One whose connection is closed under it makes another, which nobody would close.
        await asyncio.gather(self._batches.close(wait_s), self._commands.join(wait_s))
        await self._redis.aclose(close_connection_pool=True)

    async def _guarded(self, command: Callable[[Redis], Awaitable[T]]) -> T:
        try:
            return await command(self._redis)
        except (RedisError, OSError) as error:
            raise unavailable(error) from error


async def _can_wait(redis: Redis) -> bool:
    """Whether the server knows WAITAOF: Valkey, whatever it calls itself."""
    server: dict[str, Any] = await redis.info("server")
    return "valkey_version" in server or server.get("server_name") == "valkey"


async def _settings(redis: Redis) -> dict[str, str]:
    answer: dict[Any, Any] = await redis.config_get(*REQUIRED_SETTINGS)
    return {_text(name): _text(value) for name, value in answer.items()}


async def _up_since_ms(redis: Redis, now_ms: int) -> int:
    server: dict[str, Any] = await redis.info("server")
    name = f"tm:up:{server['run_id']}"
    await redis.set(name, now_ms, nx=True, ex=_UP_SINCE_S)
    since = await redis.get(name)
    return now_ms if since is None else int(since)


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
