"""Train models/demo on the CPU; started again, the run goes on from its last checkpoint."""

import argparse
import csv
import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import nn
from torch.nn import functional
from transformers import DeepseekV3ForCausalLM

from training import attention
from training.data import Tokens, batches, read_documents, windows
from training.model import ExpertBalancer, new_model, write_model
from training.muon import Muon


@dataclass(frozen=True)
class Stage:
    """So many steps at one sequence length, in tokens."""

    steps: int
    length: int


@dataclass(frozen=True)
class TrainConfig:
    """`rate_knots` are (step from 0, share of the full learning rate), linear in between."""

    seed: int = 1
    stages: tuple[Stage, ...] = (Stage(400, 256), Stage(12, 4096), Stage(150, 512))
    batch_tokens: int = 8192
    micro_batch_tokens: int = 4096
    muon_lr: float = 4e-3
    adam_lr: float = 3e-3
    weight_decay: float = 0.1
    rate_knots: tuple[tuple[float, float], ...] = ((-1, 0.0), (29, 1.0), (309.1, 1.0), (562, 0.0))
    balance_speed: float = 1e-2
    held_out_every: int = 100
    held_out_length: int = 512
    held_out_windows: int = 48
    checkpoint_seconds: float = 300.0
    threads: int = 2

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def rate(self, step: int) -> float:
        """The share of the full learning rate at `step`, counted from 0."""
        steps, rates = zip(*self.rate_knots, strict=True)
        return float(np.interp(step, steps, rates))

    def balance_rate(self, step: int) -> float:
        """The share of the full balancing speed: it decays alike, but needs no warm-up."""
        warm = math.ceil(self.rate_knots[1][0])
        return self.rate(max(step, warm))


@dataclass
class Progress:
    """What a checkpoint holds besides tensors."""

    step: int = 0
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)


def new_optimizers(model: nn.Module, weight_decay: float) -> tuple[Muon, torch.optim.AdamW]:
    """Muon for the layers' matrices; AdamW for embeddings, head and norms."""
    matrices, stacked_pairs, rest = [], [], []
    for name, param in model.named_parameters():
        if name.endswith("gate_up_proj"):
            stacked_pairs.append(param)
        elif param.ndim >= 2 and ".layers." in name:
            matrices.append(param)
        else:
            rest.append(param)
    muon = Muon(matrices, stacked_pairs, weight_decay)
    return muon, torch.optim.AdamW(rest, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)


class Trainer:
    def __init__(self, config: TrainConfig, train: list[Tokens], held_out: list[Tokens]) -> None:
        self._config = config
        self._train = train
        self._held_out = held_out
        self._progress = Progress()
        self.model = new_model(config.seed)
        self.model.config._attn_implementation = attention.NAME
        self.model.config._experts_implementation = "grouped_mm"
        self._balancer = ExpertBalancer(self.model)
        muon, adam = new_optimizers(self.model, config.weight_decay)
        self._optimizers: list[tuple[torch.optim.Optimizer, float]] = [
            (muon, config.muon_lr),
            (adam, config.adam_lr),
        ]

    def run(self, out: Path) -> None:
        saved = time.monotonic()
        for batch in itertools.islice(self._schedule(), self._progress.step, None):
            self._step(batch)
            if time.monotonic() - saved > self._config.checkpoint_seconds:
                self.save(out)
                saved = time.monotonic()
        self.save(out)

    def _schedule(self) -> Iterator[torch.Tensor]:
        """The batches of the whole run: a function of the configuration alone."""
        for stage in self._config.stages:
            endless = batches(
                self._train, stage.length, self._config.batch_tokens, self._config.seed
            )
            yield from itertools.islice(endless, stage.steps)

    def _step(self, batch: torch.Tensor) -> None:
        started = time.monotonic()
        rate = self._config.rate(self._progress.step)
        loss = self._accumulate(batch)
        for optimizer, full_rate in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = full_rate * rate
            optimizer.step()
            optimizer.zero_grad()
        speed = self._config.balance_speed * self._config.balance_rate(self._progress.step)
        worst_load = self._balancer.update(speed)
        self._progress.step += 1
        self._progress.seconds += time.monotonic() - started
        self._record(loss, rate, worst_load)

    def _accumulate(self, batch: torch.Tensor) -> float:
        """Gradients of the mean loss over [rows, length + 1], in micro-batches."""
        rows = max(1, self._config.micro_batch_tokens // (batch.size(1) - 1))
        total = 0.0
        for part in torch.split(batch, rows):
            loss = next_token_loss(self.model, part) * (len(part) / len(batch))
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            total += loss.item()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        return total

    def _record(self, loss: float, rate: float, worst_load: float) -> None:
        progress = self._progress
        row = {
            "step": progress.step,
            "tokens": progress.step * self._config.batch_tokens,
            "seconds": round(progress.seconds, 1),
            "rate": round(rate, 4),
            "train_loss": round(loss, 4),
            "worst_load": round(worst_load, 2),
        }
        if progress.step % self._config.held_out_every == 0 or progress.step == self._config.steps:
            row["held_out_loss"] = round(self._held_out_loss(), 4)
        progress.curve.append(row)
        print(" ".join(f"{name} {value}" for name, value in row.items()), flush=True)

    @torch.no_grad()
    def _held_out_loss(self) -> float:
        stream = torch.cat([torch.from_numpy(document) for document in self._held_out]).numpy()
        table = windows(stream, self._config.held_out_length)[: self._config.held_out_windows]
        losses = [next_token_loss(self.model, part).item() for part in torch.split(table, 8)]
        self._balancer.forget()
        return sum(losses) / len(losses)

    def save(self, out: Path) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer, _ in self._optimizers],
            "progress": vars(self._progress),
        }
        torch.save(state, out / "checkpoint.tmp")
        (out / "checkpoint.tmp").rename(out / "checkpoint.pt")
        write_curve(self._progress.curve, out / "curve.csv")

    def resume(self, out: Path) -> None:
        state = torch.load(out / "checkpoint.pt", weights_only=True)
        self.model.load_state_dict(state["model"])
        for (optimizer, _), saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self._progress = Progress(**state["progress"])


def next_token_loss(model: DeepseekV3ForCausalLM, table: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats over [rows, length + 1]."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=table[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.float().flatten(0, 1), table[:, 1:].flatten())


def write_curve(curve: list[dict[str, float]], path: Path) -> None:
    names = ["step", "tokens", "seconds", "rate", "train_loss", "worst_load", "held_out_loss"]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(curve)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, default=Path("training/build"))
    parser.add_argument("--tokenizer", type=Path, default=Path("models/demo/tokenizer.json"))
    parser.add_argument("--out", type=Path, default=Path("training/build"))
    args = parser.parse_args()
    config = TrainConfig()
    torch.set_num_threads(config.threads)
    tokenizer = Tokenizer.from_file(str(args.tokenizer))
    trainer = Trainer(
        config,
        read_documents(args.corpus / "train.jsonl", tokenizer, ("text", "chat")),
        read_documents(args.corpus / "heldout.jsonl", tokenizer, ("text",)),
    )
    if (args.out / "checkpoint.pt").exists():
        trainer.resume(args.out)
    trainer.run(args.out)
    write_model(trainer.model, args.out / "model")


if __name__ == "__main__":
    main()
