"""`sglang-tri stats`: convert, show, plot and diff."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from sglang_tri import statistics as stats
from sglang_tri.errors import KvPolicyError
from sglang_tri.statistics import model_rope, plot, report, validate
from sglang_tri.statistics.rope import Rope
from sglang_tri.statistics.statistics import Statistics

_FILE = "statistics file, .pt or .safetensors"


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `stats` and what it can do to the parser of `sglang-tri`."""
    parser = commands.add_parser("stats", help="read, compare and convert query statistics")
    actions = parser.add_subparsers(dest="action", required=True)

    convert = actions.add_parser("convert", help="write a file in the other layout")
    convert.add_argument("source", metavar="SOURCE", help=_FILE)
    convert.add_argument("target", metavar="TARGET", help="file to write, .pt or .safetensors")
    convert.set_defaults(run=_convert)

    show = actions.add_parser("show", help="concentration, frequencies and preferred distances")
    _add_file_and_rope(show)
    show.add_argument("--heads", action="store_true", help="a row for each head")
    show.add_argument("--json", action="store_true", help="all values, for other programs")
    show.set_defaults(run=_show)

    draw = actions.add_parser("plot", help="the same as pictures; needs matplotlib")
    _add_file_and_rope(draw)
    draw.add_argument("-o", "--output", type=Path, required=True, help=".html or .png")
    draw.add_argument("--heads", nargs="+", type=_head, metavar="LAYER.HEAD", help="curves to draw")
    draw.add_argument(
        "--validate",
        type=int,
        metavar="TOKENS",
        help="let the model of --model-path read so many tokens, and compare its mean logits by "
        "distance with those that the statistics predict",
    )
    draw.add_argument("--text", help="UTF-8 text for --validate; default: Python's reference")
    draw.set_defaults(run=_plot)

    diff = actions.add_parser("diff", help="how much two files of one model differ")
    diff.add_argument("first", metavar="FIRST", help=_FILE)
    diff.add_argument("second", metavar="SECOND", help=_FILE)
    diff.set_defaults(run=_diff)


def _add_file_and_rope(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help=_FILE)
    parser.add_argument("--model-path", help="take RoPE from this model where the file has none")
    parser.add_argument("--rope-theta", type=float, help="RoPE without scaling, with this base")


def _head(text: str) -> plot.Head:
    layer, dot, head = text.partition(".")
    if not (dot and layer.isdigit() and head.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} must be LAYER.HEAD, for example 3.0")
    return int(layer), int(head)


def _rope(arguments: argparse.Namespace, statistics: Statistics) -> Rope | None:
    if statistics.rope is not None:
        return statistics.rope
    if arguments.model_path is not None:
        return model_rope.of_model(arguments.model_path, statistics.interleaved)
    if arguments.rope_theta is not None:
        return model_rope.plain(arguments.rope_theta, statistics.shape[2])
    return None


def _convert(arguments: argparse.Namespace) -> None:
    stats.save_as(stats.load(arguments.source), arguments.target)


def _show(arguments: argparse.Namespace) -> None:
    statistics = stats.load(arguments.file)
    rope = _rope(arguments, statistics)
    if arguments.json:
        print(json.dumps(report.to_dict(statistics, rope)))
    else:
        print(report.show(statistics, rope, arguments.heads))


def _plot(arguments: argparse.Namespace) -> None:
    plot.check_output(arguments.output)
    statistics = stats.load(arguments.file)
    heads = arguments.heads or plot.chosen_heads(statistics)
    plot.check_heads(statistics, heads)
    validation = None
    if arguments.validate is not None:
        if arguments.model_path is None:
            raise KvPolicyError("--validate needs the model itself: give --model-path.")
        validation = validate.validate(
            statistics, arguments.model_path, arguments.validate, arguments.text
        )
    plot.write(statistics, _rope(arguments, statistics), heads, validation, arguments.output)


def _diff(arguments: argparse.Namespace) -> None:
    print(report.diff(stats.load(arguments.first), stats.load(arguments.second)))
