"""Accuracy by method, budget and depth on the reference model: `python -m bench.accuracy`.

Runs the simulator over held-out instances of the tasks, one process a core, and goes on from
what --out holds; with --server also asks the real server, and compares instance by instance.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from bench import pictures
from bench.accuracy.evaluation import plots, tables
from bench.accuracy.evaluation.cells import Cell, Results
from bench.accuracy.evaluation.concentration import concentration_of, table_by_concentration
from bench.accuracy.evaluation.methods import (
    ABLATIONS,
    DIAGNOSES,
    IMPROVEMENTS,
    LOOK_AHEAD,
    METHODS,
    PUBLISHED,
    SERVED,
    SETTINGS,
)
from bench.accuracy.evaluation.plan import AT, INTERVAL, SHARES, Plan, common_depths, make_plan
from bench.accuracy.evaluation.recall import KEPT, READ, recall_table
from bench.accuracy.evaluation.reconstruction import reconstruction_table
from bench.accuracy.evaluation.runner import Subject, run
from bench.accuracy.evaluation.served import compare
from bench.accuracy.reference_model import FOLDER
from bench.accuracy.reference_model.tasks import TASKS
from bench.machine import machine

GROUPS = {
    "published": PUBLISHED,
    "ablations": ABLATIONS,
    "settings": SETTINGS,
    "improvements": IMPROVEMENTS,
    "diagnoses": DIAGNOSES,
}
BASE = "triattention"
"""What the other methods' answers are compared with, question by question."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--models", type=Path, nargs="+", default=[FOLDER], help="folders with stats.safetensors"
    )
    parser.add_argument("--methods", nargs="+", default=["published"], help=_help())
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--instances", type=int, default=100, help="of each cell")
    parser.add_argument(
        "--within",
        type=float,
        default=3.0,
        help=f"points: more instances at {100 * AT:.0f}%%, until intervals are no wider than this "
        "to either side",
    )
    parser.add_argument("--server", type=int, default=0, help="instances to compare on a server")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("results/accuracy"))
    args = parser.parse_args()
    if args.instances < 2:
        parser.error(f"--instances {args.instances}: 2 or more, an interval needs them")
    plan = make_plan(_methods(parser, args.methods), args.tasks, common_depths(args.models))
    args.out.mkdir(parents=True, exist_ok=True)
    subjects = [Subject(model, model / "stats.safetensors") for model in args.models]
    found = [judge_all(subject, plan, args) for subject in subjects]
    parts = [
        write_report(subject, results, plan, args)
        for subject, results in zip(subjects, found, strict=True)
    ]
    if len(subjects) > 1:
        parts.append(write_comparison(subjects, found, plan, args.out))
    text = "\n\n".join(parts)
    print(text)
    (args.out / "report.txt").write_text(text + "\n", encoding="utf-8")


def folder(subject: Subject, args: argparse.Namespace) -> Path:
    """Where a model's outcomes and pictures are."""
    made: Path = args.out / subject.model.name
    made.mkdir(parents=True, exist_ok=True)
    return made


def judge_all(subject: Subject, plan: Plan, args: argparse.Namespace) -> Results:
    """Outcomes of all cells: those that are there, and those that are missing."""
    results = Results(folder(subject, args) / "outcomes.jsonl")
    fill(subject, results, [(cell, args.instances) for cell in plan.cells], args.processes)
    decisive = [(cell, results.instances_for(cell, args.within / 100)) for cell in plan.decisive]
    fill(subject, results, decisive, args.processes)
    return results


def fill(subject: Subject, results: Results, work: list[tuple[Cell, int]], processes: int) -> None:
    """So many instances of each cell, behind a bar."""
    left = sum(len(list(results.missing(cell, range(count)))) for cell, count in work)
    with tqdm(total=left, desc=subject.model.name, unit="instance") as bar:
        run(subject, work, results, processes, lambda _cell, _outcome: bar.update())


def _help() -> str:
    return f"{', '.join(GROUPS)}, or names: {', '.join(METHODS)}"


def _methods(parser: argparse.ArgumentParser, asked: list[str]) -> list[str]:
    names = [name for one in asked for name in GROUPS.get(one, {one: None})]
    unknown = sorted(set(names) - set(METHODS))
    if unknown:
        parser.error(f"--methods {' '.join(unknown)}: {_help()}")
    return names


def write_report(subject: Subject, results: Results, plan: Plan, args: argparse.Namespace) -> str:
    """One model's tables as text, with the server's if it is asked; its pictures to --out."""
    title = f"{subject.model.name}, R {concentration_of(subject):.2f}, {machine()}"
    parts = [
        f"{title}; percent (95% interval), a round every {INTERVAL} tokens. Solved: all of the "
        "output right. Progress: its share before the first wrong token, mean.",
        *results_tables(results, plan, args.tasks),
        *explanations(subject, plan),
    ]
    if pictures.available():
        place = folder(subject, args)
        plots.plot(results, plan.budgets, "share", f"By budget: {title}", place / "budget.png")
        if plan.depths:
            plots.plot(results, plan.depths, "depth", f"By depth: {title}", place / "depth.png")
    else:
        parts.append("No pictures: matplotlib is not installed.")
    if args.server:
        shares = (0.0, SHARES[2], AT)
        cells = [c for c in plan.budgets if c.method in SERVED and c.share in shares]
        parts.append(tables.agreement_table(compare(subject, cells, args.server)))
    return "\n\n".join(parts)


def results_tables(results: Results, plan: Plan, tasks: list[str]) -> Iterator[str]:
    """Each task by budget and by depth, means over tasks, differences."""
    for task in tasks:
        for across, cells in (("share", plan.budgets), ("depth", plan.depths)):
            own = [cell for cell in cells if cell.task == task]
            if not own:
                continue
            fixed = f"depth {own[0].depth}" if across == "share" else f"budget {100 * AT:.0f}%"
            for what, shown in (("solved", tables.percent), ("progress", tables.far)):
                found = tables.accuracy_table(results, own, across, shown)
                yield f"{task}, {fixed}, {what}\n{found}"
    overall = tables.overall_table(results, plan.budgets)
    yield f"all tasks, hardest depth in range, mean progress\n{overall}"
    if any(cell.method == BASE for cell in plan.budgets):
        differences = tables.difference_table(results, plan.budgets, BASE)
        yield f"progress, points more than {BASE}, mean over budgets\n{differences}"


def explanations(subject: Subject, plan: Plan) -> Iterator[str]:
    """Where the model looks tokens up, what methods keep of them, and how far logits follow R."""
    judged = [name for name in plan.methods if name not in ("full", *LOOK_AHEAD, *SETTINGS)]
    if judged:
        share = f"keeping {100 * KEPT:.0f}% at {100 * READ:.0f}% of the output"
        kept = recall_table(subject, judged)
        what = "attention yet to be paid to what is kept, relative to future attention"
        yield f"{what}, {share}\n{kept}"
    yield f"mean logits by distance, predicted and actual\n{reconstruction_table(subject)}"


def write_comparison(
    subjects: list[Subject], found: list[Results], plan: Plan, folder: Path
) -> str:
    """Progress as a function of the models' R, as text and as a picture."""
    models = {concentration_of(s): results for s, results in zip(subjects, found, strict=True)}
    if pictures.available():
        plots.plot_by_concentration(models, plan.budgets, folder / "concentration.png")
    return table_by_concentration(models, plan.budgets)


if __name__ == "__main__":
    main()
