"""What is measured, what is read again, and what `sglang-tri calibrate` refuses; no engine runs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_tri.config import KvPolicyConfig
from sglang_tri.patches import calibrate, cli
from sglang_tri.patches.versions.v0_5_17 import measuring
from sglang_tri.statistics import Statistics, cache, model_rope
from tests.kernels.test_published import made_statistics
from tests.test_calibration_text import Bytes

SETTINGS = KvPolicyConfig(policy="triattention", calibration_tokens=1024)
ROPE = model_rope.plain(10000.0, 16)
DESCRIPTION = {"architectures": ["Tiny"], "dtype": "float32", "quantization": None}


class Server:
    """A loaded engine whose measurements are counted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.measured = 0
        self.weights = {"weight": torch.ones(3)}
        self.description = dict(DESCRIPTION)
        self.length = 512
        self.path = "tiny"
        monkeypatch.setenv(cache.FOLDER, str(folder))
        monkeypatch.setattr(measuring, "describe_model", lambda _: self.description)
        monkeypatch.setattr(measuring, "tokenizer", lambda _: Bytes())
        monkeypatch.setattr(measuring, "longest_prefill", lambda _: self.length)
        monkeypatch.setattr(calibrate, "_measure", self._measure)

    def _measure(self, scheduler: Any, sequences: Any, rope: Any, metadata: Any) -> Statistics:
        self.measured += 1
        return replace(made_statistics(2, 2, 16), metadata=metadata, path="")

    def start(self, settings: KvPolicyConfig = SETTINGS, rope: Any = ROPE) -> Statistics:
        model = SimpleNamespace(state_dict=lambda: self.weights)
        worker = SimpleNamespace(model_runner=SimpleNamespace(model=model))
        args = SimpleNamespace(model_path=self.path)
        scheduler: Any = SimpleNamespace(tp_worker=worker, server_args=args)
        return calibrate.automatic(scheduler, settings, rope)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Server:
    return Server(monkeypatch, tmp_path)


def test_the_second_start_reads(server: Server) -> None:
    first = server.start()
    server.path = "moved/elsewhere"
    second = server.start()
    assert server.measured == 1
    assert second.path == first.path
    assert torch.equal(second.q_mean, first.q_mean)


def test_sequences_are_no_longer_than_attention_likes(server: Server) -> None:
    server.length = 8192
    measured = server.start(replace(SETTINGS, calibration_tokens=5000))
    assert measured.metadata["sequences"] == 3


CHANGES: dict[str, Callable[[Server], Any]] = {
    "weights": lambda s: s.weights.update(weight=torch.zeros(3)),
    "names": lambda s: s.weights.update(other=torch.zeros(3)),
    "quantisation": lambda s: s.description.update(quantization="fp8"),
    "dtype": lambda s: s.description.update(dtype="bfloat16"),
    "splits": lambda s: setattr(s, "length", 100),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_model_is_measured(server: Server, change: str) -> None:
    first = server.start()
    CHANGES[change](server)
    second = server.start()
    assert server.measured == 2
    assert second.path != first.path


def test_another_text_or_rope_is_measured(server: Server, tmp_path: Path) -> None:
    own = tmp_path / "own.txt"
    own.write_text("".join(f"{number} bottles of beer\n" for number in range(500)))
    server.start()
    server.start(replace(SETTINGS, calibration_tokens=1025))
    server.start(replace(SETTINGS, calibration_text=str(own)))
    server.start(rope=model_rope.plain(20000.0, 16))
    server.start(rope=replace(ROPE, factor=1.1))
    server.start(rope=replace(ROPE, interleaved=True))
    assert server.measured == 6
    server.start(replace(SETTINGS, calibration_text=str(own), budget=99))
    assert server.measured == 6


def test_a_damaged_file_is_made_anew(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    path = Path(server.start().path)
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with caplog.at_level(logging.WARNING):
        server.start()
    assert server.measured == 2
    assert "made anew" in caplog.text
    assert str(path) in caplog.text
    assert path.read_bytes() == good


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-o", "stats.bin"], "stats.bin must end in"),
        (["-o", "no/such/stats.pt"], "-o no/such/stats.pt"),
        (["-o", "a.pt", "--kv-stats", "x.pt"], "--kv-stats is set by `calibrate` itself"),
        (["-o", "a.pt", "--kv-policy=streaming"], "--kv-policy=streaming is set by"),
    ],
)
def test_calibrate_refuses(
    arguments: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(cache.FOLDER, raising=False)
    assert cli.main(["calibrate", *arguments]) == 1
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
