"""The servers that are compared: production, constrained, and the policy."""

from __future__ import annotations

from collections.abc import Sequence

from bench.arms import Arm
from bench.load.presets import Preset
from bench.server import STOCK_ENVIRONMENT

PRODUCTION, CONSTRAINED, POLICY = "production", "constrained", "triattention"
CLIPPED = "clip "  # And the value.
CLIP_VARIABLE = "SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION"


def make_arms(
    preset: Preset, slots: int | None, clips: Sequence[int], stats: str, arguments: Sequence[str]
) -> list[Arm]:
    """All arms, each with a pool of `slots` KV slots, or one as large as memory allows.

    Args:
        clips: values for which production SGLang stands once more, with this estimate.
        stats: `--kv-stats` of the policy.
        arguments: further ones, for all servers.
    """
    common = ["--max-running-requests", str(preset.most)]
    common += ["--max-total-tokens", str(slots)] if slots else []
    common += ["--decode-log-interval", "10", "--incremental-streaming-output"]
    common += [*preset.server, *arguments]
    policy = ["--kv-policy", POLICY, "--kv-stats", stats]
    policy += ["--kv-budget", str(preset.budget), "--kv-interval", str(preset.interval)]
    plain = ["--disable-radix-cache", "--disable-overlap-schedule"]
    return [
        Arm(PRODUCTION, common, STOCK_ENVIRONMENT),
        *(_clipped(common, tokens) for tokens in clips),
        Arm(CONSTRAINED, [*common, *plain], STOCK_ENVIRONMENT),
        Arm(POLICY, [*common, *policy]),
    ]


def _clipped(arguments: list[str], tokens: int) -> Arm:
    return Arm(f"{CLIPPED}{tokens}", arguments, {**STOCK_ENVIRONMENT, CLIP_VARIABLE: str(tokens)})
