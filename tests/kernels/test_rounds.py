"""Whole rounds, as the engine plans and runs them, on both back ends and in parts."""

from __future__ import annotations

from array import array
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sglang_tri.config import KvPolicyConfig
from sglang_tri.engine import Engine
from sglang_tri.errors import KvPolicyError
from sglang_tri.history import Lookup
from sglang_tri.kernels import compact_triton, score_triton, select_triton
from sglang_tri.kernels.moves import MODES
from sglang_tri.kernels.queries import Queries
from sglang_tri.kernels.workspace import Workspace
from sglang_tri.request.request import Request
from sglang_tri.round import warmup
from sglang_tri.round.plan import DueRequest, Round
from sglang_tri.round.run import KvCache, RoundSize, ScoringChunks

LAYERS, HEADS, GROUP, DIM = 3, 2, 2, 64
BUDGET, INTERVAL, RECENT = 20, 12, 4
SETTINGS = KvPolicyConfig(
    policy="triattention", budget=BUDGET, interval=INTERVAL, recent=RECENT, reuse="prompt"
)

CONTINUING = replace(SETTINGS, interval=16, recent=16, reuse="continuation")


class Server:
    """A pool, a slot table, an engine and its observer; requests' slots lie anywhere."""

    def __init__(
        self,
        device: torch.device,
        page_size: int = 1,
        settings: KvPolicyConfig = SETTINGS,
        workspace: int | None = None,
    ) -> None:
        self.page_size, self.settings = page_size, settings
        generator = torch.Generator().manual_seed(0)
        self.buffers = [
            torch.randn(512, HEADS, DIM, generator=generator).to(torch.bfloat16).to(device)
            for _ in range(2 * LAYERS)
        ]
        pages = 1 + torch.randperm(512 // page_size - 1, generator=generator)
        slots = (pages[:, None] * page_size + torch.arange(page_size)).flatten()
        self.table = slots[: 480 // 4 * 4].view(4, -1).int().to(device)
        shape = LAYERS, HEADS * GROUP
        queries = Queries(
            torch.randn(*shape, 2, DIM // 2, generator=generator).to(device),
            torch.rand(*shape, DIM // 2, generator=generator).to(device),
            (1e4 ** (-torch.arange(0, 1, 2 / DIM, dtype=torch.float64))).to(device),
            DIM,
            False,
            torch.rand(*shape, DIM // 2, generator=generator).to(device),
        )
        cache = KvCache.of(self.buffers[:LAYERS], self.buffers[LAYERS:], page_size)
        self.traced: list[torch.Tensor] = []
        self.engine = Engine(
            settings,
            cache,
            4,
            queries,
            None if workspace is None else Workspace(workspace, device),
            self,
        )

    def before(self, planned: Round) -> None:
        pass

    def after(self, planned: Round, packed: torch.Tensor) -> None:
        self.traced.append(packed.cpu().clone())

    def run(self, prompts: list[int]) -> torch.Tensor:
        """A first round of requests that are due at once; returns what is free afterwards."""
        return self.round(self.requests(prompts))

    def requests(self, prompts: list[int]) -> list[Request]:
        """One for each row of the table, behind its prompt.

        Each is due a page earlier than the one before, and so has fewer candidates at first.
        """
        made = []
        for row, prompt in enumerate(prompts):
            early = row * self.page_size
            request = Request(
                str(row), self.settings, Lookup(None), prompt, self.page_size, stagger=early
            )
            request.decoded(prompt, array("q"))
            made.append(request)
        return made

    def round(self, requests: list[Request]) -> torch.Tensor:
        """Their next round, the first or a later one; returns what is free afterwards."""
        due = [DueRequest(request, row) for row, request in enumerate(requests)]
        freed = self.engine.plan_rounds(due, self.table)
        self.engine.run_rounds()
        return freed

    def contents(self) -> torch.Tensor:
        return torch.stack(self.buffers).cpu()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("page_size", [1, 4])
def test_both_back_ends_make_the_same_cache(
    on_triton: torch.device, monkeypatch: pytest.MonkeyPatch, mode: str, page_size: int
) -> None:
    settings = replace(SETTINGS, eviction_mode=mode)
    kernels = Server(on_triton, page_size, settings)
    freed = kernels.run([7, 0, 16])
    monkeypatch.undo()
    plain = Server(torch.device("cpu"), page_size, settings)
    assert torch.equal(freed.cpu(), plain.run([7, 0, 16]))
    assert torch.equal(kernels.traced[0], plain.traced[0])
    assert torch.equal(kernels.contents(), plain.contents())
    evicted = [INTERVAL - row * page_size for row in range(3)]
    assert kernels.engine.deltas.tolist() == plain.engine.deltas.tolist() == [*evicted, 0]


@pytest.mark.parametrize("mode", MODES)
def test_parts_make_what_the_whole_makes(device: torch.device, mode: str) -> None:
    """Requests one by one, and of each one layer after the other."""
    settings = replace(SETTINGS, eviction_mode=mode)
    whole = Server(device, 4, settings)
    whole.run([7, 0, 16])
    by_layer = mode == "per-layer-per-head"
    geometry = RoundSize(LAYERS, HEADS * GROUP, HEADS, by_layer, BUDGET + INTERVAL, BUDGET)
    size = geometry.least_bytes
    assert ScoringChunks.fitting(size, geometry) == ScoringChunks(1, 1)
    parts = Server(device, 4, settings, size)
    parts.run([7, 0, 16])
    assert torch.equal(parts.traced[0], whole.traced[0])
    assert torch.equal(parts.contents(), whole.contents())


def test_parts() -> None:
    """Qwen3-8B and Llama-3-70B in 64 MiB, by hand."""
    size = 64 << 20
    qwen = RoundSize(36, 32, 8, False, 2_176, 2_048)
    each = 8 * (4 * 2_176 + 8 * 2_048 + 4) + 36 * 32 * (4 * 2_176 + 12 * 8)
    assert (
        ScoringChunks.fitting(size, qwen)
        == ScoringChunks((size - 2_048) // each, 36)
        == ScoringChunks(6, 36)
    )
    assert ScoringChunks.fitting(size, RoundSize(80, 64, 8, False, 4_224, 4_096)) == ScoringChunks(
        1, 61
    )
    with pytest.raises(KvPolicyError, match="--kv-budget 1048576 is too large"):
        RoundSize(36, 32, 8, False, 2**20 + 128, 2**20).check_fits(size)


def test_a_budget_that_cannot_be_scored_is_refused() -> None:
    server = Server(torch.device("cpu"), workspace=1 << 16)
    server.engine.check_runnable(SETTINGS)
    with pytest.raises(KvPolicyError, match="--kv-budget 8192 is too large"):
        server.engine.check_runnable(replace(SETTINGS, budget=8192))


def test_second_moments_that_statistics_lack_are_asked_for() -> None:
    engine = Server(torch.device("cpu")).engine
    asked = replace(SETTINGS, policy="triattention-variance")
    engine.check_runnable(asked)
    engine.queries = replace(engine.queries, variance=None)
    engine.check_runnable(SETTINGS)
    with pytest.raises(KvPolicyError, match=r"triattention-variance needs E\|q\|\^2"):
        engine.check_runnable(asked)
    warmup.warm_up(engine, warmup.all_settings(SETTINGS, per_request=True))


class Recorder:
    """A kernel that notes for which constants, and types of arguments, it is launched."""

    def __init__(self, kernel: Any, seen: set[tuple[object, ...]]) -> None:
        self._kernel, self._seen = kernel, seen

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **constants: Any) -> None:
            types = (arg.dtype if torch.is_tensor(arg) else type(arg) for arg in args)
            self._seen.add((id(self._kernel), *types, *sorted(map(str, constants.items()))))
            self._kernel[grid](*args, **constants)

        return launch


@pytest.mark.parametrize("per_request", [False, pytest.param(True, marks=pytest.mark.full)])
def test_no_kernel_is_compiled_after_the_warm_up(
    on_triton: torch.device, monkeypatch: pytest.MonkeyPatch, per_request: bool
) -> None:
    """A variant is a set of constants; what rounds launch then was launched before."""
    seen: set[tuple[object, ...]] = set()
    for module, name in (
        (score_triton, "score_kernel"),
        (select_triton, "select_kernel"),
        (compact_triton, "compact_kernel"),
    ):
        monkeypatch.setattr(module, name, Recorder(getattr(module, name), seen))
    server = Server(on_triton, 4)
    variants = warmup.all_settings(SETTINGS, per_request)
    before = server.contents()
    warmup.warm_up(server.engine, variants)
    padding, rest = server.contents().split([4, 508], 1)
    assert torch.equal(rest, before[:, 4:])
    assert padding.isfinite().all()
    warmed = set(seen)
    # A score kernel and one that squares moduli, a select kernel for each mode and one for a random
    # score that all layers share, and two to move rows, one of them of all heads alike.
    assert len(warmed) == (8 if per_request else 3)
    for settings in variants:
        by_layer = settings.eviction_mode == MODES[1]
        small = RoundSize(LAYERS, 4, HEADS, by_layer, 64, 40).least_bytes
        other = replace(settings, budget=40, interval=24, normalize=False)
        for size, case in ((1 << 20, settings), (small, other)):
            server.engine.workspace = Workspace(size, on_triton)
            server.settings = case
            server.run([3])
            server.run([1, 9])
    assert seen == warmed


class Operations(TorchDispatchMode):
    """Notes torch's operations and the types of what they work on, each of which is loaded once."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[object, ...]] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        leaves = tree_leaves((args, kwargs))
        self.seen.add((func, *sorted({str(x.dtype) for x in leaves if torch.is_tensor(x)})))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("settings", [SETTINGS, CONTINUING])
def test_no_operation_is_loaded_after_the_warm_up(page_size: int, settings: KvPolicyConfig) -> None:
    """Planning, the round, and positions behind it do nothing on a device for the first time."""
    server = Server(torch.device("cpu"), page_size, settings)
    server.engine._observer = None  # No server has one, unless it writes a trace.
    with Operations() as warmed:
        warmup.warm_up(server.engine, [settings])
    assert not server.engine.deltas.any()
    rows, lengths = torch.arange(3), torch.tensor([4, 1, 2])
    ones = torch.ones(3, dtype=torch.int32)
    with Operations() as used:
        server.run([7, 0, 16])
        server.engine.start_prefill(rows, [None] * 3)
        positions = lengths + server.engine.offsets(rows, None, 3)
        positions += server.engine.offsets(rows, ones, 3)
    assert used.seen <= warmed.seen


def test_memory_is_taken_once(device: torch.device) -> None:
    """The workspace keeps its size, whatever is scored in it."""
    server = Server(device)
    memory = server.engine.workspace.memory
    assert memory is not None
    assert memory.numel() == 64 << 20
    server.run([1, 2, 3, 4])
    assert server.engine.workspace.memory is memory
    with pytest.raises(ValueError, match="do not fit into a workspace"):
        server.engine.workspace.take(1 << 25, dtype=torch.int32)
