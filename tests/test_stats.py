"""Statistics files: both layouts read back whole, everything else is refused by name."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sglang_tri import statistics as stats
from sglang_tri.errors import KvPolicyError
from sglang_tri.statistics import files, layout
from sglang_tri.statistics.rope import Rope
from tests.kernels.test_published import OFFICIAL, made_statistics

LAYERS, HEADS, KV_HEADS, HEAD_DIM = 3, 4, 2, 32
GEOMETRY = {
    "qwen3_8b": (36, 32, 128),
    "deepseek_r1_distill_llama_8b": (32, 32, 128),
    "deepseek_r1_distill_qwen_7b": (28, 28, 128),
    "gpt_oss_120b": (36, 64, 64),
}
PLAIN = Rope(10000.0 ** -torch.arange(0, 1, 1 / 16, dtype=torch.float64), 1.0, HEAD_DIM, False)


def made() -> stats.Statistics:
    """With everything that our own files can hold."""
    base = made_statistics(LAYERS, HEADS, HEAD_DIM)
    return replace(
        base,
        q_square=base.q_abs.square() + 1,
        q_norm=base.q_abs.norm(dim=-1),
        k_mean=base.q_mean[:, :KV_HEADS] * 2,
        rope=replace(PLAIN, factor=1.1, interleaved=True),
        metadata={"model_name": "made", "tokens": 7, "rope_style": "interleaved"},
    )


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
    sampled = [[layer, head] for layer in range(LAYERS) for head in range(HEADS)]
    metadata = {"rope_style": "half", "model_name": "made", "sampled_heads": sampled}
    return {"metadata": metadata, "stats": table}


@pytest.fixture
def content() -> dict[str, Any]:
    return official(made_statistics(LAYERS, HEADS, HEAD_DIM))


def keys(heads: int) -> dict[str, torch.Tensor]:
    return {f"k_mean_{part}": torch.ones(LAYERS, heads, HEAD_DIM // 2) for part in ("real", "imag")}


def written(content: object, tmp_path: Path) -> Path:
    path = tmp_path / "stats.pt"
    torch.save(content, path)
    return path


def assert_same(first: stats.Statistics, second: stats.Statistics) -> None:
    ours, theirs = layout.pack(first), layout.pack(second)
    assert ours[0].keys() == theirs[0].keys()
    assert all(torch.equal(ours[0][name], theirs[0][name]) for name in ours[0])
    assert ours[1] == theirs[1]


@pytest.mark.parametrize(
    "way", [[".safetensors"], [".pt"], [".safetensors", ".pt", ".safetensors"]]
)
def test_nothing_is_lost_on_the_way(way: list[str], tmp_path: Path) -> None:
    first = found = made()
    for number, suffix in enumerate(way):
        stats.save_as(found, tmp_path / f"{number}{suffix}")
        found = stats.load(tmp_path / f"{number}{suffix}")
    assert_same(found, replace(first, metadata=found.metadata))
    assert found.metadata.items() >= first.metadata.items()
    assert found.rope is not None
    assert found.rope.interleaved
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        f"{number}{suffix}" for number, suffix in enumerate(way)
    ]


def test_equal_statistics_are_equal_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        stats.save_as(made(), tmp_path / f"{name}.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_the_official_layout_is_written_as_it_is_read(
    content: dict[str, Any], tmp_path: Path
) -> None:
    stats.save_as(stats.load(written(content, tmp_path)), tmp_path / "ours.safetensors")
    stats.save_as(stats.load(tmp_path / "ours.safetensors"), tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert back["metadata"] == {**content["metadata"], "head_dim": HEAD_DIM}
    assert back["stats"].keys() == content["stats"].keys()
    for name, entry in back["stats"].items():
        assert all(torch.equal(entry[field], content["stats"][name][field]) for field in entry)
        assert entry.keys() == content["stats"][name].keys()


@pytest.mark.parametrize("name", [n for n in GEOMETRY if (OFFICIAL / f"{n}.pt").exists()])
def test_official_files(name: str) -> None:
    found = stats.load(OFFICIAL / f"{name}.pt")
    layers, heads, head_dim = GEOMETRY[name]
    found.check_geometry(layers, heads, head_dim)
    found.check_rope(replace(PLAIN, head_dim=head_dim))


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
    stats.save_as(stats.load(path), ours)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(ours.read_bytes()[:-500])
    text = tmp_path / "notes.txt"
    text.write_text("no statistics")
    empty = tmp_path / "empty.pt"
    empty.touch()
    for wrong in (tmp_path / "absent.pt", truncated, cut, text, empty):
        with pytest.raises(KvPolicyError, match=str(wrong)):
            stats.load(wrong)
    with pytest.raises(KvPolicyError, match=r"must end in \.pt or \.safetensors"):
        stats.save_as(made(), tmp_path / "stats.npz")


def test_one_changed_bit_is_found(tmp_path: Path) -> None:
    path = tmp_path / "ours.safetensors"
    stats.save_as(made(), path)
    whole = bytearray(path.read_bytes())
    whole[-5] ^= 1
    path.write_bytes(whole)
    with pytest.raises(KvPolicyError, match="digest"):
        stats.load(path)


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
        (lambda c: c.update(sglang_tri={"q_norm_mean": torch.ones(3)}), "q_norm_mean is"),
        (lambda c: c.update(sglang_tri={"k_mean_real": torch.ones(3, 1, 16)}), "half of k_mean"),
        (lambda c: c.update(sglang_tri=keys(3)), "k_mean_real is"),
        (lambda c: c.update(sglang_tri=keys(0)), "k_mean_real is"),
        (lambda c: c.update(sglang_tri=3), "more than tensors"),
        (lambda c: c.update(sglang_tri={"k_mean_real": 3}), "more than tensors"),
        (lambda c: c["metadata"].update(rope_factor="much"), "rope_factor of 'much'"),
        (lambda c: c["metadata"].update(tokens=torch.ones(1)), "not plain values"),
    ],
)
def test_damaged_content(
    content: dict[str, Any], tmp_path: Path, damage: Callable[[Any], Any], said: str
) -> None:
    damage(content)
    with pytest.raises(KvPolicyError, match=said):
        stats.load(written(content, tmp_path))


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"sglang_tri": "{"}, "cannot be read"),
        ({"sglang_tri": json.dumps({"format": "other"})}, "not a statistics file"),
        ({"sglang_tri": json.dumps({"format": files.FORMAT})}, "digest"),
        ({"format": "pt"}, "not a statistics file"),
    ],
)
def test_damaged_header(header: dict[str, str], said: str, tmp_path: Path) -> None:
    tensors = {name: torch.ones(1, 2, 4) for name in layout.REQUIRED}
    path = tmp_path / "ours.safetensors"
    save_file(tensors, path, metadata=header)
    with pytest.raises(KvPolicyError, match=said):
        stats.load(path)


def test_other_models_are_refused(content: dict[str, Any], tmp_path: Path) -> None:
    found = stats.load(written(content, tmp_path))
    for wrong, said in (
        ((LAYERS + 1, HEADS, HEAD_DIM), f"has {LAYERS} layers, the model has {LAYERS + 1}"),
        ((LAYERS, HEADS * 2, HEAD_DIM), f"{HEADS} query heads per layer"),
        ((LAYERS, HEADS, 64), f"{HEAD_DIM} head size"),
    ):
        with pytest.raises(KvPolicyError, match=said):
            found.check_geometry(*wrong)
    with pytest.raises(KvPolicyError, match="'half' style"):
        found.check_rope(replace(PLAIN, interleaved=True))


def test_other_rope_is_refused() -> None:
    found = replace(made(), rope=PLAIN, metadata={})
    found.check_rope(PLAIN)
    # An engine may round its frequencies to float32.
    found.check_rope(replace(PLAIN, frequencies=PLAIN.frequencies.float().double()))
    slower = replace(PLAIN, frequencies=PLAIN.frequencies / 2)
    bent = PLAIN.frequencies.clone()
    bent[5] *= 1.01
    for other, mine, theirs in (
        (slower, "frequency 1 in pair 0", "frequency 0.5 in pair 0"),
        (replace(PLAIN, frequencies=bent), "in pair 5", "in pair 5"),
        (replace(PLAIN, factor=1.2), "factor 1", "factor 1.2"),
        (replace(PLAIN, frequencies=torch.ones(8)), "rotary size 32", "rotary size 16"),
        (replace(PLAIN, interleaved=True), "'half' style", "'interleaved' style"),
    ):
        said = f"made with RoPE of .*{mine}, the model has .*{theirs}: use statistics"
        with pytest.raises(KvPolicyError, match=said):
            found.check_rope(other)


def test_rope_settings_of_official_files() -> None:
    """GPT-OSS's file has them."""
    stated = {"rope_type": "yarn", "rope_theta": 150000, "rope_scaling": {"factor": 32.0}}
    found = replace(made(), metadata=stated)
    model = {"rope_type": "yarn", "rope_theta": 150000, "factor": 32.0, "truncate": False}
    found.check_rope_settings(model)
    for name, value in (("rope_theta", 10000.0), ("rope_type", "default"), ("factor", 16.0)):
        with pytest.raises(KvPolicyError, match=f"made with {name} .*, the model has {name}"):
            found.check_rope_settings({**model, name: value})
    replace(found, metadata={}).check_rope_settings(model)
    nested = replace(found, metadata={"rope_scaling": {"rope_type": "yarn"}})
    with pytest.raises(KvPolicyError, match="rope_type yarn, the model has rope_type default"):
        nested.check_rope_settings({"rope_type": "default"})
    replace(found, metadata={"rope_scaling": "linear"}).check_rope_settings(model)


def _write_often(path: Path, times: int) -> None:
    for _ in range(times):
        stats.save_as(made(), path)


def test_many_writers_leave_one_good_file(tmp_path: Path) -> None:
    path = tmp_path / "stats.safetensors"
    _write_often(path, 1)
    start = multiprocessing.get_context("fork").Process
    writers = [start(target=_write_often, args=(path, 40)) for _ in range(3)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert_same(stats.load(path), made())
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert list(tmp_path.iterdir()) == [path]
