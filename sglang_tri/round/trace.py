"""Write every round's choice to files, in logical positions: for tests and for debugging."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import quote
from weakref import WeakKeyDictionary

import numpy as np
import torch

from sglang_tri.kernels.pages import PagedBuffers, Pages
from sglang_tri.request.request import Request
from sglang_tri.round.plan import DueRequest, Round

_LONGEST_NAME = 200


def file_name(rid: str) -> str:
    """What stands for a request's id, which a client may have chosen, in the names of its files."""
    name = quote(rid, safe="")
    return name if len(name) <= _LONGEST_NAME else sha256(name.encode()).hexdigest()


class TraceWriter:
    """An observer of rounds that writes `{file_name(rid)}-{round}.npz` into a folder.

    Each file holds `logical` (logical length at the round), `start` (first evictable slot) and
    `kept`, int64 [layers or 1, kv_heads or 1, kept]: logical positions, ascending.

    With `rows` it also holds `places`, int64 like `kept`: which candidate each kept slot holds now;
    and the bytes of rows, uint8 [layers, candidates or kept, kv_heads, bytes]: `keys_before` and
    `values_before` of the candidates, in slot order, `keys_after` and `values_after` of the slots
    that were kept.

    Args:
        folder: made where it is missing.
        rows: K, then V of all layers as stored, or nothing.
    """

    def __init__(self, folder: str | Path, rows: Sequence[PagedBuffers] = ()) -> None:
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._layers = [layer for buffers in rows for layer in buffers.layers]
        self._before: list[dict[str, np.ndarray]] = []
        # Logical positions by slot, as the last round left them.
        self._kept: WeakKeyDictionary[Request, torch.Tensor] = WeakKeyDictionary()

    def before(self, planned: Round) -> None:
        if self._layers:
            self._before = [
                self._read(planned.pages, index, due.candidates, "before")
                for index, due in enumerate(planned.requests)
            ]

    def after(self, planned: Round, packed: torch.Tensor) -> None:
        for index, due in enumerate(planned.requests):
            places = packed[:, index].cpu()
            kept = self._candidates(due, places).gather(-1, places)
            self._kept[due.request] = kept
            content: dict[str, Any] = {
                "logical": due.logical,
                "start": due.region.start,
                "kept": kept.sort(-1).values.numpy(),
            }
            if self._layers:
                content |= self._before[index]
                content |= self._read(planned.pages, index, places.shape[-1], "after")
                content["places"] = places.numpy()
            name = f"{file_name(due.request.rid)}-{due.request.rounds:05d}.npz"
            np.savez(self._folder / name, **content)

    def _read(self, pages: Pages, request: int, count: int, when: str) -> dict[str, np.ndarray]:
        """Bytes of the first `count` candidates' rows, by the names that they get in the file."""
        page, row = (index[:count] for index in pages.rows(request))
        read = [layer[page, row].view(torch.uint8) for layer in self._layers]
        keys, values = read[: len(read) // 2], read[len(read) // 2 :]
        return {
            f"keys_{when}": torch.stack(keys).cpu().numpy(),
            f"values_{when}": torch.stack(values).cpu().numpy(),
        }

    def _candidates(self, due: DueRequest, places: torch.Tensor) -> torch.Tensor:
        """Logical positions of the candidates, in slot order: [layers or 1, heads or 1, n]."""
        new = torch.arange(due.logical - due.candidates + due.seen, due.logical)
        new = new.expand(*places.shape[:2], -1)
        return torch.cat([self._kept[due.request], new], -1) if due.seen else new
