"""The engine: takes sequences, runs steps, reports tokens."""

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from tidemill.apportion import apportion
from tidemill.engine import device as devices
from tidemill.engine.admission import Admission, blocks_for, blocks_of
from tidemill.engine.block_pool import BlockPool
from tidemill.engine.config import EngineConfig
from tidemill.engine.decode_graphs import DecodeGraphs
from tidemill.engine.layout import KvLayout
from tidemill.engine.logprobs import prompt_logprobs
from tidemill.engine.outputs import (
    EngineLoad,
    FinishedOutput,
    Output,
    PausedOutput,
    PrefilledOutput,
    TokensOutput,
)
from tidemill.engine.runner import ModelRunner, Runner
from tidemill.engine.sampling import Drawn, draw
from tidemill.engine.scheduler import Scheduler, Step
from tidemill.engine.sequence import FinishReason, Sequence
from tidemill.engine.step_cost import (
    CPU_FLOPS_PER_BYTE,
    H100_FLOPS_PER_BYTE,
    BusyTime,
    StepCost,
)
from tidemill.engine.swap import SwapSpace
from tidemill.engine.tables import BlockTables
from tidemill.engine.validate import validate
from tidemill.errors import AlreadyExists, ConfigError, PoolCorrupted, PoolExhausted
from tidemill.kernels import choice
from tidemill.models.checkpoint import Checkpoint
from tidemill.models.config import ModelConfig, load_eos_token_ids
from tidemill.models.source import Progress
from tidemill.models.weights import load_model

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Engine:
    """One model, one pool, one thread that calls `step`.

    The other methods may be called from any thread; they take effect between steps. The caller
    allocates (or claims) the blocks of a prompt before `submit`; from then to the sequence's last
    output its table belongs to the engine, which grows it, commits full blocks and swaps it out
    and in; what the table holds then is the caller's to release. An exception inside a step leaves
    `step`; the engine is then not to be used again.

    `starved` says that the last step found no block for anybody: what it waits for is held by
    others, and not by sequences. `current_step` is what computes now, or did last, and
    `current_costs` what each part of it weighs by `cost`. `busy` adds up the steps' time, all of
    which the sequences share by these.
    """

    def __init__(
        self,
        *,
        config: EngineConfig,
        model_config: ModelConfig,
        eos_token_ids: frozenset[int],
        runner: Runner,
        layout: KvLayout,
        cost: Callable[[Step], list[int]],
    ) -> None:
        self.config = config
        self.model_config = model_config
        self.eos_token_ids = eos_token_ids
        self.layout = layout
        self.pool = runner.pool
        self.max_context = _max_context(config, model_config)
        self.busy = BusyTime()
        self.cost = cost
        self._runner = runner
        self.num_swap_blocks = (
            self.pool.num_blocks if config.swap_blocks is None else config.swap_blocks
        )
        swap = SwapSpace(self.num_swap_blocks, self.pool.latents)
        self._tables = BlockTables(self.pool, swap)
        self._scheduler = Scheduler(
            self._tables, max_batch=config.max_batch, step_tokens=config.step_tokens
        )
        self._admission = Admission(
            device_blocks=self.pool.num_blocks, swap_blocks=self.num_swap_blocks
        )
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._seqs: dict[str, Sequence] = {}
        self._parents: dict[str, Sequence] = {}
        self._arrived: list[Sequence] = []  # prompt prefilled elsewhere, first token not looked at
        self.starved = False
        self.current_step = Step()
        self.current_costs: list[int] = []
        self._stops: dict[str, tuple[str, int | None]] = {}

    @classmethod
    def load(
        cls, model_dir: Path, config: EngineConfig, on_progress: Progress | None = None
    ) -> "Engine":
        """Load a Hugging Face folder; CheckpointError or ConfigError says what is wrong with it.

        `on_progress` is called with (bytes read, bytes to read) after each tensor.
        """
        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        model_config = ModelConfig.load(model_dir)
        dtype = _dtype(config.dtype, model_config.dtype)
        device = devices.find_device(config.device)
        devices.use(device)
        choice.force(config.kernels)
        stacked = choice.takes_triton(torch.empty(0, device=device))
        if stacked:
            devices.refuse_widths(model_config)
        checkpoint = Checkpoint(model_dir)
        max_context = _max_context(config, model_config)
        model = load_model(
            checkpoint,
            model_config,
            dtype,
            max_context,
            on_progress,
            device=device,
            stacked=stacked,
        )
        layout = KvLayout(
            dtype=str(dtype).removeprefix("torch."),
            num_layers=model_config.num_hidden_layers,
            latent_dim=model_config.latent_dim,
            model_digest=checkpoint.digest(),
        )
        pool = BlockPool(
            num_layers=model_config.num_hidden_layers,
            num_blocks=_num_blocks(config, model_config, device, layout),
            latent_dim=model_config.latent_dim,
            dtype=dtype,
            device=str(device),
            host_blocks=config.host_cache_blocks,
        )
        graphs = None
        if device.type == "cuda" and stacked:
            graphs = DecodeGraphs(model, pool, max_batch=config.max_batch, max_context=max_context)
        return cls(
            config=config,
            model_config=model_config,
            eos_token_ids=load_eos_token_ids(model_dir),
            runner=ModelRunner(model, pool, graphs),
            layout=layout,
            cost=StepCost(
                model_config,
                value_bytes=dtype.itemsize,
                flops_per_byte=CPU_FLOPS_PER_BYTE if device.type == "cpu" else H100_FLOPS_PER_BYTE,
            ),
        )

    @property
    def has_work(self) -> bool:
        """Whether `step` would do something; paused sequences alone are no work."""
        with self._lock:
            return bool(self._stops or self._arrived) or self._scheduler.has_work

    @property
    def num_swapped(self) -> int:
        """Sequences that are swapped out."""
        with self._lock:
            return len(self._tables.swapped)

    def could_hold(self, num_prompt_tokens: int, max_tokens: int, *, choices: int = 1) -> bool:
        """Whether the empty engine has room for a prompt and so many completions of it."""
        each, together = self._most_blocks(num_prompt_tokens, max_tokens, choices)
        return self._admission.fits(each=each, together=together)

    def admit(
        self, seq_id: str, num_prompt_tokens: int, max_tokens: int, *, choices: int = 1
    ) -> bool:
        """Promise room to a sequence that will be submitted, or dismissed; False: not now.

        Whoever is admitted will run to its end, swapped out at times: what all admitted sequences
        may come to hold fits device and swap space together. Nobody is admitted while a sequence
        is swapped out.
        """
        each, together = self._most_blocks(num_prompt_tokens, max_tokens, choices)
        with self._lock:
            if self._tables.swapped or not self._admission.admits(each=each, together=together):
                return False
            self._admission.promise(seq_id, together)
            return True

    def dismiss(self, seq_id: str) -> None:
        """An admitted sequence will not be submitted; nothing happens to one that was."""
        with self._lock:
            if seq_id not in self._seqs:
                self._admission.withdraw(seq_id)

    def submit(self, seq: Sequence) -> None:
        """Accept a sequence and its forks.

        Raises InvalidRequest naming each bad field, AlreadyExists for a reused id, PoolExhausted
        for one that was not admitted and would not be.
        """
        validate(seq, vocab_size=self.model_config.vocab_size, max_context=self.max_context)
        members = [seq] if seq.prefill_only else [seq, *seq.forks]
        with self._lock:
            for seq_id, count in Counter(member.seq_id for member in members).items():
                if seq_id in self._seqs or count > 1:
                    raise AlreadyExists(f"sequence {seq_id!r} is already in the engine")
            if not seq.prefill_only:  # it never holds more than it comes with
                self._promise(seq)
            for member in members:
                member.number = next(self._numbers)
                self._seqs[member.seq_id] = member
                self._parents[member.seq_id] = seq
            if seq.num_generated:
                for fork in seq.forks:
                    self._tables.share(seq, fork)
                self._arrived += members
            else:
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
            swapped = len(self._tables.swapped)
            waiting = len(self._seqs) - running - swapped
        return EngineLoad(
            queued, running, waiting, self.pool.num_free, self.pool.num_blocks, swapped
        )

    def check_idle(self) -> None:
        """Raise PoolCorrupted if anything is held, promised or unsound, as nothing is when idle."""
        self.pool.check_idle()
        with self._lock:
            self._tables.swap.check_integrity()
            if used := self._tables.swap.num_used:
                raise PoolCorrupted(f"{used} swapped blocks are held while idle")
            if promised := self._admission.num_promised:
                raise PoolCorrupted(f"{promised} blocks are promised while idle")

    def step(self) -> list[Output]:
        """Apply stops, then run one forward over running sequences and prompts' chunks.

        Engine thread only.
        """
        started = time.perf_counter_ns()
        devices.use(self.pool.latents.device)
        self.current_step = Step()
        with self._lock:
            outputs = self._apply_stops() + self._settle_arrived()
            step = self.current_step = self._scheduler.next_step()
            # Outputs of an empty step are ends: their blocks come free once they have been heard.
            self.starved = not step and not outputs and self._scheduler.has_work
        if not step:
            return outputs
        costs = self.current_costs = self.cost(step)
        hidden = self._runner.forward(step)
        self._score_prompts(step, hidden)
        drawn = self._draw(step, hidden)
        if not drawn:  # drawing waits for the step; its time is told when it is over
            devices.wait_for(hidden.device)
        with self._lock:
            outputs += self._advance(step, iter(drawn))
        self._book(step, apportion(time.perf_counter_ns() - started, costs))
        return outputs

    def _book(self, step: Step, shares_ns: list[int]) -> None:
        num_decodes = len(step.decodes)
        for seq, share_ns in zip(step.decodes, shares_ns[:num_decodes], strict=True):
            seq.decode_ns += share_ns
        for chunk, share_ns in zip(step.chunks, shares_ns[num_decodes:], strict=True):
            chunk.seq.prefill_ns += share_ns
        self.busy = BusyTime(
            self.busy.prefill_ns + sum(shares_ns[num_decodes:]),
            self.busy.decode_ns + sum(shares_ns[:num_decodes]),
        )

    def _draw(self, step: Step, hidden: Tensor) -> list[Drawn]:
        """One token for each running sequence, then for each choice of a prompt now complete."""
        rows = list(range(len(step.decodes)))
        seqs = list(step.decodes)
        index = list(rows)
        end = len(rows)
        for chunk in step.chunks:
            end += chunk.num_tokens
            if chunk.completes_prompt:
                choices = [chunk.seq, *chunk.seq.forks]
                index += [len(rows)] * len(choices)
                rows.append(end - 1)
                seqs += choices
        if not rows:
            return []
        device = hidden.device
        if len(rows) < len(hidden):
            hidden = hidden[devices.send(torch.tensor(rows), device)]
        logits = self._runner.logits(hidden)
        if len(index) > len(rows):
            logits = logits[devices.send(torch.tensor(index), device)]
        return draw(logits, seqs)

    def _score_prompts(self, step: Step, hidden: Tensor) -> None:
        row = len(step.decodes)
        for chunk in step.chunks:
            seq, top = chunk.seq, chunk.seq.sampling.prompt_logprobs
            end = min(chunk.end, seq.num_prompt_tokens - 1)
            if top is not None and end > chunk.start:
                rows = hidden[row : row + end - chunk.start]
                next_ids = seq.token_ids[chunk.start + 1 : end + 1]
                seq.prompt_logprobs += prompt_logprobs(self._runner.logits, rows, next_ids, top)
            row += chunk.num_tokens

    def _advance(self, step: Step, drawn: Iterator[Drawn]) -> list[Output]:
        outputs: list[Output] = []
        for seq in step.decodes:
            seq.num_computed_tokens = len(seq.token_ids)
            self._tables.commit(seq)
            outputs += self._extend(seq, next(drawn))
        for chunk in step.chunks:
            chunk.seq.num_computed_tokens = chunk.end
            self._tables.commit(chunk.seq)
            if chunk.completes_prompt:
                choices = [chunk.seq, *chunk.seq.forks]
                outputs += self._begin(chunk.seq, [next(drawn) for _ in choices])
        return outputs

    def _begin(self, seq: Sequence, first_tokens: list[Drawn]) -> list[Output]:
        """The prompt is computed: report it, and let all its choices decode."""
        members = [seq] if seq.prefill_only else [seq, *seq.forks]
        if first_tokens[0].dead_end:  # one row of logits, one constraint: so for all
            return [self._finish(member, FinishReason.DEAD_END.value) for member in members]
        outputs: list[Output] = [PrefilledOutput(seq.seq_id, first_tokens, seq.prompt_logprobs)]
        if seq.prefill_only:
            self._drop(seq)
            return outputs
        self._scheduler.prefill_done(seq)
        for fork in seq.forks:
            self._tables.share(seq, fork)
            self._scheduler.add(fork)
        for member, drawn in zip(members, first_tokens, strict=True):
            outputs += self._extend(member, drawn)
        return outputs

    def _extend(self, seq: Sequence, drawn: Drawn) -> list[Output]:
        if drawn.dead_end:
            return [self._finish(seq, FinishReason.DEAD_END.value)]
        seq.append(drawn.token_id, self.max_context)
        logprobs = [] if drawn.logprobs is None else [drawn.logprobs]
        index = seq.num_generated - 1
        outputs: list[Output] = [TokensOutput(seq.seq_id, [drawn.token_id], index, logprobs)]
        if seq.finish_reason is not None:
            return [*outputs, self._finish(seq, seq.finish_reason.value)]
        if not seq.is_funded:
            self._scheduler.pause(seq)
            outputs.append(PausedOutput(seq.seq_id))
        return outputs

    def _settle_arrived(self) -> list[Output]:
        """Take handed-over sequences on; some first tokens leave nothing to generate."""
        outputs: list[Output] = []
        for seq in self._arrived:
            if self._seqs.get(seq.seq_id) is not seq:
                continue
            seq.finish_reason = seq.reason_to_finish(self.max_context)
            if seq.finish_reason is not None:
                outputs.append(self._finish(seq, seq.finish_reason.value))
                continue
            self._scheduler.add(seq)
            if not seq.is_funded:
                outputs.append(PausedOutput(seq.seq_id))
        self._arrived.clear()
        return outputs

    def _apply_stops(self) -> list[Output]:
        outputs: list[Output] = []
        for seq_id, (reason, keep_tokens) in list(self._stops.items()):
            seq = self._seqs[seq_id]
            if self._prompt_is_wanted(self._parents[seq_id]):
                continue
            seq.keep_tokens = keep_tokens
            outputs.append(self._finish(seq, reason))
        return outputs

    def _prompt_is_wanted(self, parent: Sequence) -> bool:
        """Whether a prompt is yet to be computed for a choice that nobody has stopped.

        Its other choices then end as soon as it is.
        """
        if not parent.num_uncomputed_prompt_tokens or parent.prefill_only:
            return False
        members = [parent, *parent.forks]
        return any(each.seq_id in self._seqs and each.seq_id not in self._stops for each in members)

    def _finish(self, seq: Sequence, reason: str) -> FinishedOutput:
        self._drop(seq)
        return FinishedOutput(seq.seq_id, reason, seq.num_generated)

    def _drop(self, seq: Sequence) -> None:
        self._scheduler.remove(seq)
        del self._seqs[seq.seq_id]
        self._stops.pop(seq.seq_id, None)
        parent = self._parents.pop(seq.seq_id)
        if not any(member.seq_id in self._seqs for member in (parent, *parent.forks)):
            self._admission.withdraw(parent.seq_id)

    def _promise(self, seq: Sequence) -> None:
        if seq.seq_id in self._admission:
            return
        each, together = blocks_of(seq, self.max_context)
        if not self._admission.admits(each=each, together=together):
            raise PoolExhausted(
                f"{together} blocks may be needed, {self._admission.num_promised} are promised to "
                f"others, {self.pool.num_blocks} and {self.num_swap_blocks} to swap exist"
            )
        self._admission.promise(seq.seq_id, together)

    def _most_blocks(
        self, num_prompt_tokens: int, max_tokens: int, choices: int
    ) -> tuple[int, int]:
        each = blocks_for(num_prompt_tokens, max_tokens, self.max_context)
        together = blocks_for(num_prompt_tokens, max_tokens, self.max_context, choices=choices)
        return each, together


