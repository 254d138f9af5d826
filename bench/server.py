"""Start a real SGLang server in a process of its own, talk to it, stop it."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import requests

from sglang_tri.patches.cpu import activation

READY_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 20.0
# Below those that Linux gives to clients.
PORTS = (20000, 32000)
# Stock SGLang: of our plugins only the platform, where there is no accelerator to run on.
STOCK_ENVIRONMENT = {"SGLANG_PLUGINS": activation.NAME, **activation.environment()}
# SGLang checks its pool after every step: used + free + cached slots must make the whole.
STRICT = {
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
}


class ServerFailed(RuntimeError):
    """The server ended before it was ready; the message holds the end of its log."""


class Endpoint:
    """A server that runs somewhere, by its URL."""

    def __init__(self, url: str) -> None:
        self.url = url

    def post(self, path: str, **body: Any) -> requests.Response:
        return requests.post(f"{self.url}{path}", json=body, timeout=600)

    def generate(self, **body: Any) -> Any:
        """`/generate`; returns the decoded answer.

        Raises:
            requests.HTTPError: the server refused; with its reason.
        """
        response = self.post("/generate", **body)
        if not response.ok:
            raise requests.HTTPError(response.text, response=response)
        return response.json()

    def server_info(self) -> dict[str, Any]:
        answer: dict[str, Any] = requests.get(f"{self.url}/server_info", timeout=60).json()
        return answer

    def internal_state(self) -> dict[str, Any]:
        state: dict[str, Any] = self.server_info()["internal_states"][0]
        return state

    def kv_policy(self) -> dict[str, Any]:
        """The policy's report in `/server_info`."""
        report: dict[str, Any] = self.internal_state()["kv_policy"]
        return report

    def flush_cache(self) -> bool:
        """Empty the radix cache, once nothing is running."""
        return self.post("/flush_cache?timeout=30").ok


class Server(Endpoint):
    """A running SGLang server; a context manager that waits for it and stops it.

    Args:
        model: model folder.
        arguments: further command-line arguments.
        log: file that receives the server's output; query statistics that it makes lie beside.
        environment: variables added to this process's own.
        on_wait: called about twice a second while the server starts.
    """

    def __init__(
        self,
        model: Path,
        arguments: Sequence[str],
        log: Path,
        environment: Mapping[str, str] | None = None,
        on_wait: Callable[[], object] = lambda: None,
    ) -> None:
        super().__init__(f"http://127.0.0.1:{free_port()}")
        self.log = log
        self._on_wait = on_wait
        self._ready = False
        self._deadline = time.monotonic() + READY_TIMEOUT_S
        command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model)]
        command += ["--host", "127.0.0.1", "--port", self.url.rsplit(":", 1)[1], *arguments]
        cache = {"SGLANG_KV_POLICY_CACHE": str(log.parent / "statistics")}
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**cache, **os.environ, **(environment or {})},
                start_new_session=True,
            )

    def __enter__(self) -> Server:
        try:
            self.wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def wait_until_ready(self) -> None:
        """Block until the server answers.

        Raises:
            ServerFailed: it ended, or was not ready in time; or that was so before.
        """
        while not self._ready and not self._answers():
            if self._process.poll() is not None:
                raise ServerFailed(f"the server ended while it started:\n{self.log_tail()}")
            if time.monotonic() > self._deadline:
                raise ServerFailed(f"the server was not ready in time:\n{self.log_tail()}")
            self._on_wait()
            time.sleep(0.5)
        self._ready = True

    def _answers(self) -> bool:
        try:
            return requests.get(f"{self.url}/health", timeout=5).ok
        except requests.RequestException:
            return False

    def stop(self) -> None:
        """End the server and all its processes."""
        stop_all([self])

    def ask_to_end(self) -> None:
        """Return at once; SGLang answers running requests first."""
        self._signal(signal.SIGTERM)

    def kill(self, patience: float) -> None:
        """End what is left of it after `patience` seconds."""
        self._wait(patience)
        self._signal(signal.SIGKILL)
        self._wait(STOP_TIMEOUT_S)

    def _wait(self, seconds: float) -> None:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def log_tail(self, lines: int = 40) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


def stop_all(servers: Sequence[Server]) -> None:
    """End them and all their processes; they take their time to end, but all at once."""
    for server in servers:
        server.ask_to_end()
    deadline = time.monotonic() + STOP_TIMEOUT_S
    for server in servers:
        server.kill(max(0.0, deadline - time.monotonic()))


def free_port() -> int:
    """A TCP port that nobody listens on now, and that no client is given before it is used."""
    while True:
        port = random.SystemRandom().randrange(*PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
