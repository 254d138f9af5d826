"""Two turns with `sgl.Engine` and the KV policy; the second goes on from compressed history.

python docs/examples/engine.py --model-path Qwen/Qwen3-8B
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch
from transformers import AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--budget", type=int, default=2048, help="generated tokens kept")
    parser.add_argument("--interval", type=int, default=128, help="tokens between two rounds")
    parser.add_argument("--max-tokens", type=int, default=8192, help="length of an answer")
    options = parser.parse_args()

    # SGLang chooses its platform when it is imported. A machine with a GPU needs no such line.
    if not torch.accelerator.is_available():
        os.environ.setdefault("SGLANG_PLATFORM", "sglang_tri_cpu")
    import sglang as sgl

    tokenizer = AutoTokenizer.from_pretrained(options.model_path)
    sampling = {"max_new_tokens": options.max_tokens, "temperature": 0}
    with sgl.Engine(
        model_path=options.model_path,
        kv_policy="triattention",
        kv_budget=options.budget,
        kv_interval=options.interval,
    ) as engine:
        # Token ids go back exactly as they were generated, so the history is found for certain.
        history = tokenizer("List the primes below 1000, and explain each step.\n").input_ids
        for turn in (1, 2):
            answer = engine.generate(input_ids=history, sampling_params=sampling)
            report(turn, answer["meta_info"])
            history += answer["output_ids"] + tokenizer("\nCheck your list.\n").input_ids


def report(turn: int, info: dict[str, Any]) -> None:
    """What the policy did, from the answer's `meta_info`."""
    policy = info["kv_policy"]
    print(
        f"turn {turn}: {info['cached_tokens']} of {info['prompt_tokens']} prompt tokens cached, "
        f"{policy['history']} history, {info['completion_tokens']} tokens generated, "
        f"{policy['evicted_tokens']} evicted in {policy['rounds']} rounds"
    )


if __name__ == "__main__":
    main()
