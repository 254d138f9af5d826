"""The `sglang-tri` command."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from sglang_tri import __version__, config
from sglang_tri.errors import KvPolicyError
from sglang_tri.patches import calibrate, doctor, reference
from sglang_tri.patches.cpu import activation
from sglang_tri.statistics import commands


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script; returns the exit status."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.command != "calibrate":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if arguments.command in ("doctor", "calibrate"):
        # Both stand for a server with a policy, and have not imported SGLang yet.
        os.environ.update(activation.environment())
    try:
        if arguments.command == "doctor":
            return doctor.run(config.from_namespace(arguments), arguments.model_path)
        if arguments.command == "calibrate":
            calibrate.run(arguments.output, rest)
        else:
            arguments.run(arguments)
    except (KvPolicyError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sglang-tri", description="KV-cache eviction for SGLang: tools beside the server."
    )
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(dest="command", required=True)
    examine = subparsers.add_parser(
        "doctor", help="say whether the policy would run here, and why not (exit status 1)"
    )
    examine.add_argument("--model-path", help="also check this model's configuration")
    config.add_arguments(examine)
    measure = subparsers.add_parser(
        "calibrate",
        help="measure a model's query statistics with the engine, without serving",
        epilog="All other flags are those of sglang.launch_server; --model-path is needed.",
        allow_abbrev=False,
    )
    measure.add_argument(
        "-o", "--output", type=Path, required=True, help="file to write, .safetensors or .pt"
    )
    commands.add_parser(subparsers)
    refused = subparsers.add_parser("refusals", help="list what a policy cannot run with")
    refused.set_defaults(run=lambda _: print(reference.refusals()))
    return parser


if __name__ == "__main__":
    sys.exit(main())
