"""The oracle against transformers' own forward and against formulas written out here."""

from __future__ import annotations

import json
import math
import sys
import zlib
from array import array
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.models.tiny import make_model
from bench.simulator import (
    Candidates,
    NoEviction,
    Oracle,
    Ranking,
    Replay,
    Restart,
    RoundMismatch,
    Stats,
    Streaming,
    TriAttention,
    load_stats,
    make_policy,
)
from bench.simulator.scoring import combine, znorm
from bench.simulator.selection import select
from tests.tiny_stats import calibration_text, make_stats

KINDS = ("qwen3", "llama3", "yarn")
MODES = ("per-head", "per-layer-per-head", "union")
LAYERS, HEADS, KV_HEADS, HEAD_DIM = 4, 4, 2, 32
PROMPT = list(calibration_text(37, seed=3).encode())
TEXT = list(calibration_text(600, seed=4).encode())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All models with their stats.pt, and variants that differ in config.json."""
    root = tmp_path_factory.mktemp("simulator")
    for kind in KINDS:
        make_stats(make_model(kind, root / kind), root / kind / "stats.pt", tokens=512)
    linear = {"rope_type": "linear", "factor": 2.5, "rope_theta": 10000.0}
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    variant(root / "linear", rope_scaling=linear)
    variant(root / "partial", rope_scaling=None, partial_rotary_factor=0.5)
    variant(root / "partial-linear", rope_scaling=linear, partial_rotary_factor=0.75)
    variant(root / "partial-yarn", rope_scaling=yarn, partial_rotary_factor=0.75)
    variant(root / "dynamic", rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    return root


def variant(path: Path, **changes: Any) -> None:
    """The llama3 model with another config.json and random statistics."""
    config = json.loads((make_model("llama3", path) / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))
    generator = torch.Generator().manual_seed(1)
    heads = {}
    for layer, head in np.ndindex(LAYERS, HEADS):
        real, imag = torch.randn(2, HEAD_DIM // 2, generator=generator)
        size = torch.hypot(real, imag) * 1.25
        values = {"q_mean_real": real, "q_mean_imag": imag, "q_abs_mean": size}
        heads[f"layer{layer:02d}_head{head:02d}"] = values
    torch.save({"metadata": {}, "stats": heads}, path / "stats.pt")


@pytest.fixture(scope="module")
def qwen3(folder: Path) -> Oracle:
    return Oracle(folder / "qwen3", folder / "qwen3" / "stats.pt")


def reference(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa")


def hf_logits(model: Any, output: list[int]) -> Any:
    """Logits [output, vocabulary] from which transformers would sample each output token."""
    with torch.inference_mode():
        logits = model(torch.tensor([PROMPT + output[:-1]])).logits[0, len(PROMPT) - 1 :]
    return logits.double().numpy()


@pytest.mark.parametrize("kind", [*KINDS, "linear"])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
def test_without_eviction_it_is_transformers(
    folder: Path, kind: str, dtype: torch.dtype, error: float
) -> None:
    oracle, output = Oracle(folder / kind, dtype=dtype), TEXT[:560]
    replay = oracle.replay(PROMPT, output, NoEviction(), keep_logits=True)
    model = reference(folder / kind, dtype)
    for norm in (part for part in model.modules() if hasattr(part, "variance_epsilon")):
        # transformers' own computes in float32 whatever comes in.
        norm.forward = partial(rms_norm, norm.weight, norm.variance_epsilon)
    expected = hf_logits(model, output)
    logprobs = torch.tensor(expected).log_softmax(-1).numpy()[range(560), output]
    assert np.abs(replay.logits - expected).max() < error
    assert np.abs(replay.logprobs - logprobs).max() < error
    assert np.abs(replay.margins - np.diff(np.sort(expected)[:, -2:])[:, 0]).max() < error
    assert (replay.greedy == expected.argmax(-1)).all()
    assert (replay.rounds, replay.physical.tolist()) == ([], list(range(37, 597)))


def rms_norm(weight: torch.Tensor, eps: float, x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)


@pytest.mark.parametrize(("kind", "rotary"), [("partial", 16), ("partial-linear", 24)])
def test_partial_rotary(folder: Path, kind: str, rotary: int) -> None:
    """transformers' Llama cannot do partial rotary, but a full one with zero frequencies can."""
    oracle = Oracle(folder / kind)
    half, still = rotary // 2, (HEAD_DIM - rotary) // 2
    theta, factor = (500000.0, 1.0) if kind == "partial" else (10000.0, 2.5)
    turning = [theta ** (-2 * f / rotary) / factor for f in range(half)]
    order = [*range(half), *range(rotary, rotary + still)]
    order += [*range(half, rotary), *range(rotary + still, HEAD_DIM)]
    model = reference(folder / "llama3")
    model.model.rotary_emb.inv_freq = torch.tensor(turning + [0.0] * still)
    for layer in model.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            heads = projection.weight.data.unflatten(0, (-1, HEAD_DIM))
            projection.weight.data = heads[:, order].flatten(0, 1)
    replay = oracle.replay(PROMPT, TEXT[:100], NoEviction(), keep_logits=True)
    assert np.abs(replay.logits - hf_logits(model, TEXT[:100])).max() < 1e-4
    np.testing.assert_allclose(oracle.decoder.rope.omega, turning + [0.0] * still, rtol=1e-6)


