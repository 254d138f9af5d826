"""The same cells on the real server: does it solve what the simulator says it solves?"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.reference_model.tokenizer import output_ids, prompt_ids
from bench.server import Server

from .cells import Cell
from .judge import instance
from .methods import RECENT, SERVED
from .runner import Subject, judge_all


@dataclass(frozen=True)
class Agreement:
    """One cell's instances on both sides.

    Attributes:
        solved: by the server, by the simulator.
        alike: instances of which both say the same.
        rounds, evicted: the server's counters, summed.
    """

    cell: Cell
    instances: int
    solved: tuple[int, int]
    alike: int
    rounds: int
    evicted: int


def compare(subject: Subject, cells: Sequence[Cell], count: int) -> list[Agreement]:
    """Ask one server for `count` instances of every cell; each request brings its own policy."""
    arguments = ["--kv-policy", "triattention", "--kv-stats", str(subject.stats)]
    arguments += ["--kv-reuse", "prompt"]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "server.log"
        with Server(subject.model, arguments, log) as server:
            return [_cell(server, subject, cell, count) for cell in cells]


def _cell(server: Server, subject: Subject, cell: Cell, count: int) -> Agreement:
    numbers = list(range(count))
    simulated = [outcome.solved for outcome in judge_all(subject, cell, numbers)]
    answers = [ask(server, cell, number) for number in numbers]
    solved = [answer["output_ids"] == wanted(cell, n) for n, answer in enumerate(answers)]
    counters = [answer["meta_info"].get("kv_policy", {}) for answer in answers]
    return Agreement(
        cell,
        count,
        (sum(solved), sum(simulated)),
        sum(one == other for one, other in zip(solved, simulated, strict=True)),
        sum(counter.get("rounds", 0) for counter in counters),
        sum(counter.get("evicted_tokens", 0) for counter in counters),
    )


def wanted(cell: Cell, number: int) -> list[int]:
    return output_ids(instance(cell.task, cell.depth, number))


def ask(server: Server, cell: Cell, number: int) -> dict[str, Any]:
    """The server's greedy answer to an instance, no longer than the right one."""
    name = SERVED[cell.method]
    own: dict[str, Any] = {"policy": name}
    if name != "none":
        own |= {"budget": cell.budget, "interval": cell.interval, "recent": RECENT}
    answer: dict[str, Any] = server.generate(
        input_ids=prompt_ids(instance(cell.task, cell.depth, number).question),
        sampling_params={
            "temperature": 0.0,
            "max_new_tokens": len(wanted(cell, number)),
            "ignore_eos": True,
            "custom_params": {"kv_policy": own},
        },
    )
    return answer
