import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine_harness import finish_of, generated, load_engine, run_all
from tests.tiny_model import make_tiny_checkpoint
from tidemill.engine import Engine, SamplingParams, Sequence
from tidemill.engine.grammar import Grammar, Vocabulary
from tidemill.engine.grammar_compiler import Compiler
from tidemill.vocabulary import load_token_bytes

DEMO = Path(__file__).parents[2] / "models" / "demo"
PROMPT = list(range(100, 130))
EOS = 1

# Everything has an end soon, so that a model of random weights comes to it.
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
        "pet": {"anyOf": [{"type": "null"}, {"type": "boolean"}]},
    },
    "required": ["name", "age", "tags", "pet"],
    "additionalProperties": False,
}


def is_person(value: Any) -> bool:
    return (
        list(value) == ["name", "age", "tags", "pet"]
        and len(value["name"]) <= 6
        and type(value["age"]) is int
        and 0 <= value["age"] <= 120
        and len(value["tags"]) <= 3
        and set(value["tags"]) <= {"a", "b"}
        and value["pet"] in {None, True, False}
    )


SCHEMAS: list[tuple[dict[str, Any], Callable[[Any], bool]]] = [
    (PERSON, is_person),
    ({"enum": ["yes", "no", 7]}, lambda value: value in {"yes", "no", 7}),
    (
        {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
        lambda value: 2 <= len(value) <= 4 and set(value) <= {True, False},
    ),
    (
        {"type": "string", "pattern": "^[a-c]{2}-[0-9]{3}$"},
        lambda value: value[2] == "-" and value[3:].isdigit() and len(value) == 6,
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("grammar"))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return load_engine(folder, num_blocks=160)


class Grammars:
    def __init__(self, folder: Path, vocab_size: int) -> None:
        token_bytes = load_token_bytes(folder)
        self.vocabulary = Vocabulary(token_bytes, vocab_size)
        self._compiler = Compiler(token_bytes, vocab_size)

    def of(self, schema: dict[str, Any]) -> Grammar:
        return Grammar(self.vocabulary, self._compiler.compile(json.dumps(schema)))

    def text(self, token_ids: list[int]) -> str:
        return self.vocabulary.text_of(token_ids).decode()


@pytest.fixture(scope="module")
def grammars(folder: Path, engine: Engine) -> Grammars:
    return Grammars(folder, engine.model_config.vocab_size)


def bound(
    grammar: Grammar | None,
    sampling: SamplingParams,
    *,
    prompt: list[int] = PROMPT,
    relayed: int = 0,
    name: str = "s",
    engine: Engine,
) -> Sequence:
    constraint = None
    if grammar is not None:
        constraint = grammar.constraint(
            prompt, num_relayed_tokens=relayed, stop_token_ids=sampling.stop_token_ids
        )
    return Sequence(
        name,
        prompt,
        block_table=engine.pool.allocate(-(-len(prompt) // 64)),
        sampling=sampling,
        num_relayed_tokens=relayed,
        constraint=constraint,
    )


def run(engine: Engine, *seqs: Sequence) -> list[list[int]]:
    for seq in seqs:
        engine.submit(seq)
    outputs = run_all(engine)
    for seq in seqs:
        engine.pool.release(seq.block_table)
    return [generated(outputs, seq.seq_id) for seq in seqs]


def until_stop(temperature: float, seed: int = 3) -> SamplingParams:
    return SamplingParams(
        temperature=temperature, seed=seed, max_tokens=600, stop_token_ids=frozenset({EOS})
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("schema", "fits"), SCHEMAS, ids=["person", "enum", "array", "pattern"])
def test_what_a_random_model_says_fits_the_schema(
    engine: Engine,
    grammars: Grammars,
    schema: dict[str, Any],
    fits: Callable[[Any], bool],
    temperature: float,
) -> None:
    (tokens,) = run(engine, bound(grammars.of(schema), until_stop(temperature), engine=engine))
    assert tokens[-1] == EOS
    assert fits(json.loads(grammars.text(tokens)))


def test_neighbours_draw_as_they_do_alone_and_so_does_the_bound_one(
    engine: Engine, grammars: Grammars
) -> None:
    grammar = grammars.of(PERSON)
    free = SamplingParams(temperature=1.0, seed=8, max_tokens=40)

    def seqs() -> list[Sequence]:
        return [
            bound(None, free, name="free", engine=engine),
            bound(grammar, until_stop(1.0), name="bound", engine=engine),
            bound(None, replace(free, temperature=0.0), name="greedy", engine=engine),
            bound(grammar, until_stop(1.0, seed=4), name="other", engine=engine),
        ]

    together = run(engine, *seqs())
    alone = [run(engine, seq)[0] for seq in seqs()]
    assert together == alone
    assert together[1] != together[3]


def test_the_first_token_of_a_prefill_obeys_too(engine: Engine, grammars: Grammars) -> None:
    seq = bound(grammars.of({"type": "boolean"}), until_stop(1.0), engine=engine)
    seq.prefill_only = True
    engine.submit(seq)
    (output,) = run_all(engine)
    engine.pool.release(seq.block_table)
    first = grammars.text([output.first_token_id])  # type: ignore[union-attr]  # it is prefilled
    assert "true".startswith(first) or "false".startswith(first)


@pytest.mark.parametrize("relayed", [1, 5, 20])
def test_x2_a_failover_goes_on_in_the_middle_of_the_grammar(
    engine: Engine, grammars: Grammars, relayed: int
) -> None:
    grammar = grammars.of(PERSON)
    (whole,) = run(engine, bound(grammar, until_stop(1.0), engine=engine))
    resumed = bound(
        grammar,
        until_stop(1.0),
        prompt=PROMPT + whole[:relayed],
        relayed=relayed,
        engine=engine,
    )
    assert run(engine, resumed) == [whole[relayed:]]


def test_min_tokens_beyond_the_grammars_end_is_a_dead_end(
    engine: Engine, grammars: Grammars
) -> None:
    sampling = replace(until_stop(0.0), min_tokens=50)
    seq = bound(grammars.of({"type": "boolean"}), sampling, engine=engine)
    engine.submit(seq)
    outputs = run_all(engine)
    engine.pool.release(seq.block_table)
    assert finish_of(outputs, "s").reason == "dead_end"
    assert grammars.text(generated(outputs, "s")) in {"true", "false"}


def test_relayed_tokens_that_do_not_fit_are_a_dead_end(engine: Engine, grammars: Grammars) -> None:
    wrong = grammars.vocabulary.token_bytes.index(b"x")
    seq = bound(
        grammars.of({"type": "boolean"}),
        until_stop(0.0),
        prompt=[*PROMPT, wrong],
        relayed=1,
        engine=engine,
    )
    engine.submit(seq)
    outputs = run_all(engine)
    engine.pool.release(seq.block_table)
    assert finish_of(outputs, "s").reason == "dead_end"


@pytest.fixture(scope="module")
def demo() -> Grammars:
    """Its tokens are many letters long, and a thinking tag is spelt in pieces."""
    return Grammars(DEMO, 6144)


def ids_of(grammars: Grammars, text: bytes) -> list[int]:
    """Any spelling of the text."""
    ids: list[int] = []
    while text:
        found = [
            (len(token), token_id)
            for token_id, token in enumerate(grammars.vocabulary.token_bytes)
            if token and text.startswith(token)
        ]
        length, token_id = max(found)
        ids.append(token_id)
        text = text[length:]
    return ids


def allowed_after(constraint: Any, token_ids: list[int], size: int) -> set[int]:
    mask = constraint.allowed(token_ids)
    return set(range(size)) if mask is None else set(mask.nonzero().flatten().tolist())


def test_reasoning_is_free_and_the_answer_after_it_is_bound(demo: Grammars) -> None:
    grammar = demo.of({"type": "object"})
    prompt = ids_of(demo, b"Q: is it?\n<think>\n")
    constraint = grammar.constraint(prompt, num_relayed_tokens=0, stop_token_ids={0})
    size = demo.vocabulary.size
    free = allowed_after(constraint, prompt, size)
    assert 0 not in free
    assert len(free) > 0.9 * size
    spoken = prompt + ids_of(demo, b"well, 1 < 2 </thi no </think>")
    bound_now = allowed_after(constraint, spoken, size)
    texts = {demo.vocabulary.bytes_of(token_id) for token_id in bound_now}
    assert texts
    assert all(text.startswith(b"{") for text in texts)


def test_reasoning_may_not_run_over_into_the_answer(demo: Grammars) -> None:
    token_bytes = [b"", b"<think>", b"</think", b">", b">\n", b">x", b"x</think>y", b"{", b"}"]
    vocabulary = Vocabulary(token_bytes, len(token_bytes))
    compiled = Compiler(token_bytes, len(token_bytes)).compile('{"type": "object"}')
    constraint = Grammar(vocabulary, compiled).constraint(
        [1], num_relayed_tokens=0, stop_token_ids={0}
    )
    assert allowed_after(constraint, [1], 9) == {1, 2, 3, 4, 5, 7, 8}
    assert allowed_after(constraint, [1, 2], 9) == {1, 2, 3, 4, 7, 8}
    assert allowed_after(constraint, [1, 2, 4], 9) == {7}
    assert allowed_after(constraint, [1, 2, 4, 7, 8], 9) == {0}


def test_a_prompt_that_does_not_end_in_thinking_is_bound_at_once(demo: Grammars) -> None:
    prompt = ids_of(demo, b"<think>yes</think>\n")
    constraint = demo.of({"type": "boolean"}).constraint(
        prompt, num_relayed_tokens=0, stop_token_ids={0}
    )
    ids = allowed_after(constraint, prompt, demo.vocabulary.size)
    texts = {demo.vocabulary.bytes_of(token_id) for token_id in ids}
    assert all(b"true".startswith(text) or b"false".startswith(text) for text in texts)


@pytest.mark.parametrize("seed", range(12))
def test_random_walks_over_a_large_vocabulary_are_json(demo: Grammars, seed: int) -> None:
    chance = random.Random(seed)
    schema, fits = SCHEMAS[seed % len(SCHEMAS)]
    constraint = demo.of(schema).constraint([9], num_relayed_tokens=0, stop_token_ids={0})
    ids = [9]
    while ids[-1] != 0:
        mask = constraint.allowed(ids)
        assert mask is not None
        choices = mask.nonzero().flatten().tolist()
        ids.append(0 if 0 in choices else chance.choice(choices))
        assert len(ids) < 3000
    assert fits(json.loads(demo.text(ids[1:-1])))


def test_masks_are_as_wide_as_the_models_vocabulary(folder: Path) -> None:
    grammars = Grammars(folder, 520)  # more rows than the tokeniser has tokens
    constraint = grammars.of({"type": "object"}).constraint(
        PROMPT, num_relayed_tokens=0, stop_token_ids={EOS}
    )
    mask = constraint.allowed(PROMPT)
    assert mask is not None
    assert mask.shape == (520,)
    assert mask.dtype == torch.bool
    assert not mask[512:].any()


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        ({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "fits no JSON"),
        ({"$ref": "#/$defs/nowhere"}, "Cannot find field"),
        ({"$ref": "https://example.com/schema"}, "URI should"),
        ({"type": "purple"}, "Unsupported type"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum greater than maximum"),
        ({"enum": []}, "must not be empty"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"type": "string", "pattern": "a", "maxLength": 3}, "not supported"),
        ({"type": "string", "pattern": "^(?=a)b"}, "Lookahead"),
        ({"type": "string", "pattern": r"^(a)\1$"}, "Backreference"),
        ({"type": "string", "pattern": "(("}, "Regex"),
    ],
    ids=str,
)
def test_what_the_compiler_cannot_enforce_is_refused(
    grammars: Grammars, schema: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        grammars.of(schema)
