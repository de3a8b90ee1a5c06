"""What router, gRPC, TLS, hand-over and metering cost: the whole stack against its bare engine.

    python -m benchmarks.serving.overhead [--roles both,split] [--batches 1,8] [--rounds 5]

Random bf16 weights of a small DeepSeek-V3 (489 M parameters, facts as in benchmarks.engine.peers),
or `--model DIRECTORY`. Random 128-token prompts, fresh in every round so that nothing is reused;
greedy, 33 tokens each. Each round asks the running stack (this process is its client), then steps
a bare `tidemill.engine` in this process with the same prompts and as many threads as one worker
of that stack has; what the other side is doing meanwhile is nothing. Figures are medians over the
rounds. TTFT is from submission to the first token, of the middle request of a batch; TPOT is
(end - first token) / (tokens - 1); tokens/s counts all completion tokens over the whole round.
OpenMP's threads sleep while they wait, on both sides: threads that spin take the processors from
the stack's other processes, and would measure little else on a small machine.

Floors. TTFT: the bare engine's own, plus the path of a first token, client to router to decode to
prefill and back, each a gRPC round trip over TLS; `router_rtt_ms`, measured in the same run on a
call that computes nothing, is one of the three. TPOT: the bare engine's own; a token's way back
overlaps the next step, so what is added is the processor time of two relays a message, which on a
machine without spare cores comes off the engine's. `both` is one worker process, without a
hand-over; under `split` two workers share the processors, and prefill of one request runs beside
the decoding of another.
"""

import argparse
import asyncio
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from benchmarks.engine.peers import make_checkpoint
from benchmarks.provenance import commit, cpu_name
from services.stack.demo import make_key
from services.stack.launcher import run_stack
from services.stack.plan import MODEL, Plan
from tidemill.client import AsyncClient
from tidemill.engine import Engine, EngineConfig, PrefilledOutput, SamplingParams, Sequence
from tidemill.text import Tokenizer as ModelTokenizer

PROMPT_TOKENS = 128
NEW_TOKENS = 33
RESULT = Path(__file__).with_name("results") / "overhead.json"

Prompts = list[list[int]]


@dataclass(frozen=True)
class Measured:
    """One side in one round. Seconds; `ttft` and `tpot` of the batch's middle request."""

    ttft: float
    tpot: float
    tokens_per_s: float


@dataclass(frozen=True)
class Row:
    """Medians of one batch size; the ratio is the stack's rate over the engine's."""

    role: str
    batch: int
    threads: int
    stack_ttft_ms: float
    engine_ttft_ms: float
    added_ttft_ms: float
    stack_tpot_ms: float
    engine_tpot_ms: float
    stack_tokens_per_s: float
    engine_tokens_per_s: float
    tokens_per_s_ratio: float
    router_rtt_ms: float


