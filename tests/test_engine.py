"""`sgl.Engine` takes the same settings by name; here with the radix cache off."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

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
        info = engine.get_server_info()["internal_states"][0]["kv_policy"]
        print(json.dumps({"answers": answers, "info": info}))
"""
PROMPT = tokens_of("An engine without a server, and without a radix cache.")


def test_engine_with_radix_cache_off(servers: Any, tmp_path: Path) -> None:
    model = servers.model("qwen3")
    script = tmp_path / "engine.py"
    script.write_text(SCRIPT)
    result = subprocess.run(
        [sys.executable, str(script), str(model), str(model / "stats.pt"), json.dumps(PROMPT)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    output = json.loads(result.stdout.strip().splitlines()[-1])
    assert output["info"]["requests_evicted"] == 2
    oracle = Oracle(model, model / "stats.pt")
    policy = make_policy("triattention", budget=40, interval=20, normalize=False)
    for answer in output["answers"]:
        assert answer["meta_info"]["kv_policy"]["rounds"] >= 5
        assert answer["meta_info"]["cached_tokens"] == 0
        pairs = answer["meta_info"]["output_token_logprobs"]
        judged = oracle.replay(PROMPT, [token for _, token, _ in pairs], policy)
        logprobs = np.array([logprob for logprob, _, _ in pairs])
        assert np.abs(judged.logprobs - logprobs).max() < 1e-4
