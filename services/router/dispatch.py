"""From the queue to a pair of workers: one dispatcher for each model."""

import asyncio
import contextlib
import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from services.router.fleet import DECODE, PREFILL, Fleet, Worker
from services.router.ticket import Place, Placed, Ticket
from services.router.waiting import WaitingLine
from tidemill.blocks import BLOCK_TOKENS, block_names, max_hit_tokens
from tidemill.errors import InvalidRequest
from tidemill.policy import (
    BalancerConfig,
    InFlight,
    OutputLengths,
    Placement,
    QueueLimits,
    TierOverlap,
    WorkerLoad,
    pick_decode,
    pick_in_place,
    pick_prefill,
    room_in_s,
)

_POLL_S = 1.0
_RETRY_POLL_S = 0.05
_SOON_S = 0.001
_MOST_PEERS = 2


class Dispatcher:
    """Keeps the queue of one model and pops it when workers have room."""

    def __init__(
        self,
        model: str,
        fleet: Fleet,
        *,
        limits: QueueLimits,
        balancer: BalancerConfig,
        rng: random.Random,
        clock: Callable[[], float],
    ) -> None:
        self._model = model
        self._fleet = fleet
        self._line = WaitingLine(limits, clock)
        self._returned: deque[Ticket] = deque()
        self._balancer = balancer
        self._rng = rng
        self._clock = clock
        self._prefilling = InFlight()
        self._decoding = InFlight()
        self._answers = OutputLengths()
        self._wake = asyncio.Event()
        self._patience_s = _POLL_S
        fleet.subscribe(on_change=self._wake.set, on_leave=self._forget)

    def __len__(self) -> int:
        return len(self._line) + len(self._returned)

    @property
    def queued_tokens(self) -> int:
        """Uncached prompt tokens of those that wait for their first attempt."""
        return self._line.queued_tokens

    @property
    def staffed(self) -> bool:
        """Whether there are workers of both roles, with or without room."""
        return all(self._fleet.usable(self._model, role) for role in (PREFILL, DECODE))

    def require_room(self, tenant_id: str) -> None:
        """QueueFull if not even the smallest request of the tenant would find a place."""
        self._line.require_room(tenant_id)

    def enqueue(self, ticket: Ticket) -> Place:
        """Take a place; see WaitingLine.join for what is raised where there is none.

        InvalidRequest if no worker, even an idle one, has memory for the prompt: it would stand at
        the head until its deadline, with everybody behind it.
        """
        request = self._request(ticket)
        for role in (PREFILL, DECODE):
            workers = self._fleet.usable(self._model, role)
            most = max((each.load.total_blocks for each in workers if each.load), default=None)
            if most is not None and request.num_blocks > most:
                raise InvalidRequest(
                    f"no {role} worker can hold the prompt",
                    reason="CONTEXT_EXCEEDED",
                    violations=[("input", f"at most {most * BLOCK_TOKENS} tokens fit")],
                )
        held = request.overlap
        cost = min([ticket.num_prompt_tokens, *(request.uncached_tokens(each) for each in held)])
        ticket.cost_tokens = cost
        self._line.join(ticket, others_first=len(self._returned))
        self._wake.set()
        return ticket.place

    def put_back(self, ticket: Ticket, *, without: str, for_s: float) -> None:
        """Place the ticket anew, before all others, for a while elsewhere than at `without`."""
        self.release(ticket.key)
        ticket.excluded[without] = self._clock() + for_s
        ticket.placed = asyncio.get_running_loop().create_future()
        self._returned.append(ticket)
        self._wake.set()

    def expected_hit_tokens(self, num_prompt_tokens: int, block_hashes: Sequence[bytes]) -> int:
        """What would be billed as hits if the prompt met the worker that holds most of it."""
        held = self._fleet.prefixes.overlap(block_names(block_hashes), self._clock())
        most = max((each.blocks for each in held.values()), default=0)
        return min(most * BLOCK_TOKENS, max_hit_tokens(num_prompt_tokens))

    def withdraw(self, ticket: Ticket) -> None:
        """Give the place up; nothing happens to a ticket that has none."""
        if ticket in self._returned:
            self._returned.remove(ticket)
        self._line.leave(ticket)
        if not ticket.placed.done():
            ticket.placed.set_result(None)
        self._wake.set()

    def prefilled(self, key: str) -> None:
        """The request's prefill is done."""
        self._prefilling.remove(key)
        self._line.began(key)
        self._wake.set()

    def answered(self, num_tokens: int) -> None:
        """A choice has ended after so many tokens."""
        self._answers.add(num_tokens)

    def release(self, key: str) -> None:
        """The request's attempt is over."""
        self._prefilling.remove(key)
        self._decoding.remove(key)
        self._line.ended(key)
        self._wake.set()

    def check_integrity(self) -> None:
        """That nothing of any request is left; only true when none runs (R1)."""
        self._line.check_integrity()
        assert not self._returned
        assert not self._prefilling
        assert not self._decoding

    async def run(self) -> None:
        """Place tickets as room appears, until cancelled."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._patience_s):
                    await self._wake.wait()
            self._wake.clear()
            self._place_all()
            self._line.tell(others_first=len(self._returned))

    def _place_all(self) -> None:
        for ticket in list(self._returned):
            if self._place(ticket):
                self._returned.remove(ticket)
        while (head := self._line.head()) is not None and self._place(head):
            self._line.give_out(head)
        self._line.settle(self._prefill_tokens_per_s())
        self._patience_s = self._looks_again_in_s(head)

    def _looks_again_in_s(self, head: Ticket | None) -> float:
        """Unless something is heard before: workers work off what they have between reports too."""
        if self._returned:
            return _RETRY_POLL_S
        if head is None:
            return _POLL_S
        room_s = room_in_s(
            self._loads(PREFILL),
            self._request(head),
            self._prefilling,
            now=self._clock(),
            config=self._balancer,
        )
        return min(room_s + _SOON_S, _POLL_S)

    def _loads(self, role: str) -> list[WorkerLoad]:
        loads = (worker.load for worker in self._fleet.usable(self._model, role))
        return [load for load in loads if load is not None]

    def _prefill_tokens_per_s(self) -> float:
        return sum(load.prefill_tokens_per_s for load in self._loads(PREFILL))

    def _place(self, ticket: Ticket) -> bool:
        placed = self._choose(ticket)
        if placed is None:
            return False
        now = self._clock()
        request = self._request(ticket)
        prefill = placed.prefill or placed.decode
        self._prefilling.add(
            ticket.key,
            prefill.id,
            at=now,
            tokens=request.uncached_tokens(prefill.id),
            pairs=request.attention_pairs(prefill.id),
            blocks=request.new_blocks(prefill.id),
        )
        blocks = request.new_blocks(
            placed.decode.id, extra_tokens=self._reserve(ticket).decode_reserve_tokens
        )
        self._decoding.add(ticket.key, placed.decode.id, at=now, blocks=blocks)
        peers = self._peers(request.overlap, prefill)
        self._fleet.prefixes.expect({prefill.id, placed.decode.id}, ticket.names, now)
        if not ticket.placed.done():
            ticket.placed.set_result(replace(placed, peers=peers))
        return True

    def _choose(self, ticket: Ticket) -> Placed | None:
        now = self._clock()
        request = self._request(ticket)
        balancer = self._reserve(ticket)

        def pick(role: str, among: Sequence[Worker]) -> Worker | None:
            loads = [worker.load for worker in among if worker.load is not None]
            choose, busy = (
                (pick_prefill, self._prefilling)
                if role == PREFILL
                else (pick_decode, self._decoding)
            )
            chosen: WorkerLoad | None = choose(
                loads, request, busy, self._rng, now=now, config=balancer
            )
            return self._fleet.get(chosen.worker_id) if chosen else None

        if ticket.in_place and (alone := self._pick_in_place(request, balancer)) is not None:
            return Placed(alone, None)
        prefill = pick(PREFILL, self._fleet.usable(self._model, PREFILL))
        if prefill is None:
            return None
        if DECODE in prefill.description.roles and pick(DECODE, [prefill]) is not None:
            return Placed(prefill, None)
        decode = pick(DECODE, self._fleet.usable(self._model, DECODE))
        if decode is None:
            return None
        return Placed(decode, None if decode is prefill else prefill)

    def _pick_in_place(self, request: Placement, balancer: BalancerConfig) -> Worker | None:
        decoders = self._fleet.usable(self._model, DECODE)
        chosen = pick_in_place(
            [worker.load for worker in decoders if worker.load is not None],
            request,
            self._prefilling,
            self._decoding,
            {worker.id: worker.description.in_place_tokens for worker in decoders},
            now=self._clock(),
            config=balancer,
        )
        return self._fleet.get(chosen.worker_id) if chosen else None

    def _peers(self, held: Mapping[str, TierOverlap], chosen: Worker) -> list[Worker]:
        """Who seems to hold more of the chain than the chosen worker, most first."""
        usable = {
            worker.id: worker
            for role in (PREFILL, DECODE)
            for worker in self._fleet.usable(self._model, role)
        }
        blocks = {worker_id: overlap.blocks for worker_id, overlap in held.items()}
        longer = [
            worker_id
            for worker_id, num_blocks in blocks.items()
            if worker_id in usable and num_blocks > blocks.get(chosen.id, 0)
        ]
        best = sorted(longer, key=lambda worker_id: (-blocks[worker_id], worker_id))
        return [usable[worker_id] for worker_id in best[:_MOST_PEERS]]

    def _reserve(self, ticket: Ticket) -> BalancerConfig:
        """A decode worker takes blocks for the prompt and a little ahead, never past the end."""
        ahead = min(self._balancer.decode_reserve_tokens, ticket.max_tokens)
        return replace(self._balancer, decode_reserve_tokens=ahead)

    def _request(self, ticket: Ticket) -> Placement:
        now, prefixes = self._clock(), self._fleet.prefixes
        overlap = prefixes.overlap(ticket.names, now)
        return Placement(
            num_prompt_tokens=ticket.num_prompt_tokens,
            overlap=overlap,
            num_alike=prefixes.num_alike(ticket.names, overlap),
            excluded=frozenset(id_ for id_, until in ticket.excluded.items() if until > now),
            output_tokens=self._answers.expected(ticket.max_tokens),
            growth_tokens=self._answers.remaining,
        )

    def _forget(self, worker: Worker) -> None:
        self._prefilling.forget(worker.id)
        self._decoding.forget(worker.id)
        self._wake.set()
