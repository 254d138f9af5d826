"""An independent decoder of any architecture: transformers, with what was evicted masked.

In the mode `union` all layers and heads keep the same tokens. Then who sees whom in a request is
one matrix, and a single forward pass over all of its tokens gives what the server should have said.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from bench.accuracy.client import Answer, Recorded


def visible(prompt: int, tokens: int, rounds: Recorded) -> torch.Tensor:
    """Whether a token (row) sees another (column): bool [tokens, tokens].

    Args:
        prompt: tokens that are never evicted.
        tokens: of prompt and output.
        rounds: kept sets of the mode `union`; a round concerns tokens from its length on.
    """
    seen = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    for kept, length in zip(rounds.kept, rounds.lengths, strict=True):
        gone = torch.ones(tokens, dtype=torch.bool)
        gone[:prompt] = gone[length:] = False
        gone[torch.from_numpy(kept[0, 0])] = False
        seen[length:, gone] = False
    return seen


class Masked:
    """A model folder in float32."""

    def __init__(self, path: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    @torch.inference_mode()
    def logprobs(self, answer: Answer, rounds: Recorded) -> np.ndarray:
        """Of the output tokens in nats, float64 [tokens]."""
        prompt, ids = len(answer.ask.prompt), torch.tensor(answer.tokens)
        seen = visible(prompt, len(ids), rounds)
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        logits = self._model(ids[None], attention_mask=mask[None, None], use_cache=False).logits[0]
        logs = logits[prompt - 1 : -1].double().log_softmax(-1)
        return logs.gather(1, ids[prompt:, None])[:, 0].numpy()
