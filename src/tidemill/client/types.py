"""What the SDK hands out: events, results and their parts, free of protobuf."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from tidemill import billing
from tidemill.errors import UsageError


class FinishReason(StrEnum):
    """Why a completion ended; UNKNOWN stands for a reason newer than this client."""

    STOP = "stop"
    LENGTH = "length"
    BUDGET = "budget"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    SLOW_READER = "slow_reader"
    SERVER_FAULT = "server_fault"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation; `role` is "system", "user" or "assistant"."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class MaxCost:
    """An upper bound on a request's cost, in 10^-9 of the currency's unit."""

    currency: str
    nano: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """Token counts as the router reported them, not yet checked.

    `cache_hit_tokens` and `cache_miss_tokens` are the billed split of the prompt, `reuse` is what
    was truly reused by tier. All zero until a prefill has finished.
    """

    prompt_tokens: int = 0
    cache_hit_tokens: int = 0
    cache_miss_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    computed_tokens: int = 0
    reuse: billing.Reuse = field(default_factory=billing.Reuse)
    generated_tokens: int = 0
    unbilled: billing.Unbilled = field(default_factory=billing.Unbilled)
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    prefill_site: str = ""
    prefill_worker_id: str = ""

    def check(self) -> None:
        """Raise UsageError where U1, U2 or M4 (DESIGN.md 4) does not hold."""
        true = billing.Usage(
            prompt_tokens=self.prompt_tokens,
            computed_tokens=self.computed_tokens,
            reused=self.reuse,
            completion_tokens=self.completion_tokens,
            reasoning_tokens=self.reasoning_tokens,
            generated_tokens=self.generated_tokens,
            unbilled=self.unbilled,
            drafted_tokens=self.drafted_tokens,
            accepted_tokens=self.accepted_tokens,
        )
        if self.cache_hit_tokens != true.cache_hit_tokens:
            raise UsageError(
                f"U2 does not hold: {self.cache_hit_tokens} hit tokens billed, "
                f"{true.cache_hit_tokens} follow from {self.reuse.total} reused "
                f"of {self.prompt_tokens}"
            )
        if self.cache_miss_tokens != true.cache_miss_tokens:
            raise UsageError(
                f"U2 does not hold: {self.cache_hit_tokens} hit + {self.cache_miss_tokens} miss "
                f"!= {self.prompt_tokens} prompt tokens"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `tidemill --json` prints them."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "cache_hit_tokens": self.cache_hit_tokens,
            "cache_miss_tokens": self.cache_miss_tokens,
            "completion_tokens": self.completion_tokens,
            "reasoning_tokens": self.reasoning_tokens,
            "computed_tokens": self.computed_tokens,
            "reuse": {
                "device": self.reuse.device,
                "host": self.reuse.host,
                "cache_ram": self.reuse.cache_ram,
                "cache_disk": self.reuse.cache_disk,
                "peer": self.reuse.peer,
            },
            "generated_tokens": self.generated_tokens,
            "unbilled": {
                "overrun": self.unbilled.overrun,
                "failover_redo": self.unbilled.failover_redo,
                "lost": self.unbilled.lost,
                "server_fault": self.unbilled.server_fault,
            },
            "drafted_tokens": self.drafted_tokens,
            "accepted_tokens": self.accepted_tokens,
            "prefill_site": self.prefill_site,
            "prefill_worker_id": self.prefill_worker_id,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Receipt:
    """A request's bill, as received.

    `content` is the flat form of tidemill.billing (names, counts, prices in pico-units a token,
    amounts in nano-units); `state` is "priced", "pending" or "settled". Only a settled receipt
    has a place in the account's chain, and balances that paid. Hashes and `signature` are in
    hexadecimal.
    """

    content: Mapping[str, str | int]
    state: str
    content_sha256: str
    position: int = 0
    previous_chain: str = ""
    chain: str = ""
    granted_nano: int = 0
    topped_up_nano: int = 0
    signature: str = ""
    signing_key_id: str = ""

    @property
    def amount_nano(self) -> int:
        """The charge, in 10^-9 of the currency's unit."""
        return int(self.content["amount_nano"])

    @property
    def saved_nano(self) -> int:
        """What the hits saved against the miss price, in 10^-9 of the currency's unit."""
        return int(self.content["saved_nano"])

    @property
    def currency(self) -> str:
        """ISO 4217 code."""
        return str(self.content["currency"])

    @property
    def window(self) -> str:
        """Name of the price window that applied."""
        return str(self.content["window"])

    @property
    def amount(self) -> str:
        """The charge for people, e.g. "0.001234500 USD"."""
        return billing.format_amount(self.amount_nano, self.currency)

    @property
    def saved(self) -> str:
        """The saving for people."""
        return billing.format_amount(self.saved_nano, self.currency)

    def to_billing(self) -> billing.Receipt:
        """The receipt that tidemill.billing works on; ReceiptError if it contradicts itself."""
        return billing.Receipt.from_fields(self.content, content_sha256=self.content_sha256)

    def verify(self, book: billing.PriceBook) -> None:
        """Recompute the bill from its counts and the public price book.

        ReceiptError names every field that differs and the value it should have.
        """
        billing.verify(self.to_billing(), book)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, one object a receipt: the form of exports (tidemill.billing)."""
        return {
            **self.content,
            "content_sha256": self.content_sha256,
            "state": self.state,
            "position": self.position,
            "previous_chain": self.previous_chain,
            "chain": self.chain,
            "granted_nano": self.granted_nano,
            "topped_up_nano": self.topped_up_nano,
            "signature": self.signature,
            "signing_key_id": self.signing_key_id,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Where a request's time went, in seconds.

    The first three are the router's clock from admission on; prefill and decode are the workers'
    own figures.
    """

    queued_s: float = 0.0
    first_token_s: float = 0.0
    total_s: float = 0.0
    prefill_s: float = 0.0
    decode_busy_s: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Accepted:
    """The request has a place in the queue, `position` others ahead of it. The first event.

    `expected_wait_s` is how long the router expects it to wait; None: it cannot tell yet.
    """

    request_id: str
    position: int
    prompt_tokens: int
    admitted_at_ms: int
    expected_wait_s: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Queued:
    """The request still waits, now with `position` others ahead of it and so long from now."""

    position: int
    expected_wait_s: float | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """How likely a token was in its place, and the likeliest ones there, likeliest first.

    Natural logarithms of the model's own probabilities, before temperature, penalties, bias and
    format. `top` holds (token id, logarithm) pairs, as many as were asked for.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `tidemill --json` prints them."""
        top = [{"token_id": token_id, "logprob": logprob} for token_id, logprob in self.top]
        return {"token_id": self.token_id, "logprob": self.logprob, "top": top}


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptScored:
    """How likely the prompt's tokens were, from index `first_index` on; before any chunk."""

    first_index: int
    logprobs: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class TextChunk:
    """Some tokens of one choice and the whole characters that they complete.

    `first_index` is the place of token_ids[0] in the choice; `usage` is the bill's counts so far,
    all choices together. `logprobs` are the tokens', or empty if they were not asked for.
    """

    sequence: int
    first_index: int
    token_ids: tuple[int, ...]
    text: str
    reasoning: str
    usage: Usage
    choice: int = 0
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class ChoiceEnd:
    """One of several choices has ended, with so many billed tokens."""

    choice: int
    finish_reason: FinishReason
    completion_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Completed:
    """The end and the bill; of several choices, why the last one ended. The last event.

    `text_replayed` is None but for a request id that had been settled before; then it says whether
    the text came once more.
    """

    finish_reason: FinishReason
    usage: Usage
    receipt: Receipt | None
    seed: int
    timing: Timing
    text_replayed: bool | None = None


