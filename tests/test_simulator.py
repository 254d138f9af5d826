"""The oracle against transformers' own forward and against formulas written out here."""

from __future__ import annotations

import ast
import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.simulator import (
    Candidates,
    NoEviction,
    Oracle,
    Ranking,
    Replay,
    RoundMismatch,
    Stats,
    Streaming,
    TriAttention,
    load_stats,
    make_policy,
)
from bench.simulator.scoring import combine
from bench.simulator.selection import select
from bench.tiny_models import calibration_text, make_model, make_stats

KINDS = ("qwen3", "llama3", "yarn")
MODES = ("per-head", "per-layer-per-head", "union")
LAYERS, HEADS, KV_HEADS, HEAD_DIM = 4, 4, 2, 32
PROMPT = list(calibration_text(37, seed=3).encode())
TEXT = list(calibration_text(400, seed=4).encode())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All models with their stats.pt, and variants that differ in config.json."""
    root = tmp_path_factory.mktemp("simulator")
    for kind in KINDS:
        make_stats(make_model(kind, root / kind), root / kind / "stats.pt", tokens=512)
    linear = {"rope_type": "linear", "factor": 2.5, "rope_theta": 10000.0}
    variant(root, "llama3", "linear", rope_scaling=linear)
    variant(root, "llama3", "partial", rope_scaling=None, partial_rotary_factor=0.5)
    variant(root, "llama3", "partial-linear", rope_scaling=linear, partial_rotary_factor=0.75)
    variant(root, "llama3", "dynamic", rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    return root


def variant(root: Path, kind: str, name: str, **changes: Any) -> None:
    path = make_model(kind, root / name)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))
    generator = torch.Generator().manual_seed(1)
    heads = {}
    for layer in range(LAYERS):
        for head in range(HEADS):
            real, imag = torch.randn(2, HEAD_DIM // 2, generator=generator)
            size = torch.hypot(real, imag) * 1.25
            values = {"q_mean_real": real, "q_mean_imag": imag, "q_abs_mean": size}
            heads[f"layer{layer:02d}_head{head:02d}"] = values
    torch.save({"metadata": {}, "stats": heads}, path / "stats.pt")


@pytest.fixture(scope="module")
def qwen3(folder: Path) -> Oracle:
    return Oracle(folder / "qwen3", folder / "qwen3" / "stats.pt")


def reference(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, attn_implementation="eager"
    ).eval()


def hf_logits(model: Any, prompt: list[int], output: list[int]) -> np.ndarray:
    """Logits [output, vocabulary] from which transformers would sample each output token."""
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + output[:-1]])).logits[0, len(prompt) - 1 :]
    return logits.double().numpy()


# --- the decoder -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, "linear"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_eviction_it_is_transformers(folder: Path, kind: str, dtype: torch.dtype) -> None:
    output = TEXT[:300]
    replay = Oracle(folder / kind, dtype=dtype).replay(
        PROMPT, output, NoEviction(), keep_logits=True
    )
    expected = hf_logits(reference(folder / kind, dtype), PROMPT, output)
    assert replay.logits is not None
    assert np.abs(replay.logits - expected).max() < 1e-4
    normal = torch.tensor(expected).log_softmax(-1).numpy()
    assert np.abs(replay.logprobs - normal[np.arange(300), output]).max() < 1e-4
    assert (replay.greedy == expected.argmax(-1)).all()
    two = np.sort(expected)[:, -2:]
    assert np.abs(replay.margins - (two[:, 1] - two[:, 0])).max() < 1e-4
    assert replay.rounds == [] and replay.physical.tolist() == list(range(37, 337))


@pytest.mark.parametrize(("kind", "rotary"), [("partial", 16), ("partial-linear", 24)])
def test_partial_rotary_is_a_permuted_model_with_still_pairs(
    folder: Path, kind: str, rotary: int
) -> None:
    """transformers' Llama cannot do partial rotary, but a full one with zero frequencies can."""
    oracle = Oracle(folder / kind)
    half, still = rotary // 2, (HEAD_DIM - rotary) // 2
    theta, factor = (500000.0, 1.0) if kind == "partial" else (10000.0, 2.5)
    turning = [theta ** (-2 * f / rotary) / factor for f in range(half)]
    first = [*range(half), *range(rotary, rotary + still)]
    second = [*range(half, rotary), *range(rotary + still, HEAD_DIM)]
    model = reference(folder / "llama3")
    model.model.rotary_emb.inv_freq = torch.tensor(turning + [0.0] * still)
    for layer in model.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            heads = projection.weight.data.unflatten(0, (-1, HEAD_DIM))
            projection.weight.data = heads[:, first + second].flatten(0, 1)
    replay = oracle.replay(PROMPT, TEXT[:100], NoEviction(), keep_logits=True)
    assert np.abs(replay.logits - hf_logits(model, PROMPT, TEXT[:100])).max() < 1e-4
    np.testing.assert_allclose(oracle.decoder.rope.omega, turning + [0.0] * still, rtol=1e-6)


