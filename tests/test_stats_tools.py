"""`sglang-tri stats`: what it says of a file is what the file holds."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sglang_tri import statistics as stats
from sglang_tri.patches import cli
from sglang_tri.statistics import describe, model_rope, report, validate
from sglang_tri.statistics.rope import Rope
from tests.kernels.test_published import OFFICIAL, made_statistics
from tests.test_stats import assert_same, made

THETA = 10000.0
YARN = Rope(model_rope.plain(THETA, 24).frequencies, 1.3, 32, interleaved=False)


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    path = tmp_path / "ours.safetensors"
    stats.save_as(made(), path)
    return path


def run(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> str:
    assert cli.main(["stats", *map(str, argv)]) == 0
    return capsys.readouterr().out


def test_readings_by_hand() -> None:
    """One head of two pairs: R of 1 and 0.5, lengths 3 and 4."""
    mean = torch.complex(torch.tensor([[[3.0, 0.0]]]), torch.tensor([[[0.0, 2.0]]]))
    one = stats.Statistics(mean, torch.tensor([[[3.0, 4.0]]]), q_norm=torch.tensor([[5.0]]))
    found = describe.concentration(one)
    assert found.strongest.item() == pytest.approx(0.75)
    assert found.amplitude.item() == pytest.approx(5 / 7)
    assert found.energy.item() == pytest.approx((9 * 1 + 16 * 0.5) / 25)
    assert found.full is not None
    assert found.full.item() == pytest.approx(13**0.5 / 5)
    assert describe.strongest_pairs(one).tolist() == [[[0, 1]]]


def test_only_the_strongest_three_count() -> None:
    mean = torch.tensor([[[1.0, 5.0, 4.0, 3.0, 2.0]]]).to(torch.complex64)
    size = torch.tensor([[[100.0, 5.0, 8.0, 12.0, 100.0]]])
    found = describe.concentration(stats.Statistics(mean, size))
    assert found.strongest.item() == pytest.approx((1 + 0.5 + 0.25) / 3)


@pytest.mark.parametrize("path", [*OFFICIAL.glob("qwen3_8b.pt")])
def test_published_concentration(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """0.977 and 84.7% in the paper, from a calibration of its own."""
    last = run(capsys, "show", path).splitlines()[-1]
    assert "R3 0.974, 84.0% of heads above 0.95; R amp. 0.737" in last


def test_distance_curve_is_the_logit_of_two_rotated_centres() -> None:
    base = made_statistics(1, 4, 32)
    statistics = replace(base, k_mean=base.q_mean.conj()[:, :2] + 1)
    distances = torch.tensor([1, 2, 17, 400])
    products = describe.centre_products(statistics)
    curve = describe.distance_curve(products, YARN, distances)
    frequencies = YARN.padded_frequencies()
    factor = torch.where(frequencies > 0, 1.3, 1.0)
    for head in range(4):
        for number, distance in enumerate(distances.tolist()):
            q = statistics.q_mean[0, head] * factor * torch.exp(1j * 900 * frequencies)
            assert statistics.k_mean is not None
            key = statistics.k_mean[0, head // 2]
            k = key * factor * torch.exp(1j * (900 - distance) * frequencies)
            logit = (q.real * k.real + q.imag * k.imag).sum()
            assert curve[0, head, number] == pytest.approx(float(logit), abs=1e-3)


def test_preferred_distance() -> None:
    """Queries that lag their keys by 37 tokens prefer keys 37 tokens away."""
    rope = model_rope.plain(THETA, 32)
    keys = torch.ones(1, 2, 16, dtype=torch.complex64)
    turn = torch.exp(-37j * rope.frequencies).to(torch.complex64)
    statistics = stats.Statistics(keys * turn, keys.abs(), k_mean=keys)
    assert describe.preferred_distances(statistics, rope, 4096).tolist() == [[37, 37]]


def test_mean_logits_by_distance() -> None:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(4, 20, 8, generator=generator)
    keys = torch.randn(2, 20, 8, generator=generator)
    found = validate._mean_logits(queries, keys)
    for head in range(4):
        for distance in range(20):
            pairs = [queries[head, i] @ keys[head // 2, i - distance] for i in range(distance, 20)]
            mean = float(torch.stack(pairs).mean())
            assert found[head, distance] == pytest.approx(mean, abs=1e-4)


def test_show(ours: Path, capsys: pytest.CaptureFixture[str]) -> None:
    by_layer = run(capsys, "show", ours)
    assert "3 layers, 4 query heads, head size 32" in by_layer
    assert "tokens: 7" in by_layer
    found = describe.concentration(made())
    rows = by_layer.splitlines()[-5:-2]
    assert [row.split()[:2] for row in rows] == [
        [str(layer), f"{float(found.strongest[layer].mean()):.3f}"] for layer in range(3)
    ]
    by_head = run(capsys, "show", ours, "--heads").splitlines()[-14:-2]
    assert [row.split()[1] for row in by_head] == [
        f"{float(value):.3f}" for value in found.strongest.flatten()
    ]
    rope = made().rope
    assert rope is not None
    preferred = describe.preferred_distances(made(), rope, report.LONGEST)
    assert [row.split()[-1] for row in by_head] == [str(int(d)) for d in preferred.flatten()]


def test_show_for_programs(ours: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(run(capsys, "show", ours, "--json"))
    assert found["metadata"]["model_name"] == "made"
    assert torch.tensor(found["heads"]["preferred_distance"]).shape == (3, 4)
    assert found["summary"]["r3"] == pytest.approx(torch.tensor(found["heads"]["r3"]).mean().item())


def test_rope_where_the_file_has_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "without.pt"
    stats.save_as(replace(made(), rope=None, k_mean=None), path)
    assert "Give --model-path or --rope-theta" in run(capsys, "show", path)
    with_theta = run(capsys, "show", path, "--rope-theta", "10000")
    assert "no mean keys" in with_theta
    assert "distance of each head" in with_theta


def test_convert(ours: Path, capsys: pytest.CaptureFixture[str]) -> None:
    official, back = ours.with_suffix(".pt"), ours.with_name("back.safetensors")
    run(capsys, "convert", ours, official)
    run(capsys, "convert", official, back)
    assert_same(stats.load(ours), replace(stats.load(back), metadata=stats.load(ours).metadata))


def test_diff(ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same = run(capsys, "diff", ours, ours)
    assert [line.split() for line in same.splitlines()[4:7]] == [
        [str(layer), "1", "0", "0", "0"] for layer in range(3)
    ]
    other = made()
    other.q_mean[1, 2] *= -1
    other.q_abs[2, 3] *= 2
    stats.save_as(other, tmp_path / "other.safetensors")
    rows = run(capsys, "diff", ours, tmp_path / "other.safetensors").splitlines()[4:7]
    cells = [line.split() for line in rows]
    assert cells[0] == ["0", "1", "0", "0", "0"]
    assert cells[1][:4] == ["1", "-1", "2", "0"]
    assert cells[2][3] == "1"
    assert float(cells[2][4]) < 0


def test_plots(ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "plot", ours, "-o", tmp_path / "a.png", "--heads", "0.1", "2.3")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    run(capsys, "plot", ours, "-o", tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text()
    assert "data:image/png;base64," in page
    assert "R3" in page


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["show", "absent.pt"], "absent.pt does not exist"),
        (["convert", "{ours}", "a.npz"], "a.npz must end in .pt or .safetensors"),
        (["plot", "{ours}", "-o", "a.svg"], "-o a.svg must end in .html or .png"),
        (["plot", "{ours}", "-o", "a.png", "--heads", "3.0"], "--heads 3.0: .*layers 0 to 2"),
        (["plot", "{ours}", "-o", "a.png", "--validate", "999"], "--validate needs the model"),
        (
            ["plot", "{ours}", "-o", "a.png", "--validate", "99", "--model-path", "m"],
            "--validate 99 is too small",
        ),
        (["plot", "{ours}", "-o", "no/such/a.png"], "no/such/a.png"),
        (["convert", "{ours}", "no/such/a.pt"], "no/such"),
        (["diff", "{ours}", "{other}"], r"\(3, 4, 32\), .*\(2, 4, 32\)"),
    ],
)
def test_refused(
    arguments: list[str],
    said: str,
    ours: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = tmp_path / "other.safetensors"
    stats.save_as(made_statistics(2, 4, 32), other)
    argv = [text.format(ours=ours, other=other) for text in arguments]
    assert cli.main(["stats", *argv]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert re.search(said, error), error


@pytest.mark.parametrize(
    "argv", [["show", "x", "--hedas"], ["plot", "x", "-o", "a.png", "--heads", "1"]]
)
def test_bad_usage(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["stats", *argv])
    assert "error:" in capsys.readouterr().err
