"""Replays or generates the output of one request under an eviction policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from .decoder import Decoder
from .policies import Policy
from .request import KeptSet, Ledger, Request, Round
from .stats import load_stats
from .trace import Trace


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
    followed: int
    """Kept sets taken from the record against the oracle's own choice, over all rounds."""
    surplus: int
    """Recorded rounds beyond those of this output."""
    logits: np.ndarray | None
    """float64 [n, vocabulary], only if asked for."""


class Oracle:
    """A transformers model with explicit KV lists; CPU, one request at a time."""

    def __init__(
        self,
        model_dir: str | Path,
        stats_path: str | Path | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Load a Qwen3, Qwen2 or Llama model, and statistics in the official .pt layout.

        dtype, float32 or float64, is the model's; scores are always computed in float64.
        """
        self.decoder = Decoder(model_dir, dtype)
        self.stats = None
        if stats_path is not None:
            pairs = self.decoder.head_dim // 2
            self.stats = load_stats(stats_path, self.decoder.layers, self.decoder.heads, pairs)

    def replay(
        self,
        prompt_ids: Sequence[int],
        output_ids: Sequence[int],
        policy: Policy,
        page_size: int = 1,
        recorded: Sequence[KeptSet] | None = None,
        restarts: Sequence[int] = (),
        tolerance: float = 1e-5,
        keep_logits: bool = False,
    ) -> Replay:
        """Judge given output tokens.

        recorded: the kept positions of every round, in order, each shaped like `Round.kept`; one
            that differs is followed if all differing candidates score within `tolerance` of the
            edge of their set, else RoundMismatch is raised.
        restarts: output-token counts, ascending, at which the request was retracted: from there
            prompt and output so far are prefilled anew, all of it beyond eviction.
        """
        prompt, outputs = list(prompt_ids), list(output_ids)
        _validate(prompt, page_size)
        bounds = [0, *restarts, len(outputs)]
        if any(first > last for first, last in pairwise(bounds)) or len(outputs) in restarts:
            raise ValueError(f"restarts {list(restarts)} in {len(outputs)} output tokens")
        ledger = Ledger(policy, self.stats, recorded, tolerance)
        trace = Trace(self.decoder, keep_logits)
        for first, last in pairwise(bounds):
            if first < last:
                request = Request(self.decoder, prompt + outputs[:first], page_size, ledger)
                _follow(request, outputs, first, last, trace)
        return _result(trace, ledger)

    def generate(
        self,
        prompt_ids: Sequence[int],
        n: int,
        policy: Policy,
        page_size: int = 1,
        keep_logits: bool = False,
    ) -> Replay:
        """Generate n tokens greedily; there is no stop token."""
        prompt = list(prompt_ids)
        _validate(prompt, page_size)
        if n < 1:
            raise ValueError(f"{n} tokens to generate")
        ledger = Ledger(policy, self.stats, None, 0.0)
        trace = Trace(self.decoder, keep_logits)
        request = Request(self.decoder, prompt, page_size, ledger)
        trace.add(request.hidden, request.physical)
        for step in range(1, n):
            if request.steps_until_round() == 0:
                request.evict(step)
            hidden = request.feed(trace.output_ids[-1:])
            trace.add(hidden, request.physical)
        return _result(trace, ledger)


def _validate(prompt: list[int], page_size: int) -> None:
    if not prompt:
        raise ValueError("empty prompt")
    if page_size < 1:
        raise ValueError(f"page size {page_size}")


def _follow(request: Request, outputs: list[int], first: int, last: int, trace: Trace) -> None:
    """Output tokens [first, last): the first from the prefill, the others by decode steps."""
    trace.add(request.hidden, request.physical, outputs[first : first + 1])
    step = first + 1
    while step < last:
        if request.steps_until_round() == 0:
            request.evict(step)
        # Up to the next round the inputs are known, so the steps run as one causal chunk.
        free = request.steps_until_round()
        stop = last if free is None else min(last, step + free)
        hidden = request.feed(outputs[step - 1 : stop - 1])
        trace.add(hidden, request.physical, outputs[step:stop])
        step = stop


def _result(trace: Trace, ledger: Ledger) -> Replay:
    recorded = len(ledger.rounds) if ledger.recorded is None else len(ledger.recorded)
    return Replay(
        output_ids=np.array(trace.output_ids, dtype=np.int64),
        logprobs=np.array(trace.logprobs),
        greedy=np.array(trace.greedy, dtype=np.int64),
        margins=np.array(trace.margins),
        physical=np.array(trace.physical, dtype=np.int64),
        rounds=ledger.rounds,
        followed=sum(done.followed for done in ledger.rounds),
        surplus=recorded - len(ledger.rounds),
        logits=trace.all_logits(),
    )
