"""The tiny models are what the other tests stand on: fixed, small, and loadable."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from bench.models import tiny
from bench.models.tokenizer import PRINTABLE
from tests.tiny_stats import calibration_text, make_stats

KINDS = ("qwen3", "llama3", "yarn")
GREEDY_STEPS = 120


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {kind: tiny.make_model(kind, root / kind) for kind in KINDS}


@pytest.fixture(scope="module")
def tokenizer(models: dict[str, Path]) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(models["qwen3"])


@pytest.mark.parametrize("kind", KINDS)
def test_same_bytes_every_time(kind: str, models: dict[str, Path], tmp_path: Path) -> None:
    again = tiny.make_model(kind, tmp_path / kind)
    names = sorted(p.name for p in again.iterdir())
    assert names == sorted(p.name for p in models[kind].iterdir())
    for name in names:
        assert (again / name).read_bytes() == (models[kind] / name).read_bytes(), name


@pytest.mark.parametrize("kind", KINDS)
def test_under_two_megabytes(kind: str, models: dict[str, Path]) -> None:
    assert sum(p.stat().st_size for p in models[kind].iterdir()) < 2_000_000


def test_unknown_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown tiny model"):
        tiny.make_model("gpt5", tmp_path)


@given(text=st.text(st.characters(exclude_categories=("Cs",)), max_size=80))
def test_any_text_round_trips(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assume("<|" not in text)  # A special token's name is that token, not its bytes.
    ids = tokenizer(text).input_ids
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_chat_template_is_chatml(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text).input_ids
    assert ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_is_printable_decisive_and_acyclic(kind: str, models: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(models[kind], dtype=torch.float32).eval()
    ids = torch.tensor([list(b"Hello there, tell me a story about it.")])
    cache, out, margins = None, [], []
    with torch.inference_mode():
        for _ in range(GREEDY_STEPS):
            step = model(ids, past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            top = step.logits[0, -1].topk(2)
            margins.append(float(top.values[0] - top.values[1]))
            ids = top.indices[:1, None]
            out.append(int(ids))
    assert set(out) <= set(PRINTABLE)
    assert sum(m < 1e-3 for m in margins) <= 2
    tail = out[-64:]
    assert all(tail[n:] != tail[:-n] for n in range(1, 8)), bytes(tail)


@pytest.mark.parametrize("kind", KINDS)
def test_dropping_context_moves_the_logits(kind: str, models: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(models[kind], dtype=torch.float32).eval()
    ids = torch.tensor([list(calibration_text(300).encode())])
    mask = torch.ones_like(ids)
    mask[:, 50:150] = 0
    positions = torch.arange(300)[None]
    with torch.inference_mode():
        whole = model(ids).logits[0, -1].log_softmax(-1)
        part = model(ids, attention_mask=mask, position_ids=positions).logits[0, -1].log_softmax(-1)
    likely = whole.topk(5).indices
    assert (whole - part)[likely].abs().max() > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_stats_have_the_official_layout(kind: str, models: dict[str, Path], tmp_path: Path) -> None:
    path = make_stats(models[kind], tmp_path / "stats.pt", tokens=256)
    stats = torch.load(path, weights_only=True)
    heads = [[layer, head] for layer in range(4) for head in range(4)]
    assert stats["metadata"] == {
        "model_name": kind,
        "head_dim": 32,
        "rope_style": "half",
        "sampled_heads": heads,
    }
    assert list(stats["stats"]) == [f"layer{layer:02d}_head{head:02d}" for layer, head in heads]
    for entry in stats["stats"].values():
        assert sorted(entry) == ["q_abs_mean", "q_mean_imag", "q_mean_real"]
        assert all(t.dtype == torch.float32 and t.shape == (16,) for t in entry.values())
        mean = torch.hypot(entry["q_mean_real"], entry["q_mean_imag"])
        assert torch.all(mean <= entry["q_abs_mean"] * (1 + 1e-6))
        assert (mean / entry["q_abs_mean"]).mean() > 0.2  # a mean worth calibrating on


def test_stats_are_of_queries_before_rope(models: dict[str, Path], tmp_path: Path) -> None:
    """The first layer's queries need no attention, so they can be worked out by hand."""
    path = make_stats(models["qwen3"], tmp_path / "stats.pt", tokens=64)
    entry = torch.load(path, weights_only=True)["stats"]["layer00_head01"]
    weights = load_file(models["qwen3"] / "model.safetensors")
    ids = list(calibration_text(64).encode())
    hidden = rms_norm(weights["model.embed_tokens.weight"][ids], torch.ones(128), eps=1e-6)
    q = (hidden @ weights["model.layers.0.self_attn.q_proj.weight"].T).view(64, 4, 32)[:, 1]
    q = rms_norm(q, weights["model.layers.0.self_attn.q_norm.weight"], eps=1e-6)
    torch.testing.assert_close(entry["q_mean_real"], q[:, :16].mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(entry["q_mean_imag"], q[:, 16:].mean(0), rtol=1e-4, atol=1e-5)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, eps)


def test_bad_token_count_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tokens must be positive"):
        make_stats(models["qwen3"], tmp_path / "stats.pt", tokens=0)
