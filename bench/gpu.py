"""All that a GPU has to show, in ten minutes: kernels are right, servers are exact, what it gains.

`python -m bench.gpu` runs the kernel tests, `bench.accuracy.exact`, `bench.kernels` and
`bench.serving --preset quick`; what is timed runs alone. A step that fails, or takes too long, does
not stop the next one. Into `results/<card>/`: each step's log and JSON, and summary.json. Exit
status 1 if a step failed. `--device cpu` tries it out with tiny sizes, whose times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from bench.cutoff import Clock, CutOff, cut_off, held_back, seconds_to_end
from bench.machine import look
from bench.table import table

LIMIT_S = 600.0
# From the request to end until it is forced: servers are stopped, and what is known is written.
GRACE_S = 25.0
# Each worker compiles on a core, and keeps a context on the card.
MOST_WORKERS = 8
_POLL_S = 0.2


@dataclass(frozen=True)
class Step:
    """A command.

    Attributes:
        arguments: of Python.
        limit_s: seconds that it may take, the end included.
        ends_itself: whether it takes `--limit`, behind the module's name.
    """

    name: str
    arguments: list[str]
    limit_s: float
    ends_itself: bool = False

    def command(self, limit_s: float) -> list[str]:
        """With `limit_s` seconds left for it."""
        more = ["--limit", f"{max(1.0, limit_s):.0f}"] if self.ends_itself else []
        return [*self.arguments[:2], *more, *self.arguments[2:]]


class Running:
    """A step that has begun; its output goes into a log in `folder`.

    Attributes:
        outcome: as in summary.json; `status` is None if it took too long, or still runs.
    """

    def __init__(self, step: Step, folder: Path, left_s: float) -> None:
        self._began = time.monotonic()
        self._end = self._began + min(step.limit_s, left_s) - GRACE_S
        command = step.command(self._end - self._began)
        shown = " ".join(["python", *command])
        print(f"{step.name}: {shown}", flush=True)
        self.outcome: dict[str, Any] = {"name": step.name, "command": shown, "status": None}
        with (folder / f"{step.name.replace(' ', '-')}.log").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *command],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def poll(self) -> bool:
        """Look whether it has ended, or its time has, and note when it did."""
        status = self.process.poll()
        if status is None and time.monotonic() < self._end:
            return False
        if "seconds" not in self.outcome:
            self.outcome |= {"status": status, "seconds": time.monotonic() - self._began}
        return True


def main(argv: Sequence[str] | None = None) -> int:
    clock = Clock()
    arguments = _parse(argv)
    card = "cpu" if arguments.device == "cpu" else look().card
    if not card:
        print("There is no GPU here: --device cpu tries this out.", file=sys.stderr)
        return 2
    folder: Path = arguments.out or Path("results") / re.sub(r"[^a-z0-9]+", "-", card.lower())
    folder.mkdir(parents=True, exist_ok=True)
    outcomes: list[dict[str, Any]] = []
    try:
        with cut_off(clock):
            for group in steps(folder, arguments.device == "cpu", arguments.server_arguments):
                chosen = [step for step in group if step.name in (arguments.steps or step.name)]
                outcomes += _run(chosen, folder, arguments.limit - clock.seconds)
                # What was found stays if a later step is cut off.
                found = {"card": card, "steps": outcomes}
                (folder / "summary.json").write_text(json.dumps(found, indent=1) + "\n")
    except CutOff as error:
        print(error)
        return 1
    rows = [["step", "", "time"]]
    for each in outcomes:
        failed = "too long" if each["status"] is None else f"FAILED ({each['status']})"
        verdict = "ok" if each["status"] == 0 else failed
        rows.append([each["name"], verdict, f"{each['seconds']:.0f} s"])
    print(table(rows), f"written to {folder}", sep="\n")
    return int(any(each["status"] != 0 for each in outcomes))


def steps(folder: Path, tiny: bool, servers: Sequence[str] = ()) -> list[list[Step]]:
    """What runs, group after group; the steps of a group run at once.

    Args:
        folder: for what they write.
        tiny: whether a CPU tries it out.
        servers: further arguments of all servers.
    """
    workers = str(min(MOST_WORKERS, os.cpu_count() or 1))
    tests = ["-m", "pytest", "-q", "-rf", "-n", workers, "tests/kernels"]
    # FlashInfer would compile attention kernels first, for minutes.
    tests += ["--ignore", "tests/kernels/test_flashinfer.py"]
    exact = ["-m", "bench.accuracy.exact", "--json", str(folder / "exact.json")]
    kernels = ["-m", "bench.kernels", "--models", "qwen3-8b", "--out", str(folder / "kernels")]
    serving = ["-m", "bench.serving", "--output", str(folder / "serving.json")]
    if tiny:
        tests += ["-k", "torch and not dtypes"]
        exact += ["--page-size", "1"]
        kernels += ["--device", "cpu"]
        serving += ["--preset", "tiny", "--budget", "16", "--interval", "16", "--pools", "4"]
        serving += ["--others-in", "4", "--workloads", "reasoning", "never", "--outputs", "96"]
        serving += ["--arms", "production", "triattention", "--repeats", "1"]
    else:
        kernels += ["--candidates", "2176", "--requests", "8", "1", "64"]
        serving += ["--preset", "quick"]
    if servers:
        exact += ["--", *servers]
        serving += ["--", *servers]
    slow = 6 if tiny else 1
    return [
        [Step("kernel tests", tests, 190 * slow), Step("exact", exact, 190 * slow, True)],
        [Step("kernels", kernels, 95 * slow)],
        [Step("serving", serving, 310 * slow, True)],
    ]


def _run(chosen: Sequence[Step], folder: Path, left_s: float) -> list[dict[str, Any]]:
    """All at once, in `left_s` seconds at the most."""
    running: list[Running] = []
    with _ending(running):
        for step in chosen:
            with held_back():
                running.append(Running(step, folder, left_s))
        while sum(not each.poll() for each in running):
            time.sleep(_POLL_S)
    return [each.outcome for each in running]


@contextmanager
def _ending(running: Sequence[Running]) -> Iterator[None]:
    """Behind this block nothing of them is left, neither processes nor their servers."""
    try:
        yield
    finally:
        everyone: list[psutil.Process] = []
        for each in running:
            # Their servers have sessions of their own.
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(each.process.pid)
                everyone += [process, *process.children(recursive=True)]
        for each in running:
            with suppress(ProcessLookupError):
                os.killpg(each.process.pid, signal.SIGINT)
        for process in psutil.wait_procs(everyone, GRACE_S)[1]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        for each in running:
            each.process.wait()


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    names = [step.name for group in steps(Path(), False) for step in group]
    parser.add_argument("--steps", nargs="+", choices=names, help="default: all")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: tiny sizes")
    parser.add_argument("--out", type=Path, help="folder; default: results/<card>")
    limit: dict[str, Any] = {"type": seconds_to_end, "default": LIMIT_S, "metavar": "SECONDS"}
    parser.add_argument("--limit", help="in all; default: %(default)s", **limit)
    parser.add_argument("server_arguments", nargs="*", help="for all servers, after --")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
