"""Compiles JSON schemas into grammars, in a process that may be killed.

A schema's author can make its compilation take hours or all memory, and the compiler is C++ that
nothing interrupts. The parent writes schemas to standard input and reads answers from standard
output, each as a frame; it kills this process when an answer is late.
"""

import os
import random
import resource
import select
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import BinaryIO

import xgrammar

from tidemill.engine.grammar import mask_of, tokenizer_info
from tidemill.engine.grammar_schema import check_schema
from tidemill.vocabulary import load_token_bytes

FRAME_BYTES = 4  # of a frame's length, little-endian
READY, COMPILED, REFUSED = b"r", b"c", b"n"  # what a frame from here begins with

MAX_COMPILED_BYTES = 32 << 20
IDLE_S = 120.0
LONGEST_S = 60  # of one compilation, should the parent have died meanwhile
WHITESPACE = 32  # characters between two tokens of JSON: what a model likes to indent by
_MEMORY_BYTES = 1 << 30  # beyond what the process holds when it is ready
_PROBED_TOKENS = 24
_SLOWEST_TOKEN_S = 0.03  # of CPU time; each is a pause of everybody in the batch


class Compiler:
    """Compiles for one vocabulary."""

    def __init__(self, token_bytes: list[bytes], vocab_size: int) -> None:
        self._vocab_size = vocab_size
        info = tokenizer_info(token_bytes, vocab_size)
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)

    def compile(self, schema: str) -> str:
        """The grammar, serialised. ValueError: the schema cannot be taken, and why."""
        check_schema(schema)
        with _Warnings() as warnings:
            try:
                compiled = self._compiler.compile_json_schema(schema, max_whitespace_cnt=WHITESPACE)
            except (RuntimeError, MemoryError) as error:
                raise ValueError(_reason(str(error))) from error
        if warned := warnings.text:
            raise ValueError(_reason(warned))
        self._probe(compiled)
        serialised: str = compiled.serialize_json()
        if len(serialised) > MAX_COMPILED_BYTES:
            raise ValueError("is too large once compiled")
        return serialised

    def _probe(self, compiled: xgrammar.CompiledGrammar) -> None:
        """Walk a little: something must fit the grammar, and no step may take long."""
        matcher = xgrammar.GrammarMatcher(compiled, terminate_without_stop_token=True)
        bitmask = xgrammar.allocate_token_bitmask(1, self._vocab_size)
        chance = random.Random(0)
        for step in range(_PROBED_TOKENS):
            started = time.thread_time()
            matcher.fill_next_token_bitmask(bitmask)
            ids = mask_of(bitmask, self._vocab_size).nonzero().flatten().tolist()
            if not ids and step == 0:
                raise ValueError("fits no JSON at all")
            if not ids or matcher.is_terminated():
                return
            matcher.accept_token(chance.choice(ids))
            if time.thread_time() - started > _SLOWEST_TOKEN_S:
                raise ValueError("takes too long for each token")


class _Warnings:
    """What the compiler prints meanwhile: it warns there of what it will not enforce."""

    def __enter__(self) -> "_Warnings":
        self._file = tempfile.TemporaryFile()
        sys.stderr.flush()
        self._stderr = os.dup(2)
        os.dup2(self._file.fileno(), 2)
        return self

    def __exit__(self, *_: object) -> None:
        os.dup2(self._stderr, 2)
        os.close(self._stderr)
        self._file.seek(0)
        self.text = self._file.read().decode(errors="replace")
        self._file.close()


def _reason(printed: str) -> str:
    """The compiler's first line without its clock and source place."""
    line = printed.strip().splitlines()[0] if printed.strip() else "cannot be compiled"
    return (
        line.rpartition("Warning: ")[2].partition(".cc:")[2].partition(": ")[2]
        or (line.rpartition("Warning: ")[2])
    )


def _limit_memory() -> None:
    """More private memory than now and `_MEMORY_BYTES` is refused, where the system can."""
    status = Path("/proc/self/status")
    if status.exists():
        (held,) = [line for line in status.read_text().splitlines() if line.startswith("VmData")]
        limit = int(held.split()[1]) * 1024 + _MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _write(output: BinaryIO, kind: bytes, payload: bytes) -> None:
    output.write((len(payload) + 1).to_bytes(FRAME_BYTES, "little") + kind + payload)
    output.flush()


def main(model_dir: Path, vocab_size: int) -> None:
    """Answer until standard input ends, or nobody has asked for IDLE_S."""
    source, output = sys.stdin.buffer, sys.stdout.buffer
    compiler = Compiler(load_token_bytes(model_dir), vocab_size)
    _limit_memory()
    _write(output, READY, b"")
    while select.select([source], [], [], IDLE_S)[0]:
        header = source.read(FRAME_BYTES)
        if len(header) < FRAME_BYTES:
            return
        schema = source.read(int.from_bytes(header, "little")).decode()
        signal.alarm(LONGEST_S)  # whose default is to end the process, also in C++
        try:
            _write(output, COMPILED, compiler.compile(schema).encode())
        except ValueError as error:
            _write(output, REFUSED, str(error).encode())
        signal.alarm(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
