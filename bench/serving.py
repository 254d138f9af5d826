"""What freed slots are worth: the policy against production SGLang, in pools of several sizes.

The servers of a pool get the same load from SGLang's own client: long reasoning behind one system
prompt, sent at once. They are production SGLang (radix cache, overlap scheduling, CUDA graphs), the
same with other estimates of output lengths (SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION), SGLang with
radix cache and overlap scheduling off, and the policy. Pools are sized by how many of these
requests production SGLang has room for, to the last token. In the memory-rich pool the client's
generated-shared-prefix and random workloads run, too. Short runs scatter: `--times 10` sends ten
times as many requests, no more of them at once.

Beside each measured ratio stands what it would be if a decoding step took as long as reading the
weights and the KV slots of its batch, at the batch sizes that were measured.

All outputs have the length that was asked for. Without a radix cache SGLang reserves such outputs
in full, whatever it estimates: "constrained" never takes in more than fit.

Exit status 1 if reasoning finds less in the prefix cache than in production SGLang, or if a pool
could not be measured. Times are printed, and judged, but do not fail.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from pathlib import Path

import requests
from tqdm import tqdm

from bench.load.cells import group
from bench.load.client import Client, LoadFailed
from bench.load.goals import judge
from bench.load.presets import PRESETS, Preset
from bench.load.report import report
from bench.load.run import Run
from bench.load.sweep import DoesNotFit, Sweep
from bench.load.traffic import traffic_of
from bench.server import ServerFailed
from bench.tiny_tokenizer import write_printable_tokenizer

# One pool's failure must not cost what other pools have shown.
FAILURES = (
    DoesNotFit,
    LoadFailed,
    ServerFailed,
    BrokenProcessPool,
    requests.RequestException,
)


def main() -> int:
    arguments = _parser().parse_args()
    preset = _chosen(arguments)
    folder = Path(tempfile.mkdtemp(prefix="sglang-tri-serving-"))
    if arguments.model_path:
        model = tokenizer = arguments.model_path
    else:
        model, tokenizer = preset.make_model(folder / "model"), folder / "tokenizer"
        write_printable_tokenizer(tokenizer)
    traffic = traffic_of(model)
    kept: Path = arguments.output.with_suffix(".jsonl")
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.unlink(missing_ok=True)
    print(f"Logs: {folder}; runs, as they are measured: {kept}")
    runs: list[Run] = []
    failures: list[str] = []
    with tqdm(unit="run") as bar, Client(folder, model, tokenizer) as client:
        sweep = Sweep(preset, arguments, model, client, folder, bar.set_description, bar.refresh)
        for pool in preset.pools():
            try:
                for run in sweep.measure(pool):
                    runs.append(run)
                    _keep(run, kept)
                    bar.update()
            except FAILURES as error:
                failures.append(f"pool {pool.name}: {error}")
                tqdm.write(failures[-1])
    groups = group(runs, traffic)
    goals = judge(groups, preset.goal)
    settings = {**vars(arguments), **vars(preset)}
    report(groups, goals, traffic, settings, arguments.output)
    print(*failures, sep="\n")
    return 1 if failures or any(goal.failed for goal in goals) else 0


def _keep(run: Run, path: Path) -> None:
    """Write `run` down: the next one may fail."""
    with path.open("a") as file:
        print(json.dumps(asdict(run)), file=file)


def _chosen(arguments: argparse.Namespace) -> Preset:
    """The preset, with what the command line says otherwise."""
    preset = PRESETS[arguments.preset]
    for flag, names in (("--pools", arguments.pools), ("--others-in", arguments.others_in)):
        unknown = sorted(set(names or ()) - set(preset.sent))
        if unknown:
            known = ", ".join(preset.sent)
            raise SystemExit(f"{flag} {' '.join(unknown)}: {arguments.preset} has {known}")
    chosen = replace(
        preset,
        server=[*preset.server, *([] if arguments.model_path else preset.own)],
        systems=arguments.systems or preset.systems,
        outputs=arguments.outputs or preset.outputs,
        clips=preset.clips if arguments.clips is None else arguments.clips,
        others_in=preset.others_in if arguments.others_in is None else arguments.others_in,
        sent={name: preset.sent[name] for name in arguments.pools or preset.sent},
        times=arguments.times,
        kinds=tuple(arguments.workloads or ()),
    )
    if not chosen.pools():
        raise SystemExit(f"--workloads {' '.join(arguments.workloads)}: not in any of these pools")
    return chosen


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, default="tiny", help="model and sizes")
    parser.add_argument("--pools", nargs="+", help="which of the preset's pools")
    parser.add_argument("--others-in", nargs="*", help="pools that get the other workloads, too")
    parser.add_argument("--workloads", nargs="+", help="only those whose names begin so")
    parser.add_argument(
        "--times", type=int, default=1, help="times as many requests, no more of them at once"
    )
    parser.add_argument("--systems", type=int, nargs="+", help="tokens of the system prompt")
    parser.add_argument("--outputs", type=int, nargs="+", help="output tokens")
    parser.add_argument("--clips", type=int, nargs="*", help="estimates of output tokens to try")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each workload")
    parser.add_argument("--model-path", type=Path, help="folder; default: the preset's own")
    parser.add_argument("--stats", default="auto", help="query statistics of that model")
    parser.add_argument("--output", type=Path, default=Path("results/serving.json"))
    parser.add_argument("server_arguments", nargs="*", help="for all servers, after --")
    return parser


if __name__ == "__main__":
    sys.exit(main())