def write_tokenizer(directory: Path) -> None:
    """A byte-level vocabulary of the checkpoint's size, so that the router can spell answers."""
    size = json.loads((directory / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    longer = ("".join(three) for three in itertools.product(map(chr, range(97, 123)), repeat=4))
    words = [*alphabet, *itertools.islice(longer, size - len(alphabet))]
    vocabulary = {word: token_id for token_id, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))


def summary(ttfts: list[float], ends: list[float], counts: list[int], elapsed: float) -> Measured:
    """One round from each request's seconds to its first and last token, and its tokens."""
    tpots = [
        (end - first) / (count - 1)
        for first, end, count in zip(ttfts, ends, counts, strict=True)
        if count > 1
    ]
    return Measured(statistics.median(ttfts), statistics.median(tpots), sum(counts) / elapsed)


async def ask_stack(client: AsyncClient, prompts: Prompts) -> Measured:
    """All prompts at once, through the router."""

    async def one(prompt: list[int]) -> tuple[float, float, int]:
        asked = time.perf_counter()
        stream = await client.generate(
            model=MODEL, token_ids=prompt, max_tokens=NEW_TOKENS, temperature=0.0, stream=True
        )
        completion = await stream.completion()
        completion.usage.check()
        assert completion.usage.cache_hit_tokens == 0
        assert stream.ttft_s is not None
        return stream.ttft_s, time.perf_counter() - asked, len(completion.token_ids)

    started = time.perf_counter()
    answers = await asyncio.gather(*(one(prompt) for prompt in prompts))
    elapsed = time.perf_counter() - started
    ttfts, ends, counts = (list(column) for column in zip(*answers, strict=True))
    return summary(ttfts, ends, counts, elapsed)


def ask_engine(engine: Engine, prompts: Prompts, stop_token_ids: frozenset[int]) -> Measured:
    """All prompts at once, in this process."""
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, stop_token_ids=stop_token_ids)
    blocks_each = -(-(PROMPT_TOKENS + NEW_TOKENS) // 64)
    seqs = {
        str(number): Sequence(
            str(number), prompt, block_table=engine.pool.allocate(blocks_each), sampling=sampling
        )
        for number, prompt in enumerate(prompts)
    }
    firsts: dict[str, float] = {}
    lasts: dict[str, float] = {}
    started = time.perf_counter()
    for seq in seqs.values():
        engine.submit(seq)
    while engine.has_work:
        outputs = engine.step()
        now = time.perf_counter() - started
        for output in outputs:
            if isinstance(output, PrefilledOutput):
                firsts[output.seq_id] = now
            lasts[output.seq_id] = now
    elapsed = time.perf_counter() - started
    for seq in seqs.values():
        engine.pool.release(seq.block_table)
    counts = [seq.num_generated for seq in seqs.values()]
    return summary([firsts[each] for each in seqs], [lasts[each] for each in seqs], counts, elapsed)


async def round_trip(client: AsyncClient) -> float:
    """Median seconds of a call that the router answers by itself."""
    seconds = []
    for _ in range(30):
        started = time.perf_counter()
        await client.models()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


async def measure(
    plan: Plan, model_dir: Path, threads: int, arguments: argparse.Namespace
) -> list[Row]:
    """All batch sizes against one running stack."""
    largest = max(arguments.batches)
    config = EngineConfig(num_blocks=4 * largest, max_batch=largest, num_threads=threads)
    loop = asyncio.get_running_loop()
    # One thread for all that the engine does, as in a worker: OpenMP keeps a team for each caller.
    thread = ThreadPoolExecutor(1)
    engine = await loop.run_in_executor(thread, Engine.load, model_dir, config)
    tokenizer = ModelTokenizer.load(model_dir)
    vocabulary = range(2, min(tokenizer.vocab_size, engine.model_config.vocab_size))
    rng = Random(0)
    rows = []
    key = await make_key(plan, "benchmark", "overhead")
    async with AsyncClient(plan.address, api_key=key, ca=plan.ca) as client:
        for batch in arguments.batches:
            stack, bare = [], []
            for _ in range(arguments.rounds + 1):
                prompts = [rng.choices(vocabulary, k=PROMPT_TOKENS) for _ in range(batch)]
                stack.append(await ask_stack(client, prompts))
                ask = partial(ask_engine, engine, prompts, tokenizer.eos_ids)
                bare.append(await loop.run_in_executor(thread, ask))
            # The first round warms both sides up.
            rtt = await round_trip(client)
            rows.append(
                row(
                    role="both" if plan.both else "split",
                    batch=batch,
                    threads=threads,
                    stack=stack[1:],
                    bare=bare[1:],
                    rtt=rtt,
                )
            )
    return rows


def row(
    *, role: str, batch: int, threads: int, stack: list[Measured], bare: list[Measured], rtt: float
) -> Row:
    """Medians of all rounds."""

    def middle(side: list[Measured], name: str) -> float:
        values: list[float] = [getattr(each, name) for each in side]
        return statistics.median(values)

    added = [ours.ttft - its.ttft for ours, its in zip(stack, bare, strict=True)]
    rates = middle(stack, "tokens_per_s"), middle(bare, "tokens_per_s")
    return Row(
        role=role,
        batch=batch,
        threads=threads,
        stack_ttft_ms=round(middle(stack, "ttft") * 1e3, 2),
        engine_ttft_ms=round(middle(bare, "ttft") * 1e3, 2),
        added_ttft_ms=round(statistics.median(added) * 1e3, 2),
        stack_tpot_ms=round(middle(stack, "tpot") * 1e3, 2),
        engine_tpot_ms=round(middle(bare, "tpot") * 1e3, 2),
        stack_tokens_per_s=round(rates[0], 1),
        engine_tokens_per_s=round(rates[1], 1),
        tokens_per_s_ratio=round(rates[0] / rates[1], 3),
        router_rtt_ms=round(rtt * 1e3, 2),
    )


async def measure_roles(model_dir: Path, scratch: Path, arguments: argparse.Namespace) -> list[Row]:
    """A stack for each role in turn."""
    rows: list[Row] = []
    for role in arguments.roles:
        both = role == "both"
        threads = max((os.cpu_count() or 1) // (1 if both else 2), 1)

        async def use(plan: Plan, threads: int = threads) -> None:
            rows.extend(await measure(plan, model_dir, threads, arguments))

        await run_stack(scratch / role, use, model_dir=model_dir, both=both, port=0, say=print)
    return rows


def report(rows: list[Row], model: str, arguments: argparse.Namespace) -> None:
    """Print the table and write the results file."""
    print(f"{'role':>6} {'batch':>5} {'TTFT ms':>20} {'added':>8} {'TPOT ms':>18} {'tokens/s':>18}")
    for each in rows:
        ttft = f"{each.stack_ttft_ms:.1f} vs {each.engine_ttft_ms:.1f}"
        tpot = f"{each.stack_tpot_ms:.2f} vs {each.engine_tpot_ms:.2f}"
        rate = f"{each.stack_tokens_per_s:.1f} vs {each.engine_tokens_per_s:.1f}"
        print(
            f"{each.role:>6} {each.batch:>5} {ttft:>20} {each.added_ttft_ms:>8.1f} {tpot:>18} "
            f"{rate:>18}  {each.tokens_per_s_ratio:.1%}"
        )
    result = {
        "benchmark": "serving/overhead",
        "command": f"python -m benchmarks.serving.overhead --roles {','.join(arguments.roles)} "
        f"--batches {','.join(map(str, arguments.batches))} --rounds {arguments.rounds}",
        "commit": commit(),
        "device": f"{cpu_name()}, {os.cpu_count()} cores",
        "load_average": round(os.getloadavg()[1], 1),
        "torch": torch.__version__,
        "model": model,
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "rows": [asdict(each) for each in rows],
    }
    arguments.result.parent.mkdir(parents=True, exist_ok=True)
    arguments.result.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--roles", type=lambda text: text.split(","), default=["both", "split"], help="of the stack"
    )
    parser.add_argument(
        "--batches", type=lambda text: [int(number) for number in text.split(",")], default=[1, 8]
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", type=Path, help="Hugging Face folder; default: random, 489 M")
    parser.add_argument("--result", type=Path, default=RESULT)
    arguments = parser.parse_args()
    if "OMP_WAIT_POLICY" not in os.environ:  # read when torch is imported: start anew
        os.environ["OMP_WAIT_POLICY"] = "passive"
        command = [sys.executable, "-m", "benchmarks.serving.overhead", *sys.argv[1:]]
        os.execv(sys.executable, command)  # noqa: S606 - this very program
    with tempfile.TemporaryDirectory() as scratch:
        model_dir = arguments.model
        if model_dir is None:
            model_dir = Path(scratch) / "checkpoint"
            make_checkpoint(model_dir)
            write_tokenizer(model_dir)
        rows = asyncio.run(measure_roles(model_dir.resolve(), Path(scratch), arguments))
        model = "random DeepSeek-V3, 489 M, bfloat16" if not arguments.model else model_dir.name
        report(rows, model, arguments)


if __name__ == "__main__":
    main()
