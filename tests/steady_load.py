"""Customers who notice every failure: one request after the other, none of which may fail.

Each has one client of the SDK as it comes, with its own retries, at a name that stands for all
routers. Some cancel, which must reach the router that serves them.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from loadtest.checks import check
from services.stack.plan import MODEL
from tests.chaos.audit import Books
from tests.chaos.customers import QUESTIONS, Order, Outcome
from tests.chaos.fleet import Fleet
from tidemill.client import AsyncClient, RetryPolicy
from tidemill.errors import TidemillError

TIMEOUT_S = 120.0


@dataclass
class SteadyLoad:
    """`run` until `closing` is set. `outcomes` are all requests; `retries` why some were repeated.

    Of cancellations `reached` are those that found the request, `missed` those of which the
    customer was told that nothing runs before the router decided what the request came to.
    `ttfts_s` are times to first token.
    """

    fleet: Fleet
    target: str
    keys: dict[str, str]
    max_tokens: int
    closing: asyncio.Event = field(default_factory=asyncio.Event)
    outcomes: list[Outcome] = field(default_factory=list)
    retries: Counter[str] = field(default_factory=Counter)
    reached: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    ttfts_s: list[float] = field(default_factory=list)
    books: Books = field(default_factory=lambda: Books(accounts=()))

    async def run(self, customers: int, *, seed: int) -> None:
        """Ask, until closing time."""
        tenants = sorted(self.keys)
        async with asyncio.TaskGroup() as group:
            for number in range(customers):
                name = f"{seed}-{number}"
                group.create_task(self._shop(name, tenants[number % len(tenants)], Random(name)))

    @property
    def failures(self) -> list[Outcome]:
        """Requests that the application saw fail."""
        return [outcome for outcome in self.outcomes if outcome.error is not None]

    async def _shop(self, name: str, tenant: str, rng: Random) -> None:
        retry = RetryPolicy(on_wait=lambda error, _: self._retried(error))
        ca = self.fleet.stack.ca
        async with AsyncClient(self.target, self.keys[tenant], ca, retry=retry) as client:
            number = 0
            while not self.closing.is_set():
                order = Order(
                    request_id=f"{name}-{number}",
                    tenant=tenant,
                    question=rng.choice(QUESTIONS),
                    max_tokens=rng.randint(1, self.max_tokens),
                    ending=rng.choice(["read"] * 4 + ["cancel"]),
                    at=rng.randint(1, self.max_tokens),
                    insists=False,
                )
                outcome = Outcome(order=order)
                self.outcomes.append(outcome)
                try:
                    await self._buy(client, outcome)
                except TidemillError as error:
                    outcome.error = error
                number += 1

    def _retried(self, error: TidemillError) -> None:
        self.retries[f"{error.reason}: {error.message[:60]}"] += 1

    async def _buy(self, client: AsyncClient, outcome: Outcome) -> None:
        order = outcome.order
        stream = await client.generate(
            order.question.prompt,
            model=MODEL,
            max_tokens=order.max_tokens,
            temperature=order.question.temperature,
            seed=order.question.seed,
            n=1,
            request_id=order.request_id,
            timeout=TIMEOUT_S,
            stream=True,
        )
        cancels = order.ending == "cancel"
        unfound_at_ms: int | None = None
        async with stream:
            async for _ in stream:
                if cancels and len(stream.token_ids) >= order.at:
                    cancels = False
                    if await stream.cancel():
                        self.reached.append(order.request_id)
                    else:
                        unfound_at_ms = time.time_ns() // 10**6
            outcome.completion = await stream.completion()
            outcome.answers.append([choice.token_ids for choice in stream.choices])
            assert stream.completed is not None
            check(stream, stream.completed)
            # All clocks are this machine's. What is told later may have crossed the answer's end.
            receipt = stream.completed.receipt
            assert receipt is not None
            decided_at_ms = receipt.to_billing().decided_at_ms
            if unfound_at_ms is not None and unfound_at_ms < decided_at_ms:
                self.missed.append(order.request_id)
        if stream.ttft_s is not None:
            self.ttfts_s.append(stream.ttft_s)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that `share` of all do not exceed."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]
