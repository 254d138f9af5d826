"""Models and servers, each made once; tests are ordered so that few servers live at a time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import tests.interpreted  # noqa: F401 - before anything that imports a kernel
from bench.accuracy.reference_model import FOLDER
from bench.models import CATALOGUE, get
from bench.models.tiny import make_model
from bench.server import Server
from sglang_tri import statistics as stats
from sglang_tri.patches.cpu import activation
from tests.adapters import make_adapter
from tests.setups import BUDGET, INTERVAL, SETUPS, Setup
from tests.tiny_stats import make_stats

PROBE = Path(__file__).parent / "probe"
# The servers need the other cores, and small matrices lose more by threads than they win.
torch.set_num_threads(1)
# For SGLang in this process, and in those that tests start from Python.
os.environ.update(activation.environment())


class Running:
    """A server of the tests, with what they need to judge it."""

    def __init__(self, name: str, server: Server, model: Path, folder: Path) -> None:
        self.name = name
        self.setup: Setup = SETUPS[name]
        self.server = server
        self.model = model
        self.folder = folder
        self.trace = folder / "trace"
        self.probe = folder / "probe"

    @property
    def stats(self) -> Path:
        """The query statistics in use, in the official layout."""
        if not self.setup.automatic:
            return self.model / "stats.pt"
        converted = self.folder / "automatic.pt"
        if not converted.exists():
            stats.save_as(stats.load(self.server.kv_policy()["statistics"]), converted)
        return converted


class Servers:
    """Starts a server when it is asked for, and the next of its group in the background meanwhile.

    Without other test processes, the next one whatever its group.
    """

    def __init__(self, folder: Path, sequence: list[str]) -> None:
        self._folder = folder
        self._sequence = sequence
        self._models: dict[str, Path] = {}
        self._running: dict[str, Running] = {}

    def get(self, name: str) -> Running:
        upcoming = self._upcoming(name)
        for other in set(self._running) - {name, *upcoming}:
            self._running.pop(other).server.stop()
        running = self._start(name)
        running.server.wait_until_ready()
        for following in upcoming:
            self._start(following)
        return running

    def _upcoming(self, name: str) -> list[str]:
        following = self._sequence[self._sequence.index(name) + 1 :][:1]
        if "PYTEST_XDIST_WORKER" not in os.environ:
            return following
        return [other for other in following if group_of(other) == group_of(name)]

    def stop(self) -> None:
        for running in self._running.values():
            running.server.stop()

    def model(self, kind: str) -> Path:
        if kind not in self._models:
            path = self._folder / kind
            if kind in CATALOGUE:
                path = get(kind)
            elif kind == "reference":
                shutil.copytree(FOLDER, path)
                stats.save_as(stats.load(path / "stats.safetensors"), path / "stats.pt")
            else:
                make_stats(make_model(kind, path), path / "stats.pt")
            self._models[kind] = path
        return self._models[kind]

    def adapter(self, kind: str, name: str) -> Path:
        path = self._folder / "adapters" / kind / name
        return path if path.exists() else make_adapter(name, self.model(kind), path)

    def _start(self, name: str) -> Running:
        if name not in self._running:
            setup = SETUPS[name]
            folder = self._folder / name
            folder.mkdir()
            model = self.model(setup.kind)
            arguments = list(setup.arguments)
            if setup.adapters:
                made = [f"{each}={self.adapter(setup.kind, each)}" for each in setup.adapters]
                arguments += ["--lora-paths", *made]
            if setup.policy:
                arguments += ["--kv-policy", "triattention"]
                if not setup.automatic:
                    arguments += ["--kv-stats", str(model / "stats.pt")]
                arguments += ["--kv-budget", str(BUDGET), "--kv-interval", str(INTERVAL)]
            environment = {
                "SGLANG_KV_POLICY_PER_REQUEST": "1",
                "SGLANG_KV_POLICY_TRACE": str(folder / "trace"),
                "SGLANG_KV_POLICY_CACHE": str(self._folder / "statistics"),
                "KV_PROBE_FOLDER": str(folder / "probe"),
                "OMP_NUM_THREADS": "1",  # Servers of two test processes share the cores.
                "PYTHONPATH": os.pathsep.join([str(PROBE), os.environ.get("PYTHONPATH", "")]),
                **setup.environment,
            }
            if setup.policy:
                environment[activation.VARIABLE] = ""  # The flag is to be enough.
            server = Server(model, arguments, folder / "log", environment)
            self._running[name] = Running(name, server, model, folder)
        return self._running[name]


@pytest.hookimpl(tryfirst=True)  # Before tests are left out by their markers.
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Server by server, the tests of each in one process; then those without one."""
    names = list(SETUPS)
    items.sort(key=lambda item: names.index(name) if (name := server_name(item)) else len(names))
    for item in items:
        name = server_name(item)
        if name is not None:
            item.add_marker(pytest.mark.server)
            item.add_marker(pytest.mark.xdist_group(group_of(name)))
            if SETUPS[name].full:
                item.add_marker(pytest.mark.full)


def group_of(server: str) -> str:
    return SETUPS[server].group or server


def server_name(item: pytest.Item) -> str | None:
    callspec = getattr(item, "callspec", None)
    return None if callspec is None else callspec.params.get("server")


@pytest.fixture(scope="session")
def servers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Servers]:
    used = {server_name(item) for item in request.session.items}
    pool = Servers(tmp_path_factory.mktemp("servers"), [name for name in SETUPS if name in used])
    yield pool
    pool.stop()


@pytest.fixture
def server(request: pytest.FixtureRequest, servers: Servers) -> Running:
    return servers.get(request.param)


@pytest.fixture(scope="session")
def stock_answers() -> dict[str, object]:
    """What the stock server answered; its tests run first and fill it."""
    return {}
