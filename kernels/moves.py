"""How much is kept, how it is selected, and what comes of it: rows to copy."""

from __future__ import annotations

from dataclasses import dataclass

import torch

MODES = ("per-head", "per-layer-per-head", "union")


@dataclass(frozen=True)
class Budgets:
    """How many candidates each request keeps.

    Attributes:
        kept: int32 [requests]; a request with fewer candidates keeps them all.
        recent: int32 [requests], last candidates that are always kept; at most `kept`.
        largest: at least the largest of `kept`.
    """

    kept: torch.Tensor
    recent: torch.Tensor
    largest: int

    @classmethod
    def equal(
        cls, requests: int, kept: int, recent: int, device: torch.device | str = "cpu"
    ) -> Budgets:
        """The same for every request.

        Raises:
            ValueError: the counts do not fit.
        """
        if not 0 <= recent <= kept:
            raise ValueError(f"cannot keep {kept} candidates with the {recent} most recent")
        full = torch.full((2, requests), kept, dtype=torch.int32, device=device)
        full[1] = recent
        return cls(full[0], full[1], kept)

    def slice_requests(self, first: int, last: int) -> Budgets:
        """Requests [first, last)."""
        return Budgets(self.kept[first:last], self.recent[first:last], self.largest)


@dataclass(frozen=True)
class Selection:
    """How the best candidates are found.

    In this order: z-norm of each query head's row, maximum over the query heads of a KV head, and
    the mode: `per-head` takes the mean over layers, `per-layer-per-head` a set for each layer,
    `union` the maximum over all. The lowest index wins a tie.

    Attributes:
        kv_heads: the number of query heads is a multiple of it.
        mode: one of `MODES`.
        normalize: whether rows are z-normed.
        keep_order: whether the kept rows stay in order; otherwise holes are filled.

    Raises:
        ValueError: an unknown mode.
    """

    kv_heads: int
    mode: str
    normalize: bool = True
    keep_order: bool = False

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"unknown selection mode {self.mode!r}: use one of {', '.join(MODES)}")

    @property
    def by_layer(self) -> bool:
        """Whether each layer has kept sets of its own."""
        return self.mode == "per-layer-per-head"

    @property
    def heads(self) -> int:
        """How many kept sets a layer has."""
        return 1 if self.mode == "union" else self.kv_heads

    @property
    def aggregation_identity(self) -> float:
        """What no layers come to: aggregation starts from it."""
        return -torch.inf if self.mode == "union" else 0.0

    def check(self, query_heads: int) -> None:
        """Raise `ValueError` if the KV heads cannot share them evenly."""
        if query_heads % self.kv_heads:
            raise ValueError(f"{query_heads} query heads do not fit {self.kv_heads} KV heads")


@dataclass(frozen=True)
class Moves:
    """Rows to copy, as indices of candidates, in each request's kept sets.

    In this order no row is read after another was written over it. A set is kept for one layer or
    all (first axis), and for one KV head or all (third axis).

    Attributes:
        target, source: int32 [layers or 1, requests, kv_heads or 1, most]; only the first `count`
            entries of a set are defined.
        count: int32 [layers or 1, requests, kv_heads or 1].
    """

    target: torch.Tensor
    source: torch.Tensor
    count: torch.Tensor

    def packed(self, kept: int) -> torch.Tensor:
        """Which candidate each of the first `kept` slots holds after the moves.

        Returns:
            int64 [layers or 1, requests, kv_heads or 1, kept].
        """
        shape = *self.count.shape, kept + 1
        packed = torch.arange(kept + 1, device=self.count.device).expand(shape).clone()
        entry = torch.arange(self.target.shape[-1], device=self.count.device)
        # What is not defined goes into one slot more, which is cut off.
        target = self.target.long().where(entry < self.count[..., None], kept)
        return packed.scatter_(-1, target, self.source.long())[..., :kept]

    @classmethod
    def keeping(
        cls, kept: torch.Tensor, candidates: int, recent: int = 0, keep_order: bool = True
    ) -> Moves:
        """What leaves the candidates `kept` in the first slots.

        With `keep_order` they stay in order. Without it a kept row that already lies in the first
        `budget - recent` slots stays where it is, and only the holes are filled. Either way the
        last `recent` candidates end up, in order, in the last `recent` of the slots.

        Args:
            kept: int64 [..., budget], ascending, its last `recent` entries the last candidates.
            candidates: how many there are.
            recent: as above.
            keep_order: as above.
        """
        budget = kept.shape[-1]
        packed = kept if keep_order else _fill_holes(kept, candidates, recent)
        place = torch.arange(budget, device=kept.device).expand_as(packed)
        moving = packed != place
        # Moving entries first, as they come: holes before the most recent.
        order = (~moving).sort(dim=-1, stable=True).indices
        count = moving.sum(-1).int()
        return cls(order.int(), packed.gather(-1, order).int(), count)


def _fill_holes(kept: torch.Tensor, candidates: int, recent: int) -> torch.Tensor:
    """int64 [..., budget]: which candidate each slot receives when only holes are filled."""
    budget = kept.shape[-1]
    front = budget - recent
    is_kept = torch.zeros(*kept.shape[:-1], candidates, dtype=torch.bool, device=kept.device)
    is_kept.scatter_(-1, kept, True)
    hole = ~is_kept[..., :front]
    staying = front - hole.sum(-1, keepdim=True)
    filler = (staying + hole.cumsum(-1) - 1).clamp(0, max(budget - 1, 0))
    here = torch.arange(front, device=kept.device).expand_as(hole)
    packed = torch.where(hole, kept.gather(-1, filler), here)
    return torch.cat([packed, kept[..., front:]], -1)
