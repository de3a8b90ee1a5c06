"""From usage and a frozen price book to an amount (DESIGN.md 4: M1, M6)."""

from dataclasses import dataclass

from tidemill.billing.integers import require_int, round_half_up
from tidemill.billing.prices import Decides, PriceBook
from tidemill.billing.usage import Usage


@dataclass(frozen=True, kw_only=True, slots=True)
class Charge:
    """What one request costs, and every figure that led there.

    `price_*` are per token, `*_cost_pico` exact per class of tokens. The only rounding is that of
    their sum to `amount_nano` nano-units. `saved_nano` is what the hits would have cost as misses
    less what they cost, rounded likewise; it is information and no part of the amount.
    `decided_by` is the `Decides` value that picked `window`.
    """

    model: str
    currency: str
    book_id: str
    book_version: int
    book_digest: str
    tariff_from_ms: int
    window: str
    decided_by: str
    price_hit_pico: int
    price_miss_pico: int
    price_output_pico: int
    hit_cost_pico: int
    miss_cost_pico: int
    output_cost_pico: int
    amount_nano: int
    saved_nano: int


def clamp_decided_at(now_ms: int, *, admitted_at_ms: int, deadline_ms: int) -> int:
    """`decided_at` of a request whose end the router saw at `now_ms` (M6).

    Within [admitted, deadline], so neither a slow settlement nor a clock step moves a request
    into a window that it could not have reached.
    """
    for name, value in (("now_ms", now_ms), ("deadline_ms", deadline_ms)):
        require_int(value, name)
    return max(require_int(admitted_at_ms, "admitted_at_ms"), min(now_ms, deadline_ms))


def compute_charge(
    book: PriceBook,
    *,
    model: str,
    currency: str,
    usage: Usage,
    admitted_at_ms: int,
    decided_at_ms: int,
) -> Charge:
    """Price `usage`: the tariff by `admitted_at_ms`, the window as that tariff decides.

    `model` is the price book's name. Raises ConfigError for a model, instant or currency that
    the book has no price for, TypeError for instants that are no ints, and ValueError for a
    decision before admission.
    """
    require_int(admitted_at_ms, "admitted_at_ms")
    if require_int(decided_at_ms, "decided_at_ms") < admitted_at_ms:
        raise ValueError(f"decided at {decided_at_ms}, before admission at {admitted_at_ms}")
    tariff = book.tariff_at(model, admitted_at_ms)
    at_completion = tariff.decides is Decides.COMPLETION
    window = tariff.window_at(decided_at_ms if at_completion else admitted_at_ms)
    prices = window.prices_in(currency)
    hit_cost_pico = usage.cache_hit_tokens * require_int(prices.hit, "hit price")
    miss_cost_pico = usage.cache_miss_tokens * require_int(prices.miss, "miss price")
    output_cost_pico = usage.completion_tokens * require_int(prices.output, "output price")
    return Charge(
        model=model,
        currency=currency,
        book_id=book.id,
        book_version=book.version,
        book_digest=book.digest,
        tariff_from_ms=tariff.effective_from_ms,
        window=window.name,
        decided_by=tariff.decides.value,
        price_hit_pico=prices.hit,
        price_miss_pico=prices.miss,
        price_output_pico=prices.output,
        hit_cost_pico=hit_cost_pico,
        miss_cost_pico=miss_cost_pico,
        output_cost_pico=output_cost_pico,
        amount_nano=round_half_up(hit_cost_pico + miss_cost_pico + output_cost_pico),
        saved_nano=round_half_up(usage.cache_hit_tokens * (prices.miss - prices.hit)),
    )
