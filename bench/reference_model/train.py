"""Train the reference model: `python -m bench.reference_model.train --out DIR --minutes 60`.

Goes on from the checkpoint in DIR if there is one, else from the model of --start, with what they
were begun with; ends after --minutes or at --steps, and writes the model beside the checkpoint.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from bench.tiny_models import head_means
from sglang_tri.stats.describe import concentration
from sglang_tri.stats.statistics import Statistics

from .batches import IGNORED, Batch, Curriculum, make_batch
from .heads import capturing
from .model import Shape, build, write_model
from .tasks import TASKS

TRAINING = "training.json"
"""In a published model's folder: how far its training went."""


@dataclass(frozen=True)
class Recipe:
    """What a run is begun with."""

    shape: Shape
    seed: int = 0
    steps: int = 6000
    tokens: int = 512
    """Of a batch of one task; a step has one of each."""
    lr: float = 1e-3
    decay: float = 0.1
    """Weight decay, of matrices alone."""
    warmup: int = 100
    cooldown: float = 0.3
    """Share of the steps over which the rate falls to zero at the end."""

    def rate(self, step: int) -> float:
        """Learning rate, relative to its greatest."""
        left = (self.steps - step) / (self.cooldown * self.steps)
        return min(1.0, (step + 1) / self.warmup, max(0.0, left))


class Run:
    """A model, its optimizers and its curriculum at some step."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.step = 0
        self.seen = 0
        self.seconds = 0.0
        self.curriculum = Curriculum()
        self.model = build(recipe.shape, recipe.seed)
        self.optimizer = make_optimizer(self.model, recipe)

    def train_step(self) -> dict[str, tuple[float, float]]:
        """One batch of each task; returns loss (nats) and share of right chains by task."""
        rng = random.Random(f"{self.recipe.seed} {self.step}")
        results = {}
        for task in TASKS:
            depth = self.curriculum.draw(task, rng)
            batch = make_batch(task, depth, rng, self.recipe.tokens)
            loss, solved = judge(self.model, batch)
            (loss / len(TASKS)).backward()
            self.curriculum.report(task, depth, solved)
            self.seen += batch.inputs.numel()
            results[task] = loss.item(), solved
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.lr * self.recipe.rate(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return results

    def progress(self) -> dict[str, Any]:
        """All but tensors."""
        return {
            "recipe": asdict(self.recipe),
            "step": self.step,
            "seen": self.seen,
            "seconds": self.seconds,
            "curriculum": asdict(self.curriculum),
        }

    def save(self, path: Path) -> None:
        content = {
            **self.progress(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        torch.save(content, path.with_suffix(".new"))
        path.with_suffix(".new").rename(path)

    @classmethod
    def load(cls, path: Path) -> Run:
        """From a checkpoint: the run goes on as if it had not ended."""
        content = torch.load(path, weights_only=True)
        run = cls._at(content)
        run.model.load_state_dict(content["model"])
        run.optimizer.load_state_dict(content["optimizer"])
        return run

    @classmethod
    def from_published(cls, folder: Path) -> Run:
        """From a published model: its optimizer begins anew, in float32 from rounded weights."""
        run = cls._at(json.loads((folder / TRAINING).read_text(encoding="utf-8")))
        tensors = load_file(folder / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        run.model.load_state_dict(tensors)
        return run

    @classmethod
    def _at(cls, content: dict[str, Any]) -> Run:
        options = dict(content["recipe"])
        run = cls(Recipe(Shape(**options.pop("shape")), **options))
        run.step, run.seen, run.seconds = content["step"], content["seen"], content["seconds"]
        run.curriculum = Curriculum(**content["curriculum"])
        return run


def make_optimizer(model: Any, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW; matrices decay, norms, biases and embeddings do not."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in named if p.ndim == 1 or "embed" in name]
    groups = [
        {"params": matrices, "weight_decay": recipe.decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95), fused=True)


def judge(model: Any, batch: Batch) -> tuple[torch.Tensor, float]:
    """Loss of a batch, and the share of its rows of which every token is the most probable."""
    hidden = model.model(batch.inputs, use_cache=False).last_hidden_state
    asked = batch.targets != IGNORED
    logits = model.lm_head(hidden[asked])
    targets = batch.targets[asked]
    wrong = torch.zeros_like(asked)
    wrong[asked] = logits.argmax(-1) != targets
    solved = 1.0 - wrong.any(dim=1).float().mean().item()
    return F.cross_entropy(logits, targets), solved


@torch.no_grad()
def measure(model: Any, batch: Batch) -> torch.Tensor:
    """R over the three strongest frequency pairs: float32 [layers, query heads]."""
    with capturing(model, "q") as queries:
        model.model(batch.inputs, use_cache=False)
    means = [head_means(heads) for heads in queries]
    found = Statistics(torch.stack([m[0] for m in means]), torch.stack([m[1] for m in means]))
    return concentration(found).strongest


def train(run: Run, minutes: float, folder: Path, every: int = 50) -> None:
    """Train until the recipe's last step or for `minutes`, and log to `folder`."""
    began = time.monotonic()
    before = run.seconds
    results: list[dict[str, tuple[float, float]]] = []
    with (folder / "log.jsonl").open("a") as log:
        while run.step < run.recipe.steps and time.monotonic() - began < 60 * minutes:
            results.append(run.train_step())
            run.seconds = before + time.monotonic() - began
            if run.step % every == 0:
                line = json.dumps(report(run, results))
                log.write(f"{line}\n")
                log.flush()
                print(line, flush=True)
                results = []
            if run.step % (5 * every) == 0:
                run.save(folder / "checkpoint.pt")


def report(run: Run, results: list[dict[str, tuple[float, float]]]) -> dict[str, Any]:
    depth = run.curriculum.depths["tree"]
    found = measure(run.model, make_batch("tree", depth, random.Random(0), 2048))
    means = {
        task: torch.tensor([result[task] for result in results]).mean(0).tolist() for task in TASKS
    }
    return {
        "step": run.step,
        "tokens": run.seen,
        "seconds": round(run.seconds),
        "depths": dict(run.curriculum.depths),
        "loss": {task: round(loss, 4) for task, (loss, _) in means.items()},
        "right": {task: round(right, 3) for task, (_, right) in means.items()},
        "R": [round(r, 2) for r in found.mean(1).tolist()],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="folder of a published model to go on from")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    shape = Shape()
    for name in ("kind", "bias", "layers", "hidden", "ffn", "heads", "kv_heads"):
        default = getattr(shape, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    for name in ("seed", "steps", "tokens", "lr", "decay"):
        default = Recipe.__dataclass_fields__[name].default
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    args = vars(parser.parse_args())
    torch.set_num_threads(args.pop("threads"))
    torch.set_flush_denormal(True)
    folder, start, minutes = args.pop("out"), args.pop("start"), args.pop("minutes")
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        run = Run.load(checkpoint)
    elif start is not None:
        run = Run.from_published(start)
    else:
        sizes = {name: args.pop(name) for name in asdict(shape)}
        run = Run(Recipe(Shape(**sizes), **args))
    train(run, minutes, folder)
    run.save(checkpoint)
    write_model(run.model, run.recipe.shape, folder / "model", torch.bfloat16)


if __name__ == "__main__":
    main()
