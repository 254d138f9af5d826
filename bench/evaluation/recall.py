"""How much of what will be needed does a method keep? One choice, beside foresight's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import product

import torch

from bench.reference_model.evaluate import instance
from bench.reference_model.tokenizer import output_ids, prompt_ids
from bench.simulator import Oracle, Request
from bench.simulator.baselines.foresight import Foresight, attention_paid
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
FAR = 24
"""Tokens back, from where on attention is a look-up."""
INSTANCES = 10
"""Of each task at its hardest depth in range."""


def recall(oracle: Oracle, prompt: list[int], output: list[int], method: str) -> torch.Tensor:
    """Attention that tokens will be paid at most, summed over those that a method keeps, relative
    to those that foresight keeps; without the latest tokens. float64 [layers, kv heads].
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
    return (paid * ours).sum(2) / (paid * best).sum(2)


def look_ups(oracle: Oracle, prompt: list[int], output: list[int]) -> torch.Tensor:
    """Share of the output that pays most of its attention to one token of the output, FAR back.

    float32 [layers, kv heads].
    """
    paid = attention_paid(oracle.decoder, [*prompt, *output])
    place = torch.arange(paid.shape[-1])
    far = (place >= len(prompt)) & (place <= place[:, None] - FAR)
    return ((paid * far).amax(3)[:, :, len(prompt) :] > 0.5).float().mean(2)


def kept(policy: Policy, candidates: Candidates) -> torch.Tensor:
    """bool [layers, kv heads, n]."""
    layers, heads, n = candidates.positions.shape
    index = select(policy.rank(candidates), candidates.keep).index.expand(layers, heads, -1)
    # Places without a token, of sets that are smaller than others, are marked behind the end.
    marks = torch.zeros(layers, heads, n + 1, dtype=torch.bool)
    return marks.scatter(2, index.where(index >= 0, torch.tensor(n)), True)[..., :n]


def recalls(subject: Subject, methods: Iterable[str]) -> dict[str, torch.Tensor]:
    """Look-ups and each method's recall, means over held-out instances of all tasks."""
    oracle = load(subject)
    questions = [
        instance(task, depths[-1], number)
        for task, depths in DEPTHS.items()
        for number in range(INSTANCES)
    ]
    pairs = [(prompt_ids(made.question), output_ids(made)) for made in questions]
    found = {"look-ups": torch.stack([look_ups(oracle, *pair) for pair in pairs]).mean(0)}
    for method in methods:
        found[method] = torch.stack([recall(oracle, *pair, method) for pair in pairs]).mean(0)
    return found


def recall_table(subject: Subject, methods: Sequence[str]) -> str:
    """One row a method, one column a layer and KV head."""
    decoder = load(subject).decoder
    heads = product(range(decoder.layers), range(decoder.kv_heads))
    rows = [["layer.head", *(f"{layer}.{head}" for layer, head in heads)]]
    for method, shares in recalls(subject, methods).items():
        rows.append([method, *(f"{100 * share:.0f}%" for share in shares.flatten().tolist())])
    return table(rows)
