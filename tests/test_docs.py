"""README and docs: tables are current, and what they link to or tell a reader to run is there."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_tri.config import FLAGS, Flag
from sglang_tri.patches import cli, reference
from sglang_tri.patches.refusals import MODEL_CONFIG, SERVER_ARGS

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
PAGES += sorted(DOCS.rglob("*.md"))
EVERY = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))

LINK = re.compile(r"\]\((?!https?://)([^)#\s]*)(?:#([^)\s]*))?\)")
MODULE = re.compile(r"-m (bench[\w.]*|tests[\w.]*|sglang_tri[\w.]*)")
# In backticks, or in a block of code: "make" is also a word.
MAKE = re.compile(r"`make ([\w./-]+)")
MAKE_LINE = re.compile(r"^make ([\w./-]+)", re.MULTILINE)
FILE = re.compile(r"`((?:bench|docs|kernels|patches|sglang_tri|tests)/[\w./*-]*)`")
# What a reader is told to write.
NOT_YET = {"sglang_tri/policies/value_norm.py"}
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """What its headings are linked by."""
    lines = FENCE.sub("", page.read_text(encoding="utf-8")).splitlines()
    headings = (line.lstrip("#").strip() for line in lines if line.startswith("#"))
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


def broken_links(page: Path, text: str) -> Iterator[str]:
    for path, anchor in LINK.findall(FENCE.sub("", text)):
        target = (page.parent / path).resolve() if path else page
        if not target.exists():
            yield path
        elif anchor and anchor not in anchors(target):
            yield f"{path}#{anchor}"


def missing_modules(text: str) -> Iterator[str]:
    """Those that `python -m` would not find."""
    for name in MODULE.findall(text):
        name = name.rstrip(".")
        try:
            found = importlib.util.find_spec(name)
            if found and found.submodule_search_locations is not None:
                found = importlib.util.find_spec(f"{name}.__main__")
        except ModuleNotFoundError:
            found = None
        if found is None:
            yield name


def missing_targets(text: str) -> list[str]:
    targets = re.findall(r"^([\w./-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = MAKE.findall(text) + MAKE_LINE.findall("\n".join(FENCE.findall(text)))
    return [name for name in named if name not in targets]


def missing_files(text: str) -> list[str]:
    named = set(FILE.findall(text)) - NOT_YET
    return sorted(path for path in named if not any(ROOT.glob(path.rstrip("/"))))


@EVERY
def test_what_a_page_names_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert list(broken_links(page, text)) == []
    assert list(missing_modules(text)) == []
    assert missing_targets(text) == []
    assert missing_files(text) == []


def test_the_checks_find_what_is_missing() -> None:
    text = "[a](no/such.md) [b](flags.md) [c](flags.md#no-such) [d](flags.md#the-others) [e](#x)"
    assert list(broken_links(DOCS / "README.md", text)) == ["no/such.md", "flags.md#no-such", "#x"]
    text = "`python -m bench.server`, `python -m bench.simulator`, python -m bench.no_such --all"
    assert list(missing_modules(text)) == ["bench.no_such"]
    assert list(missing_modules("python -m bench.server.nothing")) == ["bench.server.nothing"]
    assert list(missing_modules("python -m tests")) == ["tests"]  # A package that does not run.
    text = "`make demo ARGS=1` to\nmake sense\n```\nmake nothing\n```\nand `make neither`"
    assert missing_targets(text) == ["neither", "nothing"]
    assert missing_files("`tests/test_docs.py` `tests/test_*.py` `tests/no.py`") == ["tests/no.py"]


@pytest.mark.parametrize("name", reference.PAGES)
def test_tables_are_current(name: str) -> None:
    """`make docs` writes them anew."""
    text = (DOCS / name).read_text(encoding="utf-8")
    assert text == reference.fill(text, reference.PAGES[name]())


def test_old_tables_are_replaced(tmp_path: Path) -> None:
    for name in reference.PAGES:
        text = (DOCS / name).read_text(encoding="utf-8")
        (tmp_path / name).write_text(reference.fill(text, "of yesterday"), encoding="utf-8")
    reference.write(tmp_path)
    for name in reference.PAGES:
        assert (tmp_path / name).read_bytes() == (DOCS / name).read_bytes()


def test_the_command_lists_every_refusal(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["refusals"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for row in (*SERVER_ARGS, *MODEL_CONFIG):
        (line,) = (line for line in lines if line.startswith(f"| {row.feature} |"))
        assert f"| {row.reason} | {row.recipe} |" in line.replace("`", "")


@pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: flag.name)
def test_every_flag_is_explained(flag: Flag) -> None:
    """In the table with its default, and in a section that says when to change it."""
    text = (DOCS / "flags.md").read_text(encoding="utf-8")
    (row,) = (line for line in text.splitlines() if line.startswith(f"| `{flag.option}`"))
    shown = {True: "on", False: "off", None: "none"}.get(flag.default, f"{flag.default}")
    assert row.replace("`", "").endswith(f"| {shown} | {flag.help} |")
    assert all(f"`{choice}`" in row for choice in flag.choices or ())
    section = text.partition(f"### `{flag.option}`\n")[2].partition("\n#")[0]
    assert "*Recommended:*" in section or "*When to change it:*" in section


def test_all_pages_are_in_the_index() -> None:
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    linked = {path for path, _ in LINK.findall(index)}
    pages = {page.name for page in DOCS.glob("*.md")} - {"README.md"}
    assert pages <= linked
