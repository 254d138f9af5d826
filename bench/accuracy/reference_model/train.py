"""Train the reference model: `train --out DIR --minutes 60`.

Goes on from the checkpoint in DIR if there is one, else from the model of --base, with the recipe
they were begun with but for the options that are given; ends after --minutes or at --steps, and
writes the model beside the checkpoint. On one core each, two processes train faster than one on
both: `torchrun --nproc-per-node 2 -m bench.accuracy.reference_model.train ...`.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from sglang_tri.statistics.describe import concentration
from sglang_tri.statistics.statistics import Statistics

from . import parallel
from .batches import IGNORED, Batch, Curriculum, make_batch
from .heads import capturing, head_means
from .model import Shape, build, write_model
from .tasks import TASKS

CHECKPOINT = "checkpoint.pt"
TRAINING = "training.json"
"""In a published model's folder: how far its training went."""


@dataclass(frozen=True)
class Recipe:
    """What a run is begun with."""

    shape: Shape
    seed: int = 0
    steps: int = 6000
    tokens: int = 512
    """Of a batch of one task; each process has one of each in a step."""
    rows: int = 4
    """Of a batch, at least."""
    spread: float = 0.5
    """Share of the batches with gaps between lines."""
    chats: float = 0.2
    """Share of the batches of registers that are chats of two turns."""
    twice: str = ""
    """Task of which a step has two batches."""
    concentrate: float = 0.0
    """Nats that 1 - R adds to the loss: R of the three strongest pairs, mean of all heads."""
    lr: float = 1e-3
    decay: float = 0.1
    """Weight decay, of matrices alone."""
    warmup: int = 100
    cooldown: int = 2000
    """Steps over which the rate falls to zero at the end."""

    def __post_init__(self) -> None:
        if self.twice and self.twice not in TASKS:
            raise ValueError(f"--twice {self.twice}: the tasks are {', '.join(TASKS)}")

    @property
    def tasks(self) -> list[str]:
        """Of the batches of a step."""
        return [*TASKS, self.twice] if self.twice else [*TASKS]

    def rate(self, step: int) -> float:
        """Learning rate, relative to its greatest."""
        left = (self.steps - step) / self.cooldown
        return min(1.0, (step + 1) / self.warmup, max(0.0, left))


