"""The engine in one-worker mode against transformers: same checkpoint, same process, ABAB.

    python -m benchmarks.engine.peers [--batches 1,8,32] [--rounds 5] [--threads 2]

Random bf16 weights of a small DeepSeek-V3 (489 M parameters, made on the fly), random 128-token
prompts, greedy. Prefill is the time to every sequence's first token; decode is what follows, in
tokens per second over the batch. Each round measures ours, then the peer; figures are medians.

Floor of a decode step, in bytes: every weight that the batch touches is read once (attention with
W_UK and W_UV, dense and shared MLPs, gates, output head; of E routed experts in a layer
E * (1 - (1 - k / E)^B) are expected under even routing), and so is each sequence's latent context.
`floor fraction` is that many bytes at the read bandwidth measured in the same run, over the
measured step: 1.0 would mean that nothing but reading memory took time.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
)

from benchmarks.provenance import commit, cpu_name
from tidemill.engine import Engine, EngineConfig, SamplingParams, Sequence
from tidemill.models.config import ModelConfig

PROMPT_TOKENS = 128
NEW_TOKENS = 33
STEP_TOKENS = 2048  # of ours; the peer computes all prompts of a batch at once
RESULTS = Path(__file__).parent / "results"
# What is promised over transformers: decode throughput by batch, and prefill throughput at each.
GOALS = {1: 2.0, 8: 3.0, 32: 6.0}
PREFILL_GOAL = 1.2

CHECKPOINT = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_shared_experts": 1,
    "n_routed_experts": 32,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 512,
    "q_lora_rank": 384,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "max_position_embeddings": 4096,
    "rope_scaling": None,
}

Run = Callable[[list[list[int]]], tuple[float, float]]


@dataclass
class Samples:
    """One side's measurements at one batch size, in seconds, round by round."""

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Row:
    """Medians at one batch size; ratios are ours over the peer's."""

    batch: int
    ours_prefill_tok_s: float
    peer_prefill_tok_s: float
    prefill_ratio: float
    prefill_goal: float
    ours_decode_tok_s: float
    peer_decode_tok_s: float
    decode_ratio: float
    decode_goal: float
    floor_bytes: int
    floor_fraction: float


def make_checkpoint(path: Path) -> None:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**CHECKPOINT))
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(path)


def run_ours(engine: Engine, prompts: list[list[int]]) -> tuple[float, float]:
    """Seconds to all first tokens, seconds for the other NEW_TOKENS - 1 steps."""
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)
    blocks_each = -(-(PROMPT_TOKENS + NEW_TOKENS) // 64)
    seqs = [
        Sequence(str(i), prompt, block_table=engine.pool.allocate(blocks_each), sampling=sampling)
        for i, prompt in enumerate(prompts)
    ]
    # Decode of the first prompts would mix with prefill of the last: hold it back by funding.
    for seq in seqs:
        seq.num_funded_tokens = 1
        engine.submit(seq)
    started = time.perf_counter()
    step_until_idle(engine)
    prefilled = time.perf_counter()
    for seq in seqs:
        engine.fund(seq.seq_id, NEW_TOKENS)
    step_until_idle(engine)
    finished = time.perf_counter()
    for seq in seqs:
        engine.pool.release(seq.block_table)
    engine.pool.check_integrity()
    return prefilled - started, finished - prefilled


def step_until_idle(engine: Engine) -> None:
    while engine.has_work:
        engine.step()


class FirstToken(StoppingCriteria):  # type: ignore[misc]  # untyped in transformers
    """Never stops anything: notes when `generate` had its first tokens."""

    def __init__(self) -> None:
        self.at: float | None = None

    def __call__(self, input_ids: Tensor, *_: object, **__: object) -> Tensor:
        if self.at is None:
            self.at = time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool)


def run_peer(model: DeepseekV3ForCausalLM, prompts: list[list[int]]) -> tuple[float, float]:
    """As `run_ours`, by `generate`."""
    ids = torch.tensor(prompts)
    first = FirstToken()
    started = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            pad_token_id=1,
            stopping_criteria=StoppingCriteriaList([first]),
        )
    finished = time.perf_counter()
    assert out.shape[1] == PROMPT_TOKENS + NEW_TOKENS
    assert first.at is not None
    return first.at - started, finished - first.at


def measure(ours: Run, peer: Run, batch: int, rounds: int) -> tuple[Samples, Samples]:
    generator = torch.Generator().manual_seed(batch)
    prompts = torch.randint(2, 32000, (batch, PROMPT_TOKENS), generator=generator).tolist()
    both = (Samples(), Samples())
    for _ in range(rounds):
        for samples, run in zip(both, (ours, peer), strict=True):
            prefill, decode = run(prompts)
            samples.prefill.append(prefill)
            samples.decode.append(decode)
    return both


