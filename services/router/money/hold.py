"""Money held for one request: what it funds, how it grows, and how it ends."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from services.router.admission import Admitted
from services.router.crash_points import crash_point
from services.router.finish import Completed, Finish, PrefillSite, Timing
from services.router.money import record, retained
from services.router.money.bank import Bank
from services.router.money.counting import with_redone, within_funds, written_off
from services.router.money.intent import Intent
from services.router.money.resolution import with_former_ends
from services.router.money.retained import Retained
from services.router.money.terms import Progress, Terms
from tidemill.billing import (
    BusyPart,
    PriceBook,
    Receipt,
    Usage,
    clamp_decided_at,
    issue_receipt,
)
from tidemill.billing import ledger as rules
from tidemill.billing.hold_size import STEP_TOKENS, HoldSize
from tidemill.errors import Aborted, Cancelled, Internal, LedgerUnavailable, TidemillError

_NEVER = 1 << 62  # tokens

logger = logging.getLogger(__name__)


def _nothing() -> None:
    pass


class Hold:
    """An open hold under `fence`; made by the treasury, and ended by `settle` or `release`.

    `admitted` is the request as the ledger has it: after a takeover with the first owner's instant,
    seed and bounds. `before` is then how far that one came, and what older fences generated is
    counted as failover_redo when the request ends. `on_lost` is called if another router takes it.
    """

    def __init__(
        self,
        admitted: Admitted,
        terms: Terms,
        *,
        held: rules.Held,
        size: HoldSize,
        book: PriceBook,
        bank: Bank,
    ) -> None:
        self.admitted = admitted
        self.tenant_id = admitted.tenant.id
        self.request_id = admitted.ask.request_id
        self.fence = held.fence
        self._first_fence = held.first_fence
        self.before = Progress.decode(held.checkpoint) if held.checkpoint else None
        self.next_attempt = max(held.attempts, self.before.attempts if self.before else 0) + 1
        self.on_lost: Callable[[], None] = _nothing
        self._terms = terms
        self._size = size
        self._book = book
        self._bank = bank
        self._held_nano = held.held_nano
        self._due_at = self._half_of_the_rest(0)
        self._progress: Callable[[], Progress] | None = None
        # One command at a time: a checkpoint never overtakes a later one, nor a charge its hold.
        self._turn = asyncio.Lock()
        self._lost = self._ended = False
        bank.leases.add(self)

    @property
    def funded_tokens(self) -> int:
        """Completion tokens that are paid for, all choices, from the original prompt's end on."""
        cap = self._size.cap_nano
        held = self._held_nano if cap is None else min(self._held_nano, cap)
        return self._size.funded_tokens(held)

    def fund_due(self, generated_tokens: int) -> bool:
        """Whether to call `fund`: half of what was funded last, or of what is left, is used.

        While a checkpoint is being written too: this may be the last token that anybody hears of.
        """
        if generated_tokens < self._due_at or self._ended:
            return False
        if self._size.step_nano(self._held_nano) > 0:
            return True
        self._due_at = _NEVER  # all there may be is held: asked for every chunk, said once
        return False

    async def fund(self, progress: Progress) -> int | None:
        """Hold 512 tokens more, or what can be had, and write down how far the request is.

        The new `funded_tokens`; None if nothing more can be had at the moment.
        """
        async with self._turn:
            add_nano = self._size.step_nano(self._held_nano)
            if self._ended or self._lost or add_nano <= 0:
                return None
            crash_point("fund.before")
            answer = await self._extend(add_nano, progress)
            if isinstance(answer, rules.Refused) and self._pays(answer.available_nano):
                answer = await self._extend(answer.available_nano, progress)
            crash_point("fund.after")
            return self._extended(answer, progress.usage.completion_tokens)

    def checkpoint(self, progress: Callable[[], Progress]) -> None:
        """Write down how far the request is then, in a task of its own."""
        self._progress = progress
        self._bank.tasks.spawn(self._write_checkpoint(), name="checkpoint")

    async def settle(
        self,
        usage: Usage,
        *,
        finish: Finish,
        site: PrefillSite,
        timing: Timing,
        attempts: int,
        busy: Sequence[BusyPart],
    ) -> Completed:
        """Decide the window now (M6), price by the frozen book and charge, once.

        Pending if the ledger is away and the intent safe in the spool; nothing is charged without
        a prompt that was prefilled. Raises Aborted STALE_FENCE if another router has the request,
        and what `Cashier.submit` raises.
        """
        now_ms = self._bank.now_ms()
        async with self._turn:
            self._end()
            former = await self._former()
            usage = within_funds(self._whole(usage, former), self.funded_tokens)
            busy = [*busy, *retained.busy(self._bank.workers, former)]
            completed = Completed(
                finish=finish,
                usage=usage,
                site=self.before.site if self.before and self.before.usage.prompt_tokens else site,
                receipt=self._receipt(usage, attempts, now_ms),
                seed=self.admitted.sampling.seed,
                timing=timing,
                num_choices=self.admitted.sampling.n,
            )
            if usage.prompt_tokens:
                crash_point("settle.intent")
                answer = await self._submit(self._settle_command(completed, busy))
            else:
                answer = await self._submit(self._release_command(usage, finish.name, busy))
        completed = self._bank.signed(self._answered(answer, completed))
        self._bank.report(completed, busy)
        self._forget(former)
        return completed

    async def release(
        self, usage: Usage, error: TidemillError, *, busy: Sequence[BusyPart] = ()
    ) -> None:
        """The request came to nothing: free the hold, and journal what nobody pays for.

        Raises as `settle` does.
        """
        async with self._turn:
            self._end()
            former = await self._former()
            usage = written_off(self._whole(usage, former))
            busy = [*busy, *retained.busy(self._bank.workers, former)]
            self._bank.report_unbilled(
                self.tenant_id,
                self.request_id,
                model=self._terms.model,
                usage=usage,
                reason=error.reason,
                busy=busy,
            )
            answer = await self._submit(self._release_command(usage, error.reason, busy))
        if isinstance(answer, rules.Stale):
            raise self._stale(answer)
        self._forget(former)

    async def abandon(self) -> None:
        """Its request is gone before anything began: free the hold."""
        await self.release(Usage(), Cancelled("the client went away"))

    def lose(self) -> None:
        """Another router has the request: its generation ends here."""
        if not self._lost and not self._ended:
            self._lost = True
            self.on_lost()

    async def _extend(self, add_nano: int, progress: Progress) -> rules.ExtendReply | None:
        command = rules.Extend(
            request_id=self.request_id,
            fence=self.fence,
            now_ms=self._bank.now_ms(),
            add_nano=add_nano,
            checkpoint=self._written(progress),
        )
        try:
            return await self._bank.accounts.extend(self.tenant_id, command)
        except LedgerUnavailable as error:
            logger.warning("%s is not extended: %s", self.request_id, error)
            return None

    def _pays(self, add_nano: int) -> bool:
        """Whether so much more would fund another token."""
        return self._size.funded_tokens(self._held_nano + add_nano) > self.funded_tokens

    def _extended(self, answer: rules.ExtendReply | None, used_tokens: int) -> int | None:
        if isinstance(answer, rules.Extended):
            self._held_nano = answer.held_nano
            self._due_at = self._half_of_the_rest(self.funded_tokens - STEP_TOKENS)
            return self.funded_tokens
        if isinstance(answer, rules.Stale):
            self.lose()
        self._due_at = self._half_of_the_rest(used_tokens)
        return None

    def _half_of_the_rest(self, used_tokens: int) -> int:
        """The count at which half of what follows `used_tokens` is used too."""
        return self.funded_tokens - (self.funded_tokens - max(used_tokens, 0)) // 2

    async def _write_checkpoint(self) -> None:
        async with self._turn:
            progress, self._progress = self._progress, None
            if progress is None or self._ended or self._lost:
                return
            how_far = progress()
            command = rules.Checkpoint(
                request_id=self.request_id,
                fence=self.fence,
                now_ms=self._bank.now_ms(),
                attempts=how_far.attempts,
                checkpoint=self._written(how_far),
            )
            try:
                answer = await self._bank.accounts.checkpoint(self.tenant_id, command)
            except LedgerUnavailable as error:
                logger.warning("%s has no checkpoint: %s", self.request_id, error)
                return
            if isinstance(answer, rules.Stale):
                self.lose()

    def _end(self) -> None:
        self._ended = True
        self._bank.leases.discard(self)

    def _written(self, progress: Progress) -> str:
        """The checkpoint: with what came before this owner."""
        if self.before is not None:
            site = self.before.site if self.before.usage.prompt_tokens else progress.site
            usage = with_redone(progress.usage, self.before.usage)
            progress = replace(progress, usage=usage, site=site)
        return progress.under(self.fence, self.before).encode()

    async def _former(self) -> list[Retained]:
        """Finals of older fences, which nobody has counted yet."""
        if self.fence == self._first_fence:
            return []
        fences = range(self._first_fence, self.fence)
        return await retained.former(self._bank.workers, self._terms.wire_id, fences)

    def _whole(self, usage: Usage, former: Sequence[Retained]) -> Usage:
        """With what was generated under older fences."""
        if self.before is not None:
            usage = with_redone(usage, self.before.usage)
        return with_former_ends(usage, self.before, [each.end for each in former])

    def _forget(self, former: Sequence[Retained]) -> None:
        """They are counted: workers need not keep them."""
        if former:
            self._bank.tasks.spawn(retained.acknowledge(former), name="acknowledge")

    def _receipt(self, usage: Usage, attempts: int, now_ms: int) -> Receipt:
        return issue_receipt(
            self._book,
            request_id=self.request_id,
            tenant_id=self.tenant_id,
            key_id=self._terms.key_id,
            model=self._terms.model,
            price_model=self._terms.price_model,
            currency=self._terms.currency,
            usage=usage,
            hold_nano=self._held_nano,
            admitted_at_ms=self.admitted.admitted_at_ms,
            decided_at_ms=clamp_decided_at(
                now_ms,
                admitted_at_ms=self.admitted.admitted_at_ms,
                deadline_ms=self._terms.deadline_ms,
            ),
            attempts=attempts,
        )

    def _settle_command(self, completed: Completed, busy: Sequence[BusyPart]) -> rules.Settle:
        receipt, usage = completed.receipt, completed.usage
        return rules.Settle(
            request_id=self.request_id,
            fence=self.fence,
            now_ms=self._bank.now_ms(),
            decided_at_ms=receipt.decided_at_ms,
            amount_nano=receipt.charge.amount_nano,
            content_sha256=receipt.content_sha256,
            record=record.encode(completed, busy=busy),
            total_tokens=usage.prompt_tokens + usage.completion_tokens,
        )

    def _release_command(
        self, usage: Usage, reason: str, busy: Sequence[BusyPart]
    ) -> rules.Release:
        return rules.Release(
            request_id=self.request_id,
            fence=self.fence,
            now_ms=self._bank.now_ms(),
            unbilled=record.encode_release(
                usage.unbilled,
                model=self._terms.model,
                decided_at_ms=self._bank.now_ms(),
                busy=busy,
            ),
            reason=reason,
        )

    async def _submit(
        self, command: rules.Settle | rules.Release
    ) -> rules.SettleReply | rules.ReleaseReply | None:
        intent = Intent(
            tenant_id=self.tenant_id,
            body_sha256=self.admitted.ask.body_sha256.hex(),
            command=command,
        )
        return await self._bank.cashier.submit(intent)

    def _answered(
        self, answer: rules.SettleReply | rules.ReleaseReply | None, completed: Completed
    ) -> Completed:
        match answer:
            case None:
                return replace(completed, pending=bool(completed.usage.prompt_tokens))
            case rules.Released():
                return completed
            case rules.Posted(duplicate=False):
                return record.chained(completed, answer)
            case rules.Posted():
                # Our own charge, said twice, or that of a resolver or a later owner.
                return record.settled(answer).completed
            case rules.Stale():
                raise self._stale(answer)
            case rules.AboveHold():
                raise Internal("the charge exceeds the hold", reason="ABOVE_HOLD")

    def _stale(self, answer: rules.Stale) -> Aborted:
        return Aborted(
            "another router has taken this request over",
            reason="STALE_FENCE",
            metadata={"state": answer.state.value, "fence": str(answer.fence)},
        )
