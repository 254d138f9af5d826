"""The models that ship: what their cards say, and that the server gets as far as the simulator."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from bench.accuracy.evaluation.cells import Cell
from bench.accuracy.evaluation.methods import SERVED
from bench.accuracy.evaluation.plan import mean_output
from bench.accuracy.evaluation.recall import recalls
from bench.accuracy.evaluation.reconstruction import correlations
from bench.accuracy.evaluation.runner import Subject, load
from bench.accuracy.evaluation.served import agreement
from bench.accuracy.reference_model import DIFFUSE, FOLDER, LONG
from bench.accuracy.reference_model.evaluate import accuracy, depths_of, instance
from bench.accuracy.reference_model.tasks import TASKS
from bench.accuracy.reference_model.tokenizer import output_ids, prompt_ids
from sglang_tri import statistics as stats
from sglang_tri.statistics import describe
from tests.conftest import Running

MODELS = pytest.mark.parametrize("folder", [FOLDER, DIFFUSE, LONG], ids=lambda f: f.name)


def card(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def solved_by_card(folder: Path, task: str) -> list[tuple[str, str, str]]:
    """Depth, instances and percent solved, a row each."""
    return re.findall(rf"^{task} +(\d+) +(\d+) +([\d.]+)%$", card(folder), re.M)


@pytest.mark.slow
@MODELS
@pytest.mark.parametrize("task", TASKS)
def test_the_card_states_the_accuracy(folder: Path, task: str) -> None:
    """The first row of each task, over again."""
    depth, instances, solved = solved_by_card(folder, task)[0]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = accuracy(model, task, int(depth), int(instances))
    # Another machine may break a near tie otherwise.
    assert 100 * found == pytest.approx(float(solved), abs=100 / int(instances))


@pytest.mark.parametrize("task", TASKS)
def test_chains_in_range_have_500_tokens(task: str) -> None:
    """On average, at the deepest of three depths that full attention solves, by the card."""
    rows = solved_by_card(LONG, task)
    assert [int(depth) for depth, *_ in rows] == depths_of(LONG)[task]
    assert all(float(solved) >= 95 for *_, solved in rows[:-1])
    assert mean_output(task, int(rows[-2][0])) >= 500


@MODELS
def test_the_card_states_the_concentration(folder: Path) -> None:
    found = describe.concentration(stats.load(folder / "stats.safetensors")).strongest
    rows = re.findall(r"^(\d) +((?:[\d.]+ +)+)([\d.]+)$", card(folder), re.M)
    assert len(rows) == len(found)
    for layer, heads, mean in rows:
        own = found[int(layer)]
        assert [float(head) for head in heads.split()] == pytest.approx(own.tolist(), abs=0.006)
        assert float(mean) == pytest.approx(own.mean().item(), abs=0.006)


def test_logits_are_as_predicted_where_queries_are_concentrated() -> None:
    """Pearson's r by head; the other model's queries scatter, and are predicted worse."""
    concentrated, diffuse = (
        correlations(folder, stats.load(folder / "stats.safetensors"))
        for folder in (FOLDER, DIFFUSE)
    )
    assert concentrated.shape == diffuse.shape == (4, 4)
    assert concentrated.mean() > 0.85
    assert diffuse.mean() < 0.8


def test_chance_keeps_less_of_what_will_be_needed() -> None:
    subject = Subject(FOLDER, FOLDER / "stats.safetensors")
    made = instance("tree", 8, 0)
    prompt, output = prompt_ids(made.question), output_ids(made)
    found = recalls(load(subject), prompt, output, ("streaming", "random"))
    assert 0.2 < found["random"].mean() < found["streaming"].mean() < 0.8
    where = found["look-ups"]
    assert where.shape == (4, 2)
    assert where.argmax() == 5  # KV head 1 of layer 2.
    assert where[2, 1] > 5 * where.flatten().sort().values[-2]


@pytest.mark.parametrize("server", ["shipped"], indirect=True)
@pytest.mark.parametrize("method", SERVED)
def test_the_server_gets_as_far_as_the_simulator(server: Running, method: str) -> None:
    """Instance by instance, to the first wrong token; and tokens were evicted on the way."""
    budget, interval = (0, 0) if method == "full" else (32, 16)
    subject = Subject(server.model, server.model / "stats.safetensors")
    cell = Cell(method, "registers", 12, 0.25, budget, interval)
    found = agreement(server.server, subject, cell, 6)
    assert found.alike == 6
    assert found.solved[0] == found.solved[1]
    assert (found.rounds > 6) == (found.evicted > 100) == (method != "full")
