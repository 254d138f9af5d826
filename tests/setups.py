"""The servers that the tests talk to, by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from bench.server import STOCK_ENVIRONMENT, STRICT

BUDGET, INTERVAL = 48, 24
ALIAS_LIMIT = 24
README = Path(__file__).parents[1] / "README.md"
# It marks the end of thinking.
THINKING = Path(__file__).parents[1] / "bench" / "agent" / "template.jinja"
PAGE_4 = ("--page-size", "4")
PAGE_16 = ("--page-size", "16")
FP8 = ("--kv-cache-dtype", "fp8_e4m3")
SYNC = ("--disable-overlap-schedule",)
COMMON = (
    *("--max-total-tokens", "8192", "--chunked-prefill-size", "128", "--enable-metrics"),
    # A random model asked for JSON would fill it with blanks for ever.
    *("--decode-log-interval", "1", "--constrained-json-disable-any-whitespace"),
    *("--chat-template", str(THINKING)),
)
REAL = (
    *("--max-total-tokens", "8192", "--chunked-prefill-size", "128", "--dtype", "float32"),
    *("--kv-calibration-tokens", "2048"),
)
SMALL_POOL = 2048
SMALL = ("--max-total-tokens", str(SMALL_POOL), "--context-length", "8192")
FEW_TOKENS = ("--kv-calibration-tokens", "4096")
OWN_TEXT = ("--kv-calibration-text", str(README), *FEW_TOKENS)
FUZZ_POOL, FUZZ_ROWS = 1536, 8
FUZZ = (
    *("--max-total-tokens", str(FUZZ_POOL), "--max-running-requests", str(FUZZ_ROWS)),
    *("--chunked-prefill-size", "64"),
    *("--enable-priority-scheduling", "--priority-scheduling-preemption-threshold", "0"),
    *("--kv-alias-limit", str(ALIAS_LIMIT)),
    *("--schedule-conservativeness", "0.1"),  # Take in more than may fit.
    *("--enable-custom-logit-processor", "--constrained-json-disable-any-whitespace"),
)
# It concerns requests that say `require_reasoning`.
STRIP = ("--reasoning-parser", "qwen3", "--strip-thinking-cache")
LONGEST_PREFIX = ("--schedule-policy", "lpm")


@dataclass(frozen=True)
class Setup:
    """One server.

    Attributes:
        kind: which model it serves: a tiny one, `reference`, or one of `bench.models`.
        arguments: beside the model and, where it has one, the policy.
        policy: whether the policy is on.
        automatic: whether the server makes its query statistics itself, not from a file.
        adapters: names of the LoRA adapters that it serves, of `tests.adapters`.
        environment: added to the tests' own.
        group: servers whose tests run in one process, one after another; default: it is alone.
        full: whether it runs in `make test-full` only.
    """

    kind: str = "qwen3"
    arguments: tuple[str, ...] = COMMON
    policy: bool = True
    automatic: bool = False
    adapters: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=lambda: dict(STRICT))
    group: str = ""
    full: bool = False

    @property
    def page_size(self) -> int:
        if "--page-size" not in self.arguments:
            return 1
        return int(self.arguments[self.arguments.index("--page-size") + 1])


_RETRACT = {**STRICT, "SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "40"}

# In the order in which the tests use them, so that each is started once.
SETUPS = {
    "stock": Setup(policy=False, environment=dict(STOCK_ENVIRONMENT), group="page1"),
    "page1-overlap": Setup(group="page1"),
    "page4-sync": Setup(
        arguments=(*COMMON, *PAGE_4, *SYNC, *LONGEST_PREFIX, *FEW_TOKENS),
        automatic=True,
        group="page4",
    ),
    # It reads the statistics that page4-sync has measured.
    "page4-overlap": Setup(
        arguments=(*COMMON, *PAGE_4, *FEW_TOKENS), automatic=True, group="page4"
    ),
    "llama3": Setup(kind="llama3", arguments=(*COMMON, *SMALL), automatic=True),
    "yarn": Setup(kind="yarn", arguments=(*COMMON, *OWN_TEXT), automatic=True),
    "lora-page16": Setup(arguments=(*COMMON, *PAGE_16), adapters=("a", "b")),
    "fp8": Setup(arguments=(*COMMON, *FP8)),
    "smollm2-page4": Setup(kind="smollm2", arguments=(*REAL, *PAGE_4), automatic=True),
    "fuzz-page4": Setup(arguments=(*FUZZ, *PAGE_4, *STRIP), environment=_RETRACT),
    "page1-sync": Setup(arguments=(*COMMON, *SYNC), automatic=True, full=True),
    "shipped": Setup(kind="reference", arguments=(*COMMON, "--dtype", "float32"), full=True),
    "smollm2-page1": Setup(kind="smollm2", arguments=REAL, automatic=True, full=True),
    "fuzz-page1": Setup(arguments=FUZZ, environment=_RETRACT, full=True),
}
