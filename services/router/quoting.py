"""What a request would cost: admission's checks and the price book, and nothing is taken."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from services.router.admission import Admission, Admitted, Ask
from services.router.dispatch import Dispatcher
from services.router.keys import Caller
from services.router.money.accounts import Accounts
from services.router.money.refusals import max_cost_exceeded
from tidemill.billing import (
    PriceBook,
    Prices,
    Tokens,
    cheaper_window,
    expected_nano,
    worst_case_nano,
)
from tidemill.billing.hold_size import hold_size

_HORIZON_MS = 7 * 24 * 3600 * 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class PricedWindow:
    """A window from `starts_at_ms` to `ends_at_ms` (None: for ever), and the request's price."""

    window: str
    starts_at_ms: int
    ends_at_ms: int | None
    prices: Prices
    expected_nano: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Quote:
    """The counts that a price was put on, and the prices; see the proto's QuoteResponse."""

    prompt_tokens: int
    expected_hit_tokens: int
    max_tokens: int
    now: PricedWindow
    cheaper: PricedWindow | None
    max_nano: int
    hold_nano: int
    currency: str


@dataclass(frozen=True, kw_only=True)
class Quoting:
    """Quotes requests; `dispatchers` are keyed by model name."""

    admission: Admission
    dispatchers: Mapping[str, Dispatcher]
    accounts: Accounts
    now_ms: Callable[[], int]

    async def quote(
        self, ask: Ask, caller: Caller, *, expected_completion_tokens: int | None
    ) -> Quote:
        """Raises what admission would raise, MAX_COST_EXCEEDED as a hold would, LedgerUnavailable.

        No price exceeds `max_nano`; a later window is told only if the request then costs less.
        """
        admitted = await self.admission.admit(ask, caller, call_timeout_s=None)
        balance = await self.accounts.balance(caller.tenant.id)
        book, now_ms = self.admission.book, self.now_ms()
        model, currency = admitted.model.config.price_model, caller.tenant.currency
        tokens = self._expected(admitted, expected_completion_tokens)
        cheaper = cheaper_window(
            book,
            model=model,
            currency=currency,
            tokens=tokens,
            at_ms=now_ms,
            horizon_ms=now_ms + _HORIZON_MS,
        )
        size = hold_size(
            book,
            price_model=model,
            currency=currency,
            prompt_tokens=len(admitted.token_ids),
            max_tokens=admitted.sampling.max_tokens,
            choices=admitted.sampling.n,
            cap_nano=None if ask.max_cost is None else ask.max_cost[1],
            admitted_at_ms=admitted.admitted_at_ms,
            deadline_ms=admitted.deadline_ms,
        )
        if not size.sufficient_cap:
            raise max_cost_exceeded(size, currency)
        most_nano = _most_nano(book, admitted, size.max_tokens, size.cap_nano)
        now = _within(_window(book, model, currency, tokens, now_ms), most_nano)
        later = cheaper and _within(
            _window(book, model, currency, tokens, cheaper.starts_at_ms), most_nano
        )
        available = balance.granted_nano + balance.topped_up_nano
        return Quote(
            prompt_tokens=len(admitted.token_ids),
            expected_hit_tokens=tokens.hit,
            max_tokens=size.max_tokens,
            now=now,
            cheaper=later if later and later.expected_nano < now.expected_nano else None,
            max_nano=most_nano,
            hold_nano=size.full_nano if size.full_nano <= available else size.least_nano,
            currency=currency,
        )

    def _expected(self, admitted: Admitted, completion_tokens: int | None) -> Tokens:
        num_prompt = len(admitted.token_ids)
        most = admitted.sampling.n * admitted.sampling.max_tokens
        hit = self.dispatchers[admitted.model.name].expected_hit_tokens(
            num_prompt, admitted.block_hashes
        )
        output = most if completion_tokens is None else min(completion_tokens, most)
        return Tokens(hit=hit, miss=num_prompt - hit, output=output)


def _window(book: PriceBook, model: str, currency: str, tokens: Tokens, at_ms: int) -> PricedWindow:
    window = book.tariff_at(model, at_ms).window_at(at_ms)
    return PricedWindow(
        window=window.name,
        starts_at_ms=at_ms,
        ends_at_ms=book.window_ends_at(model, at_ms),
        prices=window.prices_in(currency),
        expected_nano=expected_nano(
            book, model=model, currency=currency, tokens=tokens, at_ms=at_ms
        ),
    )


def _within(window: PricedWindow, most_nano: int) -> PricedWindow:
    return replace(window, expected_nano=min(window.expected_nano, most_nano))


def _most_nano(book: PriceBook, admitted: Admitted, max_tokens: int, cap_nano: int | None) -> int:
    worst = worst_case_nano(
        book,
        model=admitted.model.config.price_model,
        currency=admitted.tenant.currency,
        num_prompt_tokens=len(admitted.token_ids),
        max_tokens=max_tokens,
        admitted_at_ms=admitted.admitted_at_ms,
        deadline_ms=admitted.deadline_ms,
    )
    return worst if cap_nano is None else min(worst, cap_nano)
