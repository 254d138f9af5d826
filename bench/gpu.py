"""All that a GPU has to show, in ten minutes: kernels are right, servers are exact, what it gains.

    python -m bench.gpu

Runs the kernel tests, `bench.exact`, `bench.kernels` and `bench.serving --preset quick`; what takes
times runs alone. A step that fails, or takes too long, does not stop the next one. Into
`results/<card>/`: each step's log and JSON, and summary.json. Exit status 1 if a step failed. What
follows `--` goes to all servers. `--device cpu` tries it out with tiny sizes, whose times mean
nothing.
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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.table import table

LIMIT_S = 600.0
GRACE_S = 30.0
# Each worker compiles on a core, and keeps a context on the card.
MOST_WORKERS = 8


@dataclass(frozen=True)
class Step:
    """A command.

    Attributes:
        arguments: of Python.
        limit_s: seconds that it may take.
    """

    name: str
    arguments: list[str]
    limit_s: float


@dataclass(frozen=True)
class Outcome:
    """How a step ended; `status` is None if it took too long."""

    name: str
    command: str
    status: int | None
    seconds: float

    @property
    def verdict(self) -> str:
        if self.status is None:
            return "too long"
        return "ok" if self.status == 0 else f"FAILED ({self.status})"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    card = _card(arguments.device)
    if card is None:
        print("There is no GPU here: --device cpu tries this out.", file=sys.stderr)
        return 2
    folder: Path = arguments.out or Path("results") / re.sub(r"[^a-z0-9]+", "-", card.lower())
    folder.mkdir(parents=True, exist_ok=True)
    plan = steps(folder, arguments.device == "cpu", arguments.server_arguments)
    wanted = arguments.steps or [step.name for group in plan for step in group]
    end = time.monotonic() + arguments.limit
    outcomes: list[Outcome] = []
    for group in plan:
        chosen = [step for step in group if step.name in wanted]
        with ThreadPoolExecutor(max(1, len(chosen))) as pool:
            outcomes += pool.map(lambda step: _run(step, folder, end), chosen)
        # What was found stays if a later step is cut off.
        found = {"card": card, "steps": [asdict(each) for each in outcomes]}
        (folder / "summary.json").write_text(json.dumps(found, indent=1) + "\n")
    rows = [[each.name, each.verdict, f"{each.seconds:.0f} s"] for each in outcomes]
    print(table([["step", "", "time"], *rows]), f"written to {folder}", sep="\n")
    return int(any(each.status != 0 for each in outcomes))


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
    exact = ["-m", "bench.exact", "--json", str(folder / "exact.json")]
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
        serving += ["--preset", "quick", "--limit", "280"]
    if servers:
        exact += ["--", *servers]
        serving += ["--", *servers]
    slow = 6 if tiny else 1
    return [
        [Step("kernel tests", tests, 180 * slow), Step("exact", exact, 180 * slow)],
        [Step("kernels", kernels, 80 * slow)],
        [Step("serving", serving, 330 * slow)],
    ]


def _run(step: Step, folder: Path, end: float) -> Outcome:
    """Run it, at most until `end`, in a group of processes that ends with it."""
    command = [sys.executable, *step.arguments]
    began = time.monotonic()
    limit_s = min(step.limit_s, end - began)
    shown = " ".join(["python", *step.arguments])
    print(f"{step.name}: {shown}", flush=True)
    with (folder / f"{step.name.replace(' ', '-')}.log").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(max(0.0, limit_s))
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _stop(process)
    return Outcome(step.name, shown, status, time.monotonic() - began)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """First politely: servers are stopped, and what is known is written."""
    for sign in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
            process.wait(GRACE_S)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _card(device: str) -> str | None:
    """The GPU's name, asked for in a process of its own: the steps are to have all its memory."""
    if device == "cpu":
        return "cpu"
    ask = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    found = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    return found.stdout.strip() or None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [step.name for group in steps(Path(), False) for step in group]
    parser.add_argument("--steps", nargs="+", choices=names, help="(default: all)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path, help="folder (default: results/<card>)")
    parser.add_argument(
        "--limit", type=float, default=LIMIT_S, help="seconds in all (default: %(default)s)"
    )
    parser.add_argument("server_arguments", nargs="*", help="for all servers, after --")
    return parser


if __name__ == "__main__":
    sys.exit(main())
