"""Two long chats over one system prompt, in few KV slots, then in as many as they like.

Starts the real SGLang server twice, with `--kv-policy triattention` and without, holds the same
two multi-turn chats through the openai client, and prints what each needed. Fails unless slots
were evicted, peak slots obey the bound, and the radix cache hit as in stock SGLang, in the second
turn over the compressed first one.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import openai
from openai.types.chat.chat_completion import Choice
from tqdm import tqdm

from bench.decode_log import DecodeLog
from bench.server import Server
from bench.tiny_models import make_model

BUDGET, INTERVAL, TOKENS, CHATS, TURNS = 256, 64, 1536, 2, 2
LOG_STEPS = 1
SYSTEM = (
    "You are a patient assistant. Think step by step, write down every intermediate result, "
    "and check it before you go on. Answer in plain text. "
) * 3
QUESTIONS = ("Plan a bicycle tour along the river.", "Sort these names and say how you did it.")
FOLLOW_UP = "Go on, and mind what you said before."
POLICY = ["--kv-policy", "triattention", "--kv-budget", str(BUDGET), "--kv-interval", str(INTERVAL)]


@dataclass(frozen=True)
class Answer:
    """What one answer cost, in tokens."""

    prompt: int
    cached: int
    generated: int
    evicted: int


@dataclass(frozen=True)
class Turn:
    """One turn of all chats, held at once.

    Attributes:
        answers: one for each chat.
        peak_slots: most KV slots in use, over all chats.
        seconds: wall-clock time.
    """

    answers: list[Answer]
    peak_slots: int
    seconds: float


@dataclass(frozen=True)
class Arm:
    """All turns on one server."""

    name: str
    turns: list[Turn]
    resident_generated_max: int


def run_arm(name: str, model: Path, policy: list[str], folder: Path) -> Arm:
    """Start a server, hold all chats, stop it."""
    arguments = [*policy, "--decode-log-interval", str(LOG_STEPS)]
    bar = tqdm(total=CHATS * TURNS * TOKENS, desc=f"{name}: starting", unit="tok")
    log = folder / f"{name}.log"
    with Server(model, arguments, log, on_wait=bar.refresh) as server, bar:
        bar.set_description(name)
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=1800)
        # From here on the radix cache holds all that the chats share, whichever comes first.
        ask(client, opening(""), tokens=8)
        chats = [opening(question) for question in QUESTIONS]
        turns = []
        for _ in range(TURNS):
            decode_log = DecodeLog(log)
            began = time.monotonic()
            with follow(decode_log, bar), ThreadPoolExecutor(CHATS) as pool:
                answers = list(pool.map(lambda chat: take_turn(client, chat), chats))
            turns.append(Turn(answers, decode_log.peak_slots, time.monotonic() - began))
        report = server.internal_state().get("kv_policy", {})
    return Arm(name, turns, report.get("resident_generated_max", 0))


@contextmanager
def follow(log: DecodeLog, bar: tqdm) -> Iterator[None]:
    """Advance the bar as the server logs decode steps."""
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.5):
            bar.update(sum(line.running * LOG_STEPS for line in log.read_new()))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()
        log.read_new()


def opening(question: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]


def ask(client: openai.OpenAI, messages: list[dict[str, str]], tokens: int) -> Choice:
    """One answer of exactly `tokens` tokens."""
    answer = client.chat.completions.create(
        model="tiny",
        messages=messages,  # type: ignore[arg-type]
        max_tokens=tokens,
        temperature=0,
        extra_body={"ignore_eos": True, "return_meta_info": True},
    )
    return answer.choices[0]


def take_turn(client: openai.OpenAI, chat: list[dict[str, str]]) -> Answer:
    """One answer over the whole history, which grows by it and by the next question."""
    choice = ask(client, chat, TOKENS)
    chat.append({"role": "assistant", "content": choice.message.content or ""})
    chat.append({"role": "user", "content": FOLLOW_UP})
    info = choice.meta_info  # type: ignore[attr-defined]
    return Answer(
        info["prompt_tokens"],
        info["cached_tokens"],
        info["completion_tokens"],
        info.get("kv_policy", {}).get("evicted_tokens", 0),
    )


def print_table(arms: list[Arm]) -> None:
    columns = ("turn", *(field.name for field in fields(Answer)), "peak slots", "tokens/s")
    print(f"{'':14}" + "".join(f"{column:>14}" for column in columns))
    for arm in arms:
        for number, turn in enumerate(arm.turns, 1):
            sums = [
                " + ".join(str(v) for v in row)
                for row in zip(*map(astuple, turn.answers), strict=True)
            ]
            speed = sum(answer.generated for answer in turn.answers) / turn.seconds
            cells = (number, *sums, turn.peak_slots, f"{speed:.0f}")
            print(f"{arm.name:14}" + "".join(f"{cell:>14}" for cell in cells))


def problems(policy: Arm, stock: Arm) -> list[str]:
    """What the demo was to show and did not."""
    found = []
    if policy.resident_generated_max > BUDGET + INTERVAL:
        found.append(f"a request held {policy.resident_generated_max} generated tokens")
    previous = [0] * CHATS
    for number, (ours, theirs) in enumerate(zip(policy.turns, stock.turns, strict=True), 1):
        bound = sum(answer.prompt + BUDGET + INTERVAL for answer in ours.answers)
        if ours.peak_slots > bound:
            found.append(f"turn {number}: {ours.peak_slots} slots, more than {bound}")
        if not all(answer.evicted for answer in ours.answers):
            found.append(f"turn {number}: an answer had no token evicted")
        cached = [answer.cached for answer in ours.answers]
        if number == 1 and cached != [answer.cached for answer in theirs.answers]:
            found.append(f"turn 1: {cached} tokens cached, other than stock")
        # The answer before was compressed; all but its last token can be gone on from.
        if any(now < before - 1 for now, before in zip(cached, previous, strict=True)):
            found.append(f"turn {number}: {cached} tokens cached, less than the last history")
        previous = [answer.prompt + answer.generated for answer in ours.answers]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep-logs", type=Path, help="folder for the servers' logs")
    arguments = parser.parse_args()
    folder = arguments.keep_logs or Path(tempfile.mkdtemp(prefix="sglang-tri-demo-"))
    folder.mkdir(parents=True, exist_ok=True)
    print("Making a tiny random model ...")
    model = make_model("qwen3", folder / "model")
    policy = run_arm("triattention", model, POLICY, folder)
    stock = run_arm("stock", model, [], folder)
    print_table([policy, stock])
    found = problems(policy, stock)
    for problem in found:
        print(f"FAILED: {problem}")
    print(f"Servers' logs: {folder}" if found else "All checks passed.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
