"""The policy of one scheduler process: what the hooks call, and what they share."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

from sglang_tri.config import KvPolicyConfig
from sglang_tri.errors import KvPolicyError
from sglang_tri.history import AliasStore
from sglang_tri.kernels.queries import Queries
from sglang_tri.kernels.workspace import Workspace
from sglang_tri.policies import POLICIES
from sglang_tri.policies.base import Candidates
from sglang_tri.request.region import ceil_to
from sglang_tri.request.request import Request
from sglang_tri.round.plan import DueRequest, Round, plan, upload
from sglang_tri.round.run import WORKSPACE_BYTES, KvCache, RoundSize, run

# A plan is made on one stream and read on another: its tensors must outlive both in-flight steps.
_STEPS_KEPT_ALIVE = 4


class Observer(Protocol):
    """Sees every round, on the stream that the round runs on; used to write traces."""

    def before(self, planned: Round) -> None:
        """No row has moved yet."""

    def after(self, planned: Round, packed: torch.Tensor) -> None:
        """The round is done; `packed` says which candidate each slot holds now.

        It is int64 [layers or 1, requests, kv_heads or 1, kept].
        """


@dataclass(slots=True)
class Counters:
    """Totals of one server since its start."""

    rounds: int = 0
    evicted_tokens: int = 0
    requests_evicted: int = 0
    requests_refused: int = 0
    resident_generated_max: int = 0

    def saw_resident(self, slots: int) -> None:
        self.resident_generated_max = max(self.resident_generated_max, slots)


class Engine:
    """State of the policy in one scheduler process.

    Args:
        settings: the server's settings, the default of every request.
        cache: the KV cache that rounds read and compact.
        rows: rows of the engine's request-to-slot table.
        queries: virtual queries, or None where there are no statistics, or not yet.
        workspace: memory for scores; by default it is allocated here.
        observer: told of each round before and after it is run.
        think_mark: token ids that end the model's thinking, or none.

    Attributes:
        aliases: compressed history that can be found again.
        counters: see `Counters`.
        statistics: file of the query statistics in use, or None.
    """

    def __init__(
        self,
        settings: KvPolicyConfig,
        cache: KvCache,
        rows: int,
        queries: Queries | None = None,
        workspace: Workspace | None = None,
        observer: Observer | None = None,
        think_mark: array[int] | None = None,
    ) -> None:
        self.settings = settings
        self.page_size = cache.keys.page_size
        self.counters = Counters()
        self.aliases = AliasStore(settings.alias_limit)
        self.think_mark = think_mark or array("q")
        self.statistics: str | None = None
        self.deltas = torch.zeros(rows, dtype=torch.int64, device=cache.device)
        wanted = POLICIES.get(settings.policy)
        self.cache = cache.with_positions() if wanted and wanted.needs_positions else cache
        self.queries = queries
        self.workspace = workspace or Workspace(WORKSPACE_BYTES, cache.device)
        self._observer = observer
        self._policies = {name: policy() for name, policy in POLICIES.items()}
        self._planned: list[Round] = []
        self._alive: deque[list[Round]] = deque(maxlen=_STEPS_KEPT_ALIVE)
        self._shifted: set[Request] = set()

    # Requests.

    def check_runnable(self, settings: KvPolicyConfig) -> None:
        """Raise `KvPolicyError` if this server lacks what the policy of `settings` needs."""
        if not settings.enabled:
            return
        policy = self._policies[settings.policy]
        if policy.needs_statistics and self.queries is None:
            raise KvPolicyError(
                f"--kv-policy {settings.policy} needs query statistics, and this server was "
                "started without any: give --kv-stats FILE."
            )
        policy.check_second_moments(self.queries is None or self.queries.variance is not None)
        if policy.needs_positions and self.cache.positions is None:
            raise KvPolicyError(
                f"--kv-policy {settings.policy} needs positions, which this server was started "
                f"without: start it with --kv-policy {settings.policy}."
            )
        keys, kept = self.cache.keys, ceil_to(settings.budget, self.page_size)
        longest = kept + ceil_to(settings.interval, self.page_size)
        largest = RoundSize.for_lengths(policy, settings, keys, self.queries, longest, kept)
        largest.check_fits(self.workspace.size)

    def queue(
        self, rid: str, prompt: array[int], settings: KvPolicyConfig, scope: str | None = None
    ) -> Request | None:
        """State for a new request, or None where its policy is `none`; see `Request.queued`.

        Raises:
            KvPolicyError: the settings are not possible on this server.
        """
        if settings is not self.settings:  # The server's own were checked at its start.
            self.check_runnable(settings)
        if not settings.enabled:
            return None
        return Request.queued(rid, prompt, settings, self.page_size, self.think_mark, scope)

    def released(self, request: Request, length: int) -> None:
        """The `length` slots of a request are about to be released."""
        self.counters.saw_resident(request.resident(length))
        self._shifted.discard(request)

    def report(self) -> dict[str, Any]:
        """Settings and counters, plain values, for `/server_info`."""
        settings = self.settings
        return {
            "policy": settings.policy,
            "mode": settings.eviction_mode,
            "budget": settings.budget,
            "interval": settings.interval,
            "reuse": settings.reuse,
            **asdict(self.counters),
            "statistics": self.statistics,
            **self.aliases.report(),
        }

    # Rounds.

    def plan_rounds(
        self, requests: Sequence[DueRequest], request_to_slot: torch.Tensor
    ) -> torch.Tensor:
        """Plan a round for each of `requests` and remember it; see `plan`.

        Returns:
            int64 [freed], the slots that are free from now on.
        """
        for due in requests:
            self.counters.saw_resident(due.request.resident(due.physical))
            self.counters.requests_evicted += not due.request.was_evicted_from
            self._shifted.add(due.request)
        planned, freed = plan(requests, request_to_slot, self.page_size)
        self._planned += planned
        self.counters.rounds += len(requests)
        self.counters.evicted_tokens += len(freed)
        return freed

    def run_rounds(self) -> None:
        """Run the planned rounds. Call on the stream of the forward pass, before its first read."""
        if not self._planned:
            return
        for planned in self._planned:
            self._run(planned)
        self._alive.append(self._planned)
        self._planned = []

    def _run(self, planned: Round) -> None:
        policy, observer = self._policies[planned.settings.policy], self._observer
        if policy.needs_positions:
            self.cache.place(planned)
        if observer is not None:
            observer.before(planned)
        packed = run(policy, self.candidates(planned), self.cache, trace=observer is not None)
        self.deltas[planned.rows] = planned.deltas
        if observer is not None and packed is not None:
            observer.after(planned, packed)

    def candidates(self, planned: Round) -> Candidates:
        """Those of a round, with what this server has for scoring them."""
        cache = self.cache
        return Candidates(
            planned.settings,
            cache.keys,
            cache.values,
            cache.positions,
            cache.key_scale,
            cache.value_scale,
            planned.pages,
            planned.logical,
            planned.budgets,
            self.queries,
            self.workspace,
        )

    # Positions: RoPE counts tokens, everything else counts slots.

    @property
    def shifts_positions(self) -> bool:
        """Whether any request's logical and physical lengths differ now."""
        return bool(self._shifted)

    def start_prefill(self, rows: torch.Tensor, requests: Sequence[Request | None]) -> None:
        """Rows [requests] are about to be prefilled, behind the history of `requests`."""
        deltas = [request.delta if request else 0 for request in requests]
        if not any(deltas):
            self.deltas.index_fill_(0, rows, 0)
            return
        self._shifted.update(request for request in requests if request and request.delta)
        self.deltas[rows] = upload(deltas, torch.int64, self.deltas.device)

    def offsets(
        self, rows: torch.Tensor, lengths: torch.Tensor | None, tokens: int
    ) -> torch.Tensor:
        """What RoPE positions are ahead of slot numbers in the next forward pass.

        Args:
            rows: int64 [requests], rows of the request-to-slot table.
            lengths: int32 [requests], tokens of each request; None where each has one.
            tokens: how many these are together.

        Returns:
            int64 [tokens].
        """
        deltas = self.deltas[rows]
        if lengths is None:
            return deltas
        return deltas.repeat_interleave(lengths, output_size=tokens)
