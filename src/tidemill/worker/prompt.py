"""A prompt's blocks on a worker: claimed from its pool, fetched from elsewhere, or computed."""

import asyncio
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from tidemill.api.common.v1.lifecycle_pb2 import KvPeer, WorkerTask
from tidemill.api.common.v1.usage_pb2 import PrefillSite, PromptUsage
from tidemill.blocks import BLOCK_TOKENS, chain_hashes, root_hash
from tidemill.engine import BlockPool, Engine, PoolTier, Reservation
from tidemill.engine import Sequence as SequenceInEngine
from tidemill.errors import InvalidRequest
from tidemill.kv.cache_client import CacheNamespace, CacheTier
from tidemill.kv.segments import from_bytes
from tidemill.kv.threads import in_thread
from tidemill.policy import FetchOrRecompute
from tidemill.worker.block_fetcher import BlockFetcher
from tidemill.worker.block_storer import BlockStorer


@dataclass(frozen=True)
class Prompt:
    """What is asked: token ids, the chain hashes of their full blocks, and whose they are.

    `root` is the hash that the chain hangs on. `peers` may hold more of the chain. Of a `scored`
    prompt the log-probabilities of its own tokens are wanted.
    """

    token_ids: tuple[int, ...]
    root: bytes
    hashes: tuple[bytes, ...]
    namespace: CacheNamespace
    peers: tuple[KvPeer, ...] = ()
    scored: bool = False

    @property
    def num_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.token_ids)


