"""Whole rounds, as the engine plans and runs them, on both back ends and in parts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sglang_tri import warmup
from sglang_tri.aliases import Lookup
from sglang_tri.config import KvPolicyConfig
from sglang_tri.errors import KvPolicyError
from sglang_tri.execution import Cache
from sglang_tri.kernels import compact_triton, score_triton, select_triton
from sglang_tri.kernels.moves import MODES
from sglang_tri.kernels.queries import Queries
from sglang_tri.kernels.workspace import Workspace
from sglang_tri.parts import Geometry, Parts
from sglang_tri.rounds import Due, RequestState, Round
from sglang_tri.runtime import Runtime

LAYERS, HEADS, GROUP, DIM = 3, 2, 2, 64
BUDGET, INTERVAL, RECENT = 20, 12, 4
SETTINGS = KvPolicyConfig(
    policy="triattention", budget=BUDGET, interval=INTERVAL, recent=RECENT, reuse="prompt"
)

CONTINUING = replace(SETTINGS, interval=16, recent=16, reuse="continuation")


class Engine:
    """A pool, a slot table, a runtime and its observer; requests' slots lie anywhere."""

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
        cache = Cache.of(self.buffers[:LAYERS], self.buffers[LAYERS:], page_size)
        self.traced: list[torch.Tensor] = []
        self.runtime = Runtime(
            settings,
            cache,
            4,
            page_size,
            queries,
            None if workspace is None else Workspace(workspace, device),
            self,
        )

    def before(self, planned: Round) -> None:
        pass

    def after(self, planned: Round, packed: torch.Tensor) -> None:
        self.traced.append(packed.cpu().clone())

    def run(self, prompts: list[int]) -> torch.Tensor:
        """A first round of requests that are due at once; returns what is free afterwards.

        Each comes a page earlier than the one before, and so has fewer candidates.
        """
        due = []
        for row, prompt in enumerate(prompts):
            early = row * self.page_size
            state = RequestState(str(row), self.settings, Lookup(None), early)
            due.append(Due(state, state.open_region(prompt, self.page_size), row))
        freed = self.runtime.plan(due, self.table)
        self.runtime.execute()
        return freed

    def contents(self) -> torch.Tensor:
        return torch.stack(self.buffers).cpu()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("page_size", [1, 4])
def test_both_back_ends_make_the_same_cache(
    on_triton: torch.device, monkeypatch: pytest.MonkeyPatch, mode: str, page_size: int
) -> None:
    settings = replace(SETTINGS, eviction_mode=mode)
    kernels = Engine(on_triton, page_size, settings)
    freed = kernels.run([7, 0, 16])
    monkeypatch.undo()
    plain = Engine(torch.device("cpu"), page_size, settings)
    assert torch.equal(freed.cpu(), plain.run([7, 0, 16]))
    assert torch.equal(kernels.traced[0], plain.traced[0])
    assert torch.equal(kernels.contents(), plain.contents())
    evicted = [INTERVAL - row * page_size for row in range(3)]
    assert kernels.runtime.deltas.tolist() == plain.runtime.deltas.tolist() == [*evicted, 0]


@pytest.mark.parametrize("mode", MODES)
def test_parts_make_what_the_whole_makes(device: torch.device, mode: str) -> None:
    """Requests one by one, and of each one layer after the other."""
    settings = replace(SETTINGS, eviction_mode=mode)
    whole = Engine(device, 4, settings)
    whole.run([7, 0, 16])
    by_layer = mode == "per-layer-per-head"
    geometry = Geometry(LAYERS, HEADS * GROUP, HEADS, by_layer, BUDGET + INTERVAL, BUDGET)
    size = Parts.smallest(geometry)
    assert Parts.of(size, geometry) == Parts(1, 1)
    parts = Engine(device, 4, settings, size)
    parts.run([7, 0, 16])
    assert torch.equal(parts.traced[0], whole.traced[0])
    assert torch.equal(parts.contents(), whole.contents())


