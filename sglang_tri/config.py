"""The user's settings: names, defaults, help texts and what makes them invalid.

They are listed once, as the fields of `KvPolicyConfig`; the command line, `sgl.Engine(kv_...=...)`
and the table in docs/flags.md follow.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, TypeVar

from sglang_tri.errors import KvPolicyError, shown
from sglang_tri.kernels.moves import MODES
from sglang_tri.policies import POLICIES

T = TypeVar("T")

POLICY_NAMES = ("none", *POLICIES)
REUSE = ("continuation", "prompt")
# A span's last tokens stay plain, so that trimming the end of an answer does not cost all of it.
LEAST_RECENT = 16
PREFIX = "kv_"
# --kv-stats: measure the loaded model.
AUTO = "auto"
# "1": requests may bring settings of their own. They are not public yet: tests switch them on.
PER_REQUEST = "SGLANG_KV_POLICY_PER_REQUEST"


@dataclass(frozen=True)
class Flag:
    """How one setting appears on the command line; `name` is the field of `KvPolicyConfig`.

    Text has one of the `choices`, if there are any; a number is `min` or more.
    """

    name: str
    default: Any
    help: str
    choices: tuple[str, ...] | None
    min: int

    @property
    def option(self) -> str:
        return "--kv-" + self.name.replace("_", "-")

    @property
    def keyword(self) -> str:
        return PREFIX + self.name


def _flag(default: T, help: str, choices: tuple[str, ...] | None = None, min: int = 0) -> T:
    return field(default=default, metadata={"help": help, "choices": choices, "min": min})


@dataclass(frozen=True)
class KvPolicyConfig:
    """Settings of one server, or of one request. All counts are in tokens.

    Raises:
        KvPolicyError: on construction, when a value or a combination cannot work.
    """

    policy: str = _flag("none", "which cached tokens of a long generation are kept", POLICY_NAMES)
    budget: int = _flag(2048, "generated tokens kept per request; the prompt is on top", min=1)
    interval: int = _flag(128, "evict when budget + interval generated tokens are resident", min=1)
    recent: int = _flag(16, "most recent tokens always kept, inside the budget")
    sinks: int = _flag(4, "first generated tokens always kept by 'streaming', inside the budget")
    eviction_mode: str = _flag(
        "per-head", "which heads and layers share one set of kept tokens", MODES
    )
    normalize: bool = _flag(True, "z-normalize each query head's scores before they are compared")
    reuse: str = _flag(
        "continuation", "what a later request may find of a generation that was evicted from", REUSE
    )
    alias_limit: int = _flag(
        4096, "compressed generations that can be found again, over all conversations", min=1
    )
    stats: str = _flag(
        AUTO, "query statistics: 'auto' measures the model, or a .pt or .safetensors file"
    )
    calibration_text: str | None = _flag(
        None, "UTF-8 text that 'auto' measures with; default: Python's reference"
    )
    calibration_tokens: int = _flag(16384, "tokens of the text that 'auto' measures with", min=1024)
    allow_untested_sglang: bool = _flag(
        False, "run on an SGLang version that this release was not tested with"
    )
    explicit: frozenset[str] = field(default_factory=frozenset, compare=False, repr=False)

    def __post_init__(self) -> None:
        for flag in FLAGS:
            _check_type(flag, getattr(self, flag.name))
        self._check_counts()
        self._check_calibration()

    @property
    def enabled(self) -> bool:
        return self.policy != "none"

    @property
    def continues(self) -> bool:
        """Whether a later request may go on from a generation that was evicted from."""
        return self.reuse == "continuation"

    @property
    def calibrates(self) -> bool:
        """Whether the policy needs statistics that the server has to make."""
        return self.stats == AUTO and self.enabled and POLICIES[self.policy].needs_statistics

    @property
    def stats_file(self) -> str | None:
        """The statistics file that the user named, or None."""
        return None if self.stats == AUTO else self.stats

    def _check_calibration(self) -> None:
        for name in sorted(self.explicit & {"calibration_text", "calibration_tokens"}):
            if self.enabled and not self.calibrates:
                raise KvPolicyError(
                    f"{_BY_NAME[name].option} {getattr(self, name)} does nothing with "
                    f"--kv-policy {self.policy} and --kv-stats {self.stats}: leave it out, or use "
                    f"--kv-policy triattention and --kv-stats {AUTO}."
                )

    def _check_counts(self) -> None:
        for flag in FLAGS:
            value = getattr(self, flag.name)
            if isinstance(value, int) and value < flag.min:
                raise KvPolicyError(f"{flag.option} {value} is too small: use {flag.min} or more.")
        self._check_at_most("recent", "budget", "the recent tokens are kept inside the budget")
        self._check_at_most("sinks", "budget", "the sinks are kept inside the budget")
        self._check_at_most("recent", "interval", "their old and new slots would overlap")
        if self.enabled:
            POLICIES[self.policy].check_settings(self)
        if self.enabled and self.continues and self.recent < LEAST_RECENT:
            raise KvPolicyError(
                f"--kv-recent {self.recent} is too small for --kv-reuse continuation: use "
                f"{LEAST_RECENT} or more (and a budget and an interval of as many), or "
                "--kv-reuse prompt."
            )

    def _check_at_most(self, name: str, limit: str, reason: str) -> None:
        value, bound = getattr(self, name), getattr(self, limit)
        if value > bound:
            raise KvPolicyError(
                f"--kv-{name} {value} is larger than --kv-{limit} {bound}: {reason}. "
                f"Use --kv-{name} {bound} or less, or a larger --kv-{limit}."
            )

    def for_request(self, custom_params: object) -> KvPolicyConfig:
        """The settings of a request: these, but for what it sets itself.

        Args:
            custom_params: of its sampling parameters; only what an object has under "kv_policy" is
                looked at. A client sends it: it may be anything that JSON can say.

        Raises:
            KvPolicyError: settings that cannot work, or that no request may bring.
        """
        own = custom_params.get("kv_policy") if isinstance(custom_params, dict) else None
        if own is None or own == {}:
            return self
        if not requests_may_set():
            raise KvPolicyError(
                f"custom_params['kv_policy'] {shown(own)} is not public: leave it out, and set "
                "--kv-policy for the whole server."
            )
        try:
            return self.with_overrides(own)
        except KvPolicyError as error:
            raise KvPolicyError(f"custom_params['kv_policy']: {error}") from error

    def with_overrides(self, overrides: object) -> KvPolicyConfig:
        """A copy with some fields replaced, validated again.

        Args:
            overrides: fields and their values; whatever else it is, is refused.

        Raises:
            KvPolicyError: no mapping, an unknown field, or a value that cannot work.
        """
        if not isinstance(overrides, Mapping):
            raise KvPolicyError(
                f'{shown(overrides)} is not an object of settings, such as {{"budget": 1024}}.'
            )
        for name in overrides:
            if name not in _BY_NAME:
                known = ", ".join(_BY_NAME)
                raise KvPolicyError(f"unknown KV policy setting {shown(name)}: use one of {known}.")
        return replace(self, **overrides)

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, so that the settings travel to other processes by pickle or JSON."""
        return {flag.name: getattr(self, flag.name) for flag in FLAGS}

    @classmethod
    def from_keywords(cls, keywords: Mapping[str, Any]) -> KvPolicyConfig:
        """From `kv_policy=..., kv_budget=...` as `sgl.Engine` takes them; None is the default."""
        given = {name.removeprefix(PREFIX): x for name, x in keywords.items() if x is not None}
        return cls(**given, explicit=frozenset(given))


