"""Query statistics: what TriAttention knows about a model's queries before RoPE."""

from __future__ import annotations

import json
import pickle
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sglang_tri.errors import KvPolicyError

FORMAT = "sglang-tri-stats-1"
_HEAD = re.compile(r"layer(\d+)_head(\d+)$")
_FIELDS = ("q_mean_real", "q_mean_imag", "q_abs_mean")


@dataclass(frozen=True)
class Statistics:
    """Means over calibration queries before RoPE, per layer, query head and frequency pair.

    Attributes:
        q_mean: complex64 [layers, query_heads, head_dim / 2], E[q_f].
        q_abs: float32 [layers, query_heads, head_dim / 2], E|q_f|.
        metadata: plain values from the file, e.g. `model_name`, `rope_style`.
        path: where it was read from, for messages.
    """

    q_mean: torch.Tensor
    q_abs: torch.Tensor
    metadata: dict[str, Any] = field(default_factory=dict)
    path: str = ""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(layers, query heads, head_dim)."""
        layers, heads, pairs = self.q_mean.shape
        return layers, heads, 2 * pairs

    @property
    def model_name(self) -> str | None:
        return self.metadata.get("model_name")

    def check_geometry(self, layers: int, query_heads: int, head_dim: int) -> None:
        """Raise `KvPolicyError` where the statistics cannot belong to the served model."""
        for what, found, wanted in zip(
            ("layers", "query heads per layer", "head size"),
            self.shape,
            (layers, query_heads, head_dim),
            strict=True,
        ):
            if found != wanted:
                raise KvPolicyError(
                    f"--kv-stats {self.path} has {found} {what}, the model has {wanted}: "
                    "use statistics made for this model."
                )

    def check_pairing(self, interleaved: bool) -> None:
        """Raise `KvPolicyError` where the file says that it pairs RoPE components otherwise."""
        style = self.metadata.get("rope_style")
        expected = "interleaved" if interleaved else "half"
        if style is not None and style != expected:
            raise KvPolicyError(
                f"--kv-stats {self.path} pairs RoPE components in {style!r} style, the model in "
                f"{expected!r} style: use statistics made for this model."
            )


def load(path: str | Path) -> Statistics:
    """Read an official `.pt` file or our own `.safetensors` file, by its suffix.

    Raises:
        KvPolicyError: the file is missing, truncated, or holds anything but the tensors and plain
            metadata that it should.
    """
    path = Path(path)
    if not path.is_file():
        raise KvPolicyError(f"--kv-stats {path} does not exist: give a .pt or .safetensors file.")
    if path.suffix == ".pt":
        return _load_official(path)
    if path.suffix == ".safetensors":
        return _load_own(path)
    raise KvPolicyError(f"--kv-stats {path} must end in .pt or .safetensors.")


def save(statistics: Statistics, path: str | Path) -> None:
    """Write the `.safetensors` layout: one tensor per field, metadata as JSON strings."""
    tensors = {
        "q_mean_real": statistics.q_mean.real.contiguous(),
        "q_mean_imag": statistics.q_mean.imag.contiguous(),
        "q_abs_mean": statistics.q_abs.contiguous(),
    }
    metadata = {"format": FORMAT, "metadata": json.dumps(statistics.metadata)}
    save_file(tensors, str(path), metadata=metadata)


def _load_official(path: Path) -> Statistics:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise KvPolicyError(
            f"--kv-stats {path} holds more than tensors and plain metadata, or is damaged: "
            "use a file in the official TriAttention layout."
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise _unreadable(path, error) from error
    if not isinstance(content, dict) or not isinstance(content.get("stats"), dict):
        raise KvPolicyError(f"--kv-stats {path} has no 'stats' table: it is not a statistics file.")
    heads = content["stats"]
    layers, per_layer = _grid(heads, path)
    if len({len(_vector(heads, head, name, path)) for head in heads for name in _FIELDS}) != 1:
        raise KvPolicyError(f"--kv-stats {path} has vectors of different lengths.")
    names = [[f"layer{i:02d}_head{j:02d}" for j in range(per_layer)] for i in range(layers)]
    real, imag, modulus = (
        torch.stack([torch.stack([_vector(heads, n, name, path) for n in row]) for row in names])
        for name in _FIELDS
    )
    return _checked(real, imag, modulus, content.get("metadata") or {}, path)


def _unreadable(path: Path, error: Exception) -> KvPolicyError:
    return KvPolicyError(f"--kv-stats {path} cannot be read ({error}): is it complete?")


def _grid(heads: dict[str, Any], path: Path) -> tuple[int, int]:
    """(layers, heads per layer) of a complete table of heads."""
    found = {(int(m[1]), int(m[2])) for name in heads if (m := _HEAD.match(str(name)))}
    layers = 1 + max((layer for layer, _ in found), default=-1)
    per_layer = 1 + max((head for _, head in found), default=-1)
    if not found or len(found) != len(heads) or len(found) != layers * per_layer:
        raise KvPolicyError(
            f"--kv-stats {path} has {len(heads)} entries for {layers} layers of {per_layer} heads: "
            "every query head of every layer must be there once."
        )
    return layers, per_layer


def _vector(heads: dict[str, Any], head: str, name: str, path: Path) -> torch.Tensor:
    entry = heads.get(head)
    value = entry.get(name) if isinstance(entry, dict) else None
    if not isinstance(value, torch.Tensor) or value.ndim != 1:
        raise KvPolicyError(f"--kv-stats {path} has no vector {name!r} for {head}.")
    return value.float()


def _load_own(path: Path) -> Statistics:
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            missing = set(_FIELDS) - set(file.keys())
            if header.get("format") != FORMAT or missing:
                raise KvPolicyError(f"--kv-stats {path} is not a statistics file of sglang-tri.")
            real, imag, modulus = (file.get_tensor(name).float() for name in _FIELDS)
        metadata = json.loads(header.get("metadata", "{}"))
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise _unreadable(path, error) from error
    return _checked(real, imag, modulus, metadata, path)


def _checked(
    real: torch.Tensor,
    imag: torch.Tensor,
    modulus: torch.Tensor,
    metadata: Any,
    path: Path,
) -> Statistics:
    if not isinstance(metadata, dict) or not isinstance(metadata.get("model_name", ""), str):
        raise KvPolicyError(f"--kv-stats {path} has metadata that are not a table of names.")
    if real.ndim != 3 or not real.shape == imag.shape == modulus.shape:
        raise KvPolicyError(f"--kv-stats {path} has fields of different shapes.")
    if not all(bool(torch.isfinite(field).all()) for field in (real, imag, modulus)):
        raise KvPolicyError(f"--kv-stats {path} holds values that are not finite.")
    return Statistics(torch.complex(real, imag), modulus, metadata, str(path))
