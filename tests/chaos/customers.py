"""Customers under load: they ask, read or give up, and ask again elsewhere under the same id.

What a customer asks is one of a few requests whose undisturbed answer is known, so that whatever
comes through deaths and failovers can be held against it.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field, replace
from random import Random
from typing import Self

from loadtest.checks import check
from services.stack.plan import MODEL
from tests.chaos.fleet import ROUTERS, Fleet
from tests.stack_harness import OPENING_NANO, words
from tidemill.client import AsyncClient, AsyncStream, Completion, RetryPolicy
from tidemill.errors import (
    Aborted,
    DeadlineExceeded,
    FailedPrecondition,
    InsufficientBalance,
    ResourceExhausted,
    TidemillError,
    Unavailable,
)

POOR_NANO = 1_600_000  # for two first steps of 512 tokens at once and not for three
POOR_MAX_TOKENS = 7000  # for which it never has enough

TIMEOUT_S = 20.0  # one call
PATIENCE_S = 30.0  # one request, over all its calls
_SLACK_S = 2.0
_AWAY_S = 0.1
_PATIENT = RetryPolicy(max_retries=10)


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked; its answer is always the same, as far as it goes."""

    prompt: str
    temperature: float = 0.0
    seed: int = 1
    n: int = 1


QUESTIONS = (
    Question(prompt="tides: " + words(20)),
    Question(prompt="tides: " + words(60)),
    Question(prompt="mills: " + words(35), n=2),
    Question(prompt="mills: " + words(90), temperature=0.8, seed=11),
    Question(prompt="pools: " + words(5), temperature=1.1, seed=12),
    Question(prompt="pools: " + words(45), temperature=0.7, seed=13, n=2),
)
ANSWER_TOKENS = 48
LONG = Question(prompt="seas: " + words(10))
LONG_ANSWER_TOKENS = 600

# No ledger, no worker, no router, no money, no time: all else would be a fault of the server's.
_TYPED = (Unavailable, Aborted, FailedPrecondition, ResourceExhausted, DeadlineExceeded)

Answers = Mapping[Question, Sequence[tuple[int, ...]]]


@dataclass(frozen=True, kw_only=True)
class Order:
    """One request of one customer, and what it does about the answer.

    `ending` is "read" to the end, "cancel" or "hang up" after `at` tokens. One that `insists` asks
    again when the answer breaks off; others leave it at that.
    """

    request_id: str
    tenant: str
    question: Question
    max_tokens: int
    ending: str
    at: int
    insists: bool


@dataclass(kw_only=True)
class Outcome:
    """All that the customer saw of it: each call's tokens by choice, and how the last one ended."""

    order: Order
    answers: list[list[tuple[int, ...]]] = field(default_factory=list)
    completion: Completion | None = None
    error: TidemillError | None = None
    calls: int = 0


@dataclass(frozen=True, kw_only=True)
class Habits:
    """How customers behave in a round."""

    insist: bool = True
    long: bool = False  # the poor one asks for answers that have to be funded step by step


