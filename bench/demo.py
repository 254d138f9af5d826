"""Six chats at once in a KV pool for three, with a pretrained model.

Starts the real SGLang server twice, with `--kv-policy triattention` and as it is, both with the
same small KV pool. Six chats ask for long texts through the openai client, all at once; then all
go on from what was written. Prints what both servers made of it, and how one text ends on each;
writes all texts and figures as JSON, and a picture beside it.

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
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median

from tqdm import tqdm

from bench import metrics, pictures
from bench.agent.answers import Answer, chat, chat_client, total
from bench.arms import Arm, running, triattention
from bench.cutoff import Clock, cut_off
from bench.machine import machine
from bench.models import ModelUnavailable, get
from bench.server import STOCK_ENVIRONMENT, Server
from bench.table import table
from sglang_tri.statistics import cache

BUDGET, INTERVAL = 96, 32
HELD = BUDGET + INTERVAL
"""Generated tokens that a request may hold, at page size 1."""
POOL = 1280
"""KV slots: all chats fit if they are evicted from, also if one has to be prefilled anew."""
TOKENS, MORE_TOKENS = 384, 24
"""Of the answers in the first turn; at most, in the second."""
PENALTY = 1.1
"""Of repetitions. The more, the more words in other tokens than a tokenizer makes of them."""
CACHED = 0.6
"""Least share of the second turn's prompts: texts that come back in other tokens are not found."""
QUESTIONS = (
    "Write a long essay about the advantages and disadvantages of electric cars.",
    "Explain in great detail, in ten steps, how to plan and plant a vegetable garden.",
    "Write a long essay about how the steam engine changed work, travel and cities.",
    "Write a long essay about why sleep is important for body and mind.",
    "Write a long essay about why it is worth reading books.",
    "Write a long article about the life of bees.",
)
FOLLOW_UP = "Sum up what you have written in one sentence."
SHOWN, EXCERPT = 5, 400
"""The chat whose texts are printed, and how many characters: the beginning says nothing, as it was
written before anything was evicted."""


@dataclass(frozen=True)
class Outcome:
    """All chats on one server.

    Attributes:
        first, second: one answer for each chat.
        seconds: until the first turns of all chats had ended.
        running: requests at once in the first turn, on average over time.
        retracted: how often a request lost its slots to others, in both turns.
        peak_slots: most KV slots in use, in both turns.
        held: most generated tokens that a request held; 0 on a server without a policy.
    """

    name: str
    first: list[Answer]
    second: list[Answer]
    seconds: float
    running: float
    retracted: int
    peak_slots: int
    held: int

    @property
    def tokens_per_second(self) -> float:
        """Of the first turn."""
        return total(self.first, "generated") / self.seconds

    @property
    def slots(self) -> int:
        """Most that a chat holds after the first turn."""
        return max(answer.slots for answer in self.first)

    @property
    def cached_share(self) -> float:
        """Of the prompts of the second turn."""
        return total(self.second, "cached") / total(self.second, "prompt")

    @property
    def first_token_s(self) -> float:
        """In the second turn, median."""
        return median(answer.first_token_s for answer in self.second)


def arms() -> list[Arm]:
    """The policy, and production SGLang with its defaults."""
    common = ["--max-total-tokens", str(POOL), *metrics.FLAGS, "--decode-log-interval", "5"]
    policy = [*triattention("auto", BUDGET, INTERVAL), "--kv-calibration-tokens", "4096"]
    kept = {cache.FOLDER: str(cache.folder())}
    return [
        Arm("triattention", [*common, *policy], kept),
        Arm("stock", common, STOCK_ENVIRONMENT),
    ]


def hold_all(model: Path, folder: Path) -> tuple[Outcome, Outcome]:
    """All chats on both servers, one after the other; the servers' logs lie in `folder`."""
    total = len(QUESTIONS) * (TOKENS + MORE_TOKENS)
    with (
        tqdm(total=2 * total, unit="tok", desc="starting") as bar,
        running(arms(), model, folder, bar.refresh) as servers,
    ):
        outcomes = []
        for name, server in servers.items():
            bar.set_description(name)
            outcomes.append(hold(name, server, bar))
    policy, stock = outcomes
    return policy, stock


def hold(name: str, server: Server, bar: tqdm) -> Outcome:
    """Both turns of all chats on a running server."""
    client, done = chat_client(server), bar.n

    def ask(history: list[dict[str, str]], tokens: int, **options: object) -> Answer:
        return Answer.of(*chat(client, history, max_tokens=tokens, **options))

    def write(question: str) -> Answer:
        """As long as it may be: servers must do equal work."""
        options = {"min_tokens": TOKENS, "repetition_penalty": PENALTY}
        return ask([{"role": "user", "content": question}], TOKENS, **options)

    def go_on(question: str, written: Answer) -> Answer:
        texts = {"user": question, "assistant": written.text}
        history = [{"role": role, "content": text} for role, text in texts.items()]
        return ask([*history, {"role": "user", "content": FOLLOW_UP}], MORE_TOKENS)

    def show(sample: metrics.Sample) -> None:
        bar.update(done + sample.decoded - bar.n)

    ask([{"role": "user", "content": "Hello"}], 1)  # All chats begin with its first tokens.
    with ThreadPoolExecutor(len(QUESTIONS)) as pool:
        with metrics.Watch(server.url, show) as watch:
            began = time.monotonic()
            first = list(pool.map(write, QUESTIONS))
            seconds = time.monotonic() - began
        with metrics.Watch(server.url, show) as again:
            second = list(pool.map(go_on, QUESTIONS, first))
    report = server.internal_state().get("kv_policy", {})
    return Outcome(
        name,
        first,
        second,
        seconds,
        running=fmean(sample.running for sample in watch.decoding),
        retracted=watch.retracted + again.retracted,
        peak_slots=max(watch.peak_slots, again.peak_slots),
        held=report.get("resident_generated_max", 0),
    )


