"""An exact check of real SGLang servers with the policy on, on whatever machine this is.

Servers of a small model (the reference model, unless another is named) run with the dtype, the
attention backend and the page sizes that are asked for; the float32 simulator judges them here, on
the CPU, and needs no GPU. The parts, for each page size:

identical   a budget that is never reached: stock SGLang's ids and log-probabilities, bit for bit
outputs     log-probabilities are those of the model with the recorded kept sets; without eviction
            they are at least ten times as far off
turns       a second turn goes on from the compressed first one, and is as exact; on a GPU also
            without CUDA graphs in prefill
pool        after 200 short requests, some of them aborted, every slot is free or cached
rows        the rows of K and V are, bit for bit, those that the trace says were moved
graphs      on a GPU, decode steps are replayed from CUDA graphs

Further arguments for all servers stand after `--`. Exit status 1 if a part fails, or if a signal or
`--limit` ends the check before it is done.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.accuracy.exact import identical, outputs, pool, rows, turns
from bench.accuracy.exact.judge import Judge
from bench.accuracy.exact.outputs import Limits, References
from bench.accuracy.exact.questions import Questions
from bench.accuracy.exact.report import Part, show, show_servers, write
from bench.accuracy.exact.results import Result, need
from bench.accuracy.exact.servers import (
    BUDGET,
    HUGE,
    INTERVAL,
    NO_PREFILL_GRAPHS,
    POLICY,
    STOCK,
    Fleet,
    arm_name,
    arms,
    describe,
    graph_share,
    trace,
)
from bench.accuracy.reference_model import FOLDER
from bench.cutoff import Clock, CutOff, cut_off, seconds_to_end
from bench.machine import look, versions
from bench.server import Server
from sglang_tri import __version__
from sglang_tri import statistics as stats

# A CPU is busy with two; on a GPU those of the next page size start meanwhile.
FEWEST_AT_ONCE, MOST_AT_ONCE = 2, 8
# Of a GPU's memory, for one server; with its weights and graphs it takes about half of it.
SERVER_BYTES = 6 << 30
WITHOUT_GRAPHS = "turns, no prefill graphs"
# Of decode steps.
LEAST_IN_GRAPHS = 0.9


class Check:
    """All parts, one after the other; what is known is written as soon as it is.

    Args:
        given: the command line.
        gpu: whether servers run on one.
        folder: for logs and traces.
    """

    def __init__(self, given: argparse.Namespace, gpu: bool, folder: Path) -> None:
        self.clock = Clock(given.limit)
        self.given, self.gpu, self.folder = given, gpu, folder
        self.parts: list[Part] = []
        self.about: dict[str, Any] = {
            "machine": "",
            "arguments": sys.argv[1:],
            "versions": {"sglang-tri": __version__, **versions()},
            "dtype": given.dtype,
            "budget": BUDGET,
            "interval": INTERVAL,
            "servers": {},
        }
        self.limits = Limits.of(given.dtype)
        self.questions = Questions(given.model_path)
        official = folder / "stats.pt"
        stats.save_as(stats.load(given.stats), official)
        self.judge = Judge(
            given.model_path,
            official,
            BUDGET,
            INTERVAL,
            self.questions.think_end,
            self.limits.near,
        )

    def run(self) -> int:
        """The exit status."""
        made = [
            arm
            for page in self.given.page_size
            for arm in arms(page, self.given, self.gpu, self.folder)
        ]
        seen = look()
        self.about["machine"] = seen.machine
        at_once = max(FEWEST_AT_ONCE, min(MOST_AT_ONCE, seen.free // SERVER_BYTES))
        fleet = Fleet(made, self.given.model_path, self.folder, at_once)
        try:
            with cut_off(self.clock), closing(fleet):
                for page_size in self.given.page_size:
                    self._page(fleet, page_size)
        except CutOff as error:
            cut = Result([need("the check runs to its end", str(error), False)])
            self._add("cut off", 0, cut, 0.0)
        self._write(finished=True)
        print(f"\n{show(self.parts)}\n\n{show_servers(self.about['servers'])}\n{self.given.json}")
        return 1 if any(part.ok is False for part in self.parts) else 0

    def _page(self, fleet: Fleet, page_size: int) -> None:
        stock, huge, policy = (arm_name(kind, page_size) for kind in (STOCK, HUGE, POLICY))
        references: References | None = None

        def compare() -> Result:
            nonlocal references
            servers = fleet.get(stock), fleet.get(huge)
            found = identical.check(*servers, self.questions)
            references = References.ask(*servers, self.questions)
            return found

        self._part("identical", page_size, compare)
        self._done(fleet, [stock, huge])
        recorded = trace(self.folder, policy)

        def judged() -> Result:
            server = fleet.get(policy)
            return outputs.check(server, recorded, references, *self._rest(server))

        self._part("outputs", page_size, judged)
        self._part("turns", page_size, lambda: self._turns(fleet.get(policy), recorded))
        self._part("pool", page_size, lambda: pool.check(fleet.get(policy), self.questions))
        self._part("rows", page_size, lambda: rows.check(recorded))
        self._part("graphs", page_size, lambda: self._graphs(fleet.get(policy)))
        self._done(fleet, [policy])
        self._part(WITHOUT_GRAPHS, page_size, partial(self._without_graphs, fleet, page_size))

    def _rest(self, server: Server) -> tuple[Judge, Questions, int, Limits]:
        """What outputs are judged by; some attention backends choose the page size themselves."""
        page_size = int(server.internal_state()["page_size"])
        return self.judge, self.questions, page_size, self.limits

    def _turns(self, server: Server, recorded: Path) -> Result:
        return turns.check(server, recorded, *self._rest(server))

    def _graphs(self, server: Server) -> Result:
        share = graph_share(server, "Decode")
        asked = self.gpu and "--disable-cuda-graph" not in self.given.server_arguments
        met = share is not None and share >= LEAST_IN_GRAPHS if asked else None
        text = f"at least {LEAST_IN_GRAPHS:.0%} of decode steps are replayed from graphs"
        return Result([need(text, f"{share}", met)])

    def _without_graphs(self, fleet: Fleet, page_size: int) -> Result:
        if not self.gpu:
            return Result([need("prefill has no CUDA graphs on a CPU", "not run", None)])
        name = arm_name(NO_PREFILL_GRAPHS, page_size)
        recorded = trace(self.folder, name)
        found = self._turns(fleet.get(name), recorded)
        moved = rows.check(recorded)
        self._done(fleet, [name])
        return Result([*found.goals, *moved.goals], {**found.figures, "moved": moved.figures})

    def _done(self, fleet: Fleet, names: Sequence[str]) -> None:
        """These are not needed any more."""
        for name in names:
            try:
                self.about["servers"][name] = describe(fleet.get(name))
            except Exception as error:
                self.about["servers"][name] = {
                    "error": _said(error),
                    "log": fleet.log_tail(name).splitlines(),
                }
        fleet.done(names)

    def _part(self, name: str, page_size: int, check: Callable[[], Result]) -> None:
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
        self._write(finished=False)

    def _write(self, finished: bool) -> None:
        write(self.given.json, self.about, self.parts, finished)


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
