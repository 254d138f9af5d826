"""The command line: a preset, and what is to be otherwise than there."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from bench.cutoff import seconds_to_end
from bench.flags import positive
from bench.load.arms import CLIPPED, POLICY, PRODUCTION, clip, is_arm
from bench.load.presets import PRESETS, Preset
from sglang_tri.config import KvPolicyConfig
from sglang_tri.errors import KvPolicyError


def parse(argv: Sequence[str] | None, about: str) -> tuple[argparse.Namespace, Preset]:
    """The arguments, and the preset with what they change.

    Args:
        about: what the program does.

    Raises:
        SystemExit: something cannot work; stderr says which flag, and what would work.
    """
    parser = _parser(about)
    arguments = parser.parse_args(argv)
    preset = PRESETS[arguments.preset]
    if preset.gpu and not torch.cuda.is_available():
        parser.error(
            f"--preset {arguments.preset} serves 16 GB of bfloat16 weights and needs a GPU, and "
            "torch finds none: use --preset tiny"
        )
    _check_names(parser, arguments, preset)
    chosen = _changed(preset, arguments)
    missing = {PRODUCTION, POLICY} - set(chosen.arms)
    if missing:
        parser.error(
            f"--arms {' '.join(chosen.arms)}: ratios compare {POLICY} with {PRODUCTION}, so add "
            f"{' and '.join(sorted(missing))}"
        )
    _check_policy(parser, chosen)
    if not chosen.pools():
        known = ", ".join(dict.fromkeys(_workloads(replace(chosen, kinds=()))))
        parser.error(
            f"--workloads {' '.join(arguments.workloads)}: not in these pools, which have {known}"
        )
    return arguments, chosen


def _check_names(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace, preset: Preset
) -> None:
    for flag, names in (("--pools", arguments.pools), ("--others-in", arguments.others_in)):
        unknown = sorted(set(names or ()) - set(preset.sent))
        if unknown:
            known = ", ".join(preset.sent)
            parser.error(f"{flag} {' '.join(unknown)}: {arguments.preset} has {known}")


def _check_policy(parser: argparse.ArgumentParser, preset: Preset) -> None:
    """Servers would take minutes to say the same."""
    try:
        KvPolicyConfig(policy=POLICY, budget=preset.budget, interval=preset.interval)
    except KvPolicyError:
        least = KvPolicyConfig.recent
        small = preset.budget < least
        flag, value = ("--budget", preset.budget) if small else ("--interval", preset.interval)
        parser.error(
            f"{flag} {value} is too small for the policy, which always keeps the {least} most "
            f"recent tokens: use {least} or more"
        )


def _changed(preset: Preset, arguments: argparse.Namespace) -> Preset:
    arms = arguments.arms or preset.arms
    if arguments.clips is not None:
        plain = [name for name in arms if not name.startswith(CLIPPED)]
        arms = [*plain, *map(clip, arguments.clips)]
    return replace(
        preset,
        server=[*preset.server, *([] if arguments.model_path else preset.own)],
        budget=arguments.budget or preset.budget,
        interval=arguments.interval or preset.interval,
        arms=list(dict.fromkeys(arms)),
        systems=arguments.systems or preset.systems,
        outputs=arguments.outputs or preset.outputs,
        others_in=preset.others_in if arguments.others_in is None else arguments.others_in,
        sent={name: preset.sent[name] for name in arguments.pools or preset.sent},
        times=arguments.times,
        kinds=tuple(arguments.workloads or ()),
    )


def _workloads(preset: Preset) -> list[str]:
    return [workload.name for pool in preset.pools() for workload in pool.workloads]


def _parser(about: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.serving",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--preset", choices=PRESETS, default="tiny", help="model and sizes")
    parser.add_argument("--pools", nargs="+", help="which of the preset's pools")
    parser.add_argument("--others-in", nargs="*", help="pools that get the other workloads, too")
    parser.add_argument("--workloads", nargs="+", help="only those whose names begin so")
    arms = parser.add_mutually_exclusive_group()
    arms.add_argument(
        "--arms",
        type=_arm,
        nargs="+",
        metavar="ARM",
        help="servers to compare: production, 'clip N' (the same with another estimate of output "
        "tokens), constrained, triattention, waiting (its rounds wait for whole forward passes)",
    )
    arms.add_argument(
        "--clips", type=positive, nargs="*", help="the preset's arms, with these estimates"
    )
    parser.add_argument("--budget", type=positive, help="tokens that the policy keeps")
    parser.add_argument("--interval", type=positive, help="tokens from one round to the next")
    parser.add_argument(
        "--times", type=positive, default=1, help="times as many requests, no more of them at once"
    )
    parser.add_argument("--systems", type=positive, nargs="+", help="tokens of the system prompt")
    parser.add_argument("--outputs", type=positive, nargs="+", help="output tokens")
    parser.add_argument("--repeats", type=positive, default=2, help="runs of each workload")
    parser.add_argument(
        "--limit",
        type=seconds_to_end,
        metavar="SECONDS",
        help="end by then, with what was measured",
    )
    parser.add_argument("--model-path", type=Path, help="folder; default: the preset's own")
    parser.add_argument("--stats", default="auto", help="query statistics of that model")
    parser.add_argument("--output", type=Path, default=Path("results/serving.json"))
    parser.add_argument("server_arguments", nargs="*", help="for all servers, after --")
    return parser


def _arm(name: str) -> str:
    if not is_arm(name):
        raise argparse.ArgumentTypeError(
            f"{name} is no arm: use production, 'clip N' (N: tokens), constrained, triattention or "
            "waiting"
        )
    return name
