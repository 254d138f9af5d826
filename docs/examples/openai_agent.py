"""An agent of several turns with the openai client; each turn goes on from compressed history.

python docs/examples/openai_agent.py --base-url http://127.0.0.1:30000
"""

from __future__ import annotations

import argparse
from typing import Any

import openai


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-url", default="http://127.0.0.1:30000", help="a server with policy")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=8192, help="length of an answer")
    parser.add_argument(
        "--answer-start",
        default="",
        help="what the chat template begins an answer with, in a shell for example $'<think>\\n'",
    )
    options = parser.parse_args()

    client = openai.OpenAI(base_url=f"{options.base_url}/v1", api_key="none")
    model = client.models.list().data[0].id
    messages: list[Any] = [{"role": "user", "content": "Plan a week of training, day by day."}]
    for turn in range(1, options.turns + 1):
        answer = client.chat.completions.create(
            model=model,
            messages=messages,
            max_tokens=options.max_tokens,
            temperature=0,
            extra_body={"return_meta_info": True},
        )
        choice = answer.choices[0]
        report(turn, choice.meta_info)  # type: ignore[attr-defined]
        # The next prompt must contain the very text that was generated: send all of it back.
        text = options.answer_start + (choice.message.content or "")
        said = {"role": "assistant", "content": text}
        if reasoning := getattr(choice.message, "reasoning_content", None):
            said["reasoning_content"] = reasoning
        messages += [said, {"role": "tool", "content": f'{{"weather on day {turn}": "rain"}}'}]


def report(turn: int, info: dict[str, Any]) -> None:
    """What the policy did, from the answer's `meta_info`."""
    policy = info["kv_policy"]
    print(
        f"turn {turn}: {info['cached_tokens']} of {info['prompt_tokens']} prompt tokens cached, "
        f"{policy['history']} history, {policy['evicted_tokens']} evicted "
        f"in {policy['rounds']} rounds"
    )


if __name__ == "__main__":
    main()
