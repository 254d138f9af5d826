"""Write every round's choice to files, in logical positions: for tests and for debugging."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from urllib.parse import quote

import numpy as np
import torch

from sglang_tri.rounds import Due, Round

_LONGEST_NAME = 200


def file_name(rid: str) -> str:
    """What stands for a request's id, which a client may have chosen, in the names of its files."""
    name = quote(rid, safe="")
    return name if len(name) <= _LONGEST_NAME else sha256(name.encode()).hexdigest()


class TraceWriter:
    """An observer of rounds that writes `{file_name(rid)}-{round}.npz` into a folder.

    Each file holds `logical` (logical length at the round), `start` (first evictable slot) and
    `kept`, int64 [layers or 1, kv_heads or 1, kept]: logical positions, ascending.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, planned: Round, packed: torch.Tensor) -> None:
        for index, due in enumerate(planned.due):
            logical, places = int(planned.logical[index]), packed[:, index].cpu()
            positions = self._candidates(due, logical, places)
            due.region.positions = positions.gather(-1, places)
            chosen = due.region.positions.sort(-1).values
            np.savez(
                self._folder / f"{file_name(due.state.rid)}-{due.state.rounds:05d}.npz",
                logical=logical,
                start=due.region.start,
                kept=chosen.numpy(),
            )

    @staticmethod
    def _candidates(due: Due, logical: int, places: torch.Tensor) -> torch.Tensor:
        """Logical positions of the candidates, in slot order: [layers or 1, heads or 1, n]."""
        before = due.region.positions
        if before is None:
            first = due.region.start + due.region.before
            return torch.arange(first, logical).expand(*places.shape[:2], -1)
        new = torch.arange(logical - (due.candidates - before.shape[-1]), logical)
        return torch.cat([before, new.expand(*before.shape[:2], -1)], -1)
