"""Read and write statistics files.

Ours are safetensors: the tensors named in `layout`, and one JSON table in the header. It holds
the format's name, the statistics' metadata and a digest of both. One header entry only:
safetensors writes several in random order, and equal statistics shall be equal files.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from sglang_tri.errors import KvPolicyError
from sglang_tri.statistics import layout, official
from sglang_tri.statistics.statistics import Statistics

FORMAT = "sglang-tri-stats-1"
OFFICIAL, OURS = ".pt", ".safetensors"
_HEADER = "sglang_tri"


def load(path: str | Path) -> Statistics:
    """Read an official `.pt` file or our own `.safetensors` file, by its suffix.

    Raises:
        KvPolicyError: the file is missing, truncated, changed, or holds anything but the tensors
            and plain metadata that it should.
    """
    path = Path(path)
    if not path.is_file():
        raise KvPolicyError(f"{path} does not exist: give a {OFFICIAL} or {OURS} file.")
    check_name(path)
    content = official.read(path) if path.suffix == OFFICIAL else _read(path)
    return layout.unpack(content, path)


def check_name(path: Path) -> None:
    """Raise `KvPolicyError` unless the suffix tells the layout."""
    if path.suffix not in (OFFICIAL, OURS):
        raise KvPolicyError(f"{path} must end in {OFFICIAL} or {OURS}.")


def save_as(statistics: Statistics, path: str | Path) -> None:
    """Write `statistics` by the path's suffix, whole or not at all, in any number of processes.

    Raises:
        KvPolicyError: another suffix.
        OSError: the folder cannot be written to.
    """
    path = Path(path)
    check_name(path)
    tensors, metadata = layout.pack(statistics)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        if path.suffix == OFFICIAL:
            official.write(tensors, metadata, temporary)
        else:
            temporary.write_bytes(_serialized(tensors, metadata))
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _serialized(tensors: dict[str, torch.Tensor], metadata: dict[str, object]) -> bytes:
    header = {"format": FORMAT, "metadata": metadata, "sha256": _digest(tensors, metadata)}
    return save(tensors, {_HEADER: json.dumps(header, sort_keys=True)})


def _read(path: Path) -> layout.Content:
    try:
        with safe_open(str(path), framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(_HEADER, "{}"))
            if not isinstance(header, dict) or header.get("format") != FORMAT:
                raise KvPolicyError(f"{path} is not a statistics file of sglang-tri.")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise layout.unreadable(path, error) from error
    metadata = header.get("metadata", {})
    if header.get("sha256") != _digest(tensors, metadata):
        raise KvPolicyError(f"{path} is damaged: its content does not have the digest it states.")
    return tensors, metadata


def _digest(tensors: dict[str, torch.Tensor], metadata: dict[str, object]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
