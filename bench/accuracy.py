"""Accuracy by method, budget and depth on the reference model: `python -m bench.accuracy`.

Runs the simulator over held-out instances of the tasks, one process a core, and goes on from
what --out holds; with --server also asks the real server, and compares instance by instance.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tqdm import tqdm

from bench import pictures
from bench.evaluation import report
from bench.evaluation.cells import Results
from bench.evaluation.methods import ABLATIONS, IMPROVEMENTS, METHODS, PUBLISHED, SERVED, SETTINGS
from bench.evaluation.plan import AT, DEPTHS, INTERVAL, Plan, make_plan
from bench.evaluation.runner import Subject, run
from bench.evaluation.served import compare
from bench.machine import machine
from bench.reference_model import FOLDER

GROUPS = {
    "published": PUBLISHED,
    "ablations": ABLATIONS,
    "settings": SETTINGS,
    "improvements": IMPROVEMENTS,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=FOLDER, help="folder with stats.safetensors")
    parser.add_argument("--methods", nargs="+", default=["published"], help=_help())
    parser.add_argument("--tasks", nargs="+", default=list(DEPTHS), choices=list(DEPTHS))
    parser.add_argument("--instances", type=int, default=100, help="of each cell")
    parser.add_argument("--server", type=int, default=0, help="instances to compare on a server")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("results/accuracy"))
    args = parser.parse_args()
    names = _methods(parser, args.methods)
    args.out.mkdir(parents=True, exist_ok=True)
    subject = Subject(args.model, args.model / "stats.safetensors")
    results = Results(args.out / "outcomes.jsonl")
    plan = make_plan(names, args.tasks)
    with tqdm(total=args.instances * len(plan.cells), unit="instance") as bar:
        work = [(cell, args.instances) for cell in plan.cells]
        bar.update(sum(args.instances - len(list(results.missing(c, range(n)))) for c, n in work))
        run(subject, work, results, args.processes, lambda _cell, _outcome: bar.update())
    text = write_report(results, plan, args.tasks, args.out)
    if args.server:
        cells = [cell for cell in plan.budgets if cell.method in SERVED]
        text += "\n\n" + report.agreement_table(compare(subject, cells, args.server))
    print(text)
    (args.out / "report.txt").write_text(text + "\n", encoding="utf-8")


def _help() -> str:
    return f"{', '.join(GROUPS)}, or names: {', '.join(METHODS)}"


def _methods(parser: argparse.ArgumentParser, asked: list[str]) -> list[str]:
    names = [name for one in asked for name in GROUPS.get(one, {one: None})]
    unknown = sorted(set(names) - set(METHODS))
    if unknown:
        parser.error(f"--methods {' '.join(unknown)}: {_help()}")
    return names


def write_report(results: Results, plan: Plan, tasks: list[str], folder: Path) -> str:
    """Tables as text; pictures beside where matplotlib is there."""
    parts = [f"{machine()}; percent solved (95% interval), a round every {INTERVAL} tokens"]
    for task in tasks:
        for across, cells in (("share", plan.budgets), ("depth", plan.depths)):
            own = [cell for cell in cells if cell.task == task]
            fixed = f"depth {own[0].depth}" if across == "share" else f"budget {100 * AT:.0f}%"
            parts += [f"{task}, {fixed}\n{report.accuracy_table(results, own, across)}"]
    if pictures.available():
        report.plot(results, plan.budgets, "share", "Accuracy by budget", folder / "budget.png")
        report.plot(results, plan.depths, "depth", "Accuracy by depth", folder / "depth.png")
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
