"""Paged latents of one worker and who holds which block. Thread-safe: one lock, short sections."""

import threading
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from tidemill.blocks import BLOCK_TOKENS
from tidemill.errors import PoolCorrupted, PoolExhausted


class BlockPool:
    """Blocks of 64 positions, all layers: free, referenced (by one or more), or evictable.

    A block whose content is final may be committed under its chain hash. Once nobody references
    it, a committed block stays findable, and is evicted, least recently used first, when
    `allocate` runs out of free ones. Releasing what one does not hold raises PoolCorrupted.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_blocks: int,
        latent_dim: int,
        dtype: torch.dtype,
        device: str = "cpu",
    ) -> None:
        self.num_blocks = num_blocks
        self.latents: Tensor = torch.zeros(
            num_layers, num_blocks, BLOCK_TOKENS, latent_dim, dtype=dtype, device=device
        )
        self._lock = threading.Lock()
        self._free = list(range(num_blocks - 1, -1, -1))
        self._references = [0] * num_blocks
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._evictable: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` could hand out now, evictable ones included."""
        with self._lock:
            return len(self._free) + len(self._evictable)

    @property
    def num_referenced(self) -> int:
        """Blocks that somebody holds."""
        with self._lock:
            return self.num_blocks - len(self._free) - len(self._evictable)

    def allocate(self, n: int) -> list[int]:
        """Take n blocks, each referenced once; PoolExhausted, with nothing taken, if too few.

        They come zeroed: nothing of an earlier owner, not even a NaN, outlives its release.
        """
        with self._lock:
            available = len(self._free) + len(self._evictable)
            if n > available:
                raise PoolExhausted(f"{n} blocks wanted, {available} of {self.num_blocks} free")
            while len(self._free) < n:
                self._evict_oldest()
            taken = [self._free.pop() for _ in range(n)]
            for block in taken:
                self._references[block] = 1
        self.latents[:, taken] = 0
        return taken

    def claim(self, hashes: Sequence[bytes]) -> list[int]:
        """Reference the longest committed prefix of the chain; returns its blocks, perhaps none."""
        with self._lock:
            claimed = self._prefix(hashes)
            for block in claimed:
                self._references[block] += 1
                self._evictable.pop(block, None)
            return claimed

    def match(self, hashes: Sequence[bytes]) -> int:
        """How many blocks `claim` would return."""
        with self._lock:
            return len(self._prefix(hashes))

    def release(self, block_ids: Sequence[int]) -> None:
        """Give up one reference to each block, in chain order: a chain's tail is evicted first."""
        with self._lock:
            for block in reversed(block_ids):
                if not 0 <= block < self.num_blocks or self._references[block] == 0:
                    raise PoolCorrupted(f"block {block} is released but not referenced")
                self._references[block] -= 1
                if self._references[block]:
                    continue
                if block in self._hash_of:
                    self._evictable[block] = None
                else:
                    self._free.append(block)

    def commit(self, block_id: int, block_hash: bytes) -> None:
        """Make a referenced block findable: its 64 positions are final and `block_hash` names them.

        A no-op if another block already holds that hash. The engine never commits; its caller does.
        """
        with self._lock:
            if self._references[block_id] == 0:
                raise PoolCorrupted(f"block {block_id} is committed but not referenced")
            held = self._hash_of.get(block_id)
            if held is not None and held != block_hash:
                raise PoolCorrupted(f"block {block_id} is committed under two hashes")
            if block_hash not in self._block_of:
                self._hash_of[block_id] = block_hash
                self._block_of[block_hash] = block_id

    def read(self, layer: int, block_table: Sequence[int], start: int, end: int) -> Tensor:
        """Copy of one layer's latents at positions [start, end): [end - start, latent_dim]."""
        rows = self._rows(block_table, start, end)
        return self.latents[layer].view(-1, self.latents.shape[-1]).index_select(0, rows)

    def write(self, layer: int, block_table: Sequence[int], start: int, values: Tensor) -> None:
        """Store values [n, latent_dim] at positions [start, start + n) of one layer."""
        rows = self._rows(block_table, start, start + len(values))
        self.latents[layer].view(-1, self.latents.shape[-1]).index_copy_(0, rows, values)

    def read_block(self, block_id: int) -> Tensor:
        """Copy of one block over all layers: [num_layers, 64, latent_dim]."""
        return self.latents[:, block_id].clone()

    def write_block(self, block_id: int, values: Tensor) -> None:
        """Store [num_layers, 64, latent_dim] into one block."""
        self.latents[:, block_id].copy_(values)

    def check_integrity(self) -> None:
        """Raise PoolCorrupted unless every block is in exactly one state and the index is sound."""
        with self._lock:
            free = set(self._free)
            if len(free) != len(self._free):
                raise PoolCorrupted("a block is free twice")
            for block in range(self.num_blocks):
                states = (
                    (block in free) + (block in self._evictable) + (self._references[block] > 0)
                )
                if states != 1 or self._references[block] < 0:
                    raise PoolCorrupted(
                        f"block {block} is in {states} states: free={block in free}, evictable="
                        f"{block in self._evictable}, references={self._references[block]}"
                    )
            for block in self._evictable:
                if block not in self._hash_of:
                    raise PoolCorrupted(f"block {block} is evictable but not committed")
            if any(block in self._hash_of for block in free):
                raise PoolCorrupted("a free block is still committed")
            if {block: key for key, block in self._block_of.items()} != self._hash_of:
                raise PoolCorrupted("the hash index and the blocks disagree")

    def _prefix(self, hashes: Sequence[bytes]) -> list[int]:
        found: list[int] = []
        for block_hash in hashes:
            block = self._block_of.get(block_hash)
            if block is None:
                break
            found.append(block)
        return found

    def _evict_oldest(self) -> None:
        block, _ = self._evictable.popitem(last=False)
        del self._block_of[self._hash_of.pop(block)]
        self._free.append(block)

    def _rows(self, block_table: Sequence[int], start: int, end: int) -> Tensor:
        positions = torch.arange(start, end)
        blocks = torch.tensor(block_table, dtype=torch.int64)
        rows = blocks[positions // BLOCK_TOKENS] * BLOCK_TOKENS + positions % BLOCK_TOKENS
        return rows.to(self.latents.device)
