"""How much of what will be needed does a method keep? One choice, beside foresight's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from bench.reference_model.evaluate import instance
from bench.reference_model.tokenizer import output_ids, prompt_ids
from bench.simulator import Oracle, Request
from bench.simulator.baselines import Foresight
from bench.simulator.history import History
from bench.simulator.policies import Candidates, Policy
from bench.simulator.request import Ledger
from bench.simulator.selection import select
from bench.table import table

from .methods import METHODS, RECENT
from .plan import DEPTHS, INTERVAL
from .runner import Subject, load

READ, KEPT = 0.75, 0.25
"""Shares of the output that has been read, and of that which is kept."""
INSTANCES = 10
"""Of each task at its hardest depth in range."""


def recall(oracle: Oracle, prompt: list[int], output: list[int], method: str) -> torch.Tensor:
    """Attention that tokens will be paid at most, summed over those that a method keeps, relative
    to those that foresight keeps; without the latest tokens. float64 [layers].
    """
    read = output[: round(READ * len(output))]
    keep = round(KEPT * len(read))
    foresight = Foresight(keep, INTERVAL, RECENT)
    foresight.look_ahead(oracle.decoder, [*prompt, *output])
    policy = METHODS[method](keep, INTERVAL)
    ledger = Ledger(policy, oracle.stats, None, 0.0)
    request = Request(oracle.decoder, History(oracle.decoder.new_cache()), 1, ledger, prompt)
    request.prefill(prompt, 0)
    request.feed(read)
    candidates = replace(request.candidates(), keep=keep)
    ours, best = (kept(p, candidates)[..., :-RECENT] for p in (policy, foresight))
    paid = foresight.rank(candidates).scores[..., :-RECENT]
    return (paid * ours).sum((1, 2)) / (paid * best).sum((1, 2))


def kept(policy: Policy, candidates: Candidates) -> torch.Tensor:
    """bool [layers, kv heads, n]."""
    layers, heads, n = candidates.positions.shape
    index = select(policy.rank(candidates), candidates.keep).index.expand(layers, heads, -1)
    # Places without a token, of sets that are smaller than others, are marked behind the end.
    marks = torch.zeros(layers, heads, n + 1, dtype=torch.bool)
    return marks.scatter(2, index.where(index >= 0, torch.tensor(n)), True)[..., :n]


def recalls(subject: Subject, methods: Iterable[str]) -> dict[str, torch.Tensor]:
    """Means over held-out instances of all tasks: float [layers] each."""
    oracle = load(subject)
    questions = [
        instance(task, depths[-1], number)
        for task, depths in DEPTHS.items()
        for number in range(INSTANCES)
    ]
    pairs = [(prompt_ids(made.question), output_ids(made)) for made in questions]
    return {
        method: torch.stack([recall(oracle, *pair, method) for pair in pairs]).mean(0)
        for method in methods
    }


def recall_table(subject: Subject, methods: Sequence[str]) -> str:
    """One row a method, one column a layer."""
    rows = [["", *(f"layer {layer}" for layer in range(load(subject).decoder.layers))]]
    for method, shares in recalls(subject, methods).items():
        rows.append([method, *(f"{100 * share:.0f}%" for share in shares.tolist())])
    return table(rows)
