"""The connection to the ledger Redis: commands that a cancelled call cannot tear.

redis-py leaves a connection one reply behind when a command is cancelled between request and
reply, so every command runs in a task of its own and callers only wait for it.
"""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.commands.core import AsyncScript
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from services.router.config import LedgerConfig
from services.router.tasks import OwnedTasks
from tidemill.errors import ConfigError, LedgerUnavailable

T = TypeVar("T")

REQUIRED_SETTINGS = {
    "maxmemory-policy": "noeviction",
    "appendonly": "yes",
    "appendfsync": "always",
}
_SCRIPTS = Path(__file__).parent


class Ledger:
    """One pool of connections to the ledger; raises LedgerUnavailable when it does not answer."""

    def __init__(self, config: LedgerConfig, tasks: OwnedTasks) -> None:
        pool = BlockingConnectionPool.from_url(
            config.url,
            max_connections=config.max_connections,
            timeout=config.timeout_s,
            socket_timeout=config.timeout_s,
            socket_connect_timeout=config.timeout_s,
            retry=Retry(NoBackoff(), 1, supported_errors=(RedisConnectionError,)),  # for stale ones
            decode_responses=False,
        )
        self._redis: Redis = Redis(connection_pool=pool)
        self._tasks = tasks

    async def run(self, command: Callable[[Redis], Awaitable[T]]) -> T:
        """Run `command` to its end even if the caller is cancelled meanwhile."""
        return await asyncio.shield(self._tasks.spawn(self._guarded(command), name="ledger"))

    def script(self, name: str) -> AsyncScript:
        """The Lua script `name`.lua of this folder, for use inside `run`."""
        source = (_SCRIPTS / f"{name}.lua").read_text(encoding="utf-8")
        script: AsyncScript = self._redis.register_script(source)
        return script

    async def check_settings(self) -> None:
        """Refuse a Redis that may lose or evict money; ConfigError names the setting.

        ConfigError too, with what Redis said, when it does not let this router in.
        """
        try:
            found = await self.run(_settings)
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

    async def close(self) -> None:
        """Close every connection."""
        await self._redis.aclose(close_connection_pool=True)

    async def _guarded(self, command: Callable[[Redis], Awaitable[T]]) -> T:
        try:
            return await command(self._redis)
        except (RedisError, OSError) as error:
            raise LedgerUnavailable(
                "the ledger does not answer; nothing was charged", retry_after_s=1.0
            ) from error


async def _settings(redis: Redis) -> dict[str, str]:
    answer: dict[Any, Any] = await redis.config_get(*REQUIRED_SETTINGS)
    return {_text(name): _text(value) for name, value in answer.items()}


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


class LedgerProbe:
    """Asks the ledger every `period_s` seconds whether it is there."""

    def __init__(self, ledger: Ledger, *, period_s: float = 0.5) -> None:
        self._ledger = ledger
        self._period_s = period_s
        self.answers = True

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                await self._ledger.run(lambda redis: redis.ping())
                self.answers = True
            except LedgerUnavailable:
                self.answers = False
            await asyncio.sleep(self._period_s)
