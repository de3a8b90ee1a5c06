"""How a kernel is timed on a GPU, and what a row of results says.

A benchmark file of this folder has `works() -> Iterable[Work]`; `benchmarks.kernels.run` runs them.
A call is captured in a CUDA graph many times over, on several sets of inputs in turn that together
do not fit the L2 cache, and the graph is replayed between two events: no launch cost of the host,
no input that the call before has left in the cache. Percentages are of what this very device copied
and multiplied a moment before; the datasheet's are beside them.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Call = Callable[[], object]
Build = Callable[[int], Call]  # seed -> one call on inputs of its own, made from the seed alone

MAX_SETS = 32  # tiny inputs would need thousands to leave the cache, where they lie in use as well
GRAPH_US = 3000.0  # of work in one graph, about: events are then exact to a thousandth
REPLAYS = 15
COPIED_WORDS = 1 << 28  # of 4 bytes, each read and written
CEILING_SIZE = 8192  # M, N and K of the products

# NVIDIA's datasheets: GB/s, and dense TFLOPS in bf16 and fp8.
DATASHEETS = {"H100": (3350.0, 989.0, 1979.0), "H200": (4800.0, 989.0, 1979.0)}


@dataclass(frozen=True)
class Work:
    """One thing to time. A peer gets the same seeds, so its first result is compared with ours."""

    case: str
    build: Build
    num_bytes: int  # that must move at the least: inputs read once, outputs written once
    flops: int = 0
    matmul: Literal["bf16", "fp8"] = "bf16"  # whose ceiling holds for the flops
    peers: Mapping[str, Build] = field(default_factory=dict)


@dataclass(frozen=True)
class Ceilings:
    """What this device reached just now: GB/s of a copy (read + written), TFLOPS of 8192^3."""

    copy: float
    bf16: float
    fp8: float

    def floor_us(self, work: Work) -> float:
        """No kernel does `work` in less."""
        tflops = self.bf16 if work.matmul == "bf16" else self.fp8
        return max(work.num_bytes / self.copy / 1e3, work.flops / tflops / 1e6)


def measure_ceilings() -> Ceilings:
    """Copy and multiply, on random data (zeros are faster than anything real)."""
    flops = 2 * CEILING_SIZE**3
    return Ceilings(
        copy=8 * COPIED_WORDS / time_us([_copy()])[0] / 1e3,
        bf16=flops / time_us([_multiply_bf16()])[0] / 1e6,
        fp8=flops / time_us([_multiply_fp8()])[0] / 1e6,
    )


def datasheet(device: str) -> Ceilings:
    """What NVIDIA says of it, of an H100 where it says nothing here."""
    return Ceilings(*DATASHEETS[next((name for name in DATASHEETS if name in device), "H100")])


def _copy() -> Call:
    source = torch.randint(-(2**31), 2**31 - 1, (COPIED_WORDS,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _multiply_bf16() -> Call:
    a, b = (torch.randn(CEILING_SIZE, CEILING_SIZE, device="cuda").bfloat16() for _ in range(2))
    return lambda: a @ b


def _multiply_fp8() -> Call:
    a, b = (
        torch.randn(CEILING_SIZE, CEILING_SIZE, device="cuda").to(torch.float8_e4m3fn)
        for _ in range(2)
    )
    one = torch.ones((), device="cuda")
    return lambda: torch._scaled_mm(a, b.T, one, one, out_dtype=torch.bfloat16)


def num_sets(num_bytes: int, l2_bytes: int) -> int:
    """Sets of inputs to go through in turn: three times the cache, at least two."""
    return min(MAX_SETS, max(2, math.ceil(3 * l2_bytes / max(num_bytes, 1))))


def time_us(calls: Sequence[Call]) -> tuple[float, float]:
    """Median and least time of one call, in us, going through `calls` in turn."""
    torch.cuda.synchronize()  # inputs are made on another stream
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch's own lacks types
    with torch.cuda.stream(stream):  # compiles, and settles what a capture may not do
        for call in calls:
            call()
        begin, end = _event(), _event()
        begin.record()
        for call in calls:
            call()
        end.record()
    torch.cuda.synchronize()
    rounds = min(100, max(1, round(GRAPH_US / (begin.elapsed_time(end) * 1e3))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / rounds / len(calls))
    return statistics.median(times), min(times)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # as above


def time_ours(work: Work, ceilings: Ceilings) -> dict[str, Any]:
    """The row of results, without peers yet."""
    median, least = timed(work.build, sets_of(work))
    row = figures(work, median, least, ceilings, torch.cuda.get_device_name())
    return row | {"peers": {}}


def sets_of(work: Work) -> int:
    """`num_sets` on this device."""
    return num_sets(work.num_bytes, torch.cuda.get_device_properties(0).L2_cache_size)


def timed(build: Build, sets: int) -> tuple[float, float]:
    """`time_us` on so many sets of inputs, which are gone afterwards."""
    calls = [build(seed) for seed in range(sets)]
    try:
        return time_us(calls)
    finally:
        calls.clear()
        torch.cuda.empty_cache()


def first_result(build: Build) -> Tensor | None:
    """What a call on the first inputs gives, where that is a tensor, or several and this first."""
    found = build(0)()
    if isinstance(found, tuple):
        found = found[0]
    return found.clone() if isinstance(found, Tensor) else None


def against(work: Work, build: Build, our_us: float) -> dict[str, Any]:
    """One peer's figures; where it cannot run here, why."""
    try:
        ours = first_result(work.build)
        theirs = first_result(build)
        median, least = timed(build, sets_of(work))
    except Exception as error:  # whatever others' code raises is a finding, and ours is timed
        return {"absent": f"{type(error).__name__}: {error}"[:300]}
    found: dict[str, Any] = {"us": round(median, 2), "us_least": round(least, 2)}
    found["ratio"] = round(median / our_us, 3)
    if ours is not None and theirs is not None and ours.shape == theirs.shape:
        found["difference"] = round(difference(ours, theirs), 5)
    return found


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference over the norm: 0.01 or so is bf16's, 1 is another function."""
    ours, theirs = ours.double(), theirs.double()
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30))


