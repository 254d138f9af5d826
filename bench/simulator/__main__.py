"""Generate greedily under a policy: `python -m bench.simulator --model DIR --policy streaming`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer

from . import Oracle, make_policy
from .policies import MODES
from .registry import POLICIES


def main() -> None:
    """Print the generated text and one line a round."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--stats", type=Path)
    parser.add_argument("--policy", default="none", choices=("none", *POLICIES))
    parser.add_argument("--mode", default="per-head", choices=MODES)
    parser.add_argument("--budget", type=int, default=64, help="tokens")
    parser.add_argument("--interval", type=int, default=32, help="tokens")
    parser.add_argument("--page-size", type=int, default=1, help="tokens")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--prompt", default="Hello there.")
    parser.add_argument("--float64", action="store_true")
    args = parser.parse_args()
    options = {"mode": args.mode} if args.policy == "triattention" else {}
    policy = make_policy(args.policy, args.budget, args.interval, **options)
    oracle = Oracle(args.model, args.stats, torch.float64 if args.float64 else torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    prompt = tokenizer(args.prompt).input_ids
    result = oracle.generate(prompt, args.tokens, policy, args.page_size)
    print(tokenizer.decode(result.output_ids.tolist()))
    for done in result.rounds:
        sets = "x".join(map(str, done.kept.shape[:2]))
        print(
            f"before token {done.step}: length {done.length}, {done.candidates} candidates, "
            f"{done.kept.shape[2]} kept in {sets} sets, margin {done.margin:.3g}"
        )


if __name__ == "__main__":
    main()
