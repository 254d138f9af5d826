"""The kernel bench: its arithmetic, its baselines, and a run with tiny sizes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import kernel_cells, kernel_timing, kernel_torch, kernels
from bench.kernel_cells import MODELS, Cell, Model, Pool
from sglang_tri.kernels import compact, score, select
from sglang_tri.kernels.moves import Selection
from sglang_tri.kernels.workspace import Workspace
from sglang_tri.policies.triattention import TriAttention
from sglang_tri.round.run import RoundSize
from sglang_tri.statistics.virtual_queries import OFFSETS
from tests.interpreted import INTERPRET, ON_GPU

CPU = torch.device("cpu")
GB = 10**9
# One layer, two KV heads of two query heads each, four components.
SMALL = Model("small", 1, 2, 2, 4, 1e4, 1000)
TINY = Cell(MODELS["qwen3-8b"].tiny(), 2, 48, 16)


@pytest.fixture
def tiny() -> Pool:
    return Pool(TINY, CPU)


def row(operation: str, ms: float, copy: float = GB, requests: int = 8) -> kernels.Row:
    times = {"median": ms, "lowest": ms, "highest": ms}
    return kernels._row(Cell(SMALL, requests, 228), operation, times, copy)


def test_bytes_by_hand() -> None:
    cell = Cell(SMALL, requests=3, candidates=10, interval=4)
    work = {name: each.bytes for name, each in cell.work(5).items()}
    # Keys: 3 requests, 10 candidates, 2 heads, 4 components of 2 bytes.
    keys = 480
    # 3 requests, 4 query heads: 10 scores and 3 x 8 moments, 4 bytes each.
    scores = 3 * 4 * (10 + 24) * 4
    # 4 query heads, 2 pairs, 3 numbers of 4 bytes.
    queries = 96
    assert work["score"] == keys + queries + scores
    # Aggregated: 3 requests, 2 heads, 10 floats. Moves: target and source.
    assert work["select"] == scores + 240 + 40
    # 5 rows of 8 bytes of K and of V, read and written.
    assert work["compact"] == 160 + 40
    assert work["round"] == 480 + 1632 + 96 + 1632 + 240 + 40 + 200


def test_operations_by_hand() -> None:
    work = Cell(SMALL, requests=1, candidates=1).work(0)
    # 2 heads of 2 pairs: 2 query heads of 3 multiply-adds, and 4 for the modulus.
    assert work["score"].flops == 2 * 2 * (2 * 6 + 4)
    assert work["round"].flops == work["score"].flops + work["select"].flops


def test_tokens_of_the_models() -> None:
    found = {model.name: model.token_bytes for model in MODELS.values()}
    assert found == {"qwen3-8b": 147456, "llama-3-8b": 131072, "llama-3-70b": 327680}
    assert MODELS["llama-3-70b"].query_heads == 64


def test_offsets_are_the_product_s() -> None:
    assert kernel_cells.OFFSETS == OFFSETS


def test_baselines_score_as_the_product_does(tiny: Pool) -> None:
    some = tiny.candidates
    expected = score.score(some.keys, some.pages, tiny.queries, some.logical)
    for scorer in (kernel_torch.folded, kernel_torch.per_offset):
        scores = scorer(tiny, TINY.requests)
        for layer in range(TINY.model.layers):
            found = scores(layer).flatten(1, 2)
            torch.testing.assert_close(found, expected.rows[layer], rtol=1e-4, atol=1e-3)


def test_the_round_in_torch_leaves_what_the_product_leaves(tiny: Pool) -> None:
    some, other = tiny.candidates, Pool(TINY, CPU)
    scores = score.score(some.keys, some.pages, tiny.queries, some.logical)
    selection = Selection(TINY.model.kv_heads, "per-head", keep_order=True)
    moves = select.select(scores, some.pages, some.budgets, selection)
    compact.compact(tiny.cache.rows, some.pages, moves)
    kernel_torch.round_in_torch(other, kernel_torch.folded, TINY.requests)
    first = other.slots[:, : TINY.budget]
    for ours, theirs in zip(tiny.keys + tiny.values, other.keys + other.values, strict=True):
        assert torch.equal(ours[first], theirs[first])


def test_kept_sets_are_compared(tiny: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.check(tiny) == 1.0
    first = torch.arange(TINY.budget).expand(1, TINY.model.kv_heads, -1)
    monkeypatch.setattr(kernels, "choose", lambda *_: first)
    with pytest.raises(SystemExit, match="of the kept candidates"):
        kernels.check(tiny)


@pytest.mark.slow
@pytest.mark.skipif(ON_GPU, reason="the kernels are not interpreted")
def test_a_cell_in_triton_s_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(INTERPRET, "1")
    for module in (score, select, compact):
        monkeypatch.setattr(module, "has_triton", lambda _: True)
    some = Pool(Cell(TINY.model, 1, 48, 16), CPU)
    assert kernels.check(some) >= kernels.LEAST_EQUAL
    # Scores of a large model's request do not fit into the workspace at once.
    size = RoundSize.of(some.candidates, TriAttention()).least_bytes
    some.candidates = replace(some.candidates, workspace=Workspace(size, CPU))
    assert kernels.check(some) >= kernels.LEAST_EQUAL
    moved = {
        each["operation"]: each["moved_rows_per_layer"] for each in kernels.operations(some, 1, GB)
    }
    assert moved["compact, order"] >= moved["compact, holes"] > 0


def test_a_round_finds_new_keys_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        kernels.run, "run", lambda _, some, cache: seen.append(some.keys.layers[0].clone())
    )
    list(kernels.operations(Pool(TINY, CPU), 2, GB))
    assert len(seen) > 2
    assert not any(torch.equal(a, b) for a, b in pairwise(seen))


def test_what_is_prepared_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    times = iter(range(1, 100))

    def timer(call: Any, number: int) -> float:
        call()
        return next(times) / 1000

    monkeypatch.setattr(kernel_timing.timeit, "timeit", timer)
    found = kernel_timing.measure(
        lambda: calls.append("call"), 3, CPU, lambda: calls.append("prepare")
    )
    assert calls == ["prepare", "call"] * (kernel_timing._WARM_UP + 3)
    assert found == {"median": 4.0, "lowest": 3.0, "highest": 5.0}


def test_times_of_fewer_requests_are_scaled() -> None:
    cell, times = Cell(SMALL, 8, 228), {"median": 1.0, "lowest": 0.5, "highest": 2.0}
    found = kernels._row(cell, "torch round", times, GB, requests=4)
    assert found["ms"] == {"median": 2.0, "lowest": 1.0, "highest": 4.0}
    assert found["bytes"] == cell.work(0)["round"].bytes


def test_percent_of_copy() -> None:
    size = Cell(SMALL, 8, 228).work(0)["score"].bytes
    found = row("score", 2.0, copy=1000 * size)
    assert found["bytes_per_second"] == pytest.approx(500 * size)
    assert found["percent_of_copy"] == pytest.approx(50)


def test_decode_time() -> None:
    # 2,000 bytes of weights, and 8 requests of 100 tokens of 32 bytes: a step takes a second.
    found = row("round", 1.28, copy=27_600)
    assert found["decode_step_bytes"] == 27_600
    assert found["percent_of_decode"] == pytest.approx(100 * 1.28 / 128_000)


def reached(number: int, real: bool, *values: tuple[str, int, float]) -> bool | None:
    """Whether a goal is met, by (operation, requests, value) of its cells."""
    what = kernels.GOALS[number][3]
    cell = {"model": "small", "candidates": 228}
    rows: list[kernels.Row] = [
        {**cell, "operation": operation, "requests": requests, what: value}
        for operation, requests, value in values
    ]
    return kernels.goals(rows, real)[number].met


@pytest.mark.parametrize(("percent", "met"), [(80.0, True), (79.9, False)])
def test_score_goal(percent: float, met: bool) -> None:
    found = [("score", 8, percent), ("score", 64, 90.0), ("score", 1, 1.0)]
    assert reached(0, True, *found) is met
    assert reached(0, False, *found) is None
    assert reached(0, True, found[-1]) is None


@pytest.mark.parametrize(("times", "met"), [(0.5, True), (1.0, True), (1.1, False)])
def test_goal_of_two_buffers(times: float, met: bool) -> None:
    found = [("score, 2 buffers", 1, times), ("score, 2 buffers", 8, 0.9), ("score", 1, 1.0)]
    assert reached(1, True, *found) is met
    assert reached(1, False, *found) is None
    assert reached(1, True, found[-1]) is None


@pytest.mark.parametrize(("percent", "met"), [(1.0, True), (1.1, False)])
def test_round_goal(percent: float, met: bool) -> None:
    assert reached(2, True, ("round", 1, percent), ("round", 8, 0.5)) is met


@pytest.mark.parametrize(("times", "met"), [(10.0, True), (9.0, False)])
def test_speedup_goal(times: float, met: bool) -> None:
    assert reached(3, True, ("torch round", 1, times), ("torch round", 8, 12.0)) is met


def test_operations_are_compared_with_score_and_round(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"score": 2.0, "score, 2 buffers": 1.0, "round": 4.0, "torch round": 40.0}
    rows = [row(name, ms) for name, ms in names.items()]
    monkeypatch.setattr(kernels, "operations", lambda *_: rows)
    found, note = kernels.measured(TINY, 1, GB, CPU)
    assert [each["times_score"] for each in found] == [1.0, 0.5, 2.0, 20.0]
    assert [each["times_round"] for each in found] == [0.5, 0.25, 1.0, 10.0]
    assert "100.00% of the kept are plain torch's" in note


def test_what_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(kernels, "operations", full)
    found, note = kernels.measured(TINY, 1, GB, CPU)
    assert not found
    assert "left out" in note


@pytest.mark.parametrize("arguments", [["--candidates", "143"], ["--requests", "0"]])
def test_bad_sizes_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        kernels.main(arguments)
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.skipif(ON_GPU, reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels.main([]) == 2
    assert "--device cpu" in capsys.readouterr().err


@pytest.mark.parametrize("missing", [["sglang"], ["sglang", "matplotlib"]])
def test_a_run_with_tiny_sizes(missing: list[str], tmp_path: Path) -> None:
    others = [*missing, "transformers", "safetensors", "tabulate"]
    program = f"import sys; sys.modules.update(dict.fromkeys({others})); "
    program += "from bench.kernels import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "--device", "cpu", "--out", str(tmp_path)]
    command += ["--models", "qwen3-8b", "llama-3-70b", "--candidates", "48"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert kernels.MEANINGLESS in done.stdout
    assert "per-offset round @1" in done.stdout
    found = json.loads((tmp_path / "kernels.json").read_text())
    assert not found["times_mean_something"]
    assert len(found["results"]) == 2 * 2 * 9
    assert [goal["met"] for goal in found["goals"]] == [None] * 4
    if "matplotlib" in missing:
        assert "no roofline.png" in done.stdout
    else:
        assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")