def measured(policy: Outcome, stock: Outcome) -> str:
    """One row for each figure, one column for each server, and the gain in a line."""
    whole = max(answer.prompt + answer.generated for answer in policy.first)
    rows: dict[str, Callable[[Outcome], str]] = {
        "First turn: requests at once, mean": lambda o: f"{o.running:.1f}",
        "  generated tokens/s": lambda o: f"{o.tokens_per_second:.1f}",
        "  seconds until all had finished": lambda o: f"{o.seconds:.0f}",
        f"  KV slots of a chat of {whole} tokens": lambda o: f"{o.slots:,}",
        "Second turn: prompt tokens": lambda o: f"{total(o.second, 'prompt'):,}",
        "  of them cached": lambda o: f"{total(o.second, 'cached'):,} ({o.cached_share:.0%})",
        "  first token after, median": lambda o: f"{o.first_token_s:.1f} s",
        "Both: peak KV slots": lambda o: f"{o.peak_slots:,}",
        "  requests retracted": lambda o: str(o.retracted),
    }
    lines = [[name, of(policy), of(stock)] for name, of in rows.items()]
    faster = policy.tokens_per_second / stock.tokens_per_second
    return (
        f"{table([['', policy.name, stock.name], *lines])}\n\n"
        f"In the same {POOL:,} KV slots: {faster:.1f} times the tokens/s; in the second turn the "
        f"first token after {policy.first_token_s:.1f} s instead of {stock.first_token_s:.1f} s."
    )


def excerpts(policy: Outcome, stock: Outcome, shown: int = SHOWN) -> str:
    """How the same answer ends on both servers."""
    length = policy.first[shown].generated
    lines = [f"Asked: {QUESTIONS[shown]}"]
    for outcome, keeps in (
        (policy, f"at most {HELD} of the {length} tokens it writes"),
        (stock, "all"),
    ):
        lines.append(f"{outcome.name}, which keeps {keeps}, ends:")
        for line in outcome.first[shown].text[-EXCERPT:].split("\n"):
            lines += textwrap.wrap(line, 96, initial_indent="  | ", subsequent_indent="  | ")
    return "\n".join(lines)


def problems(policy: Outcome, stock: Outcome) -> list[str]:
    """What was to be seen and was not."""
    chats = len(policy.first)
    untouched = sum(answer.rounds == 0 for answer in policy.first)
    compressed = sum(answer.compressed for answer in policy.second)
    share, ours, theirs = policy.cached_share, policy.tokens_per_second, stock.tokens_per_second
    few = f"only {compressed} of {chats} chats went on from compressed history"
    found = {
        f"{untouched} of {chats} chats had nothing evicted": untouched > 0,
        f"a request held {policy.held} generated tokens, more than {HELD}": policy.held > HELD,
        few: compressed <= chats // 2,
        f"{share:.0%} of the second turn was cached, not {CACHED:.0%}": share < CACHED,
        "no more tokens/s than stock SGLang": ours <= theirs,
    }
    for outcome in (policy, stock):
        text = f"{outcome.name} had {outcome.peak_slots} slots in use, of {POOL}"
        found[text] = outcome.peak_slots > POOL
    return [problem for problem, there in found.items() if there]


def draw(policy: Outcome, stock: Outcome, model: str, path: Path) -> None:
    """Tokens/s, and KV slots of a chat, as bars; 700 pixels wide."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.4), dpi=100, layout="constrained")
    figure.suptitle(f"{model}, budget {BUDGET}, {len(QUESTIONS)} chats in {POOL:,} KV slots")
    figure.supxlabel(machine(), fontsize=8)
    names = [policy.name, stock.name]
    speeds = [policy.tokens_per_second, stock.tokens_per_second]
    slots = [policy.slots, stock.slots]
    panels = {"generated tokens/s": speeds, f"KV slots of a chat, {TOKENS} tokens written": slots}
    for axes, (title, values) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        axes.bar_label(axes.bar(names, values, color=["tab:green", "tab:gray"]), fmt="{:.0f}")
        axes.set_title(title, fontsize=10)
        axes.margins(y=0.12)
    figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-path", type=Path, help="a chat model's folder; default: SmolLM2")
    parser.add_argument("--output", type=Path, default=Path("results/demo.json"))
    arguments = parser.parse_args()
    try:
        model = arguments.model_path or get("smollm2")
    except ModelUnavailable as error:
        print(error, file=sys.stderr)
        return 1
    folder = Path(tempfile.mkdtemp(prefix="sglang-tri-demo-"))
    began = time.monotonic()
    with cut_off(Clock()):  # A signal leaves no server behind.
        policy, stock = hold_all(model, folder)
    seconds = time.monotonic() - began
    print(
        f"\n{model.name}: {len(QUESTIONS)} chats at once, {TOKENS} tokens each, {POOL:,} KV slots"
    )
    print(f"{machine()}, {os.cpu_count()} cores; {seconds:.0f} s with the servers' starts\n")
    print(measured(policy, stock), excerpts(policy, stock), sep="\n\n", end="\n\n")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    result = {"machine": machine(), "servers": [asdict(policy), asdict(stock)]}
    arguments.output.write_text(json.dumps(result, indent=1))
    if pictures.available():
        draw(policy, stock, model.name, arguments.output.with_suffix(".png"))
    else:
        print("No picture: there is no matplotlib.")
    found = problems(policy, stock)
    for problem in found:
        print(f"FAILED: {problem}")
    print(f"The servers' logs: {folder}" if found else "All checks passed.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
