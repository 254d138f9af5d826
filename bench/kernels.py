"""Speed of the kernels and of whole rounds, against copy bandwidth and plain torch.

`python -m bench.kernels` needs an NVIDIA or AMD GPU with torch and Triton, and no SGLang. It prints
a table and goals, and writes kernels.json and, with matplotlib, roofline.png. It fails if a round
keeps other tokens than plain torch.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import product
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

from bench import pictures
from bench.flags import positive
from bench.goal import Goal
from bench.kernel_cells import MODELS, RECENT, Cell, Pool
from bench.kernel_timing import limits, measure
from bench.kernel_torch import choose, folded, per_offset, round_in_torch
from bench.machine import machine
from sglang_tri.kernels.compact import compact
from sglang_tri.kernels.moves import Selection
from sglang_tri.kernels.score import score
from sglang_tri.kernels.select import select
from sglang_tri.kernels.workspace import Workspace
from sglang_tri.policies.triattention import TriAttention
from sglang_tri.round import run

REAL = {"requests": (1, 8, 32, 64), "candidates": (2176, 4224), "interval": 128, "repeats": 20}
TINY = {"requests": (1, 2), "candidates": (48, 80), "interval": 16, "repeats": 2}
LEAST_EQUAL = 0.99
# Plain torch takes time in proportion to the requests: timed with the most that are named here.
BASELINES = {"torch round": (folded, 4), "per-offset round": (per_offset, 1)}
# What it says, operation, from so many requests up, value, bound; `min`: the lowest must reach it.
GOALS = (
    ("score: 80% of copy bandwidth from 8 requests up", "score", 8, "percent_of_copy", 80, min),
    ("2 buffers: no slower than score", "score, 2 buffers", 1, "times_score", 1, max),
    ("round: at most 1% of decode time", "round", 1, "percent_of_decode", 1, max),
    ("torch round: at least 10 times a round", "torch round", 1, "times_round", 10, min),
)
NO_GPU = "There is no GPU here: --device cpu tries the bench out with tiny sizes."
MEANINGLESS = "On a CPU, with tiny sizes: these times mean nothing."
# Without a library, for it needs torch and Triton alone.
LINE = "{:<12}{:>9}{:>6}  {:<21}{:>27}{:>8}{:>11}{:>13}{:>13}"
HEAD = ["model", "requests", "n", "operation", "ms (min-max)", "GB/s"]
HEAD += ["% of copy", "% of decode", "times round"]
EXPLAINED = """\
Times are the device's; @r: timed with r requests, scaled to all. GB/s count each byte that has to
be read or written once. % of decode: of steps that read the weights and all KV at copy bandwidth.
"""
# What kernels.json says of an operation in a cell.
Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    options = _parse(argv)
    real, device = options.device != "cpu", torch.device(options.device)
    if real and not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    if not real:
        print(MEANINGLESS)
        # Threads that wait for each other on a busy machine take longer than these sizes.
        torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    copy, flops = limits(options.repeats, device)
    found: dict[str, Any] = {"machine": machine(), "times_mean_something": real}
    found |= {"copy_bytes_per_second": copy, "product_flops_per_second": flops}
    found |= {"results": [], "notes": []}
    for name, candidates, requests in product(options.models, options.candidates, options.requests):
        model = MODELS[name] if real else MODELS[name].tiny()
        cell = Cell(model, requests, candidates, options.interval)
        rows, note = measured(cell, options.repeats, copy, device)
        print(note, file=sys.stderr, flush=True)
        found["results"] += rows
        found["notes"].append(note)
        found["goals"] = [asdict(goal) for goal in goals(found["results"], real)]
        # What was found stays if a later cell is cut off.
        (options.out / "kernels.json").write_text(json.dumps(found, indent=1) + "\n")
    print(report(found), *goals(found["results"], real), sep="\n")
    draw(found, options.out / "roofline.png")
    print(f"written to {options.out}")
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__)
    number: dict[str, Any] = {"type": positive, "metavar": "N"}
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--requests", nargs="+", help=f"default: {REAL['requests']}", **number)
    of_each = f"of each request, of which {REAL['interval']} go; default: {REAL['candidates']}"
    parser.add_argument("--candidates", nargs="+", help=of_each, **number)
    parser.add_argument("--repeats", help=f"timed calls; default: {REAL['repeats']}", **number)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: tiny sizes")
    parser.add_argument("--out", type=Path, default=Path("results/kernels"), help="folder")
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value}
    options = argparse.Namespace(**(TINY if given["device"] == "cpu" else REAL) | given)
    least = options.interval + RECENT
    if min(options.candidates) < least:
        parser.error(f"--candidates {min(options.candidates)} is too small: use {least} or more")
    return options


def measured(cell: Cell, repeats: int, copy: float, device: torch.device) -> tuple[list[Row], str]:
    """What one cell came to, and what is to be said about it.

    Args:
        copy: bandwidth of a copy, bytes per second.
    """
    gc.collect()
    torch.cuda.empty_cache()
    try:
        pool = Pool(cell, device)
        note = f"{cell}: {100 * check(pool):.2f}% of the kept are plain torch's"
        rows = {row["operation"]: row for row in operations(pool, repeats, copy)}
    except torch.cuda.OutOfMemoryError:
        return [], f"{cell}: left out, there is not enough memory"
    for name in ("score", "round"):
        for row in rows.values():
            row[f"times_{name}"] = row["ms"]["median"] / rows[name]["ms"]["median"]
    return list(rows.values()), note


def check(pool: Pool) -> float:
    """The share of one request's kept candidates that plain torch keeps too.

    Raises:
        SystemExit: it is below `LEAST_EQUAL`.
    """
    one = run.slice_requests(pool.candidates, 0, 1)
    expected = choose(pool, folded(pool, 1))[0]
    kept = run.run(TriAttention(), one, pool.cache, trace=True)
    assert kept is not None
    pool.refill()
    both = [torch.isin(*each).float().mean() for each in zip(kept[0, 0], expected, strict=True)]
    equal = float(torch.stack(both).mean())
    if equal < LEAST_EQUAL:
        sys.exit(
            f"{pool.cell}: {100 * equal:.2f}% of the kept candidates are those of plain torch, and "
            f"at least {100 * LEAST_EQUAL:.0f}% should be."
        )
    return equal


def operations(pool: Pool, repeats: int, copy: float) -> Iterator[Row]:
    """Time each kernel, the whole round, and plain torch."""
    cell, some, device = pool.cell, pool.candidates, pool.device
    # As the product's it is there before, so that counters need no launch of their own.
    memory = Workspace(None, device)
    scoring = partial(score, some.keys, some.pages, pool.queries, some.logical, workspace=memory)
    for name, call in (("score", scoring), ("score, 2 buffers", partial(scoring, buffers=2))):
        yield _row(cell, name, measure(call, repeats, device), copy)
    scores = scoring()
    for order in ("order", "holes"):
        selection = Selection(cell.model.kv_heads, "per-head", keep_order=order == "order")
        choosing = partial(select, scores, some.pages, some.budgets, selection, workspace=memory)
        moves = choosing()
        moving = partial(compact, pool.cache.rows, some.pages, moves)
        moved = int(moves.count.sum())
        yield _row(cell, f"select, {order}", measure(choosing, repeats, device), copy, moved)
        yield _row(cell, f"compact, {order}", measure(moving, repeats, device), copy, moved)
    del scores, choosing  # Gigabytes.
    whole = partial(run.run, TriAttention(), some, pool.cache)
    yield _row(cell, "round", measure(whole, repeats, device, pool.refill), copy, moved)
    for name, (scorer, most) in BASELINES.items():
        requests = min(most, cell.requests)
        plain = partial(round_in_torch, pool, scorer, requests)
        yield _row(cell, name, measure(plain, repeats, device), copy, moved, requests)


def _row(
    cell: Cell, name: str, ms: dict[str, float], copy: float, moved: int = 0, requests: int = 0
) -> Row:
    """`ms` are of so many requests, or of all; `moved` as in `Cell.work`."""
    requests = requests or cell.requests
    ms = {key: value * cell.requests / requests for key, value in ms.items()}
    work = next(work for kind, work in cell.work(moved).items() if kind in name)
    row = {
        "model": cell.model.name,
        "requests": cell.requests,
        "candidates": cell.candidates,
        "budget": cell.budget,
        "operation": name,
        "measured_requests": requests,
        "ms": ms,
        "bytes": work.bytes,
        "flops": work.flops,
        "moved_rows_per_layer": moved,
        "bytes_per_second": 1e3 * work.bytes / ms["median"],
        "percent_of_copy": 1e5 * work.bytes / ms["median"] / copy,
    }
    if name == "round":
        # Each request has one round in `interval` steps.
        steps_ms = cell.interval * 1e3 * cell.step_bytes / copy
        row |= {"decode_step_bytes": cell.step_bytes}
        row |= {"percent_of_decode": 100 * ms["median"] / steps_ms}
    return row


def goals(rows: Sequence[Row], real: bool) -> list[Goal]:
    """The worst cell decides; on a CPU nothing does, whose times are not `real`."""
    reached = []
    for text, operation, least, value, bound, worst in GOALS:
        some = [row for row in rows if row["operation"] == operation and row["requests"] >= least]
        if some:
            row = worst(some, key=itemgetter(value))
            met = row[value] >= bound if worst is min else row[value] <= bound
            where = f"{row['model']}, {row['requests']} requests of {row['candidates']}"
            said = f"{row[value]:.2f} at worst ({where})"
            reached.append(Goal(text, said, met if real else None, False))
        else:
            reached.append(Goal(text, f"no cell of {least} requests or more", None, False))
    return reached


def report(found: dict[str, Any]) -> str:
    """For the terminal."""
    copy, flops = found["copy_bytes_per_second"] / 1e9, found["product_flops_per_second"] / 1e12
    best = f"copy bandwidth {copy:.1f} GB/s (read and written), bfloat16 {flops:.1f} TFLOP/s\n"
    rows = "\n".join([LINE.format(*HEAD), *map(_shown, found["results"])])
    return "\n".join([found["machine"], best, rows, EXPLAINED, *found["notes"], ""])


def _shown(row: Row) -> str:
    ms, scaled = row["ms"], row["measured_requests"] != row["requests"]
    return LINE.format(
        *(row["model"], row["requests"], row["candidates"]),
        row["operation"] + (f" @{row['measured_requests']}" if scaled else ""),
        "{median:.3f} ({lowest:.3f}-{highest:.3f})".format(**ms),
        f"{row['bytes_per_second'] / 1e9:.1f}",
        f"{row['percent_of_copy']:.1f}",
        f"{row['percent_of_decode']:.3f}" if "percent_of_decode" in row else "",
        f"{row['times_round']:.2f}",
    )


def draw(found: dict[str, Any], path: Path) -> None:
    """The roofline: what was reached, under what the device can do."""
    if not pictures.available():
        print(f"matplotlib cannot be imported: no {path.name}.")
        return
    from matplotlib.figure import Figure

    copy, flops = found["copy_bytes_per_second"], found["product_flops_per_second"]
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    axes.plot(
        [0.05, flops / copy, 4 * flops / copy], [0.05 * copy / 1e12, *2 * [flops / 1e12]], "k"
    )
    for operation in ("score", "select, holes", "round", "torch round"):
        some = [row for row in found["results"] if row["operation"] == operation]
        intensity = [row["flops"] / row["bytes"] for row in some]
        axes.plot(
            intensity, [r["flops"] / r["ms"]["median"] / 1e9 for r in some], "o", label=operation
        )
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="TFLOP/s")
    axes.set_title(found["machine"] if found["times_mean_something"] else MEANINGLESS)
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
