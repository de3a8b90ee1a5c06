"""The workers as this router sees them: who is there, what each is, how loaded."""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from services.router.chunk_channel import ChunkChannel
from tidemill.policy import PrefixIndex, WorkerLoad

if TYPE_CHECKING:  # the name exists in the stubs alone
    from tidemill.api.decode.v1.decode_service_pb2_grpc import DecodeServiceAsyncStub

PREFILL = "prefill"
DECODE = "decode"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Description:
    """What a worker says it is; `roles` is a subset of {prefill, decode}.

    Its owner pays for `accelerators` of them by the hour. If it only decodes, it still prefills
    prompts of which at most `in_place_tokens` are to be computed.
    """

    worker_id: str
    epoch: int
    address: str
    roles: frozenset[str]
    model: str
    digest: bytes
    kv_format: str
    context_tokens: int
    vocab_size: int
    accelerators: int = 1
    in_place_tokens: int = 0


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """What all workers of one model share; `context_tokens` is the least that any offers."""

    digest: bytes
    kv_format: str
    context_tokens: int


@dataclass(eq=False, slots=True)
class OpenAttempts:
    """How many attempts still use a worker's connection, until their Final is acknowledged."""

    count: int = 0


@dataclass(eq=False, slots=True)
class Worker:
    """One connected worker; `load` is None until it has reported.

    A worker that left the fleet because it drains goes on serving its `open_attempts`.
    """

    description: Description
    decode: "DecodeServiceAsyncStub"
    load: WorkerLoad | None = None
    chunks: ChunkChannel | None = None
    open_attempts: OpenAttempts = field(default_factory=OpenAttempts)

    @property
    def id(self) -> str:
        """The worker's id."""
        return self.description.worker_id

    @property
    def prefills(self) -> bool:
        """Whether it prefills prompts of any length."""
        return PREFILL in self.description.roles


@dataclass(frozen=True, slots=True)
class Expected:
    """What the router's configuration demands of a model's workers."""

    vocab_size: int
    digest: bytes | None = None


@dataclass
class Fleet:
    """Connected workers by id, and which of them may be picked.

    Workers of one model name must have one digest: the configured one, else that of the first
    worker seen, for as long as one with it stays. Others stay connected and are never picked.
    `prefixes` is which blocks they hold.
    """

    expected: Mapping[str, Expected]
    clock: Callable[[], float]
    stale_after_s: float
    prefixes: PrefixIndex = field(default_factory=PrefixIndex)
    _workers: dict[str, Worker] = field(default_factory=dict)
    _digests: dict[str, bytes] = field(default_factory=dict)
    _on_change: list[Callable[[], None]] = field(default_factory=list)
    _on_leave: list[Callable[[Worker], None]] = field(default_factory=list)

    def __len__(self) -> int:
        """Workers connected, whether or not they may be picked."""
        return len(self._workers)

    def subscribe(
        self, *, on_change: Callable[[], None], on_leave: Callable[[Worker], None]
    ) -> None:
        """Call `on_change` after every report or change, `on_leave` when a worker is gone."""
        self._on_change.append(on_change)
        self._on_leave.append(on_leave)

    def join(self, worker: Worker) -> None:
        """Add a worker; ValueError if another of its id is connected."""
        if (other := self._workers.get(worker.id)) is not None:
            raise ValueError(
                f"{worker.id} is the id of workers at {other.description.address} and "
                f"{worker.description.address}"
            )
        self._workers[worker.id] = worker
        self._adopt(worker.description)
        if why := self._objection(worker.description):
            logger.error("worker is not used: %s", why, extra=_names(worker.description))
        else:
            logger.info("worker joined", extra=_names(worker.description))

    def leave(self, worker: Worker) -> None:
        """Forget a worker that is gone."""
        if self._workers.get(worker.id) is not worker:
            return
        del self._workers[worker.id]
        self.prefixes.forget(worker.id)
        model = worker.description.model
        left = [each.description for each in self._workers.values()]
        if not any(each.digest == self._digests.get(model) for each in left if each.model == model):
            self._digests.pop(model, None)
            for description in left:
                self._adopt(description)
        logger.warning("worker left", extra=_names(worker.description))
        for notify in self._on_leave:
            notify(worker)

    def report(self, worker: Worker, load: WorkerLoad) -> None:
        """Take in a load report."""
        worker.load = load
        for notify in self._on_change:
            notify()

    def get(self, worker_id: str) -> Worker | None:
        """The connected worker of that id."""
        return self._workers.get(worker_id)

    def usable(self, model: str, role: str) -> list[Worker]:
        """Workers of the model that may be picked for `role`, load views still fresh."""
        oldest = self.clock() - self.stale_after_s
        return [
            worker
            for worker in self._of_model(model)
            if role in worker.description.roles
            and worker.load is not None
            and worker.load.observed_at >= oldest
            and not worker.load.draining
        ]

    def decoders(self) -> list[Worker]:
        """Every connected worker that decodes, whether or not it may be picked."""
        return [each for each in self._workers.values() if DECODE in each.description.roles]

    def identity(self, model: str) -> ModelIdentity | None:
        """What the model's workers share; None while there are none."""
        descriptions = [worker.description for worker in self._of_model(model)]
        if not descriptions:
            return None
        context = min(each.context_tokens for each in descriptions)
        return ModelIdentity(descriptions[0].digest, descriptions[0].kv_format, context)

    def readiness(self, model: str) -> str | None:
        """Why the model cannot be served just now; None if it can."""
        for role in (PREFILL, DECODE):
            if not self.usable(model, role):
                return f"no {role} worker serves {model}"
        return None

    def _of_model(self, model: str) -> Iterable[Worker]:
        return [
            worker
            for worker in self._workers.values()
            if worker.description.model == model and self._objection(worker.description) is None
        ]

    def _adopt(self, description: Description) -> None:
        expected = self.expected.get(description.model)
        if expected is not None:
            digest = expected.digest or description.digest
            self._digests.setdefault(description.model, digest)

    def _objection(self, description: Description) -> str | None:
        expected = self.expected.get(description.model)
        if expected is None:
            return f"model {description.model} is not configured here"
        if description.digest != self._digests.get(description.model):
            return f"its model digest is {description.digest.hex()}, not that of its peers"
        if description.vocab_size < expected.vocab_size:
            return f"vocabulary of {description.vocab_size} is smaller than the tokeniser's"
        return None


def _names(description: Description) -> dict[str, object]:
    return {
        "worker_id": description.worker_id,
        "address": description.address,
        "model": description.model,
        "roles": sorted(description.roles),
        "epoch": description.epoch,
    }
