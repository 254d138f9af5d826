"""Speed of the kernels and of whole rounds, against copy bandwidth and plain torch.

    python -m bench.kernels

Needs an NVIDIA or AMD GPU with torch and Triton, and no SGLang. Prints a table and goals; writes
kernels.json and, with matplotlib, roofline.png. Requests' tokens lie scattered over one pool with
buffers of their own for each layer, which is larger than the last-level cache; calls take turns
over several sets of slots. Fails if a round keeps other tokens than plain torch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from bench import pictures
from bench.flags import positive
from bench.kernelbench import plot
from bench.kernelbench.cells import KeptSetsDiffer, Operations, Result, check
from bench.kernelbench.geometry import INTERVAL, MODELS, RECENT, Cell
from bench.kernelbench.goals import goals, name
from bench.kernelbench.pool import RESERVE_BYTES, Pool, fitting_sets, set_bytes
from bench.kernelbench.report import Run
from bench.kernelbench.timing import free_bytes, l2_bytes, limits
from bench.machine import machine

REQUESTS, TINY_REQUESTS = (1, 8, 32, 64), (1, 2)
CANDIDATES, TINY_CANDIDATES = (2176, 4224), (48, 80)
REPEATS, TINY_REPEATS = 20, 2
TINY_INTERVAL = 16
NO_GPU = "There is no GPU here: --device cpu tries the bench out with tiny sizes."
MEANINGLESS = "On a CPU, with tiny sizes: these times mean nothing."


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    device = torch.device(arguments.device)
    if device.type != "cpu" and not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    meaningful = device.type != "cpu"
    if not meaningful:
        print(MEANINGLESS)
        # Threads that wait for each other on a busy machine take longer than these sizes.
        torch.set_num_threads(1)
    repeats = arguments.repeats or (REPEATS if meaningful else TINY_REPEATS)
    arguments.out.mkdir(parents=True, exist_ok=True)
    try:
        for run in _runs(_cells(arguments, meaningful), repeats, device):
            # What was found stays if a later cell is cut off.
            run.write(arguments.out / "kernels.json")
    except KeptSetsDiffer as error:
        print(error, file=sys.stderr)
        return 1
    print(run.text())
    _draw(run, arguments.out)
    print(f"written to {arguments.out}")
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=list(MODELS), help="(default: all)"
    )
    parser.add_argument(
        "--requests",
        type=positive,
        nargs="+",
        metavar="N",
        help=f"in one round (default: {_shown(REQUESTS)})",
    )
    parser.add_argument(
        "--candidates",
        type=positive,
        nargs="+",
        metavar="N",
        help=f"of each request, of which {INTERVAL} are evicted (default: {_shown(CANDIDATES)})",
    )
    parser.add_argument("--repeats", type=positive, help=f"timed calls (default: {REPEATS})")
    parser.add_argument(
        "--device", default="cuda", choices=("cuda", "cpu"), help="cpu: tiny sizes, no real times"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("results/kernels"), help="folder (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    interval = INTERVAL if arguments.device == "cuda" else TINY_INTERVAL
    least = interval + RECENT
    if arguments.candidates and min(arguments.candidates) < least:
        parser.error(f"--candidates {min(arguments.candidates)} is too small: use {least} or more")
    return arguments


def _shown(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers))


def _cells(arguments: argparse.Namespace, real: bool) -> list[Cell]:
    models = [MODELS[each] if real else MODELS[each].tiny() for each in arguments.models]
    return [
        Cell(model, requests, candidates, INTERVAL if real else TINY_INTERVAL)
        for model in models
        for candidates in arguments.candidates or (CANDIDATES if real else TINY_CANDIDATES)
        for requests in arguments.requests or (REQUESTS if real else TINY_REQUESTS)
    ]


def _runs(cells: Sequence[Cell], repeats: int, device: torch.device) -> Iterator[Run]:
    """All that was found, after each cell."""
    best = limits(repeats, device)
    meaningful = device.type != "cpu"
    results: list[Result] = []
    notes: list[str] = []
    for cell in cells:
        found, note = _cell(cell, repeats, device)
        results += found
        notes.append(note)
        print(note, file=sys.stderr, flush=True)
        reached = goals(results, best.copy, meaningful)
        yield Run(machine(), best, tuple(results), tuple(notes), reached, meaningful)


def _cell(cell: Cell, repeats: int, device: torch.device) -> tuple[list[Result], str]:
    """What one cell came to, and what is to be said about it."""
    free = free_bytes(device)
    sets = fitting_sets(cell, l2_bytes(device), free)
    if sets == 0:
        needed = (set_bytes(cell) + RESERVE_BYTES) / 1e9
        return [], f"{name(cell)}: left out, takes {needed:.1f} GB and {free / 1e9:.1f} GB are free"
    try:
        pool = Pool.of(cell, sets, device)
        equal = check(pool)
        found = Operations(pool, repeats).all()
    except torch.cuda.OutOfMemoryError:
        return [], f"{name(cell)}: left out, {free / 1e9:.1f} GB of free memory did not do"
    text = f"{sets} sets of slots, {100 * equal:.2f}% of the kept are plain torch's"
    return found, f"{name(cell)}: {text}"


def _draw(run: Run, folder: Path) -> None:
    if not pictures.available():
        print("matplotlib cannot be imported: no roofline.png.")
        return
    title = run.machine if run.meaningful else f"{run.machine}. {MEANINGLESS}"
    plot.write(run.results, run.limits, title, folder / "roofline.png")


if __name__ == "__main__":
    sys.exit(main())
