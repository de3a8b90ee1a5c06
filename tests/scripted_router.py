"""A RouterService that speaks the protocol from a script, over real gRPC on port 0."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import grpc
from typing_extensions import override

from tidemill.api.billing.v1 import receipt_pb2
from tidemill.api.common.v1 import lifecycle_pb2, usage_pb2
from tidemill.api.common.v1.logprobs_pb2 import TokenLogprobs
from tidemill.api.router.v1 import admin_service_pb2 as admin_pb
from tidemill.api.router.v1 import router_service_pb2 as pb
from tidemill.api.router.v1.admin_service_pb2_grpc import (
    AdminServiceServicer,
    add_AdminServiceServicer_to_server,
)
from tidemill.api.router.v1.router_service_pb2_grpc import (
    RouterServiceServicer,
    add_RouterServiceServicer_to_server,
)
from tidemill.billing import (
    PriceBook,
    Reuse,
    Usage,
    issue_receipt,
    load_price_book,
    next_chain,
)
from tidemill.billing.chain import FIRST_CHAIN
from tidemill.errors import TidemillError
from tidemill.rpc.options import PUBLIC_SERVER
from tidemill.rpc.status import abort

BOOK_PATH = Path(__file__).parents[1] / "prices" / "deepseek-2025-02.toml"
ADMITTED_AT_MS = 1_750_000_000_000
NUM_PROMPT_TOKENS = 130
HOLD_NANO = 10**9
REUSE = Reuse(device=64, cache_ram=64)

Context = grpc.aio.ServicerContext[Any, Any]
Script = Callable[["ScriptedRouter", pb.GenerateRequest, Context], AsyncIterator[Any]]


class ScriptedRouter(RouterServiceServicer):
    """Plays `scripts` in turn, the last one for ever, and remembers what it was asked."""

    def __init__(self, scripts: Sequence[Script]) -> None:
        self.scripts = list(scripts)
        self.requests: list[pb.GenerateRequest] = []
        self.metadata: list[dict[str, str | bytes]] = []
        self.cancelled = asyncio.Event()
        self.gone = asyncio.Event()
        self.book: PriceBook = load_price_book(BOOK_PATH)

    @override
    async def Generate(
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.GenerateResponse]:
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata() or ()))
        script = self.scripts[min(len(self.requests), len(self.scripts)) - 1]
        try:
            async for message in script(self, request, context):
                yield message
        finally:
            self.gone.set()

    @override
    async def CancelGeneration(
        self, request: pb.CancelGenerationRequest, context: Context
    ) -> pb.CancelGenerationResponse:
        del context
        found = any(known.request_id == request.request_id for known in self.requests)
        if found:
            self.cancelled.set()
        return pb.CancelGenerationResponse(found=found)

    @override
    async def ListModels(
        self, request: pb.ListModelsRequest, context: Context
    ) -> pb.ListModelsResponse:
        del request, context
        model = pb.ModelInfo(
            name="demo",
            context_tokens=4096,
            max_output_tokens=1024,
            currency="USD",
            prices=receipt_pb2.UnitPrices(
                hit_pico=70_000, miss_pico=270_000, output_pico=1_100_000
            ),
            window="standard",
            prefill_workers=1,
            decode_workers=2,
        )
        return pb.ListModelsResponse(models=[model])

    def completed(
        self,
        request: pb.GenerateRequest,
        num_tokens: int,
        reason: "lifecycle_pb2.FinishReason.ValueType",
    ) -> pb.GenerateResponse:
        usage = billed_usage(num_tokens)
        return pb.GenerateResponse(
            completed=pb.Completed(
                finish_reason=reason,
                usage=usage_message(usage),
                receipt=self._receipt(request.request_id, usage),
                seed=7,
                timing=pb.Timing(queued_us=1_000, first_token_us=20_000, total_us=50_000),
            )
        )

    def _receipt(self, request_id: str, usage: Usage) -> receipt_pb2.Receipt:
        receipt = issue_receipt(
            self.book,
            request_id=request_id,
            tenant_id="acme",
            key_id="k1",
            model="demo",
            price_model="deepseek-chat",
            currency="USD",
            usage=usage,
            admitted_at_ms=ADMITTED_AT_MS,
            decided_at_ms=ADMITTED_AT_MS + 50,
            hold_nano=HOLD_NANO,
        )
        charge = asdict(receipt.charge)
        same = ("book_id", "book_version", "currency", "window", "tariff_from_ms")
        costs = ("hit_cost_pico", "miss_cost_pico", "output_cost_pico", "amount_nano", "saved_nano")
        return receipt_pb2.Receipt(
            request_id=request_id,
            tenant_id="acme",
            key_id="k1",
            model="demo",
            price_model="deepseek-chat",
            book_digest=bytes.fromhex(charge["book_digest"]),
            prices=receipt_pb2.UnitPrices(
                hit_pico=charge["price_hit_pico"],
                miss_pico=charge["price_miss_pico"],
                output_pico=charge["price_output_pico"],
            ),
            admitted_at_ms=receipt.admitted_at_ms,
            decided_at_ms=receipt.decided_at_ms,
            decided_by=receipt_pb2.DECIDING_INSTANT_COMPLETION,
            usage=usage_message(usage),
            attempts=receipt.attempts,
            hold_nano=HOLD_NANO,
            state=receipt_pb2.RECEIPT_STATE_SETTLED,
            content_sha256=bytes.fromhex(receipt.content_sha256),
            position=1,
            previous_chain=bytes.fromhex(FIRST_CHAIN),
            chain=bytes.fromhex(next_chain(FIRST_CHAIN, receipt.content_sha256)),
            topped_up_nano=charge["amount_nano"],
            **{name: charge[name] for name in (*same, *costs)},
        )


class ScriptedAdmin(AdminServiceServicer):
    """Keys in a dict; a page holds two. Knows one tenant, acme."""

    def __init__(self) -> None:
        self.keys: dict[str, admin_pb.KeyInfo] = {}
        self.tenants = {"acme"}

    @override
    async def CreateTenant(
        self, request: admin_pb.CreateTenantRequest, context: Context
    ) -> admin_pb.CreateTenantResponse:
        del context
        created = request.tenant_id not in self.tenants
        self.tenants.add(request.tenant_id)
        return admin_pb.CreateTenantResponse(created=created)

    @override
    async def CreateKey(
        self, request: admin_pb.CreateKeyRequest, context: Context
    ) -> admin_pb.CreateKeyResponse:
        del context
        key_id = f"key{len(self.keys)}"
        self.keys[key_id] = admin_pb.KeyInfo(
            key_id=key_id, tenant_id=request.tenant_id, label=request.label, created_at_ms=1
        )
        return admin_pb.CreateKeyResponse(key_id=key_id, key=f"tm_{key_id}.secret")

    @override
    async def RevokeKey(
        self, request: admin_pb.RevokeKeyRequest, context: Context
    ) -> admin_pb.RevokeKeyResponse:
        del context
        revoked = not self.keys[request.key_id].revoked
        self.keys[request.key_id].revoked = True
        return admin_pb.RevokeKeyResponse(revoked=revoked)

    @override
    async def ListKeys(
        self, request: admin_pb.ListKeysRequest, context: Context
    ) -> admin_pb.ListKeysResponse:
        del context
        start = int(request.page_token or 0)
        keys = list(self.keys.values())
        token = str(start + 2) if start + 2 < len(keys) else ""
        return admin_pb.ListKeysResponse(keys=keys[start : start + 2], next_page_token=token)


def scripted_admin() -> AdminServiceServicer:
    """Tenants and keys; what moves money is not implemented."""
    return ScriptedAdmin()  # type: ignore[abstract]  # the generated base answers for the rest


@asynccontextmanager
async def serve(
    router: ScriptedRouter, admin: AdminServiceServicer | None = None, port: int = 0
) -> AsyncIterator[str]:
    """The router's address while it is served in plaintext on loopback."""
    server = grpc.aio.server(options=PUBLIC_SERVER)
    add_RouterServiceServicer_to_server(router, server)
    add_AdminServiceServicer_to_server(admin or scripted_admin(), server)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


