"""A fair queue in uncached prompt tokens: classes by share, tenants in turns, requests in order.

Inside a class, deficit round robin over tenants (Shreedhar and Varghese, 1995). In each round a
tenant's turn adds a quantum of tokens to what it may spend, and its requests are served in their
order of arrival while that suffices. So tenants that wait get equal tokens, within a quantum and
one request, however many or large their requests are. Unlike the original, a tenant that has
nothing waiting saves up to `saved_turns` turns: one that asks for less than its part is served
before those that ask for more, as if they were not there, until its savings are spent.

A round need not be played out: a request is served in the round in which the sum of its tenant's
costs up to it is covered, tenants in the order in which they came to wait. That is all the state:
for each tenant, what it has spent.

Between the classes, self-clocked fair queuing (Golestani, 1994): a class is due once the tokens it
has got and those of its next request, divided by its share, are the fewest. While both wait, batch
gets its share and standard the rest, within one request of each; alone, either gets everything. So
nobody starves, in either class.
"""

import heapq
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from operator import attrgetter, itemgetter
from typing import Generic, TypeVar

from tidemill.errors import AlreadyExists, QueueFull

Item = TypeVar("Item")

_MOST_RESTING = 4096


class Priority(StrEnum):
    """How urgent a request is: somebody waits for it, or nobody does."""

    STANDARD = "standard"
    BATCH = "batch"


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """Bounds of a queue, and how it is shared.

    One request may exceed `max_tokens` alone, so none is unservable. Who has requests waiting may
    add one while places and tokens that are free still exceed its own: a few tenants cannot fill
    the queue. A turn adds `quantum_tokens`; a tenant with nothing waiting saves up to
    `saved_turns` of them, which should be about a second of the fleet's prefill. Batch requests
    get `batch_share` of the tokens while standard ones wait too, and otherwise all.
    """

    max_requests: int = 1024
    max_requests_per_tenant: int = 256
    max_tokens: int = 8_000_000
    quantum_tokens: int = 2048
    saved_turns: int = 128
    batch_share: float = 0.1

    def __post_init__(self) -> None:
        if self.quantum_tokens < 1:
            raise ValueError(f"quantum_tokens must be at least 1, got {self.quantum_tokens}")
        if self.saved_turns < 0:
            raise ValueError(f"saved_turns must be at least 0, got {self.saved_turns}")
        if not 0 < self.batch_share < 1:
            raise ValueError(f"batch_share must lie between 0 and 1, got {self.batch_share}")


@dataclass(frozen=True, slots=True)
class Ahead:
    """What is served before a request if none arrives.

    `own_tokens` are those of its own tenant in its own class.
    """

    requests: int
    tokens: int
    own_tokens: int


@dataclass(eq=False, slots=True)
class _Entry(Generic[Item]):
    request_id: str
    tenant: str
    priority: Priority
    cost: int
    item: Item


@dataclass(eq=False, slots=True)
class _Tenant(Generic[Item]):
    """`due` is the round of its next request, and its own place in every round."""

    spent: int
    place: int
    waiting: deque[_Entry[Item]] = field(default_factory=deque)
    due: tuple[int, int] = (0, 0)


