"""The kernel bench: its arithmetic, its baselines, and a run with tiny sizes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import kernels
from bench.kernelbench import baselines, cells, geometry, goals, pool, timing
from sglang_tri.kernels import compact, score, select
from sglang_tri.kernels.moves import Selection
from sglang_tri.statistics.virtual_queries import OFFSETS
from tests.interpreted import INTERPRET, ON_GPU

CPU = torch.device("cpu")
GB = 10**9
# One layer, two KV heads of two query heads each, four components.
SMALL = geometry.Model("small", 1, 2, 2, 4, 1e4, 1000)
TINY = geometry.Cell(geometry.MODELS["qwen3-8b"].tiny(), 2, 48, 16)


@pytest.fixture
def tiny() -> pool.Pool:
    return pool.Pool.of(TINY, 2, CPU)


def result(
    operation: str, ms: float, size: int = GB, requests: int = 8, candidates: int = 228
) -> cells.Result:
    cell = geometry.Cell(SMALL, requests, candidates)
    times = timing.Times(ms, ms, ms)
    return cells.Result(cell, operation, times, geometry.Work(size), requests, 0)


def test_bytes_by_hand() -> None:
    cell = geometry.Cell(SMALL, requests=3, candidates=10, interval=4)
    # 3 requests, 10 candidates, 2 heads, 4 components of 2 bytes.
    assert cell.key_bytes == 480
    # 3 requests, 4 query heads: 10 scores and 3 x 8 moments, 4 bytes each.
    assert cell.score_bytes == 3 * 4 * (10 + 24) * 4
    # 4 query heads, 2 pairs, 3 numbers of 4 bytes.
    assert cell.query_bytes == 96
    assert geometry.score_work(cell).bytes == 480 + 1632 + 96
    # Aggregated: 3 requests, 2 heads, 10 floats. Moves: target and source.
    assert geometry.select_work(cell, 5).bytes == 1632 + 240 + 40
    # 5 rows of 8 bytes of K and of V, read and written.
    assert geometry.compact_work(cell, 5).bytes == 160 + 40
    whole = geometry.round_work(cell, 5)
    assert whole.bytes == 480 + 1632 + 96 + 1632 + 240 + 40 + 200


def test_operations_by_hand() -> None:
    cell = geometry.Cell(SMALL, requests=1, candidates=1)
    # 2 heads of 2 pairs: 2 query heads of 3 multiply-adds, and 4 for the modulus.
    assert geometry.score_work(cell).flops == 2 * 2 * (2 * 6 + 4)


def test_tokens_of_the_models() -> None:
    found = {model.name: model.token_bytes for model in geometry.MODELS.values()}
    assert found == {"qwen3-8b": 147456, "llama-3-8b": 131072, "llama-3-70b": 327680}
    assert geometry.MODELS["llama-3-70b"].query_heads == 64


def test_offsets_are_the_product_s() -> None:
    assert baselines.OFFSETS == OFFSETS


def test_baselines_score_as_the_product_does(tiny: pool.Pool) -> None:
    some = tiny.candidates()[1]
    queries = tiny.statistics.queries()
    expected = score.score(some.keys, some.pages, queries, some.logical)
    batch = tiny.batch(1, TINY.requests)
    for scorer in (
        baselines.folded(batch, queries),
        baselines.per_offset(batch, tiny.statistics),
    ):
        for layer in range(TINY.model.layers):
            found = scorer(layer).flatten(1, 2)
            torch.testing.assert_close(found, expected.rows[layer], rtol=1e-4, atol=1e-3)


def test_the_round_in_torch_leaves_what_the_product_leaves(tiny: pool.Pool) -> None:
    some = tiny.candidates()[0]
    model, cache = TINY.model, tiny.cache
    scores = score.score(some.keys, some.pages, tiny.statistics.queries(), some.logical)
    selection = Selection(model.kv_heads, "per-head", keep_order=True)
    moves = select.select(scores, some.pages, some.budgets, selection)
    other = pool.Pool.of(TINY, 2, CPU)
    batch = other.batch(0, TINY.requests)
    baselines.round_in_torch(batch, baselines.folded(batch, other.statistics.queries()))
    compact.compact(cache.rows, some.pages, moves)
    first = batch.slots[:, : TINY.budget]
    for ours, theirs in zip(tiny.keys + tiny.values, other.keys + other.values, strict=True):
        assert torch.equal(ours[first], theirs[first])


def test_kept_sets_are_compared(tiny: pool.Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cells.check(tiny) == 1.0
    first = torch.arange(TINY.budget).expand(1, TINY.model.kv_heads, -1)
    monkeypatch.setattr(baselines, "choose", lambda *_: first)
    with pytest.raises(cells.KeptSetsDiffer, match="of the kept candidates"):
        cells.check(tiny)


@pytest.mark.skipif(ON_GPU, reason="the kernels are not interpreted")
def test_a_cell_in_triton_s_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(INTERPRET, "1")
    for module in (score, select, compact):
        monkeypatch.setattr(module, "has_triton", lambda _: True)
    some = pool.Pool.of(geometry.Cell(TINY.model, 1, 48, 16), 1, CPU)
    assert cells.check(some) >= cells.LEAST_EQUAL
    found = {each.operation: each for each in cells.Operations(some, 1).all()}
    assert found["compact, order"].moved >= found["compact, holes"].moved > 0


def test_percent_of_copy() -> None:
    # A gigabyte in 2 ms is 500 GB/s.
    assert result("score", 2.0).bytes_per_second == pytest.approx(500 * GB)
    assert result("score", 2.0).percent_of(1000 * GB) == pytest.approx(50)


def test_decode_time() -> None:
    whole = result("round", 1.28)
    # 2,000 bytes of weights, and 8 requests of 100 tokens of 32 bytes.
    assert goals.step_ms(whole.cell, 27_600) == pytest.approx(1000)
    assert goals.round_percent(whole, 27_600) == pytest.approx(100 * 1.28 / 128_000)


@pytest.mark.parametrize(("ms", "met"), [(1.0, True), (2.0, False)])
def test_score_goal(ms: float, met: bool) -> None:
    found = [result("score", ms), result("score", 99.0, requests=1)]
    assert goals.goals(found, 1000 * GB, True)[0].met is met
    assert goals.goals(found, 1000 * GB, False)[0].met is None
    assert goals.goals(found[1:], 1000 * GB, True)[0].met is None


@pytest.mark.parametrize(("ms", "met"), [(1.0, True), (2.0, True), (2.1, False)])
def test_goal_of_two_buffers(ms: float, met: bool) -> None:
    found = [result("score", 2.0), result("score, 2 buffers", ms)]
    assert goals.goals(found, GB, True)[1].met is met
    assert goals.goals(found, GB, False)[1].met is None
    assert goals.goals(found[:1], GB, True)[1].met is None


@pytest.mark.parametrize(("copy", "met"), [(27_600, True), (27_600 * 10**6, False)])
def test_round_goal(copy: float, met: bool) -> None:
    assert goals.goals([result("round", 1.28)], copy, True)[2].met is met


@pytest.mark.parametrize(("torch_ms", "met"), [(10.0, True), (9.0, False)])
def test_speedup_goal(torch_ms: float, met: bool) -> None:
    found = [result("round", 1.0), result("torch round", torch_ms)]
    assert goals.goals(found, GB, True)[3].met is met


def test_sets_of_slots() -> None:
    cell = geometry.Cell(geometry.MODELS["qwen3-8b"], 1, 2176)
    l2 = 50 << 20
    assert pool.wanted_sets(cell, l2) * cell.score_bytes >= 2 * l2
    one = pool.RESERVE_BYTES + pool.set_bytes(cell)
    assert pool.fitting_sets(cell, l2, one) == 1
    assert pool.fitting_sets(cell, l2, one - 1) == 0


def test_what_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "free_bytes", lambda _: 2 * GB)
    [found] = kernels._runs([TINY], 1, CPU)
    assert not found.results
    assert "left out" in found.notes[0]
    assert "left out" in found.text()


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
    others = [*missing, "transformers", "safetensors"]
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
