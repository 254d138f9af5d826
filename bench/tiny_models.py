"""Deterministic tiny models in the Hugging Face folder layout, for tests and benches.

Each model has 4 layers of width 128, a byte-level tokenizer and random weights from a fixed seed.
It babbles printable ASCII, attends selectively (dropping KV entries moves its logits) and has
queries with a non-zero mean, so calibration statistics of it mean something.
"""

from __future__ import annotations

import argparse
import random
import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bench.tiny_tokenizer import EOS, PRINTABLE, special_id, write_json, write_tokenizer

LAYERS = 4
HIDDEN = 128
HEADS = 4
KV_HEADS = 2
HEAD_DIM = 32
FFN = 128
VOCAB = 264  # 256 bytes and 3 specials, rounded up to a multiple of 8
LANES = 16  # residual channels that hold the same value at every position: the source of Q/K means

Rand = Callable[..., torch.Tensor]  # sizes in, independent standard normals out


@dataclass(frozen=True)
class Kind:
    """One architecture: what differs from the shared config, and where Q/K take their scale."""

    config: dict[str, Any]
    qk_norm: bool = False
    qkv_bias: bool = False
    seed: int = 0


KINDS: dict[str, Kind] = {
    "qwen3": Kind(
        config={
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "max_position_embeddings": 32768,
            "rope_theta": 1000000.0,
        },
        qk_norm=True,
        seed=5,
    ),
    "llama3": Kind(
        config={
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "max_position_embeddings": 32768,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
        seed=2,
    ),
    "yarn": Kind(
        config={
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "max_position_embeddings": 16384,
            "rope_theta": 1000000.0,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 4096,
            },
        },
        qkv_bias=True,
        seed=3,
    ),
}


def make_model(kind: str, path: Path) -> Path:
    """Write config, weights and tokenizer of one tiny model into the folder `path`.

    Args:
        kind: "qwen3" (qk-norm, plain RoPE), "llama3" (llama3 RoPE scaling) or "yarn" (YaRN,
            Qwen2 with biases).
        path: folder to fill; made if missing, files of the same name are overwritten.

    Returns:
        `path`, loadable by SGLang (`--model-path`) and by transformers.

    Raises:
        ValueError: unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown tiny model {kind!r}; known: {', '.join(KINDS)}")
    path.mkdir(parents=True, exist_ok=True)
    write_json(path / "config.json", _config(KINDS[kind]))
    write_json(path / "generation_config.json", {"eos_token_id": special_id(EOS)})
    write_tokenizer(path)
    save_file(_weights(KINDS[kind]), path / "model.safetensors", metadata={"format": "pt"})
    return path


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
    queries = capture_heads(model_dir, _read(model_dir, calibration_text(8 * tokens), tokens))
    stats = {}
    for layer, q in enumerate(queries):
        means, sizes, *_ = head_means(q)
        for head, (mean, size) in enumerate(zip(means, sizes, strict=True)):
            stats[f"layer{layer:02d}_head{head:02d}"] = {
                "q_mean_real": mean.real.clone(),
                "q_mean_imag": mean.imag.clone(),
                "q_abs_mean": size.clone(),
            }
    metadata = {
        "model_name": model_dir.name,
        "head_dim": queries[0].shape[-1],
        "rope_style": "half",
        "sampled_heads": [
            [layer, head] for layer, q in enumerate(queries) for head in range(q.shape[1])
        ],
    }
    torch.save({"metadata": metadata, "stats": stats}, path)
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
    # Imported here because it takes seconds and making a model does not need it.
    from transformers import AutoModelForCausalLM

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


def head_means(heads: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Means over tokens of queries or keys [..., tokens, heads, head_dim], halves paired.

    Returns:
        E x_f (complex), E|x_f|, E|x_f|^2, each [..., heads, head_dim / 2], and E||x|| [..., heads].
    """
    pairs = torch.complex(*heads.chunk(2, dim=-1))
    size = pairs.abs()
    norm = torch.linalg.vector_norm(heads, dim=-1)
    return pairs.mean(-3), size.mean(-3), size.square().mean(-3), norm.mean(-2)


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