def masked_forward(path: Path, output: list[int], replay: Replay) -> tuple[np.ndarray, list[Any]]:
    """transformers' logits with the evicted hidden by masks; the keys before RoPE it computed."""
    model, size = reference(path), len(PROMPT) + len(output) - 1
    start = replay.rounds[0].length - replay.rounds[0].candidates
    visible = torch.ones(LAYERS, HEADS, size, size, dtype=torch.bool).tril()
    for done in replay.rounds:
        kept = torch.tensor(done.kept).expand(LAYERS, KV_HEADS, -1)
        gone = torch.ones(LAYERS, KV_HEADS, size, dtype=torch.bool)
        gone[..., :start] = gone[..., done.length :] = False
        gone.scatter_(2, kept, False)
        visible[:, :, done.length :] &= ~gone.repeat_interleave(2, 1)[:, :, None]
    keys: list[Any] = []
    masks = torch.zeros(visible.shape).masked_fill(~visible, float("-inf"))
    for layer, mask in zip(model.model.layers, masks, strict=True):
        attention = layer.self_attn
        attention.register_forward_pre_hook(
            lambda _m, args, kw, mask=mask: (args, {**kw, "attention_mask": mask[None]}),
            with_kwargs=True,
        )
        source = attention.k_norm if hasattr(attention, "k_norm") else attention.k_proj
        source.register_forward_hook(lambda *io: keys.append(io[2].view(-1, KV_HEADS, HEAD_DIM)))
    return hf_logits(model, output), keys


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("kind", "page"), [*((kind, 1) for kind in KINDS), ("qwen3", 4)])
def test_rounds_and_logits_from_transformers(folder: Path, kind: str, mode: str, page: int) -> None:
    """Kept sets worked out by `expected_set` from transformers' keys, logits under masks."""
    oracle = Oracle(folder / kind, folder / kind / "stats.pt")
    policy = TriAttention(14, 6, recent=5, mode=mode)
    written = oracle.generate(PROMPT, 38, policy, page)
    output = written.output_ids.tolist()
    replay = oracle.replay(PROMPT, output, policy, page, keep_logits=True)
    logits, keys = masked_forward(folder / kind, output, replay)
    assert np.abs(replay.logits - logits).max() < 1e-4
    np.testing.assert_allclose(written.logprobs, replay.logprobs, atol=1e-4)
    start, rounds = {1: (37, 3), 4: (40, 2)}[page]
    assert len(replay.rounds) == len(written.rounds) == rounds
    resident = np.tile(np.arange(start, 99), (LAYERS, KV_HEADS, 1))
    for done, again in zip(replay.rounds, written.rounds, strict=True):
        assert (done.kept == again.kept).all()
        resident = resident[resident < done.length].reshape(LAYERS, KV_HEADS, -1)
        scores = expected_scores(folder / kind, keys, resident, done.length)
        kept = expected_set(scores, mode, done.kept.shape[-1], 5)
        kept_positions = np.take_along_axis(resident, kept, 2)
        assert (kept_positions == done.kept).all()
        later = np.tile(np.arange(done.length, 99), (LAYERS, KV_HEADS, 1))
        resident = np.concatenate([kept_positions, later], 2)


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
    names = ("q_mean_real", "q_mean_imag", "q_abs_mean")
    queries = zip(*(fields[name].tolist() for name in names), strict=True)
    omega, factor, total = rotary.inv_freq.tolist(), rotary.attention_scaling, 0.0
    r, half, rest = 2 * len(omega), len(omega), len(key) // 2 - len(omega)
    pairs = [(f, f + half, omega[f], factor) for f in range(half)]
    pairs += [(r + j, r + j + rest, 0.0, 1.0) for j in range(rest)]
    for (a, b, frequency, scale), (real, imag, size) in zip(pairs, queries, strict=True):
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


