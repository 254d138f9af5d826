"""What is installed under which name, and which way imports point."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from sglang_tri.patches.versions import TESTED_VERSIONS

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("sglang_tri", "kernels", "patches")


def run(code: str, cwd: Path = ROOT) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=True
    )
    return result.stdout.strip()


def test_kernels_is_still_hugging_faces() -> None:
    """SGLang imports it; our folder of that name must not win, even in the repository's root."""
    found = Path(run("import kernels; print(kernels.__file__)"))
    assert "site-packages" in found.parts
    assert ROOT / "kernels" not in found.parents


@pytest.mark.parametrize("elsewhere", [False, True])
def test_installed_names(tmp_path: Path, elsewhere: bool) -> None:
    code = (
        "import sglang_tri.kernels.score as k, sglang_tri.patches.plugin as p;"
        "print(k.__file__, p.__file__)"
    )
    kernel, plugin = run(code, tmp_path if elsewhere else ROOT).split()
    assert Path(kernel).resolve() == ROOT / "kernels" / "score.py"
    assert Path(plugin).resolve() == ROOT / "patches" / "plugin.py"


def test_the_wheel_holds_all_packages(tmp_path: Path) -> None:
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".*", "*.egg-info", "build", "__pycache__", "tests", "bench")
    shutil.copytree(ROOT, source, symlinks=True, ignore=ignored)
    build = f"import setuptools.build_meta as b; print(b.build_wheel({str(tmp_path)!r}))"
    name = run(build, source).splitlines()[-1]
    held = set(zipfile.ZipFile(tmp_path / name).namelist())
    for folder in FOLDERS:
        prefix = "sglang_tri/" if folder == "sglang_tri" else f"sglang_tri/{folder}/"
        for path in (ROOT / folder).rglob("*.py"):
            if (ROOT / "sglang_tri").resolve() in path.parents or folder != "sglang_tri":
                assert prefix + path.relative_to(ROOT / folder).as_posix() in held
    assert "sglang_tri/py.typed" in held  # Type checkers of others read our annotations.


def test_pip_installs_a_tested_sglang() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["dependencies"] == [f"sglang=={version}" for version in TESTED_VERSIONS]


def test_entry_points() -> None:
    for group, value in (
        ("sglang.srt.plugins", "sglang_tri.patches.plugin:load"),
        ("sglang.srt.platforms", "sglang_tri.patches.cpu.activation:activate"),
        ("console_scripts", "sglang_tri.patches.cli:main"),
    ):
        assert value in {entry.value for entry in entry_points(group=group)}


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("kernels", ("sglang", "sglang_tri.patches", "sglang_tri.")),
        ("sglang_tri", ("sglang", "sglang_tri.patches")),
        ("bench/simulator", ("sglang", "sglang_tri")),
    ],
)
def test_imports_point_one_way(folder: str, forbidden: tuple[str, ...]) -> None:
    own = "sglang_tri.kernels"
    for path in (ROOT / folder).glob("**/*.py"):
        if folder == "sglang_tri" and path.relative_to(ROOT).parts[1] in FOLDERS:
            continue  # The other two, seen through their links.
        for name in imported(path):
            if folder == "kernels" and name.startswith(own):
                continue
            assert not any(
                name == bad.rstrip(".") or name.startswith(bad.rstrip(".") + ".")
                for bad in forbidden
            ), f"{path.name} imports {name}"
