"""Plan rounds on the scheduler's thread, run them just before the next forward pass.

Which slots become free depends on lengths only, so a plan needs no result from the device: the
survivors are packed into the first slots of the private region and its tail is free at once.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch

from sglang_tri import planning
from sglang_tri.aliases import Lookup
from sglang_tri.config import KvPolicyConfig
from sglang_tri.errors import KvPolicyError
from sglang_tri.execution import Cache, execute
from sglang_tri.kernels.moves import Budgets
from sglang_tri.kernels.pages import Pages
from sglang_tri.kernels.queries import Queries
from sglang_tri.kernels.workspace import Workspace
from sglang_tri.parts import WORKSPACE_BYTES, Geometry, Parts
from sglang_tri.policies import POLICIES
from sglang_tri.policies.base import Candidates, Policy
from sglang_tri.rounds import (
    Counters,
    Due,
    Region,
    RequestState,
    Round,
    ceil_to,
    head_start,
)

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


class Runtime:
    """State of the policy in one scheduler process.

    Args:
        settings: the server's settings, the default of every request.
        cache: the KV cache that rounds read and compact.
        rows: rows of the engine's request-to-slot table.
        page_size: slots per page.
        queries: virtual queries, or None where there are no statistics, or not yet.
        workspace: memory for scores; by default it is allocated here.
        observer: told of each round before and after it is executed.
    """

    def __init__(
        self,
        settings: KvPolicyConfig,
        cache: Cache,
        rows: int,
        page_size: int,
        queries: Queries | None = None,
        workspace: Workspace | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.settings = settings
        self.page_size = page_size
        self.counters = Counters()
        self.deltas = torch.zeros(rows, dtype=torch.int64, device=cache.device)
        self.cache = cache
        self.queries = queries
        self.workspace = workspace or Workspace(WORKSPACE_BYTES, cache.device)
        self._observer = observer
        self._policies = {name: policy() for name, policy in POLICIES.items()}
        self._pending: list[Round] = []
        self._alive: deque[list[Round]] = deque(maxlen=_STEPS_KEPT_ALIVE)
        self._shifted: set[RequestState] = set()

    def has_statistics_for(self, policy: type[Policy]) -> bool:
        """Whether this server knows of queries what the policy needs."""
        if self.queries is None:
            return not policy.needs_statistics
        return not policy.needs_second_moments or self.queries.variance is not None

    def check_runnable(self, settings: KvPolicyConfig) -> None:
        """Raise `KvPolicyError` if this server lacks what the policy of `settings` needs."""
        if not settings.enabled:
            return
        policy = POLICIES[settings.policy]
        if policy.needs_statistics and self.queries is None:
            raise KvPolicyError(
                f"--kv-policy {settings.policy} needs query statistics, and this server was "
                "started without any: give --kv-stats FILE."
            )
        if not self.has_statistics_for(policy):
            raise KvPolicyError(
                f"--kv-policy {settings.policy} needs E|q|^2, which this server's --kv-stats file "
                "lacks, as official files do: use --kv-stats auto, or --kv-policy triattention."
            )
        if policy.needs_live_queries:
            raise KvPolicyError(
                f"--kv-policy {settings.policy} needs live queries, which no server provides yet."
            )
        Parts.of(self.workspace.size, self._largest_round(settings))

    def _largest_round(self, settings: KvPolicyConfig) -> Geometry:
        kept = ceil_to(settings.budget, self.page_size)
        longest = kept + ceil_to(settings.interval, self.page_size)
        by_layer = POLICIES[settings.policy].by_layer(settings)
        return Geometry.of(self.cache.keys, self.queries, by_layer, longest, kept)

    def admit(
        self,
        rid: str,
        prompt: array[int],
        settings: KvPolicyConfig,
        extra_key: str | None = None,
    ) -> RequestState | None:
        """State for a new request, or None where its policy is `none`.

        Args:
            rid: the request's id.
            prompt: its token ids.
            settings: its settings.
            extra_key: what keeps its prefixes apart from others' (salt, key, adapter).

        Raises:
            KvPolicyError: the settings are not possible on this server.
        """
        self.check_runnable(settings)
        if not settings.enabled:
            return None
        early = head_start(settings, prompt, self.page_size)
        return RequestState(rid, settings, Lookup((settings, extra_key)), early)

    def plan(self, due: Iterable[Due], request_to_slot: torch.Tensor) -> torch.Tensor:
        """Plan one round for each of `due`: update their regions, remember the work.

        Args:
            due: requests whose physical length has reached `region.due_at`.
            request_to_slot: int32 [rows, length], read before anything is appended to it.

        Returns:
            int64 [freed], the slots that are free from now on: whole pages, each page's slots
            together and in order.
        """
        groups: dict[KvPolicyConfig, list[Due]] = {}
        for request in due:
            groups.setdefault(request.state.settings, []).append(request)
        freed = []
        for members in groups.values():
            logical = [member.region.due_at + member.region.delta for member in members]
            for member in members:
                self._count(member)
            planned, slots = planning.plan(members, logical, request_to_slot, self.page_size)
            self._pending.append(planned)
            freed += slots
        return torch.cat(freed).long()

    def _count(self, member: Due) -> None:
        state, region, counters = member.state, member.region, self.counters
        counters.saw_resident(region.due_at - state.regions[0].opened)
        evicted = region.count_round()
        counters.requests_evicted += not state.was_evicted_from
        state.was_evicted_from = True
        counters.rounds += 1
        counters.evicted_tokens += evicted
        counters.freed_slots += evicted
        state.rounds += 1
        state.evicted_tokens += evicted
        self._shifted.add(state)

    def execute(self) -> None:
        """Run the planned rounds. Call on the stream of the forward pass, before its first read."""
        if not self._pending:
            return
        for planned in self._pending:
            self._execute_round(planned)
        self._alive.append(self._pending)
        self._pending = []

    def _execute_round(self, planned: Round) -> None:
        policy = self._policies[planned.settings.policy]
        candidates = self.candidates(
            planned.settings, planned.pages, planned.logical, planned.budgets
        )
        if self._observer is not None:
            self._observer.before(planned)
        packed = execute(policy, candidates, self.cache, trace=self._observer is not None)
        self.deltas[planned.rows] = planned.deltas
        if self._observer is not None and packed is not None:
            self._observer.after(planned, packed)

    def candidates(
        self, settings: KvPolicyConfig, pages: Pages, logical: torch.Tensor, budgets: Budgets
    ) -> Candidates:
        """Those of a round, with what this server has for scoring them."""
        return Candidates(
            settings,
            self.cache.keys,
            self.cache.key_scale,
            pages,
            logical,
            budgets,
            self.queries,
            self.workspace,
        )

    @property
    def shifts_positions(self) -> bool:
        """Whether any request's logical and physical lengths differ now."""
        return bool(self._shifted)

    def start_prefill(self, rows: torch.Tensor, states: Sequence[RequestState | None]) -> None:
        """Rows [requests] are about to be prefilled, behind the history of `states`."""
        deltas = [state.delta if state else 0 for state in states]
        if not any(deltas):
            self.deltas.index_fill_(0, rows, 0)
            return
        self._shifted.update(state for state in states if state and state.delta)
        self.deltas[rows] = planning.upload(deltas, torch.int64, self.deltas.device)

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

    def close(self, state: RequestState, physical: int) -> list[Region]:
        """The request's slots are released; returns the regions that were evicted from."""
        if state.regions:
            self.counters.saw_resident(physical - state.regions[0].opened)
        compressed = [region for region in state.regions if region.evicted]
        state.regions = []
        self._shifted.discard(state)
        return compressed

    def report(self) -> dict[str, Any]:
        """Settings and counters, plain values, for `/server_info`."""
        counters = self.counters
        return {
            "policy": self.settings.policy,
            "mode": self.settings.eviction_mode,
            "budget": self.settings.budget,
            "interval": self.settings.interval,
            "reuse": self.settings.reuse,
            "rounds": counters.rounds,
            "evicted_tokens": counters.evicted_tokens,
            "freed_slots": counters.freed_slots,
            "requests_evicted": counters.requests_evicted,
            "requests_refused": counters.requests_refused,
            "resident_generated_max": counters.resident_generated_max,
        }
