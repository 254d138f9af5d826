"""Statistics made once are found again, by model, weights and text, and only good ones."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_tri import statistics as stats
from sglang_tri.errors import KvPolicyError
from sglang_tri.statistics import Statistics, cache, identity
from tests.kernels.test_published import made_statistics

MINE = "ab" * 32


def made() -> Statistics:
    metadata = {"fingerprint": MINE, "rope_style": "half"}
    return replace(made_statistics(2, 2, 16), metadata=metadata, path="")


def test_where_they_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(cache.FOLDER, raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    expected = "/home/someone/.cache/sglang-tri/Qwen3ForCausalLM-abababababababab.safetensors"
    assert str(cache.path_of("Qwen3ForCausalLM", MINE)) == expected
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache.folder() == Path("/xdg/sglang-tri")
    monkeypatch.setenv(cache.FOLDER, str(tmp_path))
    assert cache.folder() == tmp_path


def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv(cache.FOLDER, raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", absent)
    with pytest.raises(KvPolicyError, match=f"set {cache.FOLDER} to a folder"):
        cache.folder()


def test_kept_and_found(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.safetensors"
    assert cache.find(path, MINE) is None
    assert cache.keep(made(), path).path == str(path)
    found = cache.find(path, MINE)
    assert found is not None
    assert torch.equal(found.q_mean, made().q_mean)


def test_damaged_and_other_files_are_made_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.safetensors"
    cache.keep(made(), path)
    assert cache.find(path, "cd" * 32) is None
    assert "another model or text" in caplog.text
    caplog.clear()
    whole = path.read_bytes()
    renamed = whole.replace(b"half", b"hall")
    assert renamed != whole
    for damaged in (whole[:-9], whole[:-9] + b"\0" * 9, renamed, b""):
        path.write_bytes(damaged)
        with caplog.at_level(logging.WARNING):
            assert cache.find(path, MINE) is None
        assert str(path) in caplog.text
        assert "made anew" in caplog.text
        caplog.clear()
    cache.keep(made(), path)
    assert stats.load(path).metadata["fingerprint"] == MINE


def test_a_folder_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    kept = cache.keep(made(), tmp_path / "file" / "a.safetensors")
    assert kept.path == ""
    assert "the next start calibrates again" in caplog.text
    assert cache.FOLDER in caplog.text


def test_a_folder_that_cannot_be_searched(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", denied)
    assert cache.find(tmp_path / "a.safetensors", MINE) is None
    assert "Permission denied" in caplog.text


class Parts(torch.Tensor):
    """A tensor that is made of others and cannot be indexed, as quantisation libraries have."""

    values: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls, values: torch.Tensor, scale: torch.Tensor) -> Parts:
        made = torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.bfloat16)
        made.values, made.scale = values, scale
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["values", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].values, args[0].scale)
        raise AssertionError(func)


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(70, 50, generator=generator),
        "b": torch.randn(8, 6, generator=generator).to(torch.float8_e4m3fn),
        "c": torch.randn(40, 3, generator=generator).bfloat16().T,
        "scale": torch.tensor(2.0),
        "none": torch.empty(0, 3),
    }


def test_weights_are_told_apart() -> None:
    first = weights()
    same = identity.weights(first.items())
    assert identity.weights(reversed(weights().items())) == same
    assert identity.weights((n, t.clone()) for n, t in first.items()) == same

    def changed(name: str, tensor: torch.Tensor) -> str:
        return identity.weights({**weights(), name: tensor}.items())

    tuned = weights()["a"] * 1.001
    others = [
        changed("a", tuned),
        changed("b", weights()["b"].view(torch.uint8).roll(1, 0).view(torch.float8_e4m3fn)),
        changed("c", -weights()["c"]),
        changed("scale", torch.tensor(3.0)),
        changed("a", weights()["a"].double()),
        changed("a", weights()["a"].view(50, 70)),
        changed("d", torch.ones(1)),
        changed("quantised", Parts(torch.ones(4, dtype=torch.int8), torch.ones(2))),
        changed("quantised", Parts(torch.ones(4, dtype=torch.int8), torch.zeros(2))),
    ]
    assert len({same, *others}) == 1 + len(others)
