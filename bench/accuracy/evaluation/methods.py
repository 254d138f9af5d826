"""The methods that are compared, by name."""

from __future__ import annotations

from collections.abc import Callable

from bench.simulator.baselines import Spliced
from bench.simulator.policies import Policy
from bench.simulator.registry import make_policy
from bench.simulator.variants import ByConcentration, Terms, Variant

RECENT = 8
"""The latest tokens that stay with every method: the window of R-KV and of SnapKV."""

Method = Callable[[int, int], Policy]
"""Budget and interval in tokens to a policy."""


def _named(name: str, **options: object) -> Method:
    return lambda budget, interval: make_policy(name, budget, interval, **options)


def _variant(mode: str = "per-head", normalize: bool = True, **terms: object) -> Method:
    def make(budget: int, interval: int) -> Policy:
        chosen = Terms(**terms)  # type: ignore[arg-type]
        return Variant(budget, interval, chosen, recent=RECENT, mode=mode, normalize=normalize)

    return make


def _every(tokens: int) -> Method:
    return lambda budget, _: make_policy("triattention", budget, tokens, recent=RECENT)


PUBLISHED: dict[str, Method] = {
    "full": _named("none"),
    "triattention": _named("triattention", recent=RECENT),
    "snapkv": _named("snapkv", window=RECENT),
    "adakv": _named("adakv", window=RECENT),
    "rkv": _named("rkv", window=RECENT),
    "h2o": _named("h2o"),
    "streaming": _named("streaming", recent=RECENT),
    "random": _named("random", recent=RECENT),
    "future attention": _named("future-attention", recent=RECENT),
}

ABLATIONS: dict[str, Method] = {
    "no trigonometric term": _variant(trigonometric=False),
    "no norm term": _variant(spread="none"),
    "max over offsets": _variant(offsets="max"),
    "per layer and head": _variant(mode="per-layer-per-head"),
    "union": _variant(mode="union"),
    "no z-norm": _variant(normalize=False),
}

SETTINGS: dict[str, Method] = {
    **{f"interval {tokens}": _every(tokens) for tokens in (32, 64, 128, 256, 512)},
    **{f"recent {n}": _named("triattention", recent=n) for n in (0, 4, 16, 32, 64, 128)},
}
"""TriAttention with other settings; published has an interval of the plan's, and RECENT."""

IMPROVEMENTS: dict[str, Method] = {
    "variance added": _variant(spread="both"),
    "variance instead": _variant(spread="variance"),
    "value norms": _variant(values=True),
    "first tokens": _variant(first=4),
    "budgets by R": lambda budget, interval: ByConcentration(budget, interval, recent=RECENT),
}

LOOKING_UP = ((2, 1),)
"""Layer and KV head of the models that ship: see `recall.look_ups`."""


def _spliced(but: bool) -> Method:
    return lambda budget, interval: Spliced(budget, interval, RECENT, LOOKING_UP, but)


DIAGNOSES: dict[str, Method] = {
    "future attention where it looks up": _spliced(but=False),
    "future attention elsewhere": _spliced(but=True),
}
"""TriAttention, each layer and head for itself, in all other heads."""

METHODS: dict[str, Method] = PUBLISHED | ABLATIONS | SETTINGS | IMPROVEMENTS | DIAGNOSES
LOOK_AHEAD = ("future attention", *DIAGNOSES)
"""Those that know what is to come, and so cannot decode."""


def fits(method: str, budget: int, interval: int) -> bool:
    """Whether what a method always keeps leaves room in a budget."""
    try:
        METHODS[method](budget, interval)
    except ValueError:
        return False
    return True


SERVED = {
    "full": "none",
    "triattention": "triattention",
    "variance instead": "triattention-variance",
    "streaming": "streaming",
    "random": "random",
}
"""The server's names of those that it has."""
