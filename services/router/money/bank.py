"""What all holds of one router share."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from services.router.finish import Completed
from services.router.metrics import RouterMetrics
from services.router.money.accounts import Accounts
from services.router.money.cashier import Cashier
from services.router.money.leases import Leases
from services.router.money.metrics import MoneyMetrics
from services.router.money.retained import Workers
from services.router.tasks import OwnedTasks
from tidemill.billing import BusyPart, PriceBook, Usage, decode_book
from tidemill.errors import ConfigError
from tidemill.rpc.tracing import describe

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Bank:
    """The ledger's accounts, this router's name and lease there, and who signs and counts."""

    accounts: Accounts
    cashier: Cashier
    leases: Leases
    tasks: OwnedTasks
    signed: Callable[[Completed], Completed]
    workers: Workers
    metrics: MoneyMetrics
    requests: RouterMetrics
    router_id: str
    lease_ms: int
    now_ms: Callable[[], int]

    def report(self, completed: Completed, busy: Sequence[BusyPart]) -> None:
        """A request was settled, or waits to be: tell log and metrics."""
        receipt, timing = completed.receipt, completed.timing
        self.requests.completed(receipt.model, completed)
        self.requests.used(receipt.model, busy)
        describe(_span_attributes(completed))
        fields = {**receipt.to_fields(), "content_sha256": receipt.content_sha256}
        logger.info(
            "pending" if completed.pending else "settled",
            extra={
                "request_id": receipt.request_id,
                "finish_reason": completed.finish.name,
                "ttft_s": timing.first_token_us / 1e6,
                "total_s": timing.total_us / 1e6,
                "receipt": fields,
            },
        )

    def report_unbilled(
        self,
        tenant_id: str,
        request_id: str,
        *,
        model: str,
        usage: Usage,
        reason: str,
        busy: Sequence[BusyPart],
    ) -> None:
        """A request was written off: tell what nobody pays for."""
        self.requests.failed(model, usage, reason)
        self.requests.used(model, busy)
        logger.warning(
            "written off",
            extra={
                "request_id": request_id,
                "tenant_id": tenant_id,
                "reason": reason,
                "generated_tokens": usage.generated_tokens,
                "unbilled_lost_tokens": usage.unbilled.lost,
                "unbilled_server_fault_tokens": usage.unbilled.server_fault,
            },
        )


def _span_attributes(completed: Completed) -> dict[str, str | int | float]:
    """By OpenTelemetry's GenAI conventions, and what they have no name for."""
    receipt, usage = completed.receipt, completed.usage
    return {
        "gen_ai.request.model": receipt.model,
        "gen_ai.response.finish_reasons": completed.finish.name.lower(),
        "gen_ai.usage.input_tokens": usage.prompt_tokens,
        "gen_ai.usage.cache_read.input_tokens": usage.cache_hit_tokens,
        "gen_ai.usage.output_tokens": usage.completion_tokens,
        "tidemill.request_id": receipt.request_id,
        "tidemill.tenant_id": receipt.tenant_id,
        "tidemill.amount_nano": receipt.charge.amount_nano,
        "tidemill.currency": receipt.charge.currency,
        "tidemill.ttft_s": completed.timing.first_token_us / 1e6,
    }


class Books:
    """Price books by digest: this router's own, and those that older requests were let in under."""

    def __init__(self, accounts: Accounts, own: PriceBook) -> None:
        self._accounts = accounts
        self.own = own
        self._known = {own.digest: own}

    async def publish(self) -> None:
        """Keep this router's book in the ledger, for whoever has to price by it later."""
        await self._accounts.put_book(self.own.digest, self.own.canonical_bytes)

    async def get(self, digest: str) -> PriceBook:
        """The book; ConfigError if the ledger has none of that digest."""
        if digest not in self._known:
            content = await self._accounts.get_book(digest)
            if content is None:
                raise ConfigError(f"the ledger has no price book {digest}")
            self._known[digest] = decode_book(content, digest=digest)
        return self._known[digest]