def billed_usage(num_tokens: int) -> Usage:
    """A prompt of 130 tokens, 128 of them reused, and `num_tokens` generated and billed."""
    return Usage(
        prompt_tokens=NUM_PROMPT_TOKENS,
        computed_tokens=NUM_PROMPT_TOKENS - REUSE.total,
        reused=REUSE,
        completion_tokens=num_tokens,
        generated_tokens=num_tokens,
    )


def usage_message(usage: Usage) -> usage_pb2.Usage:
    """`usage` on the wire."""
    return usage_pb2.Usage(
        prompt=usage_pb2.PromptUsage(
            prompt_tokens=usage.prompt_tokens,
            computed_tokens=usage.computed_tokens,
            reused_device_tokens=usage.reused.device,
            reused_cache_ram_tokens=usage.reused.cache_ram,
            prefill_site=usage_pb2.PREFILL_SITE_PREFILL_WORKER,
            prefill_worker_id="prefill-0",
        ),
        cache_hit_tokens=usage.cache_hit_tokens,
        cache_miss_tokens=usage.cache_miss_tokens,
        completion_tokens=usage.completion_tokens,
        generated_tokens=usage.generated_tokens,
    )


def accepted(request: pb.GenerateRequest) -> pb.GenerateResponse:
    """The first message."""
    return pb.GenerateResponse(
        accepted=pb.Accepted(
            request_id=request.request_id,
            position=1,
            prompt_tokens=NUM_PROMPT_TOKENS,
            admitted_at_ms=ADMITTED_AT_MS,
        )
    )


def likelihood(token_id: int) -> TokenLogprobs:
    """What is told of a token, with two alternatives."""
    return TokenLogprobs(logprob=-token_id, top_token_ids=[1, 2], top_logprobs=[-0.5, -1.5])


