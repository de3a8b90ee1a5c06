"""Bulk streams by channel options, on loopback and over a wire with a delay.

    python -m benchmarks.serving.bulk_channel [--rounds 5] [--megabytes 64]

A bare server sends messages of 2 MiB under mutual TLS to a client with INTERNAL_CLIENT and to one
with BULK_CLIENT, in turns (ABAB); figures are medians in GB/s. The wire is a relay process that
delivers every byte some milliseconds late and holds any number of them, so that only what the
receiver allows to be under way bounds the rate.
"""

import argparse
import asyncio
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import grpc

from benchmarks.provenance import ROOT, commit, device
from benchmarks.serving.cache_rpc import (
    median_rates,
    tls_files,
    until_up,
)
from benchmarks.serving.delay_link import DelayLink
from services.stack.ports import free_port
from tidemill.certs import make_dev_certs
from tidemill.rpc.channel import internal_channel
from tidemill.rpc.options import BULK_CLIENT, INTERNAL_CLIENT

RESULT = Path(__file__).with_name("results") / "bulk_channel.json"
DELAYS_MS = (0.0, 0.25, 2.0)  # one way: the same host, the same building, a far one


class Client:
    """Receives from the bare server under one set of options."""

    def __init__(self, channel: grpc.aio.Channel, num_bytes: int) -> None:
        self._send: Any = channel.unary_stream("/bare/Send")
        self._num_bytes = num_bytes

    async def receive(self) -> float:
        begun = time.perf_counter()
        total = 0
        async for message in self._send(str(self._num_bytes).encode()):
            total += len(message)
        seconds = time.perf_counter() - begun
        assert total == self._num_bytes
        return seconds


async def measure(certs: Path, port: int, rounds: int, num_bytes: int) -> dict[str, Any]:
    await until_up(certs, (port,), role="prefill")
    tls = tls_files(certs, "decode")
    options = {"internal": INTERNAL_CLIENT, "bulk": BULK_CLIENT}
    channels = {
        name: internal_channel(f"127.0.0.1:{port}", role="prefill", tls=tls, options=each)
        for name, each in options.items()
    }
    timed = {name: Client(each, num_bytes).receive for name, each in channels.items()}
    rates = await median_rates(dict(timed), num_bytes, rounds)
    for channel in channels.values():
        await channel.close()
    return rates


def relay(target_port: int, delay_ms: float) -> None:
    print(DelayLink(target_port, delay_ms / 1000).port, flush=True)
    sys.stdin.read()


def through(port: int, delay_ms: float) -> "tuple[subprocess.Popen[str] | None, int]":
    """A relay to `port` and its own port; no relay for no delay."""
    if not delay_ms:
        return None, port
    command = [sys.executable, "-m", "benchmarks.serving.bulk_channel", "--relay", str(port)]
    command += ["--delay-ms", str(delay_ms)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=ROOT, stdout=pipe, stdin=pipe, text=True)
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def run(rounds: int, num_bytes: int) -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory() as certs, tempfile.TemporaryDirectory() as shm_dir:
        make_dev_certs(Path(certs))
        port = free_port()
        command = [sys.executable, "-m", "benchmarks.serving.handover", "--port", str(port)]
        command += ["--certs", certs, "--shm", shm_dir, "--tokens", "64"]
        server = subprocess.Popen(command, cwd=ROOT)
        try:
            for delay_ms in DELAYS_MS:
                process, wire_port = through(port, delay_ms)
                rates = asyncio.run(measure(Path(certs), wire_port, rounds, num_bytes))
                if process is not None:
                    process.communicate("")
                rows.append({"one_way_ms": delay_ms, "gb_s": rates})
                medians = {name: each["median"] for name, each in rates.items()}
                print(
                    f"{delay_ms} ms: internal {medians['internal']:.3f}, "
                    f"bulk {medians['bulk']:.3f} GB/s"
                )
        finally:
            server.terminate()
            server.wait(20)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=64, help="payload per round")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--relay", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--delay-ms", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.relay is not None:
        relay(arguments.relay, arguments.delay_ms)
        return
    rows = run(arguments.rounds, arguments.megabytes * 1_000_000)
    report = {
        "command": f"python -m benchmarks.serving.bulk_channel --rounds {arguments.rounds} "
        f"--megabytes {arguments.megabytes}",
        "commit": commit(),
        "device": device(),
        "grpc": grpc.__version__,
        "python": platform.python_version(),
        "rows": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
