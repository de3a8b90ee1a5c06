"""The process that compiles grammars: started when first needed, killed when it is late."""

import asyncio
import sys
from asyncio.subprocess import PIPE, Process
from pathlib import Path

from tidemill.errors import FailedPrecondition

_START_S = 60.0  # it imports torch
_FRAME_BYTES = 4
_COMPILED = b"c"


class SchemaRefused(ValueError):
    """The schema cannot be compiled within bounds; `lasting` unless only its time ran out."""

    def __init__(self, problem: str, *, lasting: bool = True) -> None:
        super().__init__(problem)
        self.lasting = lasting


class GrammarProcess:
    """Speaks `tidemill.engine.grammar_compiler`'s frames; one schema at a time."""

    def __init__(self, model_dir: Path, vocab_size: int) -> None:
        module = "tidemill.engine.grammar_compiler"
        self._command = [sys.executable, "-m", module, str(model_dir), str(vocab_size)]
        self._process: Process | None = None

    async def compile(self, schema: str, *, timeout_s: float) -> str:
        """The serialised grammar. Raises SchemaRefused, FailedPrecondition."""
        answer = None
        if self._process is not None:
            answer = await self._ask(self._process, schema, timeout_s)
        if answer is None:  # there was none, or it had gone: it leaves when nobody asks
            answer = await self._ask(await self._start(), schema, timeout_s)
        if answer is None:
            raise SchemaRefused("cannot be compiled in the memory allowed")
        kind, payload = answer
        if kind != _COMPILED:
            raise SchemaRefused(payload.decode())
        return payload.decode()

    async def kill(self) -> None:
        """End the process, whatever it does; the next schema starts another."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.returncode is None:
            process.kill()
        await process.wait()

    async def _start(self) -> Process:
        self._process = await asyncio.create_subprocess_exec(
            *self._command, stdin=PIPE, stdout=PIPE
        )
        try:
            async with asyncio.timeout(_START_S):
                await _read(self._process)
        except (TimeoutError, asyncio.IncompleteReadError) as error:
            await self.kill()
            raise FailedPrecondition(
                "the grammar compiler does not start", reason="GRAMMAR_UNAVAILABLE"
            ) from error
        return self._process

    async def _ask(
        self, process: Process, schema: str, timeout_s: float
    ) -> tuple[bytes, bytes] | None:
        """The answer; None if the process died instead."""
        assert process.stdin is not None
        body = schema.encode()
        try:
            async with asyncio.timeout(timeout_s):
                process.stdin.write(len(body).to_bytes(_FRAME_BYTES, "little") + body)
                await process.stdin.drain()
                return await _read(process)
        except TimeoutError:
            await self.kill()
            problem = f"takes longer than {timeout_s:g} s to compile"
            raise SchemaRefused(problem, lasting=False) from None
        except (ConnectionError, asyncio.IncompleteReadError):
            await self.kill()
            return None


async def _read(process: Process) -> tuple[bytes, bytes]:
    """One frame: its kind and what it holds."""
    assert process.stdout is not None
    header = await process.stdout.readexactly(_FRAME_BYTES)
    frame = await process.stdout.readexactly(int.from_bytes(header, "little"))
    return frame[:1], frame[1:]
