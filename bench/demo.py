"""Six chats at once in a KV pool for three, with a pretrained model.

Starts the real SGLang server twice, with `--kv-policy triattention` and as it is, both with the
same small KV pool. Six chats ask for long texts through the openai client, all at once; then all
go on from what was written. Prints what both servers made of it, and how one text ends on each.

Fails (exit status 1) unless all chats had tokens evicted, no request held more than the policy
allows, the second turn went on from compressed history, and the policy had more tokens/s than stock
SGLang. The model is SmolLM2-135M-Instruct (`python -m bench.models list`), or one of your own.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from bench.arms import Arm, running, triattention
from bench.chats.checks import problems
from bench.chats.questions import FOLLOW_UP, QUESTIONS
from bench.chats.report import excerpts, gain, measured
from bench.chats.turns import LOG_STEPS, Outcome, hold
from bench.machine import machine
from bench.models import ModelUnavailable, get
from bench.server import STOCK_ENVIRONMENT
from sglang_tri.statistics import cache

MODEL = "smollm2"
BUDGET, INTERVAL = 96, 32
HELD = BUDGET + INTERVAL
"""Generated tokens that a request may hold, at page size 1."""
POOL = 1280
"""KV slots: all chats fit if they are evicted from, also if one has to be prefilled anew."""
TOKENS = (384, 24)
"""Of the answers in the first turn; at most, in the second."""
SHOWN = 5
"""The chat whose texts are printed."""


def arms() -> list[Arm]:
    """The policy, and production SGLang with its defaults."""
    common = ["--max-total-tokens", str(POOL), "--enable-cache-report"]
    common += ["--decode-log-interval", str(LOG_STEPS)]
    policy = [*triattention("auto", BUDGET, INTERVAL), "--kv-calibration-tokens", "4096"]
    kept = {cache.FOLDER: str(cache.folder())}
    return [
        Arm("triattention", [*common, *policy], kept),
        Arm("stock", common, STOCK_ENVIRONMENT),
    ]


def hold_all(model: Path, folder: Path) -> tuple[Outcome, Outcome]:
    """All chats on both servers, one after the other; the servers' logs lie in `folder`."""
    compared = arms()
    with (
        tqdm(
            total=len(compared) * len(QUESTIONS) * sum(TOKENS), unit="tok", desc="starting"
        ) as bar,
        running(compared, model, folder, bar.refresh) as servers,
    ):
        outcomes = []
        for name, server in servers.items():
            bar.set_description(name)
            outcomes.append(hold(server, name, QUESTIONS, FOLLOW_UP, TOKENS, bar.update))
    policy, stock = outcomes
    return policy, stock


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-path", type=Path, help=f"a chat model's folder; default: {MODEL}")
    parser.add_argument("--keep-logs", type=Path, help="folder for the servers' logs and all texts")
    arguments = parser.parse_args()
    try:
        model = arguments.model_path or get(MODEL)
    except ModelUnavailable as error:
        print(error, file=sys.stderr)
        return 1
    folder = arguments.keep_logs or Path(tempfile.mkdtemp(prefix="sglang-tri-demo-"))
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    policy, stock = hold_all(model, folder)
    seconds = time.monotonic() - began
    texts = {o.name: [answer.text for answer in o.first] for o in (policy, stock)}
    (folder / "texts.json").write_text(json.dumps(texts, indent=1))
    chats = f"{len(QUESTIONS)} chats at once, {TOKENS[0]} tokens each"
    print(f"\n{model.name}: {chats}, {POOL:,} KV slots")
    print(f"{machine()}, {os.cpu_count()} cores; {seconds:.0f} s with the servers' starts\n")
    print(measured(policy, stock), gain(policy, stock, POOL), sep="\n\n")
    print("\n" + excerpts(QUESTIONS[SHOWN], policy, stock, SHOWN, HELD) + "\n")
    found = problems(policy, stock, HELD, POOL)
    for problem in found:
        print(f"FAILED: {problem}")
    print(f"Servers' logs and all texts: {folder}" if found else "All checks passed.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
