"""Per-token results of a replay."""

from __future__ import annotations

import numpy as np
import torch

from .decoder import Decoder

# Bounds the size of one matrix of logits.
_ROWS = 256


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

    def all_logits(self) -> np.ndarray | None:
        """float64 [output tokens, vocabulary], if kept."""
        return None if self.logits is None else torch.cat(self.logits).numpy()
