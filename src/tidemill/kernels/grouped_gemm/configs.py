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
            (4, Tile(16, 128, 128, swap=True, tma=True, splits=0)),
            (16, Tile(32, 128, 128, swap=True, tma=True, splits=0)),
            # Two sums of 128 rows and the product between them take more registers than there are.
            (1 << 62, Tile(64, 128, 128, tma=True, warps=8, stages=4, per_sm=1, splits=0)),
        )
    },
    2: {
        H100: (
            (16, Tile(16, 128, 64, swap=True, tma=True, splits=0)),
            (48, Tile(64, 128, 64, tma=True, warps=8, stages=4, per_sm=1, splits=0)),
            (1 << 62, Tile(128, 128, 64, tma=True, warps=8, stages=4, per_sm=1, splits=0)),
        )
    },
    4: {H100: ((1 << 62, Tile(16, 32, 32)),)},
}

DOWN_TILES: Tiles = {
    1: {
        H100: (
            (4, Tile(16, 128, 128, pair=True, swap=True, tma=True, splits=0)),
            (16, Tile(32, 128, 128, pair=True, swap=True, tma=True, splits=0)),
            (64, Tile(64, 128, 128, pair=True, tma=True, warps=8, stages=4, per_sm=1, splits=0)),
            (1 << 62, Tile(128, 128, 128, tma=True, warps=8, stages=4, per_sm=1, splits=0)),
        )
    },
    2: {
        H100: (
            (16, Tile(16, 128, 64, pair=True, swap=True, tma=True, splits=0)),
            (48, Tile(64, 128, 64, pair=True, tma=True, warps=8, stages=4, per_sm=1, splits=0)),
            (
                1 << 62,
                Tile(128, 128, 64, pair=True, tma=True, warps=8, stages=4, per_sm=1, splits=0),
            ),
        )
    },
    4: {H100: ((1 << 62, Tile(16, 32, 32)),)},
}