def masked_forward(path: Path, output: list[int], replay: Replay) -> tuple[np.ndarray, list[Any]]:
    """transformers' logits with the evicted hidden by masks; the keys before RoPE it computed."""
    model, size = reference(path), len(PROMPT) + len(output) - 1
    visible = torch.ones(LAYERS, HEADS, size, size, dtype=torch.bool).tril()
    for done in replay.rounds:
        kept = torch.tensor(done.kept).expand(LAYERS, KV_HEADS, -1)
        gone = torch.ones(LAYERS, KV_HEADS, size, dtype=torch.bool)
        gone[..., : start_of(replay)] = gone[..., done.length :] = False
        gone.scatter_(2, kept, False)
        visible[:, :, done.length :] &= ~gone.repeat_interleave(2, 1)[:, :, None]
    keys: list[Any] = []
    masks = torch.zeros(visible.shape).masked_fill(~visible, float("-inf"))
    for layer, mask in zip(model.model.layers, masks, strict=True):
        attention = layer.self_attn
        attention.register_forward_pre_hook(partial(put_mask, mask[None]), with_kwargs=True)
        source = attention.k_norm if hasattr(attention, "k_norm") else attention.k_proj
        source.register_forward_hook(
            lambda _m, _i, out: keys.append(out.reshape(-1, KV_HEADS, HEAD_DIM))
        )
    return hf_logits(model, PROMPT, output), keys


