"""Where a request's money comes from: a hold for it, or how it was settled before."""

from collections.abc import Awaitable, Coroutine
from dataclasses import replace
from typing import Any

from services.router.admission import Admitted
from services.router.crash_points import crash_point
from services.router.finish import Completed
from services.router.money import record
from services.router.money.bank import Bank, Books
from services.router.money.clock import LedgerWatch
from services.router.money.hold import Hold
from services.router.money.intent import Intent
from services.router.money.refusals import max_cost_exceeded, refusal
from services.router.money.replies import Raw, decode_reserve
from services.router.money.terms import Terms
from services.router.worker_task import wire_id
from tidemill.billing import PriceBook
from tidemill.billing import ledger as rules
from tidemill.billing.hold_size import HoldSize, hold_size
from tidemill.errors import (
    AlreadyExists,
    LedgerUnavailable,
    RequestInProgress,
    TidemillError,
    Unavailable,
)

_MIN_RETRY_S = 0.5
_MOST_PAYING = 10_000  # tenants that are remembered to


class Treasury:
    """Opens holds in the ledger."""

    def __init__(self, bank: Bank, books: Books, watch: LedgerWatch) -> None:
        self._bank = bank
        self._books = books
        self._watch = watch
        self._paying: set[str] = set()

    def pays(self, tenant_id: str) -> bool:
        """Whether a hold is to be expected: the tenant's last was granted."""
        return tenant_id in self._paying

    def open(self, admitted: Admitted) -> Coroutine[Any, Any, Hold | Completed]:
        """Hold what the request may cost, or say how the same request was settled before.

        The ledger is asked before this returns; the coroutine waits for its answer, and must come
        to its end: money would be held for nobody. Raises FailedPrecondition MAX_COST_EXCEEDED,
        LedgerUnavailable, Unavailable CLOCK_OFF and AlreadyExists for an id used with another
        body; the coroutine those too, InsufficientBalance, LimitExceeded and RequestInProgress.
        """
        if (intent := self._bank.cashier.pending(admitted.tenant.id, admitted.ask.request_id)) and (
            isinstance(intent.command, rules.Settle)
        ):
            return _known(self._settled_here(intent, admitted))
        if not self._watch.answers:
            raise LedgerUnavailable("the ledger does not answer just now", retry_after_s=1.0)
        if why := self._watch.readiness:
            raise Unavailable(why, reason="CLOCK_OFF", retry_after_s=1.0)  # no price is certain
        return self._ask(admitted)

    def pending(self, tenant_id: str, request_id: str) -> Completed | None:
        """How a request ended that waits for the ledger here."""
        intent = self._bank.cashier.pending(tenant_id, request_id)
        if intent is None or not isinstance(intent.command, rules.Settle):
            return None
        completed = record.decode(intent.command.record).completed
        return self._bank.signed(replace(completed, pending=True))

    def _ask(self, admitted: Admitted) -> Coroutine[Any, Any, Hold | Completed]:
        now_ms = self._bank.now_ms()
        admitted = replace(admitted, admitted_at_ms=now_ms)
        terms = terms_of(admitted, self._books.own)
        size = self._size(terms, self._books.own, now_ms)
        command = rules.Reserve(
            request_id=admitted.ask.request_id,
            key_id=admitted.key_id,
            body_sha256=admitted.ask.body_sha256.hex(),
            owner=self._bank.router_id,
            now_ms=now_ms,
            lease_ms=self._bank.lease_ms,
            ledger_up_since_ms=self._watch.up_since_ms,
            full_nano=size.full_nano,
            least_nano=size.least_nano,
            prompt_tokens=size.prompt_tokens,
            max_tokens=size.max_tokens,
            deadline_ms=terms.deadline_ms,
            terms=terms.encode(),
        )
        crash_point("hold.before")
        raw = self._bank.accounts.ask_for_hold(admitted.tenant.id, command)
        return self._opened(admitted, terms, size, raw)

    async def _opened(
        self, admitted: Admitted, terms: Terms, size: HoldSize, raw: Awaitable[Raw]
    ) -> Hold | Completed:
        answer = decode_reserve(await raw)
        crash_point("hold.after")
        match answer:
            case rules.Held():
                if len(self._paying) >= _MOST_PAYING:
                    self._paying.clear()
                self._paying.add(admitted.tenant.id)
                if answer.fence == answer.first_fence:
                    return Hold(
                        admitted,
                        terms,
                        held=answer,
                        size=size,
                        book=self._books.own,
                        bank=self._bank,
                    )
                return await self._taken_over(admitted, answer)
            case rules.Settled():
                completed = record.settled(answer.posted).completed
                return self._bank.signed(replace(completed, again=True))
            case rules.InProgress():
                left_s = (answer.lease_until_ms - admitted.admitted_at_ms) / 1000
                raise RequestInProgress(
                    "a router is serving this request", retry_after_s=max(left_s, _MIN_RETRY_S)
                )
            case rules.OtherBody():
                raise _other_body()
            case rules.Refused():
                self._paying.discard(admitted.tenant.id)
                self._bank.metrics.refused(answer.reason.value)
                raise refusal(answer, admitted.tenant, admitted.admitted_at_ms)

    async def _taken_over(self, admitted: Admitted, held: rules.Held) -> Hold:
        """The hold, on the terms of its first owner."""
        terms = Terms.decode(held.terms)
        book = await self._books.get(terms.book_digest)
        crash_point("takeover.after")
        sampling = replace(admitted.sampling, seed=terms.seed, max_tokens=terms.max_tokens)
        return Hold(
            replace(admitted, admitted_at_ms=held.admitted_at_ms, sampling=sampling),
            terms,
            held=held,
            size=self._size(terms, book, held.admitted_at_ms),
            book=book,
            bank=self._bank,
        )

    def _size(self, terms: Terms, book: PriceBook, admitted_at_ms: int) -> HoldSize:
        size = size_of(terms, book, admitted_at_ms)
        if not size.sufficient_cap:
            raise max_cost_exceeded(size, terms.currency)
        return size

    def _settled_here(self, intent: Intent, admitted: Admitted) -> Completed:
        if intent.body_sha256 != admitted.ask.body_sha256.hex():
            raise _other_body()
        completed = self.pending(*intent.key)
        assert completed is not None
        return replace(completed, again=True)


async def _known(completed: Completed) -> Completed:
    return completed


def terms_of(admitted: Admitted, book: PriceBook) -> Terms:
    """On what terms the request is let in now."""
    ask, sampling = admitted.ask, admitted.sampling
    return Terms(
        key_id=admitted.key_id,
        model=admitted.model.name,
        price_model=admitted.model.config.price_model,
        currency=admitted.tenant.currency,
        book_digest=book.digest,
        wire_id=wire_id(admitted.tenant.id, ask.request_id),
        seed=sampling.seed,
        choices=sampling.n,
        prompt_tokens=len(admitted.token_ids),
        max_tokens=sampling.max_tokens,
        cap_nano=ask.max_cost[1] if ask.max_cost else None,
        deadline_ms=admitted.deadline_ms,
    )


def size_of(terms: Terms, book: PriceBook, admitted_at_ms: int) -> HoldSize:
    """What may be held on these terms."""
    return hold_size(
        book,
        price_model=terms.price_model,
        currency=terms.currency,
        prompt_tokens=terms.prompt_tokens,
        max_tokens=terms.max_tokens,
        choices=terms.choices,
        cap_nano=terms.cap_nano,
        admitted_at_ms=admitted_at_ms,
        deadline_ms=terms.deadline_ms,
    )


def _other_body() -> TidemillError:
    return AlreadyExists("this request id was used for another request")
