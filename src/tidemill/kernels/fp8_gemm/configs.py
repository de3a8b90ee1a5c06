"""Tiles of dense block-scaled products, by device class and number of rows."""

from dataclasses import dataclass

from tidemill.kernels.tiles import tables_of


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


TILES = tables_of("fp8_gemm", Tile)
