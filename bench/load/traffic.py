"""How fast decoding could be if moving bytes were all it took."""

from __future__ import annotations

import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

COPIES = 5
COPY_BYTES = {"cuda": 2**30, "cpu": 2**27}


@dataclass(frozen=True)
class Traffic:
    """What one decoding step has to read. (What rounds read and move is not counted.)

    Attributes:
        weights: bytes of the weights, read once a step.
        slot: bytes of keys and values in one KV slot, of all layers.
        bandwidth: bytes per second that this machine copies, reads and writes counted.
    """

    weights: int
    slot: int
    bandwidth: float

    def tokens_per_second(self, running: float, slots: float) -> float:
        """Of a batch of `running` requests that reads `slots` KV slots in each step."""
        return running * self.bandwidth / (self.weights + slots * self.slot)


def traffic_of(model: Path) -> Traffic:
    """For the model in this folder, of which only `config.json` is read."""
    from transformers import AutoConfig, AutoModelForCausalLM  # Takes seconds.

    config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    item = config.dtype.itemsize
    parameters = sum(parameter.numel() for parameter in network.parameters())
    if not config.tie_word_embeddings:
        parameters -= network.get_input_embeddings().weight.numel()  # A step reads a few rows.
    heads = config.num_key_value_heads * config.head_dim
    slot = 2 * config.num_hidden_layers * heads * item
    # In a process of its own: memory that torch keeps on a GPU would be missing in the servers.
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        bandwidth = process.submit(copy_bandwidth).result()
    return Traffic(parameters * item, slot, bandwidth)


def copy_bandwidth() -> float:
    """Bytes per second, the best of a few copies."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = torch.ones(COPY_BYTES[device] // 4, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(COPIES):
        began = time.perf_counter()
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return 2 * COPY_BYTES[device] / min(seconds)
