"""What a policy is: given the candidates of a round, it says which are kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from sglang_tri.errors import KvPolicyError
from sglang_tri.kernels.moves import Budgets, Moves
from sglang_tri.kernels.pages import PagedBuffers, Pages
from sglang_tri.kernels.queries import Queries
from sglang_tri.kernels.scores import Scores
from sglang_tri.kernels.workspace import Workspace

if TYPE_CHECKING:
    from sglang_tri.config import KvPolicyConfig


@dataclass(frozen=True)
class Candidates:
    """The candidates of one round, or of a chunk of it.

    Attributes:
        settings: the requests' settings.
        keys: the engine's key cache of all layers, after RoPE.
        values: its value cache.
        positions: logical positions of the cached tokens, int32, in buffers like `keys` with one
            component; only for a policy that declares `needs_positions`.
        key_scale, value_scale: float32 [layers], what stored rows are to be multiplied by, or None.
        pages: where the candidates lie, in slot order.
        logical: int64 [requests], logical lengths: the position of each request's next token.
        budgets: how many each request keeps.
        queries: virtual queries, where the policy needs statistics.
        workspace: memory for results.
    """

    settings: KvPolicyConfig
    keys: PagedBuffers
    values: PagedBuffers
    positions: PagedBuffers | None
    key_scale: torch.Tensor | None
    value_scale: torch.Tensor | None
    pages: Pages
    logical: torch.Tensor
    budgets: Budgets
    queries: Queries | None
    workspace: Workspace


class Policy(ABC):
    """Chooses what is kept. Declares what it needs; the server does not start without it."""

    name: ClassVar[str]
    needs_statistics: ClassVar[bool] = False
    needs_second_moments: ClassVar[bool] = False
    needs_positions: ClassVar[bool] = False

    @classmethod  # noqa: B027 - most take any settings.
    def check_settings(cls, settings: KvPolicyConfig) -> None:
        """Raise `KvPolicyError` where the policy cannot work with `settings`."""

    @classmethod
    def check_second_moments(cls, known: bool) -> None:
        """Raise `KvPolicyError` if it needs E|q|^2, and the statistics do not have it."""
        if cls.needs_second_moments and not known:
            raise KvPolicyError(
                f"--kv-policy {cls.name} needs E|q|^2, which this server's --kv-stats file lacks, "
                "as official files do: use --kv-stats auto, or --kv-policy triattention."
            )


class DirectPolicy(Policy):
    """A policy that needs no scores: it says at once which rows move."""

    @abstractmethod
    def moves(self, candidates: Candidates) -> Moves:
        """What leaves the kept candidates in the first slots.

        The last `settings.recent` candidates have to end up, in order, in the last of these.
        """


class ScoringPolicy(Policy):
    """A policy that gives every candidate a score; the best are kept, and the most recent.

    Attributes:
        keeps_order: whether survivors stay in the order of their slots, which moves more rows.
    """

    keeps_order: ClassVar[bool] = False

    @abstractmethod
    def score(self, candidates: Candidates) -> Scores:
        """Scores of the candidates in the layers given; higher is kept."""
