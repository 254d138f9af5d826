"""Are the statistics right? Predicted against actual mean logits by distance, per query head.

The paper's check of its trigonometric series (arXiv 2604.04921): if queries and keys concentrate
around their centres, the mean attention logit at distance d is close to the series made of the
centres alone. The model runs in transformers, which knows nothing of this project.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from sglang_tri.errors import KvPolicyError
from sglang_tri.kernels.pairs import frequency_pairs
from sglang_tri.statistics import calibration_text as text
from sglang_tri.statistics import describe, model_rope
from sglang_tri.statistics.rope import Rope
from sglang_tri.statistics.statistics import Statistics

_BACKEND = "sglang_tri_capture"
_FEWEST = 256


@dataclass(frozen=True)
class Validation:
    """Mean logits before the softmax scale, over distances 1..n.

    Attributes:
        predicted, actual: float32 [layers, query_heads, n].
        r: float32 [layers, query_heads], Pearson's correlation of the two.
    """

    predicted: torch.Tensor
    actual: torch.Tensor
    r: torch.Tensor


def validate(
    statistics: Statistics, model_path: str, tokens: int, text_path: str | None
) -> Validation:
    """Let the model read `tokens` tokens and compare up to half that distance.

    Mean keys are those of this run; mean queries those of `statistics`.

    Raises:
        KvPolicyError: the statistics are not this model's, or the text cannot be used.
    """
    from transformers import AutoTokenizer

    if tokens < _FEWEST:
        raise KvPolicyError(f"--validate {tokens} is too small: use {_FEWEST} or more.")
    rope = model_rope.of_model(model_path, statistics.interleaved)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    source = text.Source(text_path, "--text", "--validate")
    sequences = text.tokenize(source, tokenizer, tokens, tokens)
    return on_tokens(statistics, model_path, rope, sequences.ids)[0]


def on_tokens(
    statistics: Statistics, model_path: str, rope: Rope, sequences: Sequence[Sequence[int]]
) -> list[Validation]:
    """The same for sequences of token ids, which do not see each other.

    Raises:
        KvPolicyError: the statistics are not this model's.
    """
    captured = _captured(model_path, sequences)
    return [_compared(statistics, model_path, rope, *own) for own in captured]


def _compared(
    statistics: Statistics,
    model_path: str,
    rope: Rope,
    queries: list[torch.Tensor],
    keys: list[torch.Tensor],
) -> Validation:
    if statistics.shape != (len(queries), *queries[0].shape[0::2]):
        raise KvPolicyError(
            f"{statistics.path} has (layers, query heads, head size) {statistics.shape}, "
            f"--model-path {model_path} has {(len(queries), *queries[0].shape[0::2])}."
        )
    statistics.check_rope(rope)
    distances = torch.arange(1, queries[0].shape[1] // 2 + 1)
    centres = torch.stack([_centre(k, rope) for k in keys])
    products = describe.centre_products(replace(statistics, k_mean=centres))
    predicted = describe.distance_curve(products, rope, distances)
    actual = torch.stack(
        [_mean_logits(q, k)[:, distances] for q, k in zip(queries, keys, strict=True)]
    )
    return Validation(predicted, actual, _pearson(predicted, actual))


@torch.inference_mode()
def _captured(
    model_path: str, sequences: Sequence[Sequence[int]]
) -> list[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """Of each sequence: queries and keys after RoPE by layer, [heads, tokens, head_dim]."""
    from transformers import AttentionInterface, AutoModelForCausalLM
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    captured: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []

    def attention(
        module: Any, query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        for own, heads in zip(captured[-1], (query, key), strict=True):
            own.append(heads[0].float())
        return sdpa_attention_forward(module, query, key, *args, **kwargs)

    AttentionInterface.register(_BACKEND, attention)
    model = AutoModelForCausalLM.from_pretrained(
        model_path, attn_implementation=_BACKEND, dtype="auto"
    )
    for ids in sequences:
        captured.append(([], []))
        model(torch.tensor([list(ids)]), use_cache=False)
    return captured


def _centre(keys: torch.Tensor, rope: Rope) -> torch.Tensor:
    """complex64 [heads, head_dim / 2]: mean keys before RoPE."""
    first, second = frequency_pairs(rope.head_dim, rope.rotary_dim, rope.interleaved)
    phase = torch.arange(keys.shape[1])[:, None] * rope.padded_frequencies()
    undo = torch.polar(1 / rope.padded_factors().expand_as(phase), -phase)
    pairs = torch.complex(keys[..., first].double(), keys[..., second].double())
    return (pairs * undo).mean(1).to(torch.complex64)


def _mean_logits(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """float32 [query_heads, tokens]: mean of q_i k_(i - d) over all i, for each distance d."""
    heads, tokens, _ = queries.shape
    keys = keys.repeat_interleave(heads // keys.shape[0], dim=0)
    # Sums over i for all d at once: a correlation along the tokens, padded so that nothing wraps.
    spectrum = torch.fft.rfft(queries, 2 * tokens, dim=1)
    spectrum = spectrum * torch.fft.rfft(keys, 2 * tokens, dim=1).conj()
    sums = torch.fft.irfft(spectrum.sum(-1), 2 * tokens, dim=1)[:, :tokens]
    return sums / torch.arange(tokens, 0, -1)


def _pearson(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    first = first - first.mean(-1, keepdim=True)
    second = second - second.mean(-1, keepdim=True)
    return torch.nn.functional.cosine_similarity(first, second, dim=-1)
