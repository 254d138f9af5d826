"""What is measured by default: on a small machine, and with the shape of an 8B model on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from bench.load.arms import CONSTRAINED, POLICY, PRODUCTION, clip
from bench.load.workloads import (
    Workload,
    never_evicted,
    random_lengths,
    reasoning,
    shared_prefix,
)
from bench.models.dummy import make_dummy
from bench.models.tiny import make_model

RICH, FULL = "rich", "full"
WAVES = 4  # Of the load that is never evicted from: one is over too soon to be compared.


@dataclass(frozen=True)
class Pool:
    """A size of the pool, and what is measured in it.

    Attributes:
        name: how many reasoning requests stock SGLang has room for (4.4: for 4 and a part of a
            fifth); `rich`: for all; `full`: as many as the device's memory holds.
        slots: KV slots; None if the memory decides.
    """

    name: str
    slots: int | None
    workloads: list[Workload]


@dataclass(frozen=True)
class Preset:
    """Sizes of everything.

    Attributes:
        make_model: fills a folder with a model.
        server: arguments for all servers.
        own: further ones for servers of the model that `make_model` makes.
        most: `--max-running-requests`.
        budget, interval: of the policy.
        arms: names of the servers that are compared; production and the policy among them.
        systems: tokens of the system prompt of the reasoning workload, each is measured.
        outputs: its output tokens, each is measured.
        question: tokens of its questions.
        sent: requests sent to each pool: where stock SGLang has room for 4 of them, for 8, ...
        others: further workloads.
        untouched: requests at once of a further workload that is never evicted from; 0: none.
        others_in: the pools that these are sent to.
        side_by_side: whether all servers of a pool stand at once; else each has the device alone.
        goal: least ratio to production SGLang where memory is short.
        gpu: whether it needs one.
        times: how many times as many requests are sent; no more at once.
        kinds: what the names of the workloads begin with; empty: all.
    """

    make_model: Callable[[Path], Path]
    server: list[str]
    own: list[str]
    most: int
    budget: int
    interval: int
    arms: list[str]
    systems: list[int]
    outputs: list[int]
    question: int
    sent: dict[str, int]
    others: list[Workload]
    untouched: int
    others_in: list[str]
    side_by_side: bool
    goal: float
    gpu: bool
    times: int = 1
    kinds: tuple[str, ...] = ()

    def pools(self) -> list[Pool]:
        """For each length of prompt and output, in the order of `sent`."""
        lengths = list(product(self.systems, self.outputs))
        pools = [self._pool(name, *pair) for pair in lengths for name in self.sent]
        return [pool for pool in pools if pool.workloads]

    def _pool(self, name: str, system: int, output: int) -> Pool:
        workload = reasoning(self.sent[name], system, self.question, output)
        first = (system, output) == (self.systems[0], self.outputs[0])
        others = self._others(system) if first and name in self.others_in else []
        fitting = {RICH: workload.requests, FULL: None}.get(name, name)
        slots = None if fitting is None else workload.pool_for(float(fitting))
        chosen = [w for w in (workload, *others) if w.name.startswith(self.kinds or "")]
        return Pool(name, slots, [w.times(self.times) for w in chosen])

    def _others(self, system: int) -> list[Workload]:
        if not self.untouched:
            return self.others
        never = never_evicted(self.untouched, system, self.question, self.budget)
        return [*self.others, never.times(WAVES)]


PRESETS = {
    "tiny": Preset(
        make_model=lambda folder: make_model("qwen3", folder),
        server=["--stream-interval", "8"],
        own=[],
        most=64,
        budget=32,
        interval=16,
        arms=[PRODUCTION, clip(32), CONSTRAINED, POLICY],
        systems=[128],
        outputs=[160],
        question=32,
        sent={"4": 20, "8": 32, "16": 48, "32": 64, RICH: 32},
        others=[
            shared_prefix("shared prefix", 4, 8, system=256, question=32, output=48),
            random_lengths(32, prompt=256, output=192),
        ],
        untouched=32,
        others_in=[RICH],  # Elsewhere they would take too long.
        side_by_side=True,
        goal=1.2,
        gpu=False,
    ),
    "qwen3-8b": Preset(
        make_model=lambda folder: make_dummy("qwen3-8b", folder),
        server=["--stream-interval", "16"],
        own=["--load-format", "dummy"],
        most=256,
        budget=2048,
        interval=128,
        arms=[PRODUCTION, clip(1024), clip(8192), CONSTRAINED, POLICY],
        systems=[1024],
        outputs=[16384],
        question=128,
        sent={"4": 24, "8": 48, "16": 80, "32": 128, RICH: 24, FULL: 192},
        others=[
            shared_prefix("shared prefix", 16, 16, system=2048, question=128, output=256),
            random_lengths(256, prompt=1024, output=1024),
        ],
        untouched=0,
        others_in=["4", RICH],
        side_by_side=False,
        goal=2.5,
        gpu=True,
    ),
    # Minutes on one GPU of 80 GB: weights take 16 GB of each server, its pool 1.4.
    "quick": Preset(
        make_model=lambda folder: make_dummy("qwen3-8b", folder),
        server=[
            *("--stream-interval", "8", "--mem-fraction-static", "0.85"),
            # Few graphs are captured soon.
            *("--cuda-graph-bs-decode", "1", "4", "8", "16", "24", "32"),
            "--disable-prefill-cuda-graph",
        ],
        own=["--load-format", "dummy"],
        most=32,
        budget=256,
        interval=32,
        arms=[PRODUCTION, POLICY],
        systems=[64],
        outputs=[2048],
        question=32,
        sent={"4.4": 24},
        others=[],
        untouched=24,
        others_in=["4.4"],
        side_by_side=True,
        goal=2.5,
        gpu=True,
    ),
}
