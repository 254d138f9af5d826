"""Deterministic LoRA adapters of a tiny model, in PEFT's layout, and models with them merged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"
# Size of an adapter's change beside the weight that it changes.
STRENGTH = 0.5
ADAPTERS = {
    "a": {"r": 4, "lora_alpha": 8},
    "b": {"r": 8, "lora_alpha": 4},
}
"""Rank and scale of each, by the names of PEFT."""
_SEEDS = {"a": 11, "b": 12}


def make_adapter(name: str, model_dir: Path, path: Path) -> Path:
    """Write an adapter of all linear layers of a model into the folder `path`; returns it.

    Args:
        name: of `ADAPTERS`.
        model_dir: a tiny model; its layers' weights say which shapes the adapter has.
        path: folder to fill, made if missing; for SGLang (`--lora-paths`) and for PEFT.
    """
    rank, alpha = ADAPTERS[name].values()
    gen = torch.Generator().manual_seed(_SEEDS[name])
    tensors: dict[str, torch.Tensor] = {}
    modules: set[str] = set()
    for key, weight in sorted(load_file(model_dir / "model.safetensors").items()):
        if not key.endswith("_proj.weight"):
            continue
        module = key.removesuffix(".weight")
        modules.add(module.rpartition(".")[2])
        down = torch.randn(rank, weight.shape[1], generator=gen)
        up = torch.randn(weight.shape[0], rank, generator=gen)
        up[weight.abs().sum(1) == 0] = 0.0  # What a layer leaves alone, the adapter does, too.
        change = alpha / rank * up @ down
        up *= STRENGTH * weight.norm() / change.norm()
        tensors[f"{PREFIX}{module}.lora_A.weight"] = down
        tensors[f"{PREFIX}{module}.lora_B.weight"] = up
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "lora_dropout": 0.0, "bias": "none"}
    config |= {"base_model_name_or_path": str(model_dir), "target_modules": sorted(modules)}
    (path / "adapter_config.json").write_text(json.dumps({**config, **ADAPTERS[name]}))
    return path


def merge(model_dir: Path, adapter_dir: Path, path: Path) -> Path:
    """Copy a model into the folder `path`, with an adapter added to its weights.

    Each weight W [out, in] becomes W + alpha / r B A, with A [r, in] and B [out, r], in its dtype.
    """
    shutil.copytree(model_dir, path)
    config = json.loads((adapter_dir / "adapter_config.json").read_text())
    weights = load_file(model_dir / "model.safetensors")
    adapter = load_file(adapter_dir / WEIGHTS)
    for key, down in adapter.items():
        if key.endswith(".lora_A.weight"):
            up = adapter[key.replace(".lora_A.", ".lora_B.")]
            name = key.removeprefix(PREFIX).replace(".lora_A.", ".")
            weights[name] += config["lora_alpha"] / config["r"] * up @ down
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path
