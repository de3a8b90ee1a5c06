"""A router's money without the router: real ledger, real spool, and requests made up."""

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import grpc
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from prometheus_client import CollectorRegistry

from services.router.admission import Admitted, Ask
from services.router.config import LedgerConfig, ModelConfig, MoneyConfig
from services.router.finish import Completed, Finish, PrefillSite, Timing
from services.router.fleet import ModelIdentity, Worker
from services.router.keys import Tenant
from services.router.metrics import RouterMetrics
from services.router.models import ServedModel
from services.router.money.assembly import Money
from services.router.money.hold import Hold
from services.router.money.ledger import Ledger
from services.router.money.signing import Signer
from services.router.money.terms import Progress
from services.router.sampling import Sampling
from services.router.tasks import OwnedTasks
from tests.redis_process import RedisProcess
from tests.router_harness import ONE_PRICE_PATH
from tidemill.api.common.v1 import lifecycle_pb2
from tidemill.api.decode.v1 import decode_service_pb2 as decode_pb2
from tidemill.billing import Reuse, Usage, load_price_book
from tidemill.billing import ledger as rules
from tidemill.rpc.tasks import end

BOOK = load_price_book(ONE_PRICE_PATH)
SIGNER = Signer(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
SITE = PrefillSite(worker_id="p1")
LEASE_S = 0.6
TEXT = "hello"


def system_ms() -> int:
    """This machine's clock."""
    return time.time_ns() // 1_000_000


class KeptFinals:
    """A decode worker, as far as a resolver sees it: the Finals that it keeps."""

    id = "d1"

    def __init__(self, *finals: decode_pb2.Final) -> None:
        self.finals = list(finals)
        self.running = False
        self.silent = False
        self.asked: list[str] = []
        self.acknowledged: list[Any] = []
        self.description = SimpleNamespace(accelerators=2)
        self.decode = SimpleNamespace(ListFinals=self._list, AckFinal=self._acknowledge)

    async def _list(self, request: Any, **_: float) -> decode_pb2.ListFinalsResponse:
        self.asked.append(request.request_id)
        if self.silent:
            nothing = grpc.aio.Metadata()
            raise grpc.aio.AioRpcError(grpc.StatusCode.DEADLINE_EXCEEDED, nothing, nothing)
        finals = [each for each in self.finals if each.id.request_id == request.request_id]
        return decode_pb2.ListFinalsResponse(finals=finals, running=self.running)

    async def _acknowledge(self, request: Any, **_: float) -> decode_pb2.AckFinalResponse:
        self.acknowledged.append(request.id)
        return decode_pb2.AckFinalResponse(held=True)


class Desk:
    """One router's money, and short ways to use it as tenant `acme`."""

    def __init__(self, money: Money, tasks: OwnedTasks, registry: CollectorRegistry) -> None:
        self.money = money
        self.tasks = tasks
        self.registry = registry

    async def open(self, request_id: str, **fields: Any) -> Hold | Completed:
        """`Treasury.open` of `admitted(request_id, **fields)`."""
        return await self.money.treasury.open(admitted(request_id, **fields))

    async def hold(self, request_id: str, **fields: Any) -> Hold:
        """The same, where it must be granted."""
        hold = await self.open(request_id, **fields)
        assert isinstance(hold, Hold)
        return hold

    async def top_up(self, amount_nano: int, *, tenant_id: str = "acme") -> None:
        """Pay in."""
        operation = f"t{time.monotonic_ns()}"
        command = rules.TopUp(operation_id=operation, now_ms=system_ms(), amount_nano=amount_nano)
        await self.money.accounts.top_up(tenant_id, command)

    async def account(self, tenant_id: str = "acme") -> rules.Account:
        """The whole account, whose books must be in order."""
        account = await self.money.accounts.read(tenant_id)
        assert rules.check(account) == []
        return account

    async def state(self, request_id: str, tenant_id: str = "acme") -> rules.State:
        """Of a request's hold."""
        request = await self.money.accounts.request(tenant_id, request_id)
        return rules.State.UNKNOWN if request is None else request.state

    async def until(self, request_id: str, state: rules.State, within_s: float = 30.0) -> None:
        """Wait for a request's state."""
        async with asyncio.timeout(within_s):
            while await self.state(request_id) is not state:  # noqa: ASYNC110 - it is in Redis
                await asyncio.sleep(0.02)

    async def end(self, name: str) -> None:
        """Have a background task of the money do nothing any more."""
        await end(*(task for task in self.money.background if task.get_name() == name))

    def metric(self, name: str, **labels: str) -> float:
        """A sample's value, 0 if there is none."""
        return self.registry.get_sample_value(name, labels) or 0.0


@asynccontextmanager
async def desk(
    ledger_redis: RedisProcess,
    folder: Path,
    *,
    router_id: str | None = None,
    lease_s: float = LEASE_S,
    skew_ms: int = 0,
    workers: Sequence[KeptFinals] = (),
    timeout_s: float = 10.0,
    resolving: bool = True,
) -> AsyncIterator[Desk]:
    """A router's money, its clock `skew_ms` ahead; it resolves nothing unless `resolving`."""
    tasks, registry = OwnedTasks(), CollectorRegistry()
    config = LedgerConfig(
        url=ledger_redis.url, pepper_file=Path(), admin_key_file=Path(), timeout_s=timeout_s
    )
    ledger = Ledger(config)
    await ledger.check_settings()
    money = Money(
        MoneyConfig(
            spool_dir=folder / "spool",
            router_id=router_id,
            lease_s=lease_s,
            signing_key_file=folder / "signing.pem",
        ),
        ledger=ledger,
        book=BOOK,
        signer=SIGNER,
        workers=SimpleNamespace(decoders=lambda: cast(list[Worker], workers), get=lambda _: None),
        owned=tasks,
        requests=RouterMetrics(registry),
        registry=registry,
        now_ms=lambda: system_ms() + skew_ms,
    )
    await money.start()
    own = Desk(money, tasks, registry)
    if not resolving:
        await own.end("the resolver")
    try:
        yield own
    finally:
        await tasks.join(1.0)
        await money.stop()
        await ledger.close()


def admitted(
    request_id: str,
    *,
    text: str = TEXT,
    tenant_id: str = "acme",
    prompt_tokens: int = 100,
    max_tokens: int = 64,
    n: int = 1,
    cap_nano: int | None = None,
    seed: int = 7,
    total_timeout_s: float = 60.0,
) -> Admitted:
    """A request as admission leaves it."""
    model = ModelConfig(name="tiny", path=Path(), price_model="deepseek-chat")
    return Admitted(
        ask=Ask(
            request_id=request_id,
            body_sha256=hashlib.sha256(text.encode()).digest(),
            model="tiny",
            input=text,
            max_cost=None if cap_nano is None else ("USD", cap_nano),
        ),
        tenant=Tenant(tenant_id, "USD", bytes(32)),
        key_id="k1",
        model=ServedModel(model, cast(Any, None)),
        identity=ModelIdentity(bytes(32), "kv", 10_000),
        token_ids=range(prompt_tokens),
        block_hashes=[],
        sampling=Sampling(
            temperature=0,
            top_p=1,
            top_k=0,
            seed=seed,
            max_tokens=max_tokens,
            stop_token_ids=(),
            n=n,
        ),
        admitted_at_ms=system_ms(),
        first_token_timeout_s=30.0,
        total_timeout_s=total_timeout_s,
    )


def usage(completion: int, *, prompt_tokens: int = 100, host: int = 64) -> Usage:
    """Of a request whose prompt lay partly in host memory."""
    return Usage(
        prompt_tokens=prompt_tokens,
        computed_tokens=prompt_tokens - host,
        reused=Reuse(host=host),
        completion_tokens=completion,
        generated_tokens=completion,
    )


def progress(completion: int, *, attempts: int = 1) -> Progress:
    """A request in the middle of its only running attempt."""
    return Progress(
        usage=usage(completion), site=SITE, attempts=attempts, running={attempts: completion}
    )


async def settle(hold: Hold, completion: int) -> Completed:
    """The request ended well."""
    return await hold.settle(
        usage(completion), finish=Finish.STOP, site=SITE, timing=Timing(), attempts=1, busy=()
    )


def kept_final(
    hold: Hold, generated: int, *, attempt: int = 1, fence: int | None = None
) -> decode_pb2.Final:
    """What a worker kept of an attempt at the hold's request."""
    final = decode_pb2.Final(
        reason=lifecycle_pb2.FINISH_REASON_CANCELLED,
        generated_tokens=generated,
        busy_seconds=0.25,
        prefill_busy_seconds=0.5,
        prefill_worker_id="p1",
    )
    final.id.request_id = f"{hold.tenant_id}:{hold.request_id}"
    final.id.attempt, final.id.fence = attempt, fence or hold.fence
    final.prompt.prompt_tokens, final.prompt.computed_tokens = 100, 36
    final.prompt.reused_host_tokens = 64
    final.prompt.prefill_worker_id = "p1"
    return final


async def eventually(condition: Callable[[], bool], within_s: float = 30.0) -> None:
    """Wait for what must come true."""
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110 - the conditions are of many kinds
            await asyncio.sleep(0.01)
