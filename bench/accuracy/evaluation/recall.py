"""How much of what will be needed does a method keep? One choice, beside future attention's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import product

import torch

from bench.simulator import Oracle, Request
from bench.simulator.baselines import FutureAttention
from bench.simulator.history import History
from bench.simulator.policies import Candidates, Policy
from bench.simulator.request import Ledger
from bench.simulator.selection import select
from bench.table import table

from .methods import METHODS, RECENT
from .plan import INTERVAL, hardest
from .runner import Subject, load

READ, KEPT = 0.75, 0.25
"""Shares of the output that has been read, and of that which is kept."""
FAR = 24
"""Tokens back, from where on attention is a look-up."""
INSTANCES = 10
"""Of each task at its hardest depth in range."""


def recalls(
    oracle: Oracle, prompt: list[int], output: list[int], methods: Iterable[str]
) -> dict[str, torch.Tensor]:
    """Look-ups, and each method's recall: float [layers, kv heads].

    Recall is the attention that tokens will be paid at most, summed over those that a method keeps,
    relative to those that are kept by future attention; without the latest tokens.
    """
    read = output[: round(READ * len(output))]
    keep = round(KEPT * len(read))
    future = FutureAttention(keep, INTERVAL, RECENT)
    paid_later = future.look_ahead(oracle.decoder, [*prompt, *output])
    ledger = Ledger(future, oracle.stats, None, 0.0)
    request = Request(oracle.decoder, History(oracle.decoder.new_cache()), 1, ledger, prompt)
    request.prefill(prompt, 0)
    request.feed(read)
    candidates = replace(request.candidates(), keep=keep, observed=request.observed())
    paid = future.rank(candidates).scores[..., :-RECENT]
    best = (paid * kept(future, candidates)).sum(2)
    found = {"look-ups": look_ups(paid_later, len(prompt))}
    for name in methods:
        found[name] = (paid * kept(METHODS[name](keep, INTERVAL), candidates)).sum(2) / best
    return found


def look_ups(paid: torch.Tensor, prompt: int) -> torch.Tensor:
    """Share of the output that pays most of its attention to one token of the output, FAR back.

    paid: as of `attention_paid`; prompt: tokens before the output. float32 [layers, kv heads].
    """
    place = torch.arange(paid.shape[-1])
    far = (place >= prompt) & (place <= place[:, None] - FAR)
    return ((paid * far).amax(3)[:, :, prompt:] > 0.5).float().mean(2)


def kept(policy: Policy, candidates: Candidates) -> torch.Tensor:
    """Which of the tokens before the latest: bool [layers, kv heads, n - RECENT]."""
    layers, heads, n = candidates.positions.shape
    index = select(policy.rank(candidates), candidates.keep).index.expand(layers, heads, -1)
    # Places without a token, of sets that are smaller than others, are marked behind the end.
    marks = torch.zeros(layers, heads, n + 1, dtype=torch.bool)
    return marks.scatter(2, index.where(index >= 0, torch.tensor(n)), True)[..., : -RECENT - 1]


def recall_table(subject: Subject, methods: Sequence[str]) -> str:
    """Means over held-out instances of all tasks: a row a method, a column a layer and KV head."""
    oracle = load(subject)
    found = [recalls(oracle, *question, methods) for question in hardest(subject.model, INSTANCES)]
    heads = product(range(oracle.decoder.layers), range(oracle.decoder.kv_heads))
    rows = [["layer.head", *(f"{layer}.{head}" for layer, head in heads)]]
    for name in found[0]:
        shares = torch.stack([one[name] for one in found]).mean(0).flatten()
        rows.append([name, *(f"{100 * share:.0f}%" for share in shares.tolist())])
    return table(rows)
