"""The worker's entry in the registry: a Redis hash that lives as long as its heartbeat."""

import asyncio
import logging
import time
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    NoPermissionError,
    RedisError,
)

from tidemill.errors import ConfigError
from tidemill.worker.config import RegistryConfig
from tidemill.worker.metrics import WorkerMetrics
from tidemill.worker.worker import Worker

INDEX_KEY = "tm:workers"
_FORGET_AFTER_MS = 86_400_000

logger = logging.getLogger(__name__)


def registry_key(worker_id: str) -> str:
    """Where a worker's entry lies."""
    return f"tm:worker:{worker_id}"


class Registration:
    """Writes tm:worker:{id} every `heartbeat_s`, expiring after `ttl_s`. Redis may come and go.

    Fields: address, role, model, epoch (decimal), draining ("0" or "1"), version. The sorted set
    tm:workers lists the ids by their last beat in milliseconds, so that nobody need scan for them.
    """

    def __init__(
        self,
        worker: Worker,
        config: RegistryConfig,
        redis: "Redis",
        *,
        address: str,
        metrics: WorkerMetrics,
    ) -> None:
        self._worker = worker
        self._config = config
        self._redis = redis
        self._address = address
        self._metrics = metrics

    async def run(self) -> None:
        """Beat until cancelled."""
        while True:
            await self.beat()
            await asyncio.sleep(self._config.heartbeat_s)

    async def begin(self) -> None:
        """Beat once. Redis being away is no error; Redis refusing us is a ConfigError."""
        try:
            await self._write()
        except (AuthenticationError, AuthorizationError, NoPermissionError) as error:
            raise ConfigError(f"the registry's Redis refuses: {error}") from error
        except (RedisError, OSError) as error:
            self._missed(error)
        else:
            self._note(True, "")

    async def beat(self) -> bool:
        """Write the entry once; returns whether Redis took it."""
        try:
            await self._write()
        except (RedisError, OSError) as error:
            self._missed(error)
            return False
        self._note(True, "")
        return True

    async def _write(self) -> None:
        key = registry_key(self._worker.worker_id)
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.hset(key, mapping=self._fields())
            pipe.pexpire(key, round(self._config.ttl_s * 1000))
            now_ms = time.time_ns() // 1_000_000
            pipe.zadd(INDEX_KEY, {self._worker.worker_id: now_ms})
            pipe.zremrangebyscore(INDEX_KEY, "-inf", now_ms - _FORGET_AFTER_MS)
            await pipe.execute()

    def _missed(self, error: Exception) -> None:
        self._metrics.registry_errors.inc()
        self._note(False, str(error))

    async def remove(self) -> None:
        """Take the entry out at a clean stop, if Redis is there."""
        try:
            await self._redis.zrem(INDEX_KEY, self._worker.worker_id)
            await self._redis.delete(registry_key(self._worker.worker_id))
        except (RedisError, OSError):
            self._metrics.registry_errors.inc()

    def _fields(self) -> dict[Any, Any]:
        description = self._worker.describe()
        return {
            "address": self._address,
            "role": self._worker.role.value,
            "model": description.model,
            "epoch": str(description.epoch),
            "draining": "1" if self._worker.draining else "0",
            "version": description.version,
        }

    def _note(self, reached: bool, why: str) -> None:
        if reached != self._worker.registered:
            self._worker.registered = reached
            logger.log(
                logging.INFO if reached else logging.WARNING,
                "registered" if reached else "registry away",
                extra={"why": why},
            )
