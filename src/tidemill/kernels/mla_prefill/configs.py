"""Tiles of prefill attention, by device class and new rows a prompt, on average."""

from dataclasses import dataclass

from tidemill.kernels.tiles import tables_of


@dataclass(frozen=True)
class Tile:
    """How a program attends: `rows` query rows, `keys` keys a step."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


TILES = tables_of("mla_prefill", Tile)
