"""One request's way through the dispatcher: where it waits, and where it was placed."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from services.router.fleet import Worker
from tidemill.blocks import block_names
from tidemill.errors import TidemillError
from tidemill.policy import Priority


@dataclass(frozen=True, slots=True)
class Placed:
    """The workers of one attempt; `prefill` None: the decode worker prefills in place.

    `peers` are believed to hold more of the prompt's chain than the one that prefills, best first.
    """

    decode: Worker
    prefill: Worker | None
    peers: Sequence[Worker] = ()


@dataclass(frozen=True, slots=True)
class Place:
    """Requests ahead in the queue, and seconds until they are placed; None: not known yet."""

    position: int
    wait_s: float | None

    def tells_more_than(self, told: "Place") -> bool:
        """Whether it is worth a message: something has changed by a tenth, or near the end."""
        if (self.wait_s is None) != (told.wait_s is None):
            return True
        moved = 10 * abs(self.position - told.position) >= max(told.position, 1)
        shift = abs((self.wait_s or 0.0) - (told.wait_s or 0.0))
        return moved or shift >= max(0.1 * (told.wait_s or 0.0), 0.5)


@dataclass(eq=False, kw_only=True, slots=True)
class Ticket:
    """A place in the queue, or back in front of it after a refusal or a loss.

    A request has one, and each choice that goes on alone. Instants are the dispatcher's clock's:
    `deadline` is when the first token must have come; `excluded` maps workers that refused it or
    were lost to when they may be asked again. `in_place` says whether a decode worker may prefill
    it: not after one refused, since it holds less than was believed. `moved` hears of a new place:
    position and seconds. `placed` is None once the place was given up, or taken away: then
    `refusal` says why. `names` are what the prefix index calls the prompt's blocks.
    """

    key: str
    tenant_id: str
    num_prompt_tokens: int
    max_tokens: int
    block_hashes: Sequence[bytes]
    moved: Callable[[int, float | None], None]
    placed: asyncio.Future[Placed | None]
    priority: Priority = Priority.STANDARD
    deadline: float = float("inf")
    in_place: bool = True
    excluded: dict[str, float] = field(default_factory=dict)
    place: Place = Place(0, None)
    cost_tokens: int = 0
    refusal: TidemillError | None = None
    names: Sequence[int] = field(init=False)

    def __post_init__(self) -> None:
        self.names = block_names(self.block_hashes)

    @property
    def flow(self) -> tuple[Priority, str]:
        """Whose turn it takes."""
        return self.priority, self.tenant_id