def _max_context(config: EngineConfig, model_config: ModelConfig) -> int:
    limit = model_config.max_position_embeddings
    if config.max_context is None:
        return limit
    if not 1 < config.max_context <= limit:
        raise ConfigError(f"max_context is {config.max_context}, the model allows 2 to {limit}")
    return config.max_context


def _num_blocks(
    config: EngineConfig, model_config: ModelConfig, device: torch.device, layout: KvLayout
) -> int:
    if config.num_blocks is not None:
        return config.num_blocks
    if device.type == "cpu":
        raise ConfigError("num_blocks must be given for an engine on the CPU")
    torch.cuda.empty_cache()  # what loading has left behind is free
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    step_bytes = devices.step_bytes(
        model_config,
        value_bytes=layout.value_bytes,
        step_tokens=config.step_tokens,
        max_batch=config.max_batch,
        max_context=_max_context(config, model_config),
    )
    return devices.blocks_that_fit(
        total_bytes=total_bytes,
        free_bytes=free_bytes,
        memory_share=config.memory_share,
        step_bytes=step_bytes + devices.SPARE_BYTES,
        block_bytes=layout.block_bytes,
    )


def _dtype(wanted: str, of_checkpoint: str) -> torch.dtype:
    name = of_checkpoint if wanted == "auto" else wanted
    if name not in _DTYPES:
        raise ConfigError(f"dtype is {name!r}, expected one of {sorted(_DTYPES)}")
    return _DTYPES[name]