@pytest.mark.parametrize(("kind", "rotary_dim"), [("qwen3", 32), ("partial-yarn", 24)])
def test_scores_are_the_double_loop(folder: Path, kind: str, rotary_dim: int) -> None:
    oracle = Oracle(folder / kind, folder / kind / "stats.pt")
    generator = torch.Generator().manual_seed(9)
    keys = torch.randn(LAYERS, 90, KV_HEADS, HEAD_DIM, generator=generator)
    at = torch.rand(LAYERS, KV_HEADS, 90, generator=generator).argsort(-1)[..., :5].sort().values
    heads = torch.arange(KV_HEADS)[:, None]
    own = torch.stack([keys[layer][at[layer], heads] for layer in range(LAYERS)])
    candidates = Candidates(own, own, at, 3000, 3, oracle.decoder.rope, oracle.stats)
    found = TriAttention(16, 1).scores(candidates).flatten(1, 2)
    expected = expected_scores(folder / kind, keys, at.numpy(), 3000)
    np.testing.assert_allclose(found, expected, atol=1e-9)
    scaled = oracle.decoder.rope.scale > 1.1
    assert scaled.tolist() == [kind == "partial-yarn" and f < rotary_dim // 2 for f in range(16)]


def test_znorm_comes_before_the_maximum_over_the_group() -> None:
    """One query head with large flat scores must not silence the other of its KV head."""
    scores = torch.tensor([[[[100.0, 101.0, 100.0, 100.0], [0.0, 0.0, 0.0, 1.0]]]])
    for normalize, kept in ((True, [1, 3]), (False, [0, 1])):
        ranking = Ranking(
            combine(scores, "per-layer-per-head", normalize), torch.zeros(4, dtype=torch.bool)
        )
        assert select(ranking, 2).index.tolist() == [[kept]]
    assert znorm(torch.tensor([0.0, 2.0])).tolist() == pytest.approx([-1, 1], abs=1e-5)


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
    found = [(done.kept.tolist(), done.margin) for done in replay.rounds]
    assert found == [([[row]], math.inf) for row in kept]


def early(prompt: list[int], interval: int, recent: int, page: int) -> int:
    """Tokens by which the first round precedes the others; `interval` in whole pages."""
    choices = range(0, max(0, interval - max(recent, 1)) + 1, page)
    return choices[zlib.crc32(array("q", prompt).tobytes()) % len(choices)]


@settings(max_examples=30, deadline=None)
@given(
    *(st.integers(1, 37), st.integers(1, 80), st.integers(6, 20), st.integers(1, 12)),
    *(st.sampled_from([1, 4]), st.sampled_from([*MODES, "streaming"])),
)
def test_schedule_bound_and_recents(
    qwen3: Oracle, prompt: int, outputs: int, budget: int, interval: int, page: int, mode: str
) -> None:
    scored = partial(TriAttention, recent=5, mode=mode)
    policy = (Streaming if mode == "streaming" else scored)(budget, interval)
    replay = qwen3.replay(PROMPT[:prompt], TEXT[:outputs], policy, page)
    start, keep, more = (math.ceil(size / page) * page for size in (prompt, budget, interval))
    rounds, physical, resident = [], [prompt], prompt
    due = keep + more - early(PROMPT[:prompt], more, policy.recent, page)
    for k in range(1, outputs):
        if resident - start >= due:
            rounds.append((k, prompt + k - 1, resident - start))
            resident, due = start + keep, keep + more
        resident += 1
        physical.append(resident)
    assert [(done.step, done.length, done.candidates) for done in replay.rounds] == rounds
    assert replay.physical.tolist() == physical
    assert max(physical) - prompt <= keep + more + page - 1
    shape = {"per-head": (1, 2), "per-layer-per-head": (4, 2)}.get(mode, (1, 1))
    last = min(5, keep - 4) if mode == "streaming" else 5
    for done in replay.rounds:
        assert done.kept.shape == (*shape, keep)
        assert (np.diff(done.kept, prepend=start - 1) > 0).all()
        assert (done.kept[..., -last:] == np.arange(done.length - last, done.length)).all()


def test_restart_is_a_new_request(qwen3: Oracle) -> None:
    policy = TriAttention(12, 4, recent=4)
    whole = qwen3.replay(PROMPT, TEXT[:60], policy, page_size=4)
    restarts = [Restart(26, 0), Restart(30, 0)]
    replay = qwen3.replay(PROMPT, TEXT[:60], policy, page_size=4, restarts=restarts)
    second = qwen3.replay(PROMPT + TEXT[:26], TEXT[26:30], policy, page_size=4)
    third = qwen3.replay(PROMPT + TEXT[:30], TEXT[30:60], policy, page_size=4)
    expected = np.concatenate([whole.logprobs[:26], second.logprobs, third.logprobs])
    np.testing.assert_allclose(replay.logprobs, expected, atol=1e-4)
    assert np.abs(replay.logprobs - whole.logprobs)[26:].max() > 0.01
    # Starts are 40 and, with 67 tokens prefilled, 68; limit 16.
    found = [(done.step, done.length) for done in replay.rounds]
    assert found == [(20, 56), (24, 60), (48, 84), (52, 88), (56, 92)]
    assert replay.physical[[26, 30]].tolist() == [37 + 26, 37 + 30]


def test_own_record_is_no_difference(qwen3: Oracle) -> None:
    policy = TriAttention(16, 8, recent=4)
    record = [done.kept for done in qwen3.replay(PROMPT, TEXT[:60], policy).rounds]
    again = qwen3.replay(PROMPT, TEXT[:60], policy, recorded=record)
    assert (again.followed, again.surplus, len(record)) == (0, 0, 5)
    assert qwen3.replay(PROMPT, TEXT[:60], policy, recorded=[*record, record[0]]).surplus == 1
    with pytest.raises(RoundMismatch, match=r"round 3, .* not in the record"):
        qwen3.replay(PROMPT, TEXT[:60], policy, recorded=record[:3])


@pytest.mark.parametrize("mode", MODES)
def test_clear_difference_is_an_error(qwen3: Oracle, mode: str) -> None:
    policy = TriAttention(16, 8, recent=4, mode=mode)
    record = [done.kept.copy() for done in qwen3.replay(PROMPT, TEXT[:60], policy).rounds]
    layer, head = (side - 1 for side in record[1].shape[:2])
    evicted = min(set(record[0][layer, head]) - set(record[1][layer, head]))
    record[1][layer, head] = sorted([*record[1][layer, head][1:], evicted])
    with pytest.raises(RoundMismatch, match=f"round 1, layer {layer}, kv head {head}") as caught:
        qwen3.replay(PROMPT, TEXT[:60], policy, recorded=record)
    assert 1e-5 < caught.value.margin < math.inf
    lenient = qwen3.replay(PROMPT, TEXT[:41], policy, recorded=record[:2], tolerance=100.0)
    assert lenient.followed == 1


def test_near_tie_follows_the_record(folder: Path) -> None:
    """Statistics of zero make every score a tie: the lowest index wins, any record will do."""
    oracle = Oracle(folder / "qwen3")
    zero = torch.zeros(LAYERS, HEADS, HEAD_DIM // 2, dtype=torch.float64)
    oracle.stats = Stats(mean=zero.to(torch.complex128), abs_mean=zero)
    policy = TriAttention(8, 4, recent=4)
    own = oracle.replay(PROMPT[:10], TEXT[:16], policy)
    ties = [10, 11, 12, 13, 18, 19, 20, 21]
    assert [(done.kept.tolist(), done.margin) for done in own.rounds] == [([[ties, ties]], 0.0)]
    other = [12, 13, 14, 15, 18, 19, 20, 21]
    followed = oracle.replay(PROMPT[:10], TEXT[:16], policy, recorded=[[[ties, other]]])
    assert followed.followed == followed.rounds[0].followed == 1
    assert followed.rounds[0].kept.tolist() == [[ties, other]]
    assert np.abs(followed.logprobs - own.logprobs)[13:].max() > 1e-3
    for strange in ([10, 11, 12, 13, 14, 15, 16, 21], [9, *ties[1:]], [11, 10, *ties[2:]]):
        with pytest.raises(RoundMismatch, match="kv head 1"):
            oracle.replay(PROMPT[:10], TEXT[:16], policy, recorded=[[[ties, strange]]])
    with pytest.raises(RoundMismatch, match="shape"):
        oracle.replay(PROMPT[:10], TEXT[:16], policy, recorded=[[[ties]]])


def test_what_it_cannot_do_is_refused(folder: Path, qwen3: Oracle) -> None:
    with pytest.raises(ValueError, match="'dynamic' depends on the length"):
        Oracle(folder / "dynamic")
    with pytest.raises(ValueError, match="lack layer04_head00"):
        load_stats(folder / "qwen3" / "stats.pt", 5, HEADS, 16)
    with pytest.raises(ValueError, match=r"expected \(17,\)"):
        load_stats(folder / "qwen3" / "stats.pt", LAYERS, HEADS, 17)
    with pytest.raises(ValueError, match="needs query statistics"):
        Oracle(folder / "qwen3").replay(PROMPT, TEXT[:60], TriAttention(16, 8))
    for restarts in ([Restart(5, 0), Restart(3, 0)], [Restart(60, 0)], [Restart(-1, 0)]):
        with pytest.raises(ValueError, match="restarts"):
            qwen3.replay(PROMPT, TEXT[:60], NoEviction(), restarts=restarts)
    with pytest.raises(ValueError, match="17 recent tokens in a budget of 16"):
        TriAttention(16, 8, recent=17)


def test_policies_by_name() -> None:
    assert isinstance(make_policy("none", 64, 32), NoEviction)
    options = vars(make_policy("streaming", 64, 32, sinks=2))
    assert options == {"budget": 64, "interval": 32, "recent": 16, "sinks": 2}
    options = vars(make_policy("triattention", 64, 32))
    assert (options["mode"], options["recent"], options["normalize"]) == ("per-head", 16, True)


def test_it_imports_nothing_of_the_project() -> None:
    for path in (Path(__file__).parents[1] / "bench" / "simulator").rglob("*.py"):
        assert "sglang" not in path.read_text().lower(), path
