"""One workload on one server, once."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from bench.load.client import Client
from bench.load.timeline import Timeline
from bench.load.workloads import Workload
from bench.server import Server

PERCENTILES = (50, 95, 99)
ROUNDS = "rounds"


@dataclass(frozen=True)
class Run:
    """What was measured.

    Attributes:
        arm, pool, workload: names.
        slots: size of the pool.
        seconds: from the first request sent to the last token.
        output_rate: output tokens per second.
        request_rate: requests per second.
        first_token: seconds to the first token, p50, p95 and p99.
        between_tokens: seconds between tokens, p50, p95 and p99.
        cached: prompt tokens that were not computed.
        retracted: how often a request was retracted.
        rounds: rounds of the policy.
        peak_slots: most KV slots in use.
        running: requests in a decoding step, on average.
        read: KV slots that a decoding step reads, on average; shared ones once for each request.
        over_time: seconds since the begin, running requests and tokens per second.
    """

    arm: str
    pool: str
    workload: str
    slots: int
    seconds: float
    output_rate: float
    request_rate: float
    first_token: tuple[float, ...]
    between_tokens: tuple[float, ...]
    cached: int
    retracted: int
    rounds: int
    peak_slots: int
    running: float
    read: float
    over_time: list[tuple[float, int, float]]


def measure(
    client: Client, server: Server, workload: Workload, arm: str, pool: str, shares: bool
) -> Run:
    """Empty the cache, send the workload.

    Args:
        arm, pool: names, for the result.
        shares: whether requests share the slots of their system prompt.
    """
    server.flush_cache()
    before = server.internal_state()
    with Timeline(server.log) as timeline:
        result = client.run(server.url, workload)
    after = server.internal_state()
    samples = [sample for sample in timeline.samples if sample.time >= result["began"]]
    lines = [sample.line for sample in samples]
    extra = workload.shared if shares else 0
    return Run(
        arm=arm,
        pool=pool,
        workload=workload.name,
        slots=after["memory_usage"]["token_capacity"],
        seconds=result["duration"],
        output_rate=result["output_throughput"],
        request_rate=result["request_throughput"],
        first_token=_percentiles(result["ttfts"]),
        between_tokens=_percentiles([gap for gaps in result["itls"] for gap in gaps]),
        cached=sum(result["cached_tokens"]),
        retracted=timeline.retracted,
        rounds=_rounds(after) - _rounds(before),
        peak_slots=max(line.slots for line in lines),
        running=fmean(line.running for line in lines),
        read=fmean(x.slots + extra * max(0, x.running - workload.groups) for x in lines),
        over_time=[(s.time - result["began"], s.line.running, s.line.throughput) for s in samples],
    )


def _rounds(state: dict[str, Any]) -> int:
    return int(state["kv_policy"][ROUNDS]) if "kv_policy" in state else 0


def _percentiles(values: list[float]) -> tuple[float, ...]:
    return tuple(float(value) for value in np.percentile(values, PERCENTILES))