class Run:
    """A model, its optimizers and its curriculum at some step."""

    def __init__(self, recipe: Recipe, device: str = "cpu") -> None:
        self.recipe = recipe
        self.step = 0
        self.seen = 0
        self.seconds = 0.0
        self.curriculum = Curriculum()
        self.model = build(recipe.shape, recipe.seed).to(device)
        self.optimizer = make_optimizer(self.model, recipe)

    def train_step(self) -> dict[str, Judged]:
        """The batches of a step, and what became of the last of each task."""
        recipe = self.recipe
        # All processes draw the same depths, so that none waits for another.
        rng = random.Random(f"{recipe.seed} {self.step}")
        instances = random.Random(f"{recipe.seed} {self.step} {parallel.rank()}")
        results = {}
        for task in recipe.tasks:
            depth, spread = self.curriculum.draw(task, rng), rng.random() < recipe.spread
            chats = task == "registers" and depth > 1 and rng.random() < recipe.chats
            batch = make_batch(task, depth, instances, recipe.tokens, recipe.rows, chats)
            with capturing(self.model, "q") as queries:
                judged = judge(self.model, batch.spread(instances) if spread else batch)
            loss = judged.loss
            if recipe.concentrate:
                loss = loss + recipe.concentrate * (1.0 - strongest(queries).mean())
            (loss / len(recipe.tasks)).backward()
            results[task] = judged.agreed()
            if not spread:
                self.curriculum.report(task, depth, results[task].tokens)
            self.seen += batch.inputs.numel() * parallel.processes()
        parallel.average_gradients(self.model)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.lr * recipe.rate(self.step)
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
    def load(cls, path: Path, device: str = "cpu") -> Run:
        """From a checkpoint: the run goes on as if it had not ended."""
        content = torch.load(path, map_location="cpu", weights_only=True)
        run = cls._at(content, device)
        run.model.load_state_dict(content["model"])
        run.optimizer.load_state_dict(content["optimizer"])
        return run

    @classmethod
    def from_published(cls, folder: Path, device: str = "cpu") -> Run:
        """From a published model: its optimizer begins anew, in float32 from rounded weights."""
        run = cls._at(json.loads((folder / TRAINING).read_text(encoding="utf-8")), device)
        tensors = load_file(folder / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        run.model.load_state_dict(tensors)
        return run

    @classmethod
    def _at(cls, content: dict[str, Any], device: str) -> Run:
        options = dict(content["recipe"])
        run = cls(Recipe(Shape(**options.pop("shape")), **options), device)
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


@dataclass(frozen=True)
class Judged:
    """How a model did on a batch."""

    loss: torch.Tensor
    """Nats a token: float32 []."""
    tokens: float
    """Share of the tokens that are the most probable."""
    chains: float
    """Share of the rows of which every token is."""

    def agreed(self) -> Judged:
        """The mean over all processes."""
        means = parallel.mean(torch.tensor([self.loss.item(), self.tokens, self.chains]))
        return Judged(means[0], means[1].item(), means[2].item())


def judge(model: Any, batch: Batch) -> Judged:
    """What full attention makes of a batch; trained in bfloat16 where there are instructions."""
    batch = batch.to(model.device)
    # With a mask, transformers does not take a gap for the beginning of another sequence.
    mask = torch.ones_like(batch.inputs)
    kind = model.device.type
    halved = torch.is_grad_enabled() and (kind != "cpu" or _cpu_has_bfloat16())
    with torch.autocast(kind, torch.bfloat16, enabled=halved):
        output = model.model(
            batch.inputs, position_ids=batch.positions, attention_mask=mask, use_cache=False
        )
        asked = batch.targets != IGNORED
        logits = model.lm_head(output.last_hidden_state[asked])
    targets = batch.targets[asked]
    wrong = torch.zeros_like(asked)
    wrong[asked] = logits.argmax(-1) != targets
    tokens = 1.0 - wrong[asked].float().mean().item()
    chains = 1.0 - wrong.any(dim=1).float().mean().item()
    return Judged(F.cross_entropy(logits.float(), targets), tokens, chains)


def _cpu_has_bfloat16() -> bool:
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


@torch.no_grad()
def measure(model: Any, batch: Batch) -> torch.Tensor:
    """R over the three strongest frequency pairs: float32 [layers, query heads]."""
    with capturing(model, "q") as queries:
        model.model(batch.inputs.to(model.device), use_cache=False)
    return strongest(queries)


def strongest(queries: list[torch.Tensor]) -> torch.Tensor:
    """R over the three strongest pairs, of each layer's queries: float32 [layers, query heads]."""
    means = [head_means(heads.float()) for heads in queries]
    found = Statistics(torch.stack([m[0] for m in means]), torch.stack([m[1] for m in means]))
    return concentration(found).strongest


def train(run: Run, minutes: float, folder: Path, every: int = 50) -> None:
    """Train until the recipe's last step or for `minutes`, and log to `folder`."""
    began = time.monotonic()
    before, last = run.seconds, run.seconds + 60 * minutes
    results: list[dict[str, Judged]] = []
    while run.step < run.recipe.steps and run.seconds < last:
        results.append(run.train_step())
        run.seconds = before + parallel.mean(torch.tensor(time.monotonic() - began)).item()
        if run.step % every == 0 and parallel.rank() == 0:
            line = json.dumps(report(run, results))
            with (folder / "log.jsonl").open("a") as log:
                log.write(f"{line}\n")
            print(line, flush=True)
            results = []
        if run.step % (5 * every) == 0 and parallel.rank() == 0:
            run.save(folder / CHECKPOINT)


def report(run: Run, results: list[dict[str, Judged]]) -> dict[str, Any]:
    depth = run.curriculum.depths["tree"]
    found = measure(run.model, make_batch("tree", depth, random.Random(0), 2048))

    def means(what: str) -> dict[str, float]:
        return {t: round(mean(float(getattr(r[t], what)) for r in results), 4) for t in TASKS}

    return {
        "step": run.step,
        "seen": run.seen,
        "seconds": round(run.seconds),
        "depths": dict(run.curriculum.depths),
        **{what: means(what) for what in ("loss", "tokens", "chains")},
        "R": [round(r, 2) for r in found.mean(1).tolist()],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", type=Path, help="folder of a published model to go on from")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help=f"default here: {device}")
    add_options(parser, Shape, [one.name for one in fields(Shape)])
    add_options(parser, Recipe, [one.name for one in fields(Recipe) if one.name != "shape"])
    given = vars(parser.parse_args())
    names = ("out", "base", "minutes", "device")
    folder, base, minutes, device = (given.pop(name) for name in names)
    torch.set_num_threads(given.pop("threads"))
    torch.set_flush_denormal(True)
    parallel.start()
    folder.mkdir(parents=True, exist_ok=True)
    options = {name: value for name, value in given.items() if value is not None}
    run = begin(folder / CHECKPOINT, base, options, device)
    train(run, minutes, folder)
    if parallel.rank() == 0:
        run.save(folder / CHECKPOINT)
        write_model(run.model, run.recipe.shape, folder / "model", torch.bfloat16)


def add_options(parser: argparse.ArgumentParser, recipe: Any, names: list[str]) -> None:
    """An option for each field, without a default: what is not given stays as it was."""
    for one in fields(recipe):
        if one.name in names:
            kind, flag = type(one.default), f"--{one.name.replace('_', '-')}"
            parser.add_argument(flag, type=kind, help=f"default of a new run: {one.default}")


def begin(checkpoint: Path, base: Path | None, given: dict[str, Any], device: str = "cpu") -> Run:
    """A run to go on with, or a new one, with the options that are given.

    ValueError: an option would change the shape of a model that exists.
    """
    sizes = {one.name: given.pop(one.name) for one in fields(Shape) if one.name in given}
    if checkpoint.exists():
        run = Run.load(checkpoint, device)
    elif base is not None:
        run = Run.from_published(base, device)
    else:
        return Run(Recipe(Shape(**sizes), **given), device)
    if sizes:
        raise ValueError(f"{sizes}: the model exists; leave these out, or train into a new folder")
    run.recipe = replace(run.recipe, **given)
    return run


if __name__ == "__main__":
    main()