class _Class(Generic[Item]):
    """Deficit round robin over the tenants of one class.

    `clock` is what the class has got over its share, on the scale that the classes have in common.
    """

    def __init__(self, share: float, quantum: int, saved_turns: int) -> None:
        self.clock = 0.0
        self._share = share
        self._quantum = quantum
        self._saved_turns = saved_turns
        self._round = 0
        self._num_joined = 0
        self._tenants: dict[str, _Tenant[Item]] = {}
        self._resting: OrderedDict[str, int] = OrderedDict()  # spent, by tenants not waiting
        self._next: _Tenant[Item] | None = None

    def __bool__(self) -> bool:
        return bool(self._tenants)

    def add(self, entry: _Entry[Item]) -> None:
        tenant = self._tenants.get(entry.tenant)
        if tenant is None:
            tenant = self._tenants[entry.tenant] = self._join(entry.tenant)
        tenant.waiting.append(entry)
        if len(tenant.waiting) == 1:
            self._head_changed(tenant)

    def head(self) -> _Entry[Item]:
        """The next request; there must be one."""
        if self._next is None:
            self._next = min(self._tenants.values(), key=attrgetter("due"))
        return self._next.waiting[0]

    def take(self) -> _Entry[Item]:
        """Serve the next request."""
        entry = self.head()
        tenant = self._tenants[entry.tenant]
        self._round = max(self._round, tenant.due[0])
        tenant.spent += entry.cost
        self.clock += entry.cost / self._share
        self.drop(entry)
        return entry

    def drop(self, entry: _Entry[Item]) -> None:
        """Forget a request, the next one or any other."""
        tenant = self._tenants[entry.tenant]
        was_head = tenant.waiting[0] is entry
        tenant.waiting.remove(entry)
        if not tenant.waiting:
            del self._tenants[entry.tenant]
            self._next = None
            self._rest(entry.tenant, tenant.spent)
        elif was_head:
            self._head_changed(tenant)

    def due(self) -> float:
        """The class's clock after its next request."""
        return self.clock + self.head().cost / self._share

    def order(self) -> Iterator[tuple[float, _Entry[Item]]]:
        """All requests in the order of service, each with the class's clock after it."""
        rounds = []
        for tenant in self._tenants.values():
            spent = tenant.spent
            for entry in tenant.waiting:
                spent += entry.cost
                rounds.append((self._round_of(spent), tenant.place, entry))
        clock = self.clock
        for _, _, entry in sorted(rounds, key=itemgetter(0, 1)):
            clock += entry.cost / self._share
            yield clock, entry

    def _join(self, name: str) -> _Tenant[Item]:
        self._num_joined += 1
        least = (self._round - 1 - self._saved_turns) * self._quantum
        return _Tenant(max(self._resting.pop(name, least), least), self._num_joined)

    def _rest(self, name: str, spent: int) -> None:
        self._resting[name] = spent
        if len(self._resting) > _MOST_RESTING:
            self._resting.popitem(last=False)

    def _head_changed(self, tenant: _Tenant[Item]) -> None:
        spent = tenant.spent + tenant.waiting[0].cost
        tenant.due = self._round_of(spent), tenant.place
        self._next = None

    def _round_of(self, spent: int) -> int:
        return -(-spent // self._quantum)


@dataclass(slots=True)
class _Held:
    """What one tenant has waiting, in both classes."""

    requests: int = 0
    tokens: int = 0


class FairQueue(Generic[Item]):
    """Waiting requests of all tenants.

    `push` is O(1), `pop` O(waiting tenants), `remove` O(requests of the tenant), and `ahead` and
    `all_ahead` are O(waiting requests).
    """

    def __init__(self, limits: QueueLimits = QueueLimits()) -> None:
        self._limits = limits
        shares = {Priority.STANDARD: 1 - limits.batch_share, Priority.BATCH: limits.batch_share}
        self._classes = {
            priority: _Class[Item](share, limits.quantum_tokens, limits.saved_turns)
            for priority, share in shares.items()
        }
        self._clock = 0.0
        self._entries: dict[str, _Entry[Item]] = {}
        self._held: dict[str, _Held] = {}
        self._queued_tokens = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def queued_tokens(self) -> int:
        """Cost of all waiting requests."""
        return self._queued_tokens

    def require_room(self, tenant: str, cost_tokens: int = 1) -> None:
        """Raise QueueFull if a request of the tenant with that cost would find no place now."""
        limits, own = self._limits, self._held.get(tenant, _Held())
        places = limits.max_requests - len(self)
        tokens = limits.max_tokens - self._queued_tokens
        if places < 1:
            problem = f"{len(self)} requests are waiting"
        elif self._entries and cost_tokens > tokens:
            problem = f"{self._queued_tokens} prompt tokens are waiting"
        elif own.requests >= min(limits.max_requests_per_tenant, places):
            problem = f"tenant {tenant} has {own.requests} requests waiting"
        elif own.tokens and own.tokens + cost_tokens > tokens:
            problem = f"tenant {tenant} has {own.tokens} prompt tokens waiting"
        else:
            return
        raise QueueFull(f"the queue is full: {problem}")

    def push(
        self,
        request_id: str,
        tenant: str,
        cost_tokens: int,
        item: Item,
        priority: Priority = Priority.STANDARD,
    ) -> None:
        """Take a request in.

        `cost_tokens` (at least 1) are its uncached prompt tokens. Raises QueueFull where a limit
        is reached, AlreadyExists if the id is waiting already.
        """
        if cost_tokens < 1:
            raise ValueError(f"cost_tokens must be at least 1, got {cost_tokens}")
        if request_id in self._entries:
            raise AlreadyExists(f"request {request_id} is queued already")
        self.require_room(tenant, cost_tokens)
        entry = _Entry(request_id, tenant, priority, cost_tokens, item)
        its = self._classes[priority]
        if not its:  # what a class did not use while nobody waited in it is not made up for
            its.clock = max(its.clock, self._clock)
        its.add(entry)
        self._entries[request_id] = entry
        self._queued_tokens += cost_tokens
        held = self._held.setdefault(tenant, _Held())
        held.requests += 1
        held.tokens += cost_tokens

    def peek(self) -> Item | None:
        """The next request, left in the queue; None if nobody waits.

        A later `pop` returns it unless something is pushed or removed in between.
        """
        its = self._due()
        return None if its is None else its.head().item

    def pop(self) -> Item | None:
        """Take the next request out; None if nobody waits."""
        if (its := self._due()) is None:
            return None
        entry = its.take()
        self._clock = its.clock
        self._forget(entry)
        return entry.item

    def remove(self, request_id: str) -> bool:
        """Drop a request that has given up; False if it is not waiting."""
        if (entry := self._entries.get(request_id)) is None:
            return False
        self._classes[entry.priority].drop(entry)
        self._forget(entry)
        return True

    def ahead(self, request_id: str) -> Ahead:
        """What is served before this request; KeyError if it is not waiting."""
        if request_id not in self._entries:
            raise KeyError(request_id)
        return next(ahead for entry, ahead in self._walk() if entry.request_id == request_id)

    def all_ahead(self) -> dict[str, Ahead]:
        """What is served before each waiting request, in the order of service."""
        return {entry.request_id: ahead for entry, ahead in self._walk()}

    def _walk(self) -> Iterator[tuple[_Entry[Item], Ahead]]:
        tokens = 0
        own: dict[tuple[Priority, str], int] = {}
        orders = [its.order() for its in self._classes.values()]
        for requests, (_, entry) in enumerate(heapq.merge(*orders, key=itemgetter(0))):
            flow = entry.priority, entry.tenant
            own_tokens = own.get(flow, 0)
            yield entry, Ahead(requests, tokens, own_tokens)
            tokens += entry.cost
            own[flow] = own_tokens + entry.cost

    def _due(self) -> _Class[Item] | None:
        return min(filter(None, self._classes.values()), key=_Class.due, default=None)

    def _forget(self, entry: _Entry[Item]) -> None:
        del self._entries[entry.request_id]
        self._queued_tokens -= entry.cost
        held = self._held[entry.tenant]
        held.requests -= 1
        held.tokens -= entry.cost
        if not held.requests:
            del self._held[entry.tenant]
