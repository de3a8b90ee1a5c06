"""Admission: from what a client asked to a request that may be queued, or a refusal."""

import asyncio
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from services.router.config import LimitsConfig
from services.router.fleet import Fleet, ModelIdentity
from services.router.keys import Tenant
from services.router.models import Catalogue, ServedModel
from services.router.quote import worst_case_nano
from tidemill.billing import PriceBook
from tidemill.blocks import chain_hashes, root_hash
from tidemill.errors import FailedPrecondition, InvalidRequest, Unavailable
from tidemill.text import ChatMessage


@dataclass(frozen=True, slots=True)
class Conversation:
    """Chat messages in order."""

    messages: tuple[ChatMessage, ...]


# What the client wants completed.
Input = Conversation | str | tuple[int, ...]

MAX_STOP_TOKEN_IDS = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """A request as the client put it; None where it left a choice to the router."""

    request_id: str
    body_sha256: bytes
    model: str
    input: Input
    stop: tuple[str, ...] = ()
    temperature: float | None = None
    top_p: float | None = None
    top_k: int = 0
    seed: int | None = None
    max_tokens: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    max_cost: tuple[str, int] | None = None  # currency, nano-units
    first_token_timeout_s: float | None = None
    total_timeout_s: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How to draw, every default filled in."""

    temperature: float
    top_p: float
    top_k: int
    seed: int
    max_tokens: int
    stop_token_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Admitted:
    """A request that is sound and affordable; it lacks only a place in the queue."""

    ask: Ask
    tenant: Tenant
    model: ServedModel
    identity: ModelIdentity
    token_ids: Sequence[int]
    block_hashes: Sequence[bytes]
    sampling: Sampling
    admitted_at_ms: int
    first_token_timeout_s: float
    total_timeout_s: float

    @property
    def deadline_ms(self) -> int:
        """Instant after which no window may decide the bill."""
        return self.admitted_at_ms + round(self.total_timeout_s * 1000)

    @property
    def key(self) -> str:
        """Names the request among those of all tenants; see `request_key`."""
        return request_key(self.tenant.id, self.ask.request_id)


def request_key(tenant_id: str, request_id: str) -> str:
    """One name for (tenant, request id): tenants choose their ids without seeing each other's."""
    return f"{tenant_id}/{request_id}"


