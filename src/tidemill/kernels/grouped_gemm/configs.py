"""Tiles of the experts' products, by the operands' size, device class and rows of an expert."""

from collections.abc import Mapping

from tidemill.kernels.device import DeviceClass
from tidemill.kernels.fp8_gemm.configs import Tile
from tidemill.kernels.tiles import Classes, tables_of

# Bytes of an operand's element -> device class -> most rows of an expert -> tile.
Tiles = Mapping[int, Mapping[DeviceClass, Classes[Tile]]]

_NAMES = {1: "fp8", 2: "bf16", 4: "fp32"}
GATE_UP_TILES: Tiles = {size: tables_of(f"gate_up_{name}", Tile) for size, name in _NAMES.items()}
DOWN_TILES: Tiles = {size: tables_of(f"down_{name}", Tile) for size, name in _NAMES.items()}
