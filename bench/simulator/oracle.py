"""The oracle: judges given outputs, or generates, under an eviction policy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from .conversation import Conversation, Restart
from .decoder import Decoder
from .history import History
from .policies import Policy
from .request import KeptSet, Ledger, Request
from .stats import load_stats
from .trace import Replay, Trace


class Oracle:
    """A transformers model with explicit KV lists; CPU, one request at a time."""

    def __init__(
        self,
        model_dir: str | Path,
        stats_path: str | Path | None = None,
        dtype: torch.dtype = torch.float32,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        """Load a Qwen3, Qwen2 or Llama model, and statistics in the official .pt layout.

        dtype, float32 or float64, is the model's; scores are always computed in float64.
        kv_dtype: of the KV cache, e.g. torch.float8_e4m3fn; the model's if None.
        """
        self.decoder = Decoder(model_dir, dtype, kv_dtype)
        self.stats = None
        if stats_path is not None:
            pairs = self.decoder.head_dim // 2
            self.stats = load_stats(stats_path, self.decoder.layers, self.decoder.heads, pairs)

    def conversation(self, policy: Policy, page_size: int = 1) -> Conversation:
        """One without turns yet."""
        return Conversation(self.decoder, self.stats, policy, page_size)

    def replay(
        self,
        prompt_ids: Sequence[int],
        output_ids: Sequence[int],
        policy: Policy,
        page_size: int = 1,
        recorded: Sequence[KeptSet] | None = None,
        restarts: Sequence[Restart] = (),
        closes: Sequence[int] = (),
        tolerance: float = 1e-5,
        keep_logits: bool = False,
    ) -> Replay:
        """Judge given output tokens as a conversation's only turn; see `Conversation.turn`."""
        return self.conversation(policy, page_size).turn(
            prompt_ids, output_ids, 0, recorded, restarts, closes, tolerance, keep_logits
        )

    def generate(
        self,
        prompt_ids: Sequence[int],
        n: int,
        policy: Policy,
        page_size: int = 1,
        keep_logits: bool = False,
    ) -> Replay:
        """Generate n tokens greedily; there is no stop token."""
        if n < 1:
            raise ValueError(f"{n} tokens to generate")
        ledger = Ledger(policy, self.stats, None, 0.0)
        trace = Trace(self.decoder, keep_logits)
        history = History(self.decoder.new_cache())
        request = Request(self.decoder, history, page_size, ledger, prompt_ids)
        trace.add(request.prefill(list(prompt_ids), 0), history.physical)
        for step in range(1, n):
            if request.steps_until_round() == 0:
                request.evict(step)
            hidden = request.feed(trace.output_ids[-1:])
            trace.add(hidden, history.physical)
        return trace.replay(ledger)
