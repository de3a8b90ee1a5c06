"""SGLang's tuned tiles of its fused MoE, in files as SGLang itself reads and names them.

A file has for each number of tokens that was tuned the tile of both products; SGLang takes the
nearest number's. It publishes none for DeepSeek-V3's experts at their full width on one GPU.
"""

import json
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path

FOLDER = Path(__file__).with_name("sglang_configs")
Tile = Mapping[str, int]


def _tile(rows: int, columns: int, group: int, stages: int) -> Tile:
    """The depth of a step is a scale's block; few tokens like groups of one row tile."""
    return {
        "BLOCK_SIZE_M": rows,
        "BLOCK_SIZE_N": columns,
        "BLOCK_SIZE_K": 128,
        "GROUP_SIZE_M": group,
        "num_warps": 4,
        "num_stages": stages,
    }


# What SGLang's tuned configurations for E=256/257 on H100 and H200 are made of.
TILES = tuple(
    _tile(*each)
    for each in (
        *product((16,), (64, 128), (1, 16), (3, 4, 5)),
        *product((32, 64), (128,), (1, 16), (3, 4)),
    )
)
# Those of which a run without a tuned file takes the fastest: each is compiled in it.
USUAL = tuple(
    _tile(*each)
    for each in (
        (16, 128, 1, 4),
        (16, 64, 1, 5),
        (16, 128, 16, 3),
        (32, 128, 16, 4),
        (64, 128, 16, 3),
        (64, 128, 1, 4),
    )
)


def path_of(num_experts: int, width: int, device: str, folder: Path = FOLDER) -> Path:
    """As SGLang names it; `width` is an expert's, on one GPU."""
    device = device.replace(" ", "_")
    return folder / (
        f"E={num_experts},N={width},device_name={device},dtype=fp8_w8a8,block_shape=[128, 128].json"
    )


def tile_for(path: Path, num_tokens: int) -> Tile | None:
    """The tile of the nearest number of tokens; None if there is no such file."""
    if not path.exists():
        return None
    tuned: dict[str, Tile] = json.loads(path.read_text(encoding="utf-8"))
    return tuned[min(tuned, key=lambda each: abs(int(each) - num_tokens))]


def tune(
    num_tokens: int, time_us: Callable[[int, Tile], float]
) -> tuple[Tile | None, list[dict[str, object]]]:
    """The fastest tile for so many tokens, if any runs; what each took in us, or why it did not."""
    arms: list[dict[str, object]] = []
    times: dict[int, float] = {}
    for at, tile in enumerate(TILES):
        try:
            times[at] = time_us(num_tokens, tile)
            arms.append({"tile": tile, "us": round(times[at], 3)})
        except Exception as error:  # whatever their code raises is a finding
            arms.append({"tile": tile, "dropped": repr(error)[:300]})
    return TILES[min(times, key=times.__getitem__)] if times else None, arms


def write(path: Path, tuned: Mapping[str, Tile]) -> None:
    """By number of tokens."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(tuned, indent=4) + "\n", encoding="utf-8")
