"""An exact check of real SGLang servers with the policy on, on whatever machine this is.

Servers of a small model (the reference model, unless another is named) run with the dtype, the
attention backend and the page sizes that are asked for; the float32 simulator judges them here, on
the CPU, and needs no GPU. The parts are identical, outputs, turns, pool, rows and graphs;
docs/exact.md says what they need.

Further arguments for all servers stand after `--`. Exit status 1 if a part fails, or if a signal or
`--limit` ends the check before it is done.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import torch

from bench.accuracy.reference_model import FOLDER
from bench.cutoff import Clock, CutOff, cut_off, seconds_to_end
from bench.machine import look, versions
from bench.server import Server
from sglang_tri import __version__
from sglang_tri import statistics as stats

from . import identical, outputs, pool, rows, turns
from .judge import Judge, Limits
from .parts import Part, Result, need, show, show_servers, write
from .questions import Questions
from .servers import BUDGET, INTERVAL, KINDS, Fleet, arms, describe, graph_share, trace

# Of a GPU's memory, for one server; with its weights and graphs it takes about half of it.
SERVER_BYTES = 6 << 30
WITHOUT_GRAPHS = "turns, no prefill graphs"
# Of decode steps.
LEAST_IN_GRAPHS = 0.9


class Check:
    """All parts, one after the other; what is known is written as soon as it is.

    given: the command line; gpu: whether servers run on one; folder: for logs and traces.
    """

    def __init__(self, given: argparse.Namespace, gpu: bool, folder: Path) -> None:
        self.clock = Clock(given.limit)
        self.given, self.gpu, self.folder = given, gpu, folder
        self.parts: list[Part] = []
        seen = look()
        about = {"machine": seen.machine, "arguments": sys.argv[1:], "dtype": given.dtype}
        about |= {"versions": {"sglang-tri": __version__, **versions()}}
        self.about = {**about, "budget": BUDGET, "interval": INTERVAL, "servers": {}}
        self.questions, limits = Questions(given.model_path), Limits.of(given.dtype)
        official = folder / "stats.pt"
        stats.save_as(stats.load(given.stats), official)
        self.judge = Judge(given.model_path, official, self.questions.think_end, limits)
        made = [arm for page in given.page_size for arm in arms(page, given, gpu, folder)]
        # A CPU is busy with two; on a GPU those of the next page size start meanwhile.
        at_once = max(2, min(8, seen.free // SERVER_BYTES))
        self.fleet = Fleet(made, given.model_path, folder, at_once)

    def run(self) -> int:
        """The exit status."""
        try:
            with cut_off(self.clock), closing(self.fleet):
                for page_size in self.given.page_size:
                    self._page(page_size)
        except CutOff as error:
            self._add("cut off", 0, Result([need("the check runs to its end", error, False)]), 0.0)
        write(self.given.json, self.about, self.parts, finished=True)
        print(f"\n{show(self.parts)}\n\n{show_servers(self.about['servers'])}\n{self.given.json}")
        return 1 if any(part.ok is False for part in self.parts) else 0

    def _page(self, page_size: int) -> None:
        stock, huge, policy, eager = (f"{kind}-{page_size}" for kind in KINDS)
        get, part = self.fleet.get, partial(self._part, page_size)
        references: list[outputs.References] = []

        def compare() -> Result:
            found = identical.check(get(stock), get(huge), self.questions)
            references.append(outputs.ask_others(get(stock), get(huge), self.questions))
            return found

        part("identical", compare)
        self._done(stock, huge)
        part("outputs", lambda: outputs.check(*self._judged(policy), *references))
        part("turns", lambda: turns.check(*self._judged(policy)))
        part("pool", lambda: pool.check(get(policy), self.questions))
        part("rows", lambda: rows.check(trace(self.folder, policy)))
        part("graphs", lambda: self._graphs(get(policy)))
        self._done(policy)
        part(WITHOUT_GRAPHS, lambda: self._without_graphs(eager))

    def _judged(self, name: str) -> tuple[Server, Path, Judge, Questions, int]:
        """A server, its trace, and what it is judged by."""
        server = self.fleet.get(name)
        # Some attention backends choose it themselves.
        page_size = int(server.internal_state()["page_size"])
        return server, trace(self.folder, name), self.judge, self.questions, page_size

    def _graphs(self, server: Server) -> Result:
        asked = self.gpu and "--disable-cuda-graph" not in self.given.server_arguments
        share = graph_share(server, "decode")
        met = (share or 0.0) >= LEAST_IN_GRAPHS if asked else None
        text = f"at least {LEAST_IN_GRAPHS:.0%} of decode steps are replayed from graphs"
        return Result([need(text, share, met)])

    def _without_graphs(self, name: str) -> Result:
        if not self.gpu:
            return Result([need("prefill has no CUDA graphs on a CPU", "not run", None)])
        found, moved = turns.check(*self._judged(name)), rows.check(trace(self.folder, name))
        self._done(name)
        return Result([*found.goals, *moved.goals], {**found.figures, "moved": moved.figures})

    def _done(self, *names: str) -> None:
        """These are not needed any more."""
        for name in names:
            try:
                self.about["servers"][name] = describe(self.fleet.get(name))
            except Exception as error:
                log = self.fleet.log_tail(name).splitlines()
                self.about["servers"][name] = {"error": _said(error), "log": log}
        self.fleet.done(*names)

    def _part(self, page_size: int, name: str, check: Callable[[], Result]) -> None:
        """One that raises has failed; the others go on."""
        began = time.monotonic()
        try:
            result = check()
        except Exception as error:
            result = Result([need("it runs to its end", _said(error), False)])
        self._add(name, page_size, result, time.monotonic() - began)

    def _add(self, name: str, page_size: int, result: Result, seconds: float) -> None:
        part = Part(name, page_size, result.goals, result.figures, seconds)
        self.parts.append(part)
        print(f"{name}, page size {page_size}: {part.verdict}", *part.goals, sep="\n  ", flush=True)
        write(self.given.json, self.about, self.parts, finished=False)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[-2000:]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--attention-backend", help="of all servers; default: SGLang's")
    parser.add_argument("--dtype", help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--page-size", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--json", type=Path, default=Path("results/exact.json"), help="the figures")
    parser.add_argument("--model-path", type=Path, default=FOLDER, help="default: reference model")
    parser.add_argument("--stats", type=Path, help="query statistics of that model")
    parser.add_argument(
        "--limit", type=seconds_to_end, metavar="SECONDS", help="end by then, with what is known"
    )
    parser.add_argument("server_arguments", nargs="*", help="for all servers, after --")
    return parser


def main() -> int:
    parser = _parser()
    given = parser.parse_args()
    if given.stats is None:
        given.stats = given.model_path / "stats.safetensors"
    if not given.stats.is_file():
        parser.error(f"--stats: there is no file {given.stats}")
    gpu = torch.cuda.is_available()
    given.dtype = given.dtype or ("bfloat16" if gpu else "float32")
    # Small matrices lose more by threads than they win.
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="sglang-tri-exact-"))
    status = Check(given, gpu, folder).run()
    if status:
        print(f"Servers' logs and rounds: {folder}")
    else:
        shutil.rmtree(folder)
    return status


if __name__ == "__main__":
    sys.exit(main())
