"""What a request may cost: pure readings of the price book.

Instants are milliseconds since the Unix epoch, prices pico-units per token, amounts nano-units.
`model` is always the price book's name. Whatever bounds a charge from above is rounded up, so it
is never below the charge itself, which is rounded half up.
"""

from dataclasses import dataclass

from tidemill.billing.integers import PICO_PER_NANO, require_int, round_half_up
from tidemill.billing.prices import Decides, PriceBook, Prices, Tariff, Window


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """Token counts of a request as they are billed."""

    hit: int = 0
    miss: int = 0
    output: int = 0

    def cost_pico(self, prices: Prices) -> int:
        """Their exact cost."""
        return self.hit * prices.hit + self.miss * prices.miss + self.output * prices.output


@dataclass(frozen=True, kw_only=True, slots=True)
class Cheaper:
    """A window in which the same tokens cost less, and when it starts."""

    starts_at_ms: int
    window: str
    amount_nano: int


def reachable_windows(tariff: Tariff, admitted_at_ms: int, deadline_ms: int) -> list[Window]:
    """Every window that may decide a request that lives from admission to its deadline."""
    windows = [tariff.window_at(admitted_at_ms)]
    if tariff.decides is Decides.ARRIVAL:
        return windows
    instant = admitted_at_ms
    while (end := tariff.window_ends_at(instant)) is not None and instant < end <= deadline_ms:
        windows.append(tariff.window_at(end))
        instant = end
    return windows


def dearest(
    book: PriceBook, *, model: str, currency: str, admitted_at_ms: int, deadline_ms: int
) -> Prices:
    """For each class of tokens the highest price that may decide the request.

    So what is held grows by the same price with every token, whenever it is extended. ConfigError
    if the book does not sell `model` in `currency` at admission.
    """
    tariff = book.tariff_at(model, admitted_at_ms)
    windows = reachable_windows(tariff, admitted_at_ms, deadline_ms)
    rows = [window.prices_in(currency) for window in windows]
    return Prices(
        hit=max(row.hit for row in rows),
        miss=max(row.miss for row in rows),
        output=max(row.output for row in rows),
    )


def hold_nano(prices: Prices, *, num_prompt_tokens: int, num_output_tokens: int) -> int:
    """What these tokens cost at most at `prices`: no hits, rounded up."""
    cost = Tokens(miss=num_prompt_tokens, output=num_output_tokens).cost_pico(prices)
    return -(-require_int(cost, "cost") // PICO_PER_NANO)


def payable_output_tokens(prices: Prices, *, held_nano: int, num_prompt_tokens: int) -> int | None:
    """Most output tokens that `held_nano` pays for after the prompt; None: any number.

    Negative if it does not even pay for the prompt.
    """
    left = require_int(held_nano, "held_nano") * PICO_PER_NANO - num_prompt_tokens * prices.miss
    if prices.output == 0:
        return None if left >= 0 else -1
    return left // prices.output


def worst_case_nano(
    book: PriceBook,
    *,
    model: str,
    currency: str,
    num_prompt_tokens: int,
    max_tokens: int,
    admitted_at_ms: int,
    deadline_ms: int,
) -> int:
    """Most that the request can cost: no hits, all of `max_tokens`, the dearest window."""
    tariff = book.tariff_at(model, admitted_at_ms)
    return max(
        hold_nano(
            window.prices_in(currency),
            num_prompt_tokens=num_prompt_tokens,
            num_output_tokens=max_tokens,
        )
        for window in reachable_windows(tariff, admitted_at_ms, deadline_ms)
    )


def expected_nano(book: PriceBook, *, model: str, currency: str, tokens: Tokens, at_ms: int) -> int:
    """What these tokens are charged if the request is admitted and decided at `at_ms`."""
    window = book.tariff_at(model, at_ms).window_at(at_ms)
    return round_half_up(tokens.cost_pico(window.prices_in(currency)))


def cheaper_window(
    book: PriceBook, *, model: str, currency: str, tokens: Tokens, at_ms: int, horizon_ms: int
) -> Cheaper | None:
    """The first window after `at_ms`, by `horizon_ms`, in which `tokens` cost less than now.

    None if there is none, or none is known: where a calendar ends, so does the search.
    """
    now_nano = expected_nano(book, model=model, currency=currency, tokens=tokens, at_ms=at_ms)
    instant = at_ms
    while (end := book.window_ends_at(model, instant)) is not None and end <= horizon_ms:
        tariff = book.tariff_at(model, end)
        if not tariff.knows(end) or currency not in tariff.currencies:
            return None
        window = tariff.window_at(end)
        amount = round_half_up(tokens.cost_pico(window.prices_in(currency)))
        if amount < now_nano:
            return Cheaper(starts_at_ms=end, window=window.name, amount_nano=amount)
        instant = end
    return None
