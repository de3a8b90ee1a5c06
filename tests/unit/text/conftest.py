"""A small byte-level BPE in a model folder, laid out as Hugging Face lays one out."""

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from tidemill.text import Tokenizer

CORPUS = [
    "The tide mill grinds by the tide: the pools swell by day and shrink by night.",
    "A token is billed for what really happened to it, computed or reused.",
    "水车随潮而转。",
    "Der Müller zählt die Säcke 🌊🌊 und schreibt es auf.",
]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'system' and not loop.first %}"
    "{{ raise_exception('system must come first') }}{% endif %}"
    "<|{{ message.role }}|>{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)


def write_model_folder(folder: Path) -> None:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    tokenizer.add_tokens(["<think>", "</think>", "two words", "\uff5cwide\uff5c"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": True,
        "bos_token": "<|begin|>",
        "eos_token": {"__type": "AddedToken", "content": "<|end|>", "normalized": True},
        "chat_template": TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    generation = {"eos_token_id": [1, 3], "temperature": 0.6, "top_p": 0.95}
    (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")


@pytest.fixture(scope="session")
def pristine_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_model_folder(folder)
    return folder


@pytest.fixture
def model_dir(pristine_dir: Path, tmp_path: Path) -> Path:
    """A copy that the test may break."""
    for path in pristine_dir.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.fixture(scope="session")
def tokenizer(pristine_dir: Path) -> Tokenizer:
    return Tokenizer.load(pristine_dir)


@pytest.fixture(scope="session")
def library(pristine_dir: Path) -> tokenizers.Tokenizer:
    """The same vocabulary in the tokenizers library: the truth for decoding."""
    return tokenizers.Tokenizer.from_file(str(pristine_dir / "tokenizer.json"))
