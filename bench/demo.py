"""Two long chats with a model that reasons, in few KV slots, then in as many as they like.

Starts the real SGLang server twice, with `--kv-policy triattention` and without, holds the same
two chats through the openai client, and prints what each needed and whether it was right. The
second question of a chat asks for values that the first answer's chain of thought came to. Fails
unless slots were evicted, peak slots obey the bound, and the radix cache hit as in stock SGLang, in
the second turn over the compressed first one. The model is the one that
`bench/reference_model/weights/concentrated` describes.
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

from bench.arms import triattention
from bench.decode_log import DecodeLog
from bench.reference_model import FOLDER
from bench.reference_model.evaluate import HELD_OUT
from bench.reference_model.tasks import Example, chat
from bench.server import Server

BUDGET, INTERVAL, CHATS, DEPTHS = 144, 32, 2, (20, 20)
TOKENS = 400
"""Of an answer, at most; the right ones have about 225."""
HELD = BUDGET + INTERVAL + 8
"""Generated tokens that a request may hold: of its reasoning, and the few behind it, which have a
budget of their own."""
LOG_STEPS = 1
POLICY = [
    *triattention(FOLDER / "stats.safetensors", BUDGET, INTERVAL),
    # Of the three modes the one that costs this model the fewest answers.
    *("--kv-eviction-mode", "per-layer-per-head"),
]
# The model was measured with this precision.
COMMON = ["--dtype", "float32", "--reasoning-parser", "qwen3"]


@dataclass(frozen=True)
class Answer:
    """What one answer cost, in tokens, and whether it was right."""

    prompt: int
    cached: int
    generated: int
    evicted: int
    right: bool


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


def run_arm(name: str, policy: list[str], folder: Path) -> Arm:
    """Start a server, hold all chats, stop it."""
    arguments = [*COMMON, *policy, "--decode-log-interval", str(LOG_STEPS)]
    chats = [chat(DEPTHS, HELD_OUT + number) for number in range(CHATS)]
    bar = tqdm(desc=f"{name}: starting", unit="tok")
    log = folder / f"{name}.log"
    with Server(FOLDER, arguments, log, on_wait=bar.refresh) as server, bar:
        bar.set_description(name)
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=1800)
        # From here on the radix cache holds all that the chats share, whichever comes first.
        ask(client, [{"role": "user", "content": "Run, print "}], tokens=1)
        histories: list[list[dict[str, str]]] = [[] for _ in chats]
        turns = []
        for questions in zip(*chats, strict=True):
            decode_log = DecodeLog(log)
            began = time.monotonic()
            with follow(decode_log, bar), ThreadPoolExecutor(CHATS) as pool:
                answers = list(pool.map(take_turn, [client] * CHATS, histories, questions))
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


def ask(client: openai.OpenAI, messages: list[dict[str, str]], tokens: int) -> Choice:
    """One answer of at most `tokens` tokens."""
    answer = client.chat.completions.create(
        model="reference",
        messages=messages,  # type: ignore[arg-type]
        max_tokens=tokens,
        temperature=0,
        extra_body={"return_meta_info": True},
    )
    return answer.choices[0]


def take_turn(client: openai.OpenAI, history: list[dict[str, str]], question: Example) -> Answer:
    """One answer over the whole history, which grows by the question and by it."""
    history.append({"role": "user", "content": question.question})
    choice = ask(client, history, TOKENS)
    content = choice.message.content or ""
    reasoning: str = choice.message.reasoning_content or ""  # type: ignore[attr-defined]
    history.append({"role": "assistant", "content": content, "reasoning_content": reasoning})
    info = choice.meta_info  # type: ignore[attr-defined]
    return Answer(
        info["prompt_tokens"],
        info["cached_tokens"],
        info["completion_tokens"],
        info.get("kv_policy", {}).get("evicted_tokens", 0),
        content.strip() == question.answer,
    )


def print_table(arms: list[Arm]) -> None:
    columns = ("turn", *(field.name for field in fields(Answer)), "peak slots", "tokens/s")
    print(f"{'':14}" + "".join(f"{column:>14}" for column in columns))
    for arm in arms:
        for number, turn in enumerate(arm.turns, 1):
            sums = [
                " + ".join("yes" if v is True else "no" if v is False else str(v) for v in row)
                for row in zip(*map(astuple, turn.answers), strict=True)
            ]
            speed = sum(answer.generated for answer in turn.answers) / turn.seconds
            cells = (number, *sums, turn.peak_slots, f"{speed:.0f}")
            print(f"{arm.name:14}" + "".join(f"{cell:>14}" for cell in cells))


def problems(policy: Arm, stock: Arm) -> list[str]:
    """What the demo was to show and did not."""
    found = []
    if policy.resident_generated_max > HELD:
        found.append(f"a request held {policy.resident_generated_max} generated tokens")
    previous = [0] * CHATS
    for number, (ours, theirs) in enumerate(zip(policy.turns, stock.turns, strict=True), 1):
        bound = sum(answer.prompt + HELD for answer in ours.answers)
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
    policy = run_arm("triattention", POLICY, folder)
    stock = run_arm("stock", [], folder)
    print_table([policy, stock])
    found = problems(policy, stock)
    for problem in found:
        print(f"FAILED: {problem}")
    print(f"Servers' logs: {folder}" if found else "All checks passed.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
