"""Tiles of decode attention by what the host knows: rows, batch, the device. None is timed yet."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import triton

from tidemill.kernels.device import H100, DeviceClass, device_class, num_sms

_MOST_MERGED = 8192  # fp32 values that a merging program holds: 64 registers a thread


@dataclass(frozen=True)
class Tile:
    """How a program attends: `rows` query rows at once, on wgmma's N side where `swap`."""

    rows: int
    swap: bool
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class MergeTile:
    """How a program merges: `rows` rows of `segments` segments at once, `columns` wide."""

    segments: int
    rows: int
    columns: int


# Four warps: with eight, both warpgroups would compute the same scores.
NARROW = Tile(16, swap=True, num_warps=4, num_stages=2)
MIDDLE = Tile(32, swap=True, num_warps=8, num_stages=2)
WIDE = Tile(64, swap=False, num_warps=8, num_stages=2)
# The wider ones keep to their registers under Triton 3.6, the target's; 3.9 spills 72 and 336
# bytes a thread.
_FITS_WIDE = tuple(map(int, triton.__version__.split(".")[:2])) <= (3, 6)


# Narrowest first; a class that is not here takes an H100's.
TILES: Mapping[DeviceClass, tuple[Tile, ...]] = {
    H100: (NARROW, MIDDLE, WIDE) if _FITS_WIDE else (NARROW,),
}


def tile_of(num_rows: int, device: torch.device) -> Tile:
    """The narrowest tile that holds all of a sequence's rows, else the widest there is."""
    tiles = TILES.get(device_class(device), TILES[H100])
    return next((tile for tile in tiles if tile.rows >= num_rows), tiles[-1])


def num_parts(device: torch.device, num_tiles: int) -> int:
    """Parts that run at once beside each other: a program fills a multiprocessor's memory."""
    return max(1, num_sms(device) // num_tiles)


def sequences_held(num_sequences: int) -> int:
    """Room for the batch's lengths in every program: few sizes, since each is compiled."""
    power: int = triton.next_power_of_2(num_sequences)
    return max(256, power)


def merge_tile_of(parts: int, num_sequences: int, width: int) -> MergeTile:
    """By how many segments a sequence has on average."""
    return _merge_tile(triton.next_power_of_2(min(31, parts // num_sequences) + 1), width)


def merge_tiles(width: int) -> list[MergeTile]:
    """Every tile that `merge_tile_of` may choose for rows of this width."""
    return [_merge_tile(segments, width) for segments in (1, 2, 4, 8, 16, 32)]


def _merge_tile(segments: int, width: int) -> MergeTile:
    rows = max(1, 16 // segments)
    columns = min(width, _MOST_MERGED // (segments * rows))
    return MergeTile(segments, rows, columns)
