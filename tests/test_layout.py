"""How the code hangs together: imports, who looks into SGLang, and how many files a thing takes."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import get_type_hints

import pytest

import sglang_tri.patches.versions.interface as interface
from sglang_tri.patches.versions import v0_5_17
from tests.client import Ask, send, tokens_of
from tests.conftest import Running
from tests.probing import ask
from tests.setups import BUDGET, INTERVAL

ROOT = Path(__file__).resolve().parents[1]
NAMES = {
    "sglang_tri": "sglang_tri",
    "kernels": "sglang_tri.kernels",
    "patches": "sglang_tri.patches",
}
# Those that may import SGLang, beside the hooks' registry, which is the way in.
INSIDE = ("versions", "cpu", "hooks.py")
OPAQUE = {name for name, kind in vars(interface).items() if type(kind).__name__ == "NewType"}
FILES = 8


def modules() -> Iterator[tuple[str, Path]]:
    """All modules of the project by name, each once."""
    for folder, prefix in NAMES.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if folder != "sglang_tri" or parts[0] not in NAMES:
                name = ".".join([prefix, *parts])
                yield name.removesuffix(".__init__"), path


def imports(tree: ast.AST) -> Iterator[str]:
    """What is imported when the code runs, also inside functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield f"{node.module}.{alias.name}"
                yield node.module
        yield from imports(node)


def test_no_import_cycle() -> None:
    """Nor one that an import inside a function only hides."""
    found = dict(modules())
    graph: dict[str, set[str]] = {}
    for name, path in found.items():
        wanted = set(imports(ast.parse(path.read_text()))) & set(found)
        # A package's own module is there when one of its modules is imported.
        graph[name] = {other for other in wanted if not name.startswith(f"{other}.")} - {name}
    order = list(TopologicalSorter(graph).static_order())
    assert set(order) == set(found)


def test_who_imports_sglang() -> None:
    for _, path in modules():
        relative = path.relative_to(ROOT).parts
        if relative[0] == "patches" and relative[1] in INSIDE:
            continue
        names = {name.partition(".")[0] for name in imports(ast.parse(path.read_text()))}
        assert "sglang" not in names, path


def opened(function: ast.FunctionDef) -> Iterator[str]:
    """Where a function looks into one of SGLang's objects that it was given."""
    arguments = [*function.args.args, *function.args.kwonlyargs]
    given = {
        argument.arg
        for argument in arguments
        if argument.annotation and OPAQUE & set(ast.unparse(argument.annotation).split(" | "))
    }
    for node in ast.walk(function):
        match node:
            case ast.Attribute(value=ast.Name(id=name)) if name in given:
                yield f"{function.name}: {ast.unparse(node)}"


def test_only_an_adapter_looks_into_requests_batches_and_the_tree() -> None:
    """The type checker says so, too: the hooks' types of these have no attributes."""
    assert {"Req", "ScheduleBatch", "BasePrefixCache", "Scheduler", "PrefillAdder"} <= OPAQUE
    hooks = [ROOT / "patches" / name for name in ("scheduler.py", "radix.py", "calibrate.py")]
    seen = 0
    for path in hooks:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert not list(opened(node)), path
                seen += 1
    assert seen > 40


def test_an_adapter_provides_all_that_hooks_ask_for() -> None:
    """By name; the type checker compares signatures."""
    for part, kind in get_type_hints(interface.Adapter).items():
        if part != "versions":
            provided = getattr(v0_5_17.ADAPTER, part)
            wanted = [name for name in vars(kind) if not name.startswith("_")]
            assert wanted
            assert [name for name in wanted if not callable(getattr(provided, name, None))] == []


def files(server: Running, tokens: int) -> dict[str, set[str]]:
    """Whose functions a request of so many tokens runs in the scheduler process, by hook."""
    ask(server.probe, profile=True)
    send(server, Ask(tokens_of(f"A text for {tokens} tokens."), tokens))
    found = ask(server.probe)["files"]
    # Kernels have a file for each contract; a trace is written for the tests alone, and attention
    # on a CPU is not what the policy does.
    return {
        hook: {
            path.rpartition("/sglang_tri/")[2]
            for path in paths
            if not any(other in path for other in ("/kernels/", "/cpu/", "/trace.py"))
        }
        for hook, paths in found.items()
    }


@pytest.mark.parametrize("server", ["page1-overlap"], indirect=True)
def test_few_files_for_a_round_and_for_a_request(server: Running) -> None:
    """What somebody reads who follows one of them."""
    server.server.flush_cache()
    rounds = files(server, BUDGET + 3 * INTERVAL)
    planned, ran = rounds["plan_rounds"], rounds["run_rounds"]
    assert {"round/plan.py", "round/run.py", "policies/triattention.py"} <= planned | ran
    assert len(planned | ran) <= FILES, sorted(planned | ran)
    request = set().union(*files(server, 8).values())
    assert {"request/request.py", "patches/radix.py"} <= request
    assert len(request) <= FILES, sorted(request)
