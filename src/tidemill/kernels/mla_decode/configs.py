"""Tiles of decode attention by what the host knows: rows, batch, the device."""

from dataclasses import dataclass

import torch
import triton

from tidemill.kernels.device import device_class, num_sms
from tidemill.kernels.tiles import choose_tile, tables_of

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


TILES = tables_of("mla_decode", Tile)


def tile_of(num_rows: int, device: torch.device) -> Tile:
    """The tile for so many rows of a sequence."""
    return choose_tile(TILES, device_class(device), num_rows)


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
