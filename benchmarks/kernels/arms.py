"""What the tuner tries: for each table of tiles, arms about a tile, and the cases to time them on.

A case is of the sizes that a table's line serves: how many rows choose it is told as the launcher
counts them. Routed experts are DeepSeek-V3's in FP8 and DeepSeek-V2-Lite's in bf16.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels import fp8_gemm as dense
from benchmarks.kernels import mla_decode as decode
from benchmarks.kernels import mla_prefill as prefill
from benchmarks.kernels.grouped_gemm import some_weights, sorted_places
from tidemill.kernels.act_quant import Quantized, act_quant
from tidemill.kernels.act_quant.reference import dequantize
from tidemill.kernels.cases import GemmCase
from tidemill.kernels.fp8_gemm.configs import Tile as GemmTile
from tidemill.kernels.fp8_gemm.reference import fp8_gemm as dense_truth
from tidemill.kernels.grouped_gemm import reference as grouped_truth
from tidemill.kernels.mla_decode.configs import Tile as DecodeTile
from tidemill.kernels.mla_decode.reference import mla_decode as decode_truth
from tidemill.kernels.mla_prefill.configs import Tile as PrefillTile
from tidemill.kernels.mla_prefill.reference import mla_prefill_ragged as prefill_truth

Run = Callable[..., Any]  # an op; with tile=..., the kernel by that tile
Inputs = tuple[tuple[Any, ...], Mapping[str, Any]]  # its positional and its named arguments


@dataclass(frozen=True)
class Case:
    """One thing to time an arm on."""

    name: str
    rows: int  # by which the table chooses
    num_bytes: int  # that a call reads at the least: sets of inputs together exceed the cache
    inputs: Callable[[int], Inputs]  # of a seed
    kernel: Run
    truth: Run
    tolerance: float = 0.01  # of the worst row: norm of the difference over the norm


@dataclass(frozen=True)
class Subject:
    """A table that can be tuned."""

    table: str
    form: type
    cases: tuple[Case, ...]
    arms: Callable[[Any], Iterable[Any]]  # about a tile


def subjects() -> dict[str, Subject]:
    """By table, what matters most first: time may run out."""
    made = [
        _gate_up("gate_up_fp8", V3, (1, 8, 32, 64, 128, 256, 512, 4096, 8192)),
        _down("down_fp8", V3, (1, 8, 32, 64, 128, 256, 512, 2048, 4096, 8192)),
        _decode(),
        _dense(),
        _prefill(),
        _gate_up("gate_up_bf16", V2_LITE, (1, 8, 64, 256, 512, 4096)),
        _down("down_bf16", V2_LITE, (1, 8, 64, 256, 512, 4096)),
    ]
    return {subject.table: subject for subject in made}


def plain(result: Any) -> Tensor:
    """What an op gives, as a tensor to compare."""
    found: Tensor = dequantize(result, torch.float32) if isinstance(result, Quantized) else result
    return found


def about(tile: Any, choices: Mapping[str, tuple[Any, ...]]) -> list[Any]:
    """Tiles that differ from `tile` in one field."""
    return [
        replace(tile, **{name: value})
        for name, values in choices.items()
        for value in values
        if value != getattr(tile, name)
    ]


def all_of(tile: Any, choices: Mapping[str, tuple[Any, ...]]) -> list[Any]:
    """Every combination of the fields' values, else as `tile`; without `tile` itself."""
    made = [
        replace(tile, **dict(zip(choices, values, strict=True)))
        for values in product(*choices.values())
    ]
    return [each for each in made if each != tile]


def gemm_arms(tile: GemmTile, *, columns: tuple[int, ...], paired: bool) -> list[GemmTile]:
    """One step from the tile in each direction; the tensor cores want 64 rows on the left."""
    choices: dict[str, tuple[Any, ...]] = {
        "rows": (16, 32, 64) if tile.swap else (64, 128),
        "columns": columns,
        "stages": (2, 3, 4, 5, 6),
        "warps": (4, 8),
        "per_sm": (1, 2, 3),
        "splits": (0, 1, 2, 4, 8),
    }
    if not tile.swap:
        choices["row_group"] = (4, 8, 16)
    if paired:
        choices["pair"] = (False, True)
    if tile.rows == 64:
        choices["swap"] = (False, True)
    return about(tile, choices)


