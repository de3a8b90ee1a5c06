"""The bill: issued once for each request, when its usage is final."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

from services.router.admission import Admitted
from services.router.finish import Completed, Finish, PrefillSite, Timing
from services.router.metrics import RouterMetrics
from tidemill.billing import PriceBook, Usage, clamp_decided_at, issue_receipt, worst_case_nano
from tidemill.errors import TidemillError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Settler:
    """Prices what was used by the frozen book, and tells log and metrics."""

    book: PriceBook
    metrics: RouterMetrics
    now_ms: Callable[[], int]

    def settle(
        self,
        admitted: Admitted,
        usage: Usage,
        *,
        finish: Finish,
        site: PrefillSite,
        timing: Timing,
        attempts: int,
    ) -> Completed:
        """Decide the window now (M6), price and report."""
        decided_at_ms = clamp_decided_at(
            self.now_ms(),
            admitted_at_ms=admitted.admitted_at_ms,
            deadline_ms=admitted.deadline_ms,
        )
        receipt = issue_receipt(
            self.book,
            request_id=admitted.ask.request_id,
            tenant_id=admitted.tenant.id,
            key_id=admitted.key_id,
            model=admitted.model.name,
            price_model=admitted.model.config.price_model,
            currency=admitted.tenant.currency,
            usage=usage,
            admitted_at_ms=admitted.admitted_at_ms,
            decided_at_ms=decided_at_ms,
            attempts=attempts,
            hold_nano=worst_case_nano(
                self.book,
                model=admitted.model.config.price_model,
                currency=admitted.tenant.currency,
                num_prompt_tokens=len(admitted.token_ids),
                max_tokens=admitted.sampling.n * admitted.sampling.max_tokens,
                admitted_at_ms=admitted.admitted_at_ms,
                deadline_ms=admitted.deadline_ms,
            ),
        )
        completed = Completed(
            finish=finish,
            usage=usage,
            site=site,
            receipt=receipt,
            seed=admitted.sampling.seed,
            timing=timing,
            num_choices=admitted.sampling.n,
        )
        self.metrics.completed(admitted.model.name, completed)
        fields = {**receipt.to_fields(), "content_sha256": receipt.content_sha256}
        logger.info(
            "settled",
            extra={
                "request_id": admitted.ask.request_id,
                "finish_reason": finish.name,
                "ttft_s": timing.first_token_us / 1e6,
                "total_s": timing.total_us / 1e6,
                "receipt": fields,
            },
        )
        return completed

    def write_off(self, admitted: Admitted, usage: Usage, error: TidemillError) -> None:
        """The request failed by our fault: report what nobody pays for."""
        self.metrics.failed(admitted.model.name, usage, error.reason)
        logger.warning(
            "written off",
            extra={
                "request_id": admitted.ask.request_id,
                "tenant_id": admitted.tenant.id,
                "reason": error.reason,
                "generated_tokens": usage.generated_tokens,
                "unbilled_lost_tokens": usage.unbilled.lost,
                "unbilled_server_fault_tokens": usage.unbilled.server_fault,
            },
        )