def floor_bytes(config: ModelConfig, batch: int) -> int:
    """Bytes that one decode step must read, in the middle of the measured answers."""
    heads, hidden = config.num_attention_heads, config.hidden_size
    assert config.q_lora_rank is not None
    attention = (
        hidden * (config.q_lora_rank + config.latent_dim)
        + config.q_lora_rank * heads * config.qk_head_dim
        + config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
        + heads * config.v_head_dim * hidden
    )
    expert = 3 * hidden * config.moe_intermediate_size
    share = config.num_experts_per_tok / config.n_routed_experts
    touched = config.n_routed_experts * (1 - (1 - share) ** batch)
    moe_layers = config.num_hidden_layers - config.first_k_dense_replace
    weights = (
        config.num_hidden_layers * attention
        + config.first_k_dense_replace * 3 * hidden * config.intermediate_size
        + moe_layers * (touched + config.n_shared_experts) * expert
        + config.vocab_size * hidden
    )
    gates_fp32 = 4 * moe_layers * config.n_routed_experts * hidden
    context = batch * (PROMPT_TOKENS + NEW_TOKENS // 2) * config.latent_dim
    return int(2 * (weights + config.num_hidden_layers * context) + gates_fp32)


def read_bandwidth() -> float:
    """Bytes per second of summing 512 MiB, best of five: what this machine reads right now."""
    buffer = torch.ones(128 * 1024 * 1024, dtype=torch.float32)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        buffer.sum()
        seconds.append(time.perf_counter() - started)
    return buffer.numel() * 4 / min(seconds)


def summarise(
    config: ModelConfig, batch: int, ours: Samples, peer: Samples, bandwidth: float
) -> Row:
    prompt_tokens, new_tokens = batch * PROMPT_TOKENS, batch * (NEW_TOKENS - 1)
    medians = [
        statistics.median(values)
        for values in (ours.prefill, peer.prefill, ours.decode, peer.decode)
    ]
    step = medians[2] / (NEW_TOKENS - 1)
    needed = floor_bytes(config, batch)
    return Row(
        batch=batch,
        ours_prefill_tok_s=round(prompt_tokens / medians[0], 1),
        peer_prefill_tok_s=round(prompt_tokens / medians[1], 1),
        prefill_ratio=round(medians[1] / medians[0], 2),
        prefill_goal=PREFILL_GOAL,
        ours_decode_tok_s=round(new_tokens / medians[2], 1),
        peer_decode_tok_s=round(new_tokens / medians[3], 1),
        decode_ratio=round(medians[3] / medians[2], 2),
        decode_goal=GOALS.get(batch, 1.0),
        floor_bytes=needed,
        floor_fraction=round(needed / bandwidth / step, 2),
    )


HEADER = f"{'batch':>5} {'':>7} {'tok/s':>20} {'ratio':>6} {'goal':>5} {'floor':>6}"


def show(row: Row) -> None:
    """Two lines, prefill and decode; the floor is decode's."""
    prefill = f"{row.ours_prefill_tok_s:.0f} vs {row.peer_prefill_tok_s:.0f}"
    decode = f"{row.ours_decode_tok_s:.1f} vs {row.peer_decode_tok_s:.1f}"
    print(f"{row.batch:>5} prefill {prefill:>20} {row.prefill_ratio:>6} {row.prefill_goal:>5}")
    print(
        f"{'':>5} decode  {decode:>20} {row.decode_ratio:>6} {row.decode_goal:>5} "
        f"{row.floor_fraction:>6}",
        flush=True,
    )


def write(rows: list[Row], bandwidth: float, arguments: argparse.Namespace) -> None:
    result = {
        "benchmark": "engine/peers",
        "command": f"python -m benchmarks.engine.peers --rounds {arguments.rounds} "
        f"--threads {arguments.threads} --batches {','.join(map(str, arguments.batches))}",
        "commit": commit(),
        "device": f"{cpu_name()}, {arguments.threads} thread(s)",
        "torch": torch.__version__,
        "peer": f"transformers {transformers.__version__} generate, bfloat16, sdpa",
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "step_tokens": STEP_TOKENS,
        "read_bandwidth_gb_s": round(bandwidth / 1e9, 1),
        "rows": [asdict(row) for row in rows],
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "peers-cpu.json").write_text(json.dumps(result, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--batches", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8, 32]
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--checkpoint", type=Path, help="reuse or create the checkpoint here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.checkpoint or Path(folder)
        if not (path / "config.json").exists():
            make_checkpoint(path)
        model = DeepseekV3ForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        model.generation_config.eos_token_id = None
        config = EngineConfig(
            num_blocks=3 * max(arguments.batches),
            max_batch=max(arguments.batches),
            step_tokens=STEP_TOKENS,
        )
        engine = Engine.load(path, config)
        rows = []
        print(HEADER)
        bandwidth = read_bandwidth()
        for batch in arguments.batches:
            ours, peer = measure(
                lambda prompts: run_ours(engine, prompts),
                lambda prompts: run_peer(model, prompts),
                batch,
                arguments.rounds,
            )
            bandwidth = max(bandwidth, read_bandwidth())
            rows.append(summarise(engine.model_config, batch, ours, peer, bandwidth))
            show(rows[-1])
        write(rows, bandwidth, arguments)


if __name__ == "__main__":
    main()
