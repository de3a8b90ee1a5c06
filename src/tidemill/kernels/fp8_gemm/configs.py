"""Tiles of dense block-scaled products, by device class and number of rows.

Untimed: first choices, after DeepGEMM's and vLLM's published ones for Hopper.
"""

from dataclasses import dataclass

from tidemill.kernels.device import H100, DeviceClass


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


# Most rows -> tile, in ascending order; the last serves all above.
Classes = tuple[tuple[int, Tile], ...]

TILES: dict[DeviceClass, Classes] = {
    H100: (
        (16, Tile(16, 64, 128, swap=True, stages=6, splits=0, tma=True)),
        (32, Tile(32, 64, 128, swap=True, stages=6, splits=0, tma=True)),
        (64, Tile(64, 64, 128, swap=True, stages=5, splits=0, tma=True)),
        (128, Tile(64, 128, 128, stages=4, splits=0, tma=True)),
        (1 << 62, Tile(128, 128, 128, warps=8, stages=4, tma=True)),
    ),
}


def choose_tile(tiles: dict[DeviceClass, Classes], device: DeviceClass, num_rows: int) -> Tile:
    """The tile for num_rows rows; a device that nobody timed takes an H100's."""
    classes = tiles.get(device, tiles[H100])
    return next(tile for most_rows, tile in classes if num_rows <= most_rows)
