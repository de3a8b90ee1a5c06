"""The way to the cache's Redis, which may be away at any time."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar
from urllib.parse import urlsplit

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    NoPermissionError,
    RedisError,
    ResponseError,
)

from tidemill.errors import ConfigError
from tidemill.kv.breaker import Breaker

T = TypeVar("T")

logger = logging.getLogger(__name__)

RECHECK_S = 1.0
MOST_RECHECK_S = 30.0  # for a Redis that answers pings and fails commands
MAX_CONNECTIONS = 16


class RedisLink:
    """Runs commands while Redis answers; while it does not, each is skipped at once.

    The first failure marks the link down and is logged once; from then on one ping a second
    decides. No command is repeated here: whoever sends one knows whether that is safe.
    """

    def __init__(
        self, url: str, timeout_s: float, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._url = url
        self._breaker = Breaker(RECHECK_S, MOST_RECHECK_S, clock=clock)
        self._commands: set[asyncio.Task[object]] = set()
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=MAX_CONNECTIONS,
            timeout=timeout_s,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),
        )
        self._redis: Redis = Redis.from_pool(pool)
        self.up = False

    async def start(self) -> None:
        """Look once. Redis being away is no error; Redis refusing us is a ConfigError."""
        try:
            await self._redis.ping()
        except (AuthenticationError, AuthorizationError, NoPermissionError, ResponseError) as error:
            raise ConfigError(f"Redis at {self.place} refuses: {error}") from error
        except (RedisError, OSError) as error:
            self._went_down(error)
            return
        self.up = True
        await self._warn_unless_evicting()

    async def run(self, command: Callable[[Redis], Awaitable[T]]) -> T | None:
        """The command's result, or None when Redis is away.

        The command is finished even if the caller is cancelled: half-read replies are how one
        caller gets another's data.
        """
        if not self.up:
            return None
        task: asyncio.Task[T | None] = asyncio.ensure_future(self._attempt(command))
        self._commands.add(task)
        task.add_done_callback(self._commands.discard)
        return await asyncio.shield(task)

    async def check(self) -> None:
        """While down, see whether Redis is back; at most one ping a second."""
        if self.up or not self._breaker.admits():
            return
        try:
            await self._redis.ping()
        except (RedisError, OSError):
            return
        self.up = True
        logger.info("redis is back", extra={"redis": self.place})

    async def close(self) -> None:
        """Finish what runs and close the connections."""
        await asyncio.gather(*self._commands, return_exceptions=True)
        await self._redis.aclose()
        await self._redis.connection_pool.disconnect()

    @property
    def place(self) -> str:
        """The URL without its credentials."""
        parts = urlsplit(self._url)
        host = parts.netloc.rpartition("@")[2]
        return f"{parts.scheme}://{host}{parts.path}"

    async def _attempt(self, command: Callable[[Redis], Awaitable[T]]) -> T | None:
        try:
            result = await command(self._redis)
        except (RedisError, OSError) as error:
            self._went_down(error)
            return None
        self._breaker.succeeded()
        return result

    def _went_down(self, error: Exception) -> None:
        if self.up or self._breaker.closed:
            logger.warning(
                "redis is away: serving from memory only",
                extra={"redis": self.place, "cause": type(error).__name__, "detail": str(error)},
            )
        self.up = False
        self._breaker.failed()

    async def _warn_unless_evicting(self) -> None:
        try:
            policy = (await self._redis.info("memory")).get("maxmemory_policy")
        except (RedisError, OSError):
            return
        if policy == "noeviction":
            logger.warning(
                "the cache's redis never evicts: a full one will refuse the index",
                extra={"redis": self.place, "expected": "allkeys-lru"},
            )
