"""Shapes that kernels are tested and timed on: one source for both."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RowsCase:
    """num_rows rows of dim values."""

    num_rows: int
    dim: int


@dataclass(frozen=True)
class RouteCase:
    """Choice of top_k of num_experts in topk_group of n_group, for num_tokens tokens."""

    num_tokens: int
    num_experts: int
    n_group: int
    topk_group: int
    top_k: int
    scoring_func: str = "sigmoid"


@dataclass(frozen=True)
class MlaCase:
    """Latent attention of num_heads heads; context_lens gives the batch, in tokens."""

    num_heads: int
    kv_lora_rank: int
    nope_dim: int
    rope_dim: int
    v_head_dim: int
    context_lens: tuple[int, ...]


@dataclass(frozen=True)
class GemmCase:
    """num_rows rows of activations times a weight [num_columns, depth]."""

    num_rows: int
    num_columns: int
    depth: int


@dataclass(frozen=True)
class MlaDecodeCase:
    """num_tokens newest tokens of each sequence; context_lens counts them too."""

    num_heads: int
    kv_lora_rank: int
    rope_dim: int
    num_tokens: int
    context_lens: tuple[int, ...]


@dataclass(frozen=True)
class MlaPrefillCase:
    """Prompts, each with the tokens that are cached and those that are new."""

    num_heads: int
    nope_dim: int
    rope_dim: int
    v_head_dim: int
    prompts: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class ExpertCase:
    """num_tokens tokens, each to top_k of num_experts SwiGLU experts of hidden x width."""

    num_tokens: int
    num_experts: int
    top_k: int
    hidden: int
    width: int


@dataclass(frozen=True)
class RopeCase:
    """num_tokens rows on their way into attention."""

    num_tokens: int
    num_heads: int
    kv_lora_rank: int
    nope_dim: int
    rope_dim: int


QUANT_CASES = (
    RowsCase(1, 128),
    RowsCase(5, 384),
    RowsCase(33, 256),
    RowsCase(257, 128),  # the many rows' tiles, the last with one
)
QUANT_GPU_CASES = (  # DeepSeek-V3: hidden, q_lora, an expert's width
    RowsCase(1, 7168),
    RowsCase(64, 7168),
    RowsCase(257, 1536),
    RowsCase(4096, 7168),
    RowsCase(4096, 2048),
)
NORM_CASES = (
    RowsCase(1, 64),
    RowsCase(5, 48),
    RowsCase(33, 384),
    RowsCase(3, 7168),
)
ROUTE_CASES = (
    RouteCase(1, 16, 4, 2, 4),
    RouteCase(33, 16, 1, 1, 4),
    RouteCase(128, 32, 4, 2, 4),
    RouteCase(7, 256, 8, 4, 8),  # DeepSeek-V3
    RouteCase(5, 384, 1, 1, 8),
    RouteCase(3, 1, 1, 1, 1),
    RouteCase(9, 8, 1, 1, 8),
    RouteCase(33, 64, 1, 1, 6, "softmax"),
    RouteCase(7, 160, 8, 3, 6, "softmax"),  # DeepSeek-V2
    RouteCase(4, 8, 8, 3, 1, "softmax"),
    RouteCase(3, 1, 1, 1, 1, "softmax"),
)
ROUTE_GPU_CASES = tuple(RouteCase(tokens, 256, 8, 4, 8) for tokens in (1, 16, 256, 4096))
ROPE_CASES = (
    RopeCase(1, 4, 32, 16, 16),
    RopeCase(7, 5, 48, 24, 8),
    RopeCase(3, 40, 512, 128, 64),  # DeepSeek-V3's widths, heads in two parts
)
ROPE_GPU_CASES = (RopeCase(1, 128, 512, 128, 64), RopeCase(300, 16, 512, 128, 64))
MLA_CASES = (
    MlaCase(4, 32, 16, 16, 16, (1,)),
    MlaCase(4, 32, 16, 16, 16, (64, 65, 1, 200)),
    MlaCase(8, 64, 32, 16, 24, (130, 63)),
    MlaCase(16, 512, 128, 64, 128, (192,)),  # DeepSeek-V3's widths, an eighth of its heads
)
MLA_PREFILL_CASES = (
    MlaPrefillCase(2, 16, 16, 16, ((0, 1),)),
    MlaPrefillCase(2, 16, 16, 24, ((0, 130), (64, 1), (127, 65), (300, 129))),
    MlaPrefillCase(1, 32, 16, 16, ((128, 128), (0, 257))),
    MlaPrefillCase(1, 16, 16, 16, ((0, 1), (0, 128), (3, 128), (0, 256)) + ((2, 3),) * 65),
)
MLA_PREFILL_GPU_CASES = (  # DeepSeek-V3's widths, its heads whole and split over ranks
    MlaPrefillCase(128, 128, 64, 128, ((0, 1024),)),
    MlaPrefillCase(16, 128, 64, 128, ((0, 4096), (1, 1), (4095, 129), (1000, 777))),
    MlaPrefillCase(16, 128, 64, 128, ((2048, 64), (4100, 1), (0, 200)) + ((5, 2),) * 70),
)
MLA_DECODE_CASES = (
    MlaDecodeCase(4, 32, 16, 1, (1,)),
    MlaDecodeCase(4, 32, 16, 1, (200, 64, 65, 1)),
    MlaDecodeCase(5, 32, 16, 2, (130, 2, 129)),  # a row that sees one token less: a block less
    MlaDecodeCase(24, 64, 32, 1, (100, 321)),  # more rows than the narrowest tile
)
MLA_DECODE_GPU_CASES = (  # DeepSeek-V3's widths, its heads whole and split over ranks
    MlaDecodeCase(16, 512, 64, 1, (4096,) * 8),
    MlaDecodeCase(32, 512, 64, 1, (4097, 1, 63, 64, 65, 8000)),
    MlaDecodeCase(64, 512, 64, 2, (4096, 2, 64, 65, 1023)),
    MlaDecodeCase(128, 512, 64, 1, (4096, 1, 777)),
    MlaDecodeCase(128, 512, 64, 2, (16384,)),
    MlaDecodeCase(20, 512, 64, 1, tuple(range(1, 400, 3))),
)
EXPERT_CASES = (
    ExpertCase(1, 16, 4, 64, 32),
    ExpertCase(5, 8, 2, 48, 40),
    ExpertCase(70, 16, 4, 64, 32),
    ExpertCase(300, 8, 2, 64, 32),  # runs longer than a product's step, more than a tile
)


@dataclass(frozen=True)
class SampleCase:
    """One draw for each of num_rows, of num_tokens in the vocabulary."""

    num_rows: int
    num_tokens: int


SAMPLE_CASES = (SampleCase(12, 100), SampleCase(6, 2049), SampleCase(1, 7))
SAMPLE_GPU_CASES = (SampleCase(1, 129_280), SampleCase(128, 129_280))  # DeepSeek-V3's vocabulary
GROUPED_CASES = (
    ExpertCase(1, 8, 2, 64, 32),
    ExpertCase(7, 5, 2, 48, 40),  # tails in every direction
    ExpertCase(70, 4, 2, 64, 32),
)
SCALED_CASES = (
    ExpertCase(1, 8, 2, 128, 128),
    ExpertCase(9, 5, 2, 384, 256),
    ExpertCase(70, 3, 2, 256, 128),
)
GROUPED_GPU_CASES = (  # DeepSeek-V3's experts, 32 of its 256 (tests make their own weights)
    ExpertCase(1, 32, 8, 7168, 2048),
    ExpertCase(16, 32, 8, 7168, 2048),
    ExpertCase(129, 32, 8, 7168, 2048),
    ExpertCase(3000, 32, 8, 7168, 2048),
    ExpertCase(64, 1, 1, 7168, 2048),  # the shared expert
    ExpertCase(33, 384, 8, 1024, 256),
)
GEMM_CASES = (
    GemmCase(1, 128, 128),
    GemmCase(5, 200, 384),
    GemmCase(33, 576, 1024),
    GemmCase(150, 256, 256),
)
GEMM_GPU_CASES = tuple(  # DeepSeek-V3: query and latent, query heads, output
    GemmCase(num_rows, num_columns, depth)
    for num_columns, depth in ((2112, 7168), (24576, 1536), (7168, 16384))
    for num_rows in (1, 17, 64, 128, 4096)
)