@dataclass(frozen=True, kw_only=True)
class Admission:
    """Checks and completes requests; the heavy part runs in `pool`."""

    catalogue: Catalogue
    fleet: Fleet
    book: PriceBook
    limits: LimitsConfig
    pool: ThreadPoolExecutor
    rng: random.Random
    now_ms: Callable[[], int]

    async def admit(self, ask: Ask, tenant: Tenant, *, call_timeout_s: float | None) -> Admitted:
        """Raise what is wrong with `ask`, else return it ready for the queue.

        `call_timeout_s` is what the call's own deadline leaves.
        """
        model = self.catalogue.get(ask.model)
        identity = self.fleet.identity(model.name)
        if identity is None:
            raise Unavailable(
                f"no worker serves {model.name} just now", reason="NO_WORKERS", retry_after_s=1.0
            )
        loop = asyncio.get_running_loop()
        token_ids = await loop.run_in_executor(self.pool, self._tokenize, model, ask)
        sampling = self._resolve(ask, model, self.context_tokens(model) - len(token_ids))
        root = root_hash(identity.digest, identity.kv_format, tenant.salt)
        hashes = await loop.run_in_executor(self.pool, chain_hashes, root, token_ids)
        admitted = Admitted(
            ask=ask,
            tenant=tenant,
            model=model,
            identity=identity,
            token_ids=token_ids,
            block_hashes=hashes,
            sampling=sampling,
            admitted_at_ms=self.now_ms(),
            first_token_timeout_s=_timeout(
                ask.first_token_timeout_s, self.limits.first_token_timeout_s, call_timeout_s
            ),
            total_timeout_s=_timeout(
                ask.total_timeout_s, self.limits.total_timeout_s, call_timeout_s
            ),
        )
        self._check_cost(admitted)
        return admitted

    def context_tokens(self, model: ServedModel) -> int:
        """Most tokens of the model's prompt and completion together; 0 without workers."""
        identity = self.fleet.identity(model.name)
        if identity is None:
            return 0
        configured = model.config.context_tokens
        announced = identity.context_tokens
        return announced if configured is None else min(configured, announced)

    def _tokenize(self, model: ServedModel, ask: Ask) -> Sequence[int]:
        tokenizer, max_bytes = model.tokenizer, self.limits.max_prompt_bytes
        if ask.stop_token_ids:
            tokenizer.check_ids(ask.stop_token_ids, field="sampling.stop_token_ids")
        if isinstance(ask.input, str):
            return tokenizer.encode(ask.input, max_bytes=max_bytes)
        if isinstance(ask.input, Conversation):
            return tokenizer.encode_chat(ask.input.messages, max_bytes=max_bytes)
        tokenizer.check_ids(ask.input, field="tokens.token_ids")
        return ask.input

    def _resolve(self, ask: Ask, model: ServedModel, room: int) -> Sampling:
        """Fill in the defaults; `room` is how many tokens the context leaves."""
        if room < 1:
            raise InvalidRequest(
                "the prompt leaves no room in the model's context",
                reason="CONTEXT_EXCEEDED",
                violations=[("input", f"{1 - room} tokens too long")],
            )
        most = model.config.max_output_tokens
        if ask.max_tokens is not None and ask.max_tokens > most:
            raise InvalidRequest(
                f"max_tokens is above this model's {most}",
                violations=[("sampling.max_tokens", f"must be at most {most}")],
            )
        wanted = model.config.default_max_tokens if ask.max_tokens is None else ask.max_tokens
        stop_ids = tuple(sorted(model.tokenizer.eos_ids | set(ask.stop_token_ids)))
        if len(stop_ids) > MAX_STOP_TOKEN_IDS:
            raise InvalidRequest(
                "too many stop tokens",
                violations=[("sampling.stop_token_ids", f"more than {MAX_STOP_TOKEN_IDS} in all")],
            )
        defaults = model.tokenizer.defaults
        return Sampling(
            temperature=defaults.temperature if ask.temperature is None else ask.temperature,
            top_p=defaults.top_p if ask.top_p is None else ask.top_p,
            top_k=ask.top_k,
            seed=self.rng.getrandbits(64) if ask.seed is None else ask.seed,
            max_tokens=min(wanted, room),
            stop_token_ids=stop_ids,
        )

    def _check_cost(self, admitted: Admitted) -> None:
        currency = admitted.tenant.currency
        if currency not in self.book.currencies:
            raise FailedPrecondition(
                f"nothing is sold in {currency} here", reason="CURRENCY_NOT_SOLD"
            )
        if admitted.ask.max_cost is None:
            return
        limit_currency, limit_nano = admitted.ask.max_cost
        if limit_currency != currency:
            raise InvalidRequest(
                "max_cost is in another currency than the account",
                violations=[("max_cost.currency", f"must be {currency}")],
            )
        worst = worst_case_nano(
            self.book,
            price_model=admitted.model.config.price_model,
            currency=currency,
            num_prompt_tokens=len(admitted.token_ids),
            max_tokens=admitted.sampling.max_tokens,
            admitted_at_ms=admitted.admitted_at_ms,
            deadline_ms=admitted.deadline_ms,
        )
        if worst > limit_nano:
            raise FailedPrecondition(
                "the request could cost more than max_cost",
                reason="MAX_COST_EXCEEDED",
                metadata={
                    "currency": currency,
                    "worst_case_nano": str(worst),
                    "max_cost_nano": str(limit_nano),
                },
            )


def _timeout(asked: float | None, default: float, call_timeout_s: float | None) -> float:
    timeout = default if asked is None else asked
    return timeout if call_timeout_s is None else min(timeout, call_timeout_s)
