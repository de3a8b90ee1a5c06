"""A router with a real ledger Redis and scripted workers, and a client that talks to it."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import grpc
from prometheus_client import CollectorRegistry
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from services.router.config import (
    FleetConfig,
    LedgerConfig,
    LimitsConfig,
    ModelConfig,
    MoneyConfig,
    RouterConfig,
)
from services.router.wiring import RouterProcess
from services.stack.state import SIGNING_KEY, new_signing_key
from tests.redis_process import RedisProcess
from tests.scripted_worker import ScriptedWorker
from tidemill.api.billing.v1.billing_service_pb2_grpc import BillingServiceStub
from tidemill.api.router.v1 import admin_service_pb2 as admin_pb2
from tidemill.api.router.v1 import router_service_pb2 as router_pb2
from tidemill.api.router.v1.admin_service_pb2_grpc import AdminServiceStub
from tidemill.api.router.v1.router_service_pb2_grpc import RouterServiceStub
from tidemill.errors import TidemillError
from tidemill.policy import QueueLimits
from tidemill.rpc.channel import sdk_aio_channel
from tidemill.rpc.server import ServerConfig
from tidemill.rpc.status import from_rpc_error
from tidemill.rpc.tls import TlsFiles

MODEL = "tiny"
ADMIN_KEY = "admin-key-for-tests-0123456789abcdef"
BOOK_PATH = Path(__file__).parents[1] / "prices" / "deepseek-2025-02.toml"
ONE_PRICE_PATH = Path(__file__).with_name("one_price.toml")
DURABLE = {"maxmemory_policy": "noeviction", "appendonly": "yes", "appendfsync": "always"}
SPECIAL = ["<bos>", "<eos>", "<think>", "</think>"]
EOS_ID = 1
OPENING_NANO = 1000 * 10**9

Responses = list[router_pb2.GenerateResponse]


def write_byte_tokenizer(folder: Path) -> None:
    """A tokeniser with one token for each byte, so that scripts can spell."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=len(SPECIAL) + 256,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([], trainer)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "eos_token": "<eos>",
        "chat_template": "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    generation = {"eos_token_id": EOS_ID, "temperature": 0.6, "top_p": 0.95}
    (folder / "generation_config.json").write_text(json.dumps(generation))


def spell(folder: Path, text: str) -> list[int]:
    """Token ids of a text, one for each byte."""
    ids: list[int] = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    return ids


@dataclass
class Heard:
    """A whole stream, or as much of it as came before `error`."""

    messages: Responses = field(default_factory=list)
    error: TidemillError | None = None

    @property
    def kinds(self) -> list[str]:
        """Names of the events in order, repeats left out."""
        names = [str(message.WhichOneof("event")) for message in self.messages]
        return [name for i, name in enumerate(names) if i == 0 or names[i - 1] != name]

    @property
    def chunks(self) -> list[router_pb2.TextChunk]:
        """The chunks in order."""
        return [each.chunk for each in self.messages if each.HasField("chunk")]

    @property
    def text(self) -> str:
        """The answer."""
        return "".join(chunk.text for chunk in self.chunks)

    @property
    def token_ids(self) -> list[int]:
        """The answer's tokens."""
        return [token_id for chunk in self.chunks for token_id in chunk.token_ids]

    @property
    def completed(self) -> router_pb2.Completed:
        """The last message."""
        assert self.error is None, self.error
        assert self.messages[-1].HasField("completed")
        return self.messages[-1].completed


