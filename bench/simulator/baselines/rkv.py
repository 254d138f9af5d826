"""R-KV (arXiv 2505.24133): important keys that no later key resembles, stay."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..observed import Observed
from .base import LiveQueries

ALIKE = 0.5
"""Cosine above which two keys are alike."""


class RKV(LiveQueries):
    """`mix` x importance - (1 - `mix`) x redundancy; the last `window` tokens stay.

    Window, kernel and mix are those of the authors' code.
    """

    def __init__(
        self, budget: int, interval: int, window: int = 8, kernel: int = 7, mix: float = 0.07
    ) -> None:
        super().__init__(budget, interval, window)
        if window < 1 or kernel % 2 == 0 or not 0 <= mix <= 1:
            raise ValueError(f"window {window}, kernel {kernel}, mix {mix}")
        self.window = window
        self.kernel = kernel
        self.mix = mix

    def scores(self, observed: Observed) -> torch.Tensor:
        repeated = redundancy(observed.keys[:, :, observed.start :].to(torch.float64))
        return self.mix * self.importance(observed) - (1 - self.mix) * repeated

    def importance(self, observed: Observed) -> torch.Tensor:
        """Attention of the window on what precedes it: float64 [layers, kv heads, n].

        The greatest logit of the group, softmax, mean over the window, greatest of neighbours.
        """
        logits = observed.logits(self.window).amax(dim=2)[..., : -self.window]
        paid = logits.softmax(dim=-1).mean(dim=2)[..., observed.start :]
        pooled = F.max_pool1d(paid, self.kernel, 1, self.kernel // 2)
        return F.pad(pooled, (0, self.window))


def redundancy(keys: torch.Tensor) -> torch.Tensor:
    """How much each key resembles the others: softmax over n of [layers, kv heads, n].

    keys: [layers, kv heads, n, head_dim]. The mean cosine with all keys; but of those alike to a
    key the latest is not charged with that likeness, so that one of a group of equals stays.
    """
    unit = F.normalize(keys, dim=-1)
    cosine = unit @ unit.transpose(2, 3)
    places = torch.arange(cosine.shape[-1])
    cosine = cosine.masked_fill(places[:, None] == places, 0.0)
    latest = torch.where(cosine > ALIKE, places, 0).amax(dim=-1, keepdim=True)
    return cosine.scatter(-1, latest, 0.0).mean(dim=2).softmax(dim=-1)
