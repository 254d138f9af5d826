"""Requests with their own policy, and what the tests compare of the answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.accuracy import client
from bench.accuracy.client import Answer, Ask, Recorded
from bench.simulator.policies import Policy
from bench.simulator.registry import make_policy
from bench.simulator.request import stagger_slots
from tests.conftest import Running
from tests.setups import BUDGET, INTERVAL


def tokens_of(text: str) -> list[int]:
    """The tiny models' tokenizer has one token per byte."""
    return list(text.encode())


def send(running: Running, ask: Ask) -> Answer:
    return client.send(running.server, ask)


def send_all(running: Running, asks: Sequence[Ask]) -> list[Answer]:
    """All at once, so that they share batches."""
    return client.send_all(running.server, asks)


def simulated(own: dict[str, Any]) -> Policy:
    """The simulator's policy for a request with settings of its `own`."""
    settings = {"policy": "triattention", "budget": BUDGET, "interval": INTERVAL, **own}
    settings.pop("reuse", None)
    name = settings.pop("policy")
    if name == "none":
        return make_policy("none")
    if name == "triattention":
        settings["mode"] = settings.pop("eviction_mode", "per-head")
    return make_policy(name, **settings)


def stagger(running: Running, prompt: list[int], own: dict[str, Any] | None = None) -> int:
    """Slots by which the first round of a request precedes a full region."""
    return stagger_slots(simulated(own or {}), prompt, running.setup.page_size)


def recorded_rounds(folder: Path, rid: str) -> list[np.ndarray]:
    """Kept logical positions of each round of a request, as the server chose them."""
    return Recorded.read(folder, rid).kept
