"""What a request may cost at most: a pure reading of the price book.

Instants are milliseconds since the Unix epoch, prices pico-units per token.
"""

from tidemill.billing import Decides, PriceBook, Prices, Tariff, Window


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


def worst_case_nano(
    book: PriceBook,
    *,
    price_model: str,
    currency: str,
    num_prompt_tokens: int,
    max_tokens: int,
    admitted_at_ms: int,
    deadline_ms: int,
) -> int:
    """Most nano-units that the request can cost: no hits, all of `max_tokens`, dearest window."""

    def cost_pico(prices: Prices) -> int:
        return num_prompt_tokens * prices.miss + max_tokens * prices.output

    tariff = book.tariff_at(price_model, admitted_at_ms)
    windows = reachable_windows(tariff, admitted_at_ms, deadline_ms)
    dearest = max(cost_pico(window.prices[currency]) for window in windows)
    return -(-dearest // 1000)
