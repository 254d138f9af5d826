"""Deterministic LoRA adapters of a tiny model, in PEFT's layout, and models with them merged."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from bench.tiny_tokenizer import write_json

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"
# Size of an adapter's change beside the weight that it changes.
STRENGTH = 0.5


@dataclass(frozen=True)
class Adapter:
    """Rank and scale of one adapter; the seed tells adapters apart."""

    rank: int
    alpha: int
    seed: int


ADAPTERS = {"a": Adapter(rank=4, alpha=8, seed=11), "b": Adapter(rank=8, alpha=4, seed=12)}


def make_adapter(name: str, model_dir: Path, path: Path) -> Path:
    """Write an adapter of all linear layers of a model into the folder `path`.

    Args:
        name: of `ADAPTERS`.
        model_dir: a tiny model; its layers' weights say which shapes the adapter has.
        path: folder to fill, made if missing.

    Returns:
        `path`, loadable by SGLang (`--lora-paths`) and by PEFT.
    """
    adapter = ADAPTERS[name]
    gen = torch.Generator().manual_seed(adapter.seed)
    tensors: dict[str, torch.Tensor] = {}
    modules: set[str] = set()
    for key, weight in sorted(load_file(model_dir / "model.safetensors").items()):
        if not key.endswith("_proj.weight"):
            continue
        module = key.removesuffix(".weight")
        modules.add(module.rpartition(".")[2])
        down = torch.randn(adapter.rank, weight.shape[1], generator=gen)
        up = torch.randn(weight.shape[0], adapter.rank, generator=gen)
        up[weight.abs().sum(1) == 0] = 0.0  # What a layer leaves alone, the adapter does, too.
        change = _scale(adapter.rank, adapter.alpha) * up @ down
        up *= STRENGTH * weight.norm() / change.norm()
        tensors[f"{PREFIX}{module}.lora_A.weight"] = down
        tensors[f"{PREFIX}{module}.lora_B.weight"] = up
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model_dir),
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(modules),
    }
    write_json(path / "adapter_config.json", config)
    return path


def merge(model_dir: Path, adapter_dir: Path, path: Path) -> Path:
    """Copy a model into the folder `path`, with an adapter added to its weights.

    Each weight W [out, in] becomes W + alpha / r B A, with A [r, in] and B [out, r], in its dtype.
    """
    shutil.copytree(model_dir, path)
    config = json.loads((adapter_dir / "adapter_config.json").read_text())
    scale = _scale(config["r"], config["lora_alpha"])
    weights = load_file(model_dir / "model.safetensors")
    adapter = load_file(adapter_dir / WEIGHTS)
    for key, down in adapter.items():
        if not key.endswith(".lora_A.weight"):
            continue
        up = adapter[key.replace(".lora_A.", ".lora_B.")]
        name = key.removeprefix(PREFIX).replace(".lora_A.", ".")
        weights[name] += scale * up @ down
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def _scale(rank: int, alpha: int) -> float:
    return alpha / rank
