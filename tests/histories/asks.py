"""What users of the state machine ask for, and the servers that they ask."""

from __future__ import annotations

from typing import Any, NamedTuple

from hypothesis import strategies as st

from tests.histories.plain import DONE, THINK

# Settings of the server.
POLICY: dict[str, Any] = {
    "policy": "triattention",
    "budget": 8,
    "interval": 6,
    "recent": 4,
    "sinks": 2,
    "normalize": False,
}
# What a request may ask for itself; the first is the server's.
OVERRIDES: tuple[dict[str, Any], ...] = (
    {},
    {"policy": "streaming"},
    {"eviction_mode": "per-layer-per-head", "budget": 13},
    {"eviction_mode": "union", "recent": 6},
    {"budget": 4},
    {"reuse": "prompt"},
    {"policy": "none"},
)
KEYS = (None, "salt")
SYSTEMS = (tuple(range(32, 38)), tuple(range(40, 55)))
MESSAGES = ((8,), (9, 10, 11), (12, 8, 13, 9, 14), tuple(range(8, 20)))


class Text(NamedTuple):
    """What somebody may go on from: tokens, the first of them a prompt, and how it was sent."""

    tokens: tuple[int, ...]
    key: int
    override: int
    prompt: int = 0


class Ask(NamedTuple):
    """A request, or several equal ones.

    Attributes:
        kind: a conversation of its own; the next turn of another one, also after tokens at its end
            were cut off, with another token in it, as somebody else or with other settings; one
            beside a request that still runs; the same again.
        back: how long ago the other one ended.
    """

    kind: str
    back: int
    system: tuple[int, ...]
    message: tuple[int, ...]
    at: int
    key: int
    override: int
    most: int
    times: int
    priority: int


ASKS = st.builds(
    Ask,
    kind=st.sampled_from(
        ["turn"] * 4 + ["trim"] * 3 + ["new"] * 2 + ["fork", "change", "key", "override", "again"]
    ),
    back=st.integers(0, 3),
    system=st.sampled_from(SYSTEMS),
    message=st.sampled_from(MESSAGES),
    at=st.integers(0, 100),
    key=st.sampled_from([0, 0, 0, 1]),
    override=st.sampled_from([0, 0, 0, 0, *range(len(OVERRIDES))]),
    most=st.sampled_from([40, 25, 60, 40, 5]),
    times=st.sampled_from([1, 1, 2]),
    priority=st.sampled_from([0, 0, 1]),
)
STEPS = st.sampled_from([20, 40, 80, 10, 3, 1])
RARELY = st.sampled_from([False, False, False, True])
MARKS = st.sampled_from([[], [THINK], [THINK, DONE]])
SETUPS = st.fixed_dictionaries(
    {
        "slots": st.sampled_from([160, 256, 384]),
        "chunk": st.sampled_from([8, 16, 512, None]),
        "policy": st.sampled_from(["fcfs", "lpm", "dfs-weight"]),
        "optimism": st.sampled_from([0.1, 0.4, 1.0]),
        "preempts": RARELY,
        "forces_miss": st.sampled_from([False] * 11 + [True]),
    }
)
