"""What a path costs in accuracy (X1): every way to the same tokens, against transformers in fp32.

    python -m benchmarks.engine.numerics [--dtypes float32,bfloat16,float16,fp8] [--sequences 24]

Sequences: the demo model's own greedy continuations, 64 tokens, of prompts of 1, 63, 64, 65, 129
and 300 tokens drawn from its vocabulary. Twice over each path and dtype:

- teacher-forced: every path is made to draw the same tokens, and its logits at those 64 positions
  are compared with transformers' in fp32 over the whole sequence. `error p99.9` is the 99.9th
  percentile of the absolute difference over all logits, `x whole` that figure over the one of the
  whole-prompt path of the same dtype (all tokens in one prefill), which X1(c) bounds by 1.5.
- free: 64 greedy tokens. `diverging` is the share of sequences that end up with other tokens than
  the path `alone`. In fp32 every difference must be excused (X1(b)): at the first position that
  differs the top-2 gap is at most e, or some expert's selection gap up to there at most e_r.

e is compared with the largest difference of any logit between two paths in fp32, e_r with that of
any biased expert score. In FP8 the weights are FP8 in 128x128 blocks, computed in bf16, and the
truth is transformers on the dequantised weights. Writes results/numerics.json and docs/numerics.md.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.engine.memory import quantise
from benchmarks.engine.paths import PATHS, Answers, Engines, Request
from benchmarks.provenance import commit, cpu_name
from tests.x1 import E_LOGIT, E_ROUTE, Gaps, reference_gaps
from tidemill.engine import Engine
from tidemill.engine import Sequence as Running
from tidemill.engine.runner import ModelRunner
from tidemill.engine.sampling import Drawn
from tidemill.models.deepseek import Batch
from tidemill.models.fp8 import dequantize
from tidemill.models.prompt_rows import PromptSpan, prompt_rows

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "models/demo"
RESULT = Path(__file__).with_name("results") / "numerics.json"
DOCUMENT = ROOT / "docs/numerics.md"
PROMPTS = (1, 63, 64, 65, 129, 300)
NEW_TOKENS = 64
ENGINE_DTYPE = {"fp8": "bfloat16"}

# Where the names are looked up that this program listens in on.
STEPPING: Any = sys.modules["tidemill.engine.engine"]
LAYERS: Any = sys.modules["tidemill.models.deepseek"]

Logits = dict[tuple[str, int], Tensor]


@dataclass(frozen=True)
class Row:
    """One path in one dtype. Differences are of logits, absolute."""

    dtype: str
    path: str
    error_p999: float
    error_max: float
    over_whole: float
    from_alone_max: float
    diverging: float
    unexcused: int


@dataclass(frozen=True)
class Truth:
    """What transformers says in fp32 about a request's prompt and continuation."""

    request: Request
    token_ids: list[int]
    gaps: Gaps

    @property
    def positions(self) -> range:
        """Where the tokens were drawn: logits at p - 1 decide the token at p."""
        return range(len(self.request.prompt), len(self.token_ids))


@contextmanager
def drawing(choose: Callable[[str, int], int | None], seen: Logits) -> Iterator[None]:
    """Note all logits that are drawn from, by (sequence, position), and force what is chosen."""
    original = STEPPING.draw

    def noted(logits: Tensor, seqs: Sequence[Running]) -> list[Drawn]:
        drawn: list[Drawn] = original(logits, seqs)
        for row, seq in enumerate(seqs):
            name, position = seq.seq_id.removesuffix(" third"), len(seq.token_ids)
            seen.setdefault((name, position), logits[row].float())
            forced = choose(name, position)
            if forced is not None:
                drawn[row] = Drawn(forced)
        return drawn

    STEPPING.draw = noted
    try:
        yield
    finally:
        STEPPING.draw = original


def make_requests(num: int, vocab_size: int) -> list[Request]:
    generator = torch.Generator().manual_seed(0)
    requests = []
    for index in range(num):
        length = PROMPTS[index % len(PROMPTS)]
        prompt = torch.randint(6, vocab_size, (length,), generator=generator).tolist()
        requests.append(Request(f"r{index}", prompt, NEW_TOKENS))
    return requests


def truths(model_dir: Path, requests: Sequence[Request]) -> list[Truth]:
    answers = PATHS["whole prompt, then alone"](Engines(model_dir, "float32"), requests)
    found = []
    for request in requests:
        token_ids = request.prompt + answers[request.name]
        found.append(Truth(request, token_ids, reference_gaps(model_dir, token_ids)))
    return found