@dataclass(frozen=True)
class Layer:
    """Routed experts of a model, their weights made once for all cases of a subject."""

    num_experts: int
    top_k: int
    hidden: int
    width: int
    dtype: torch.dtype = torch.float8_e4m3fn
    device: str = "cuda"

    def rows(self, num_tokens: int) -> int:
        """Of an expert, as the launcher counts them."""
        places = num_tokens * self.top_k
        return places // min(self.num_experts, places)

    def num_bytes(self, num_tokens: int, columns: int, depth: int) -> int:
        active = min(self.num_experts, num_tokens * self.top_k)
        return active * columns * depth * self.dtype.itemsize

    def weights(self, columns: int, depth: int) -> tuple[Tensor, Tensor | None]:
        generator = self.generator(0)
        if self.dtype == torch.float8_e4m3fn:
            return some_weights(self.num_experts, columns, depth, generator)
        shape = self.num_experts, columns, depth
        weight = torch.empty(shape, dtype=self.dtype, device=self.device)
        return weight.normal_(std=depth**-0.5, generator=generator), None

    def rounded(self, x: Tensor) -> Tensor | Quantized:
        return act_quant(x) if self.dtype == torch.float8_e4m3fn else x.to(self.dtype)

    def routed(self, seed: int, num_tokens: int) -> tuple[Tensor, dict[str, Any]]:
        """Weights [T, K], and the order by expert."""
        scores = self.random(seed, num_tokens, self.num_experts)
        weights, ids = scores.softmax(-1).topk(self.top_k)
        return weights, sorted_places(ids, self.num_experts)

    def random(self, seed: int, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator(seed), device=self.device)

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)


V3 = Layer(256, 8, 7168, 2048)
V2_LITE = Layer(64, 6, 2048, 1408, torch.bfloat16)


def _gate_up(table: str, layer: Layer, tokens: tuple[int, ...]) -> Subject:
    columns, depth = 2 * layer.width, layer.hidden
    weights = _once(partial(layer.weights, columns, depth))

    def inputs(seed: int, num_tokens: int) -> Inputs:
        x = layer.rounded(layer.random(seed, num_tokens, layer.hidden).bfloat16())
        _, places = layer.routed(seed, num_tokens)
        return (x, *weights()), {**places, "top_k": layer.top_k}

    def kernel(*args: Any, **settings: Any) -> Any:
        from tidemill.kernels.grouped_gemm.kernel import gate_up  # noqa: PLC0415 - triton is heavy

        return gate_up(*args, **settings)

    scaled = layer.dtype == torch.float8_e4m3fn
    return Subject(
        table,
        GemmTile,
        tuple(
            Case(
                f"T={each}",
                layer.rows(each),
                layer.num_bytes(each, columns, depth),
                partial(inputs, num_tokens=each),
                kernel,
                grouped_truth.gate_up,
                0.03 if scaled else 0.01,  # values that lie between two of e4m3
            )
            for each in tokens
        ),
        # An FP8 tile holds whole groups of 128 of the rows that it rounds.
        partial(gemm_arms, columns=(128,) if scaled else (64, 128), paired=False),
    )


def _down(table: str, layer: Layer, tokens: tuple[int, ...]) -> Subject:
    columns, depth = layer.hidden, layer.width
    weights = _once(partial(layer.weights, columns, depth))

    def inputs(seed: int, num_tokens: int) -> Inputs:
        wide = layer.random(seed, num_tokens * layer.top_k, depth).bfloat16()
        router, places = layer.routed(seed, num_tokens)
        settings = {**places, "weights": router, "out_dtype": torch.bfloat16}
        return (layer.rounded(wide), *weights()), settings

    def kernel(*args: Any, **settings: Any) -> Any:
        from tidemill.kernels.grouped_gemm.kernel import down  # noqa: PLC0415 - triton is heavy

        return down(*args, **settings)

    return Subject(
        table,
        GemmTile,
        tuple(
            Case(
                f"T={each}",
                layer.rows(each),
                layer.num_bytes(each, columns, depth),
                partial(inputs, num_tokens=each),
                kernel,
                grouped_truth.down,
            )
            for each in tokens
        ),
        partial(gemm_arms, columns=(64, 128), paired=True),
    )


