"""`--kv-stats auto` on the real server: right, repeatable, and gone without a trace."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from bench.accuracy.reference_model.heads import head_means
from sglang_tri import statistics as stats
from sglang_tri.statistics import calibration_text as text
from sglang_tri.statistics import validate
from sglang_tri.statistics.virtual_queries import virtual_queries
from tests.conftest import Running
from tests.setups import COMMON, FEW_TOKENS, README
from tests.tiny_stats import capture_heads

CHUNK = 128
OWN_TEXT = "yarn"
MEASURING = ["page4-sync", "page1-sync", "llama3", OWN_TEXT]


def sequences(server: Running) -> torch.Tensor:
    """What the server was to let its model read."""
    tokenizer = AutoTokenizer.from_pretrained(server.model)
    source = text.Source(str(README) if server.name == OWN_TEXT else None)
    tokens = 4096 if FEW_TOKENS[0] in server.setup.arguments else 16384
    return torch.tensor(text.tokenize(source, tokenizer, tokens, CHUNK).ids)


def measured(server: Running) -> stats.Statistics:
    return stats.load(server.server.kv_policy()["statistics"])


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest error of a head, relative to the length of its vector."""
    error = torch.linalg.vector_norm(found - expected, dim=-1)
    return float((error / torch.linalg.vector_norm(expected, dim=-1)).max())


@pytest.mark.parametrize("server", MEASURING, indirect=True)
def test_equal_to_an_independent_capture(server: Running) -> None:
    """Queries and keys after the norms and before RoPE, as transformers computes them."""
    found, ids = measured(server), sequences(server)
    queries = torch.stack(capture_heads(server.model, ids)).double()
    mean, size, square, norm = head_means(queries)
    assert relative(found.q_mean, mean) < 1e-3
    assert relative(found.q_abs, size) < 1e-3
    assert relative(found.q_square, square) < 1e-3
    assert found.q_norm is not None
    assert relative(found.q_norm, norm) < 1e-3
    keys, *_ = head_means(torch.stack(capture_heads(server.model, ids, "k")).double())
    assert relative(found.k_mean, keys) < 1e-3
    assert found.metadata["tokens"] == ids.numel() == queries.shape[1]

    independent = stats.Statistics(mean.to(torch.complex64), size.float())
    assert found.rope is not None
    positions = torch.tensor([0, 77, 30_000])
    ours, theirs = (virtual_queries(s, found.rope) for s in (found, independent))
    torch.testing.assert_close(ours.at(positions), theirs.at(positions), rtol=0, atol=2e-3)
    torch.testing.assert_close(ours.magnitude, theirs.magnitude, rtol=0, atol=2e-3)


@pytest.mark.parametrize("server", MEASURING, indirect=True)
def test_predicts_the_logits_of_transformers(server: Running) -> None:
    """The paper's validation; it would see a wrong RoPE, pairing or conjugate."""
    found = validate.validate(measured(server), str(server.model), 512, None)
    assert float(found.r.mean()) > 0.8


@pytest.mark.parametrize("server", MEASURING, indirect=True)
def test_nothing_of_it_stays(server: Running) -> None:
    start = json.loads((server.probe / "start").read_text())
    assert start["free"] == start["size"]
    assert start["in_order"]
    assert start["free_rows"] == start["rows"]
    assert start["tree"] == 0
    assert start["written"] == 0
    assert start["row_entries"] == 0
    assert start["forward_hooks"] == 0
    log = server.server.log.read_text()
    assert "Query statistics: 100%" in log
    assert f"Query statistics: measured with {sequences(server).numel()} tokens" in log


@pytest.mark.parametrize("server", ["page4-overlap"], indirect=True)
def test_a_second_start_reads_what_the_first_has_kept(server: Running) -> None:
    """If the server of page4-sync ran before, it has measured the same model."""
    log = server.server.log.read_text()
    kept = server.server.kv_policy()["statistics"]
    assert Path(kept).parent == server.folder.parent / "statistics"
    first = not (server.folder.parent / "page4-sync").exists()
    assert (f"Query statistics: read from {kept}" in log) != first
    assert ("Query statistics: measured" in log) == first


@pytest.mark.parametrize("server", ["page4-sync"], indirect=True)
def test_same_text_same_bytes(server: Running, tmp_path: Path) -> None:
    """`sglang-tri calibrate` measures anew, in another process, and writes the very same file."""
    output = tmp_path / "measured.safetensors"
    command = [str(Path(sys.executable).with_name("sglang-tri")), "calibrate", "-o", str(output)]
    command += ["--model-path", str(server.model), *COMMON, *FEW_TOKENS]
    environment = {**os.environ, "SGLANG_PLATFORM": ""}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert output.read_bytes() == Path(server.server.kv_policy()["statistics"]).read_bytes()


@pytest.mark.parametrize("server", ["page1-overlap", OWN_TEXT], indirect=True)
def test_new_weights_make_automatic_statistics_stale(server: Running) -> None:
    """Those of a file are the user's own affair."""
    response = server.server.post("/update_weights_from_disk", model_path=str(server.model))
    assert response.json()["success"], response.text
    warned = "the query statistics of --kv-stats auto are those" in server.server.log.read_text()
    assert warned == server.setup.automatic
