"""Calibration statistics of the tiny models, by transformers and apart from the product's own."""

from __future__ import annotations

import random
import string
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.accuracy.reference_model.heads import head_means


def make_stats(model_dir: Path, path: Path, tokens: int = 2048) -> Path:
    """Write calibration statistics of a model in the official `.pt` layout.

    Args:
        model_dir: folder of a model with `self_attn.q_proj` (and maybe `self_attn.q_norm`) modules.
        path: file to write.
        tokens: how many tokens of `calibration_text` to run through the model.

    Returns:
        `path`. Per query head: means over positions of the real part, the imaginary part and the
        modulus (float32, [head_dim / 2] each) of queries before RoPE, where frequency f is
        `q[f] + i q[f + head_dim / 2]`.

    Raises:
        ValueError: fewer than one token.
    """
    if tokens < 1:
        raise ValueError(f"tokens must be positive, got {tokens}")
    text = calibration_text(8 * tokens)
    ids = AutoTokenizer.from_pretrained(model_dir)(text, return_tensors="pt").input_ids[:, :tokens]
    stats: dict[str, dict[str, torch.Tensor]] = {}
    sampled: list[list[int]] = []
    for layer, queries in enumerate(capture_heads(model_dir, ids)):
        means, sizes, *_ = head_means(queries)
        for head, (mean, size) in enumerate(zip(means, sizes, strict=True)):
            sampled.append([layer, head])
            stats[f"layer{layer:02d}_head{head:02d}"] = {
                "q_mean_real": mean.real.clone(),
                "q_mean_imag": mean.imag.clone(),
                "q_abs_mean": size.clone(),
            }
    metadata = {"model_name": model_dir.name, "head_dim": queries.shape[-1], "rope_style": "half"}
    torch.save({"metadata": {**metadata, "sampled_heads": sampled}, "stats": stats}, path)
    return path


@torch.inference_mode()
def capture_heads(model_dir: Path, ids: torch.Tensor, which: str = "q") -> list[torch.Tensor]:
    """Queries or keys after the norms and before RoPE, from transformers.

    Args:
        ids: int64 [sequences, tokens].
        which: "q" or "k".

    Returns:
        A float32 [sequences * tokens, heads, head_dim] tensor for each layer.
    """
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    captured: list[torch.Tensor] = []
    for layer in model.model.layers:
        attn = layer.self_attn
        modules = dict(attn.named_children())
        source = modules[f"{which}_norm" if f"{which}_norm" in modules else f"{which}_proj"]
        source.register_forward_hook(
            lambda _m, _in, out, dim=attn.head_dim: captured.append(
                out.reshape(out.shape[0] * out.shape[1], -1, dim)
            )
        )
    model(ids)
    return captured


def calibration_text(length: int, seed: int = 0) -> str:
    """`length` characters of deterministic printable ASCII words, in lines."""
    rng = random.Random(seed)
    words: list[str] = []
    size = 0
    while size < length:
        word = "".join(rng.choices(string.ascii_letters + string.digits, k=rng.randint(1, 9)))
        words.append(word + rng.choice(("", ",", ".", ":")) + rng.choice("   \n"))
        size += len(words[-1])
    return "".join(words)[:length]
