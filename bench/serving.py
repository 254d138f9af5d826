"""What freed slots are worth: the policy against production SGLang, in pools of several sizes.

The servers of a pool get the same load from SGLang's own client: long reasoning behind one system
prompt, sent at once. They are production SGLang (radix cache, overlap scheduling, CUDA graphs), the
same with other estimates of output lengths (SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION), SGLang with
radix cache and overlap scheduling off, and the policy. Pools are sized by how many of these
requests production SGLang has room for, to the last token. In the memory-rich pool the client's
generated-shared-prefix and random workloads run, too, and one whose outputs are too short to be
evicted from. Short runs scatter: `--times 10` sends ten times as many requests, no more of them at
once.

`--preset quick --limit 300` takes minutes on one GPU of 80 GB: Qwen3-8B's shape, one small pool.

Beside each measured ratio stands what it would be if a decoding step took as long as reading the
weights and the KV slots of its batch, at the batch sizes that were measured.

All outputs have the length that was asked for. Without a radix cache SGLang reserves such outputs
in full, whatever it estimates: "constrained" never takes in more than fit.

Exit status 1 if reasoning finds less in the prefix cache than in production SGLang, if a round
happens where none is due, if a signal ends the bench, or if anything has no run at all. Times are
printed, and judged, but do not fail. SIGTERM, SIGINT and `--limit` leave what was measured.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path

import requests
from tqdm import tqdm

from bench.cutoff import Clock, Interrupted, TimeUp, cut_off
from bench.load.cells import group
from bench.load.client import Client, LoadFailed
from bench.load.goals import judge
from bench.load.options import parse
from bench.load.plan import Planned, all_measured, left_out
from bench.load.presets import Preset
from bench.load.report import Results, report
from bench.load.run import Run
from bench.load.sweep import DoesNotFit, Sweep
from bench.load.traffic import traffic_of
from bench.models.tokenizer import write_printable_tokenizer
from bench.server import ServerFailed

# One pool's failure must not cost what other pools have shown.
FAILURES = (
    DoesNotFit,
    LoadFailed,
    ServerFailed,
    BrokenProcessPool,
    requests.RequestException,
)


@dataclass
class Found:
    """What was measured so far.

    Attributes:
        kept: file that holds the runs, too: the next one may fail.
    """

    kept: Path
    planned: Planned = field(default_factory=Planned)
    runs: list[Run] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def add(self, run: Run) -> None:
        self.runs.append(run)
        with self.kept.open("a") as file:
            print(json.dumps(asdict(run)), file=file)


def main(argv: Sequence[str] | None = None) -> int:
    arguments, preset = parse(argv, __doc__ or "")
    clock = Clock(arguments.limit)
    folder = Path(tempfile.mkdtemp(prefix="sglang-tri-serving-"))
    model, tokenizer = _model(arguments, preset, folder)
    traffic = traffic_of(model)
    found = Found(arguments.output.with_suffix(".jsonl"))
    found.kept.parent.mkdir(parents=True, exist_ok=True)
    found.kept.unlink(missing_ok=True)
    print(f"Logs: {folder}; runs, as they are measured: {found.kept}")
    try:
        with (
            cut_off(clock),
            tqdm(unit="run") as bar,
            Client(folder, model, tokenizer) as client,
        ):
            tell, wait = bar.set_description, bar.refresh
            sweep = Sweep(preset, arguments, model, client, folder, tell, wait, clock)
            _measure(sweep, found, bar)
    except TimeUp as error:
        print(error)
    except Interrupted as error:
        found.failures.append(str(error))
    groups = group(found.runs, traffic)
    results = Results(
        command=shlex.join(["python", "-m", "bench.serving", *(argv or sys.argv[1:])]),
        settings={**vars(arguments), **vars(preset)},
        traffic=traffic,
        groups=groups,
        goals=judge(groups, preset.goal),
        left_out=left_out(found.planned, found.runs),
        failures=found.failures,
        seconds=clock.seconds,
    )
    report(results, arguments.output)
    failed = any(goal.failed for goal in results.goals)
    return 1 if failed or found.failures or not all_measured(found.planned, found.runs) else 0


def _model(arguments: argparse.Namespace, preset: Preset, folder: Path) -> tuple[Path, Path]:
    """Folders of the model and of the tokenizer that prompts are written with."""
    if arguments.model_path:
        return arguments.model_path, arguments.model_path
    tokenizer = folder / "tokenizer"
    write_printable_tokenizer(tokenizer)
    return preset.make_model(folder / "model"), tokenizer


def _measure(sweep: Sweep, found: Found, bar: tqdm[None]) -> None:
    pools = sweep.preset.pools()
    for pool in pools:
        found.planned += sweep.planned(pool)
    for pool in pools:
        try:
            # Closed at once, its servers stop before anything else ends.
            with closing(sweep.measure(pool)) as runs:
                for run in runs:
                    found.add(run)
                    bar.update()
        except FAILURES as error:
            found.failures.append(f"pool {pool.name}: {error}")
            tqdm.write(found.failures[-1])


if __name__ == "__main__":
    sys.exit(main())
