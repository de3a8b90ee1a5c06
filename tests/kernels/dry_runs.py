"""What a GPU would run, on one that is not there: `python -m tests.kernels.dry_runs --out FILE`.

Each benchmark's calls, layers of DeepSeek-V3's full width, and engines from their weights to their
last token. A row tells what one of them came to. In a process of its own: the tests' has Triton's
interpreter.
"""

import argparse
import importlib
import json
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from benchmarks.kernels.run import benchmarks_here
from tests.engine_harness import make_sequence
from tests.kernels.dry_gpu import DryGpu
from tests.random_v3 import random_v3
from tidemill.engine import BlockPool, Engine, EngineConfig, KvLayout, SamplingParams
from tidemill.engine.decode_graphs import DecodeGraphs
from tidemill.engine.runner import ModelRunner
from tidemill.engine.step_cost import StepCost
from tidemill.models.deepseek import Batch, DecodeRows, DeepseekModel
from tidemill.models.prompt_rows import PromptSpan, prompt_rows

DEMO = Path(__file__).parents[2] / "models/demo"
V3_CONTEXT = 8192
SAMPLINGS = (
    SamplingParams(temperature=0, max_tokens=3),
    SamplingParams(temperature=0.8, top_k=4, top_p=0.9, min_p=0.01, seed=1, max_tokens=3),
    SamplingParams(temperature=1, repetition_penalty=1.1, logit_bias=((7, 2.0),), max_tokens=3),
    SamplingParams(temperature=0, logprobs=2, prompt_logprobs=2, max_tokens=3),
)
Run = Callable[[DryGpu], list[str] | None]  # None or a decode layer's launches


def runs() -> Iterator[tuple[str, Run]]:
    """Name -> what is run."""
    for name in benchmarks_here(()):
        yield f"benchmark {name}", partial(benchmark, name)
    for batch in (1, 8, 128):
        yield f"decode {batch}", partial(decode, batch)
    for prompts, tokens in ((1, 4095), (1, 4096), (1, 300), (3, 300)):
        yield f"prefill {prompts} {tokens}", partial(prefill, prompts, tokens)
    yield "engine demo", demo_engine
    yield "engine v3", v3_engine


def benchmark(name: str, gpu: DryGpu) -> None:
    """Every case, first as it comes, then as the timing's graph has it."""
    for work in importlib.import_module(f"benchmarks.kernels.{name}").works():
        call = work.build(0)
        call()
        with gpu.capture():
            call()


def decode(batch: int, gpu: DryGpu) -> list[str]:
    """A step of V3's full width, as a graph has it."""
    rows = torch.arange(batch, device="cuda")
    tables = (2 * rows.unsqueeze(1) + torch.arange(2, device="cuda")).int()
    step = Batch(rows + 70, tables[:, 1] * 64 + 6 + rows, DecodeRows(tables, rows + 71))
    return a_layer(gpu, step, rows)


def prefill(prompts: int, tokens: int, gpu: DryGpu) -> list[str]:
    """A step of so many chunks, the first and longest after a cached prefix."""
    chunks = [(128, 128 + tokens), (0, 65), (0, 1)][:prompts]
    spans = [PromptSpan(start, end, list(range(80))) for start, end in chunks]
    positions = torch.cat([torch.arange(each.start, each.end) for each in spans]).cuda()
    batch = Batch(positions, positions, prompts=prompt_rows(0, spans, positions.device))
    return a_layer(gpu, batch, positions)


def a_layer(gpu: DryGpu, batch: Batch, ids: Tensor) -> list[str]:
    """What a step of two layers launches that a step of one does not."""
    model = v3_layer()
    latents = torch.zeros(2, 512, 64, model.config.latent_dim, device="cuda").bfloat16()
    launched = []
    with torch.inference_mode():
        for layers in ([*model.layers], [*model.layers] * 2):
            gpu.launches.clear()
            step = DeepseekModel(**{**vars(model), "layers": layers})
            with gpu.capture():
                step.logits(step.forward(ids, batch, latents))
            launched.append([launch.name for launch in gpu.launches])
    one, two = launched
    return list((Counter(two) - Counter(one)).elements())


@cache
def v3_layer() -> DeepseekModel:
    """One layer of full width."""
    return random_v3(1, V3_CONTEXT)


def demo_engine(gpu: DryGpu) -> None:
    """From a checkpoint to the last token, swapping on the way."""
    config = EngineConfig(device="cuda", max_batch=4, max_context=512, num_blocks=16)
    generate(Engine.load(DEMO, config))


def v3_engine(gpu: DryGpu) -> None:
    """DeepSeek-V3's full width, recorded steps included."""
    config = EngineConfig(device="cuda", max_batch=4, max_context=V3_CONTEXT)
    model = v3_layer()
    pool = BlockPool(
        num_layers=1,
        num_blocks=64,
        latent_dim=model.config.latent_dim,
        dtype=torch.bfloat16,
        device="cuda",
        host_blocks=2,
    )
    graphs = DecodeGraphs(model, pool, max_batch=4, max_context=V3_CONTEXT)
    engine = Engine(
        config=config,
        model_config=model.config,
        eos_token_ids=frozenset(),
        runner=ModelRunner(model, pool, graphs),
        layout=KvLayout("bfloat16", 1, model.config.latent_dim, b"m" * 32),
        cost=StepCost(model.config, value_bytes=2),
    )
    generate(engine)


def generate(engine: Engine) -> None:
    """Prompts of several lengths, one a way to draw."""
    for index, (length, sampling) in enumerate(zip((1, 63, 200, 70), SAMPLINGS, strict=True)):
        seq = make_sequence(engine, str(index), list(range(6, 6 + length)), sampling)
        engine.submit(seq)
    while engine.has_work:
        engine.step()


def told(name: str, run: Run, gpu: DryGpu) -> dict[str, Any]:
    """The row of one run."""
    error, a_layer, begins = "", None, time.monotonic()
    gpu.clear()
    try:
        a_layer = run(gpu)
    except Exception:  # the finding itself: the next run may find more
        error = traceback.format_exc(limit=-6)
    return {
        "run": name,
        "seconds": round(time.monotonic() - begins, 1),
        "error": error,
        "launches": Counter(launch.name for launch in gpu.launches),
        "launches_a_layer": a_layer,
        "spills": dict(gpu.spills),
        "waits": Counter(f"{each.where} {each.why}" for each in gpu.waits if not each.captured),
        "captured_waits": Counter(
            f"{each.where} {each.why}" for each in gpu.waits if each.captured
        ),
    }


def main() -> None:
    """Write a row for each run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="", help="a part of the names of those to run")
    args = parser.parse_args()
    with DryGpu() as gpu:
        rows = [told(name, run, gpu) for name, run in runs() if args.only in name]
    found = {"triton": triton.__version__, "rows": rows}
    args.out.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