def figures(work: Work, us: float, least: float, ceilings: Ceilings, device: str) -> dict[str, Any]:
    """A row without peers. `of_floor`: the floor over the time; 1 is the most there is."""
    gbs, tflops = work.num_bytes / us / 1e3, work.flops / us / 1e6
    row: dict[str, Any] = {"case": work.case, "us": round(us, 2), "us_least": round(least, 2)}
    row |= {"gb_s": round(gbs, 1), "of_copy": round(gbs / ceilings.copy, 3)}
    matmul = ceilings.bf16 if work.matmul == "bf16" else ceilings.fp8
    if work.flops:
        row |= {"tflops": round(tflops, 1), "of_matmul": round(tflops / matmul, 3)}
    row["of_floor"] = round(ceilings.floor_us(work) / us, 3)
    sheet = next((each for name, each in DATASHEETS.items() if name in device), None)
    if sheet:
        row["of_datasheet_bandwidth"] = round(gbs / sheet[0], 3)
        if work.flops:
            peak = sheet[1] if work.matmul == "bf16" else sheet[2]
            row["of_datasheet_flops"] = round(tflops / peak, 3)
    return row


def line(op: str, row: Mapping[str, Any]) -> str:
    """The row for people: us, GB/s and TFLOPS with percent of the measured ceiling, peers."""
    if "refused" in row:
        return f"{op:16} {row['case']:28} {row['refused']}"
    text = f"{op:16} {row['case']:28} {row['us']:9.2f} us {row['gb_s']:6.0f} GB/s"
    text += f" {row['of_copy']:4.0%}"
    if "tflops" in row:
        text += f" {row['tflops']:6.1f} TF {row['of_matmul']:4.0%}"
    for name, peer in row["peers"].items():
        if "absent" in peer:
            text += f" | {name}: none"
            continue
        differs = " DIFFERS" if peer.get("difference", 0) > 0.1 else ""
        text += f" | {name} {peer['us']:.2f} us, {peer['ratio']:.2f}x{differs}"
    return text