def _read(model_dir: Path, text: str, tokens: int) -> torch.Tensor:
    """int64 [1, tokens]: the beginning of `text`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    ids: torch.Tensor = tokenizer(text, return_tensors="pt").input_ids[:, :tokens]
    return ids


def _config(kind: Kind) -> dict[str, Any]:
    return {
        "num_hidden_layers": LAYERS,
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "intermediate_size": FFN,
        "vocab_size": VOCAB,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "eos_token_id": special_id(EOS),
        "bos_token_id": None,
        "pad_token_id": special_id("<|endoftext|>"),
        "torch_dtype": "float32",
        **kind.config,
    }


def _weights(kind: Kind) -> dict[str, torch.Tensor]:
    """All tensors of the model, float32, named as transformers names them."""
    gen = torch.Generator().manual_seed(kind.seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=gen)

    embed = rand(VOCAB, HIDDEN)
    embed[:, :LANES] = rand(LANES).sign()
    head = torch.zeros(VOCAB, HIDDEN)
    content = HIDDEN - LANES
    # Only printable rows are non-zero: greedy text is ASCII and re-tokenises to the same ids.
    head[list(PRINTABLE), LANES:] = rand(len(PRINTABLE), content) * (6.0 / content**0.5)
    weights = {
        "model.embed_tokens.weight": embed,
        "model.norm.weight": torch.ones(HIDDEN),
        "lm_head.weight": head,
    }
    for layer in range(LAYERS):
        for name, tensor in _layer_weights(kind, rand).items():
            weights[f"model.layers.{layer}.{name}"] = tensor
    return weights


def _layer_weights(kind: Kind, rand: Rand) -> dict[str, torch.Tensor]:
    q_size, kv_size = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    # q and k of about 1.7 a channel give attention logits a deviation near 3: a selective softmax.
    scale = 1.0 if kind.qk_norm else 1.7
    weights = {
        "input_layernorm.weight": torch.ones(HIDDEN),
        "post_attention_layernorm.weight": torch.ones(HIDDEN),
        "self_attn.q_proj.weight": _reading(rand, q_size, scale, mean=1.0),
        "self_attn.k_proj.weight": _reading(rand, kv_size, scale, mean=0.6),
        "self_attn.v_proj.weight": _reading(rand, kv_size, 1.5, mean=0.0),
        "self_attn.o_proj.weight": _writing(rand, q_size, 1.5),
        "mlp.gate_proj.weight": _reading(rand, FFN, 1.0, mean=0.5),
        "mlp.up_proj.weight": _reading(rand, FFN, 1.0, mean=0.5),
        "mlp.down_proj.weight": _writing(rand, FFN, 1.0),
    }
    if kind.qk_norm:
        weights["self_attn.q_norm.weight"] = 1.7 + 0.2 * rand(HEAD_DIM)
        weights["self_attn.k_norm.weight"] = 1.7 + 0.2 * rand(HEAD_DIM)
    if kind.qkv_bias:
        weights["self_attn.q_proj.bias"] = rand(q_size)
        weights["self_attn.k_proj.bias"] = 0.5 * rand(kv_size)
        weights["self_attn.v_proj.bias"] = 0.1 * rand(kv_size)
    return weights


def _reading(rand: Rand, rows: int, scale: float, mean: float) -> torch.Tensor:
    """A [rows, HIDDEN] projection: outputs deviate by `scale` around means of `scale * mean`."""
    weight: torch.Tensor = rand(rows, HIDDEN) * (scale / (HIDDEN - LANES) ** 0.5)
    weight[:, :LANES] = rand(rows, LANES) * (scale * mean / LANES**0.5)
    return weight


def _writing(rand: Rand, columns: int, scale: float) -> torch.Tensor:
    """A [HIDDEN, columns] projection into the residual stream that leaves the lanes alone."""
    weight: torch.Tensor = rand(HIDDEN, columns) * (scale / columns**0.5)
    weight[:LANES] = 0.0
    return weight


def main() -> None:
    """Make every tiny model, each with its stats.pt, under the folder named on the command line."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("out_dir", type=Path)
    out_dir: Path = parser.parse_args().out_dir
    for kind in KINDS:
        model_dir = make_model(kind, out_dir / kind)
        make_stats(model_dir, model_dir / "stats.pt")
        print(model_dir)


if __name__ == "__main__":
    main()
