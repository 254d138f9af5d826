"""What the runs show: their medians beside production SGLang's, goals, a table, a picture."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.stats import ttest_1samp
from torch.utils.benchmark import Timer

from bench.goal import Goal
from bench.load.client import RATE, Run
from bench.load.workloads import CLIPPED, NEVER, POLICY, PRODUCTION, REASONING, RICH
from bench.table import spread, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RICH_RATIO, NEVER_RATIO, OF_ALLOWED = 0.98, 0.99, 0.8
BOUND = 0.5  # Share of its limit from which on a server counts as bound by bytes.
AS_MANY = 0.99  # Whose questions begin alike by chance depends on who came first.
NOTE = """
ratio: to production; of repeats: the lowest and the highest of one repeat; 95%: interval of their
geometric mean, by Student's t; to best: ratio to the best of production and its estimates; bytes
allow: what the ratio would be if a step took as long as reading the weights and the KV slots of its
batch, at the batch sizes that were measured; of limit: tokens/s to what this machine's copy
bandwidth allows; between tokens: the client spreads the time between two chunks over their tokens;
running and peak slots: as SGLang's metrics show them, ten times a second.
"""
_COLUMNS = {
    "workload": "{workload}",
    "pool": "{pool}",
    "slots": "{slots:.0f}",
    "arm": "{arm}",
    "tokens/s": "{rates}",
    "ratio": "{ratio:.2f}",
    "of repeats": "{least:.2f}-{most:.2f}",
    "95%": "{interval}",
    "to best": "{to_best:.2f}",
    "bytes allow": "{allowed:.2f}",
    "of limit": "{share:.1%}",
    "requests/s": "{request_throughput:.2f}",
    "first token p50/95/99, ms": "{median_ttft_ms:.0f}/{p95_ttft_ms:.0f}/{p99_ttft_ms:.0f}",
    "between tokens p50/95/99, ms": "{median_itl_ms:.0f}/{p95_itl_ms:.0f}/{p99_itl_ms:.0f}",
    "running": "{running:.1f}",
    "peak slots": "{peak_slots:.0f}",
    "cached": "{cached:.0f}",
    "retracted": "{retracted:.0f}",
    "rounds": "{rounds:.0f}",
    "attention": "{attention}",
}

Row = dict[str, Any]
"""An arm with one workload in one pool: medians of its runs' figures, and what `compare` adds."""


@dataclass(frozen=True)
class Traffic:
    """What one decoding step has to read. (What rounds read and move is not counted.)

    Attributes:
        weights: bytes of the weights, read once a step.
        slot: bytes of keys and values in one KV slot, of all layers.
        bandwidth: bytes per second that this machine copies, reads and writes counted.
    """

    weights: int
    slot: int
    bandwidth: float

    def tokens_per_second(self, running: float, slots: float) -> float:
        """Of a batch of `running` requests that reads `slots` KV slots in each step."""
        return running * self.bandwidth / (self.weights + slots * self.slot)


def traffic_of(model: Path) -> Traffic:
    """For the model in this folder, of which only `config.json` is read."""
    from transformers import AutoConfig, AutoModelForCausalLM  # Takes seconds.

    config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    if not config.tie_word_embeddings:
        parameters -= network.get_input_embeddings().weight.numel()  # A step reads a few rows.
    slot = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    item = config.dtype.itemsize
    # In a process of its own: memory that torch keeps on a GPU would be missing in the servers.
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return Traffic(parameters * item, slot * item, process.submit(_copy_bandwidth).result())


def _copy_bandwidth() -> float:
    """Bytes per second, the best of a few copies."""
    device, size = ("cuda", 2**30) if torch.cuda.is_available() else ("cpu", 2**27)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    names = {"source": source, "target": torch.empty_like(source)}
    timer = Timer("target.copy_(source)", globals=names, num_threads=torch.get_num_threads())
    return 2 * size / min(timer.timeit(1).mean for _ in range(5))


def compare(runs: Iterable[Run], traffic: Traffic) -> list[Row]:
    """A row for each arm of a workload in a pool where production SGLang has run, too.

    They add `ratio` of output tokens/s, `least` and `most` of repeats, whose arms ran one after
    another, `interval`, `to_best`, `share` of what bytes allow, and `allowed`, the ratio that they
    allow; `peak_slots` and `rounds_in_all` are of all repeats.
    """
    loads: dict[tuple[str, str], dict[str, list[Run]]] = {}
    for run in runs:
        loads.setdefault((run["workload"], run["pool"]), {}).setdefault(run["arm"], []).append(run)
    rows = []
    for arms in loads.values():
        if stock := arms.get(PRODUCTION):
            alike = [each for arm, each in arms.items() if arm.startswith((PRODUCTION, CLIPPED))]
            best = max(_medians(each)[RATE] for each in alike)
            rows += [_row(each, stock, best, traffic) for each in arms.values()]
    return rows


