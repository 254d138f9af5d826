"""The reference model's training: batches, curriculum, checkpoints."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed import destroy_process_group, init_process_group
from torch.multiprocessing import spawn
from transformers import AutoModelForCausalLM

from bench.accuracy.reference_model import parallel
from bench.accuracy.reference_model.batches import (
    FIRST,
    IGNORED,
    LAST,
    LEARNED,
    LINE_END,
    SPAN,
    Curriculum,
    make_batch,
)
from bench.accuracy.reference_model.evaluate import depths_of
from bench.accuracy.reference_model.model import Shape, write_model
from bench.accuracy.reference_model.publish import publish
from bench.accuracy.reference_model.tasks import TASKS, chat, example
from bench.accuracy.reference_model.tokenizer import output_ids, prompt_ids
from bench.accuracy.reference_model.train import Recipe, Run, begin, judge, measure
from sglang_tri import statistics as stats

SMALL = Recipe(
    Shape(layers=2, hidden=64, ffn=64, heads=2, kv_heads=1),
    steps=1000,
    tokens=256,
    rows=1,
    warmup=5,
)

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("task", TASKS)
def test_batches_ask_for_the_output_alone(task: str) -> None:
    batch = make_batch(task, FIRST[task] + 1, random.Random(4), 600)
    rng = random.Random(4)
    for inputs, targets in zip(batch.inputs, batch.targets, strict=True):
        made = example(task, FIRST[task] + 1, rng.getrandbits(40))
        prompt, output = prompt_ids(made.question), output_ids(made)
        assert inputs[: len(prompt + output) - 1].tolist() == (prompt + output)[:-1]
        assert targets[targets != IGNORED].tolist() == output
        assert (targets[: len(prompt) - 1] == IGNORED).all()
        assert targets[len(prompt) - 1] == output[0]
    assert batch.inputs.numel() <= 600
    assert torch.equal(batch.positions[0], torch.arange(batch.inputs.shape[1]))
    assert len(make_batch(task, LAST[task], random.Random(4), 600, at_least=4).inputs) == 4


def test_batches_of_chats_ask_for_both_outputs() -> None:
    batch = make_batch("registers", 7, random.Random(4), 600, at_least=3, chats=True)
    rng = random.Random(4)
    for targets in batch.targets:
        seed, first = rng.getrandbits(40), rng.randrange(1, 7)
        outputs = [token for turn in chat([first, 7 - first], seed) for token in output_ids(turn)]
        assert targets[targets != IGNORED].tolist() == outputs


def test_gaps_come_between_lines_and_reach_as_far_as_the_deepest() -> None:
    farthest = 0
    for seed in range(50):
        batch = make_batch("tree", 3, random.Random(seed), 600)
        apart = batch.spread(random.Random(seed))
        assert torch.equal(apart.inputs, batch.inputs)
        steps = apart.positions.diff(dim=1)
        assert (steps >= 1).all()
        assert (batch.inputs[:, :-1][steps > 1] == LINE_END).all()
        asked = (batch.targets != IGNORED).cumsum(1) > 0
        assert torch.equal(apart.positions[~asked], batch.positions[~asked])
        assert (apart.positions[:, 0] == 0).all()
        assert (steps > 1).any()
        farthest = max(farthest, int(apart.positions.max()))
    assert SPAN - 50 < farthest < SPAN


def test_deeper_examples_come_as_they_are_learned() -> None:
    curriculum = Curriculum()
    for _ in range(100):
        curriculum.report("tree", curriculum.depths["tree"], LEARNED - 0.01)
    assert curriculum.depths == FIRST
    curriculum.report("registers", FIRST["registers"], 1.0)
    assert curriculum.depths == FIRST
    for _ in range(1000):
        curriculum.report("tree", curriculum.depths["tree"], 1.0)
    assert curriculum.depths == {**FIRST, "tree": LAST["tree"]}
    drawn = {curriculum.draw("tree", random.Random(n)) for n in range(500)}
    assert drawn == set(range(FIRST["tree"], LAST["tree"] + 1))


def test_a_run_goes_on_as_if_it_had_not_ended(tmp_path: Path) -> None:
    whole = Run(SMALL)
    for _ in range(4):
        whole.train_step()
    half = Run(SMALL)
    for _ in range(2):
        half.train_step()
    half.save(tmp_path / "checkpoint.pt")
    half = Run.load(tmp_path / "checkpoint.pt")
    assert half.recipe == SMALL
    for _ in range(2):
        half.train_step()
    assert (half.step, half.seen, half.curriculum) == (4, whole.seen, whole.curriculum)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, half.model.state_dict()[name]), name


def test_a_published_model_can_be_trained_on(tmp_path: Path) -> None:
    run = Run(SMALL)
    run.train_step()
    run.curriculum.depths["tree"] = 3
    card = publish(run, tmp_path, instances=2)
    assert "3 (tree)" in card
    # It has learned nothing: the depths are half of those that were trained, and stand on the card.
    assert depths_of(tmp_path)["tree"] == [1, 1, 1, 4]
    assert "Read its figures beside" in card
    assert re.search(r"^tree +4 +2 +0\.0%$", card, re.M)
    assert card == (tmp_path / "README.md").read_text()
    again = Run.from_published(tmp_path)
    assert again.progress() == run.progress()
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor.bfloat16().float()), name
    found = stats.load(tmp_path / "stats.safetensors")
    assert found.shape == (2, 2, 64)
    assert found.q_square is not None


def _averaged(rank: int, folder: Path) -> None:
    init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = torch.nn.Linear(2, 1)
    model.weight.grad = torch.tensor([[1.0 + rank, 4.0 * rank]])
    parallel.average_gradients(model)
    torch.save(model.weight.grad, folder / f"{rank}.pt")
    destroy_process_group()


@pytest.mark.slow
def test_processes_average_their_gradients(tmp_path: Path) -> None:
    spawn(_averaged, (tmp_path,), nprocs=2)
    for rank in (0, 1):
        assert torch.load(tmp_path / f"{rank}.pt").tolist() == [[1.5, 2.0]]


@pytest.mark.slow
def test_two_processes_train_one_model(tmp_path: Path) -> None:
    """As `torchrun` starts them: one curriculum, one checkpoint, twice the tokens; then go on."""
    sizes = "--layers 2 --hidden 64 --ffn 64 --heads 2 --kv-heads 1 --tokens 256 --spread 0.0"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--standalone",
    ]
    command += ["-m", "bench.accuracy.reference_model.train", "--out", str(tmp_path)]
    subprocess.run([*command, *sizes.split(), "--steps", "2"], check=True, env=ONE_THREAD)
    subprocess.run([*command, "--steps", "3", "--lr", "1e-4"], check=True, env=ONE_THREAD)
    run = Run.load(tmp_path / "checkpoint.pt")
    assert (run.step, run.recipe.lr, run.recipe.tokens) == (3, 1e-4, 256)
    alone = Run(run.recipe)
    for _ in range(3):
        alone.train_step()
    assert 1.5 * alone.seen < run.seen < 2.5 * alone.seen
    assert (tmp_path / "model" / "model.safetensors").exists()


def test_a_model_that_exists_keeps_its_shape(tmp_path: Path) -> None:
    Run(SMALL).save(tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="leave these out"):
        begin(tmp_path / "checkpoint.pt", None, {"layers": 3})


def test_a_task_can_come_twice_in_a_step() -> None:
    once, twice = Run(SMALL), Run(replace(SMALL, twice="variables"))
    assert once.train_step().keys() == twice.train_step().keys() == TASKS.keys()
    batch = make_batch("variables", FIRST["variables"], random.Random(0), SMALL.tokens)
    assert twice.seen - once.seen == pytest.approx(batch.inputs.numel(), rel=0.2)
    with pytest.raises(ValueError, match="--twice trees: the tasks are tree, registers"):
        replace(SMALL, twice="trees")


def test_training_lowers_the_loss() -> None:
    run = Run(SMALL)
    losses = [run.train_step()["variables"].loss.item() for _ in range(60)]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


@pytest.mark.parametrize(("kind", "bias"), [("qwen2", 1), ("qwen3", 0), ("qwen3", 1)])
def test_written_models_are_read_as_they_were(tmp_path: Path, kind: str, bias: int) -> None:
    shape = Shape(kind=kind, bias=bias, layers=2, hidden=64, ffn=64, heads=2, kv_heads=1)
    run = Run(Recipe(shape))
    write_model(run.model, run.recipe.shape, tmp_path, torch.float32)
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    batch = make_batch("tree", 2, random.Random(0), 512)
    with torch.no_grad():
        assert torch.equal(judge(run.model, batch).loss, judge(read, batch).loss)
        assert torch.equal(measure(run.model, batch), measure(read, batch))
    assert read.config.tie_word_embeddings
    assert read.model.layers[0].self_attn.head_dim == 64
    names = dict(read.model.layers[0].self_attn.named_parameters())
    assert ("q_proj.bias" in names) == bool(bias)
    assert ("q_norm.weight" in names) == (kind == "qwen3")


def test_concentration_of_constant_queries_is_one() -> None:
    run = Run(SMALL)
    batch = make_batch("tree", 2, random.Random(0), 512)
    before = measure(run.model, batch)
    with torch.no_grad():
        run.model.model.layers[1].self_attn.q_proj.weight.zero_()
        run.model.model.layers[1].self_attn.q_proj.bias.fill_(1.0)
    after = measure(run.model, batch)
    assert torch.equal(before[0], after[0])
    assert after[1].tolist() == pytest.approx([1.0, 1.0], abs=1e-5)
    assert (before < 0.99).all()


def test_concentration_can_be_trained() -> None:
    runs = [Run(replace(SMALL, concentrate=weight)) for weight in (0.0, 3.0)]
    for run in runs:
        for _ in range(30):
            run.train_step()
    batch = make_batch("tree", 2, random.Random(0), 512)
    free, pressed = (measure(run.model, batch) for run in runs)
    assert (pressed > free + 0.05).all()
