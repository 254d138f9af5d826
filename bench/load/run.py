"""One workload on one server, once."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from bench.load.client import Client, Load, LoadFailed
from bench.load.timeline import Timeline
from bench.load.workloads import Workload
from bench.server import Server

POINTS = 300  # Kept of what is seen over time.


@dataclass(frozen=True)
class Run:
    """What was measured.

    Attributes:
        arm, pool, workload: names.
        slots: size of the pool.
        load: what the client saw.
        retracted: how often a request was retracted.
        rounds: rounds of the policy.
        peak_slots: most KV slots that running requests held, in the log's decoding steps.
        running: requests in a decoding step, on average.
        read: KV slots that a decoding step reads, on average; shared ones once for each request.
        over_time: seconds since the begin, running requests and tokens per second.
        attention: the server's attention backend in decoding steps.
        wall: seconds that all of this took, the client's warm-up included.
    """

    arm: str
    pool: str
    workload: str
    slots: int
    load: Load
    retracted: int
    rounds: int
    peak_slots: int
    running: float
    read: float
    over_time: list[tuple[float, int, float]]
    attention: str
    wall: float


def measure(
    client: Client, server: Server, workload: Workload, arm: str, pool: str, shares: bool
) -> Run:
    """Empty the cache, send the workload.

    The client warms up with the first prompt, which stays in a radix cache: its system prompt is
    known from the beginning.

    Args:
        arm, pool: names, for the result.
        shares: whether requests share the slots of their system prompt.

    Raises:
        LoadFailed: something is missing that the result would be wrong without.
    """
    began = time.monotonic()
    if not server.flush_cache():
        raise LoadFailed(f"{arm}: the cache could not be emptied; {server.log}")
    before = server.internal_state()
    with Timeline(server.log) as timeline:
        load = client.run(server.url, workload)
    after = server.internal_state()
    samples = [sample for sample in timeline.samples if sample.time >= load.began]
    if not samples:
        raise LoadFailed(f"{arm}: too few decoding steps to see any in the log; {server.log}")
    lines = [sample.line for sample in samples]
    again = workload.read_twice if shares else lambda running: 0.0
    thinned = samples[:: -(-len(samples) // POINTS)]
    return Run(
        arm=arm,
        pool=pool,
        workload=workload.name,
        slots=slots_of(after),
        load=load,
        retracted=timeline.retracted,
        rounds=_rounds(after) - _rounds(before),
        peak_slots=max(line.slots for line in lines),
        running=fmean(line.running for line in lines),
        read=fmean(line.slots + again(line.running) for line in lines),
        over_time=[(s.time - load.began, s.line.running, s.line.throughput) for s in thinned],
        attention=after["decode_attention_backend"] or after["attention_backend"],
        wall=time.monotonic() - began,
    )


def slots_of(state: dict[str, Any]) -> int:
    """Size of a server's pool, from its internal state."""
    slots: int = state["memory_usage"]["token_capacity"]
    return slots


def _rounds(state: dict[str, Any]) -> int:
    return int(state["kv_policy"]["rounds"]) if "kv_policy" in state else 0
