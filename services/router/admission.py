"""Admission: from what a client asked to a request that may be queued, or a refusal."""

import asyncio
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

from services.router.config import LimitsConfig
from services.router.fleet import Fleet, ModelIdentity
from services.router.keys import Caller, Tenant
from services.router.models import Catalogue, ServedModel
from services.router.response_format import ResponseFormat
from services.router.sampling import Sampling, Wanted, resolve
from tidemill.billing import PriceBook
from tidemill.blocks import BLOCK_TOKENS, chain_hashes, root_hash
from tidemill.errors import FailedPrecondition, InvalidRequest, Unavailable
from tidemill.policy import Priority
from tidemill.text import ChatMessage

_SHORT = 512  # characters or tokens: some 0.3 ms
_MESSAGE = 32


@dataclass(frozen=True, slots=True)
class Conversation:
    """Chat messages in order."""

    messages: tuple[ChatMessage, ...]


# What the client wants completed.
Input = Conversation | str | tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """A request as the client put it; None where it left a choice to the router."""

    request_id: str
    body_sha256: bytes
    model: str
    input: Input
    stop: tuple[str, ...] = ()
    sampling: Wanted = field(default_factory=Wanted)
    response_format: ResponseFormat | None = None
    max_cost: tuple[str, int] | None = None  # currency, nano-units
    first_token_timeout_s: float | None = None
    total_timeout_s: float | None = None
    priority: Priority = Priority.STANDARD


@dataclass(frozen=True, kw_only=True)
class Admitted:
    """A request that is sound; it lacks a place in the queue, and the money."""

    ask: Ask
    tenant: Tenant
    key_id: str
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

    def chain(self, completion: Sequence[int]) -> list[bytes]:
        """Hashes of the full blocks of the prompt and these tokens after it."""
        hashes = list(self.block_hashes)
        identity = self.identity
        root = root_hash(identity.digest, identity.kv_format, self.tenant.salt)
        rest = self.token_ids[len(hashes) * BLOCK_TOKENS :]
        return hashes + chain_hashes(hashes[-1] if hashes else root, [*rest, *completion])

    @property
    def key(self) -> str:
        """Names the request among those of all tenants; see `request_key`."""
        return request_key(self.tenant.id, self.ask.request_id)


def request_key(tenant_id: str, request_id: str) -> str:
    """One name for (tenant, request id): tenants choose their ids without seeing each other's."""
    return f"{tenant_id}/{request_id}"


@dataclass(frozen=True, kw_only=True)
class Admission:
    """Checks and completes requests; long prompts are read in `pool`.

    A short one is read at once: two switches between threads take longer.
    """

    catalogue: Catalogue
    fleet: Fleet
    book: PriceBook
    limits: LimitsConfig
    pool: ThreadPoolExecutor
    rng: random.Random
    now_ms: Callable[[], int]

    async def admit(self, ask: Ask, caller: Caller, *, call_timeout_s: float | None) -> Admitted:
        """Raise what is wrong with `ask`, else return it ready for the queue.

        `call_timeout_s` is what the call's own deadline leaves.
        """
        model = self.catalogue.get(ask.model)
        identity = self.fleet.identity(model.name)
        if identity is None:
            raise Unavailable(
                f"no worker serves {model.name} just now", reason="NO_WORKERS", retry_after_s=1.0
            )
        if ask.response_format is not None:
            ask.response_format.check(ask.sampling)
        root = root_hash(identity.digest, identity.kv_format, caller.tenant.salt)
        read = partial(self._read, model, ask, root, self.context_tokens(model))
        if _length(ask.input) <= _SHORT:
            token_ids, sampling, hashes = read()
        else:
            loop = asyncio.get_running_loop()
            token_ids, sampling, hashes = await loop.run_in_executor(self.pool, read)
        admitted = Admitted(
            ask=ask,
            tenant=caller.tenant,
            key_id=caller.key_id,
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
        self._check_currency(admitted)
        return admitted

    def context_tokens(self, model: ServedModel) -> int:
        """Most tokens of the model's prompt and completion together; 0 without workers."""
        identity = self.fleet.identity(model.name)
        if identity is None:
            return 0
        configured = model.config.context_tokens
        announced = identity.context_tokens
        return announced if configured is None else min(configured, announced)

    def _read(
        self, model: ServedModel, ask: Ask, root: bytes, context_tokens: int
    ) -> tuple[Sequence[int], Sampling, Sequence[bytes]]:
        """The prompt's tokens, how to draw, and the prompt's chain from `root` on."""
        token_ids = self._tokenize(model, ask)
        sampling = resolve(
            ask.sampling,
            model,
            num_prompt_tokens=len(token_ids),
            context_tokens=context_tokens,
            seed=self.rng.getrandbits(64),
        )
        if ask.response_format is not None:
            ask.response_format.check_end(sampling)
        return token_ids, sampling, chain_hashes(root, token_ids)

    def _tokenize(self, model: ServedModel, ask: Ask) -> Sequence[int]:
        tokenizer, max_bytes = model.tokenizer, self.limits.max_prompt_bytes
        ask.sampling.check_ids(tokenizer)
        if isinstance(ask.input, str):
            return tokenizer.encode(ask.input, max_bytes=max_bytes)
        if isinstance(ask.input, Conversation):
            return tokenizer.encode_chat(ask.input.messages, max_bytes=max_bytes)
        tokenizer.check_ids(ask.input, field="tokens.token_ids")
        return ask.input

    def _check_currency(self, admitted: Admitted) -> None:
        currency = admitted.tenant.currency
        price_model = admitted.model.config.price_model
        if currency not in self.book.tariff_at(price_model, admitted.admitted_at_ms).currencies:
            raise FailedPrecondition(
                f"{admitted.model.name} is not sold in {currency}", reason="CURRENCY_NOT_SOLD"
            )
        max_cost = admitted.ask.max_cost
        if max_cost is not None and max_cost[0] != currency:
            raise InvalidRequest(
                "max_cost is in another currency than the account",
                violations=[("max_cost.currency", f"must be {currency}")],
            )


def _length(asked: Input) -> int:
    """Characters or tokens; what a chat template puts around each message counts as some."""
    if isinstance(asked, Conversation):
        return sum(_MESSAGE + len(each.content) for each in asked.messages)
    return len(asked)


def _timeout(asked: float | None, default: float, call_timeout_s: float | None) -> float:
    timeout = default if asked is None else asked
    return timeout if call_timeout_s is None else min(timeout, call_timeout_s)
