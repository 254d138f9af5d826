"""Both back ends of every kernel: plain torch, and Triton's on a GPU or in its interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sglang_tri.kernels import compact, score, select
from tests.interpreted import INTERPRET, ON_GPU

MODULES = (score, select, compact)
FOLDER = Path(__file__).parent
# Those of their tests that run in Triton's interpreter.
SLOW = ("test_score.py", "test_rounds.py")


@pytest.fixture
def on_triton(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The Triton kernels run; returns where tensors have to be."""
    if not ON_GPU:
        monkeypatch.setenv(INTERPRET, "1")
    for module in MODULES:
        monkeypatch.setattr(module, "has_triton", lambda _: True)
    return torch.device("cuda" if ON_GPU else "cpu")


@pytest.fixture(autouse=True)
def _free_memory() -> Iterator[None]:
    """Other processes test on the same GPU, and some tests take gigabytes."""
    yield
    if ON_GPU:
        torch.cuda.empty_cache()


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def device(backend: str, request: pytest.FixtureRequest) -> torch.device:
    """Where tensors have to be for the back end."""
    if backend.startswith("triton"):
        found: torch.device = request.getfixturevalue("on_triton")
        return found
    return torch.device("cpu")


@pytest.fixture
def tolerance(backend: str) -> float:
    """Of scores of bfloat16 keys, relative to the largest: Triton's kernel has 16 bits."""
    return 2e-5 if backend.startswith("triton") else 3e-6


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if ON_GPU:
        return
    for item in items:
        interpreted = "triton" in item.name or "on_triton" in getattr(item, "fixturenames", ())
        if interpreted and item.path.parent == FOLDER and item.path.name in SLOW:
            item.add_marker(pytest.mark.slow)
