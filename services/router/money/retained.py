"""The Finals that workers keep of a request whose router never acknowledged them."""

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import grpc

from services.router.finish import Finish
from services.router.fleet import Worker
from services.router.money.resolution import AttemptEnd, Split
from services.router.reports import reuse_of, site_of
from tidemill.api.common.v1 import usage_pb2
from tidemill.api.decode.v1 import decode_service_pb2 as decode_pb2
from tidemill.billing import BusyPart
from tidemill.billing.margin import DECODE, PREFILL

PATIENCE_S = 10.0  # what is not heard of by then is never counted

_TIMEOUT_S = 2.0
_AGAIN_S = 0.1

logger = logging.getLogger(__name__)


class Workers(Protocol):
    """The fleet, as far as it is asked here."""

    def decoders(self) -> list[Worker]:
        """Every connected worker that decodes, whether or not it takes new work."""
        ...

    def get(self, worker_id: str) -> Worker | None:
        """The connected worker of that id."""
        ...


@dataclass(frozen=True, slots=True)
class Retained:
    """A Final, and the worker that keeps it."""

    worker: Worker
    final: decode_pb2.Final

    @property
    def end(self) -> AttemptEnd:
        """What it says of its attempt."""
        final = self.final
        return AttemptEnd(
            fence=final.id.fence,
            attempt=final.id.attempt,
            finish=Finish(final.reason or Finish.SERVER_FAULT),
            generated_tokens=final.generated_tokens,
            relayed_tokens=final.relayed_tokens,
            drafted_tokens=final.drafted_tokens,
            accepted_tokens=final.accepted_tokens,
            split=_split_of(final.prompt) if final.HasField("prompt") else None,
        )


async def ask(workers: Workers, wire_id: str) -> tuple[list[Retained], bool]:
    """What every worker keeps of the request, and whether any still runs it, or does not say."""
    request = decode_pb2.ListFinalsRequest(request_id=wire_id)
    asked = workers.decoders()
    calls = [each.decode.ListFinals(request, timeout=_TIMEOUT_S) for each in asked]
    answers = await asyncio.gather(*calls, return_exceptions=True)
    retained: list[Retained] = []
    running = False
    for worker, answer in zip(asked, answers, strict=True):
        if isinstance(answer, decode_pb2.ListFinalsResponse):
            retained += [Retained(worker, final) for final in answer.finals]
            running = running or answer.running
        elif isinstance(answer, grpc.aio.AioRpcError):
            logger.info("%s says nothing of %s: %s", worker.id, wire_id, answer.details())
            running = True
        else:
            raise answer
    return retained, running


async def former(workers: Workers, wire_id: str, fences: range) -> list[Retained]:
    """What workers keep of these fences of the request, once none runs or patience ends."""
    give_up_at = asyncio.get_running_loop().time() + PATIENCE_S
    while True:
        retained, running = await ask(workers, wire_id)
        if not running or asyncio.get_running_loop().time() >= give_up_at:
            return [each for each in retained if each.final.id.fence in fences]
        await asyncio.sleep(_AGAIN_S)


async def acknowledge(retained: Iterable[Retained]) -> None:
    """Let workers forget what has been settled; one that does not hear it forgets it later."""
    calls = [
        each.worker.decode.AckFinal(
            decode_pb2.AckFinalRequest(id=each.final.id), timeout=_TIMEOUT_S
        )
        for each in retained
    ]
    await asyncio.gather(*calls, return_exceptions=True)


def busy(workers: Workers, retained: Iterable[Retained]) -> list[BusyPart]:
    """Who computed for how long."""
    parts = []
    for each in retained:
        worker, final = each.worker, each.final
        for phase, worker_id, seconds in (
            (PREFILL, final.prefill_worker_id, final.prefill_busy_seconds),
            (DECODE, worker.id, final.busy_seconds),
        ):
            if busy_us := round(seconds * 1e9) // 1000:
                known = worker if worker_id == worker.id else workers.get(worker_id)
                accelerators = known.description.accelerators if known else 1
                parts.append(BusyPart(worker_id, phase, busy_us, accelerators))
    return parts


def _split_of(usage: usage_pb2.PromptUsage) -> Split:
    return Split(
        prompt_tokens=usage.prompt_tokens,
        computed_tokens=usage.computed_tokens,
        reused=reuse_of(usage),
        site=site_of(usage),
    )