def test_parts() -> None:
    """Qwen3-8B and Llama-3-70B in 64 MiB, by hand."""
    size = 64 << 20
    qwen = Geometry(36, 32, 8, False, 2_176, 2_048)
    each = 8 * (4 * 2_176 + 8 * 2_048 + 4) + 36 * 32 * (4 * 2_176 + 12 * 8)
    assert Parts.of(size, qwen) == Parts((size - 2_048) // each, 36) == Parts(6, 36)
    assert Parts.of(size, Geometry(80, 64, 8, False, 4_224, 4_096)) == Parts(1, 61)
    with pytest.raises(KvPolicyError, match="--kv-budget 1048576 is too large"):
        Parts.of(size, Geometry(36, 32, 8, False, 2**20 + 128, 2**20))


def test_a_budget_that_cannot_be_scored_is_refused() -> None:
    engine = Engine(torch.device("cpu"), workspace=1 << 16)
    engine.runtime.check_runnable(SETTINGS)
    with pytest.raises(KvPolicyError, match="--kv-budget 8192 is too large"):
        engine.runtime.check_runnable(replace(SETTINGS, budget=8192))


def test_second_moments_that_statistics_lack_are_asked_for() -> None:
    runtime = Engine(torch.device("cpu")).runtime
    asked = replace(SETTINGS, policy="triattention-variance")
    runtime.check_runnable(asked)
    runtime.queries = replace(runtime.queries, variance=None)
    runtime.check_runnable(SETTINGS)
    with pytest.raises(KvPolicyError, match=r"triattention-variance needs E\|q\|\^2"):
        runtime.check_runnable(asked)
    warmup.run(runtime, warmup.all_settings(SETTINGS, per_request=True))


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


@pytest.mark.parametrize("per_request", [False, True])
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
    engine = Engine(on_triton, 4)
    variants = warmup.all_settings(SETTINGS, per_request)
    before = engine.contents()
    warmup.run(engine.runtime, variants)
    padding, rest = engine.contents().split([4, 508], 1)
    assert torch.equal(rest, before[:, 4:])
    assert padding.isfinite().all()
    warmed = set(seen)
    # A score kernel and one that squares moduli, a select kernel for each mode and one for a random
    # score that all layers share, and two to move rows, one of them of all heads alike.
    assert len(warmed) == (8 if per_request else 3)
    for settings in variants:
        small = Parts.smallest(
            Geometry(LAYERS, 4, HEADS, settings.eviction_mode == MODES[1], 64, 40)
        )
        other = replace(settings, budget=40, interval=24, normalize=False)
        for size, case in ((1 << 20, settings), (small, other)):
            engine.runtime.workspace = Workspace(size, on_triton)
            engine.settings = case
            engine.run([3])
            engine.run([1, 9])
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
    engine = Engine(torch.device("cpu"), page_size, settings)
    engine.runtime._observer = None  # No server has one, unless it writes a trace.
    with Operations() as warmed:
        warmup.run(engine.runtime, [settings])
    assert not engine.runtime.deltas.any()
    rows, lengths = torch.arange(3), torch.tensor([4, 1, 2])
    ones = torch.ones(3, dtype=torch.int32)
    with Operations() as used:
        engine.run([7, 0, 16])
        engine.runtime.start_prefill(rows, [None] * 3)
        positions = lengths + engine.runtime.offsets(rows, None, 3)
        positions += engine.runtime.offsets(rows, ones, 3)
    assert used.seen <= warmed.seen


def test_memory_is_taken_once(device: torch.device) -> None:
    """The workspace keeps its size, whatever is scored in it."""
    engine = Engine(device)
    memory = engine.runtime.workspace.memory
    assert memory is not None
    assert memory.numel() == 64 << 20
    engine.run([1, 2, 3, 4])
    assert engine.runtime.workspace.memory is memory
    with pytest.raises(ValueError, match="do not fit into a workspace"):
        engine.runtime.workspace.take(1 << 25, dtype=torch.int32)
