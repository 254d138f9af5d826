"""The same cells on the real server: does it get as far as the simulator says?"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.accuracy.reference_model.evaluate import instance
from bench.accuracy.reference_model.tokenizer import output_ids, prompt_ids
from bench.server import Endpoint, Server

from .cells import Cell
from .judge import agreeing
from .methods import RECENT, SERVED
from .runner import Subject, judge_all

TOGETHER = 8
"""Requests at a time."""


@dataclass(frozen=True)
class Agreement:
    """One cell's instances on both sides.

    Attributes:
        solved: by the server, by the simulator.
        alike: instances in which both give the same number of right tokens before a wrong one.
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
    arguments += ["--dtype", "float32"]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "server.log"
        with Server(subject.model, arguments, log, {"SGLANG_KV_POLICY_PER_REQUEST": "1"}) as server:
            return [agreement(server, subject, cell, count) for cell in cells]


def agreement(server: Endpoint, subject: Subject, cell: Cell, count: int) -> Agreement:
    """Instances 0 to `count` - 1 of a cell on both sides."""
    numbers = list(range(count))
    simulated = judge_all(subject, cell, numbers)
    with ThreadPoolExecutor(TOGETHER) as pool:
        answers = list(pool.map(lambda number: ask(server, cell, number), numbers))
    correct = [
        agreeing(answer["output_ids"], outcome_ids(cell, number))
        for number, answer in enumerate(answers)
    ]
    counters = [answer["meta_info"].get("kv_policy", {}) for answer in answers]
    pairs = list(zip(correct, simulated, strict=True))
    return Agreement(
        cell,
        count,
        (sum(right == o.length for right, o in pairs), sum(o.solved for o in simulated)),
        sum(right == o.correct for right, o in pairs),
        sum(counter.get("rounds", 0) for counter in counters),
        sum(counter.get("evicted_tokens", 0) for counter in counters),
    )


def outcome_ids(cell: Cell, number: int) -> list[int]:
    """The right output of an instance."""
    return output_ids(instance(cell.task, cell.depth, number))


def ask(server: Endpoint, cell: Cell, number: int) -> dict[str, Any]:
    """The server's greedy answer to an instance, no longer than the right one."""
    name = SERVED[cell.method]
    own: dict[str, Any] = {"policy": name}
    if name != "none":
        own |= {"budget": cell.budget, "interval": cell.interval, "recent": RECENT}
        own["reuse"] = "prompt"
    answer: dict[str, Any] = server.generate(
        input_ids=prompt_ids(instance(cell.task, cell.depth, number).question),
        sampling_params={
            "temperature": 0.0,
            "max_new_tokens": len(outcome_ids(cell, number)),
            "ignore_eos": True,
            "custom_params": {"kv_policy": own},
        },
    )
    return answer
