"""Token streams and training windows, all of them functions of a seed."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from training.tokenizer import ASSISTANT, BOS, END_THINK, EOS, SYSTEM, THINK, USER

Tokens = NDArray[np.uint16]


def render(record: dict[str, str]) -> str:
    """A record as the model sees it: as the chat template writes it, or as a bare document."""
    if record["kind"] == "text":
        return f"{BOS}{record['text']}{EOS}"
    system = f"{SYSTEM}{record['system']}" if record["system"] else ""
    thinking = f"{THINK}{record['thinking']}{END_THINK}" if record["thinking"] else ""
    return f"{BOS}{system}{USER}{record['question']}{ASSISTANT}{thinking}{record['answer']}{EOS}"


def read_documents(path: Path, tokenizer: Tokenizer, kinds: tuple[str, ...]) -> list[Tokens]:
    """Each record of the given kinds as token ids."""
    lines = path.read_text(encoding="utf-8").splitlines()
    chosen = [record for record in map(json.loads, lines) if record["kind"] in kinds]
    encoded = tokenizer.encode_batch([render(r) for r in chosen], add_special_tokens=False)
    return [np.array(encoding.ids, dtype=np.uint16) for encoding in encoded]


def windows(stream: Tokens, length: int) -> torch.Tensor:
    """[windows, length + 1]; each window's last token is the next one's first."""
    count = (len(stream) - 1) // length
    starts = np.arange(count)[:, None] * length
    return torch.from_numpy(stream[starts + np.arange(length + 1)].astype(np.int64))


def batches(
    documents: list[Tokens], length: int, batch_tokens: int, seed: int
) -> Iterator[torch.Tensor]:
    """Endless [batch_tokens / length, length + 1]: documents, then windows, shuffled per epoch."""
    rows = batch_tokens // length
    for epoch in _naturals():
        random = np.random.default_rng((seed, length, epoch))
        order = random.permutation(len(documents))
        table = windows(np.concatenate([documents[index] for index in order]), length)
        table = table[torch.from_numpy(random.permutation(len(table)))]
        yield from (table[row : row + rows] for row in range(0, len(table) - rows + 1, rows))


def _naturals() -> Iterator[int]:
    number = 0
    while True:
        yield number
        number += 1