class PromptBlocks:
    """Blocks of one prompt and of what is generated after it; `release` gives them back, once.

    The lengths grow: num_ready_tokens <= num_held_tokens <= num_cached_tokens <= num_tokens, where
    the first three are whole blocks, and num_reused_tokens <= num_computed_tokens <= num_tokens.
    Everything here happens on the event loop.
    """

    def __init__(self, pool: BlockPool, prompt: Prompt, reservation: Reservation) -> None:
        self.prompt = prompt
        self.block_table = list(reservation.block_table)
        self.owed = reservation
        self.num_ready_tokens = _num_leading(reservation.tiers, PoolTier.DEVICE) * BLOCK_TOKENS
        self.num_held_tokens = len(reservation.tiers) * BLOCK_TOKENS
        self.num_computed_tokens = 0
        self.fetch_seconds = 0.0
        self._pool = pool
        self._tiers: list[PoolTier | CacheTier] = []
        self._num_committed = 0
        self._offered: list[tuple[SequenceInEngine, int]] = []
        self._released = False
        self._found(reservation.tiers)

    @property
    def num_cached_tokens(self) -> int:
        """Tokens whose latents were found, in whichever tier: nobody writes these again."""
        return len(self._tiers) * BLOCK_TOKENS

    @property
    def num_reused_tokens(self) -> int:
        """Tokens that need not be computed (U1): never the last, whose logits are wanted."""
        return min(self.num_cached_tokens, self.prompt.num_tokens - 1)

    @property
    def num_uncomputed_tokens(self) -> int:
        """Prompt tokens that are still to be computed."""
        return self.prompt.num_tokens - self.num_computed_tokens

    def landed(self, block_index: int, tier: CacheTier) -> None:
        """A block was fetched whole: `block_index` counts from the prompt's start."""
        self._tiers.append(tier)
        self.commit(to=(block_index + 1) * BLOCK_TOKENS)
        self.num_computed_tokens = self.num_reused_tokens

    def adopt(self, reservation: Reservation) -> None:
        """The pool holds what follows the cached start: its blocks take the fresh ones' places."""
        start = self.num_cached_tokens // BLOCK_TOKENS
        places = slice(start, start + len(reservation.block_table))
        fresh, self.block_table[places] = self.block_table[places], reservation.block_table
        self._pool.release(fresh)
        self.owed = reservation
        self._found(reservation.tiers)

    def commit(self, *, to: int) -> None:
        """Latents up to position `to` came from elsewhere and are final: full blocks get names."""
        self.num_computed_tokens = to
        for block_hash in self.prompt.hashes[self._num_committed : to // BLOCK_TOKENS]:
            block = self.block_table[self._num_committed]
            self._pool.commit(block, block_hash, self.prompt.root)
            self._num_committed += 1

    def computed(self, *, to: int) -> None:
        """The engine has computed up to position `to`."""
        self.num_computed_tokens = to

    def submitted(self, seq: SequenceInEngine) -> None:
        """The table is the engine's from now until the last output of `seq` and its forks."""
        num_shared = seq.num_prompt_tokens // BLOCK_TOKENS
        self._offered = [(seq, seq.num_committed), *((fork, num_shared) for fork in seq.forks)]

    def newly_committed(self) -> list[bytes]:
        """Hashes of blocks that the engine has computed and committed since the last call."""
        hashes: list[bytes] = []
        for index, (seq, num_offered) in enumerate(self._offered):
            num_committed = max(seq.num_committed, num_offered)
            hashes += seq.block_hashes[num_offered:num_committed]
            self._offered[index] = (seq, num_committed)
        return hashes

    def ended(self, seq: SequenceInEngine) -> None:
        """One of the sequences has had its last output: others may need its blocks at once."""
        self._pool.release(seq.block_table)
        seq.block_table.clear()

    def release(self) -> None:
        """Give every block back; safe to repeat. After `submitted`: once all sequences ended."""
        if self._released:
            return
        self._released = True
        self._pool.cancel(self.owed)
        if not self._offered:
            self._pool.release(self.block_table)
        for seq, _ in self._offered:
            self._pool.release(seq.block_table)

    def usage(self, site: "PrefillSite.ValueType", worker_id: str) -> PromptUsage:
        """The prompt's split by U1, once it is computed."""
        reused = {tier: count * BLOCK_TOKENS for tier, count in Counter(self._tiers).items()}
        if self._tiers:
            reused[self._tiers[-1]] -= self.num_cached_tokens - self.num_reused_tokens
        return PromptUsage(
            prompt_tokens=self.prompt.num_tokens,
            computed_tokens=self.prompt.num_tokens - self.num_reused_tokens,
            reused_device_tokens=reused.get(PoolTier.DEVICE, 0),
            reused_host_tokens=reused.get(PoolTier.HOST, 0),
            reused_cache_ram_tokens=reused.get(CacheTier.RAM, 0),
            reused_cache_disk_tokens=reused.get(CacheTier.DISK, 0),
            reused_peer_tokens=reused.get(CacheTier.PEER, 0),
            prefill_site=site,
            prefill_worker_id=worker_id,
        )

    def _found(self, tiers: Sequence[PoolTier]) -> None:
        """The pool holds so many more blocks, committed already or as soon as they are settled."""
        self._tiers += tiers
        self._num_committed += len(tiers)
        self.num_computed_tokens = self.num_reused_tokens


class PromptReuse:
    """Finds blocks for prompts: in the pool, in the cache, at other workers, or fresh ones."""

    def __init__(
        self,
        engine: Engine,
        *,
        model: str,
        worker_id: str,
        fetcher: BlockFetcher,
        storer: BlockStorer | None,
    ) -> None:
        self._pool = engine.pool
        self._layout = engine.layout
        self._vocab_size = engine.model_config.vocab_size
        self._fingerprint = engine.layout.fingerprint()
        self._model = model
        self._worker_id = worker_id
        self._fetcher = fetcher
        self.policy = fetcher.policy
        self._storer = storer

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
        return Prompt(
            token_ids,
            root,
            tuple(chain_hashes(root, token_ids)),
            namespace,
            peers=tuple(peer for peer in task.peers if peer.worker_id != self._worker_id),
            scored=task.sampling.HasField("prompt_logprobs"),
        )

    def reusable(self, prompt: Prompt) -> tuple[bytes, ...]:
        """Hashes of blocks that may be reused: the full ones.

        None of a prompt whose own tokens are scored: all of its logits are wanted.
        """
        return () if prompt.scored else prompt.hashes

    def take(self, prompt: Prompt, hashes: Sequence[bytes], *, num_positions: int) -> PromptBlocks:
        """Claim the held start of `hashes` and allocate the rest up to `num_positions`.

        Raises PoolExhausted with nothing taken. Nothing but the first num_ready_tokens may be
        touched before `settle` or `fetch`.
        """
        num_blocks = max(-(-num_positions // BLOCK_TOKENS), len(hashes))
        return PromptBlocks(self._pool, prompt, self._pool.reserve(hashes, num_blocks))

    async def settle(self, blocks: PromptBlocks) -> None:
        """Move the bytes that taking the blocks has left due: to and from host memory."""
        if not blocks.owed.settled:
            await in_thread(self._pool.settle, blocks.owed)

    async def fetch(self, blocks: PromptBlocks) -> None:
        """Settle, then fill blocks after the held ones from elsewhere, where that is quicker.

        Where the pool holds what follows the fetched, it goes on from there. Whatever does not
        come is left to be computed; that is no error.
        """
        started = time.perf_counter()
        try:
            await self.settle(blocks)
            while await self._fetch_next(blocks) and await self._claim_next(blocks):
                pass
        finally:
            blocks.fetch_seconds = time.perf_counter() - started

    async def _fetch_next(self, blocks: PromptBlocks) -> bool:
        first = blocks.num_cached_tokens // BLOCK_TOKENS
        rest = self.reusable(blocks.prompt)[first:]
        wanted = rest[: self._pool.gap(rest)]
        if not wanted:
            return False

        async def land(index: int, payload: bytes, tier: CacheTier) -> None:
            await in_thread(self._write, blocks.block_table[first + index], payload)
            blocks.landed(first + index, tier)

        prompt = blocks.prompt
        return bool(await self._fetcher.fetch(prompt.namespace, wanted, land, peers=prompt.peers))

    async def _claim_next(self, blocks: PromptBlocks) -> bool:
        held = blocks.num_cached_tokens // BLOCK_TOKENS
        reservation = self._pool.reserve_held(self.reusable(blocks.prompt)[held:])
        if not reservation.block_table:
            return False
        blocks.adopt(reservation)
        await self.settle(blocks)
        return True

    def computed(self, blocks: PromptBlocks, *, to: int) -> None:
        """Positions up to `to` are computed, and may be offered once the step is over."""
        blocks.computed(to=to)
        self.offer(blocks)

    def offer(self, blocks: PromptBlocks) -> None:
        """Offer the cache what the engine has committed, prompt and generated."""
        hashes = blocks.newly_committed()
        if hashes and self._storer is not None:
            self._storer.offer(blocks.prompt.namespace, hashes)

    def _write(self, block_id: int, payload: bytes) -> None:
        shape = (self._layout.num_layers, BLOCK_TOKENS, self._layout.latent_dim)
        values = from_bytes(payload, self._pool.latents.dtype).view(shape)
        self._pool.write_block(block_id, values)


class Backlog:
    """Prompts in prefill on this worker, for other workers and in place alike."""

    def __init__(self, max_queued_tokens: int, policy: FetchOrRecompute) -> None:
        self._max_queued_tokens = max_queued_tokens
        self._policy = policy
        self._prompts: set[PromptBlocks] = set()

    def __len__(self) -> int:
        return len(self._prompts)

    @property
    def num_tokens(self) -> int:
        """Prompt tokens admitted and not yet computed, reused ones excluded."""
        # The copy lets the metrics thread read while the event loop adds and removes.
        return sum(blocks.num_uncomputed_tokens for blocks in tuple(self._prompts))

    @property
    def num_attention_pairs(self) -> int:
        """(query, key) pairs of these: each token attends to itself and to all before it."""
        lengths = [
            (blocks.prompt.num_tokens, blocks.num_computed_tokens)
            for blocks in tuple(self._prompts)
        ]
        return sum((end * (end + 1) - done * (done + 1)) // 2 for end, done in lengths)

    def has_room(self, num_tokens: int) -> bool:
        """Whether a prompt with so many uncached tokens is admitted; an idle worker takes any."""
        queued = self.num_tokens
        return queued == 0 or queued + num_tokens <= self._max_queued_tokens

    def retry_after_s(self) -> float:
        """A guess at when there will be room: the time that half of the backlog takes."""
        compute_s = self._policy.compute_s(self.num_tokens / BLOCK_TOKENS)
        return 0.2 if math.isinf(compute_s) else min(max(compute_s / 2, 0.05), 5.0)

    def add(self, blocks: PromptBlocks) -> None:
        """A prompt was admitted."""
        self._prompts.add(blocks)

    def discard(self, blocks: PromptBlocks, *, busy_seconds: float) -> None:
        """It is computed, or was stopped, after `busy_seconds` of compute; safe to repeat."""
        if blocks not in self._prompts:
            return
        self._prompts.remove(blocks)
        num_tokens = blocks.num_computed_tokens - blocks.num_reused_tokens
        if busy_seconds > 0 and num_tokens > 0:
            self._policy.computed(num_tokens / BLOCK_TOKENS, busy_seconds)


def _num_leading(tiers: Sequence[PoolTier], tier: PoolTier) -> int:
    return len(list(takewhile(lambda each: each is tier, tiers)))
