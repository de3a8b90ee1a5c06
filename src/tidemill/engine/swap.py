"""Host memory for the latents of sequences that the device has no room for."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tidemill.errors import PoolCorrupted


@dataclass(eq=False)
class HostBlock:
    """One block's latents in host memory, held by `holders` swapped sequences."""

    slot: int
    holders: int


class SwapSpace:
    """A bounded store of whole blocks; what comes back is bitwise what went in.

    It costs memory only as far as it was ever filled. One slot beyond `num_blocks` is kept for
    exchanging a block with the device when both are full. The engine's lock guards it.
    """

    def __init__(self, num_blocks: int, latents: Tensor) -> None:
        """For blocks of `latents` [L, blocks, 64, D], a pool's."""
        layers, _, tokens, width = latents.shape
        self.num_blocks = num_blocks
        self._values = torch.empty(num_blocks + 1, layers, tokens, width, dtype=latents.dtype)
        self._free = list(range(num_blocks, -1, -1))

    @property
    def num_used(self) -> int:
        """Blocks held."""
        return self.num_blocks + 1 - len(self._free)

    @property
    def num_free(self) -> int:
        """Blocks that there is room for, the spare slot aside."""
        return max(len(self._free) - 1, 0)

    def has_room(self, *, exchange: bool = False) -> bool:
        """Whether `put` may be called; `exchange`: another block leaves right after."""
        return len(self._free) > (0 if exchange else 1)

    def put(self, values: Tensor, *, holders: int) -> HostBlock:
        """Copy a block [L, 64, D]."""
        slot = self._free.pop()
        self._values[slot].copy_(values)
        return HostBlock(slot, holders)

    def read(self, block: HostBlock) -> Tensor:
        """The block's values [L, 64, D], valid until it is freed."""
        return self._values[block.slot]

    def free(self, block: HostBlock) -> None:
        """One holder needs it no more."""
        block.holders -= 1
        if block.holders < 0:
            raise PoolCorrupted(f"host slot {block.slot} is freed more often than held")
        if block.holders == 0:
            self._free.append(block.slot)

    def check_integrity(self) -> None:
        """Raise PoolCorrupted if a slot is free twice."""
        if len(set(self._free)) != len(self._free):
            raise PoolCorrupted("a host slot is free twice")
