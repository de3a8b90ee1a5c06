"""Ending a request that another router serves, by a letter to its box in the ledger.

tm:cancel:<router id>   list: `request_key`s of requests that this router is to end

A client's calls go to any of several routers, its stream lies at one. A box that nobody empties
goes a minute after its last letter, as its router has.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from redis.asyncio import Redis

from services.router.admission import request_key
from services.router.money.accounts import Accounts
from services.router.money.ledger import Ledger
from tidemill.billing.ledger import State
from tidemill.errors import LedgerUnavailable

_LOOK_S = 0.2
_AT_ONCE = 100
_KEPT_S = 60


class Cancellations:
    """Letters to other routers, and those to this one."""

    def __init__(self, ledger: Ledger, accounts: Accounts, *, router_id: str) -> None:
        self._ledger = ledger
        self._accounts = accounts
        self._router_id = router_id

    async def send(self, tenant_id: str, request_id: str) -> bool:
        """Have the tenant's request ended where it is served; False if no router serves it.

        LedgerUnavailable when nobody can know.
        """
        request = await self._accounts.request(tenant_id, request_id)
        if request is None or request.state is not State.OPEN or request.owner == self._router_id:
            return False
        box, letter = _box(request.owner), request_key(tenant_id, request_id)
        await self._ledger.run(lambda redis: _post(redis, box, letter))
        return True

    async def run(self, end: Callable[[str], bool]) -> None:
        """Call `end` with the key of each request that somebody cancelled, until cancelled."""
        box = _box(self._router_id)
        while True:
            await asyncio.sleep(_LOOK_S)
            try:
                letters = await self._ledger.run(lambda redis: _empty(redis, box))
            except LedgerUnavailable:
                continue  # health tells of that
            for letter in letters or ():
                end(letter.decode())


def _box(router_id: str) -> str:
    return f"tm:cancel:{router_id}"


async def _post(redis: Redis, box: str, letter: str) -> None:
    async with redis.pipeline(transaction=True) as pipe:
        pipe.rpush(box, letter)
        pipe.expire(box, _KEPT_S)
        await pipe.execute()


def _empty(redis: Redis, box: str) -> Awaitable[Sequence[bytes] | None]:
    answer: Any = redis.lpop(box, _AT_ONCE)
    return answer  # type: ignore[no-any-return]  # redis-py types one method for both stacks
