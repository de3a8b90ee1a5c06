"""Ends the requests of routers that vanished: the only way in which their held money is freed."""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from services.router.crash_points import crash_point
from services.router.finish import Completed, Timing
from services.router.money import record, retained
from services.router.money.bank import Bank, Books
from services.router.money.clock import LedgerWatch
from services.router.money.resolution import Resolution, decisive, resolve
from services.router.money.retained import Retained
from services.router.money.terms import Progress, Terms
from services.router.money.treasury import size_of
from tidemill.billing import BusyPart, PriceBook, clamp_decided_at, issue_receipt
from tidemill.billing import ledger as rules
from tidemill.errors import ConfigError, LedgerUnavailable, UsageError

_FOR_THE_CLIENT = 1 / 3  # of a lease
_ASK_EVERY = 0.1  # of a lease
_PAGE = 200
_WHY = "ROUTER_LOST"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Case:
    tenant_id: str
    request_id: str
    orphan: rules.Orphaned
    terms: Terms
    found: Resolution
    busy: Sequence[BusyPart]


class Resolver:
    """Looks for holds whose lease ran out, in all accounts, every third of a lease.

    Of several routers each may find the same hold: the ledger gives it to one at a time, and its
    first charge stands.
    """

    def __init__(
        self,
        bank: Bank,
        books: Books,
        watch: LedgerWatch,
    ) -> None:
        self._bank = bank
        self._books = books
        self._watch = watch
        self._resolving: set[tuple[str, str]] = set()
        bank.metrics.watch_holds("resolving", lambda: len(self._resolving))

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(self._bank.lease_ms / 3000)
            try:
                await self.look()
            except LedgerUnavailable as error:
                logger.info("nothing is resolved: %s", error)

    async def look(self) -> None:
        """Take every hold that may be taken now; each is resolved in a task of its own."""
        if (
            not self._watch.answers
            or self._bank.now_ms() < self._watch.up_since_ms + self._bank.lease_ms
        ):
            return
        # A client was told to come back when the lease ends, and is to find the request there.
        until_ms = self._bank.now_ms() - round(_FOR_THE_CLIENT * self._bank.lease_ms)
        late = await self._bank.accounts.late_requests(until_ms, limit=_PAGE)
        for tenant_id, request_id in late:
            key = (tenant_id, request_id)
            # Those of this router run, however late it is with renewing them.
            if key not in self._resolving and key not in self._bank.leases:
                await self._take(tenant_id, request_id)

    async def _take(self, tenant_id: str, request_id: str) -> None:
        command = rules.Orphan(
            request_id=request_id,
            now_ms=self._bank.now_ms(),
            lease_ms=self._bank.lease_ms,
            owner=self._bank.router_id,
            ledger_up_since_ms=self._watch.up_since_ms,
        )
        answer = await self._bank.accounts.orphan(tenant_id, command)
        if isinstance(answer, rules.NotYet):
            return
        crash_point("orphan.after")
        logger.warning("resolving %s of %s, whose router vanished", request_id, tenant_id)
        self._resolving.add((tenant_id, request_id))
        self._bank.tasks.spawn(self._resolve(tenant_id, request_id, answer), name="resolve")

    async def _resolve(self, tenant_id: str, request_id: str, orphan: rules.Orphaned) -> None:
        try:
            terms = Terms.decode(orphan.terms)
            book = await self._books.get(terms.book_digest)
            progress = Progress.decode(orphan.checkpoint) if orphan.checkpoint else None
            finals = await self._finals(terms.wire_id, progress, orphan)
            crash_point("resolve.before")
            size = size_of(terms, book, orphan.admitted_at_ms)
            found = resolve(
                terms,
                progress,
                [each.end for each in finals],
                funded_tokens=size.funded_tokens(orphan.held_nano),
            )
            busy = retained.busy(self._bank.workers, finals)
            case = _Case(tenant_id, request_id, orphan, terms, found, busy)
            if found.usage.prompt_tokens:
                ended = await self._settle(case, book)
            else:
                ended = await self._release(case)
            crash_point("resolve.after")
            if ended:  # else who has taken the request over counts them
                await retained.acknowledge(finals)
        except LedgerUnavailable as error:
            logger.info("%s waits for its resolution: %s", request_id, error)
        except (ConfigError, UsageError) as error:
            logger.error("%s of %s cannot be resolved: %s", request_id, tenant_id, error)
        finally:
            self._resolving.discard((tenant_id, request_id))

    async def _finals(
        self, wire_id: str, progress: Progress | None, orphan: rules.Orphaned
    ) -> list[Retained]:
        """Those that workers keep; they are asked until that decides it, or for two leases.

        A worker notices a dead router within a step, and a busy machine's steps are long: one that
        still runs an attempt, or is silent, gets `retained.PATIENCE_S` however short they are.
        """
        two_leases_ms = 2 * self._bank.lease_ms
        patience_ms = max(two_leases_ms, round(retained.PATIENCE_S * 1000))
        while True:
            found, running = await retained.ask(self._bank.workers, wire_id)
            finals = [each for each in found if each.final.id.fence >= orphan.first_fence]
            if not running and decisive(progress, [each.end for each in finals]):
                return finals
            waited_ms = self._bank.now_ms() - orphan.orphaned_at_ms
            if waited_ms >= (patience_ms if running else two_leases_ms):
                return finals
            await asyncio.sleep(_ASK_EVERY * self._bank.lease_ms / 1000)

    async def _settle(self, case: _Case, book: PriceBook) -> bool:
        """Whether it is settled now."""
        now_ms, orphan, terms, found = self._bank.now_ms(), case.orphan, case.terms, case.found
        receipt = issue_receipt(
            book,
            request_id=case.request_id,
            tenant_id=case.tenant_id,
            key_id=terms.key_id,
            model=terms.model,
            price_model=terms.price_model,
            currency=terms.currency,
            usage=found.usage,
            hold_nano=orphan.held_nano,
            admitted_at_ms=orphan.admitted_at_ms,
            decided_at_ms=clamp_decided_at(
                now_ms, admitted_at_ms=orphan.admitted_at_ms, deadline_ms=terms.deadline_ms
            ),
            attempts=found.attempts,
        )
        completed = Completed(
            finish=found.finish,
            usage=found.usage,
            site=found.site,
            receipt=receipt,
            seed=terms.seed,
            timing=Timing(),
            num_choices=terms.choices,
        )
        command = rules.Settle(
            request_id=case.request_id,
            fence=orphan.fence,
            now_ms=now_ms,
            decided_at_ms=receipt.decided_at_ms,
            amount_nano=receipt.charge.amount_nano,
            content_sha256=receipt.content_sha256,
            record=record.encode(completed, busy=case.busy),
            total_tokens=found.usage.prompt_tokens + found.usage.completion_tokens,
        )
        answer = await self._bank.accounts.settle(case.tenant_id, command)
        self._bank.metrics.answered(answer)
        if isinstance(answer, rules.Posted) and not answer.duplicate:
            self._bank.metrics.resolved(found.known_from)
            self._bank.report(record.chained(completed, answer), case.busy)
        return isinstance(answer, rules.Posted)

    async def _release(self, case: _Case) -> bool:
        """Whether it is released now."""
        now_ms, model, usage = self._bank.now_ms(), case.terms.model, case.found.usage
        command = rules.Release(
            request_id=case.request_id,
            fence=case.orphan.fence,
            now_ms=now_ms,
            unbilled=record.encode_release(
                usage.unbilled, model=model, decided_at_ms=now_ms, busy=case.busy
            ),
            reason=_WHY,
        )
        answer = await self._bank.accounts.release(case.tenant_id, command)
        self._bank.metrics.answered(answer)
        if isinstance(answer, rules.Released):
            self._bank.metrics.resolved(case.found.known_from)
            self._bank.report_unbilled(
                case.tenant_id,
                case.request_id,
                model=model,
                usage=usage,
                reason=_WHY,
                busy=case.busy,
            )
        return isinstance(answer, rules.Released)
