"""What tiles are chosen by: devices of one class share them, so that an H800 takes an H100's."""

from dataclasses import dataclass
from functools import cache

import torch

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
