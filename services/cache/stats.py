"""Hit statistics by tenant and model: counted here, summed over all nodes in Redis.

tm:cache:stats   hash: '["<tenant>", "<model>", "<counter>"]' -> count, and for each life of
                 a node '["<sender>"]' -> number of the last batch that it added
"""

import asyncio
import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Literal

from redis.asyncio import Redis

from services.cache.redis_link import RedisLink

Counted = Literal["queried", "found", "delivered", "failed", "stored"]
Row = tuple[str, str]
Rows = dict[Row, dict[str, int]]
_Batch = tuple[int, list[str | int]]

_KEY = "tm:cache:stats"
_COUNT = Path(__file__).with_name("count.lua").read_text(encoding="utf-8")
_BATCH = 3000  # counters a batch: a script's arguments are bounded


class StatsBook:
    """Counters of this life of this node, and of all nodes where Redis answers.

    A batch that may or may not have arrived is sent again under its number until Redis has
    answered, so a broken connection neither loses nor doubles a count.
    """

    def __init__(self, link: RedisLink | None, sender: str) -> None:
        self._link = link
        self._sender = json.dumps([sender])
        self._local: Counter[tuple[str, str, str]] = Counter()
        self._pending: Counter[tuple[str, str, str]] = Counter()
        self._sent: _Batch | None = None
        self._number = 0
        self._flushing = asyncio.Lock()

    def count(self, row: Row, counter: Counted, number: int = 1) -> None:
        """Add to one counter of a (tenant, model)."""
        if number:
            self._local[*row, counter] += number
            self._pending[*row, counter] += number

    @property
    def unsent(self) -> bool:
        """Whether something counted here is not in Redis yet."""
        return self._sent is not None or bool(self._pending)

    async def flush(self) -> None:
        """Add what was counted to Redis; without Redis it waits here."""
        if self._link is None:
            self._pending.clear()
            return
        async with self._flushing:
            while self._link.up and self.unsent:
                batch = self._sent = self._sent or self._next_batch()
                if await self._link.run(partial(self._add, batch=batch)) is None:
                    return
                self._sent = None

    async def rows(self, tenant_id: str | None = None) -> Rows:
        """Counters by (tenant, model): of all nodes, or of this one alone while Redis is away."""
        await self.flush()
        shared = None if self._link is None else await self._link.run(_read)
        counts = dict(self._local) if shared is None else shared
        rows: Rows = {}
        for (tenant, model, counter), number in sorted(counts.items()):
            if tenant_id in (None, tenant):
                rows.setdefault((tenant, model), {})[counter] = number
        return rows

    def _next_batch(self) -> _Batch:
        self._number += 1
        fields: list[str | int] = []
        for key in list(self._pending)[:_BATCH]:
            fields += [json.dumps(key), self._pending.pop(key)]
        return self._number, fields

    async def _add(self, redis: Redis, batch: _Batch) -> bool:
        number, fields = batch
        await redis.eval(_COUNT, 1, _KEY, self._sender, number, *fields)
        return True


async def _read(redis: Redis) -> dict[tuple[str, str, str], int]:
    counts: dict[tuple[str, str, str], int] = {}
    for field, number in (await redis.hgetall(_KEY)).items():
        match json.loads(field):
            case [tenant, model, counter]:
                counts[tenant, model, counter] = int(number)
    return counts
