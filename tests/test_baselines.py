"""The baselines against their formulas, written out once more, and against transformers."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from bench.models.tiny import make_model
from bench.simulator import Candidates, Oracle, Request, make_policy
from bench.simulator.baselines import H2O, RKV, Chance, FutureAttention, SnapKV, Spliced
from bench.simulator.baselines.adakv import head_budgets
from bench.simulator.baselines.rkv import redundancy
from bench.simulator.decoder import attention
from bench.simulator.history import History
from bench.simulator.observed import Observed
from bench.simulator.request import Ledger
from tests.tiny_stats import calibration_text, make_stats

LAYERS, KV_HEADS, GROUP, DIM = 2, 2, 3, 8
START, N = 5, 23
TEXT = list(calibration_text(400, seed=9).encode())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("qwen3", tmp_path_factory.mktemp("baselines"))


@pytest.fixture
def observed() -> Observed:
    generator = torch.Generator().manual_seed(3)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    keys = rand(LAYERS, KV_HEADS, START + N, DIM)
    keys[:, :, 9] = keys[:, :, 20]  # Two that are alike.
    keys[:, :, 14] = keys[:, :, 20] + 0.1
    queries = rand(LAYERS, KV_HEADS * GROUP, 12, DIM)
    resident = torch.ones(LAYERS, KV_HEADS, START + N, dtype=torch.bool)
    return Observed(keys, queries, rand(LAYERS, KV_HEADS, N).abs(), resident, START, DIM**-0.5)


def softmax(row: list[float]) -> list[float]:
    best = max(row)
    powers = [math.exp(value - best) for value in row]
    return [power / sum(powers) for power in powers]


def pooled(row: list[float], kernel: int, join: object) -> list[float]:
    half = kernel // 2
    near = [row[max(0, place - half) : place + half + 1] for place in range(len(row))]
    return [join(values) for values in near]  # type: ignore[operator]


def logit(observed: Observed, layer: int, head: int, query: int, key: int) -> float:
    q, k = observed.queries[layer, head, query], observed.keys[layer, head // GROUP, key]
    return float(sum(a * b for a, b in zip(q.tolist(), k.tolist(), strict=True)) / DIM**0.5)


def test_future_attention(model: Path) -> None:
    """Against the attention that transformers gives out; what is kept is what is needed later."""
    oracle = Oracle(model)
    policy = FutureAttention(16, 8, recent=4)
    policy.look_ahead(oracle.decoder, TEXT)
    theirs = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager")
    weights = theirs(torch.tensor([TEXT]), output_attentions=True).attentions
    most = torch.stack([layer[0].unflatten(0, (-1, 2)).amax(1) for layer in weights])
    assert policy.paid is not None
    assert torch.allclose(policy.paid, most, atol=1e-5)
    positions = torch.arange(300, 324).expand(*most.shape[:2], -1)
    keys = torch.zeros(*positions.shape, 4)
    candidates = Candidates(keys, keys, positions, 324, 16, oracle.decoder.rope, None)
    ranking = policy.rank(candidates)
    later = most[:, :, 324:, 300:324].amax(2)
    assert torch.allclose(ranking.scores, later.double(), atol=1e-5)
    assert ranking.protected.nonzero().flatten().tolist() == [20, 21, 22, 23]
    with pytest.raises(ValueError, match="look_ahead"):
        FutureAttention(16, 8).rank(candidates)


@pytest.mark.parametrize("but", [False, True])
def test_future_attention_in_some_heads(model: Path, tmp_path: Path, but: bool) -> None:
    oracle = Oracle(model, make_stats(model, tmp_path / "stats.pt", tokens=256))
    decoder, stats = oracle.decoder, oracle.stats
    keys = torch.randn(decoder.layers, decoder.kv_heads, 24, decoder.head_dim)
    positions = torch.arange(300, 324).expand(*keys.shape[:2], -1)
    candidates = Candidates(keys, keys, positions, 324, 16, decoder.rope, stats)
    policy, future = Spliced(16, 8, 4, [(1, 0)], but), FutureAttention(16, 8, 4)
    for one in (policy, future):
        one.look_ahead(decoder, TEXT)
    score = make_policy("triattention", 16, 8, recent=4, mode="per-layer-per-head")
    found, known, scored = (one.rank(candidates).scores for one in (policy, future, score))
    here, elsewhere = (scored, known) if but else (known, scored)
    assert torch.equal(found[1, 0], here[1, 0])
    assert torch.equal(found[0], elsewhere[0])
    assert torch.equal(found[1, 1:], elsewhere[1, 1:])


def test_snapkv(observed: Observed) -> None:
    window, kernel, resident = 4, 5, START + N
    found = SnapKV(16, 8, window, kernel).scores(observed)
    for layer in range(LAYERS):
        for kv_head in range(KV_HEADS):
            paid = [0.0] * resident
            for head in range(kv_head * GROUP, (kv_head + 1) * GROUP):
                for back in range(window):
                    visible = resident - back
                    row = [logit(observed, layer, head, 11 - back, key) for key in range(visible)]
                    for key, weight in enumerate(softmax(row)):
                        paid[key] += weight / (window * GROUP)
            mean = pooled(paid[START:], kernel, lambda values: sum(values) / len(values))
            assert found[layer, kv_head].tolist() == pytest.approx(mean, rel=1e-5)


def test_rkv(observed: Observed) -> None:
    window, kernel, mix, past = 4, 3, 0.3, START + N - 4
    found = RKV(16, 8, window, kernel, mix).scores(observed)
    for layer in range(LAYERS):
        for kv_head in range(KV_HEADS):
            heads = range(kv_head * GROUP, (kv_head + 1) * GROUP)
            paid = [0.0] * past
            for query in range(8, 12):
                row = [
                    max(logit(observed, layer, head, query, key) for head in heads)
                    for key in range(past)
                ]
                paid = [sum(both) for both in zip(paid, softmax(row), strict=True)]
            important = pooled([weight / window for weight in paid[START:]], kernel, max)
            repeated = written_out_redundancy(observed.keys[layer, kv_head, START:].numpy())
            expected = [
                mix * value - (1 - mix) * repeated[place]
                for place, value in enumerate(important + [0.0] * window)
            ]
            assert found[layer, kv_head].tolist() == pytest.approx(expected, rel=1e-5)


def written_out_redundancy(keys: np.ndarray) -> list[float]:
    """Softmax of the mean likeness that each key is charged with."""
    unit = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    charged = [0.0] * len(unit)
    for one, key in enumerate(unit):
        likeness = {other: float(key @ unit[other]) for other in range(len(unit)) if other != one}
        alike = [other for other, cosine in likeness.items() if cosine > 0.5]
        spared = max(alike, default=0)
        for other, cosine in likeness.items():
            charged[other] += 0.0 if other == spared else cosine / len(unit)
    return softmax(charged)


def test_of_equal_keys_the_latest_is_the_least_redundant(observed: Observed) -> None:
    keys = torch.randn(1, 1, 30, 64, generator=torch.Generator().manual_seed(1))
    keys[0, 0, [4, 11, 25]] = keys[0, 0, 25].clone()
    worst = redundancy(keys)[0, 0].argsort(descending=True).tolist()
    assert set(worst[:2]) == {4, 11}
    assert worst.index(25) > 2


def test_received_is_the_attention_of_the_whole_past(model: Path) -> None:
    """H2O's sums, over prefill and chunks of decode, against transformers' own weights."""
    oracle = Oracle(model)
    policy = make_policy("h2o", 40, 20)
    request = Request(
        oracle.decoder, History(oracle.decoder.new_cache()), 1, Ledger(policy, None, None, 0), TEXT
    )
    request.prefill(TEXT[:30], 0)
    for begin in range(30, 80, 7):
        request.feed(TEXT[begin : begin + 7])
    seen = request.observed()
    theirs = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager")
    length = request.history.length
    weights = theirs(torch.tensor([TEXT[:length]]), output_attentions=True).attentions
    for layer, matrix in enumerate(weights):
        paid = matrix[0].sum(dim=1).unflatten(0, (KV_HEADS, -1)).sum(dim=1)
        assert torch.allclose(seen.received[layer], paid[:, 30:], atol=1e-4)
    kept = policy.rank(candidates(request, seen))
    assert isinstance(policy, H2O)
    assert kept.protected.tolist() == [False] * (length - 50) + [True] * 20


def candidates(request: Request, seen: Observed) -> Candidates:
    keys = seen.keys[:, :, request.start :]
    at = torch.arange(request.start, request.history.length).expand(keys.shape[:3])
    return Candidates(
        keys, keys, at, request.history.length, 40, request.decoder.rope, None, observed=seen
    )


def test_the_window_is_of_the_last_queries(model: Path) -> None:
    """Weights that `Observed` computes from what is remembered equal transformers' own."""
    oracle = Oracle(model)
    request = Request(
        oracle.decoder,
        History(oracle.decoder.new_cache()),
        1,
        Ledger(make_policy("snapkv", 20, 20), None, None, 0),
        TEXT,
    )
    request.prefill(TEXT[:50], 0)
    for token in TEXT[50:55]:
        request.feed([token])
    found = request.observed().logits(8).softmax(dim=-1)
    theirs = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager")
    weights = theirs(torch.tensor([TEXT[:55]]), output_attentions=True).attentions
    for layer, matrix in enumerate(weights):
        assert torch.allclose(
            found[layer].flatten(0, 1).float(), matrix[0, :, -8:], atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize("name", ["snapkv", "rkv", "h2o", "random"])
def test_whole_outputs(model: Path, name: str) -> None:
    """Rounds are held, sets differ by layer and head, the latest stay; twice the same."""
    oracle = Oracle(model)
    policy = make_policy(name, 24, 16)
    one = oracle.replay(TEXT[:30], TEXT[30:200], policy)
    assert len(one.rounds) >= 8
    recent = policy.recent
    for done in one.rounds:
        assert done.kept.shape == (1 if name == "random" else 4, 2, 24)
        latest = np.arange(done.length - recent, done.length)
        assert (done.kept[:, :, -recent:] == latest).all()
    assert len({kept.tobytes() for kept in done.kept.reshape(-1, 24)}) > 1
    again = oracle.replay(TEXT[:30], TEXT[30:200], make_policy(name, 24, 16))
    assert np.array_equal(one.logprobs, again.logprobs)


def test_heads_compete_for_a_layers_budget() -> None:
    """A floor of a fifth for each head, the rest where the layer's best tokens are."""
    scores = torch.tensor([[9.0, 8, 7, 6, 5, 4, 0, 0, 0, 0], [3.0, 2, 1, 0, 0, 0, 0, 0, 0, 0]])
    everything = torch.tensor([10, 10])
    assert head_budgets(scores.double(), 3, everything).tolist() == [5, 1]  # 0.8 x 6 + 0.2 x 3
    assert head_budgets(scores.flip(0).double(), 3, everything).tolist() == [1, 5]
    assert head_budgets(scores.double(), 3, torch.tensor([4, 10])).tolist() == [4, 2]
    even = torch.tensor([[4.0, 3, 2, 1], [4.0, 3, 2, 1]]).double()
    assert head_budgets(even, 2, torch.tensor([4, 4])).tolist() == [2, 2]


def test_adakv_keeps_as_much_in_all(model: Path) -> None:
    """Heads keep different numbers, a layer as many as under any other policy."""
    oracle = Oracle(model)
    policy = make_policy("adakv", 24, 16)
    done = oracle.replay(TEXT[:30], TEXT[30:200], policy).rounds
    assert len(done) >= 8
    for each in done:
        counts = (each.kept >= 0).sum(axis=2)
        assert counts.sum(axis=1).tolist() == [2 * 24] * 4
        assert counts.max() == each.kept.shape[2]
        assert counts.min() >= 8 + round(0.2 * 16)
        assert (each.kept[:, :, -8:] == np.arange(each.length - 8, each.length)).all()
    assert any((each.kept >= 0).sum(axis=2).std() > 1 for each in done)
    gaps = np.diff([each.length for each in done])
    assert (gaps == 16).all()


def test_a_place_without_a_token_is_not_attended_to(model: Path) -> None:
    """A head that keeps fewer gives what it gives where the others keep no more than it."""
    decoder = Oracle(model).decoder
    outputs = []
    for index in ([[-1, 3, 7], [1, 3, 7]], [[3, 7], [3, 7]]):
        history = History(decoder.new_cache())
        request = Request(decoder, history, 1, Ledger(make_policy("none"), None, None, 0), TEXT)
        request.prefill(TEXT[:20], 0)
        request.feed(TEXT[20:30])
        for kv in history.cache:
            kv.keep(20, torch.tensor(index))
        queries = torch.ones(4, 1, 32)
        kv = history.cache[0]
        weights = attention(queries, kv.rotated, kv.positions >= 0, 1.0)
        outputs.append((weights @ kv.values[:, None])[0])
    assert torch.allclose(*outputs, atol=1e-6)


def test_random_keeps_each_equally_often() -> None:
    at = torch.arange(40).expand(8, 8, 40)
    counts = torch.zeros(40)
    for length in range(40, 840):
        some = Candidates(at, at, at, length, 20, None, None)  # type: ignore[arg-type]
        ranking = Chance(20, 8, recent=0).rank(some)
        counts += (ranking.scores.argsort(dim=-1).argsort(dim=-1) >= 20).sum(dim=(0, 1))
    assert (counts / 6400).tolist() == pytest.approx([0.5] * 40, abs=0.03)


@pytest.mark.parametrize(
    ("name", "options"),
    [("snapkv", {"kernel": 4}), ("rkv", {"mix": 2.0}), ("rkv", {"window": 30}), ("oracle", {})],
)
def test_bad_settings(name: str, options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"kernel 4|mix 2\.0|30 recent tokens|unknown policy"):
        make_policy(name, 20, 8, **options)


def test_live_queries_are_needed() -> None:
    at = torch.arange(9).expand(1, 1, 9)
    some = Candidates(at, at, at, 9, 4, None, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="SnapKV needs the request's own queries"):
        make_policy("snapkv", 8, 8).rank(some)
