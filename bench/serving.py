"""What freed slots are worth: the policy against production SGLang, in pools of several sizes.

The servers of a pool get the same load from SGLang's own client: long reasoning behind one system
prompt, sent at once. They are production SGLang (radix cache, overlap scheduling, CUDA graphs), the
same with other estimates of output lengths (SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION), SGLang with
radix cache and overlap scheduling off, and the policy. Pools are sized by how many of these
requests production SGLang has room for, to the last token. In the memory-rich pool the client's
generated-shared-prefix and random workloads run, too.

Beside each measured ratio stands what it would be if a decoding step took as long as reading the
weights and the KV slots of its batch, at the batch sizes that were measured.

Exit status 1 if the policy finds less in the prefix cache than production SGLang. Times are
printed, and judged, but do not fail.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from bench.load.arms import make_arms
from bench.load.cells import cells
from bench.load.client import Client
from bench.load.goals import judge
from bench.load.presets import PRESETS, RICH, Preset
from bench.load.report import report
from bench.load.run import Run
from bench.load.sweep import Sweep
from bench.load.traffic import traffic_of
from bench.tiny_tokenizer import write_printable_tokenizer


def main() -> int:
    arguments = _parser().parse_args()
    preset = _chosen(arguments)
    folder = Path(tempfile.mkdtemp(prefix="sglang-tri-serving-"))
    model = arguments.model_path or preset.make_model(folder / "model")
    tokenizer = arguments.model_path or folder / "tokenizer"
    if tokenizer != model:
        write_printable_tokenizer(tokenizer)
    traffic = traffic_of(model)
    runs = _measure(preset, arguments, model, tokenizer, folder)
    groups = cells(runs, traffic)
    goals = judge(groups, preset.goal)
    report(groups, goals, traffic, vars(arguments), arguments.output)
    return 1 if any(goal.failed for goal in goals) else 0


def _measure(
    preset: Preset, arguments: argparse.Namespace, model: Path, tokenizer: Path, folder: Path
) -> list[Run]:
    runs = []
    with tqdm(unit="run") as bar, Client(folder, tokenizer) as client:
        side_by_side = preset.side_by_side
        sweep = Sweep(
            *(model, client, folder, side_by_side, arguments.repeats, bar.set_description),
            on_wait=bar.refresh,
        )
        for pool in preset.pools():
            clips = [] if pool.name == RICH else preset.clips
            arms = make_arms(preset, pool.slots, clips, arguments.stats, arguments.server_arguments)
            for run in sweep.measure(pool, arms):
                runs.append(run)
                bar.update()
    return runs


def _chosen(arguments: argparse.Namespace) -> Preset:
    """The preset, with what the command line says otherwise."""
    preset = PRESETS[arguments.preset]
    for flag, names in (("--pools", arguments.pools), ("--others-in", arguments.others_in)):
        unknown = sorted(set(names or ()) - set(preset.sent))
        if unknown:
            known = ", ".join(preset.sent)
            raise SystemExit(f"{flag} {' '.join(unknown)}: {arguments.preset} has {known}")
    return replace(
        preset,
        systems=arguments.systems or preset.systems,
        outputs=arguments.outputs or preset.outputs,
        clips=preset.clips if arguments.clips is None else arguments.clips,
        others_in=preset.others_in if arguments.others_in is None else arguments.others_in,
        sent={name: preset.sent[name] for name in arguments.pools or preset.sent},
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, default="tiny", help="model and sizes")
    parser.add_argument("--pools", nargs="+", help="which of the preset's pools")
    parser.add_argument("--others-in", nargs="*", help="pools that get the other workloads, too")
    parser.add_argument("--systems", type=int, nargs="+", help="tokens of the system prompt")
    parser.add_argument("--outputs", type=int, nargs="+", help="output tokens")
    parser.add_argument("--clips", type=int, nargs="*", help="estimates of output tokens to try")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each workload")
    parser.add_argument("--model-path", type=Path, help="default: the preset's own")
    parser.add_argument("--stats", default="auto", help="query statistics of that model")
    parser.add_argument("--output", type=Path, default=Path("results/serving.json"))
    parser.add_argument("server_arguments", nargs="*", help="for all servers, after --")
    return parser


if __name__ == "__main__":
    sys.exit(main())
