"""How many tokens of which text query statistics need: `python -m bench.accuracy.calibration`.

Measures statistics with `sglang-tri calibrate`, asks them what they would keep of the candidates of
the same rounds, and lets the model read texts under eviction by each. Goes on from what --folder
has.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import AutoTokenizer

from bench.accuracy.calibration import findings
from bench.accuracy.calibration.measure import Measurement, described, measure, plan
from bench.accuracy.calibration.study import CHANCE, RANDOM, RECENT, Results, Setting, Study
from bench.accuracy.calibration.texts import CHAT, Text, judged_texts, write_texts
from bench.flags import positive
from bench.machine import machine, versions
from bench.simulator import Oracle
from bench.simulator.policies import MODES
from bench.simulator.stats import load_stats


def main() -> None:
    args = _parser().parse_args()
    folder = args.folder or Path("results/calibration") / args.model_path.name
    folder.mkdir(parents=True, exist_ok=True)
    wanted = args.statistics or plan(list(args.texts))
    answers = max((one.tokens for one in wanted if one.text == CHAT), default=0)
    write_texts(folder, args.model_path, args.texts, answers, args.tokens)
    paths = {m.name: measure(m, args.model_path, folder) for m in _bar(wanted, "statistics")}
    oracle = Oracle(args.model_path)
    tokenizer = AutoTokenizer.from_pretrained(args.model_path)
    texts = _first_of_kinds(judged_texts(folder, tokenizer, args.tokens), args.each)
    settings = [setting for several in args.settings for setting in several]
    results = Results(folder / "outcomes.jsonl")
    lost = list(paths) if args.losses is None else [one.name for one in args.losses]
    _judge(oracle, paths, texts, settings, lost, results)
    names = {text.name for text in texts}
    rows = [row for row in results.rows if row["text"] in names]
    rows = [row for row in rows if row["statistics"] in (*paths, CHANCE, RANDOM)]
    print(findings.report(rows, settings))
    if args.out:
        _write(args, paths, texts, settings, rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.accuracy.calibration", description=__doc__
    )
    parser.add_argument("--model-path", type=Path, required=True, help="a chat model's folder")
    parser.add_argument(
        "--settings",
        type=_settings,
        nargs="+",
        default=[_settings("256,128")],
        metavar="BUDGET,INTERVAL[,MODE]",
        help="in all three modes if none is given; losses are found with the first",
    )
    parser.add_argument(
        "--losses",
        type=_measurement,
        nargs="*",
        metavar="TEXT,TOKENS",
        help="statistics that the model also reads with, instead of all",
    )
    parser.add_argument("--tokens", type=positive, default=1200, help="of a judged text")
    parser.add_argument(
        "--each", type=positive, default=2, help="texts of a kind and half, at most"
    )
    parser.add_argument(
        "--statistics",
        type=_measurement,
        nargs="+",
        metavar="TEXT,TOKENS",
        help="to measure instead of all, the reference first",
    )
    parser.add_argument(
        "--texts",
        type=_text,
        nargs="*",
        default={},
        action=_Named,
        metavar="NAME=FILE",
        help="more texts to measure with, or others in place of prose and chat; named "
        "chat-first, chat-second, long-first, long-second: judged in place of its own answers",
    )
    parser.add_argument("--folder", type=Path, help="what is made on the way")
    parser.add_argument("--out", type=Path, help="JSON to write")
    return parser


class _Named(argparse.Action):
    """Pairs as a dictionary."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        setattr(namespace, self.dest, dict(values))


def _settings(text: str) -> list[Setting]:
    budget, interval, *modes = text.split(",")
    return [Setting(positive(budget), positive(interval), mode) for mode in modes or MODES]


def _measurement(text: str) -> Measurement:
    name, _, tokens = text.rpartition(",")
    return Measurement(name, positive(tokens))


def _text(text: str) -> tuple[str, Path]:
    name, _, path = text.partition("=")
    if not path:
        raise argparse.ArgumentTypeError(f"{text}: NAME=FILE")
    return name, Path(path)


def _bar(items: Any, name: str) -> Any:
    return tqdm(items, desc=name, file=sys.stderr)


def _first_of_kinds(texts: list[Text], each: int) -> list[Text]:
    """At most so many of each kind and half."""
    found: list[Text] = []
    for text in texts:
        alike = [one for one in found if (one.kind, one.half) == (text.kind, text.half)]
        if len(alike) < each:
            found.append(text)
    return found


def _judge(
    oracle: Oracle,
    paths: dict[str, Path],
    texts: list[Text],
    settings: list[Setting],
    lost: list[str],
    results: Results,
) -> None:
    decoder = oracle.decoder
    shape = decoder.layers, decoder.heads, decoder.head_dim // 2
    statistics = {name: load_stats(path, *shape) for name, path in paths.items()}
    study = Study(decoder, statistics, results)
    for text in _bar(texts, "texts"):
        study.judge(text, settings, lost)


def _write(
    args: argparse.Namespace,
    paths: dict[str, Path],
    texts: list[Text],
    settings: list[Setting],
    rows: list[dict[str, Any]],
) -> None:
    """One row a line; folders are left out of the command."""
    head = {
        "command": " ".join(["python -m bench.accuracy.calibration", *map(_bare, sys.argv[1:])]),
        "machine": machine(),
        "versions": versions(),
        "model": args.model_path.name,
        "recent": RECENT,
        "statistics": {name: described(path) for name, path in paths.items()},
        "texts": [
            {"name": t.name, "kind": t.kind, "half": t.half, "tokens": len(t.ids)} for t in texts
        ],
        "chosen": [{**vars(s), "tokens": findings.choose(rows, s)} for s in settings],
    }
    lines = ",\n".join(json.dumps(row) for row in rows)
    content = json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n{lines}\n]}}\n'
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(content, encoding="utf-8")


def _bare(argument: str) -> str:
    """Without folders."""
    name, sign, path = argument.rpartition("=")
    return name + sign + path.rsplit("/", 1)[-1]


if __name__ == "__main__":
    main()
