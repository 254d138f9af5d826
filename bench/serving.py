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
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

import requests
import torch

from bench import pictures
from bench.cutoff import Clock, Interrupted, TimeUp, cut_off, seconds_to_end
from bench.flags import positive
from bench.load.client import Client, LoadFailed, Run, name_of
from bench.load.report import NOTE, compare, draw, judge, show, traffic_of
from bench.load.sweep import measure
from bench.load.workloads import ARMS, POLICY, PRESETS, PRODUCTION, Preset
from bench.machine import machine, versions
from bench.models.dummy import make_dummy
from bench.models.tiny import make_model
from bench.models.tokenizer import write_printable_tokenizer
from bench.server import ServerFailed
from sglang_tri.config import KvPolicyConfig


def main(argv: Sequence[str] | None = None) -> int:
    arguments, preset = parse(argv)
    clock, output = Clock(arguments.limit), arguments.output
    folder = Path(tempfile.mkdtemp(prefix="sglang-tri-serving-"))
    output.parent.mkdir(parents=True, exist_ok=True)
    print(f"Logs: {folder}")
    client = _client(arguments.model_path, preset, folder)
    traffic = traffic_of(client.model)
    runs, failures = _measure_all(preset, client, clock, output.with_suffix(".jsonl"))
    rows = compare(runs, traffic)
    goals, missing = judge(rows, preset.goal), preset.planned() - Counter(map(name_of, runs))
    left_out = [f"left out: {name}: {count} runs" for name, count in missing.items()]
    print(show(rows), NOTE, *goals, *left_out, *failures, sep="\n")
    result = {
        "command": shlex.join(["python", "-m", "bench.serving", *(argv or sys.argv[1:])]),
        "machine": machine(),
        "versions": versions(),
        "settings": asdict(preset),
        "traffic": asdict(traffic),
        "rows": rows,
        "runs": runs,
        "goals": [asdict(goal) for goal in goals],
        "left_out": left_out,
        "failures": failures,
        "seconds": clock.seconds,
    }
    output.write_text(json.dumps(result))
    if runs and pictures.available():
        draw(runs).savefig(output.with_suffix(".png"), dpi=110)
    print(f"{clock.seconds:.0f} s; written: {output}")
    unseen = preset.repeats in missing.values()
    return 1 if failures or unseen or any(goal.failed for goal in goals) else 0


def _measure_all(
    preset: Preset, client: Client, clock: Clock, kept: Path
) -> tuple[list[Run], list[str]]:
    """The runs, which are written to `kept` one by one, and what went wrong."""
    runs: list[Run] = []
    failures: list[str] = []
    kept.unlink(missing_ok=True)

    def keep(run: Run) -> None:
        runs.append(run)
        with kept.open("a") as file:
            print(json.dumps(run), file=file)

    try:
        with cut_off(clock):
            for pool in preset.all_pools():
                try:
                    measure(pool, preset, client, clock, keep)
                except (LoadFailed, ServerFailed, requests.RequestException) as error:
                    # It must not cost what other pools show.
                    failures.append(f"pool {pool.name}: {error}")
                    print(failures[-1], flush=True)
    except TimeUp as error:
        print(error)
    except Interrupted as error:
        failures.append(str(error))
    return runs, failures


def _client(model: Path | None, preset: Preset, folder: Path) -> Client:
    """With the model, or the preset's own; prompts of text are written with its tokenizer."""
    if model:
        return Client(folder, model, model)
    write_printable_tokenizer(folder / "tokenizer")
    own = folder / "model"
    made = make_dummy("qwen3-8b", own) if preset.gpu else make_model("qwen3", own)
    return Client(folder, made, folder / "tokenizer")


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Preset]:
    """The arguments, and the preset with what they change.

    Raises:
        SystemExit: something cannot work; stderr says which flag, and what would work.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    name, preset = arguments.preset, PRESETS[arguments.preset]
    given = {flag: value for flag, value in vars(arguments).items() if value is not None}
    if "arms" in given:  # Without the preset's estimates, then.
        given = {"clips": (), **given, "arms": [PRODUCTION, *given["arms"], POLICY]}
    own = ["--load-format", "dummy"] if preset.gpu and not arguments.model_path else []
    given["server"] = [*preset.server, *own, *arguments.server_arguments]
    known = {each.name for each in fields(Preset)}
    chosen = replace(preset, **{flag: given[flag] for flag in known & given.keys()})
    if preset.gpu and not torch.cuda.is_available():
        parser.error(
            f"--preset {name} serves 16 GB of bfloat16 weights and needs a GPU, and torch finds "
            "none: use --preset tiny"
        )
    for flag, names in (("--pools", chosen.pools), ("--others-in", chosen.others_in)):
        if unknown := " ".join(sorted({*names} - {*preset.sent})):
            parser.error(f"{flag} {unknown}: {name} has {', '.join(preset.sent)}")
    if not chosen.all_pools():
        pools = replace(chosen, workloads=()).all_pools()
        there = ", ".join({load.name: None for pool in pools for load in pool.workloads})
        wanted = " ".join(chosen.workloads)
        parser.error(f"--workloads {wanted}: not in these pools, which have {there}")
    return arguments, chosen


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.serving",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="tiny", help="model and sizes")
    add("--pools", nargs="+", help="which of the preset's pools")
    add("--others-in", nargs="*", help="pools that get the other workloads, too")
    add("--workloads", nargs="+", help="only those whose names begin so")
    add("--arms", nargs="+", choices=ARMS, help="servers beside production and triattention")
    add("--clips", type=positive, nargs="*", help="estimates of output tokens, a server for each")
    add("--budget", type=_kept, help="tokens that the policy keeps")
    add("--interval", type=_kept, help="tokens from one round to the next")
    add("--times", type=positive, help="times as many requests, no more of them at once")
    add("--systems", type=positive, nargs="+", help="tokens of the system prompt")
    add("--outputs", type=positive, nargs="+", help="output tokens")
    add("--repeats", type=positive, help="runs of each workload (default: 2)")
    add("--limit", type=seconds_to_end, metavar="SECONDS", help="end by then, with what there is")
    add("--model-path", type=Path, help="folder; default: the preset's own")
    add("--stats", help="query statistics of that model (default: auto)")
    add("--output", type=Path, default=Path("results/serving.json"))
    add("server_arguments", nargs="*", help="for all servers, after --")
    return parser


def _kept(text: str) -> int:
    """A budget, or an interval: servers would take minutes to say the same."""
    if (tokens := positive(text)) < (least := KvPolicyConfig.recent):
        raise argparse.ArgumentTypeError(
            f"{tokens} is too small for the policy, which always keeps the {least} most recent "
            f"tokens: use {least} or more"
        )
    return tokens


if __name__ == "__main__":
    sys.exit(main())
