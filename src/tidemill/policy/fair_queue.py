"""Deficit round robin over tenants (Shreedhar and Varghese, 1995), in uncached prompt tokens.

Tenants take turns. A turn adds a quantum of tokens to what the tenant may spend, and its requests
are served in their order of arrival while that suffices; what is left over is kept while the
tenant has requests waiting. So over any stretch of time waiting tenants get equal tokens, within
a quantum and one request, however many or large their requests are, and nobody starves.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from tidemill.errors import AlreadyExists, QueueFull

Item = TypeVar("Item")

_MIN_RETRY_S = 1.0
_MAX_RETRY_S = 60.0


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """Bounds of a queue. One request may exceed `max_tokens` alone, so none is unservable."""

    max_requests: int = 1024
    max_requests_per_tenant: int = 256
    max_tokens: int = 8_000_000


@dataclass(slots=True)
class _Tenant(Generic[Item]):
    waiting: OrderedDict[str, tuple[int, Item]] = field(default_factory=OrderedDict)
    deficit: int = 0

    @property
    def next_cost(self) -> int:
        return next(iter(self.waiting.values()))[0]


class FairQueue(Generic[Item]):
    """Waiting requests of all tenants; `clock` is in seconds and only feeds `retry_after_s`.

    `push` and `remove` are O(1); `pop` is O(1) where costs stay below `quantum` and
    O(waiting tenants) at worst; `positions` is O(waiting requests).
    """

    def __init__(
        self,
        limits: QueueLimits = QueueLimits(),
        *,
        quantum: int = 2048,
        clock: Callable[[], float],
    ) -> None:
        if quantum < 1:
            raise ValueError(f"quantum must be at least 1, got {quantum}")
        self._limits = limits
        self._quantum = quantum
        self._clock = clock
        self._tenants: OrderedDict[str, _Tenant[Item]] = OrderedDict()  # in order of their turns
        self._tenant_of: dict[str, str] = {}
        self._turn_begun = False
        self._queued_tokens = 0
        self._busy_since = 0.0
        self._served_tokens = 0

    def __len__(self) -> int:
        return len(self._tenant_of)

    @property
    def queued_tokens(self) -> int:
        """Cost of all waiting requests."""
        return self._queued_tokens

    def push(self, request_id: str, tenant: str, cost_tokens: int, item: Item) -> None:
        """Take a request in.

        `cost_tokens` (at least 1) are its uncached prompt tokens. Raises QueueFull with
        `retry_after_s` where a limit is reached, AlreadyExists if the id is waiting already.
        """
        if cost_tokens < 1:
            raise ValueError(f"cost_tokens must be at least 1, got {cost_tokens}")
        if request_id in self._tenant_of:
            raise AlreadyExists(f"request {request_id} is queued already")
        self._require_room(tenant, cost_tokens)
        if not self._tenant_of:
            self._busy_since, self._served_tokens = self._clock(), 0
        self._tenant_of[request_id] = tenant
        self._tenants.setdefault(tenant, _Tenant()).waiting[request_id] = (cost_tokens, item)
        self._queued_tokens += cost_tokens

    def peek(self) -> Item | None:
        """The next request, left in the queue; None if nobody waits.

        A later `pop` returns it unless something is pushed or removed in between.
        """
        tenant = self._next_tenant()
        return None if tenant is None else next(iter(tenant.waiting.values()))[1]

    def pop(self) -> Item | None:
        """Take the next request out; None if nobody waits."""
        tenant = self._next_tenant()
        if tenant is None:
            return None
        request_id, (cost, item) = next(iter(tenant.waiting.items()))
        tenant.deficit -= cost
        self._served_tokens += cost
        self._discard(request_id)
        return item

    def remove(self, request_id: str) -> bool:
        """Drop a request that has given up; False if it is not waiting."""
        if request_id not in self._tenant_of:
            return False
        self._discard(request_id)
        return True

    def position(self, request_id: str) -> int:
        """Requests that will be served before this one if none arrives; KeyError if unknown."""
        return self.positions()[request_id]

    def positions(self) -> dict[str, int]:
        """Every waiting request's position, in the order of service."""
        rest = self._copy()
        order: dict[str, int] = {}
        while (tenant := rest._next_tenant()) is not None:
            request_id, (cost, _) = next(iter(tenant.waiting.items()))
            tenant.deficit -= cost
            rest._discard(request_id)
            order[request_id] = len(order)
        return order

    def _next_tenant(self) -> _Tenant[Item] | None:
        """Move on to the tenant whose next request can be paid."""
        if not self._tenants:
            return None
        refused = 0
        while True:
            name, tenant = next(iter(self._tenants.items()))
            if not self._turn_begun:
                tenant.deficit += self._quantum
                self._turn_begun = True
            if tenant.next_cost <= tenant.deficit:
                return tenant
            self._tenants.move_to_end(name)
            self._turn_begun = False
            refused += 1
            if refused % len(self._tenants) == 0:
                self._skip_fruitless_rounds()

    def _skip_fruitless_rounds(self) -> None:
        """Give everybody at once the turns in which nobody could pay."""
        turns = min(
            -(-(tenant.next_cost - tenant.deficit) // self._quantum)
            for tenant in self._tenants.values()
        )
        if turns > 1:
            for tenant in self._tenants.values():
                tenant.deficit += (turns - 1) * self._quantum

    def _discard(self, request_id: str) -> None:
        name = self._tenant_of.pop(request_id)
        tenant = self._tenants[name]
        self._queued_tokens -= tenant.waiting.pop(request_id)[0]
        if not tenant.waiting:
            if next(iter(self._tenants)) == name:
                self._turn_begun = False
            del self._tenants[name]

    def _require_room(self, tenant: str, cost_tokens: int) -> None:
        limits = self._limits
        own = self._tenants.get(tenant)
        if own is not None and len(own.waiting) >= limits.max_requests_per_tenant:
            problem = f"tenant {tenant} has {len(own.waiting)} requests waiting"
        elif len(self) >= limits.max_requests:
            problem = f"{len(self)} requests are waiting"
        elif self._tenant_of and self._queued_tokens + cost_tokens > limits.max_tokens:
            problem = f"{self._queued_tokens} prompt tokens are waiting"
        else:
            return
        raise QueueFull(f"the queue is full: {problem}", retry_after_s=self._retry_after_s())

    def _retry_after_s(self) -> float:
        """Seconds in which, at the pace since the queue last was empty, it would be empty again."""
        busy_s = self._clock() - self._busy_since
        if not self._served_tokens:
            return _MIN_RETRY_S
        return min(
            max(self._queued_tokens * busy_s / self._served_tokens, _MIN_RETRY_S), _MAX_RETRY_S
        )

    def _copy(self) -> "FairQueue[Item]":
        copy = FairQueue[Item](self._limits, quantum=self._quantum, clock=self._clock)
        for name, tenant in self._tenants.items():
            copy._tenants[name] = _Tenant(tenant.waiting.copy(), tenant.deficit)
        copy._tenant_of = dict(self._tenant_of)
        copy._turn_begun = self._turn_begun
        return copy
