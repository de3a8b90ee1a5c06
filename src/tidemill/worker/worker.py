"""What every worker has, whatever its role: engine, blocks, hand-overs, load, readiness."""

import logging
import secrets
import time
from collections.abc import Callable
from importlib.metadata import version

from tidemill.api.common.v1.kv_pb2 import KvLayout
from tidemill.api.common.v1.lifecycle_pb2 import WorkerTask
from tidemill.api.common.v1.usage_pb2 import PromptUsage
from tidemill.api.worker.v1 import worker_service_pb2 as pb
from tidemill.blocks import BLOCK_TOKENS
from tidemill.engine import PoolCorrupted, PoolTier
from tidemill.errors import FailedPrecondition, InvalidRequest
from tidemill.kv.cache_client import CacheTier
from tidemill.kv.handover import HandoverTable
from tidemill.kv.shm import SharedMemory
from tidemill.worker.background import Background
from tidemill.worker.block_storer import BlockStorer
from tidemill.worker.config import Role, WorkerConfig
from tidemill.worker.engine_thread import EngineThread
from tidemill.worker.grammars import Grammars
from tidemill.worker.kv_events import KvEvents
from tidemill.worker.metrics import WorkerMetrics
from tidemill.worker.prompt import Backlog, PromptReuse

INTEGRITY_PERIOD_S = 5.0
MOST_CHUNKS_PER_S = 1000.0

ROLES = {
    Role.PREFILL: pb.WORKER_ROLE_PREFILL,
    Role.DECODE: pb.WORKER_ROLE_DECODE,
    Role.BOTH: pb.WORKER_ROLE_BOTH,
}

TIERS = [tier.value for kind in (PoolTier, CacheTier) for tier in kind]

logger = logging.getLogger(__name__)


