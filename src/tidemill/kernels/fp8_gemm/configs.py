"""Tiles of dense block-scaled products, by device class and number of rows."""

from dataclasses import dataclass

import triton

from tidemill.kernels.device import NUM_COUNTERS
from tidemill.kernels.tiles import fitting, tables_of

_FEWEST_STEPS = 4  # of a split: less is not worth the sum


@dataclass(frozen=True)
class Tile:
    """What one program computes, and how."""

    rows: int  # of activations
    columns: int  # rows of a weight tile
    depth: int  # of one step; 128 where operands are scaled
    pair: bool = False  # two weight tiles for one of activations
    swap: bool = False  # weights on the left, whose 64 rows the tensor cores always compute
    tma: bool = False  # weights come by the tensor memory accelerator
    row_group: int = 8  # row tiles that share a column's weight while it is in the L2 cache
    warps: int = 4
    stages: int = 3
    per_sm: int = 2  # programs of a persistent grid on one multiprocessor
    splits: int = 1  # of K; 0: as many as fill the device
    newest_triton: str = ""  # with newer ones it spills; empty: any


TILES = fitting(tables_of("fp8_gemm", Tile), triton.__version__)


def count_splits(tile: Tile, num_tiles: int, num_steps: int, sms: int) -> int:
    """Into how many parts K is split: what the tile says, or enough to give every SM its programs.

    A power of two, so that few kernels are compiled, and of at least four steps each. 1 where there
    are more tiles than counters: enough work for any device.
    """
    if num_tiles > NUM_COUNTERS:
        return 1
    if tile.splits:
        return tile.splits
    splits = 1
    while splits * 2 * num_tiles <= tile.per_sm * sms and num_steps >= splits * 2 * _FEWEST_STEPS:
        splits *= 2
    return splits
