"""Blocks of a chain as they were found and taken, and the bytes that are still to be moved."""

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple


class PoolTier(enum.Enum):
    """Where in a worker a block lay when it was claimed; the values name PromptUsage's fields."""

    DEVICE = "device"
    HOST = "host"


OnChange = Callable[[PoolTier, bytes, bool], None]
"""Told of a block by its tier and hash when it becomes findable there (True), or ceases to be.

Called on any thread, under the pool's lock: in order, and not to call the pool.
"""


class Found(NamedTuple):
    """A held block: its place on the device, or None where only the host tier holds it."""

    block_hash: bytes
    block: int | None

    @property
    def tier(self) -> PoolTier:
        """Where it lies."""
        return PoolTier.HOST if self.block is None else PoolTier.DEVICE


class Move(NamedTuple):
    """A copy between a device block and a host slot, and the block's name."""

    block: int
    slot: int
    block_hash: bytes
    root: bytes


@dataclass
class Reservation:
    """Blocks taken for one chain, each referenced once; their bytes are due until `settle`.

    `cancel` one that is not to be settled, and `release` its blocks in either case. `tiers` says
    where the claimed start of the chain lay. `fresh` blocks will be zeroed. `demoted` and
    `promoted` are copies between device and host that are still to be made.
    """

    block_table: list[int]
    tiers: list[PoolTier]
    fresh: list[int]
    demoted: list[Move] = field(default_factory=list)
    promoted: list[Move] = field(default_factory=list)

    @property
    def settled(self) -> bool:
        """Whether nothing is due."""
        return not (self.fresh or self.demoted or self.promoted)