Event = Accepted | Queued | PromptScored | TextChunk | ChoiceEnd | Completed


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One of a request's completions; `finish_reason` is None while it goes on."""

    index: int
    text: str
    reasoning: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    logprobs: tuple[TokenLogprobs, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `reasoning` and `logprobs` are added where there are any."""
        return {
            "text": self.text,
            **({"reasoning": self.reasoning} if self.reasoning else {}),
            "token_ids": list(self.token_ids),
            **({"logprobs": [each.to_dict() for each in self.logprobs]} if self.logprobs else {}),
            "finish_reason": self.finish_reason.value if self.finish_reason else None,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """A whole answer with its bill.

    `choices` are in order; `text` and its kin are those of the first, mostly the only one.
    `finish_reason` tells why the last choice ended, `prompt_logprobs` how likely the prompt's
    tokens from the second on were, if that was asked for. `replayed`: the request had come to its
    end before, under the same id. The bill is that one; the text is not kept by the router, so
    there is none.
    """

    request_id: str
    choices: tuple[Choice, ...]
    finish_reason: FinishReason
    usage: Usage
    receipt: Receipt | None
    seed: int
    timing: Timing
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    replayed: bool = False

    @property
    def text(self) -> str:
        """Answer text."""
        return self.choices[0].text

    @property
    def reasoning(self) -> str:
        """Reasoning text."""
        return self.choices[0].reasoning

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The completion's tokens."""
        return self.choices[0].token_ids

    @property
    def logprobs(self) -> tuple[TokenLogprobs, ...]:
        """The tokens' log-probabilities, if they were asked for."""
        return self.choices[0].logprobs

    def to_dict(self) -> dict[str, Any]:
        """`text`, `token_ids`, `finish_reason`, `usage`, `receipt`, as `--json` prints them.

        `reasoning`, `logprobs` and `prompt_logprobs` are added where there are any, and of
        several choices all as `choices`; what stands beside those is the first one's.
        """
        scored = [each.to_dict() for each in self.prompt_logprobs]
        several = [choice.to_dict() for choice in self.choices] if len(self.choices) > 1 else []
        return {
            **self.choices[0].to_dict(),
            "finish_reason": self.finish_reason.value,
            **({"choices": several} if several else {}),
            **({"prompt_logprobs": scored} if scored else {}),
            "usage": self.usage.to_dict(),
            "receipt": None if self.receipt is None else self.receipt.to_dict(),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A served model with its limits and its prices now, in pico-units (10^-12) a token.

    `window_ends_at_ms` is None where the window never ends.
    """

    name: str
    context_tokens: int
    max_output_tokens: int
    currency: str
    prices: billing.Prices
    window: str
    window_ends_at_ms: int | None
    prefill_workers: int
    decode_workers: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    """An API key as it is listed: without its secret."""

    key_id: str
    tenant_id: str
    label: str
    created_at_ms: int
    revoked: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class NewKey:
    """A key just made. `key` is its secret form and is never shown again."""

    key_id: str
    key: str = field(repr=False)
