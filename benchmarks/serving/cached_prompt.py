"""A long prompt's time to its first token through the whole stack: seen before, and never seen.

    python -m benchmarks.serving.cached_prompt [--roles both,split] [--tokens 2048] [--rounds 7]

The stack of `python -m services` over models/demo (or `--model`), asked by the SDK in this process.
Each round asks for a fresh random prompt, asks for it again, and so on (ABAB): first nothing of it
is held, then all of it that may be. Figures are medians, the first round left out; TTFT is from
submission to the first token. `floor` is the TTFT of a prompt of one block and a bit: the stack
itself and one step of the engine, which a cached prompt cannot avoid either, since its last token
is computed in any case. The goal is a cached TTFT of at most a tenth of the uncached one.

With role `both` one worker prefills in place and the blocks lie in its pool; with `split` the
prefill worker holds the prompt, and the decode worker holds it too from the first time.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
from pathlib import Path
from random import Random
from typing import Any

import torch

from benchmarks.provenance import ROOT, commit, device
from services.stack.demo import make_key
from services.stack.launcher import run_stack
from services.stack.plan import MODEL, Plan
from tidemill.blocks import max_hit_tokens
from tidemill.client import AsyncClient
from tidemill.text import Tokenizer

RESULT = Path(__file__).with_name("results") / "cached_prompt.json"
FLOOR_TOKENS = 70
TIMED = ("uncached", "cached", "floor")


async def ask(client: AsyncClient, prompt: list[int], hit_tokens: int) -> dict[str, float]:
    """Milliseconds: here, in the router's queue, and in prefill by the worker's own clock."""
    stream = await client.generate(
        model=MODEL, token_ids=prompt, max_tokens=2, temperature=0.0, stream=True
    )
    completion = await stream.completion()
    assert completion.usage.cache_hit_tokens == hit_tokens, completion.usage
    assert stream.ttft_s is not None
    timing = completion.timing
    return {
        "ttft_ms": 1e3 * stream.ttft_s,
        "queued_ms": 1e3 * timing.queued_s,
        "prefill_ms": 1e3 * timing.prefill_s,
    }


async def measure(plan: Plan, model: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    tokenizer = Tokenizer.load(model)
    vocabulary = range(3, tokenizer.vocab_size)
    rng = Random(0)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in TIMED}
    key = await make_key(plan, "benchmark", "cached-prompt")
    async with AsyncClient(plan.address, api_key=key, ca=plan.ca) as client:
        for _ in range(arguments.rounds + 1):
            prompt = rng.choices(vocabulary, k=arguments.tokens)
            rounds["uncached"].append(await ask(client, prompt, 0))
            rounds["cached"].append(await ask(client, prompt, max_hit_tokens(arguments.tokens)))
            short = rng.choices(vocabulary, k=FLOOR_TOKENS)
            rounds["floor"].append(await ask(client, short, 0))
    medians = {
        name: {
            part: round(statistics.median(each[part] for each in measured[1:]), 2)
            for part in measured[0]
        }
        for name, measured in rounds.items()
    }
    return {
        "role": "both" if plan.both else "split",
        **medians,
        "ratio": round(medians["cached"]["ttft_ms"] / medians["uncached"]["ttft_ms"], 4),
    }


async def measure_roles(
    model: Path, scratch: Path, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """A stack for each role in turn."""
    rows: list[dict[str, Any]] = []
    for role in arguments.roles:

        async def use(plan: Plan) -> None:
            rows.append(await measure(plan, model, arguments))

        await run_stack(
            scratch / role, use, model_dir=model, both=role == "both", port=0, say=print
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--roles", type=lambda text: text.split(","), default=["both", "split"])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "demo")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = arguments.model.resolve()
        rows = asyncio.run(measure_roles(model, Path(scratch), arguments))
    report = {
        "command": f"python -m benchmarks.serving.cached_prompt --roles "
        f"{','.join(arguments.roles)} --tokens {arguments.tokens} --rounds {arguments.rounds}",
        "commit": commit(),
        "device": device(),
        "torch": torch.__version__,
        "model": arguments.model.name,
        "rows": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for row in rows:
        times = ", ".join(f"{name} {row[name]['ttft_ms']:.1f}" for name in row if name in TIMED)
        print(f"{row['role']:>6}: TTFT ms: {times}; cached / uncached {row['ratio']:.3f}")


if __name__ == "__main__":
    main()
