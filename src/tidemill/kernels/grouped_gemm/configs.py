"""Tiles of the experts' products, by the operands' size, device class and rows of an expert.

Untimed: first choices, after vLLM's and SGLang's tuned ones for Hopper, within the registers and
shared memory that compiling for it reports. A layer of 256 experts waits for memory up to 11,000
tokens: few rows take what keeps most weight bytes in flight, many rows the largest tile.
"""

from tidemill.kernels.device import H100, DeviceClass
from tidemill.kernels.fp8_gemm.configs import Classes, Tile

# Bytes of an operand's element -> device class -> most rows of an expert -> tile.
Tiles = dict[int, dict[DeviceClass, Classes]]

GATE_UP_TILES: Tiles = {
    1: {
        H100: (
            (4, Tile(16, 128, 128, swap=True, stages=3, splits=0, tma=True)),
            (16, Tile(32, 128, 128, swap=True, stages=3, splits=0, tma=True)),
            (48, Tile(64, 128, 128, swap=True, warps=8, stages=4, per_sm=1, tma=True)),
            (1 << 62, Tile(64, 128, 128, warps=8, stages=3, per_sm=1, tma=True)),
        )
    },
    2: {
        H100: (
            (16, Tile(16, 128, 64, swap=True, stages=3, splits=0, tma=True)),
            (48, Tile(64, 128, 64, swap=True, warps=8, stages=4, per_sm=1, tma=True)),
            (1 << 62, Tile(128, 128, 64, warps=8, stages=4, per_sm=1, tma=True)),
        )
    },
    4: {H100: ((1 << 62, Tile(16, 32, 32)),)},
}

DOWN_TILES: Tiles = {
    1: {
        H100: (
            (4, Tile(16, 128, 128, pair=True, swap=True, stages=3, splits=0, tma=True)),
            (16, Tile(32, 128, 128, pair=True, swap=True, stages=3, splits=0, tma=True)),
            (48, Tile(64, 128, 128, pair=True, swap=True, warps=8, stages=4, per_sm=1, tma=True)),
            (1 << 62, Tile(128, 128, 128, warps=8, stages=4, per_sm=1, tma=True)),
        )
    },
    2: {
        H100: (
            (16, Tile(16, 128, 64, pair=True, swap=True, stages=3, splits=0, tma=True)),
            (48, Tile(64, 128, 64, pair=True, swap=True, warps=8, stages=4, per_sm=1, tma=True)),
            (1 << 62, Tile(128, 128, 64, pair=True, warps=8, stages=4, per_sm=1, tma=True)),
        )
    },
    4: {H100: ((1 << 62, Tile(16, 32, 32)),)},
}
