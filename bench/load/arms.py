"""The servers that are compared: production, constrained, and the policy."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bench.arms import Arm, triattention
from bench.server import STOCK_ENVIRONMENT
from sglang_tri.patches.scheduler import WAIT

if TYPE_CHECKING:
    from bench.load.presets import Preset

PRODUCTION, CONSTRAINED, POLICY = "production", "constrained", "triattention"
# The policy where each round waits for the whole forward pass before it: what does that cost?
WAITING = "waiting"
CLIPPED = "clip "  # And the value.
CLIP_VARIABLE = "SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION"
_PLAIN = ["--disable-radix-cache", "--disable-overlap-schedule"]


def clip(tokens: int) -> str:
    """Name of production SGLang with this estimate of output tokens."""
    return f"{CLIPPED}{tokens}"


def is_arm(name: str) -> bool:
    known = name in (PRODUCTION, CONSTRAINED, POLICY, WAITING)
    return known or re.fullmatch(rf"{CLIPPED}[1-9]\d*", name) is not None


def make_arms(
    preset: Preset, names: Sequence[str], slots: int | None, stats: str, arguments: Sequence[str]
) -> list[Arm]:
    """Arms, each with a pool of `slots` KV slots, or one as large as memory allows.

    Args:
        names: of the arms, see `is_arm`.
        stats: `--kv-stats` of the policy.
        arguments: further ones, for all servers.
    """
    common = ["--max-running-requests", str(preset.most)]
    common += ["--max-total-tokens", str(slots)] if slots else []
    common += ["--decode-log-interval", "10", "--incremental-streaming-output"]
    common += [*preset.server, *arguments]
    policy = triattention(stats, preset.budget, preset.interval)
    special = {
        CONSTRAINED: Arm(CONSTRAINED, [*common, *_PLAIN], STOCK_ENVIRONMENT),
        POLICY: Arm(POLICY, [*common, *policy]),
        WAITING: Arm(WAITING, [*common, *policy], {WAIT: "1"}),
    }
    return [special.get(name) or Arm(name, common, _environment(name)) for name in names]


def _environment(name: str) -> dict[str, str]:
    if not name.startswith(CLIPPED):
        return STOCK_ENVIRONMENT
    return {**STOCK_ENVIRONMENT, CLIP_VARIABLE: name.removeprefix(CLIPPED)}
