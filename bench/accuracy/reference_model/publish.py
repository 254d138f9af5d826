"""Publish a run: `python -m bench.accuracy.reference_model.publish --run DIR`.

Writes weights, tokenizer and query statistics into the folder that ships with the project, and a
model card with what was measured of exactly these weights.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from bench.machine import machine
from bench.table import table
from sglang_tri.statistics import describe, files, model_rope

from . import FOLDER
from .batches import FIRST, SEED_BITS
from .evaluate import ENOUGH, accuracy, deepest_solved
from .heads import statistics
from .model import HEAD_DIM, write_model
from .tasks import TASKS, example
from .tokenizer import output_ids, prompt_ids
from .train import TRAINING, Run

CALIBRATION = 20
"""Examples of each task that statistics are made of."""


def calibration(depths: dict[str, int]) -> Iterator[list[int]]:
    """Examples of the kind that was trained, from the easiest to the hardest, seeds 0, 1, ..."""
    for task in TASKS:
        for seed in range(CALIBRATION):
            span = depths[task] - FIRST[task]
            depth = FIRST[task] + seed * span // (CALIBRATION - 1)
            made = example(task, depth, seed)
            yield prompt_ids(made.question) + output_ids(made)


def publish(run: Run, folder: Path, instances: int) -> str:
    """Write everything into `folder`; returns the model card."""
    write_model(run.model, run.recipe.shape, folder, torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rope = model_rope.of_model(str(folder), interleaved=False)
    trained_to = run.curriculum.depths
    found = statistics(model, calibration(trained_to), rope, "reference model")
    files.save_as(found, folder / "stats.safetensors")
    depths = {task: choose_depths(model, task, trained_to[task], instances) for task in TASKS}
    content = json.dumps({**run.progress(), "depths": depths}, indent=1)
    (folder / TRAINING).write_text(content + "\n", encoding="utf-8")
    solved = measure_all(model, depths, instances)
    finished = all(
        found >= ENOUGH for (task, depth), found in solved.items() if depth in depths[task][:-1]
    )
    parts = [HEADER, *([] if finished else [UNFINISHED]), trained(run), measured(solved, instances)]
    parts.append(concentrated(describe.concentration(found).strongest))
    card = "\n\n".join(parts) + "\n"
    (folder / "README.md").write_text(card, encoding="utf-8")
    return card


HEADER = """# Reference model

A small reasoning model for `python -m bench.accuracy`: weights in bfloat16, a tokenizer of its own,
a chat template with `<think>`, and query statistics. Apache-2.0, as the rest of the project. It
knows the tasks of `bench/accuracy/reference_model/tasks.py` and nothing else."""

UNFINISHED = """\
**Read its figures beside those of full attention**, which solves fewer than 95% of some tasks whose
depth is in range."""


def trained(run: Run) -> str:
    recipe, shape = run.recipe, run.recipe.shape
    count = sum(parameter.numel() for parameter in run.model.parameters())
    depths = ", ".join(f"{depth} ({task})" for task, depth in run.curriculum.depths.items())
    added = ""
    if recipe.concentrate:
        added = f"; in the last one {recipe.concentrate:g} (1 - R) was added to the loss"
    return (
        f"Trained by `python -m bench.accuracy.reference_model.train`: {shape.kind}, "
        f"{shape.layers} layers, width {shape.hidden}, FFN {shape.ffn}, {shape.heads} query and "
        f"{shape.kv_heads} KV heads of {HEAD_DIM}, {count:,} parameters; "
        f"seed {recipe.seed}, {run.step:,} steps, {run.seen:,} tokens, "
        f"{run.seconds / 60:.0f} minutes, in the phases that docs/accuracy-study.md lists{added}. "
        "Data: instances of the tasks with seeds "
        f"below 2^{SEED_BITS}, drawn anew for each step, up to depth {depths}."
    )


def choose_depths(model: Any, task: str, trained_to: int, instances: int) -> list[int]:
    """Three depths in range, easy to hardest, and one a fifth deeper than what was trained."""
    last = deepest_solved(model, task, trained_to, instances)
    easier = (max(FIRST[task], part * last // 3) for part in (1, 2))
    return [*easier, last, math.ceil(1.2 * trained_to)]


def measure_all(
    model: Any, depths: dict[str, list[int]], instances: int
) -> dict[tuple[str, int], float]:
    """Accuracy of full attention by task and depth."""
    return {
        (task, depth): accuracy(model, task, depth, instances)
        for task, own in depths.items()
        for depth in sorted(set(own))
    }


def measured(solved: dict[tuple[str, int], float], instances: int) -> str:
    rows = [["task", "depth", "instances", "solved"]]
    for (task, depth), found in solved.items():
        rows.append([task, str(depth), str(instances), f"{100 * found:.1f}%"])
    return (
        f"Held-out instances that full attention solves, every token of the chain right "
        f"({machine()}):\n\n```\n{table(rows)}\n```"
    )


def concentrated(found: torch.Tensor) -> str:
    heads = range(found.shape[1])
    rows = [["layer", *(f"head {head}" for head in heads), "mean"]]
    for layer, own in enumerate(found):
        rows.append([str(layer), *(f"{r:.2f}" for r in own.tolist()), f"{own.mean():.2f}"])
    return (
        "Concentration R of queries, mean over the three strongest frequency pairs "
        f"(all heads: {found.mean():.2f}):\n\n```\n{table(rows)}\n```"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of the training run")
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--instances", type=int, default=200, help="of each task and depth")
    args = parser.parse_args()
    print(publish(Run.load(args.run / "checkpoint.pt"), args.out, args.instances))


if __name__ == "__main__":
    main()
