"""The tokeniser agrees with transformers on the same folder, and refuses what it cannot do."""

import json
from pathlib import Path
from typing import Any

import pytest

from tidemill.errors import CheckpointError, InvalidRequest
from tidemill.text import ChatMessage, SamplingDefaults, Tokenizer
from tidemill.vocabulary import load_token_bytes, vocabulary_digest

CONVERSATION = [
    ChatMessage("system", 'Be <brief> & "short".'),
    ChatMessage("user", "What is a tide mill? 水车 {{ 7 * 7 }}"),
    ChatMessage("assistant", "A mill."),
    ChatMessage("user", "Go on."),
]


def rewrite(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    kept = {key: value for key, value in (content | changes).items() if value is not None}
    path.write_text(json.dumps(kept), encoding="utf-8")


LINES = """
{% for message in messages %}
    {% if message.role == "assistant" %}
        {% continue %}
    {% endif %}
    {{ message.role }}: {{ message.content | tojson }}
{% endfor %}
{{ add_generation_prompt }} {{ eos_token }}
"""
BEGIN_BY_PROCESSOR = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": "<|begin|>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {"<|begin|>": {"id": "<|begin|>", "ids": [0], "tokens": ["<|begin|>"]}},
}


@pytest.mark.parametrize("template", [None, LINES])
@pytest.mark.parametrize("processor", [None, BEGIN_BY_PROCESSOR])
def test_chat_and_decoding_agree_with_transformers(
    model_dir: Path, template: str | None, processor: dict[str, Any] | None
) -> None:
    from transformers import AutoTokenizer  # noqa: PLC0415  # slow to import

    if template is not None:
        rewrite(model_dir / "tokenizer_config.json", chat_template=template)
    rewrite(model_dir / "tokenizer.json", post_processor=processor)
    ours = Tokenizer.load(model_dir)
    theirs = AutoTokenizer.from_pretrained(str(model_dir))
    messages = [{"role": message.role, "content": message.content} for message in CONVERSATION]
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    ids = ours.encode_chat(CONVERSATION)
    assert ids == expected
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.encode("A token.")[1:] == theirs.encode("A token.", add_special_tokens=False)
    assert ours.encode("A token.")[0] == 0


def test_padding_and_truncation_left_in_the_file_are_ignored(model_dir: Path) -> None:
    rewrite(
        model_dir / "tokenizer.json",
        truncation={"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        padding={
            "strategy": {"Fixed": 40},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 2,
            "pad_type_id": 0,
            "pad_token": "<|system|>",
        },
    )
    loaded = Tokenizer.load(model_dir)
    assert loaded.decode(loaded.encode("a tide mill and its pools")) == "a tide mill and its pools"
    assert loaded.encode("a")[-1] != 2


def test_a_prompt_starts_with_the_models_begin_token_once(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("tide")
    assert ids[0] == 0
    assert tokenizer.encode("<|begin|>tide") == ids
    assert tokenizer.decode(ids) == "tide"


def test_a_folder_says_what_ends_and_how_to_sample(tokenizer: Tokenizer) -> None:
    assert tokenizer.eos_ids == {1, 3}
    assert tokenizer.defaults == SamplingDefaults(temperature=0.6, top_p=0.95, top_k=0)
    assert tokenizer.vocab_size == len(tokenizer.token_bytes)


def test_every_sampling_value_that_the_folder_advises_is_read(model_dir: Path) -> None:
    advice: dict[str, Any] = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.05}
    rewrite(model_dir / "generation_config.json", **advice, repetition_penalty=1.1)
    loaded = Tokenizer.load(model_dir)
    assert loaded.defaults == SamplingDefaults(**advice, repetition_penalty=1.1)


def test_a_worker_finds_the_same_vocabulary_in_the_folder(
    tokenizer: Tokenizer, model_dir: Path
) -> None:
    assert vocabulary_digest(load_token_bytes(model_dir)) == tokenizer.vocabulary_digest


def test_without_generation_config_the_end_token_ends(model_dir: Path) -> None:
    (model_dir / "generation_config.json").unlink()
    loaded = Tokenizer.load(model_dir)
    assert loaded.eos_ids == {1}
    assert loaded.defaults == SamplingDefaults()


def test_a_bare_tokeniser_needs_no_other_file(model_dir: Path) -> None:
    for name in ("generation_config.json", "tokenizer_config.json"):
        (model_dir / name).unlink()
    loaded = Tokenizer.load(model_dir)
    assert loaded.eos_ids == frozenset()
    assert 0 not in loaded.encode("tide")
    with pytest.raises(InvalidRequest, match="this model has none: send a prompt"):
        loaded.encode_chat(CONVERSATION)


