"""SGLang's own load generator, in a process that outlives a run: importing it takes seconds."""

from __future__ import annotations

import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from io import TextIOBase
from multiprocessing import get_context
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from bench.load.workloads import Workload

MODULE = "sglang.benchmark.serving"
_BEGINS, _PAUSE_S = "Starting main benchmark run", 1.0  # It sleeps between its warm-up and the run.


class LoadFailed(RuntimeError):
    """Requests failed, or the client did; the message ends with the path of its log."""


class Client:
    """The client; a context manager.

    Args:
        folder: for its log, its results and its home: SGLang's client keeps prompts there.
        tokenizer: folder of the tokenizer that it draws prompts with.
    """

    def __init__(self, folder: Path, tokenizer: Path) -> None:
        self._folder, self._tokenizer = folder, tokenizer
        context = get_context("spawn")
        self._process = ProcessPoolExecutor(1, context, initializer=_live_in, initargs=(folder,))

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.shutdown(cancel_futures=True)

    def run(self, url: str, workload: Workload) -> dict[str, Any]:
        """Send the workload; returns what the client reports, and `began`, in Unix time.

        Raises:
            LoadFailed: not all requests were answered, or the client gave up.
        """
        log, output = self._folder / "client.log", self._folder / "client.jsonl"
        arguments = [*workload.arguments, *self._arguments(url), "--output-file", str(output)]
        try:
            result = self._process.submit(_run, arguments, log).result()
        except (SystemExit, ValueError) as error:
            raise LoadFailed(f"{workload.name}: SGLang's client gave up: {error}; {log}") from error
        if result["completed"] != workload.requests:
            errors = sorted({error for error in result["errors"] if error})
            raise LoadFailed(f"{workload.name}: {errors or 'unanswered requests'}; {log}")
        # A refusal that comes as a stream of one error counts as an answer there.
        silent = sum(not first_token for first_token in result["ttfts"])
        if silent:
            raise LoadFailed(f"{workload.name}: {silent} requests got no token")
        return result

    def _arguments(self, url: str) -> list[str]:
        return [
            *("--backend", "sglang", "--base-url", url),
            *("--tokenizer", str(self._tokenizer)),
            *("--cache-report", "--output-details", "--disable-tqdm"),
        ]


def _live_in(folder: Path) -> None:
    os.environ["HOME"] = str(folder)


def _run(arguments: list[str], log: Path) -> dict[str, Any]:
    from sglang.benchmark.serving import cli_main

    sys.argv = [MODULE, *arguments]
    with log.open("a") as file:
        print("python -m", *sys.argv, file=file)
        output = _Watched(file)
        with redirect_stdout(output), redirect_stderr(file):
            cli_main()
    path = Path(arguments[-1])
    result: dict[str, Any] = json.loads(path.read_text().splitlines()[-1])
    path.unlink()
    if output.began is None:
        raise LoadFailed(f"SGLang's client did not say when it began; {log}")
    return {**result, "began": output.began}


class _Watched(TextIOBase):
    """Passes text on, and notes when the run begins."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self.began: float | None = None

    def write(self, text: str) -> int:
        if _BEGINS in text:
            self.began = time.time() + _PAUSE_S
        return self._file.write(text)
