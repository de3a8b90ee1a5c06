"""Tiles of the experts' products, by the operands' size, device class and rows of an expert."""

from collections.abc import Mapping
from dataclasses import replace

import torch
import triton
from torch import Tensor

from tidemill.kernels.device import DeviceClass, device_class, num_sms
from tidemill.kernels.fp8_gemm.configs import Tile, count_splits
from tidemill.kernels.tiles import Classes, choose_tile, fitting, tables_of

# Bytes of an operand's element -> device class -> most rows of an expert -> tile.
Tiles = Mapping[int, Mapping[DeviceClass, Classes[Tile]]]

_NAMES = {1: "fp8", 2: "bf16", 4: "fp32"}
ALL_GATE_UP_TILES: Tiles = {
    size: tables_of(f"gate_up_{name}", Tile) for size, name in _NAMES.items()
}
ALL_DOWN_TILES: Tiles = {size: tables_of(f"down_{name}", Tile) for size, name in _NAMES.items()}


def _fitting(tables: Tiles) -> Tiles:
    return {size: fitting(found, triton.__version__) for size, found in tables.items()}


GATE_UP_TILES = _fitting(ALL_GATE_UP_TILES)
DOWN_TILES = _fitting(ALL_DOWN_TILES)


def tile_for(table: Tiles, values: Tensor, num_experts: int, num_places: int, width: int) -> Tile:
    """By the rows that an expert has if those that can have any share them alike.

    A tile that cannot split K gives way to a smaller one where the device is not half full of it.
    """
    per_expert = num_places // max(1, min(num_experts, num_places))
    depth, size, device = values.shape[1], values.dtype.itemsize, values.device
    tile = choose_tile(table[size], device_class(device), per_expert)
    wanted = splits_for(
        replace(tile, splits=0), num_experts, num_places, width=width, depth=depth, device=device
    )
    if tile.splits == 1 and wanted > 1:
        tile = choose_tile(table[size], device_class(device), tile.rows)
    # The accelerator steps from row to row in units of 16 bytes; operands have the same depth.
    return tile if depth * size % 16 == 0 else replace(tile, tma=False)


def splits_for(
    tile: Tile,
    num_experts: int,
    num_places: int,
    *,
    width: int,
    depth: int,
    device: torch.device,
) -> int:
    """Into how many parts the tile splits K."""
    tiles = most_row_tiles(tile, num_experts, num_places) * column_tiles(tile, width)
    return count_splits(tile, tiles, -(-depth // tile.depth), num_sms(device))


def column_tiles(tile: Tile, width: int) -> int:
    """How many of the tile lie beside each other."""
    return -(-width // (tile.columns * (2 if tile.pair else 1)))


def most_row_tiles(tile: Tile, num_experts: int, num_places: int) -> int:
    """However the places are shared out, there are no more."""
    return (num_places + min(num_experts, num_places) * (tile.rows - 1)) // tile.rows


def experts_held(tile: Tile, num_experts: int) -> int:
    """Room for every expert's count in each program.

    A tile of 128 rows has at least 64, though a shared expert is one: with less, gate and up spill
    under Triton 3.6, the GPU's.
    """
    power: int = triton.next_power_of_2(num_experts)
    return max(64, power) if tile.rows >= 128 else power
