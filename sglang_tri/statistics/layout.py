"""Between `Statistics` and the named tensors and plain metadata that files hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from sglang_tri.errors import KvPolicyError
from sglang_tri.statistics.rope import Rope
from sglang_tri.statistics.statistics import Statistics

Content = tuple[dict[str, torch.Tensor], dict[str, Any]]

REQUIRED = ("q_mean_real", "q_mean_imag", "q_abs_mean")
_SQUARE, _NORM = "q_square_mean", "q_norm_mean"
_KEYS = ("k_mean_real", "k_mean_imag")
_FREQUENCIES, _FACTOR, _STYLE = "rope_frequencies", "rope_factor", "rope_style"


def pack(statistics: Statistics) -> Content:
    """Named tensors and metadata of `statistics`."""
    tensors = {
        "q_mean_real": statistics.q_mean.real.contiguous(),
        "q_mean_imag": statistics.q_mean.imag.contiguous(),
        "q_abs_mean": statistics.q_abs.contiguous(),
    }
    metadata = dict(statistics.metadata)
    if statistics.q_square is not None:
        tensors[_SQUARE] = statistics.q_square.contiguous()
    if statistics.q_norm is not None:
        tensors[_NORM] = statistics.q_norm.contiguous()
    if statistics.k_mean is not None:
        parts = (statistics.k_mean.real.contiguous(), statistics.k_mean.imag.contiguous())
        tensors.update(zip(_KEYS, parts, strict=True))
    if statistics.rope is not None:
        tensors[_FREQUENCIES] = statistics.rope.frequencies.double().contiguous()
        metadata |= {_FACTOR: statistics.rope.factor, _STYLE: statistics.rope.style}
    return tensors, metadata


def unpack(content: Content, path: Path) -> Statistics:
    """Statistics from what a file held.

    Raises:
        KvPolicyError: shapes do not fit together, values are not finite, metadata are odd.
    """
    tensors, metadata = content
    _check_metadata(metadata, path)
    _check_tensors(tensors, path)
    real, imag, modulus = (tensors[name].float() for name in REQUIRED)
    keys = [tensors[name].float() for name in _KEYS if name in tensors]
    return Statistics(
        q_mean=torch.complex(real, imag),
        q_abs=modulus,
        q_square=_float(tensors.get(_SQUARE)),
        q_norm=_float(tensors.get(_NORM)),
        k_mean=torch.complex(*keys) if keys else None,
        rope=_rope(tensors.get(_FREQUENCIES), metadata, 2 * real.shape[-1]),
        metadata=metadata,
        path=str(path),
    )


def unreadable(path: Path, error: Exception) -> KvPolicyError:
    return KvPolicyError(f"{path} cannot be read ({error}): is it complete?")


def _float(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.float()


def _rope(frequencies: torch.Tensor | None, metadata: dict[str, Any], head_dim: int) -> Rope | None:
    if frequencies is None:
        return None
    interleaved = metadata.get(_STYLE) == "interleaved"
    return Rope(frequencies.double(), float(metadata.get(_FACTOR, 1.0)), head_dim, interleaved)


def _check_metadata(metadata: Any, path: Path) -> None:
    if not isinstance(metadata, dict) or not isinstance(metadata.get("model_name", ""), str):
        raise KvPolicyError(f"{path} has metadata that are not a table of names.")
    if not isinstance(metadata.get(_FACTOR, 1.0), (int, float)):
        raise KvPolicyError(f"{path} has a {_FACTOR} of {metadata[_FACTOR]!r}, not a number.")
    try:
        json.dumps(metadata)
    except (TypeError, ValueError) as error:
        raise KvPolicyError(f"{path} has metadata that are not plain values ({error}).") from error


def _check_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    missing = set(REQUIRED) - set(tensors)
    if missing or (_KEYS[0] in tensors) != (_KEYS[1] in tensors):
        raise KvPolicyError(f"{path} lacks {', '.join(sorted(missing)) or 'half of k_mean'}.")
    full = tuple(tensors[REQUIRED[0]].shape)
    if len(full) != 3:
        raise KvPolicyError(f"{path} has fields of different shapes: {REQUIRED[0]} is {full}.")
    layers, heads, pairs = full
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        fits = {
            _NORM: shape == full[:2],
            _FREQUENCIES: len(shape) == 1 and 0 < shape[0] <= pairs,
            _KEYS[0]: shape[0::2] == (layers, pairs) and shape[1] and heads % shape[1] == 0,
            _KEYS[1]: shape == tuple(tensors.get(_KEYS[0], tensor).shape),
        }.get(name, shape == full)
        if not fits:
            raise KvPolicyError(f"{path} has fields of different shapes: {name} is {shape}.")
        if not bool(torch.isfinite(tensor).all()):
            raise KvPolicyError(f"{path} holds values that are not finite, in {name}.")
