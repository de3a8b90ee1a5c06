from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from tidemill.kernels.act_quant.reference import Quantized, act_quant, dequantize, scale_groups
from tidemill.kernels.cases import GROUPED_CASES, GROUPED_GPU_CASES, SCALED_CASES, ExpertCase
from tidemill.kernels.choice import PATHS, forced
from tidemill.kernels.device import H100, tile_counters
from tidemill.kernels.expert_mlp import Expert, expert_mlp, gather_rows, scatter_rows
from tidemill.kernels.fp8_gemm.configs import Tile
from tidemill.kernels.fp8_gemm.reference import widen_weight
from tidemill.kernels.grouped_gemm import combine, configs, down, gate_up, reference
from tidemill.kernels.grouped_gemm.configs import ALL_DOWN_TILES, ALL_GATE_UP_TILES
from tidemill.kernels.linear import make_linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GATE_UP_SCALED = [tile for _, tile in ALL_GATE_UP_TILES[1][H100]]
DOWN_SCALED = [tile for _, tile in ALL_DOWN_TILES[1][H100]]
GATE_UP_HALF = [tile for _, tile in ALL_GATE_UP_TILES[2][H100]]
DOWN_HALF = [tile for _, tile in ALL_DOWN_TILES[2][H100]]


class Layer:
    """Random experts of a case, tokens, and where the router sent them: the first gets no token."""

    def __init__(self, case: ExpertCase, dtype: torch.dtype) -> None:
        self.case = case
        self.generator = torch.Generator(DEVICE).manual_seed(case.num_tokens)
        self.x = self.random(case.num_tokens, case.hidden).to(dtype)
        self.gate_up = self.weight(2 * case.width, case.hidden, dtype)
        self.down = self.weight(case.hidden, case.width, dtype)
        likes = self.random(case.num_tokens, case.num_experts)
        if case.num_experts > case.top_k:
            likes[:, 0] = -torch.inf
            likes[:, -1] += 2  # a crowded one
        self.ids = likes.topk(case.top_k, dim=-1).indices
        flat = self.ids.flatten()
        counts = torch.bincount(flat, minlength=case.num_experts)
        self.weights = self.random(case.num_tokens, case.top_k).abs()
        self.places: dict[str, Any] = {
            "starts": (counts.cumsum(0) - counts).int(),
            "counts": counts.int(),
            "rows": flat.argsort(stable=True).int(),
        }

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=DEVICE)

    def weight(self, num_rows: int, depth: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """[E, num_rows, depth] and scales for e4m3, with products of order one."""
        experts = self.case.num_experts
        made = torch.empty(experts, num_rows, depth, device=DEVICE, dtype=dtype)
        scaled = dtype == torch.float8_e4m3fn
        for each in made:
            each.copy_(self.random(num_rows, depth) / (1 if scaled else depth**0.5))
        if not scaled:
            return made, None
        blocks = experts, -(-num_rows // 128), depth // 128
        scales = torch.rand(blocks, generator=self.generator, device=DEVICE) + 0.5
        return made, scales / depth**0.5

    def gate_up_arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x: Tensor | Quantized = self.x
        if self.gate_up[1] is not None:
            x = act_quant(self.random(*self.x.shape))
        return (x, *self.gate_up), {**self.places, "top_k": self.case.top_k}

    def down_arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden: Tensor | Quantized = self.random(self.ids.numel(), self.case.width).to(self.x.dtype)
        if self.down[1] is not None:
            hidden = act_quant(self.random(self.ids.numel(), self.case.width))
        return (hidden, *self.down), {**self.places, "weights": self.weights}


def near(found: Tensor, expected: Tensor, size: float = 1.0) -> None:
    """Up to the order of an fp32 sum, and one rounding to the dtype of what was found."""
    step = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}[found.dtype]
    torch.testing.assert_close(found, expected, rtol=step, atol=size * min(step, 1e-3))


def near_quantized(found: Quantized, expected: Tensor) -> None:
    """Values that the kernel left in fp32 are the reference's before its last rounding."""
    scaled, scales = scale_groups(expected)
    torch.testing.assert_close(found.scales, scales, rtol=1e-4, atol=0)
    assert found.scales.stride() == scales.stride()
    torch.testing.assert_close(found.values, scaled, rtol=1e-4, atol=448e-4)


def hidden_of(arguments: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    """What gate_up quantises, in fp32: the reference on dequantised operands."""
    x, weight, scales = arguments
    wide = widen_weight(weight, scales)
    found = reference.gate_up(dequantize(x, torch.float32), wide, None, **options)
    assert isinstance(found, Tensor)
    return found


def test_the_reference_is_each_experts_mlp() -> None:
    layer = Layer(ExpertCase(5, 4, 2, 16, 8), torch.float32)
    arguments, options = layer.gate_up_arguments()
    with forced("reference"):
        hidden = gate_up(*arguments, **options)
        routed = down(hidden, *layer.down, **layer.places, weights=layer.weights)
        out = combine(routed, layer.x)
    for token, row in enumerate(layer.x):
        total = row.clone()
        for expert, share in zip(layer.ids[token], layer.weights[token], strict=True):
            gate, up = (layer.gate_up[0][expert] @ row).chunk(2)
            total += share * (layer.down[0][expert] @ (silu(gate) * up))
        torch.testing.assert_close(out[token], total, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", GROUPED_CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernels_match_the_reference(case: ExpertCase, dtype: torch.dtype) -> None:
    layer = Layer(case, dtype)
    for op, (arguments, options) in (
        (gate_up, layer.gate_up_arguments()),
        (down, layer.down_arguments()),
    ):
        found, expected = both(op, *arguments, **options)
        near(found, expected)


@pytest.mark.parametrize("case", SCALED_CASES, ids=str)
def test_scaled_kernels_match_the_reference(case: ExpertCase) -> None:
    from tidemill.kernels.grouped_gemm import kernel  # noqa: PLC0415 - triton is heavy

    layer = Layer(case, torch.float8_e4m3fn)
    arguments, options = layer.gate_up_arguments()
    # The interpreter's cast to e4m3 is wrong; what it is given is looked at instead.
    found = kernel.gate_up(*arguments, **options, values_dtype=torch.float32)
    assert isinstance(found, Quantized)
    near_quantized(found, hidden_of(arguments, options))
    arguments, options = layer.down_arguments()
    near(*both(down, *arguments, **options, out_dtype=torch.float32))


@pytest.mark.parametrize("tile", GATE_UP_SCALED, ids=str)
@pytest.mark.parametrize("splits", [1, 2])
def test_every_gate_up_tile_gives_the_same(tile: Tile, splits: int) -> None:
    from tidemill.kernels.grouped_gemm import kernel  # noqa: PLC0415 - triton is heavy

    arguments, options = Layer(SCALED_CASES[1], torch.float8_e4m3fn).gate_up_arguments()
    for each in (tile, replace(tile, tma=not tile.tma)):
        found = kernel.gate_up(
            *arguments,
            **options,
            tile=replace(each, splits=splits),
            values_dtype=torch.float32,
        )
        assert isinstance(found, Quantized)
        near_quantized(found, hidden_of(arguments, options))


@pytest.mark.parametrize("tile", DOWN_SCALED, ids=str)
@pytest.mark.parametrize("splits", [1, 2])
def test_every_down_tile_gives_the_same(tile: Tile, splits: int) -> None:
    from tidemill.kernels.grouped_gemm import kernel  # noqa: PLC0415 - triton is heavy

    arguments, options = Layer(SCALED_CASES[1], torch.float8_e4m3fn).down_arguments()
    options["out_dtype"] = torch.float32
    expected = reference.down(*arguments, **options)
    for each in (tile, replace(tile, tma=not tile.tma)):
        found = kernel.down(*arguments, **options, tile=replace(each, splits=splits))
        near(found, expected)


@pytest.mark.parametrize("index", range(len(GATE_UP_HALF)))
@pytest.mark.parametrize("splits", [1, 2])
def test_every_tile_of_two_byte_elements_gives_the_same(index: int, splits: int) -> None:
    from tidemill.kernels.grouped_gemm import kernel  # noqa: PLC0415 - triton is heavy

    layer = Layer(ExpertCase(20, 4, 2, 160, 72), torch.float16)
    arguments, options = layer.gate_up_arguments()
    tile = replace(GATE_UP_HALF[index], splits=splits)
    found = kernel.gate_up(*arguments, **options, tile=tile)
    expected = reference.gate_up(*arguments, **options)
    assert isinstance(found, Tensor)
    assert isinstance(expected, Tensor)
    near(found, expected)
    arguments, options = layer.down_arguments()
    options["out_dtype"] = torch.float16
    tile = replace(DOWN_HALF[index], splits=splits)
    near(kernel.down(*arguments, **options, tile=tile), reference.down(*arguments, **options))


@pytest.mark.parametrize(
    ("num_experts", "rows", "tile_rows"),
    [
        (2, 512, 128),
        (4, 256, 128),
        (1, 4096, 128),
        (256, 128, 64),
        (1, 256, 64),  # 32 tiles of 128 rows for 132 multiprocessors
    ],
)
def test_a_tile_too_large_to_fill_the_device_gives_way(
    monkeypatch: pytest.MonkeyPatch, num_experts: int, rows: int, tile_rows: int
) -> None:
    monkeypatch.setattr(configs, "num_sms", lambda _device: 132)
    values = torch.empty(1, 7168, dtype=torch.float8_e4m3fn, device=DEVICE)
    tile = configs.tile_for(ALL_GATE_UP_TILES, values, num_experts, num_experts * rows, 2048)
    assert tile.rows == tile_rows


@pytest.mark.usefixtures("either_order")
def test_parts_of_a_place_are_added_in_their_order_whoever_comes_last() -> None:
    from tidemill.kernels.grouped_gemm import kernel  # noqa: PLC0415 - triton is heavy

    layer = Layer(ExpertCase(20, 4, 2, 160, 512), torch.float8_e4m3fn)
    (hidden, weight, scales), options = layer.down_arguments()
    options["out_dtype"] = torch.float32
    tile = replace(DOWN_SCALED[0], splits=1)
    expected = torch.zeros(40, 160, device=DEVICE)
    for part in range(4):
        k = slice(128 * part, 128 * (part + 1))
        group = Quantized(
            hidden.values[:, k].contiguous(), hidden.scales[:, part : part + 1].contiguous()
        )
        block = scales[..., part : part + 1].contiguous()
        expected += kernel.down(group, weight[..., k].contiguous(), block, **options, tile=tile)
    split = replace(tile, splits=4)
    assert torch.equal(kernel.down(hidden, weight, scales, **options, tile=split), expected)


@pytest.mark.usefixtures("either_order")
@pytest.mark.parametrize("splits", [2, 3])
def test_splits_leave_counters_zero_and_places_of_nobody_unwritten(splits: int) -> None:
    from tidemill.kernels.grouped_gemm import kernel  # noqa: PLC0415 - triton is heavy

    for room, filled in ((20, [0, 3, 20, 17]), (40, [40, 0, 0, 1])):
        counts = torch.tensor(filled, dtype=torch.int32, device=DEVICE)
        layer = Layer(ExpertCase(4 * room, 4, 1, 384, 128), torch.float8_e4m3fn)
        starts = torch.arange(4, dtype=torch.int32, device=DEVICE) * room
        places: dict[str, Any] = {"starts": starts, "counts": counts, "rows": None}
        taken = (torch.arange(room, device=DEVICE) < counts.unsqueeze(1)).flatten()
        arguments, _ = layer.gate_up_arguments()
        tile = replace(GATE_UP_SCALED[0], splits=splits)
        found = kernel.gate_up(*arguments, **places, top_k=1, tile=tile, values_dtype=torch.float32)
        assert isinstance(found, Quantized)
        expected, _ = scale_groups(hidden_of(arguments, {**places, "top_k": 1}))
        near(found.values[taken], expected[taken], size=4480.0)
        assert found.values[~taken].isnan().all()
        assert found.scales[~taken].isnan().all()
        arguments, _ = layer.down_arguments()
        places |= {"weights": None, "out_dtype": torch.float32}
        routed = kernel.down(*arguments, **places, tile=replace(DOWN_SCALED[0], splits=splits))
        near(routed[taken], reference.down(*arguments, **places)[taken])
        assert routed[~taken].isnan().all()
        assert not tile_counters(counts.device).any()


@pytest.mark.parametrize(
    ("dtype", "tiles"),
    [
        (torch.float32, (None, None)),
        (torch.float8_e4m3fn, (None, None)),
        (torch.float8_e4m3fn, (GATE_UP_SCALED[-1], DOWN_SCALED[-1])),
    ],
    ids=["fp32", "fp8", "fp8 of 128 rows"],
)
def test_the_masked_layout_leaves_places_of_nobody_unwritten(
    dtype: torch.dtype, tiles: tuple[Tile | None, Tile | None]
) -> None:
    from tidemill.kernels.grouped_gemm import kernel  # noqa: PLC0415 - triton is heavy

    room, counts = 20, torch.tensor([0, 3, 20, 17], dtype=torch.int32, device=DEVICE)
    layer = Layer(ExpertCase(4 * room, 4, 1, 128, 128), dtype)
    starts = torch.arange(4, dtype=torch.int32, device=DEVICE) * room
    places: dict[str, Any] = {"starts": starts, "counts": counts, "rows": None}
    taken = (torch.arange(room, device=DEVICE) < counts.unsqueeze(1)).flatten()
    (x, *weight), _ = layer.gate_up_arguments()
    scaled = isinstance(x, Quantized)
    hidden: Any = kernel.gate_up(
        x, *weight, **places, top_k=1, values_dtype=torch.float32, tile=tiles[0]
    )
    expected: Any
    if scaled:
        expected, _ = scale_groups(hidden_of((x, *weight), {**places, "top_k": 1}))
        assert hidden.scales[~taken].isnan().all()
        hidden = hidden.values
    else:
        expected = reference.gate_up(x, *weight, **places, top_k=1)
    near(hidden[taken], expected[taken], size=4480.0 if scaled else 1.0)
    assert hidden[~taken].isnan().all()
    (hidden, *weight), _ = layer.down_arguments()
    options: dict[str, Any] = {**places, "weights": None, "out_dtype": torch.float32}
    found = kernel.down(hidden, *weight, **options, tile=tiles[1])
    near(found[taken], reference.down(hidden, *weight, **options)[taken])
    assert found[~taken].isnan().all()


def test_one_expert_of_all_rows_is_a_dense_mlp() -> None:
    layer = Layer(ExpertCase(40, 1, 1, 64, 48), torch.float32)
    arguments, options = layer.gate_up_arguments()
    with forced("triton"):
        hidden = gate_up(*arguments, **options)
        out = down(hidden, *layer.down, **layer.places)
    mlp = Expert(make_linear(layer.gate_up[0][0]), make_linear(layer.down[0][0]))
    near(out, mlp(layer.x))


@pytest.mark.parametrize("num_tokens", [1, 23])
def test_a_whole_layer_is_what_the_cpu_path_computes(num_tokens: int) -> None:
    layer = Layer(ExpertCase(num_tokens, 8, 3, 64, 32), torch.float32)
    residual, shared = layer.random(num_tokens, 64), layer.random(num_tokens, 64)
    arguments, options = layer.gate_up_arguments()
    with forced("triton"):
        hidden = gate_up(*arguments, **options)
        routed = down(hidden, *layer.down, **layer.places, weights=layer.weights)
        found = combine(routed, residual, shared)
    experts = [
        Expert(make_linear(up), make_linear(back))
        for up, back in zip(layer.gate_up[0], layer.down[0], strict=True)
    ]
    tokens = gather_rows(layer.x, layer.ids, len(experts))
    mixed = scatter_rows(expert_mlp(tokens, experts), tokens.order, layer.weights)
    near(found, residual + (mixed + shared), size=4.0)


def test_combine_sums_in_fp32_and_rounds_once() -> None:
    choices = torch.tensor([[2048.0], [1.0], [1.0], [-2048.0]], device=DEVICE).half()
    residual, shared = (torch.full((1, 1), x, device=DEVICE).half() for x in (0.25, 0.5))
    for path in PATHS:
        with forced(path):
            assert combine(choices, residual, shared).item() == 2.75
            assert combine(choices, residual).item() == 2.25


@pytest.mark.parametrize("with_shared", [True, False])
def test_combine_does_not_depend_on_the_batch(with_shared: bool) -> None:
    generator = torch.Generator(DEVICE).manual_seed(1)
    routed = torch.randn(7 * 3, 1100, generator=generator, device=DEVICE)
    residual = torch.randn(7, 2200, generator=generator, device=DEVICE)[:, :1100]
    shared = torch.randn(7, 1100, generator=generator, device=DEVICE) if with_shared else None
    found, expected = both(combine, routed, residual, shared)
    assert torch.equal(found, expected)
    alone = both(combine, routed[6:9], residual[2:3], None if shared is None else shared[2:3])
    assert torch.equal(alone[0][0], found[2])


def test_no_tokens_give_no_rows() -> None:
    layer = Layer(ExpertCase(0, 4, 2, 64, 32), torch.float32)
    arguments, options = layer.gate_up_arguments()
    with forced("triton"):
        hidden = gate_up(*arguments, **options)
        assert isinstance(hidden, Tensor)
        routed = down(hidden, *layer.down, **layer.places, weights=layer.weights)
        assert combine(routed, layer.x).shape == (0, 64)
    assert hidden.shape == (0, 32)


def test_what_does_not_fit_together_is_refused() -> None:
    layer = Layer(ExpertCase(4, 4, 2, 128, 128), torch.float8_e4m3fn)
    (x, weight, scales), options = layer.gate_up_arguments()
    with pytest.raises(ValueError, match="FP8 needs a quantised left side and scale_inv"):
        gate_up(x, weight, None, **options)
    with pytest.raises(
        ValueError, match=r"weight is \[4, 256, 64\].*expected \[E=4, 2I=256, D=128\]"
    ):
        gate_up(x, weight[..., :64], scales, **options)
    with pytest.raises(ValueError, match=r"counts is \[3\].*expected \[E=4\]"):
        gate_up(x, weight, scales, **{**options, "counts": options["counts"][:3]})
    with pytest.raises(ValueError, match=r"starts is \[4\] int64.*int32"):
        gate_up(x, weight, scales, **{**options, "starts": options["starts"].long()})
    (hidden, weight, scales), options = layer.down_arguments()
    with pytest.raises(ValueError, match=r"rows is \[7\].*expected \[R=8\]"):
        down(hidden, weight, scales, **{**options, "rows": options["rows"][:7]})
    with pytest.raises(ValueError, match="weights are those of flat choices"):
        down(hidden, weight, scales, **{**options, "rows": None})
    with pytest.raises(ValueError, match=r"rows must be K a token; got T=3, D=8, T\*K=4"):
        combine(torch.zeros(4, 8), torch.zeros(3, 8))


@pytest.mark.gpu
@pytest.mark.parametrize("case", GROUPED_GPU_CASES, ids=str)
def test_full_bf16_layers_match_the_reference(case: ExpertCase) -> None:
    layer = Layer(case, torch.bfloat16)
    for op, (arguments, options) in (
        (gate_up, layer.gate_up_arguments()),
        (down, layer.down_arguments()),
    ):
        found, expected = both(op, *arguments, **options)
        near(found, expected, size=4.0)


@pytest.mark.gpu
@pytest.mark.parametrize("case", GROUPED_GPU_CASES, ids=str)
def test_full_fp8_layers_match_the_reference(case: ExpertCase) -> None:
    layer = Layer(case, torch.float8_e4m3fn)
    arguments, options = layer.gate_up_arguments()
    found, expected = both(gate_up, *arguments, **options)
    torch.testing.assert_close(found.scales, expected.scales, rtol=1e-2, atol=0)
    values, wanted = found.values.float(), expected.values.float()
    # A value near the middle of two steps of e4m3 falls either way; few do.
    assert ((values - wanted).abs() <= wanted.abs() / 8 + 2).all()
    assert (values != wanted).float().mean() < 0.05
    arguments, options = layer.down_arguments()
    near(*both(down, *arguments, **options), size=4.0)


@pytest.mark.gpu
def test_a_captured_graph_follows_the_counts_on_the_device() -> None:
    room = 64
    layer = Layer(ExpertCase(4 * room, 4, 1, 256, 256), torch.float8_e4m3fn)
    starts = torch.arange(4, dtype=torch.int32, device=DEVICE) * room
    counts = torch.full((4,), room, dtype=torch.int32, device=DEVICE)
    (hidden, *weight), _ = layer.down_arguments()
    with forced("triton"):
        down(hidden, *weight, starts=starts, counts=counts)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = down(hidden, *weight, starts=starts, counts=counts)
    for filled in ([1, 0, 64, 33], [64, 64, 0, 2]):
        counts.copy_(torch.tensor(filled, dtype=torch.int32))
        graph.replay()
        taken = (torch.arange(room, device=DEVICE) < counts.unsqueeze(1)).flatten()
        with forced("reference"):
            expected = down(hidden, *weight, starts=starts, counts=counts)
        near(found[taken], expected[taken], size=4.0)


def both(op: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    with forced("triton"):
        found = op(*args, **kwargs)
    with forced("reference"):
        return found, op(*args, **kwargs)