@torch.inference_mode()
def whole(engine: Engine, truth: Truth) -> Tensor:
    """Logits [NEW_TOKENS, V] of the path that all others are measured by: one prefill of all."""
    positions = torch.arange(len(truth.token_ids))
    span = PromptSpan(0, len(positions), range(-(-len(positions) // 64)))
    batch = Batch(positions, positions, prompts=prompt_rows(0, [span], positions.device))
    assert isinstance(engine._runner, ModelRunner)
    model = engine._runner.model
    hidden = model.forward(torch.tensor(truth.token_ids), batch, engine.pool.latents)
    first = truth.positions.start - 1
    return model.logits(hidden[first:-1]).float()


def exact(truth: Truth) -> Tensor:
    return truth.gaps.logits[truth.positions.start - 1 : -1]


def p999(errors: Tensor) -> float:
    flat = errors.flatten()
    return flat.kthvalue(max(int(0.999 * flat.numel()), 1)).values.item()


def forced(engines: Engines, path: str, found: Sequence[Truth]) -> Tensor:
    """Teacher-forced logits [all positions of all sequences, V]."""
    tokens = {truth.request.name: truth.token_ids for truth in found}
    seen: Logits = {}

    def choose(name: str, position: int) -> int | None:
        ids = tokens.get(name)
        return None if ids is None or position >= len(ids) else ids[position]

    with drawing(choose, seen):
        PATHS[path](engines, [truth.request for truth in found])
    return torch.stack([seen[t.request.name, p] for t in found for p in t.positions])


def unexcused(ours: Answers, found: Sequence[Truth]) -> tuple[int, int]:
    """How many sequences differ from transformers' tokens, and how many of them without excuse."""
    different = without = 0
    for truth in found:
        expected = truth.token_ids[truth.positions.start :]
        got = ours[truth.request.name]
        wrong = [i for i, pair in enumerate(zip(got, expected, strict=True)) if pair[0] != pair[1]]
        if wrong:
            different += 1
            without += not truth.gaps.excuses(truth.positions[wrong[0]] - 1)
    return different, without


def route_difference(model_dir: Path, found: Sequence[Truth]) -> float:
    """Largest difference of any expert's score between prefill and token-by-token decode, fp32."""
    engines = Engines(model_dir, "float32")
    engine = engines.get()
    original, scores = LAYERS.moe_route, []

    def noted(logits: Tensor, *args: Any, **kwargs: Any) -> Any:
        scores.append(logits.sigmoid())
        return original(logits, *args, **kwargs)

    largest = 0.0
    LAYERS.moe_route = noted
    try:
        for truth in found:
            whole(engine, truth)
            num_layers = len(scores)
            at_once = [each[truth.positions.start : -1] for each in scores]
            scores.clear()
            forced(engines, "whole prompt, then alone", [truth])
            steps = [scores[i::num_layers] for i in range(num_layers)]
            scores.clear()
            for layer, one_by_one in zip(at_once, steps, strict=True):
                decoded = torch.cat(one_by_one[1:])[: len(layer)]
                largest = max(largest, (layer[: len(decoded)] - decoded).abs().max().item())
    finally:
        LAYERS.moe_route = original
    return largest


def measure(model_dir: Path, dtype: str, found: Sequence[Truth], paths: list[str]) -> list[Row]:
    engines = Engines(model_dir, ENGINE_DTYPE.get(dtype, dtype))
    reference = torch.cat([exact(truth) for truth in found])
    base_logits = torch.cat([whole(engines.get(), truth) for truth in found])
    base = p999((base_logits - reference).abs())
    rows = [
        Row(
            dtype,
            "whole sequence in one prefill",
            base,
            _max(base_logits - reference),
            1.0,
            0,
            0,
            0,
        )
    ]
    plain = PATHS["whole prompt, then alone"](engines, [truth.request for truth in found])
    alone: Tensor | None = None
    for path in paths:
        logits = forced(engines, path, found)
        alone = logits if alone is None else alone
        answers = PATHS[path](engines, [truth.request for truth in found])
        diverging = sum(answers[name] != plain[name] for name in plain) / len(plain)
        without = unexcused(answers, found)[1] if dtype == "float32" else 0
        error = (logits - reference).abs()
        rows.append(
            Row(
                dtype=dtype,
                path=path,
                error_p999=p999(error),
                error_max=error.max().item(),
                over_whole=p999(error) / base,
                from_alone_max=_max(logits - alone),
                diverging=diverging,
                unexcused=without,
            )
        )
        show(rows[-1])
    return rows


def _max(difference: Tensor) -> float:
    return difference.abs().max().item()


def show(row: Row) -> None:
    print(
        f"{row.dtype:<9} {row.path:<34} p99.9 {row.error_p999:.2e} ({row.over_whole:.2f}x) "
        f"max {row.error_max:.2e} diverging {row.diverging:.0%} unexcused {row.unexcused}",
        flush=True,
    )


def document(rows: Sequence[Row], summary: dict[str, object]) -> str:
    """docs/numerics.md, whole: prose and table."""
    lines = [
        "# Numerics: what a path changes",
        "",
        "A request may be computed whole or in chunks, on one worker or two, alone or in a batch, "
        "from reused KV, after a swap or a failover. This page says by how much that changes "
        "logits, and how often it changes tokens (X1 in [architecture.md](architecture.md)). "
        "`python -m "
        "benchmarks.engine.numerics` measures it and writes this page; "
        f"the figures are of commit {summary['commit']}, {summary['device']}, "
        f"{summary['sequences']} sequences of 64 tokens of the demo model.",
        "",
        "- **(a)** KV that was moved, cached, spilled, swapped or fetched is bitwise what was "
        "computed: tests compare bytes on every tier and transport.",
        f"- **(b)** In fp32 greedy tokens agree wherever the top-2 gap exceeds e = {E_LOGIT:g} and "
        f"no expert's selection gap is below e_r = {E_ROUTE:g}. Measured: no logit differs between "
        f"two paths by more than {summary['e_measured']:.1e}, no expert score by more than "
        f"{summary['e_r_measured']:.1e}; sequences with an unexcused difference: "
        f"{summary['unexcused']}.",
        "- **(c)** Teacher-forced, a path's logit error against fp32 is at most 1.5 times that of "
        "the whole-prompt path of its dtype (p99.9): column `x whole`. The last column is the "
        "share of sequences whose 64 greedy tokens differ somewhere from those of the same dtype "
        "alone in a batch of one: in bf16 and fp16 a near tie falls one way or the other.",
        "- **(d)** After a failover the stream goes on from the tokens already sent: the row "
        "`re-dispatched`.",
        "",
        "Hits of every tier (device, host, cache RAM, cache disk, peer) and both transports "
        "compute the same as the row `hit`, since their bytes are the same. The bill depends on "
        "none of this.",
        "",
        "| dtype | path | logit error p99.9 | x whole | largest | diverging streams |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.dtype} | {row.path} | {row.error_p999:.1e} | {row.over_whole:.2f} | "
        f"{row.error_max:.1e} | {row.diverging:.0%} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtypes", default="float32,bfloat16,float16,fp8")
    parser.add_argument("--paths", default=",".join(PATHS), help="names or their beginnings")
    parser.add_argument("--sequences", type=int, default=24)
    parser.add_argument("--dry", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # products are small, and the accuracy is the same
    wanted = arguments.paths.split(",")
    paths = [path for path in PATHS if any(path.startswith(each) for each in wanted)]
    requests = make_requests(arguments.sequences, 6144)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        found = truths(DEMO, requests)
        largest_route = route_difference(DEMO, found[:6])
        for dtype in arguments.dtypes.split(","):
            if dtype == "fp8":
                model_dir, dequantised = make_fp8(Path(folder))
                rows += measure(model_dir, dtype, truths(dequantised, requests), paths)
            else:
                rows += measure(DEMO, dtype, found, paths)
    exactly = [row for row in rows if row.dtype == "float32"]
    summary: dict[str, object] = {
        "benchmark": "engine/numerics",
        "command": f"python -m benchmarks.engine.numerics --sequences {arguments.sequences}",
        "commit": commit(),
        "device": cpu_name(),
        "sequences": arguments.sequences,
        "e": E_LOGIT,
        "e_measured": max((row.from_alone_max for row in exactly), default=0.0),
        "e_r": E_ROUTE,
        "e_r_measured": largest_route,
        "unexcused": sum(row.unexcused for row in exactly),
    }
    print(json.dumps(summary, indent=2))
    if not arguments.dry:
        result = {**summary, "rows": [asdict(row) for row in rows]}
        RESULT.write_text(json.dumps(result, indent=2) + "\n")
        DOCUMENT.write_text(document(rows, summary))


def make_fp8(folder: Path) -> tuple[Path, Path]:
    """The demo model in FP8, and once more with those weights dequantised."""
    fp8, plain = folder / "fp8", folder / "dequantised"
    quantise(DEMO, fp8)
    shutil.copytree(DEMO, plain)
    dequantise(fp8, plain)
    return fp8, plain


def dequantise(source: Path, target: Path) -> None:
    from safetensors.torch import load_file, save_file  # noqa: PLC0415

    tensors = load_file(source / "model.safetensors")
    kept = {}
    for name, value in tensors.items():
        if name.endswith("_scale_inv"):
            continue
        scale = tensors.get(name + "_scale_inv")
        if scale is None:
            kept[name] = value.float()
        else:
            kept[name] = dequantize(value, scale, (128, 128), torch.float32)
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
