"""Two long chats over one system prompt, in few KV slots, then in as many as they like.

Starts the real SGLang server twice, with `--kv-policy triattention` and without, holds the same
two multi-turn chats through the openai client, and prints what each needed. Fails unless slots
were evicted, peak slots obey the bound, and the radix cache hit as in stock SGLang.
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
from dataclasses import dataclass
from pathlib import Path

import openai
from openai.types.chat.chat_completion import Choice
from tqdm import tqdm

from bench.decode_log import DecodeLog
from bench.server import Server
from bench.tiny_models import make_model, make_stats

BUDGET, INTERVAL, TOKENS, CHATS, TURNS = 256, 64, 1536, 2, 2
LOG_STEPS = 8
SYSTEM = (
    "You are a patient assistant. Think step by step, write down every intermediate result, "
    "and check it before you go on. Answer in plain text. "
) * 3
QUESTIONS = ("Plan a bicycle tour along the river.", "Sort these names and say how you did it.")
FOLLOW_UP = "Go on, and mind what you said before."
POLICY = ["--kv-policy", "triattention", "--kv-budget", str(BUDGET), "--kv-interval", str(INTERVAL)]


@dataclass(frozen=True)
class Turn:
    """What one answer cost, in tokens."""

    chat: int
    turn: int
    prompt: int
    cached: int
    generated: int
    evicted: int


@dataclass(frozen=True)
class Arm:
    """One run of all chats on one server."""

    name: str
    turns: list[Turn]
    peak_slots: int
    resident_generated_max: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return sum(turn.generated for turn in self.turns) / self.seconds


def run_arm(name: str, model: Path, policy: list[str], folder: Path) -> Arm:
    """Start a server, hold all chats at once, stop it."""
    arguments = [*policy, "--enable-cache-report", "--decode-log-interval", str(LOG_STEPS)]
    bar = tqdm(total=CHATS * TURNS * TOKENS, desc=f"{name}: starting", unit="tok", leave=True)
    log = folder / f"{name}.log"
    with Server(model, arguments, log, on_wait=bar.refresh) as server, bar:
        bar.set_description(name)
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=1800)
        ask(client, [{"role": "system", "content": SYSTEM}], tokens=8)
        decode_log = DecodeLog(log)
        began = time.monotonic()
        with follow(decode_log, bar), ThreadPoolExecutor(CHATS) as pool:
            chats = list(pool.map(lambda chat: hold_chat(client, chat), range(CHATS)))
        seconds = time.monotonic() - began
        report = server.internal_state().get("kv_policy", {})
    turns = [turn for chat in chats for turn in chat]
    resident = report.get("resident_generated_max", 0)
    return Arm(name, turns, decode_log.peak_slots, resident, seconds)


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
        bar.update(bar.total - bar.n)


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


def hold_chat(client: openai.OpenAI, chat: int) -> list[Turn]:
    """All turns of one chat, each over the whole history."""
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTIONS[chat]}]
    turns = []
    for turn in range(TURNS):
        choice = ask(client, messages, TOKENS)
        info = choice.meta_info  # type: ignore[attr-defined]
        prompt, cached = info["prompt_tokens"], info["cached_tokens"]
        evicted = info.get("kv_policy", {}).get("evicted_tokens", 0)
        turns.append(Turn(chat, turn, prompt, cached, info["completion_tokens"], evicted))
        messages.append({"role": "assistant", "content": choice.message.content or ""})
        messages.append({"role": "user", "content": FOLLOW_UP})
    return turns


def print_table(arms: list[Arm]) -> None:
    columns = (
        "",
        "chat",
        "turn",
        "prompt",
        "cached",
        "generated",
        "evicted",
        "peak slots",
        "tok/s",
    )
    print("".join(f"{column:>14}" for column in columns))
    for arm in arms:
        for row in arm.turns:
            cells = (row.chat + 1, row.turn + 1, row.prompt, row.cached, row.generated, row.evicted)
            print(f"{arm.name:>14}" + "".join(f"{cell:>14}" for cell in cells))
        totals = [sum(getattr(t, n) for t in arm.turns) for n in ("generated", "evicted")]
        print(
            f"{arm.name:>14}{'all':>14}{'':>42}{totals[0]:>14}{totals[1]:>14}"
            f"{arm.peak_slots:>14}{arm.tokens_per_second:>14.0f}"
        )


def problems(policy: Arm, stock: Arm) -> list[str]:
    """What the demo was to show and did not."""
    found = []
    if not all(turn.evicted for turn in policy.turns):
        found.append("an answer had no token evicted")
    bound = CHATS * (BUDGET + INTERVAL)
    prompts = sum(max(t.prompt for t in policy.turns if t.chat == chat) for chat in range(CHATS))
    if policy.peak_slots > prompts + bound:
        found.append(f"{policy.peak_slots} slots exceed {prompts} of prompts + {bound}")
    if policy.resident_generated_max > BUDGET + INTERVAL:
        found.append(f"a request held {policy.resident_generated_max} generated tokens")
    previous: dict[int, int] = {}
    for ours, theirs in zip(policy.turns, stock.turns, strict=True):
        if ours.turn == 0 and ours.cached != theirs.cached:
            found.append(f"chat {ours.chat + 1}: {ours.cached} cached, stock {theirs.cached}")
        if ours.turn > 0 and ours.cached < previous[ours.chat]:
            found.append(f"chat {ours.chat + 1}: lost cached tokens of its last prompt")
        previous[ours.chat] = ours.prompt
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep-logs", type=Path, help="folder for the servers' logs")
    arguments = parser.parse_args()
    folder = arguments.keep_logs or Path(tempfile.mkdtemp(prefix="sglang-tri-demo-"))
    folder.mkdir(parents=True, exist_ok=True)
    print("Making a tiny random model and its query statistics ...")
    model = make_model("qwen3", folder / "model")
    statistics = make_stats(model, folder / "stats.pt")
    policy = run_arm("triattention", model, [*POLICY, "--kv-stats", str(statistics)], folder)
    stock = run_arm("stock", model, [], folder)
    print_table([policy, stock])
    found = problems(policy, stock)
    for problem in found:
        print(f"FAILED: {problem}")
    print(f"Servers' logs: {folder}" if found else "All checks passed.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
