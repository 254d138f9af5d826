"""Serve tiny random models of many architectures, or one of your own, and check what they say.

For each a real SGLang server measures the query statistics itself, evicts in the mode `union`, and
is held against transformers with the evicted tokens masked. A control without eviction shows that
eviction matters. A second turn has to find the compressed first one.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from bench.accuracy.client import Answer, Ask, Recorded, send, send_all
from bench.accuracy.families.made import FAMILIES, make
from bench.accuracy.families.masked import Masked
from bench.arms import triattention
from bench.server import STRICT, Server, ServerFailed
from bench.table import table
from sglang_tri.patches.scheduler import TRACE

BUDGET, INTERVAL, TOKENS = 48, 24, 240
POOL = 4096
TOLERANCE = 1e-3
"""Nats by which log-probabilities in float32 may differ."""
TEXTS = ("Tell me of the sea.", "How many days are there in five weeks? Think first.")


@dataclass(frozen=True)
class Found:
    """What was seen of one model.

    Attributes:
        rounds: of all answers.
        before: largest difference of log-probabilities up to the first round, in nats: whether
            SGLang and transformers agree on the model at all.
        error: likewise, of all tokens.
        control: likewise, were nothing evicted.
        reused: whether the second turn found all of the first.
        failure: why there is nothing else; the end of the server's log.
    """

    rounds: int = 0
    before: float = np.inf
    error: float = np.inf
    control: float = 0.0
    reused: bool = False
    failure: str = ""

    @property
    def right(self) -> bool:
        return self.error < TOLERANCE < self.control / 10 and self.reused

    @property
    def verdict(self) -> str:
        if self.failure:
            return "did not start"
        if self.before >= TOLERANCE:
            return "SGLang and transformers differ"
        return "right" if self.right else "WRONG"

    @property
    def cells(self) -> list[str]:
        errors = (self.before, self.error, self.control)
        shown = [f"{error:.0e}" if error < np.inf else "" for error in errors]
        return [str(self.rounds), *shown, "yes" if self.reused else "no", self.verdict]


def check(model: Path, folder: Path) -> Found:
    """Serve `model`; logs and rounds go to `folder`."""
    arguments = [*triattention("auto", BUDGET, INTERVAL), "--kv-eviction-mode", "union"]
    arguments += ["--kv-calibration-tokens", "1024", "--dtype", "float32"]
    arguments += ["--max-total-tokens", str(POOL)]
    trace = folder / "rounds"
    tokenizer = AutoTokenizer.from_pretrained(model)
    asks = [
        Ask(tokenizer.encode(text), TOKENS, temperature=temperature)
        for text, temperature in zip(TEXTS, (0.0, 1.0), strict=True)
    ]
    try:
        with Server(model, arguments, folder / "log", {**STRICT, TRACE: str(trace)}) as server:
            answers = send_all(server, asks)
            reused = is_reused(send(server, Ask([*answers[0].tokens, 1], 1)), answers[0])
    except ServerFailed as error:
        return Found(failure=str(error))
    return judge(Masked(model), answers, [Recorded.read(trace, a.rid) for a in answers], reused)


def judge(decoder: Masked, answers: list[Answer], records: list[Recorded], reused: bool) -> Found:
    before, errors, controls = [], [], []
    for answer, record in zip(answers, records, strict=True):
        error = np.abs(decoder.logprobs(answer, record) - answer.logprobs)
        before.append(error[: record.lengths[0] - len(answer.ask.prompt)].max())
        errors.append(error.max())
        unevicted = decoder.logprobs(answer, Recorded([], []))
        controls.append(np.abs(unevicted - answer.logprobs).max())
    rounds = sum(len(record.kept) for record in records)
    return Found(rounds, max(before), max(errors), max(controls), reused)


def is_reused(following: Answer, answer: Answer) -> bool:
    """All but its last token, which has no KV yet."""
    return bool(following.meta["cached_tokens"] >= len(answer.tokens) - 1)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy.families", description=__doc__)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(FAMILIES)}")
    parser.add_argument("--model-path", type=Path, help="a folder of your own instead")
    given = parser.parse_args()
    if unknown := set(given.families) - set(FAMILIES):
        parser.error(f"{', '.join(sorted(unknown))}: known are {', '.join(FAMILIES)}")
    rows = [["model", "rounds", "before", "error", "not evicted", "reused", ""]]
    right = True
    for name in [str(given.model_path)] if given.model_path else given.families or list(FAMILIES):
        with tempfile.TemporaryDirectory(prefix="sglang-tri-") as made:
            folder = Path(made)
            found = check(given.model_path or make(name, folder / "model"), folder)
        rows.append([name, *found.cells])
        right &= found.right
        print(found.failure or table([rows[0], rows[-1]]), file=sys.stderr)
    print(table(rows))
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
