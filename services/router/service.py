"""RouterService: translates between protos and `Router`."""

from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import grpc

from services.router.admission import Admission
from services.router.authentication import current_caller, current_tenant
from services.router.finish import Completed, Finish
from services.router.fleet import DECODE, PREFILL
from services.router.inter_token import InterTokenLatency
from services.router.messages import EventWriter, ask_of, completed_message, unit_prices
from services.router.models import ServedModel
from services.router.router import Router
from services.router.slow_reader import StallGuard
from tidemill.api.router.v1 import router_service_pb2 as router_pb2
from tidemill.api.router.v1 import router_service_pb2_grpc
from tidemill.errors import Aborted
from tidemill.rpc.validation import validate

# The bill must reach the client before its own deadline does.
_REPLY_RESERVE_S = 0.5

_GenerateContext = grpc.aio.ServicerContext[router_pb2.GenerateRequest, router_pb2.GenerateResponse]


class RouterService(router_service_pb2_grpc.RouterServiceServicer):
    """The front door on the wire."""

    def __init__(
        self,
        router: Router,
        admission: Admission,
        *,
        inter_token: InterTokenLatency,
        slow_reader_s: float,
        now_ms: Callable[[], int],
    ) -> None:
        self._router = router
        self._admission = admission
        self._inter_token = inter_token
        self._slow_reader_s = slow_reader_s
        self._now_ms = now_ms

    async def Generate(  # type: ignore[override]  # writes to the context, to see a slow reader
        self, request: router_pb2.GenerateRequest, context: _GenerateContext
    ) -> None:
        """Stream the request's events; a client that goes away or stalls ends it."""
        validate(request)
        left: float | None = context.time_remaining()
        generation = await self._router.generate(
            ask_of(request),
            current_caller(),
            call_timeout_s=None if left is None else max(left - _REPLY_RESERVE_S, left / 2),
        )
        if isinstance(generation, Completed):
            await context.write(completed_message(generation))
            return
        writer = EventWriter(generation, self._inter_token.stream(request.model))
        why = Finish.CANCELLED
        try:
            async with (
                StallGuard(self._slow_reader_s) as guard,
                aclosing(generation.outbox.events()) as events,
            ):
                async for event in events:
                    guard.writes()
                    await context.write(writer.message(event))
                    guard.written()
        except TimeoutError:
            why = Finish.SLOW_READER
            raise Aborted(
                f"nothing was read for {self._slow_reader_s:g} seconds",
                reason="SLOW_READER",
                request_id=request.request_id,
            ) from None
        finally:
            generation.end(why)

    async def CancelGeneration(
        self, request: router_pb2.CancelGenerationRequest, context: Any
    ) -> router_pb2.CancelGenerationResponse:
        """End a request of the caller's tenant."""
        validate(request)
        found = await self._router.cancel(current_tenant(), request.request_id)
        return router_pb2.CancelGenerationResponse(found=found)

    async def ListModels(
        self, request: router_pb2.ListModelsRequest, context: Any
    ) -> router_pb2.ListModelsResponse:
        """The models with the prices that a request would have now."""
        models = [self._model_info(model) for model in self._admission.catalogue]
        return router_pb2.ListModelsResponse(models=models)

    def _model_info(self, model: ServedModel) -> router_pb2.ModelInfo:
        fleet, book, now_ms = self._admission.fleet, self._admission.book, self._now_ms()
        currency = current_tenant().currency
        window = book.tariff_at(model.config.price_model, now_ms).window_at(now_ms)
        prices = window.prices.get(currency)
        context, most = self._admission.context_tokens(model), model.config.max_output_tokens
        return router_pb2.ModelInfo(
            name=model.name,
            context_tokens=context,
            max_output_tokens=min(most, context - 1) if context else most,  # a prompt has a token
            currency=currency,
            prices=unit_prices(prices) if prices else None,
            window=window.name,
            window_ends_at_ms=book.window_ends_at(model.config.price_model, now_ms) or 0,
            prefill_workers=len(fleet.usable(model.name, PREFILL)),
            decode_workers=len(fleet.usable(model.name, DECODE)),
        )
