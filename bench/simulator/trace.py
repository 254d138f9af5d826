"""Per-token results of a replay."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch

from .decoder import Decoder
from .request import Ledger, Round

# Bounds the size of one matrix of logits.
_ROWS = 256


@dataclass(frozen=True)
class Replay:
    """What the model says along one output; arrays have one entry (row) an output token."""

    output_ids: np.ndarray
    """int64 [n]."""
    logprobs: np.ndarray
    """Log-probability (nats) of the output token: float64 [n]."""
    greedy: np.ndarray
    """The most probable token: int64 [n]."""
    margins: np.ndarray
    """Best logit minus the second: float64 [n]."""
    physical: np.ndarray
    """Resident tokens of a head when the output token is sampled: int64 [n]."""
    rounds: list[Round]
    """Those that precede an output token."""
    followed: int
    """Kept sets taken from the record against the oracle's own choice, over all rounds held."""
    surplus: int
    """Recorded rounds that precede no output token."""
    logits: np.ndarray | None
    """float64 [n, vocabulary], only if asked for."""


class Trace:
    """Collects what the model says at each output token."""

    def __init__(self, decoder: Decoder, keep_logits: bool) -> None:
        self.decoder = decoder
        self.logits: list[torch.Tensor] | None = [] if keep_logits else None
        self.output_ids: list[int] = []
        self.logprobs: list[float] = []
        self.greedy: list[int] = []
        self.margins: list[float] = []
        self.physical: list[int] = []

    def add(self, hidden: torch.Tensor, physical: int, tokens: list[int] | None = None) -> None:
        """Note output tokens (the greedy ones if None) sampled from hidden states [T, width].

        physical: resident tokens when the last of them is sampled, one less for each before.
        """
        self.physical += range(physical - len(hidden) + 1, physical + 1)
        for begin in range(0, len(hidden), _ROWS):
            logits = self.decoder.logits(hidden[begin : begin + _ROWS]).to(torch.float64)
            best = logits.topk(2, dim=-1)
            chosen = best.indices[:, 0]
            self.greedy += chosen.tolist()
            self.margins += (best.values[:, 0] - best.values[:, 1]).tolist()
            if tokens is not None:
                chosen = torch.tensor(tokens[begin : begin + _ROWS])
            self.output_ids += chosen.tolist()
            rows = logits.log_softmax(dim=-1).gather(1, chosen[:, None])
            self.logprobs += rows.flatten().tolist()
            if self.logits is not None:
                self.logits.append(logits)

    def replay(self, ledger: Ledger, discarded: Collection[int] = ()) -> Replay:
        """The result; discarded: decode steps that gave no output token."""
        rounds = [done for done in ledger.rounds if done.step not in discarded]
        recorded = len(rounds) if ledger.recorded is None else len(ledger.recorded)
        return Replay(
            output_ids=np.array(self.output_ids, dtype=np.int64),
            logprobs=np.array(self.logprobs),
            greedy=np.array(self.greedy, dtype=np.int64),
            margins=np.array(self.margins),
            physical=np.array(self.physical, dtype=np.int64),
            rounds=rounds,
            followed=sum(done.followed for done in ledger.rounds),
            surplus=recorded - len(rounds),
            logits=None if self.logits is None else torch.cat(self.logits).numpy(),
        )
