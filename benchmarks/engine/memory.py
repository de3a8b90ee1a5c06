"""What loading a model takes, and what a worker's process holds beyond weights and pool.

    python -m benchmarks.engine.memory [--checkpoint DIRECTORY]

For each form of the weights (bf16 packed for the CPU, fp32, FP8 kept as bf16) a process of its own
imports all that a worker imports, loads a 489 M parameter DeepSeek-V3 (facts as in
benchmarks.engine.peers), touches its whole pool, and answers one request. Figures are the kernel's,
in MB of 10^6 bytes: peak of the resident set during the load over the bytes of the weights kept
(goal: at most 1.15), and the resident set at the end minus weights and pool (goal: at most 600 MB).

Floor. Loading cannot hold less than the weights themselves plus the tensor being converted. Beyond
weights and pool there is the interpreter with torch, grpc and their libraries, and the activations
of one step.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from benchmarks.provenance import commit, cpu_name

RESULT = Path(__file__).with_name("results") / "memory.json"
NUM_BLOCKS = 256
PROMPT_TOKENS, NEW_TOKENS = 512, 16
MB = 1e6


@dataclass(frozen=True)
class Row:
    """One process. `imports` is its resident set before loading; all sizes in MB."""

    weights: str
    kept_mb: float
    pool_mb: float
    imports_mb: float
    load_peak_mb: float
    load_peak_over_kept: float
    final_rss_mb: float
    beyond_weights_and_pool_mb: float


def status(key: str) -> int:
    """A size of this process in bytes: VmRSS, or VmHWM since `reset_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def tensor_bytes(value: Any, seen: dict[int, int] | None = None) -> int:
    """Bytes of all tensors reachable through dataclasses, sequences and attributes, each once."""
    import torch  # noqa: PLC0415  # only the measured process pays for it

    sizes = {} if seen is None else seen
    if isinstance(value, torch.Tensor):
        dense = value.layout is torch.strided
        key = value.untyped_storage().data_ptr() if dense else id(value)
        held = value.untyped_storage().nbytes() if dense else value.numel() * value.element_size()
        sizes[key] = max(sizes.get(key, 0), held)
    elif isinstance(value, list | tuple):
        for each in value:
            tensor_bytes(each, sizes)
    elif is_dataclass(value):
        for field in fields(value):
            tensor_bytes(getattr(value, field.name), sizes)
    elif type(value).__module__.startswith("tidemill"):
        for each in vars(value).values():
            tensor_bytes(each, sizes)
    return sum(sizes.values())


def measure(name: str, path: Path, dtype: str) -> Row:
    """Load and use the model in this process."""
    import tidemill.worker.process  # noqa: F401, PLC0415  # what a worker imports
    from tidemill.engine import Engine, EngineConfig, SamplingParams, Sequence  # noqa: PLC0415
    from tidemill.engine.runner import ModelRunner  # noqa: PLC0415

    imports = status("VmRSS")
    reset_peak()
    engine = Engine.load(path, EngineConfig(num_blocks=NUM_BLOCKS, dtype=dtype))
    peak = status("VmHWM") - imports - engine.pool.latents.nbytes
    engine.pool.latents.fill_(0)
    prompt = list(range(2, 2 + PROMPT_TOKENS))
    blocks = engine.pool.allocate(-(-(PROMPT_TOKENS + NEW_TOKENS) // 64))
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)
    engine.submit(Sequence("one", prompt, block_table=blocks, sampling=sampling))
    while engine.has_work:
        engine.step()
    assert isinstance(engine._runner, ModelRunner)
    kept = tensor_bytes(engine._runner.model)
    pool = engine.pool.latents.nbytes
    final = status("VmRSS")
    return Row(
        weights=name,
        kept_mb=round(kept / MB, 1),
        pool_mb=round(pool / MB, 1),
        imports_mb=round(imports / MB, 1),
        load_peak_mb=round(peak / MB, 1),
        load_peak_over_kept=round(peak / kept, 3),
        final_rss_mb=round(final / MB, 1),
        beyond_weights_and_pool_mb=round((final - kept - pool) / MB, 1),
    )


def quantise(source: Path, target: Path) -> None:
    """Write `source` once more with its products' weights in FP8, 128x128 scales."""
    import torch  # noqa: PLC0415
    from safetensors import safe_open  # noqa: PLC0415
    from safetensors.torch import save_file  # noqa: PLC0415

    tensors: dict[str, torch.Tensor] = {}
    with safe_open(source / "model.safetensors", framework="pt") as file:
        for key in file.keys():  # noqa: SIM118  # not a dict
            value = file.get_tensor(key)
            if value.dim() < 2 or "_proj" not in key:
                tensors[key] = value.clone()
                continue
            padded = torch.zeros([-(-side // 128) * 128 for side in value.shape])
            padded[: value.shape[0], : value.shape[1]] = value
            rows, columns = (side // 128 for side in padded.shape)
            tiles = padded.view(rows, 128, columns, 128)
            scale = tiles.abs().amax((1, 3)).clamp(min=1e-12) / 448.0
            scaled = (tiles / scale[:, None, :, None]).flatten(2, 3).flatten(0, 1)
            kept = scaled[: value.shape[0], : value.shape[1]].contiguous()
            tensors[key] = kept.to(torch.float8_e4m3fn)
            tensors[key + "_scale_inv"] = scale
    target.mkdir()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    (target / "config.json").write_text(json.dumps(config))


def in_process(name: str, path: Path, dtype: str) -> Row:
    command = [sys.executable, "-m", "benchmarks.engine.memory", "--measure", name]
    command += ["--checkpoint", str(path), "--dtype", dtype]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return Row(**json.loads(out.splitlines()[-1]))


def make_all(path: Path, folder: Path) -> list[Row]:
    if not (path / "config.json").exists():
        subprocess.run(
            [sys.executable, "-m", "benchmarks.engine.memory", "--make", str(path)], check=True
        )
    quantise(path, folder / "fp8")
    return [
        in_process("bf16", path, "bfloat16"),
        in_process("bf16 as fp32", path, "float32"),
        in_process("fp8 as bf16", folder / "fp8", "bfloat16"),
    ]


def show(rows: list[Row]) -> None:
    print(f"{'weights':<14} {'kept':>7} {'load peak':>16} {'RSS at end':>11} {'beyond':>7}   MB")
    for row in rows:
        peak = f"{row.load_peak_mb:.0f} = {row.load_peak_over_kept:.2f}x"
        print(
            f"{row.weights:<14} {row.kept_mb:>7.0f} {peak:>16} {row.final_rss_mb:>11.0f} "
            f"{row.beyond_weights_and_pool_mb:>7.0f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, help="reuse or create the checkpoint here")
    parser.add_argument("--measure", metavar="NAME", help="measure in this process (internal)")
    parser.add_argument("--make", type=Path, help="make the checkpoint in this process (internal)")
    parser.add_argument("--dtype", default="auto")
    arguments = parser.parse_args()
    if arguments.measure is not None:
        row = measure(arguments.measure, arguments.checkpoint, arguments.dtype)
        print(json.dumps(asdict(row)))
        return
    # transformers comes with it, which the measured processes must not hold.
    from benchmarks.engine.peers import make_checkpoint  # noqa: PLC0415

    if arguments.make is not None:
        make_checkpoint(arguments.make)
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = make_all(arguments.checkpoint or Path(folder) / "bf16", Path(folder))
    show(rows)
    result = {
        "benchmark": "engine/memory",
        "command": "python -m benchmarks.engine.memory",
        "commit": commit(),
        "device": cpu_name(),
        "num_blocks": NUM_BLOCKS,
        "rows": [asdict(row) for row in rows],
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
