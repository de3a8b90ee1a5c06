"""How much is held for a request, and how many of its tokens that pays for (DESIGN.md 3.4, M3).

Pure. Amounts are nano-units, rounded up; tokens of all choices count together. Every price is the
highest that may yet decide the request, so what was held always covers what is charged.
"""

from __future__ import annotations

from dataclasses import dataclass

from tidemill.billing.ledger_commands import MAX_NANO
from tidemill.billing.prices import PriceBook, Prices
from tidemill.billing.quote import dearest, hold_nano, payable_output_tokens

STEP_TOKENS = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class HoldSize:
    """What may be held for one request.

    `max_tokens` bounds its completion tokens, `first_tokens` are drawn at once with the prefill
    (one for each choice), `cap_nano` is the most that its client lets it cost.
    """

    prices: Prices
    prompt_tokens: int
    max_tokens: int
    first_tokens: int = 1
    cap_nano: int | None = None

    @property
    def full_nano(self) -> int:
        """Pays for everything that may be generated, within the cap."""
        return self._capped(self._nano(self.max_tokens))

    @property
    def least_nano(self) -> int:
        """Pays for the prompt and the first step, within the cap."""
        return self._capped(self._nano(min(STEP_TOKENS, self.max_tokens)))

    @property
    def first_nano(self) -> int:
        """Pays for the prompt and the first token of every choice."""
        return self._nano(self.first_tokens)

    @property
    def sufficient_cap(self) -> bool:
        """Whether the cap pays for the prompt and a first token of every choice."""
        return self.first_nano <= self.most_nano

    @property
    def most_nano(self) -> int:
        """Never held more than this: the cap, or what the ledger can count."""
        return MAX_NANO if self.cap_nano is None else self.cap_nano

    def funded_tokens(self, held_nano: int) -> int:
        """Completion tokens that `held_nano` pays for after the prompt, at most `max_tokens`."""
        payable = payable_output_tokens(
            self.prices, held_nano=held_nano, num_prompt_tokens=self.prompt_tokens
        )
        return self.max_tokens if payable is None else max(0, min(payable, self.max_tokens))

    def step_nano(self, held_nano: int) -> int:
        """What to add for up to 512 more tokens; 0 if no further token may be paid for."""
        funded = self.funded_tokens(held_nano)
        wanted = self._capped(self._nano(min(funded + STEP_TOKENS, self.max_tokens)))
        return wanted - held_nano if self.funded_tokens(wanted) > funded else 0

    def _nano(self, completion_tokens: int) -> int:
        return hold_nano(
            self.prices,
            num_prompt_tokens=self.prompt_tokens,
            num_output_tokens=completion_tokens,
        )

    def _capped(self, amount_nano: int) -> int:
        return min(amount_nano, self.most_nano)


def hold_size(
    book: PriceBook,
    *,
    price_model: str,
    currency: str,
    prompt_tokens: int,
    max_tokens: int,
    choices: int,
    cap_nano: int | None,
    admitted_at_ms: int,
    deadline_ms: int,
) -> HoldSize:
    """The sizes at the dearest prices from admission to the deadline; `max_tokens` per choice.

    ConfigError where the book has no price for it.
    """
    return HoldSize(
        prices=dearest(
            book,
            model=price_model,
            currency=currency,
            admitted_at_ms=admitted_at_ms,
            deadline_ms=deadline_ms,
        ),
        prompt_tokens=prompt_tokens,
        max_tokens=choices * max_tokens,
        first_tokens=choices,
        cap_nano=cap_nano,
    )