class RouterCaller:
    """A channel to a router and one tenant's key."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.stub = cast(Any, RouterServiceStub(channel))
        self.admin = cast(Any, AdminServiceStub(channel))
        self.billing = cast(Any, BillingServiceStub(channel))
        self.key = ""

    async def make_tenant(self, tenant_id: str, currency: str = "USD") -> str:
        """A key of a new or known tenant, which has paid in `OPENING_NANO`, once."""
        tenant = admin_pb2.CreateTenantRequest(tenant_id=tenant_id, currency=currency)
        await self.admin.CreateTenant(tenant, metadata=bearer(ADMIN_KEY))
        paid = admin_pb2.TopUpRequest(
            tenant_id=tenant_id, operation_id="opening", amount_nano=OPENING_NANO
        )
        await self.admin.TopUp(paid, metadata=bearer(ADMIN_KEY))
        key = admin_pb2.CreateKeyRequest(tenant_id=tenant_id, label="test")
        made = await self.admin.CreateKey(key, metadata=bearer(ADMIN_KEY))
        return str(made.key)

    def call(
        self, request: router_pb2.GenerateRequest, *, key: str | None = None, timeout: float = 30.0
    ) -> Any:
        """The open stream."""
        metadata = bearer(self.key if key is None else key)
        return self.stub.Generate(request, metadata=metadata, timeout=timeout)

    async def generate(
        self, request: router_pb2.GenerateRequest, *, key: str | None = None, timeout: float = 30.0
    ) -> Heard:
        """Read a stream to its end."""
        return await listen(self.call(request, key=key, timeout=timeout))

    async def cancel(self, request_id: str, *, key: str | None = None) -> bool:
        """CancelGeneration."""
        request = router_pb2.CancelGenerationRequest(request_id=request_id)
        metadata = bearer(self.key if key is None else key)
        answer = await self.stub.CancelGeneration(request, metadata=metadata, timeout=30)
        return bool(answer.found)


class RouterHarness(RouterCaller):
    """A router in this process, with a channel to it."""

    def __init__(
        self, process: RouterProcess, channel: grpc.aio.Channel, registry: CollectorRegistry
    ) -> None:
        super().__init__(channel)
        self.process = process
        self.registry = registry

    async def until(self, condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
        """Wait for what must come true."""
        async with asyncio.timeout(timeout_s):
            while not condition():  # noqa: ASYNC110 - the conditions are of many kinds
                await asyncio.sleep(0.01)

    async def until_seen(self, *workers: ScriptedWorker) -> None:
        """Wait until the workers' free blocks are what the router believes them to be."""

        def seen(worker: ScriptedWorker) -> bool:
            known = self.process.fleet.get(worker.worker_id)
            load = None if known is None else known.load
            return load is not None and load.free_blocks == worker.free_blocks

        await self.until(lambda: all(map(seen, workers)))

    async def check_idle(self) -> None:
        """R1: nothing of any request is left."""
        process = self.process
        await self.until(lambda: len(process.requests) == 0)
        await self.until(lambda: not process.tasks)
        for dispatcher in process.dispatchers.values():
            dispatcher.check_integrity()

    def metric(self, name: str, **labels: str) -> float:
        """A sample's value, 0 if there is none."""
        return self.registry.get_sample_value(name, labels) or 0.0


def bearer(key: str) -> tuple[tuple[str, str], ...]:
    """Metadata that carries a key."""
    return (("authorization", f"Bearer {key}"),)


async def listen(call: Any) -> Heard:
    """Read what is left of a stream."""
    heard = Heard()
    try:
        while isinstance(message := await call.read(), router_pb2.GenerateResponse):
            heard.messages.append(message)
    except grpc.aio.AioRpcError as error:
        heard.error = from_rpc_error(error)
    return heard


def router_config(
    folder: Path,
    ledger: RedisProcess,
    workers: Sequence[str],
    tls: TlsFiles,
    *,
    cache_url: str | None = None,
    drain_s: float = 0.0,
    queue_requests: int = 1024,
    ledger_timeout_s: float = 10.0,
    price_book: Path = BOOK_PATH,
    **limits: Any,
) -> RouterConfig:
    """A configuration for tests, with secrets in `folder`, which is also the model's."""
    secrets = {"pepper": "p" * 40, "admin": ADMIN_KEY, SIGNING_KEY: new_signing_key()}
    for name, secret in secrets.items():
        if not (folder / name).exists():
            (folder / name).write_text(secret)
    return RouterConfig(
        ledger=LedgerConfig(
            url=ledger.url,
            pepper_file=folder / "pepper",
            admin_key_file=folder / "admin",
            timeout_s=ledger_timeout_s,
        ),
        fleet=FleetConfig(
            tls=tls, workers=tuple(workers), cache_url=cache_url, discover_interval_s=0.05
        ),
        models=(
            ModelConfig(
                name=MODEL, path=folder, price_model="deepseek-chat", default_max_tokens=64
            ),
        ),
        price_book=price_book,
        money=MoneyConfig(signing_key_file=folder / SIGNING_KEY, spool_dir=folder / "spool"),
        server=ServerConfig(drain_s=drain_s),
        queue=QueueLimits(max_requests=queue_requests),
        limits=replace(LimitsConfig(), **limits),
    )


@asynccontextmanager
async def running_router(
    config: RouterConfig, *, wait_ready: bool = True
) -> AsyncIterator[RouterHarness]:
    """Start a router, make a tenant, and afterwards check that nothing was left behind."""
    registry = CollectorRegistry()
    process = RouterProcess(config, registry=registry)
    await process.start()
    channel = sdk_aio_channel(process.server.address, insecure=True)
    harness = RouterHarness(process, channel, registry)
    try:
        if wait_ready:
            harness.key = await harness.make_tenant("acme")
            await harness.until(lambda: process.fleet.readiness(MODEL) is None)
        yield harness
        await harness.check_idle()
    finally:
        await channel.close()
        await process.stop()


@asynccontextmanager
async def scripted(
    workers: Sequence[ScriptedWorker], tls_files: Callable[[str], TlsFiles]
) -> AsyncIterator[list[str]]:
    """Start the workers; their endpoints as the router's configuration wants them."""
    for worker in workers:
        await worker.start(tls_files("worker" if worker.role == "both" else worker.role))
    try:
        yield [worker.endpoint for worker in workers]
    finally:
        for worker in workers:
            await worker.vanish()
