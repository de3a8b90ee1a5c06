"""The engine: takes sequences, runs steps, reports tokens."""

import threading
import time
from pathlib import Path

import torch

from tidemill.engine.block_pool import BlockPool
from tidemill.engine.config import EngineConfig
from tidemill.engine.layout import KvLayout
from tidemill.engine.outputs import (
    EngineLoad,
    FinishedOutput,
    Output,
    PausedOutput,
    PrefilledOutput,
    TokensOutput,
)
from tidemill.engine.runner import ModelRunner
from tidemill.engine.sampling import Drawn, draw
from tidemill.engine.scheduler import DecodeStep, PrefillStep, Scheduler
from tidemill.engine.sequence import FinishReason, Sequence
from tidemill.engine.validate import validate
from tidemill.errors import AlreadyExists, ConfigError
from tidemill.models.checkpoint import Checkpoint
from tidemill.models.config import ModelConfig, load_eos_token_ids
from tidemill.models.weights import load_model

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Engine:
    """One model, one pool, one thread that calls `step`.

    `submit`, `fund`, `stop` and `load_snapshot` may be called from any thread; they take effect
    between steps. Blocks belong to the caller: it allocates (or claims) them before `submit`,
    commits full prompt blocks (only it knows their hashes) and releases them after the sequence's
    last output. An exception inside a step leaves `step`; the engine is then not to be used again.
    """

    def __init__(
        self,
        *,
        config: EngineConfig,
        model_config: ModelConfig,
        eos_token_ids: frozenset[int],
        runner: ModelRunner,
        layout: KvLayout,
    ) -> None:
        self.config = config
        self.model_config = model_config
        self.eos_token_ids = eos_token_ids
        self.layout = layout
        self.pool = runner.pool
        self.max_context = _max_context(config, model_config)
        self._runner = runner
        self._scheduler = Scheduler(
            max_batch=config.max_batch, prefill_chunk_tokens=config.prefill_chunk_tokens
        )
        self._lock = threading.Lock()
        self._seqs: dict[str, Sequence] = {}
        self._stops: dict[str, tuple[str, int | None]] = {}

    @classmethod
    def load(cls, model_dir: Path, config: EngineConfig) -> "Engine":
        """Load a Hugging Face folder; CheckpointError or ConfigError says what is wrong with it."""
        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        model_config = ModelConfig.load(model_dir)
        dtype = _dtype(config.dtype, model_config.dtype)
        checkpoint = Checkpoint(model_dir)
        model = load_model(checkpoint, model_config, dtype, _max_context(config, model_config))
        pool = BlockPool(
            num_layers=model_config.num_hidden_layers,
            num_blocks=config.num_blocks,
            latent_dim=model_config.latent_dim,
            dtype=dtype,
            host_blocks=config.host_cache_blocks,
        )
        layout = KvLayout(
            dtype=str(dtype).removeprefix("torch."),
            num_layers=model_config.num_hidden_layers,
            latent_dim=model_config.latent_dim,
            model_digest=checkpoint.digest(),
        )
        return cls(
            config=config,
            model_config=model_config,
            eos_token_ids=load_eos_token_ids(model_dir),
            runner=ModelRunner(model, pool),
            layout=layout,
        )

    @property
    def has_work(self) -> bool:
        """Whether `step` would do something; paused sequences alone are no work."""
        with self._lock:
            return bool(self._stops) or self._scheduler.has_work

    def submit(self, seq: Sequence) -> None:
        """Accept a sequence; InvalidRequest names each bad field, AlreadyExists a reused id."""
        validate(seq, vocab_size=self.model_config.vocab_size, max_context=self.max_context)
        with self._lock:
            if seq.seq_id in self._seqs:
                raise AlreadyExists(f"sequence {seq.seq_id!r} is already in the engine")
            self._seqs[seq.seq_id] = seq
            self._scheduler.add(seq)

    def fund(self, seq_id: str, total: int) -> None:
        """Allow `total` generated tokens in all (never fewer than before); resumes a paused one."""
        with self._lock:
            seq = self._seqs.get(seq_id)
            if seq is None or seq.num_funded_tokens is None:
                return
            seq.num_funded_tokens = max(seq.num_funded_tokens, total)
            if seq.is_funded:
                self._scheduler.resume(seq)

    def stop(self, seq_id: str, reason: str, keep_tokens: int | None = None) -> None:
        """End a sequence before the next step; the first stop wins, an unknown id is ignored.

        `keep_tokens` is how many generated tokens the caller keeps; it is noted on the sequence
        and changes no count.
        """
        with self._lock:
            if seq_id in self._seqs:
                self._stops.setdefault(seq_id, (reason, keep_tokens))

    def load_snapshot(self) -> EngineLoad:
        """Queue lengths and free blocks right now."""
        with self._lock:
            prefilling = self._scheduler.prefilling
            queued = sum(seq.num_uncomputed_prompt_tokens for seq in prefilling)
            running = min(len(self._scheduler.running), self.config.max_batch)
            waiting = len(self._seqs) - running
        return EngineLoad(queued, running, waiting, self.pool.num_free, self.pool.num_blocks)

    def step(self) -> list[Output]:
        """Apply stops, then run one prefill chunk or one decode step. Engine thread only."""
        started = time.perf_counter()
        with self._lock:
            outputs = self._apply_stops()
            outputs += self._settle_first_tokens()
            plan = self._scheduler.next_step()
        if isinstance(plan, PrefillStep):
            return outputs + self._prefill(plan, started)
        if isinstance(plan, DecodeStep):
            return outputs + self._decode(plan, started)
        return outputs

    def _prefill(self, plan: PrefillStep, started: float) -> list[Output]:
        logits = self._runner.prefill(plan.chunks)
        done = [
            row for row, chunk in enumerate(plan.chunks) if chunk.end == chunk.seq.num_prompt_tokens
        ]
        seqs = [plan.chunks[row].seq for row in done]
        tokens = draw(logits[done], seqs) if seqs else []
        _share_time([chunk.seq for chunk in plan.chunks], started)
        outputs: list[Output] = []
        with self._lock:
            for chunk in plan.chunks:
                chunk.seq.num_computed_tokens = chunk.end
            for seq, token in zip(seqs, tokens, strict=True):
                if token.dead_end:
                    outputs.append(self._finish(seq, FinishReason.DEAD_END.value))
                    continue
                outputs.append(PrefilledOutput(seq.seq_id, [token]))
                if seq.prefill_only:
                    self._drop(seq)
                    continue
                self._scheduler.prefill_done(seq)
                outputs += self._extend(seq, token)
        return outputs

    def _decode(self, plan: DecodeStep, started: float) -> list[Output]:
        tokens = draw(self._runner.decode(plan.seqs), plan.seqs)
        _share_time(plan.seqs, started)
        outputs: list[Output] = []
        with self._lock:
            for seq, token in zip(plan.seqs, tokens, strict=True):
                seq.num_computed_tokens = len(seq.token_ids)
                outputs += self._extend(seq, token)
        return outputs

    def _extend(self, seq: Sequence, drawn: Drawn) -> list[Output]:
        if drawn.dead_end:
            return [self._finish(seq, FinishReason.DEAD_END.value)]
        seq.append(drawn.token_id, self.max_context)
        logprobs = [] if drawn.logprobs is None else [drawn.logprobs]
        index = seq.num_generated - 1
        outputs: list[Output] = [TokensOutput(seq.seq_id, [drawn.token_id], index, logprobs)]
        return outputs + self._finish_or_pause(seq)

    def _finish_or_pause(self, seq: Sequence) -> list[Output]:
        if seq.finish_reason is not None:
            return [self._finish(seq, seq.finish_reason.value)]
        if not seq.is_funded:
            self._scheduler.pause(seq)
            return [PausedOutput(seq.seq_id)]
        return []

    def _settle_first_tokens(self) -> list[Output]:
        """End or pause handed-over sequences whose first token leaves nothing to generate."""
        outputs: list[Output] = []
        for seq in list(self._scheduler.running):
            if seq.num_generated == 1:
                seq.finish_reason = seq.reason_to_finish(self.max_context)
                outputs += self._finish_or_pause(seq)
        return outputs

    def _apply_stops(self) -> list[Output]:
        outputs: list[Output] = []
        for seq_id, (reason, keep_tokens) in list(self._stops.items()):
            seq = self._seqs[seq_id]
            seq.keep_tokens = keep_tokens
            outputs.append(self._finish(seq, reason))
        return outputs

    def _finish(self, seq: Sequence, reason: str) -> FinishedOutput:
        self._drop(seq)
        return FinishedOutput(seq.seq_id, reason, seq.num_generated, seq.busy_seconds)

    def _drop(self, seq: Sequence) -> None:
        self._scheduler.remove(seq)
        del self._seqs[seq.seq_id]
        self._stops.pop(seq.seq_id, None)


def _share_time(seqs: list[Sequence], started: float) -> None:
    share = (time.perf_counter() - started) / len(seqs)
    for seq in seqs:
        seq.busy_seconds += share


def _max_context(config: EngineConfig, model_config: ModelConfig) -> int:
    limit = model_config.max_position_embeddings
    if config.max_context is None:
        return limit
    if not 1 < config.max_context <= limit:
        raise ConfigError(f"max_context is {config.max_context}, the model allows 2 to {limit}")
    return config.max_context


def _dtype(wanted: str, of_checkpoint: str) -> torch.dtype:
    name = of_checkpoint if wanted == "auto" else wanted
    if name not in _DTYPES:
        raise ConfigError(f"dtype is {name!r}, expected one of {sorted(_DTYPES)}")
    return _DTYPES[name]
