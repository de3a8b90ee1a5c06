"""The front door in domain terms: one generation for each request that is let in."""

from collections.abc import Callable, Mapping

from services.router.admission import Admission, Ask, request_key
from services.router.cancellations import Cancellations
from services.router.config import LimitsConfig
from services.router.dispatch import Dispatcher
from services.router.finish import Completed, Finish
from services.router.generation import Generation
from services.router.keys import Caller, Tenant
from services.router.metrics import RouterMetrics
from services.router.money.treasury import Treasury
from services.router.requests import RequestBook
from services.router.tasks import OwnedTasks
from tidemill.errors import TidemillError, Unavailable


class Router:
    """Admits, remembers and cancels requests; `dispatchers` are keyed by model name."""

    def __init__(
        self,
        *,
        admission: Admission,
        dispatchers: Mapping[str, Dispatcher],
        treasury: Treasury,
        cancellations: Cancellations,
        book: RequestBook,
        tasks: OwnedTasks,
        limits: LimitsConfig,
        metrics: RouterMetrics,
        clock: Callable[[], float],
    ) -> None:
        self._admission = admission
        self._dispatchers = dispatchers
        self._treasury = treasury
        self._cancellations = cancellations
        self._book = book
        self._tasks = tasks
        self._limits = limits
        self._metrics = metrics
        self._clock = clock
        self._closing = False

    async def generate(
        self, ask: Ask, caller: Caller, *, call_timeout_s: float | None
    ) -> Generation | Completed:
        """A generation with a place in the queue, or how this request ended before.

        Raises why it is refused; then nothing of it is left.
        """
        try:
            if self._closing:
                raise Unavailable("the router is stopping", reason="ROUTER_STOPPING")
            return await self._let_in(ask, caller, call_timeout_s)
        except TidemillError as error:
            error.request_id = ask.request_id
            self._metrics.refused(error.reason)
            raise

    async def cancel(self, tenant: Tenant, request_id: str) -> bool:
        """End the tenant's request so that its stream closes with a bill; False if none runs.

        It may run at another router, which is then told by way of the ledger.
        """
        return self.cancel_here(request_key(tenant.id, request_id)) or (
            await self._cancellations.send(tenant.id, request_id)
        )

    def cancel_here(self, key: str) -> bool:
        """As `cancel`, of a request that this router serves."""
        generation = self._book.find(key)
        if generation is None:
            return False
        generation.end(Finish.CANCELLED)
        return True

    async def close(self, patience_s: float) -> None:
        """Wait for what runs; after `patience_s` refuse new requests and end the rest, unbilled."""
        if not await self._book.idle_within(patience_s):
            self._closing = True
            for generation in self._book.running():
                generation.end(Finish.SERVER_FAULT)
            await self._book.idle_within(self._limits.final_wait_s + 1.0)

    async def _let_in(
        self, ask: Ask, caller: Caller, call_timeout_s: float | None
    ) -> Generation | Completed:
        self._admission.catalogue.get(ask.model)
        key = request_key(caller.tenant.id, ask.request_id)
        dispatcher = self._dispatchers[ask.model]
        self._book.begin(key, ask.body_sha256)
        try:
            dispatcher.require_room(caller.tenant.id)  # before any work is put into it
            admitted = await self._admission.admit(ask, caller, call_timeout_s=call_timeout_s)
            generation = Generation(
                admitted,
                dispatcher=dispatcher,
                treasury=self._treasury,
                book=self._book,
                tasks=self._tasks,
                limits=self._limits,
                clock=self._clock,
            )
            self._book.attach(key, generation)
            settled = await generation.start()
        except BaseException:
            self._book.end(key)
            raise
        if settled is not None:
            self._book.end(key)
        return settled or generation
