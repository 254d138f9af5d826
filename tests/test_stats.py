"""Statistics files: both layouts read back, everything else is refused by name."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sglang_tri import stats
from sglang_tri.errors import KvPolicyError
from tests.test_scores import OFFICIAL, made_statistics

LAYERS, HEADS, HEAD_DIM = 3, 4, 32
GEOMETRY = {
    "qwen3_8b": (36, 32, 128),
    "deepseek_r1_distill_llama_8b": (32, 32, 128),
    "deepseek_r1_distill_qwen_7b": (28, 28, 128),
    "gpt_oss_120b": (36, 64, 64),
}


def official(statistics: stats.Statistics) -> dict[str, Any]:
    table = {}
    for layer in range(LAYERS):
        for head in range(HEADS):
            mean = statistics.q_mean[layer, head]
            table[f"layer{layer:02d}_head{head:02d}"] = {
                "q_mean_real": mean.real.clone(),
                "q_mean_imag": mean.imag.clone(),
                "q_abs_mean": statistics.q_abs[layer, head].clone(),
            }
    return {"metadata": {"rope_style": "half", "model_name": "made"}, "stats": table}


@pytest.fixture
def content() -> dict[str, Any]:
    return official(made_statistics(LAYERS, HEADS, HEAD_DIM))


def written(content: object, tmp_path: Path) -> Path:
    path = tmp_path / "stats.pt"
    torch.save(content, path)
    return path


def test_both_layouts_hold_the_same(content: dict[str, Any], tmp_path: Path) -> None:
    first = stats.load(written(content, tmp_path))
    stats.save(first, tmp_path / "ours.safetensors")
    second = stats.load(tmp_path / "ours.safetensors")
    assert first.shape == (LAYERS, HEADS, HEAD_DIM)
    assert torch.equal(first.q_mean, second.q_mean)
    assert torch.equal(first.q_abs, second.q_abs)
    assert first.metadata == second.metadata
    assert first.model_name == "made"


@pytest.mark.parametrize("name", [n for n in GEOMETRY if (OFFICIAL / f"{n}.pt").exists()])
def test_official_files(name: str) -> None:
    found = stats.load(OFFICIAL / f"{name}.pt")
    found.check_geometry(*GEOMETRY[name])
    found.check_pairing(interleaved=False)


class Malice:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["MALICE"],)


def test_code_in_a_file_is_not_run(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MALICE", str(tmp_path / "done"))
    content["metadata"]["extra"] = Malice()
    path = written(content, tmp_path)
    with pytest.raises(KvPolicyError, match="more than tensors"):
        stats.load(path)
    assert not (tmp_path / "done").exists()
    with path.open("rb") as file, pytest.raises(pickle.UnpicklingError):
        torch.load(file, weights_only=True)


def test_missing_truncated_or_other_files(content: dict[str, Any], tmp_path: Path) -> None:
    path = written(content, tmp_path)
    truncated = tmp_path / "truncated.pt"
    truncated.write_bytes(path.read_bytes()[:-2000])
    ours = tmp_path / "ours.safetensors"
    stats.save(stats.load(path), ours)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(ours.read_bytes()[:-500])
    text = tmp_path / "notes.txt"
    text.write_text("no statistics")
    empty = tmp_path / "empty.pt"
    empty.touch()
    for wrong in (tmp_path / "absent.pt", truncated, cut, text, empty):
        with pytest.raises(KvPolicyError, match=str(wrong)):
            stats.load(wrong)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda c: c.pop("stats"), "no 'stats' table"),
        (lambda c: c["stats"].pop("layer01_head02"), "every query head"),
        (lambda c: c["stats"].update(other={}), "every query head"),
        (lambda c: c["stats"]["layer00_head00"].pop("q_abs_mean"), "q_abs_mean"),
        (lambda c: c["stats"]["layer00_head00"]["q_abs_mean"].fill_(torch.nan), "not finite"),
        (lambda c: c["stats"]["layer00_head00"].update(q_abs_mean=torch.ones(3)), "lengths"),
        (lambda c: c.update(metadata=["half"]), "metadata"),
        (lambda c: c["metadata"].update(model_name=3), "metadata"),
    ],
)
def test_damaged_content(content: dict[str, Any], tmp_path: Path, damage: Any, said: str) -> None:
    damage(content)
    with pytest.raises(KvPolicyError, match=said):
        stats.load(written(content, tmp_path))


def test_damaged_header(content: dict[str, Any], tmp_path: Path) -> None:
    whole = stats.load(written(content, tmp_path))
    tensors = {name: torch.ones(1, 2, 4) for name in ("q_mean_real", "q_mean_imag", "q_abs_mean")}
    path = tmp_path / "ours.safetensors"
    save_file(tensors, path, metadata={"format": stats.FORMAT, "metadata": "{"})
    with pytest.raises(KvPolicyError, match="cannot be read"):
        stats.load(path)
    save_file(tensors, path, metadata={"format": "other"})
    with pytest.raises(KvPolicyError, match="not a statistics file"):
        stats.load(path)
    stats.save(whole, path)
    stats.load(path)


def test_other_models_are_refused(content: dict[str, Any], tmp_path: Path) -> None:
    found = stats.load(written(content, tmp_path))
    for wrong, said in (
        ((LAYERS + 1, HEADS, HEAD_DIM), f"{LAYERS} layers, the model has {LAYERS + 1}"),
        ((LAYERS, HEADS * 2, HEAD_DIM), f"{HEADS} query heads per layer"),
        ((LAYERS, HEADS, 64), f"{HEAD_DIM} head size"),
    ):
        with pytest.raises(KvPolicyError, match=said):
            found.check_geometry(*wrong)
    with pytest.raises(KvPolicyError, match="'half' style"):
        found.check_pairing(interleaved=True)
