"""`sgl.Engine` takes the same settings by name; here with the radix cache off.

Messages are packed by declared types here, which SGLang 0.5.17 does not do by default.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.simulator.oracle import Oracle
from bench.simulator.registry import make_policy
from tests.client import tokens_of

SCRIPT = """
import json, sys
import sglang as sgl

if __name__ == "__main__":
    model, stats, prompt = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    with sgl.Engine(
        model_path=model,
        kv_policy="triattention",
        kv_budget=40,
        kv_interval=20,
        kv_normalize=False,
        kv_stats=stats,
        disable_radix_cache=True,
        max_total_tokens=2048,
    ) as engine:
        params = {"max_new_tokens": 200, "temperature": 0, "ignore_eos": True}
        answers = [
            engine.generate(input_ids=prompt, sampling_params=params, return_logprob=True)
            for _ in range(2)
        ]
        refused = []
        for own in json.loads(sys.argv[4]):
            try:
                engine.generate(input_ids=prompt, sampling_params={**params, **own})
            except ValueError as error:
                refused.append(str(error))
        info = engine.get_server_info()["internal_states"][0]["kv_policy"]
        print(json.dumps({"answers": answers, "refused": refused, "info": info}))
"""
PROMPT = tokens_of("An engine without a server, and without a radix cache.")
# Sampling parameters that are refused, and what is said of them.
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"custom_params": {"kv_policy": 5}}, "custom_params['kv_policy'] 5 is not public"),
    ({"custom_params": {"kv_policy": True}}, "custom_params['kv_policy'] True is not public"),
    ({"custom_params": {"kv_policy": {"budget": 20}}}, "{'budget': 20} is not public"),
    ({"custom_params": {"mine": {"nested": [1]}}}, "custom_params {'mine': {'nested': [1]}}"),
    ({"skip_special_tokens": 1}, "skip_special_tokens 1 does not work"),
    ({"max_new_tokens": 16.5}, "max_new_tokens 16.5 does not work"),
]


@pytest.mark.server
def test_engine_with_radix_cache_off(servers: Any, tmp_path: Path) -> None:
    model = servers.model("qwen3")
    script = tmp_path / "engine.py"
    script.write_text(SCRIPT)
    arguments = [str(model), str(model / "stats.pt")]
    arguments += [json.dumps(PROMPT), json.dumps([own for own, _ in REFUSED])]
    result = subprocess.run(
        [sys.executable, str(script), *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, "SGLANG_USE_PICKLE_IPC": "0"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    output = json.loads(result.stdout.strip().splitlines()[-1])
    assert output["info"]["requests_evicted"] == 2
    assert output["info"]["requests_refused"] == len(REFUSED)
    for message, (_, said) in zip(output["refused"], REFUSED, strict=True):
        assert said in message
    oracle = Oracle(model, model / "stats.pt")
    policy = make_policy("triattention", budget=40, interval=20, normalize=False)
    for answer in output["answers"]:
        assert answer["meta_info"]["kv_policy"]["rounds"] >= 5
        assert answer["meta_info"]["cached_tokens"] == 0
        pairs = answer["meta_info"]["output_token_logprobs"]
        judged = oracle.replay(PROMPT, [token for _, token, _ in pairs], policy)
        logprobs = np.array([logprob for logprob, _, _ in pairs])
        assert np.abs(judged.logprobs - logprobs).max() < 1e-4
