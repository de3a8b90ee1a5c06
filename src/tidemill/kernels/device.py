"""What tiles are chosen by: devices of one class share them, so that an H800 takes an H100's."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

NUM_COUNTERS = 65_536  # of tiles in one launch: more tiles than these are not split
_INTERPRETED_SMS = 3  # programs of a persistent grid in Triton's interpreter: more than one


@dataclass(frozen=True)
class DeviceClass:
    """Compute capability, multiprocessors, and memory bandwidth in whole TB/s."""

    capability: tuple[int, int]
    num_sms: int
    bandwidth: int


H100 = DeviceClass((9, 0), 132, 3)  # SXM5; an H800 too


@cache  # every launch asks
def device_class(device: torch.device) -> DeviceClass:
    """The class of a CUDA device; a CPU counts as an H100: what it interprets is meant for one."""
    if device.type != "cuda":
        return H100
    found = torch.cuda.get_device_properties(device)
    bytes_per_second = found.memory_clock_rate * 1000 * 2 * found.memory_bus_width // 8
    return DeviceClass(
        (found.major, found.minor), found.multi_processor_count, bytes_per_second // 10**12
    )


def num_sms(device: torch.device) -> int:
    """Multiprocessors that a persistent grid fills."""
    return device_class(device).num_sms if device.type == "cuda" else _INTERPRETED_SMS


@cache
def tile_counters(device: torch.device) -> Tensor:
    """[NUM_COUNTERS] int32: how many programs have done their part of a tile; 0 between launches.

    One for all launches on a device, kept for ever, as recorded CUDA graphs point at it. Launches
    that take it follow each other, as on one stream: two at once would count each other's parts.
    Its first use must not be within a capture, whose memory is the graph's own: `record_graph` runs
    what it records once before.
    """
    return torch.zeros(NUM_COUNTERS, dtype=torch.int32, device=device)