def _medians(runs: list[Run]) -> Row:
    """Of numbers; what else there is, of the first run."""
    numbers = [name for name, value in runs[0].items() if isinstance(value, int | float)]
    return runs[0] | {name: median(run[name] for run in runs) for name in numbers}


def _row(runs: list[Run], stock: list[Run], best: float, traffic: Traffic) -> Row:
    row, beside = _medians(runs), _medians(stock)
    limit, most = (traffic.tokens_per_second(r["running"], r["read"]) for r in (row, beside))
    # The last repeat may not have come to its end.
    ratios = [run[RATE] / other[RATE] for run, other in zip(runs, stock, strict=False)]
    return row | {
        "rates": spread([run[RATE] for run in runs]),
        "ratio": row[RATE] / beside[RATE],
        "least": min(ratios),
        "most": max(ratios),
        "interval": _interval(ratios),
        "to_best": row[RATE] / best,
        "share": row[RATE] / limit,
        "allowed": limit / most,
        "peak_slots": max(run["peak_slots"] for run in runs),
        "rounds_in_all": sum(run["rounds"] for run in runs),
    }


def _interval(ratios: list[float]) -> str:
    """At 95%; empty where there is one repeat, and for production itself."""
    if len(set(ratios)) < 2:
        return ""
    low, high = np.exp(ttest_1samp(np.log(ratios), 0).confidence_interval(0.95))
    return f"{low:.2f}-{high:.2f}"


def judge(rows: list[Row], least: float) -> list[Goal]:
    """All goals; `least` is the ratio that reasoning is to reach where memory is short."""
    stock = {(row["workload"], row["pool"]): row for row in rows if row["arm"] == PRODUCTION}
    goals = []
    for row in rows:
        if row["arm"] != POLICY:
            continue
        name, pool, ratio = row["workload"], row["pool"], row["ratio"]
        where, reasons = f"{name}, pool {pool}", name.startswith(REASONING)
        due = RICH_RATIO if pool == RICH else least if reasons else None
        met: bool | None = due is not None and ratio >= due
        if name.startswith(NEVER):
            rounds = row["rounds_in_all"]
            goals.append(Goal(f"{where}: no round", f"{rounds} rounds", not rounds, True))
            # A round makes the speed meaningless: it is not that of a server that never evicts.
            due, met = NEVER_RATIO, None if rounds else ratio >= NEVER_RATIO
        if due is not None:
            text = f"{where}: output tokens/s >= {due} x production's"
            goals.append(Goal(text, f"{ratio:.2f} x", met, False))
        beside = stock[name, pool]
        if reasons and pool != RICH:
            goals.append(_as_bytes_allow(where, beside["share"], ratio, row["allowed"]))
        if reasons:
            ours, theirs = row["cached"], beside["cached"]
            text, enough = "as many prompt tokens cached as in production", ours >= AS_MANY * theirs
            measured = f"{ours:.0f}, production {theirs:.0f}"
            goals.append(Goal(f"{where}: {text}", measured, enough, True))
    return goals


def _as_bytes_allow(where: str, bound: float, ratio: float, allowed: float) -> Goal:
    text, share = f"{where}: ratio >= {OF_ALLOWED:.0%} of what bytes allow", ratio / allowed
    if bound < BOUND:
        measured = f"bytes do not bind: production runs at {bound:.1%} of their limit"
        return Goal(text, measured, None, False)
    return Goal(text, f"{share:.0%} of {allowed:.2f} x", share >= OF_ALLOWED, False)


def show(rows: list[Row]) -> str:
    """As a table."""
    lines = [[text.format(**row) for text in _COLUMNS.values()] for row in rows]
    return table([[*_COLUMNS], *lines])


def draw(runs: Iterable[Run]) -> Figure:
    """Running requests and tokens per second over time, of each arm's first run."""
    from matplotlib.figure import Figure

    loads: dict[str, dict[str, Run]] = {}
    for run in runs:
        loads.setdefault(f"{run['workload']}, pool {run['pool']}", {}).setdefault(run["arm"], run)
    arms = list(dict.fromkeys(arm for load in loads.values() for arm in load))
    figure = Figure(figsize=(11, 2.6 * len(loads)), layout="constrained")
    axes = figure.subplots(len(loads), 2, squeeze=False)
    for pair, (name, load) in zip(axes, loads.items(), strict=True):
        for arm, run in load.items():
            times, *lines = zip(*run["over_time"], strict=True)
            for side, line in zip(pair, lines, strict=True):
                side.plot(times, line, color=f"C{arms.index(arm)}", label=arm)
        for side, what in zip(pair, ("running requests", "output tokens/s"), strict=True):
            side.set(xlim=(0, None), ylim=(0, None), xlabel="seconds", title=f"{name}: {what}")
    axes[0][1].legend()
    return figure
