"""Grammars for requests: this worker's vocabulary, and what has been compiled for it."""

import asyncio
import hashlib
from collections import OrderedDict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from tidemill.api.common.v1.lifecycle_pb2 import Grammar as Wanted
from tidemill.api.common.v1.lifecycle_pb2 import WorkerTask
from tidemill.errors import FailedPrecondition, InvalidRequest, Overloaded
from tidemill.kv.threads import in_thread
from tidemill.vocabulary import load_token_bytes
from tidemill.worker.grammar_process import GrammarProcess, SchemaRefused

if TYPE_CHECKING:  # these import xgrammar, which only workers that follow grammars pay for
    from tidemill.engine.grammar import Grammar, Vocabulary

COMPILE_S = 5.0

_FIELD = "response_format.json_schema.schema"
_ANY_OBJECT = '{"type": "object"}'
_MAX_WAITING = 32
_MAX_KEPT = 64
_MAX_KEPT_BYTES = 256 << 20  # as serialised, which is about what they take in memory


class Grammars:
    """Compiles each grammar once and keeps the latest; refusals are kept likewise.

    Everything here happens on the event loop, compilation in another process, and loading in
    threads.
    """

    def __init__(self, model_dir: Path, vocab_size: int, *, compile_s: float = COMPILE_S) -> None:
        self._model_dir = model_dir
        self._vocab_size = vocab_size
        self._compile_s = compile_s
        self._process = GrammarProcess(model_dir, vocab_size)
        self._turn = asyncio.Lock()
        self._vocabulary: asyncio.Task[Vocabulary] | None = None
        self._under_way: dict[bytes, asyncio.Task[Grammar]] = {}
        self._kept: OrderedDict[bytes, tuple[Grammar | SchemaRefused, int]] = OrderedDict()

    async def of(self, task: WorkerTask) -> "Grammar | None":
        """What the task's completion must conform to; None: anything.

        Raises InvalidRequest (GRAMMAR_INVALID), Overloaded while too many others are being
        compiled, FailedPrecondition (GRAMMAR_UNAVAILABLE without the xgrammar package,
        VOCABULARY_MISMATCH where the router's tokeniser is another).
        """
        if not task.HasField("grammar"):
            return None
        if find_spec("xgrammar") is None:
            raise FailedPrecondition(
                "this worker is installed without the 'grammar' extra", reason="GRAMMAR_UNAVAILABLE"
            )
        vocabulary = await self._load_vocabulary()
        if task.grammar.vocabulary_digest != vocabulary.digest:
            raise FailedPrecondition(
                "router and worker have different vocabularies", reason="VOCABULARY_MISMATCH"
            )
        try:
            return await self._compiled(_schema(task.grammar), vocabulary)
        except SchemaRefused as error:
            problem = str(error)
            raise InvalidRequest(
                f"the schema {problem}", violations=[(_FIELD, problem)], reason="GRAMMAR_INVALID"
            ) from error

    async def _compiled(self, schema: str, vocabulary: "Vocabulary") -> "Grammar":
        key = hashlib.sha256(schema.encode()).digest()
        if key in self._kept:
            self._kept.move_to_end(key)
            found, _ = self._kept[key]
            if isinstance(found, SchemaRefused):
                raise SchemaRefused(str(found))
            return found
        if key not in self._under_way:
            if len(self._under_way) >= _MAX_WAITING:
                raise Overloaded("too many grammars are being compiled", retry_after_s=1.0)
            compiling = asyncio.create_task(self._compile(key, schema, vocabulary))
            self._under_way[key] = compiling
            compiling.add_done_callback(lambda _: self._under_way.pop(key))
            compiling.add_done_callback(lambda done: done.cancelled() or done.exception())
        # Others may wait for the same one, and it is of use to the next.
        return await asyncio.shield(self._under_way[key])

    async def close(self) -> None:
        """End the compiler's process, and whoever waits for it."""
        under_way = [*self._under_way.values()]
        for compiling in under_way:
            compiling.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)
        await self._process.kill()

    async def _load_vocabulary(self) -> "Vocabulary":
        if self._vocabulary is None or (
            self._vocabulary.done() and self._vocabulary.exception() is not None
        ):
            loading = in_thread(_load_vocabulary, self._model_dir, self._vocab_size)
            self._vocabulary = asyncio.create_task(loading)
        return await asyncio.shield(self._vocabulary)

    async def _compile(self, key: bytes, schema: str, vocabulary: "Vocabulary") -> "Grammar":
        try:
            async with self._turn:
                serialised = await self._process.compile(schema, timeout_s=self._compile_s)
        except SchemaRefused as error:
            if error.lasting:
                self._keep(key, error, len(schema))
            raise
        grammar = await in_thread(_load_grammar, vocabulary, serialised)
        self._keep(key, grammar, len(serialised))
        return grammar

    def _keep(self, key: bytes, found: "Grammar | SchemaRefused", num_bytes: int) -> None:
        self._kept[key] = found, num_bytes
        while (
            len(self._kept) > _MAX_KEPT
            or sum(size for _, size in self._kept.values()) > _MAX_KEPT_BYTES
        ):
            self._kept.popitem(last=False)


def _schema(wanted: Wanted) -> str:
    return wanted.json_schema.schema if wanted.HasField("json_schema") else _ANY_OBJECT


def _load_vocabulary(model_dir: Path, size: int) -> "Vocabulary":
    from tidemill.engine.grammar import Vocabulary  # noqa: PLC0415 - imports transformers

    return Vocabulary(load_token_bytes(model_dir), size)


def _load_grammar(vocabulary: "Vocabulary", serialised: str) -> "Grammar":
    from tidemill.engine.grammar import Grammar  # noqa: PLC0415 - imports transformers

    return Grammar(vocabulary, serialised)
