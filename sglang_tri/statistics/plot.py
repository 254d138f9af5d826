"""Statistics as pictures: concentration, distance curves, predicted against actual logits."""

from __future__ import annotations

import base64
import html
import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sglang_tri.errors import KvPolicyError
from sglang_tri.statistics import describe, report
from sglang_tri.statistics.rope import Rope
from sglang_tri.statistics.statistics import Statistics
from sglang_tri.statistics.validate import Validation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Head = tuple[int, int]
_CURVES = 6


def chosen_heads(statistics: Statistics) -> list[Head]:
    """Heads worth a look: spread over the layers, the most concentrated one of each."""
    r3 = describe.concentration(statistics).strongest
    layers = torch.linspace(0, len(r3) - 1, min(_CURVES, len(r3))).round().long().unique().tolist()
    return [(layer, int(r3[layer].argmax())) for layer in layers]


def check_heads(statistics: Statistics, heads: Sequence[Head]) -> None:
    """Raise `KvPolicyError` for a head that the file does not have."""
    layers, count, _ = statistics.shape
    for layer, head in heads:
        if not (0 <= layer < layers and 0 <= head < count):
            raise KvPolicyError(
                f"--heads {layer}.{head}: {statistics.path} has layers 0 to {layers - 1} and "
                f"heads 0 to {count - 1}."
            )


def check_output(path: Path) -> None:
    """Raise `KvPolicyError` for another suffix, or where matplotlib is not installed."""
    if path.suffix not in (".png", ".html"):
        raise KvPolicyError(f"-o {path} must end in .html or .png.")
    if importlib.util.find_spec("matplotlib") is None:
        raise KvPolicyError(f"-o {path} needs matplotlib: pip install 'sglang-tri[plot]'.")


def write(
    statistics: Statistics,
    rope: Rope | None,
    heads: Sequence[Head],
    validation: Validation | None,
    path: Path,
) -> None:
    """Write the pictures to `path`: one PNG, or a page of HTML that needs no other file.

    Raises:
        KvPolicyError: see `check_output`.
    """
    check_output(path)
    picture = _png(_figure(statistics, rope, heads, validation))
    if path.suffix == ".png":
        path.write_bytes(picture)
        return
    title = html.escape(f"Query statistics: {statistics.model_name or statistics.path}")
    table = html.escape(report.show(statistics, rope, heads=False))
    image = base64.b64encode(picture).decode()
    path.write_text(
        f"<!doctype html><meta charset='utf-8'><title>{title}</title><h1>{title}</h1>"
        f"<img style='max-width:100%' src='data:image/png;base64,{image}'><pre>{table}</pre>\n",
        encoding="utf-8",
    )


def _figure(
    statistics: Statistics,
    rope: Rope | None,
    heads: Sequence[Head],
    validation: Validation | None,
) -> Figure:
    from matplotlib.figure import Figure

    rows = 1 + (rope is not None) + 2 * (validation is not None)
    figure = Figure(figsize=(11, 4.5 * rows), layout="constrained")
    axes = iter(figure.subplots(rows, 1, squeeze=False).flatten())
    r3 = describe.concentration(statistics).strongest
    _heat_map(next(axes), r3, "R over each head's three strongest frequency pairs", 0.0)
    if rope is not None:
        _curves(next(axes), statistics, rope, heads)
    if validation is not None:
        _heat_map(next(axes), validation.r, "Pearson r, predicted and actual mean logits", -1.0)
        _compare(next(axes), validation, heads)
    return figure


def _heat_map(axes: Axes, values: torch.Tensor, title: str, lowest: float) -> None:
    image = axes.imshow(values.T.numpy(), aspect="auto", origin="lower", vmin=lowest, vmax=1)
    axes.set(title=f"{title}: mean {float(values.mean()):.3f}", xlabel="layer", ylabel="query head")
    axes.locator_params(integer=True)
    axes.figure.colorbar(image, ax=axes)


def _curves(axes: Axes, statistics: Statistics, rope: Rope, heads: Sequence[Head]) -> None:
    distances = torch.logspace(0, 14, 600, base=2).round().long().unique()
    products = describe.centre_products(statistics)
    for layer, head in heads:
        curve = describe.distance_curve(products[layer, head], rope, distances)
        axes.plot(distances, curve, label=f"layer {layer}, head {head}")
    keys = "" if statistics.k_mean is not None else " (key components unknown: taken as 1)"
    axes.set(title=f"Distance curve{keys}", xlabel="distance in tokens", ylabel="expected logit")
    axes.set_xscale("log", base=2)
    axes.legend()


def _compare(axes: Axes, validation: Validation, heads: Sequence[Head]) -> None:
    distances = torch.arange(1, validation.actual.shape[-1] + 1)
    for number, (layer, head) in enumerate(heads):
        label = f"layer {layer}, head {head}: r = {float(validation.r[layer, head]):.2f}"
        colour = f"C{number}"
        axes.plot(distances, validation.actual[layer, head], colour, label=label)
        axes.plot(distances, validation.predicted[layer, head], colour, linestyle="--")
    axes.set(
        title="Mean logits by distance: actual (solid), predicted from centres (dashed)",
        xlabel="distance in tokens",
        ylabel="mean logit",
    )
    axes.set_xscale("log", base=2)
    axes.legend()


def _png(figure: Figure) -> bytes:
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=110)
    return target.getvalue()