def test_a_template_in_a_file_of_its_own_wins(model_dir: Path) -> None:
    (model_dir / "chat_template.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
    ids = Tokenizer.load(model_dir).encode_chat([ChatMessage("user", "tide")])
    assert Tokenizer.load(model_dir).decode(ids) == "tide"


def test_digest_changes_with_whatever_changes_the_ids(model_dir: Path) -> None:
    digests = {Tokenizer.load(model_dir).digest}
    rewrite(model_dir / "generation_config.json", temperature=0.1)
    digests.add(Tokenizer.load(model_dir).digest)
    assert len(digests) == 1
    rewrite(model_dir / "tokenizer_config.json", add_bos_token=False)
    digests.add(Tokenizer.load(model_dir).digest)
    rewrite(model_dir / "tokenizer_config.json", chat_template="x")
    digests.add(Tokenizer.load(model_dir).digest)
    assert len(digests) == 3
    assert {len(digest) for digest in digests} == {32}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "prompt is empty"),
        ("x" * 101, "prompt has 101 characters, at most 100 bytes"),
        ("潮" * 40, "prompt has 120 bytes, at most 100"),
        ("a\ud800b", "prompt is not valid Unicode"),
    ],
)
def test_a_prompt_out_of_bounds_is_refused(tokenizer: Tokenizer, text: str, problem: str) -> None:
    with pytest.raises(InvalidRequest, match=problem) as caught:
        tokenizer.encode(text, max_bytes=100)
    assert caught.value.violations[0][0] == "prompt"


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([], "messages"),
        ([ChatMessage("user", "a")] * 1025, "messages"),
        ([ChatMessage("user", "a"), ChatMessage("tool", "b")], "messages[1].role"),
        ([ChatMessage("user", "")], "messages[0].content"),
        ([ChatMessage("user", "a\udfff")], "messages"),
        ([ChatMessage("user", "a" * 60), ChatMessage("user", "b" * 60)], "messages"),
        ([ChatMessage("user", "a"), ChatMessage("system", "late")], "messages"),
    ],
)
def test_a_conversation_that_cannot_be_is_refused(
    tokenizer: Tokenizer, messages: list[ChatMessage], field: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        tokenizer.encode_chat(messages, max_bytes=100)
    assert [name for name, _ in caught.value.violations] == [field]


def test_the_templates_own_refusal_reaches_the_caller(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="refuses the conversation: system must come first"):
        tokenizer.encode_chat([ChatMessage("user", "a"), ChatMessage("system", "late")])


def test_a_template_cannot_reach_out_of_its_sandbox(model_dir: Path) -> None:
    escape = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    rewrite(model_dir / "tokenizer_config.json", chat_template=escape)
    with pytest.raises(InvalidRequest, match="refuses the conversation"):
        Tokenizer.load(model_dir).encode_chat([ChatMessage("user", "a")])
    rewrite(model_dir / "tokenizer_config.json", chat_template="{{ messages.append(1) }}")
    with pytest.raises(InvalidRequest, match="refuses the conversation"):
        Tokenizer.load(model_dir).encode_chat([ChatMessage("user", "a")])


@pytest.mark.parametrize("bad", [[], [-1], [0, 10**6], [1 << 31]])
def test_unknown_token_ids_are_refused(tokenizer: Tokenizer, bad: list[int]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        tokenizer.check_ids(bad)
    assert caught.value.violations[0][0] == "token_ids"


def test_every_id_of_the_vocabulary_is_accepted(tokenizer: Tokenizer) -> None:
    tokenizer.check_ids(range(tokenizer.vocab_size))


def test_a_hole_in_the_vocabulary_is_no_token(model_dir: Path) -> None:
    path = model_dir / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    moved = max(vocabulary, key=vocabulary.__getitem__)
    hole, vocabulary[moved] = vocabulary[moved], 1000
    path.write_text(json.dumps(content), encoding="utf-8")
    loaded = Tokenizer.load(model_dir)
    with pytest.raises(InvalidRequest, match="which is no token"):
        loaded.check_ids([hole])


@pytest.mark.parametrize("prompt", ["a<think>", "a<think>\n", "a<think> \n"])
def test_a_prompt_that_ends_with_the_tag_opens_reasoning(tokenizer: Tokenizer, prompt: str) -> None:
    assert tokenizer.opens_reasoning(tokenizer.encode(prompt))
    assert not tokenizer.opens_reasoning(tokenizer.encode(prompt + "b"))


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("tokenizer.json", "{}", "is no tokeniser"),
        ("tokenizer.json", "not json", "is no tokeniser"),
        ("tokenizer_config.json", "[]", "must hold a JSON object"),
        ("tokenizer_config.json", "{", "cannot be read"),
        ("tokenizer_config.json", '{"chat_template": 3}', "chat_template must be text"),
        ("tokenizer_config.json", '{"chat_template": "{% if %}"}', "chat template is broken"),
        ("tokenizer_config.json", '{"add_bos_token": true, "bos_token": "<s>"}', "bos_token '<s>'"),
        ("generation_config.json", '{"eos_token_id": 99999}', "eos_token_id 99999 is no token"),
        ("generation_config.json", '{"eos_token_id": ["1"]}', "eos_token_id '1' is no token"),
        ("generation_config.json", '{"temperature": "hot"}', "a sampling value is wrong"),
        ("generation_config.json", '{"min_p": 1.5}', "min_p is out of range"),
    ],
)
def test_a_broken_folder_names_the_file(
    model_dir: Path, name: str, content: str, problem: str
) -> None:
    (model_dir / name).write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=problem) as caught:
        Tokenizer.load(model_dir)
    assert name in str(caught.value)


def test_a_missing_tokeniser_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.load(tmp_path)


def test_a_decoder_that_is_not_byte_level_is_refused(model_dir: Path) -> None:
    rewrite(model_dir / "tokenizer.json", decoder={"type": "Fuse"})
    with pytest.raises(CheckpointError, match="decoder is 'Fuse', only 'ByteLevel' is supported"):
        Tokenizer.load(model_dir)
