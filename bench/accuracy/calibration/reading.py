"""A given text, read under eviction."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch

from bench.simulator import Policy, Request, Stats
from bench.simulator.decoder import Decoder
from bench.simulator.history import History
from bench.simulator.request import Ledger

PROMPT = 32
"""Tokens that count as the prompt; those behind them are fed as if the model had written them."""


class Reading:
    """A text up to its first round, from where it can go on in several ways."""

    def __init__(self, decoder: Decoder, ids: Sequence[int], policy: Policy) -> None:
        """policy: of the size of those to come. Raises ValueError: no round before the end."""
        self.decoder = decoder
        self.ids = list(ids)
        prompt = self.ids[:PROMPT]
        ledger = Ledger(policy, None, None, 0.0)
        self.begun = Request(decoder, History(decoder.new_cache()), 1, ledger, prompt)
        self.begun.prefill(prompt, 0)
        free = self.begun.steps_until_round()
        if free is None or PROMPT + free >= len(self.ids) - 1:
            raise ValueError(f"{len(self.ids)} tokens: they end before a round")
        self.begun.feed(self.ids[PROMPT : PROMPT + free])

    @property
    def fed(self) -> int:
        """Tokens read when the first round is due."""
        return self.begun.history.length

    def full(self) -> torch.Tensor:
        """Losses without eviction, in nats: float32 [tokens behind the first round]."""
        cache = self.begun.history.fork().cache
        hidden = self.decoder.feed(self.ids[self.fed : -1], self.fed, cache)
        return self._losses(hidden, self.fed)

    def evicting(self, policy: Policy, stats: Stats | None) -> torch.Tensor:
        """The same under a policy."""
        return torch.cat([self._losses(hidden, at) for at, hidden in self._go_on(policy, stats)])

    def watch(self, policy: Policy) -> None:
        """Let a policy hold its rounds, without losses."""
        for _ in self._go_on(policy, None):
            pass

    def _go_on(self, policy: Policy, stats: Stats | None) -> list[tuple[int, torch.Tensor]]:
        """Places and hidden states of the stretches between rounds."""
        request = copy.copy(self.begun)
        request.history = self.begun.history.fork()
        request.ledger = Ledger(policy, stats, None, 0.0)
        found = []
        while (at := request.history.length) < len(self.ids) - 1:
            request.evict(at - PROMPT)
            end = min(at + (request.steps_until_round() or 0), len(self.ids) - 1)
            found.append((at, request.feed(self.ids[at:end])))
        return found

    @torch.inference_mode()
    def _losses(self, hidden: torch.Tensor, at: int) -> torch.Tensor:
        """Of the tokens behind those that were fed from place `at` on."""
        target = torch.tensor(self.ids[at + 1 : at + 1 + len(hidden)])
        logs = self.decoder.logits(hidden).log_softmax(-1)
        return -logs.gather(1, target[:, None]).squeeze(1)
