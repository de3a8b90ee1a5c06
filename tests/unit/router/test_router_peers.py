"""Whom a prefill may ask for blocks: the workers that the router believes to hold more."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

from services.router.admission import Admitted, Ask
from services.router.dispatch import Dispatcher
from services.router.fleet import (
    DECODE,
    PREFILL,
    Description,
    Expected,
    Fleet,
    ModelIdentity,
    Worker,
)
from services.router.keys import Tenant
from services.router.sampling import Sampling
from services.router.ticket import Placed, Ticket
from services.router.worker_task import start_message
from tidemill.blocks import block_names, chain_hashes, root_hash
from tidemill.policy import BalancerConfig, KvChange, QueueLimits, WorkerLoad

FULL = 100_000
ADMITTED = Admitted(
    ask=Ask(request_id="r1", body_sha256=b"b" * 32, model="tiny", input="hello"),
    tenant=Tenant("alice", "USD", b"s" * 32),
    key_id="k1",
    model=cast(Any, None),  # read for a grammar alone
    identity=ModelIdentity(b"d" * 32, "f", 4096),
    token_ids=[1, 2, 3],
    block_hashes=[],
    sampling=Sampling(temperature=1.0, top_p=1.0, top_k=0, seed=7, max_tokens=8, stop_token_ids=()),
    admitted_at_ms=0,
    first_token_timeout_s=60,
    total_timeout_s=60,
)
CHAIN = [bytes([i]) * 32 for i in range(8)]


class Yard:
    """A dispatcher and workers whose queues a test sets."""

    def __init__(self) -> None:
        self.now = 100.0
        self.fleet = Fleet({"tiny": Expected(512)}, lambda: self.now, stale_after_s=1e9)
        self.dispatcher = Dispatcher(
            "tiny",
            self.fleet,
            limits=QueueLimits(),
            balancer=BalancerConfig(stale_after_s=1e9),
            rng=random.Random(1),
            clock=lambda: self.now,
        )
        self._workers: dict[str, Worker] = {}
        self._num_asked = 0

    def add(self, worker_id: str, *roles: str) -> None:
        description = Description(
            worker_id=worker_id,
            epoch=1,
            address=f"{worker_id}:7000",
            roles=frozenset(roles),
            model="tiny",
            digest=b"d" * 32,
            kv_format="f",
            context_tokens=4096,
            vocab_size=512,
        )
        worker = self._workers[worker_id] = Worker(description, cast(Any, None))
        self.fleet.join(worker)
        self.hold(worker_id, 0)
        self.load(worker_id)

    def hold(self, worker_id: str, num_blocks: int) -> None:
        """The worker tells that so much of the chain is all that it holds."""
        change = KvChange(block_names(CHAIN[:num_blocks]))
        self.fleet.prefixes.hear(worker_id, [change], epoch=1, sequence=1, resets=True)

    def load(self, worker_id: str, *, queued_tokens: int = 0) -> None:
        self.now += 1
        report = WorkerLoad(
            worker_id=worker_id,
            epoch=1,
            sequence=1,
            observed_at=self.now,
            queued_uncached_tokens=queued_tokens,
            free_blocks=1000,
            total_blocks=1000,
        )
        self.fleet.report(self._workers[worker_id], report)

    def leave(self, worker_id: str) -> None:
        self.fleet.leave(self._workers[worker_id])

    async def place(self, num_blocks: int) -> Placed:
        """Where a prompt of so many blocks of the chain goes; it is over at once."""
        self._num_asked += 1
        ticket = Ticket(
            key=f"q{self._num_asked}",
            tenant_id="alice",
            num_prompt_tokens=64 * num_blocks + 1,
            max_tokens=8,
            block_hashes=CHAIN[:num_blocks],
            moved=lambda *_: None,
            placed=asyncio.get_running_loop().create_future(),
        )
        self.dispatcher.enqueue(ticket)
        async with asyncio.timeout(30):
            placed = await ticket.placed
        assert placed is not None
        self.dispatcher.release(ticket.key)
        return placed


@asynccontextmanager
async def yard() -> AsyncIterator[Yard]:
    place = Yard()
    running = asyncio.create_task(place.dispatcher.run())
    try:
        yield place
    finally:
        running.cancel()
        await asyncio.wait([running])


def ids(placed: Placed) -> list[str]:
    return [worker.id for worker in placed.peers]


async def test_workers_with_a_longer_overlap_are_peers_best_first() -> None:
    async with yard() as it:
        for name, num_blocks in (("p1", 2), ("p2", 6), ("p3", 0), ("p4", 5)):
            it.add(name, PREFILL)
            it.hold(name, num_blocks)
            it.load(name, queued_tokens=FULL)
        it.add("d1", DECODE)
        it.load("p3")
        placed = await it.place(8)
        assert placed.prefill is not None
        assert placed.prefill.id == "p3"
        assert ids(placed) == ["p2", "p4"]
        assert ids(await it.place(4)) == [], "nobody holds more of these four than it is to compute"


async def test_the_worker_chosen_and_workers_that_left_are_no_peers() -> None:
    async with yard() as it:
        it.add("p1", PREFILL)
        it.add("d1", DECODE)
        assert ids(await it.place(4)) == []
        assert ids(await it.place(4)) == []
        it.add("p2", PREFILL)
        it.load("p1", queued_tokens=FULL)
        assert ids(await it.place(3)) == ["d1", "p1"]
        it.leave("p1")
        it.leave("d1")
        it.add("d2", DECODE)
        assert ids(await it.place(4)) == []


async def test_what_a_worker_was_given_draws_more_of_the_same_until_it_is_told_otherwise() -> None:
    async with yard() as it:
        it.add("p1", PREFILL)
        it.add("d1", DECODE)
        await it.place(4)
        it.add("p2", PREFILL)
        placed = await it.place(4)  # believed to be at p1, which has not told of it
        assert placed.prefill is not None
        assert placed.prefill.id == "p1"
        it.now += 100
        it.hold("p2", 4)
        placed = await it.place(4)
        assert placed.prefill is not None
        assert placed.prefill.id == "p2"


def test_a_completion_goes_on_with_the_chain_of_its_prompt() -> None:
    root = root_hash(b"d" * 32, "f", b"s" * 32)
    for num_tokens in (3, 64, 100, 128):
        prompt = list(range(num_tokens))
        admitted = replace(ADMITTED, token_ids=prompt, block_hashes=chain_hashes(root, prompt))
        answer = list(range(500, 600))
        assert admitted.chain(answer) == chain_hashes(root, [*prompt, *answer])


async def test_the_task_names_peers_with_address_and_role() -> None:
    async with yard() as it:
        it.add("b1", PREFILL, DECODE)
        it.add("d1", DECODE)
        workers = it.fleet
        placed = Placed(
            cast(Worker, workers.get("d1")),
            None,
            [cast(Worker, workers.get("b1")), cast(Worker, workers.get("d1"))],
        )
        peers = peers_in_start(placed)
        assert peers == [("b1", "b1:7000", "prefill"), ("d1", "d1:7000", "decode")]


def peers_in_start(placed: Placed) -> list[tuple[str, str, str]]:
    choices: Any = [SimpleNamespace(index=0, token_ids=[])]
    start = start_message(ADMITTED, placed, choices, attempt=1, fence=1, funded_tokens=None)
    return [(peer.worker_id, peer.address, peer.role) for peer in start.task.peers]