class Customers:
    """Clients of three new tenants at both routers; use it with `async with`.

    `name` tells these tenants from those of other rounds.
    """

    def __init__(self, fleet: Fleet, name: str) -> None:
        self.rich = (f"{name}-alice", f"{name}-bob")
        self.poor = f"{name}-carol"
        self.outcomes: list[Outcome] = []
        self._fleet = fleet
        self._stack = AsyncExitStack()
        self._clients: dict[tuple[str, str], AsyncClient] = {}
        self._keys: dict[str, str] = {}

    @property
    def tenants(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.rich, self.poor)

    async def __aenter__(self) -> Self:
        stack = self._fleet.stack
        for tenant in self.tenants:
            paid_nano = POOR_NANO if tenant == self.poor else OPENING_NANO
            self._keys[tenant] = await stack.key_of(tenant, paid_nano=paid_nano)
            for router in ROUTERS:
                client = stack.client(self._keys[tenant], router=router)
                self._clients[tenant, router] = await self._stack.enter_async_context(client)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def anew(self, tenant: str, router: str) -> AsyncClient:
        """The SDK as `tenant` on a connection of its own, which has seen no router die."""
        return self._fleet.stack.client(self._keys[tenant], router=router)

    async def see_all_workers(self) -> bool:
        """Whether both routers know two of each role: one that was just restarted may be late."""
        for router in ROUTERS:
            (model,) = await self._clients[self.rich[0], router].models()
            if (model.prefill_workers, model.decode_workers) != (2, 2):
                return False
        return True

    async def ask_all_once(self, router: str) -> None:
        """Leave every prompt of the rich ones with some decode worker."""
        for tenant in self.rich:
            key = self._keys[tenant]
            async with self._fleet.stack.client(key, retry=_PATIENT, router=router) as client:
                await asyncio.gather(*(_ask(client, question) for question in QUESTIONS))

    async def prefills_in_place(self, router: str) -> bool:
        """Whether a decode worker computed the rest of a prompt that was asked before."""
        try:
            completion = await _ask(self._clients[self.rich[0], router], QUESTIONS[0])
        except Unavailable:
            return False
        return completion.usage.prefill_site == "decode_worker"

    async def undisturbed(self, question: Question) -> Sequence[tuple[int, ...]]:
        """The answer's tokens by choice, as long as anybody reads."""
        num_tokens = LONG_ANSWER_TOKENS if question is LONG else ANSWER_TOKENS
        completion = await self._clients[self.rich[0], ROUTERS[0]].generate(
            question.prompt,
            model=MODEL,
            max_tokens=num_tokens,
            temperature=question.temperature,
            seed=question.seed,
            n=question.n,
        )
        return [choice.token_ids for choice in completion.choices]

    async def shop(self, rng: Random, name: str, habits: Habits, closing: asyncio.Event) -> None:
        """Ask one thing after the other until it is closing time."""
        number = 0
        while not closing.is_set():
            order = self._order(rng, f"{name}-{number}", habits)
            outcome = Outcome(order=order)
            self.outcomes.append(outcome)
            await self._buy(rng, outcome)
            number += 1
            if isinstance(outcome.error, InsufficientBalance):
                await self._pay_in(rng)
            if outcome.error is not None:
                await asyncio.sleep(_AWAY_S)

    def _order(self, rng: Random, request_id: str, habits: Habits) -> Order:
        ending = rng.choice(["read"] * 6 + ["cancel", "cancel", "hang up"])
        order = Order(
            request_id=request_id,
            tenant=rng.choice(self.rich),
            question=rng.choice(QUESTIONS),
            max_tokens=rng.randint(1, ANSWER_TOKENS),
            ending=ending,
            at=rng.randint(0, ANSWER_TOKENS),
            insists=habits.insist,
        )
        if rng.random() >= (0.5 if habits.long else 0.2):
            return order
        return replace(
            order,
            tenant=self.poor,
            question=LONG,
            max_tokens=POOR_MAX_TOKENS,
            ending="hang up" if ending == "hang up" else "cancel",
            at=rng.randint(260, LONG_ANSWER_TOKENS) if habits.long else order.at,
        )

    async def _pay_in(self, rng: Random) -> None:
        """The poor one brings money; it comes again if nobody takes it."""
        operation_id = str(rng.getrandbits(64))
        for router in (*ROUTERS, *ROUTERS):
            stack = self._fleet.stack
            async with stack.client(stack.admin_key, router=router) as operator:
                with suppress(Unavailable):
                    await operator.admin.top_up(self.poor, POOR_NANO, operation_id=operation_id)
                    return

    async def _buy(self, rng: Random, outcome: Outcome) -> None:
        """Call until there is an answer or no sense in going on; every end is typed and in time."""
        routers = list(ROUTERS)
        rng.shuffle(routers)
        give_up_at = time.monotonic() + PATIENCE_S
        while True:
            began = time.monotonic()
            outcome.calls += 1
            outcome.error = None
            try:
                await self._call(outcome, routers[0])
            except TidemillError as error:
                outcome.error = error
            took_s = time.monotonic() - began
            assert took_s < TIMEOUT_S + _SLACK_S, f"{outcome} took {took_s:.1f} s"
            wait_s = _wait_s(outcome)
            if wait_s is None or time.monotonic() + wait_s > give_up_at:
                return
            if not isinstance(outcome.error, Aborted):
                routers.reverse()
            await asyncio.sleep(wait_s)

    async def _call(self, outcome: Outcome, router: str) -> None:
        order = outcome.order
        stream = await self._clients[order.tenant, router].generate(
            order.question.prompt,
            model=MODEL,
            max_tokens=order.max_tokens,
            temperature=order.question.temperature,
            seed=order.question.seed,
            n=order.question.n,
            request_id=order.request_id,
            timeout=TIMEOUT_S,
            stream=True,
        )
        async with stream:
            try:
                await self._read(stream, order)
            finally:
                outcome.answers.append([choice.token_ids for choice in stream.choices])
            if stream.completed is not None:
                outcome.completion = await stream.completion()
                if not outcome.completion.replayed:
                    check(stream, stream.completed)

    async def _read(self, stream: AsyncStream, order: Order) -> None:
        given_up = order.ending == "read"
        async for _ in stream:
            stream.usage.check()
            if given_up or len(stream.token_ids) < order.at:
                continue
            if order.ending == "hang up":
                return
            given_up = True
            await stream.cancel()


async def _ask(client: AsyncClient, question: Question) -> Completion:
    """For one token."""
    return await client.generate(question.prompt, model=MODEL, max_tokens=1)


def _wait_s(outcome: Outcome) -> float | None:
    """After how long the customer calls again; None: never, it has its answer or leaves it."""
    error = outcome.error
    if error is None or not outcome.order.insists:
        return None
    if isinstance(error, Unavailable | Aborted):
        return error.retry_after_s or _AWAY_S
    return None


def check_outcome(outcome: Outcome, answers: Answers) -> None:
    """Whatever came goes on as the undisturbed answer does (X1d), and the end is a known one."""
    order, error = outcome.order, outcome.error
    for choices in outcome.answers:
        for got, whole in zip(choices, answers[order.question], strict=True):
            assert got[: len(whole)] == whole[: len(got)], f"{order}: {got} is no {whole}"
            assert len(got) <= order.max_tokens
    assert error is None or isinstance(error, _TYPED), f"{order} ended with {error!r}"
    assert error is None or outcome.completion is None


def check_unnoticed(outcome: Outcome) -> None:
    """Nothing of the death came through to this customer: one call, and no end but its own."""
    assert outcome.calls == 1, outcome
    assert outcome.error is None or isinstance(outcome.error, InsufficientBalance), outcome