def _dense() -> Subject:
    """The three dense products of an attention layer, in one score."""
    settings = {"out_dtype": torch.bfloat16, "residual": None, "bias": None}

    def inputs(seed: int, case: GemmCase) -> Inputs:
        return dense.operands(seed, case), settings

    def kernel(*args: Any, **settings: Any) -> Any:
        from tidemill.kernels.fp8_gemm.kernel import fp8_gemm  # noqa: PLC0415 - triton is heavy

        return fp8_gemm(*args, **settings)

    return Subject(
        "fp8_gemm",
        GemmTile,
        tuple(
            Case(
                f"N={columns} K={depth} M={rows}",
                rows,
                columns * depth + rows * depth,
                partial(inputs, case=GemmCase(rows, columns, depth)),
                kernel,
                dense_truth,
            )
            for rows in (1, 16, 32, 64, 128, 4096)
            for columns, depth in ((2112, 7168), (24576, 1536), (7168, 16384))
        ),
        partial(gemm_arms, columns=(64, 128), paired=False),
    )


def _decode() -> Subject:
    settings = {"kv_lora_rank": decode.KV_LORA, "scale": decode.SCALE}

    def inputs(seed: int, shape: decode.Shape) -> Inputs:
        return decode.make_inputs(seed, shape), settings

    def kernel(*args: Any, **settings: Any) -> Any:
        from tidemill.kernels.mla_decode.kernel import mla_decode  # noqa: PLC0415 - triton is heavy

        return mla_decode(*args, **settings)

    def arms(tile: DecodeTile) -> list[DecodeTile]:
        shared = {"num_warps": (4, 8), "num_stages": (2, 3)}
        narrow = all_of(tile, {"rows": (16, 32), "swap": (True,), **shared})
        return narrow + all_of(tile, {"rows": (64,), "swap": (False, True), **shared})

    return Subject(
        "mla_decode",
        DecodeTile,
        tuple(
            Case(
                f"H={heads} B={batch} KV=4096",
                heads,
                2 * batch * 4096 * decode.WIDTH,
                partial(inputs, shape=decode.Shape(heads, batch, 4096)),
                kernel,
                decode_truth,
            )
            for heads in (16, 32, 64, 128)
            for batch in (1, 128)
        ),
        arms,
    )


def _prefill() -> Subject:
    """A long prompt, several short ones, and chunks after prefixes."""
    shapes = (
        prefill.Shape(16, ((0, 4096),)),
        prefill.Shape(16, ((0, 512), (0, 3000), (0, 1500), (0, 100))),
        prefill.Shape(16, ((2048, 64),) * 16),
    )

    def inputs(seed: int, shape: prefill.Shape) -> Inputs:
        starts = (
            torch.tensor([0, *counts], device="cuda").cumsum(0).int()
            for counts in (
                [new for _, new in shape.prompts],
                [cached + new for cached, new in shape.prompts],
            )
        )
        return (*prefill.make_inputs(seed, shape), *starts), {"scale": prefill.SCALE}

    def kernel(*args: Any, **settings: Any) -> Any:
        from tidemill.kernels.mla_prefill.kernel import (  # noqa: PLC0415 - triton is heavy
            mla_prefill_ragged,
        )

        return mla_prefill_ragged(*args, **settings)

    choices = {"rows": (64, 128), "keys": (64, 128), "num_warps": (4, 8), "num_stages": (2, 3, 4)}
    return Subject(
        "mla_prefill",
        PrefillTile,
        tuple(
            Case(
                f"prompts={len(shape.prompts)} rows={sum(new for _, new in shape.prompts)}",
                sum(new for _, new in shape.prompts) // len(shape.prompts),
                2 * shape.num_heads * sum(sum(each) for each in shape.prompts) * 2 * prefill.V,
                partial(inputs, shape=shape),
                kernel,
                prefill_truth,
            )
            for shape in shapes
        ),
        partial(all_of, choices=choices),
    )


def _once(make: Callable[[], Any]) -> Callable[[], Any]:
    made: list[Any] = []

    def get() -> Any:
        if not made:
            made.append(make())
        return made[0]

    return get
