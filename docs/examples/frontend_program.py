"""A program in SGLang's frontend language: it thinks, then branches over its compressed thoughts.

python docs/examples/frontend_program.py --base-url http://127.0.0.1:30000
"""

from __future__ import annotations

import argparse
from typing import Any

import sglang as sgl

WAYS = ("careful", "quick")


@sgl.function
def branching(s: Any, length: int) -> None:
    """Generate a thought, fork, sketch two ways to go on, and conclude from both."""
    s += "How does one cross a river with a wolf, a goat and a cabbage?\n"
    s += sgl.gen("thought", max_tokens=length)
    s += "\nThere are two ways to go on.\n"
    s.sync()  # The forks share what has been computed by now.
    forks = s.fork(len(WAYS))
    for fork, way in zip(forks, WAYS, strict=True):
        fork += f"The {way} way: "
        fork += sgl.gen(way, max_tokens=48)
    for fork, way in zip(forks, WAYS, strict=True):
        s += f"The {way} way: {fork[way]}\n"
        report(way, fork.get_meta_info(way))
    s += "In short: "
    s += sgl.gen("conclusion", max_tokens=length)


def report(name: str, info: dict[str, Any]) -> None:
    """What the policy did, from the `meta_info` of one `gen`."""
    policy = info["kv_policy"]
    print(
        f"{name}: {info['cached_tokens']} of {info['prompt_tokens']} prompt tokens cached, "
        f"{policy['history']} history, {policy['evicted_tokens']} evicted "
        f"in {policy['rounds']} rounds"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-url", default="http://127.0.0.1:30000", help="a server with policy")
    parser.add_argument("--max-tokens", type=int, default=4096, help="length of the thought")
    options = parser.parse_args()
    backend = sgl.RuntimeEndpoint(options.base_url)
    state = branching.run(options.max_tokens, backend=backend, temperature=0)
    for name in ("thought", "conclusion"):
        report(name, state.get_meta_info(name))


if __name__ == "__main__":
    main()
