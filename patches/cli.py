"""The `sglang-tri` command."""

from __future__ import annotations

import argparse
import sys

from sglang_tri import __version__, config
from sglang_tri.errors import KvPolicyError
from sglang_tri.patches import doctor


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="sglang-tri", description="KV-cache eviction for SGLang: tools beside the server."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    examine = commands.add_parser(
        "doctor", help="say whether the policy would run here, and why not (exit status 1)"
    )
    examine.add_argument("--model-path", help="also check this model's configuration")
    config.add_arguments(examine)
    arguments = parser.parse_args(argv)
    try:
        settings = config.from_namespace(arguments)
    except KvPolicyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return doctor.run(settings, arguments.model_path)


if __name__ == "__main__":
    sys.exit(main())