FLAGS = tuple(Flag(f.name, f.default, **f.metadata) for f in fields(KvPolicyConfig) if f.metadata)
_BY_NAME = {flag.name: flag for flag in FLAGS}


def requests_may_set() -> bool:
    """Whether requests may bring settings of their own."""
    return os.environ.get(PER_REQUEST) == "1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the "KV policy" group. Every default is None, so that what a user set stays visible."""
    group = parser.add_argument_group("KV policy", "KV-cache eviction by sglang-tri")
    for flag in FLAGS:
        default = {True: "on", False: "off", None: "none"}.get(flag.default, flag.default)
        text = f"{flag.help} (default: {default})"
        add = partial(group.add_argument, flag.option, dest=flag.keyword, default=None, help=text)
        if flag.default is True:
            add(action=argparse.BooleanOptionalAction)
        elif flag.default is False:
            add(action="store_true")
        else:
            add(type=int if isinstance(flag.default, int) else str, choices=flag.choices)


def from_namespace(namespace: argparse.Namespace) -> KvPolicyConfig:
    """From the parsed command line (see `add_arguments`)."""
    values = vars(namespace)
    # A parser that was built before the plugin was loaded has none of them.
    return KvPolicyConfig.from_keywords({flag.keyword: values.get(flag.keyword) for flag in FLAGS})


def _check_type(flag: Flag, value: Any) -> None:
    if flag.choices is not None:
        if value in flag.choices:
            return
        known = ", ".join(flag.choices)
        raise KvPolicyError(f"{flag.option} {shown(value)} is not known: use one of {known}.")
    if flag.default is None and value is None:
        return
    wanted: type = str if flag.default is None else type(flag.default)
    if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        raise KvPolicyError(f"{flag.option} {shown(value)} must be of type {wanted.__name__}.")
