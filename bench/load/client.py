"""SGLang's own load generator, in a process that outlives a run: importing it takes seconds."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from io import TextIOBase
from multiprocessing import get_context
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import numpy as np

from bench.cutoff import CutOff
from bench.load.absent import stand_in
from bench.load.workloads import Workload

PERCENTILES = (50, 95, 99)
MODULE = "sglang.benchmark.serving"
_BEGINS, _PAUSE_S = "Starting main benchmark run", 1.0  # It sleeps between its warm-up and the run.


@dataclass(frozen=True)
class Load:
    """What the client saw.

    Attributes:
        began: Unix time of the first request.
        seconds: from then to the last token.
        output_rate: output tokens per second.
        request_rate: requests per second.
        first_token: seconds to the first token, p50, p95 and p99.
        between_tokens: seconds between tokens, p50, p95 and p99. The client spreads the time
            between two chunks evenly over the tokens that come with one.
        cached: prompt tokens that were not computed.
    """

    began: float
    seconds: float
    output_rate: float
    request_rate: float
    first_token: tuple[float, ...]
    between_tokens: tuple[float, ...]
    cached: int


class LoadFailed(RuntimeError):
    """Requests failed, or the client did; the message ends with the path of its log."""


class Client:
    """The client; a context manager.

    Args:
        folder: for its log, its results and its home: SGLang's client keeps prompts there.
        model: folder of the model that is served; prompts of ids are drawn from its vocabulary.
        tokenizer: folder of the tokenizer that prompts of text are drawn with.
    """

    def __init__(self, folder: Path, model: Path, tokenizer: Path) -> None:
        self._folder, self._model, self._tokenizer = folder, model, tokenizer
        context = get_context("spawn")
        self._process = ProcessPoolExecutor(1, context, initializer=_live_in, initargs=(folder,))
        self._pid = self._process.submit(os.getpid)
        # While servers start, not in the first run.
        self._process.submit(_prepare)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind:
            self._kill()
        self._process.shutdown(cancel_futures=True)

    def _kill(self) -> None:
        with suppress(ProcessLookupError, BrokenProcessPool):
            os.kill(self._pid.result(), signal.SIGTERM)

    def run(self, url: str, workload: Workload) -> Load:
        """Send the workload.

        Raises:
            LoadFailed: not all requests were answered, or the client gave up.
            CutOff: this run is over, and so is the client.
        """
        log, output = self._folder / "client.log", self._folder / "client.jsonl"
        tokenizer = self._tokenizer if workload.as_text else self._model
        arguments = [*workload.arguments, "--backend", "sglang", "--base-url", url]
        arguments += ["--tokenizer", str(tokenizer), "--output-file", str(output)]
        arguments += ["--cache-report", "--output-details", "--disable-tqdm"]
        try:
            return self._process.submit(_run, arguments, output, log, workload).result()
        except (SystemExit, ValueError) as error:
            raise LoadFailed(f"{workload.name}: SGLang's client gave up: {error}; {log}") from error
        except CutOff:
            self._kill()  # Or servers would answer everything before they end.
            raise


def _live_in(folder: Path) -> None:
    os.environ["HOME"] = str(folder)


def _prepare() -> None:
    _client()


def _client() -> Callable[[], object]:
    # It wants Hugging Face's datasets (with pandas and pyarrow) for a workload with images.
    with stand_in("datasets", "load_dataset"):
        from sglang.benchmark.serving import cli_main

    return cli_main


def _run(arguments: list[str], output: Path, log: Path, workload: Workload) -> Load:
    """In the client's process."""
    cli_main = _client()
    sys.argv = [MODULE, *arguments]
    with log.open("a") as file:
        print("python -m", *sys.argv, file=file)
        watched = _Watched(file)
        with redirect_stdout(watched), redirect_stderr(file):
            cli_main()
    result: dict[str, Any] = json.loads(output.read_text())
    output.unlink()
    _check(result, workload, log)
    if watched.began is None:
        raise LoadFailed(f"SGLang's client did not say when it began; {log}")
    return Load(
        began=watched.began,
        seconds=result["duration"],
        output_rate=result["output_throughput"],
        request_rate=result["request_throughput"],
        first_token=_percentiles(result["ttfts"]),
        between_tokens=_percentiles([gap for gaps in result["itls"] for gap in gaps]),
        cached=sum(result["cached_tokens"]),
    )


def _check(result: dict[str, Any], workload: Workload, log: Path) -> None:
    if result["completed"] != workload.requests:
        errors = sorted({error for error in result["errors"] if error})
        raise LoadFailed(f"{workload.name}: {errors or 'unanswered requests'}; {log}")
    # A refusal that comes as a stream of one error counts as an answer there.
    silent = sum(not first_token for first_token in result["ttfts"])
    if silent:
        raise LoadFailed(f"{workload.name}: {silent} requests got no token; {log}")
    written = result["total_output_tokens"]
    if workload.output not in (None, written):
        raise LoadFailed(f"{workload.name}: {written} output tokens, not {workload.output}; {log}")


def _percentiles(values: list[float]) -> tuple[float, ...]:
    return tuple(float(value) for value in np.percentile(values, PERCENTILES))


class _Watched(TextIOBase):
    """Passes text on, and notes when the run begins."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self.began: float | None = None

    def write(self, text: str) -> int:
        if _BEGINS in text:
            self.began = time.time() + _PAUSE_S
        return self._file.write(text)