def chunk(
    index: int, text: str, *, sequence: int | None = None, choice: int = 0, logprobs: bool = False
) -> pb.GenerateResponse:
    """One token, whose id is 100 + its index."""
    return pb.GenerateResponse(
        chunk=pb.TextChunk(
            sequence=index if sequence is None else sequence,
            choice=choice,
            first_index=index,
            token_ids=[100 + index],
            logprobs=[likelihood(100 + index)] if logprobs else [],
            text=text,
            usage=usage_message(billed_usage(index + 1)),
        )
    )


def answer(*words: str) -> Script:
    """A whole answer, a word a chunk."""

    async def script(
        router: ScriptedRouter, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.GenerateResponse]:
        del context
        yield accepted(request)
        yield pb.GenerateResponse(queued=pb.Queued(position=0))
        for index, word in enumerate(words):
            yield chunk(index, word)
        yield router.completed(request, len(words), lifecycle_pb2.FINISH_REASON_STOP)

    return script


def after_waiting(*places: tuple[int, float | None]) -> Script:
    """A place in the queue, the later ones told as it waits, each (position, seconds); "ok"."""

    async def script(
        router: ScriptedRouter, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.GenerateResponse]:
        del context
        first, *rest = [
            pb.Queued(
                position=position,
                expected_wait_ms=None if wait_s is None else round(wait_s * 1000),
            )
            for position, wait_s in places
        ]
        message = accepted(request)
        message.accepted.position = first.position
        if first.HasField("expected_wait_ms"):
            message.accepted.expected_wait_ms = first.expected_wait_ms
        yield message
        for place in rest:
            yield pb.GenerateResponse(queued=place)
        yield chunk(0, "ok")
        yield router.completed(request, 1, lifecycle_pb2.FINISH_REASON_STOP)

    return script


def choices(*texts: str) -> Script:
    """One choice for each text, a letter a chunk in turns, all scored, and so is the prompt."""

    async def script(
        router: ScriptedRouter, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.GenerateResponse]:
        del context
        yield accepted(request)
        for index in (1, 3):
            tokens = [index, index + 1]
            yield pb.GenerateResponse(
                prompt_scored=pb.PromptScored(
                    first_index=index, token_ids=tokens, logprobs=map(likelihood, tokens)
                )
            )
        sequence = 0
        for index in range(max(map(len, texts))):
            for choice, text in enumerate(texts):
                if index < len(text):
                    yield chunk(index, text[index], sequence=sequence, choice=choice, logprobs=True)
                    sequence += 1
                elif index == len(text):
                    yield choice_end(choice, index, lifecycle_pb2.FINISH_REASON_STOP)
        for choice, text in enumerate(texts):
            if len(text) == max(map(len, texts)):
                yield choice_end(choice, len(text), lifecycle_pb2.FINISH_REASON_LENGTH)
        yield router.completed(request, sum(map(len, texts)), lifecycle_pb2.FINISH_REASON_LENGTH)

    return script


def choice_end(
    choice: int, num_tokens: int, reason: "lifecycle_pb2.FinishReason.ValueType"
) -> pb.GenerateResponse:
    """The end of one of several choices."""
    return pb.GenerateResponse(
        choice_end=pb.ChoiceEnd(choice=choice, finish_reason=reason, completion_tokens=num_tokens)
    )


def refuse(error: TidemillError) -> Script:
    """No message, only an error."""
    return break_after(0, error)


def break_after(messages: int, error: TidemillError | None) -> Script:
    """Accepted and some chunks, then an error, or the stream's plain end without Completed."""

    async def script(
        router: ScriptedRouter, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.GenerateResponse]:
        del router
        if messages:
            yield accepted(request)
        for index in range(messages - 1):
            yield chunk(index, "w ")
        if error is not None:
            await abort(context, error)

    return script


def skip_a_chunk() -> Script:
    """Loses the second of three chunks."""

    async def script(
        router: ScriptedRouter, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.GenerateResponse]:
        del context
        yield accepted(request)
        yield chunk(0, "a")
        yield chunk(2, "c")
        yield router.completed(request, 3, lifecycle_pb2.FINISH_REASON_STOP)

    return script


def until_cancelled(*, pause_s: float = 0.01) -> Script:
    """Goes on until CancelGeneration, then ends with the bill for what was generated."""

    async def script(
        router: ScriptedRouter, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.GenerateResponse]:
        del context
        yield accepted(request)
        index = 0
        while not router.cancelled.is_set():
            yield chunk(index, "w ")
            index += 1
            await asyncio.sleep(pause_s)
        yield router.completed(request, index, lifecycle_pb2.FINISH_REASON_CANCELLED)

    return script


def silence() -> Script:
    """Accepted, and then nothing."""

    async def script(
        router: ScriptedRouter, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.GenerateResponse]:
        del router, context
        yield accepted(request)
        await asyncio.sleep(60)

    return script
