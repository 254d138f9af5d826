"""SnapKV (arXiv 2404.14469) while decoding: what the last queries attend to, stays."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..observed import Observed
from .base import LiveQueries


class SnapKV(LiveQueries):
    """Mean attention of the last `window` queries, averaged over `kernel` neighbours.

    The paper compresses a prompt once; held at every round, this is the variant that R-KV compares
    with on long outputs (arXiv 2505.24133), whose window and kernel are the defaults.
    """

    def __init__(self, budget: int, interval: int, window: int = 8, kernel: int = 7) -> None:
        super().__init__(budget, interval, window)
        if window < 1 or kernel % 2 == 0:
            raise ValueError(f"window {window}, kernel {kernel}: at least 1, and an odd number")
        self.window = window
        self.kernel = kernel

    def scores(self, observed: Observed) -> torch.Tensor:
        weights = observed.logits(self.window).softmax(dim=-1)[..., observed.start :]
        paid = weights.mean(dim=(2, 3))
        return F.avg_pool1d(paid, self.kernel, 1, self.kernel // 2, count_include_pad=False)