def put_mask(mask: torch.Tensor, _module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    return args, {**kwargs, "attention_mask": mask}


def start_of(replay: Replay) -> int:
    first = replay.rounds[0]
    return first.length - first.candidates


CASES = [(kind, mode, 1) for kind in KINDS for mode in MODES] + [("qwen3", m, 4) for m in MODES]


@pytest.mark.parametrize(("kind", "mode", "page"), CASES)
def test_rounds_and_logits_from_transformers(folder: Path, kind: str, mode: str, page: int) -> None:
    """Kept sets worked out by `expected_set` from transformers' keys, logits under masks."""
    oracle = Oracle(folder / kind, folder / kind / "stats.pt")
    policy = TriAttention(22, 7, recent=5, mode=mode)
    written = oracle.generate(PROMPT, 54, policy, page)
    output = written.output_ids.tolist()
    replay = oracle.replay(PROMPT, output, policy, page, keep_logits=True)
    logits, keys = masked_forward(folder / kind, output, replay)
    assert np.abs(replay.logits - logits).max() < 1e-4
    np.testing.assert_allclose(written.logprobs, replay.logprobs, atol=1e-4)
    assert len(replay.rounds) == len(written.rounds) == {1: 4, 4: 2}[page]
    resident = np.tile(np.arange(1000), (LAYERS, KV_HEADS, 1))[..., start_of(replay) :]
    for done, again in zip(replay.rounds, written.rounds, strict=True):
        assert (done.kept == again.kept).all()
        resident = resident[resident < done.length].reshape(LAYERS, KV_HEADS, -1)
        scores = expected_scores(folder / kind, keys, resident, done.length)
        kept = expected_set(scores, mode, done.kept.shape[-1], 5)
        kept_positions = np.take_along_axis(resident, kept, 2)
        assert (kept_positions == done.kept).all()
        later = np.tile(np.arange(done.length, 1000), (LAYERS, KV_HEADS, 1))
        resident = np.concatenate([kept_positions, later], 2)


# --- scores ------------------------------------------------------------------------------------


def expected_scores(path: Path, keys: Any, positions: np.ndarray, length: int) -> np.ndarray:
    """S(k) [layers, heads, n], offset by offset and pair by pair; keys[layer][position, head]."""
    rotary = reference(path).model.rotary_emb
    stats = torch.load(path / "stats.pt", weights_only=True)["stats"]
    scores = np.zeros((LAYERS, HEADS, positions.shape[-1]))
    for layer, head in np.ndindex(LAYERS, HEADS):
        fields = stats[f"layer{layer:02d}_head{head:02d}"]
        for i, p in enumerate(positions[layer, head // 2].tolist()):
            key = keys[layer][p, head // 2].tolist()
            scores[layer, head, i] = loop_score(key, length - p, fields, rotary)
    return scores


def loop_score(key: list[float], distance: int, fields: Any, rotary: Any) -> float:
    """S(k), where what lies beyond the rotary dimension neither turns nor is scaled."""
    means, sizes, total = (
        list(zip(fields["q_mean_real"].tolist(), fields["q_mean_imag"].tolist(), strict=True)),
        fields["q_abs_mean"].tolist(),
        0.0,
    )
    omega, factor = rotary.inv_freq.tolist(), rotary.attention_scaling
    r, half, rest = 2 * len(omega), len(omega), len(key) // 2 - len(omega)
    pairs = [(f, f + half, omega[f], factor) for f in range(half)]
    pairs += [(r + j, r + j + rest, 0.0, 1.0) for j in range(rest)]
    for (a, b, frequency, scale), (real, imag), size in zip(pairs, means, sizes, strict=True):
        # q conj(k) = dot + i cross, of which the real part after a turn is wanted.
        dot, cross = real * key[a] + imag * key[b], imag * key[a] - real * key[b]
        for power in range(17):
            angle = frequency * (distance + 2**power)
            total += scale**2 * (dot * math.cos(angle) - cross * math.sin(angle)) / 17
        total += scale**2 * (size - math.hypot(real, imag)) * math.hypot(key[a], key[b])
    return total


def expected_set(scores: np.ndarray, mode: str, keep: int, recent: int) -> np.ndarray:
    """Kept indices [layers, kv heads, keep] of raw scores [layers, heads, n]."""
    normal = (scores - scores.mean(-1, keepdims=True)) / (scores.std(-1, keepdims=True) + 1e-6)
    rows = normal.reshape(LAYERS, KV_HEADS, 2, -1).max(2)
    if mode == "per-head":
        rows = np.broadcast_to(rows.mean(0), rows.shape)
    if mode == "union":
        rows = np.broadcast_to(rows.max((0, 1)), rows.shape)
    n = scores.shape[-1]
    best = np.argsort(-rows[..., : n - recent], axis=-1, kind="stable")[..., : keep - recent]
    last = np.broadcast_to(np.arange(n - recent, n), (*rows.shape[:2], recent))
    return np.sort(np.concatenate([best, last], -1), -1)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("qwen3", (16, True)), ("yarn", (16, False)), ("partial-linear", (12, True))],
)
def test_scores_are_the_double_loop(folder: Path, kind: str, expected: tuple[int, bool]) -> None:
    oracle = Oracle(folder / kind, folder / kind / "stats.pt")
    generator = torch.Generator().manual_seed(9)
    keys = torch.randn(LAYERS, KV_HEADS, 5, HEAD_DIM, generator=generator)
    positions = torch.randint(0, 3000, (LAYERS, KV_HEADS, 5), generator=generator).sort().values
    candidates = Candidates(
        keys, keys, positions, length=3000, keep=3, rope=oracle.decoder.rope, stats=oracle.stats
    )
    found = TriAttention(16, 1).scores(candidates).flatten(1, 2)
    rotary = oracle.decoder.model.model.rotary_emb
    assert (len(rotary.inv_freq), rotary.attention_scaling == 1) == expected
    stats = torch.load(folder / kind / "stats.pt", weights_only=True)["stats"]
    for layer, head, i in np.ndindex(found.shape):
        distance = 3000 - int(positions[layer, head // 2, i])
        fields = stats[f"layer{layer:02d}_head{head:02d}"]
        score = loop_score(keys[layer, head // 2, i].tolist(), distance, fields, rotary)
        assert found[layer, head, i].item() == pytest.approx(score, abs=1e-9)


def test_znorm_comes_before_the_maximum_over_the_group() -> None:
    """One query head with large flat scores must not silence the other of its KV head."""
    scores = torch.tensor([[[[100.0, 101.0, 100.0, 100.0], [0.0, 0.0, 0.0, 1.0]]]])
    free = torch.zeros(4, dtype=torch.bool)
    right = select(Ranking(combine(scores, "per-layer-per-head"), free), 2)
    assert right.index.tolist() == [[[1, 3]]]
    raw = select(Ranking(combine(scores, "per-layer-per-head", normalize=False), free), 2)
    assert raw.index.tolist() == [[[0, 1]]]


def test_modes_reduce_over_the_right_axes() -> None:
    scores = torch.randn(3, 2, 2, 6, dtype=torch.float64)
    rows = scores.amax(2)
    assert torch.equal(combine(scores, "per-layer-per-head", False), rows)
    assert torch.equal(combine(scores, "per-head", False), rows.mean(0, keepdim=True))
    assert torch.equal(combine(scores, "union", False).flatten(), scores.amax((0, 1, 2)))


# --- rounds ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("page", "kept"),
    [
        # Prompt 10: start 10; rounds of 9 keep 2 sinks and 4 last.
        (1, [[10, 11, 15, 16, 17, 18], [10, 11, 18, 19, 20, 21], [10, 11, 21, 22, 23, 24]]),
        # Start 12, budget 8, interval 4: the first private token is the third generated.
        (4, [[12, 13, 18, 19, 20, 21, 22, 23]]),
    ],
)
def test_streaming_keeps_sinks_and_last(qwen3: Oracle, page: int, kept: list[list[int]]) -> None:
    replay = qwen3.replay(PROMPT[:10], TEXT[:17], Streaming(6, 3, sinks=2), page)
    assert [done.kept.tolist() for done in replay.rounds] == [[[row]] for row in kept]
    assert all(done.margin == math.inf for done in replay.rounds)


@settings(max_examples=30, deadline=None)
@given(
    prompt=st.integers(1, 37),
    outputs=st.integers(1, 80),
    budget=st.integers(6, 20),
    interval=st.integers(1, 12),
    page=st.sampled_from([1, 4]),
    mode=st.sampled_from([*MODES, "streaming"]),
)
def test_schedule_bound_and_recents(
    qwen3: Oracle, prompt: int, outputs: int, budget: int, interval: int, page: int, mode: str
) -> None:
    kind = Streaming(budget, interval) if mode == "streaming" else None
    policy = kind or TriAttention(budget, interval, recent=5, mode=mode)
    replay = qwen3.replay(PROMPT[:prompt], TEXT[:outputs], policy, page)
    start = math.ceil(prompt / page) * page
    paged_budget = math.ceil(budget / page) * page
    paged_interval = math.ceil(interval / page) * page
    rounds, physical, resident = [], [prompt], prompt
    for k in range(1, outputs):
        if resident - start >= paged_budget + paged_interval:
            rounds.append((k, prompt + k - 1, resident - start))
            resident = start + paged_budget
        resident += 1
        physical.append(resident)
    assert [(done.step, done.length, done.candidates) for done in replay.rounds] == rounds
    assert replay.physical.tolist() == physical
    assert max(physical) - prompt <= paged_budget + paged_interval + page - 1
    shape = {"per-head": (1, 2), "per-layer-per-head": (4, 2)}.get(mode, (1, 1))
    for done in replay.rounds:
        assert done.kept.shape == (*shape, paged_budget)
        assert (np.diff(done.kept) > 0).all() and done.kept.min() >= start
        last = min(5, paged_budget - 4) if mode == "streaming" else 5
        assert (done.kept[..., -last:] == np.arange(done.length - last, done.length)).all()


def test_restart_is_a_new_request(qwen3: Oracle) -> None:
    policy = TriAttention(12, 4, recent=4)
    whole = qwen3.replay(PROMPT, TEXT[:60], policy, page_size=4)
    replay = qwen3.replay(PROMPT, TEXT[:60], policy, page_size=4, restarts=[26, 30])
    second = qwen3.replay(PROMPT + TEXT[:26], TEXT[26:30], policy, page_size=4)
    third = qwen3.replay(PROMPT + TEXT[:30], TEXT[30:60], policy, page_size=4)
    expected = np.concatenate([whole.logprobs[:26], second.logprobs, third.logprobs])
    np.testing.assert_allclose(replay.logprobs, expected, atol=1e-5)
    assert np.abs(replay.logprobs - whole.logprobs)[26:].max() > 0.01
    # Starts are 40 and, with 67 tokens prefilled, 68; limit 16.
    assert [done.length for done in replay.rounds] == [56, 60, 84, 88, 92]
    assert [done.step for done in replay.rounds] == [20, 24, 48, 52, 56]
    assert replay.rounds[2].kept.min() >= 68
    assert replay.physical[26] == 37 + 26 and replay.physical[30] == 37 + 30


@pytest.mark.parametrize("restarts", [[5, 3], [60], [-1]])
def test_senseless_restarts_are_refused(qwen3: Oracle, restarts: list[int]) -> None:
    with pytest.raises(ValueError, match="restarts"):
        qwen3.replay(PROMPT, TEXT[:60], NoEviction(), restarts=restarts)


# --- records -----------------------------------------------------------------------------------


def test_own_record_is_no_difference(qwen3: Oracle) -> None:
    policy = TriAttention(16, 8, recent=4)
    own = qwen3.replay(PROMPT, TEXT[:60], policy)
    record = [done.kept for done in own.rounds]
    again = qwen3.replay(PROMPT, TEXT[:60], policy, recorded=record)
    assert again.followed == 0 and again.surplus == 0 and len(record) == 4
    longer = qwen3.replay(PROMPT, TEXT[:60], policy, recorded=[*record, record[0]])
    assert longer.surplus == 1
    with pytest.raises(RoundMismatch, match="round 3, .* not in the record"):
        qwen3.replay(PROMPT, TEXT[:60], policy, recorded=record[:3])


@pytest.mark.parametrize("mode", MODES)
def test_clear_difference_is_an_error(qwen3: Oracle, mode: str) -> None:
    policy = TriAttention(16, 8, recent=4, mode=mode)
    record = [done.kept.copy() for done in qwen3.replay(PROMPT, TEXT[:60], policy).rounds]
    layer, head = (side - 1 for side in record[1].shape[:2])
    evicted = sorted(set(record[0][layer, head]) - set(record[1][layer, head]))
    swapped = sorted([*record[1][layer, head][1:], evicted[0]])
    record[1][layer, head] = swapped
    with pytest.raises(RoundMismatch, match=f"round 1, layer {layer}, kv head {head}") as caught:
        qwen3.replay(PROMPT, TEXT[:60], policy, recorded=record)
    assert (caught.value.round, caught.value.layer, caught.value.head) == (1, layer, head)
    assert 1e-5 < caught.value.margin < math.inf
    lenient = qwen3.replay(PROMPT, TEXT[:41], policy, recorded=record[:2], tolerance=100.0)
    assert lenient.followed == 1


def test_near_tie_follows_the_record(qwen3: Oracle, folder: Path) -> None:
    """Statistics of zero make every score a tie: the lowest index wins, any record will do."""
    oracle = Oracle(folder / "qwen3")
    zero = torch.zeros(LAYERS, HEADS, HEAD_DIM // 2, dtype=torch.float64)
    oracle.stats = Stats(mean=zero.to(torch.complex128), abs_mean=zero)
    policy = TriAttention(8, 4, recent=2)
    own = oracle.replay(PROMPT[:10], TEXT[:16], policy)
    ties = [10, 11, 12, 13, 14, 15, 20, 21]
    assert [done.kept.tolist() for done in own.rounds] == [[[ties, ties]]]
    assert own.rounds[0].margin == 0.0
    other = [12, 13, 14, 15, 16, 17, 20, 21]
    followed = oracle.replay(PROMPT[:10], TEXT[:16], policy, recorded=[[[ties, other]]])
    assert followed.followed == followed.rounds[0].followed == 1
    assert followed.rounds[0].kept.tolist() == [[ties, other]]
    assert np.abs(followed.logprobs - own.logprobs)[13:].max() > 1e-3
    for strange in ([10, 11, 12, 13, 14, 15, 16, 21], [9, *ties[1:]], [11, 10, *ties[2:]]):
        with pytest.raises(RoundMismatch, match="kv head 1"):
            oracle.replay(PROMPT[:10], TEXT[:16], policy, recorded=[[[ties, strange]]])
    with pytest.raises(RoundMismatch, match="shape"):
        oracle.replay(PROMPT[:10], TEXT[:16], policy, recorded=[[[ties]]])


# --- the rest ----------------------------------------------------------------------------------


def test_chunks_are_steps_in_float64(folder: Path) -> None:
    oracle = Oracle(folder / "yarn", folder / "yarn" / "stats.pt", dtype=torch.float64)
    policy = TriAttention(20, 10, mode="per-layer-per-head")
    written = oracle.generate(PROMPT, 60, policy)
    replay = oracle.replay(PROMPT, written.output_ids.tolist(), policy)
    assert (written.greedy == written.output_ids).all()
    np.testing.assert_allclose(written.logprobs, replay.logprobs, atol=1e-11)
    np.testing.assert_array_equal(written.physical, replay.physical)


def test_bad_statistics_are_refused(folder: Path, tmp_path: Path) -> None:
    path = folder / "qwen3" / "stats.pt"
    with pytest.raises(ValueError, match="lack layer04_head00"):
        load_stats(path, 5, HEADS, 16)
    with pytest.raises(ValueError, match="expected \\(17,\\)"):
        load_stats(path, LAYERS, HEADS, 17)
    torch.save({"metadata": {}}, tmp_path / "none.pt")
    with pytest.raises(ValueError, match="no 'stats'"):
        load_stats(tmp_path / "none.pt", LAYERS, HEADS, 16)


def test_what_it_cannot_do_is_refused(folder: Path, qwen3: Oracle) -> None:
    with pytest.raises(ValueError, match="'dynamic' depends on the length"):
        Oracle(folder / "dynamic")
    with pytest.raises(ValueError, match="float32 or float64"):
        Oracle(folder / "qwen3", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="needs query statistics"):
        Oracle(folder / "qwen3").replay(PROMPT, TEXT[:60], TriAttention(16, 8))
    with pytest.raises(ValueError, match="empty prompt"):
        qwen3.generate([], 3, NoEviction())
    with pytest.raises(ValueError, match="17 recent tokens in a budget of 16"):
        TriAttention(16, 8, recent=17)
    with pytest.raises(ValueError, match="unknown policy"):
        make_policy("lru", 16, 8)


def test_policies_by_name() -> None:
    assert isinstance(make_policy("none", 64, 32), NoEviction)
    streaming = make_policy("streaming", 64, 32, sinks=2)
    assert isinstance(streaming, Streaming) and streaming.sinks == 2
    union = make_policy("triattention", 64, 32, mode="union", recent=8)
    assert isinstance(union, TriAttention) and (union.mode, union.recent) == ("union", 8)


def test_it_imports_nothing_of_the_project() -> None:
    for path in (ROOT / "bench" / "simulator").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0):
                module = getattr(node, "module", None)
                names = [module] if module else [alias.name for alias in node.names]
                assert not any(name.startswith(("sglang", "kernels")) for name in names), path
