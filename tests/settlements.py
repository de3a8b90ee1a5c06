"""Requests settled in a real ledger without a router: instants, models and counts as tests want."""

import itertools
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from services.router.config import RouterConfig
from services.router.finish import Completed, Finish, PrefillSite, Timing
from services.router.money import record
from services.router.money.accounts import Accounts
from services.router.money.ledger import Ledger
from tests.router_harness import BOOK_PATH
from tidemill.billing import BusyPart, Reuse, Unbilled, Usage, issue_receipt, load_price_book
from tidemill.billing import ledger as rules

BOOK = load_price_book(BOOK_PATH)
NOON_MS = 1_750_075_200_000  # 2025-06-16 12:00 UTC
HOUR_MS = 3_600_000


@asynccontextmanager
async def ledger_accounts(config: RouterConfig) -> AsyncIterator[Accounts]:
    """The accounts that a router of this configuration has."""
    ledger = Ledger(config.ledger)
    yield Accounts(ledger)
    await ledger.close()


@dataclass
class Settlements:
    """One tenant's account, in which a test settles what it likes."""

    accounts: Accounts
    tenant_id: str
    currency: str = "USD"
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    async def settle(
        self,
        *,
        at_ms: int = NOON_MS,
        request_id: str | None = None,
        key_id: str = "k1",
        model: str = "tiny",
        usage: Usage | None = None,
    ) -> Completed:
        """Hold and charge one request, decided at `at_ms`."""
        request_id = request_id or f"settled-{next(self._numbers)}"
        completed = self._completed(request_id, at_ms, key_id, model, usage or some_usage())
        hold = rules.Reserve(
            request_id=request_id,
            key_id=key_id,
            body_sha256="00" * 32,
            owner="test",
            now_ms=at_ms - 1000,
            lease_ms=15_000,
            full_nano=completed.receipt.hold_nano,
            least_nano=completed.receipt.hold_nano,
            prompt_tokens=completed.usage.prompt_tokens,
            max_tokens=completed.usage.completion_tokens,
            deadline_ms=at_ms + HOUR_MS,
            terms="{}",
        )
        held = await self.accounts.reserve(self.tenant_id, hold)
        assert isinstance(held, rules.Held), held
        posted = await self.accounts.settle(
            self.tenant_id,
            rules.Settle(
                request_id=request_id,
                fence=held.fence,
                now_ms=at_ms,
                decided_at_ms=at_ms,
                amount_nano=completed.receipt.charge.amount_nano,
                content_sha256=completed.receipt.content_sha256,
                record=record.encode(completed, busy=[BusyPart("w", "decode", 7)]),
                total_tokens=completed.usage.prompt_tokens + completed.usage.completion_tokens,
            ),
        )
        assert isinstance(posted, rules.Posted), posted
        return record.chained(completed, posted)

    def _completed(
        self, request_id: str, at_ms: int, key_id: str, model: str, usage: Usage
    ) -> Completed:
        receipt = issue_receipt(
            BOOK,
            request_id=request_id,
            tenant_id=self.tenant_id,
            key_id=key_id,
            model=model,
            price_model="deepseek-chat",
            currency=self.currency,
            usage=usage,
            admitted_at_ms=at_ms - 1000,
            decided_at_ms=at_ms,
            hold_nano=10**7,
        )
        return Completed(
            finish=Finish.STOP,
            usage=usage,
            site=PrefillSite(worker_id="prefill-0"),
            receipt=receipt,
            seed=2**64 - 1,
            timing=Timing(total_us=1000),
        )


def some_usage(rng: random.Random | None = None) -> Usage:
    """Counts of every kind; the same ones without `rng`."""
    draw = (rng or random.Random(1)).randrange
    reused = Reuse(
        device=64 * draw(4),
        host=64 * draw(4),
        cache_ram=64 * draw(4),
        cache_disk=64 * draw(4),
        peer=64 * draw(4),
    )
    computed, completion = draw(1, 200), draw(1, 60)
    unbilled = Unbilled(overrun=draw(5), failover_redo=draw(5), lost=draw(5), server_fault=draw(5))
    return Usage(
        prompt_tokens=computed + reused.total,
        computed_tokens=computed,
        reused=reused,
        completion_tokens=completion,
        reasoning_tokens=draw(completion + 1),
        generated_tokens=completion + unbilled.total,
        unbilled=unbilled,
    )


def totals_of(message: Any) -> dict[str, int]:
    """What a receipt's message adds to a row of usage."""
    usage, prompt = message.usage, message.usage.prompt
    return {
        "requests": 1,
        "cache_hit_tokens": usage.cache_hit_tokens,
        "cache_miss_tokens": usage.cache_miss_tokens,
        "completion_tokens": usage.completion_tokens,
        "reasoning_tokens": usage.reasoning_tokens,
        "computed_tokens": prompt.computed_tokens,
        "device": prompt.reused_device_tokens,
        "host": prompt.reused_host_tokens,
        "cache_ram": prompt.reused_cache_ram_tokens,
        "cache_disk": prompt.reused_cache_disk_tokens,
        "peer": prompt.reused_peer_tokens,
        "unbilled_tokens": usage.unbilled.overrun_tokens
        + usage.unbilled.failover_redo_tokens
        + usage.unbilled.lost_tokens
        + usage.unbilled.server_fault_tokens,
        "amount_nano": message.amount_nano,
        "saved_nano": message.saved_nano,
    }
