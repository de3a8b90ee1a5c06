"""A prompt's blocks on a worker: claimed from the pool, fetched from the cache, or computed."""

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from tidemill.api.common.v1.lifecycle_pb2 import WorkerTask
from tidemill.api.common.v1.usage_pb2 import PrefillSite, PromptUsage
from tidemill.blocks import BLOCK_TOKENS, chain_hashes, max_hit_tokens, root_hash
from tidemill.engine import BlockPool, Engine
from tidemill.errors import CacheUnavailable, InvalidRequest
from tidemill.kv.cache_client import CacheClient, CacheNamespace, CacheTier
from tidemill.kv.segments import from_bytes
from tidemill.kv.threads import in_thread
from tidemill.worker.block_storer import BlockStorer
from tidemill.worker.metrics import WorkerMetrics


@dataclass(frozen=True)
class Prompt:
    """What is asked: token ids, the chain hashes of their full blocks, and whose they are.

    `root` is the hash that the chain hangs on.
    """

    token_ids: tuple[int, ...]
    root: bytes
    hashes: tuple[bytes, ...]
    namespace: CacheNamespace

    @property
    def num_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.token_ids)


class PromptBlocks:
    """Blocks of one prompt and of what is generated after it; `release` gives them back, once.

    The lengths grow: num_device_tokens <= num_cached_tokens <= num_computed_tokens <= num_tokens.
    Everything here happens on the event loop.
    """

    def __init__(
        self, pool: BlockPool, prompt: Prompt, claimed: Sequence[int], fresh: Sequence[int]
    ) -> None:
        self.prompt = prompt
        self.block_table = [*claimed, *fresh]
        self.num_device_tokens = len(claimed) * BLOCK_TOKENS
        self._hashes = list(prompt.hashes)
        self.num_fetched = dict.fromkeys(CacheTier, 0)
        self.num_computed_tokens = self.num_device_tokens
        self.fetch_seconds = 0.0
        self._pool = pool
        self._num_committed = len(claimed)
        self._released = False

    @property
    def num_cached_tokens(self) -> int:
        """Tokens reused from the pool and from the cache."""
        return self.num_device_tokens + sum(self.num_fetched.values())

    @property
    def num_uncomputed_tokens(self) -> int:
        """Prompt tokens whose latents are not there yet."""
        return self.prompt.num_tokens - self.num_computed_tokens

    def landed(self, block_index: int, tier: CacheTier) -> None:
        """A block was fetched whole: `block_index` counts from the prompt's start."""
        self.num_fetched[tier] += BLOCK_TOKENS
        self.computed(to=(block_index + 1) * BLOCK_TOKENS)

    def computed(self, *, to: int) -> list[bytes]:
        """Latents up to position `to` are final: commits full blocks, returns their hashes."""
        self.num_computed_tokens = to
        hashes = self._hashes[self._num_committed : to // BLOCK_TOKENS]
        for block_hash in hashes:
            self._pool.commit(self.block_table[self._num_committed], block_hash)
            self._num_committed += 1
        return hashes

    def generated(self, token_ids: Sequence[int]) -> None:
        """Name the blocks that generation has filled: `token_ids` begins with the prompt."""
        start = len(self._hashes) * BLOCK_TOKENS
        last = self._hashes[-1] if self._hashes else self.prompt.root
        self._hashes += chain_hashes(last, token_ids[start:])

    def release(self) -> None:
        """Give every block back; safe to repeat."""
        if not self._released:
            self._released = True
            self._pool.release(self.block_table)

    def usage(self, site: "PrefillSite.ValueType", worker_id: str) -> PromptUsage:
        """The prompt's split by U1, once it is computed."""
        return PromptUsage(
            prompt_tokens=self.prompt.num_tokens,
            computed_tokens=self.prompt.num_tokens - self.num_cached_tokens,
            reused_device_tokens=self.num_device_tokens,
            reused_cache_ram_tokens=self.num_fetched[CacheTier.RAM],
            reused_cache_disk_tokens=self.num_fetched[CacheTier.DISK],
            prefill_site=site,
            prefill_worker_id=worker_id,
        )


class PromptReuse:
    """Finds blocks for prompts: in the pool, in the cache service, or fresh ones."""

    def __init__(
        self,
        engine: Engine,
        *,
        model: str,
        cache: CacheClient | None,
        storer: BlockStorer | None,
        metrics: WorkerMetrics,
    ) -> None:
        self._pool = engine.pool
        self._layout = engine.layout
        self._vocab_size = engine.model_config.vocab_size
        self._fingerprint = engine.layout.fingerprint()
        self._model = model
        self._cache = cache
        self._storer = storer
        self._metrics = metrics

    async def identify(self, task: WorkerTask) -> Prompt:
        """Copy and hash the prompt, in a thread. Raises InvalidRequest for unknown token ids."""
        return await asyncio.to_thread(self._identify, task)

    def _identify(self, task: WorkerTask) -> Prompt:
        layout = self._layout
        root = root_hash(layout.model_digest, layout.kv_format, task.cache_scope)
        token_ids = tuple(task.token_ids)
        if max(token_ids) >= self._vocab_size:
            problem = f"token ids must be below {self._vocab_size}"
            raise InvalidRequest(problem, violations=[("task.token_ids", problem)])
        namespace = CacheNamespace(
            tenant_id=task.tenant_id,
            cache_scope=task.cache_scope,
            layout_fingerprint=self._fingerprint,
            model=self._model,
        )
        return Prompt(token_ids, root, tuple(chain_hashes(root, token_ids)), namespace)

    def reusable(self, prompt: Prompt) -> tuple[bytes, ...]:
        """Hashes that may be hits (U2): whole blocks, never the last token's."""
        return prompt.hashes[: max_hit_tokens(prompt.num_tokens) // BLOCK_TOKENS]

    def take(self, prompt: Prompt, hashes: Sequence[bytes], *, num_positions: int) -> PromptBlocks:
        """Claim the held start of `hashes` and allocate the rest up to `num_positions`.

        Raises PoolExhausted with nothing taken.
        """
        claimed = self._pool.claim(hashes)
        try:
            fresh = self._pool.allocate(-(-num_positions // BLOCK_TOKENS) - len(claimed))
        except BaseException:
            self._pool.release(claimed)
            raise
        return PromptBlocks(self._pool, prompt, claimed, fresh)

    async def fetch(self, blocks: PromptBlocks) -> None:
        """Fill blocks after the claimed ones from the cache, as far as it delivers.

        Whatever it does not deliver is left to be computed; that is no error.
        """
        first = blocks.num_device_tokens // BLOCK_TOKENS
        wanted = self.reusable(blocks.prompt)[first:]
        if self._cache is None or not wanted:
            return
        started = time.perf_counter()
        try:
            held = await self._cache.lookup(blocks.prompt.namespace, wanted)
            missing = len(held)
            async with aclosing(self._cache.fetch_held(held)) as fetched:
                async for block in fetched:
                    if len(block.payload) != self._layout.block_bytes:
                        break
                    block_id = blocks.block_table[first + block.index]
                    await in_thread(self._write, block_id, block.payload)
                    blocks.landed(first + block.index, block.tier)
                    missing -= 1
            self._metrics.cache_failed_blocks.inc(missing)
        except CacheUnavailable:
            self._metrics.cache_errors.labels("fetch").inc()
        finally:
            blocks.fetch_seconds = time.perf_counter() - started

    def computed(self, blocks: PromptBlocks, *, to: int) -> None:
        """Positions up to `to` are computed: make full blocks findable, here and in the cache."""
        hashes = blocks.computed(to=to)
        if hashes and self._storer is not None:
            self._storer.offer(blocks.prompt.namespace, hashes)

    def generated(self, blocks: PromptBlocks, token_ids: Sequence[int]) -> None:
        """Latents of all `token_ids`, prompt and generated, are final: reuse them likewise."""
        blocks.generated(token_ids)
        self.computed(blocks, to=len(token_ids))

    def _write(self, block_id: int, payload: bytes) -> None:
        shape = (self._layout.num_layers, BLOCK_TOKENS, self._layout.latent_dim)
        values = from_bytes(payload, self._pool.latents.dtype).view(shape)
        self._pool.write_block(block_id, values)


class Backlog:
    """Prompts in prefill on this worker, for other workers and in place alike."""

    def __init__(
        self, max_queued_tokens: int, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_queued_tokens = max_queued_tokens
        self._clock = clock
        self._prompts: set[PromptBlocks] = set()
        self._tokens_per_second = 0.0

    def __len__(self) -> int:
        return len(self._prompts)

    @property
    def num_tokens(self) -> int:
        """Prompt tokens admitted and not yet computed, reused ones excluded."""
        # The copy lets the metrics thread read while the event loop adds and removes.
        return sum(blocks.num_uncomputed_tokens for blocks in tuple(self._prompts))

    def has_room(self, num_tokens: int) -> bool:
        """Whether a prompt with so many uncached tokens is admitted; an idle worker takes any."""
        queued = self.num_tokens
        return queued == 0 or queued + num_tokens <= self._max_queued_tokens

    def retry_after_s(self) -> float:
        """A guess at when there will be room: the time that half of the backlog takes."""
        if not self._tokens_per_second:
            return 0.2
        return min(max(self.num_tokens / self._tokens_per_second / 2, 0.05), 5.0)

    def add(self, blocks: PromptBlocks) -> None:
        """A prompt was admitted."""
        self._prompts.add(blocks)

    def discard(self, blocks: PromptBlocks, *, busy_seconds: float) -> None:
        """It is computed, or was stopped, after `busy_seconds` of compute; safe to repeat."""
        if blocks not in self._prompts:
            return
        self._prompts.remove(blocks)
        num_tokens = blocks.num_computed_tokens - blocks.num_cached_tokens
        if busy_seconds > 0 and num_tokens > 0:
            rate = num_tokens / busy_seconds
            known = self._tokens_per_second or rate
            self._tokens_per_second = 0.8 * known + 0.2 * rate
