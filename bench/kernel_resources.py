"""Compile the kernels for GPUs that need not be here; print what the compilers report."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path

from bench.resources.compile import KERNELS, TARGETS, Resources, resources
from bench.resources.geometries import SHIPPED, Geometry, everything

DOCUMENT = Path(__file__).parents[1] / "docs" / "kernels.md"
BEGIN, END = "<!-- resources -->", "<!-- end of resources -->"
Job = tuple[str, Geometry, str]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="the whole matrix of shapes")
    parser.add_argument("--write", action="store_true", help="put the table into docs/kernels.md")
    parser.add_argument("--json", type=Path, help="write all results, with assembly, to this file")
    options = parser.parse_args(arguments)
    found = list(compile_all(jobs(SHIPPED)))
    lines = table(found)
    print("\n".join(lines))
    if options.write:
        write(DOCUMENT, lines)
    if options.json:
        options.json.write_text(json.dumps([vars(one) | derived(one) for one in found]))
    spilled = [one for one in found if one.local]
    if options.all:
        matrix = report(compile_all(jobs(everything())))
        print(f"\nThe whole matrix: {matrix} kernels spill.")
    return int(bool(spilled))


def jobs(geometries: Iterable[Geometry]) -> Iterator[Job]:
    """Each kernel once for what it depends on."""
    seen = set()
    for geometry, target in product(geometries, TARGETS):
        for kernel, constants in geometry.variants(TARGETS[target][1]).items():
            key = kernel, target, *sorted(map(str, constants.items()))
            if key not in seen:
                seen.add(key)
                yield kernel, geometry, target


def compile_all(work: Iterable[Job]) -> Iterator[Resources]:
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(_compile, work, chunksize=4)


def _compile(job: Job) -> Resources:
    return resources(*job)


def derived(one: Resources) -> dict[str, object]:
    return {"loads": one.loads, "matrix": one.matrix, "issued": one.issued}


def table(found: list[Resources]) -> list[str]:
    """Markdown: for each kernel and shape what it takes, by target; see docs/kernels.md."""
    cells = {(one.kernel, one.geometry, one.target): one for one in found}
    lines = [
        "| kernel | shape | " + " | ".join(TARGETS) + " |",
        "|---|---|" + "---|" * len(TARGETS),
    ]
    rows = dict.fromkeys((one.kernel, one.geometry) for one in found)
    for kernel in KERNELS:
        for name, shape in rows:
            if name == kernel:
                row = [_cell(cells[kernel, shape, target]) for target in TARGETS]
                lines.append(f"| {kernel} | {shape} | " + " | ".join(row) + " |")
    return lines


def _cell(one: Resources) -> str:
    spilled = f", {one.local} bytes of local memory" if one.local else ""
    issued = "" if one.issued is None else f" / {one.issued:.0f}"
    return f"{one.registers} / {one.shared}{issued}{spilled}"


def report(found: Iterable[Resources]) -> str:
    """Print what spills; returns how many of all."""
    total = spilled = 0
    for one in found:
        total += 1
        if one.local:
            spilled += 1
            print(f"{one.kernel}, {one.geometry}, {one.target}: {one.local} bytes per thread")
    return f"{spilled} of {total}"


def write(document: Path, lines: list[str]) -> None:
    before, rest = document.read_text().split(BEGIN)
    after = rest.split(END)[1]
    document.write_text("\n".join([before + BEGIN, *lines, END + after]))


if __name__ == "__main__":
    raise SystemExit(main())
