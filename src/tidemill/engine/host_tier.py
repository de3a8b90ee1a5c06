"""Blocks in host memory: where the device pool's evicted blocks go before they are lost."""

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor

from tidemill.blocks import BLOCK_TOKENS
from tidemill.engine.reservation import OnChange, PoolTier
from tidemill.errors import PoolCorrupted


@dataclass
class _Slot:
    index: int
    root: bytes
    num_pins: int = 0


class HostTier:
    """A bounded LRU of committed blocks by chain hash, each a slot of `latents`.

    A slot is free, being filled (between `reserve` and `keep`), or findable; a findable one is
    pinned by whoever reads it, or may be evicted, least recently used first. The books belong to
    the owner's lock, the bytes of reserved and pinned slots may be touched outside of it.
    `latents` is [num_blocks, num_layers, 64, latent_dim]; it costs memory only as far as it has
    been filled. `on_change` hears of each block that becomes or ceases to be findable.
    """

    def __init__(
        self, *, num_blocks: int, num_layers: int, latent_dim: int, dtype: torch.dtype
    ) -> None:
        self.num_blocks = num_blocks
        self.latents: Tensor = torch.empty(
            num_blocks, num_layers, BLOCK_TOKENS, latent_dim, dtype=dtype
        )
        self._free = list(range(num_blocks - 1, -1, -1))
        self._filling: set[int] = set()
        self._slots: dict[bytes, _Slot] = {}
        self._evictable: OrderedDict[bytes, None] = OrderedDict()
        self.on_change: OnChange | None = None

    def __len__(self) -> int:
        """Findable blocks."""
        return len(self._slots)

    def __contains__(self, block_hash: bytes) -> bool:
        return block_hash in self._slots

    @property
    def num_busy(self) -> int:
        """Slots that are being filled or read; none when nothing is under way."""
        return self.num_blocks - len(self._free) - len(self._evictable)

    @property
    def num_free(self) -> int:
        """Slots that `reserve` could hand out now, evictable ones included."""
        return len(self._free) + len(self._evictable)

    def reserve(self) -> int | None:
        """A slot to fill, the least recently used one if none is free; None if all are busy."""
        if not self._free and self._evictable:
            block_hash, _ = self._evictable.popitem(last=False)
            self._free.append(self._slots.pop(block_hash).index)
            if self.on_change is not None:
                self.on_change(PoolTier.HOST, block_hash, False)
        if not self._free:
            return None
        index = self._free.pop()
        self._filling.add(index)
        return index

    def keep(self, index: int, block_hash: bytes, root: bytes) -> None:
        """The reserved slot is filled: findable now, unless another slot holds the same block."""
        self._filling.remove(index)
        if block_hash in self._slots:
            self._free.append(index)
            return
        self._slots[block_hash] = _Slot(index, root)
        self._evictable[block_hash] = None
        if self.on_change is not None:
            self.on_change(PoolTier.HOST, block_hash, True)

    def drop(self, index: int) -> None:
        """The reserved slot will not be filled."""
        self._filling.remove(index)
        self._free.append(index)

    def pin(self, block_hash: bytes) -> int:
        """Hold a findable block's slot against eviction and reuse, until `unpin`; returns it."""
        slot = self._slots[block_hash]
        slot.num_pins += 1
        self._evictable.pop(block_hash, None)
        return slot.index

    def unpin(self, block_hash: bytes) -> None:
        """Let go of a pin; the block is now the most recently used one."""
        slot = self._slots[block_hash]
        if slot.num_pins == 0:
            raise PoolCorrupted("a host block is unpinned but not pinned")
        slot.num_pins -= 1
        if slot.num_pins == 0:
            self._evictable[block_hash] = None

    def touch(self, block_hash: bytes) -> None:
        """Make a findable block the most recently used one."""
        if block_hash in self._evictable:
            self._evictable.move_to_end(block_hash)

    def hashes(self) -> list[bytes]:
        """Names of the findable blocks, in the order in which they came."""
        return list(self._slots)

    def where(self, block_hash: bytes) -> tuple[int, bytes]:
        """A findable block's slot, and the root of its chain."""
        slot = self._slots[block_hash]
        return slot.index, slot.root

    def check_integrity(self) -> None:
        """Raise PoolCorrupted unless every slot is in exactly one state."""
        held = [slot.index for slot in self._slots.values()]
        if sorted([*self._free, *self._filling, *held]) != list(range(self.num_blocks)):
            raise PoolCorrupted("a host slot is lost or in two states")
        unpinned = {key for key, slot in self._slots.items() if slot.num_pins == 0}
        if unpinned != set(self._evictable):
            raise PoolCorrupted("the host tier's pins and its eviction order disagree")
