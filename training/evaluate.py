"""Judge an exported model: perplexity by part and context, expert balance, greedy samples."""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from training.data import Tokens, read_documents, windows
from training.model import ExpertBalancer

PART_TOKENS = 49152
LENGTHS = (512, 4096)
SAMPLE_TOKENS = 80
PROMPTS = (
    "The os.path module provides",
    "Return the number of",
    "Changed in version 3.8:",
    "If the file does not exist,",
    "To create a new thread,",
    "The following example shows how to",
)
QUESTIONS = (
    "What does shutil.copyfile() do?",
    "What is collections.OrderedDict?",
    "What does signal.alarm() do?",
)


@torch.no_grad()
def mean_loss(model: Any, table: torch.Tensor) -> float:
    """Nats a token over [rows, length + 1]."""
    total = 0.0
    for rows in torch.split(table, max(1, 4096 // table.size(1))):
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits.float()
        total += functional.cross_entropy(
            logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum"
        ).item()
    return total / table[:, 1:].numel()


def sample_stream(documents: list[Tokens], seed: int) -> Tokens:
    """The first PART_TOKENS of the documents, in a seeded order."""
    order = np.random.default_rng(seed).permutation(len(documents))
    return np.concatenate([documents[index] for index in order])[: PART_TOKENS + 1]


def perplexity(model: Any, tokenizer: Tokenizer, stream: Tokens, length: int) -> dict[str, float]:
    table = windows(stream, length)
    loss = mean_loss(model, table)
    targets = table[:, 1:].flatten()
    characters = len(tokenizer.decode(targets.tolist(), skip_special_tokens=False))
    return {
        "context": length,
        "tokens": targets.numel(),
        "loss": round(loss, 4),
        "perplexity": round(math.exp(loss), 2),
        "bits_per_character": round(loss / math.log(2) * targets.numel() / characters, 3),
    }


def expert_loads(model: Any, stream: Tokens) -> dict[str, list[float]]:
    """For each layer of experts: the least and the most loaded expert over the mean."""
    balancer = ExpertBalancer(model)
    mean_loss(model, windows(stream, LENGTHS[0]))
    ratios = [load / load.mean() for load in balancer.loads]
    return {
        "least": [round(float(ratio.min()), 2) for ratio in ratios],
        "most": [round(float(ratio.max()), 2) for ratio in ratios],
    }


def greedy(model: Any, tokenizer: Any, ids: list[int]) -> str:
    output = model.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=SAMPLE_TOKENS,
        do_sample=False,
    )
    return str(tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))


def samples(model: Any, tokenizer: Any) -> dict[str, str]:
    """Prompt -> greedy continuation: bare prompts, then questions through the chat template."""
    answers = {text: greedy(model, tokenizer, tokenizer.encode(text)) for text in PROMPTS}
    for question in QUESTIONS:
        for thinking in (False, True):
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": question}],
                add_generation_prompt=True,
                tokenize=False,
                thinking=thinking,
            )
            ids = tokenizer.encode(prompt, add_special_tokens=False)
            answers[prompt] = greedy(model, tokenizer, ids)
    return answers


def evaluate(folder: Path, corpus: Path) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    report: dict[str, Any] = {"perplexity": {}}
    for part in ("train", "heldout"):
        for kind in ("text", "chat"):
            documents = read_documents(corpus / f"{part}.jsonl", tokenizer, (kind,))
            stream = sample_stream(documents, seed=0)
            lengths = LENGTHS if kind == "text" else LENGTHS[:1]
            report["perplexity"][f"{part}/{kind}"] = [
                perplexity(model, tokenizer, stream, length) for length in lengths
            ]
            if (part, kind) == ("heldout", "text"):
                report["expert_load_over_mean"] = expert_loads(model, stream)
    report["greedy"] = samples(model, AutoTokenizer.from_pretrained(folder))
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("models/demo"))
    parser.add_argument("--corpus", type=Path, default=Path("training/build"))
    parser.add_argument("--out", type=Path, default=Path("training/build/evaluation.json"))
    args = parser.parse_args()
    report = evaluate(args.model, args.corpus)
    args.out.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(args.out.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