class Worker:
    """One engine and what its services share. `epoch` is new with every start of the process."""

    def __init__(
        self,
        config: WorkerConfig,
        role: Role,
        thread: EngineThread,
        reuse: PromptReuse,
        *,
        storer: BlockStorer | None,
        metrics: WorkerMetrics,
        background: Background,
        shared: SharedMemory | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.role = role
        self.worker_id = config.worker_id
        self.epoch = secrets.randbits(64)
        self.thread = thread
        self.engine = thread.engine
        self.reuse = reuse
        self.storer = storer
        self.metrics = metrics
        self.shared = shared
        self.clock = clock
        self._background = background
        self.backlog = Backlog(config.max_queued_tokens, reuse.policy)
        self.handovers = HandoverTable(
            epoch=self.epoch, lease_s=config.handover.lease_s, clock=clock
        )
        self.kv_events = KvEvents(self.engine.pool, epoch=self.epoch)
        self.grammars = Grammars(config.model_dir, self.engine.model_config.vocab_size)
        self.draining = False
        self.in_place_tokens = 0  # what a worker that only decodes computes of a prompt at most
        self.registered: bool | None = None  # whether the registry took the last heartbeat
        self.num_waiting = 0  # attempts that wait for their KV
        self.num_serving = 0  # other workers' fetches
        self._checked_at = clock()
        self._corrupted: str | None = None

    def check_model(self, task: WorkerTask) -> None:
        """Raise FailedPrecondition (MODEL_MISMATCH) unless the task is for this model."""
        if task.model_digest and task.model_digest != self.engine.layout.model_digest:
            raise FailedPrecondition("this worker serves another model", reason="MODEL_MISMATCH")
        limit = self.engine.max_context
        if len(task.token_ids) >= limit:
            problem = f"has {len(task.token_ids)} tokens, at most {limit - 1} fit the context"
            raise InvalidRequest(f"the prompt {problem}", violations=[("task.token_ids", problem)])

    def check_fits(self, num_prompt_tokens: int, max_tokens: int = 1, *, choices: int = 1) -> None:
        """Raise FailedPrecondition (KV_POOL_TOO_SMALL) for what the empty pool could not hold."""
        engine = self.engine
        if not engine.could_hold(num_prompt_tokens, max_tokens, choices=choices):
            raise FailedPrecondition(
                f"{choices} times {max_tokens} tokens after {num_prompt_tokens} exceed the pool of "
                f"{engine.pool.num_blocks} blocks",
                reason="KV_POOL_TOO_SMALL",
            )

    def count_prefill(self, usage: PromptUsage, seconds: float) -> None:
        """Add a finished prefill to the metrics."""
        metrics = self.metrics
        metrics.computed_tokens.inc(usage.computed_tokens)
        for tier in TIERS:
            metrics.reused_tokens.labels(tier).inc(getattr(usage, f"reused_{tier}_tokens"))
        metrics.prefill_seconds.observe(seconds)

    def chunk_pace_s(self) -> float:
        """Least seconds between two Chunks of one attempt: none alone, more in company.

        However fast the steps are, all attempts together then send a bounded number of messages,
        which take the interpreter from the engine's thread.
        """
        return self.thread.num_sequences / MOST_CHUNKS_PER_S

    @property
    def idle(self) -> bool:
        """Whether nobody should hold a block."""
        return not (
            self.thread.num_sequences
            or len(self.backlog)
            or len(self.handovers)
            or self.num_waiting
            or self.num_serving
            or (self.storer is not None and self.storer.busy)
        )

    def readiness(self) -> str | None:
        """Why the worker is not ready, None when it is (R2)."""
        if self.thread.failure is not None:
            return f"the engine failed: {self.thread.failure.error_id}"
        if self._background.failure is not None:
            return self._background.failure
        if self.draining:
            return "draining"
        if self.thread.step_age_s > self.config.stall_s:
            return f"a step has run for {self.thread.step_age_s:.0f} s"
        if self.idle and self.clock() - self._checked_at >= INTEGRITY_PERIOD_S:
            self._checked_at = self.clock()
            self.check_pool()
        return self._corrupted

    def check_pool(self) -> None:
        """Check the idle pool: sound books, and no block held. Readiness shows the outcome."""
        try:
            self.engine.check_idle()
        except PoolCorrupted as error:
            self._corrupted = str(error)
        else:
            self._corrupted = None
        if self._corrupted:
            logger.error("block pool", extra={"why": self._corrupted})

    @property
    def kv_transports(self) -> list[str]:
        """Names of the ways in which latents can leave this worker."""
        return ["grpc"] if self.shared is None else ["grpc", "shm"]

    def describe(self) -> pb.DescribeWorkerResponse:
        """The worker's unchanging facts."""
        layout = self.engine.layout
        return pb.DescribeWorkerResponse(
            worker_id=self.worker_id,
            epoch=self.epoch,
            role=ROLES[self.role],
            model=self.config.model,
            layout=KvLayout(
                dtype=layout.dtype,
                block_tokens=layout.block_tokens,
                num_layers=layout.num_layers,
                latent_dim=layout.latent_dim,
                mtp=layout.mtp,
                model_digest=layout.model_digest,
            ),
            max_context_tokens=min(
                self.engine.max_context, self.engine.pool.num_blocks * BLOCK_TOKENS
            ),
            kv_transports=self.kv_transports,
            version=version("tidemill"),
            vocab_size=self.engine.model_config.vocab_size,
            accelerators=self.config.accelerators,
            in_place_tokens=self.in_place_tokens,
        )

    def load(self) -> pb.WatchLoadResponse:
        """The load right now, without epoch, sequence, paces and what the time went into."""
        load, pool = self.engine.load_snapshot(), self.engine.pool
        tiers = [
            pb.KvTierLoad(
                tier=pb.KV_TIER_DEVICE, total_blocks=load.total_blocks, free_blocks=load.free_blocks
            )
        ]
        if pool.num_host_blocks:
            host = pb.KvTierLoad(
                tier=pb.KV_TIER_HOST,
                total_blocks=pool.num_host_blocks,
                free_blocks=pool.num_host_free,
            )
            tiers.append(host)
        return pb.WatchLoadResponse(
            queued_uncached_tokens=self.backlog.num_tokens,
            queued_attention_pairs=self.backlog.num_attention_pairs,
            prefilling=len(self.backlog),
            running=load.running,
            swapped=load.swapped,
            waiting=self.num_waiting + max(load.waiting - len(self.backlog), 0),
            tiers=tiers,
            open_handovers=len(self.handovers),
            step_age_ms=round(self.thread.step_age_s * 1000),
            draining=self.draining,
        )
