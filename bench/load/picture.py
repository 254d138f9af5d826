"""Running requests and tokens per second over time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.load.cells import Group

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WIDTH, _HEIGHT = 11, 2.6  # Inches; of one row.


def draw(groups: list[Group]) -> Figure:
    """A row for each workload in each pool, a line for each arm's first run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, _HEIGHT * len(groups)), layout="constrained")
    axes = figure.subplots(len(groups), 2, squeeze=False)
    arms = list(dict.fromkeys(cell.arm for group in groups for cell in group.cells))
    for (left, right), group in zip(axes, groups, strict=True):
        run = group.production.first
        left.set_title(f"{run.workload}, pool {run.pool}: running requests", fontsize="medium")
        right.set_title("output tokens per second", fontsize="medium")
        for cell in group.cells:
            times, running, rates = zip(*cell.first.over_time, strict=True)
            style = {"color": f"C{arms.index(cell.arm)}", "linewidth": 1.2}
            left.plot(times, running, **style)
            right.plot(times, rates, **style, label=cell.arm)
        for side in (left, right):
            side.set(xlim=(0, None), ylim=(0, None))
    axes[0][1].legend(fontsize="small")
    for bottom in axes[-1]:
        bottom.set_xlabel("seconds")
    return figure
