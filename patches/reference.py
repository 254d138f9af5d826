"""The tables of docs/refusals.md and docs/flags.md: what the code refuses and takes, in Markdown.

`python -m sglang_tri.patches.reference docs` writes them anew (`make docs`).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path

from sglang_tri.config import FLAGS, Flag
from sglang_tri.patches.refusals import MODEL_CONFIG, SERVER_ARGS, Refusal

BEGIN, END = "<!-- made by `make docs` -->", "<!-- end of what is made -->"
# Flags with a number behind them, and variables of the environment.
_CODE = re.compile(r"--[a-z0-9-]+(?: \d+)?|SGLANG_[A-Z_]+")


def refusals() -> str:
    """What the policy cannot run with: a table for the server's settings, and one for models."""
    return "\n\n".join(
        (
            "## Settings of the server",
            _refused(SERVER_ARGS),
            "## Models",
            _refused(MODEL_CONFIG),
        )
    )


def flags() -> str:
    """Every flag with its values, its default and what it sets."""
    rows = ((_option(flag), _values(flag), _default(flag), flag.help) for flag in FLAGS)
    return _table(("flag", "values", "default", "meaning"), rows)


def fill(document: str, text: str) -> str:
    """`document` with `text` between the marks, whatever stood there.

    Raises:
        ValueError: `document` does not have each mark once.
    """
    before, rest = document.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


PAGES = {"flags.md": flags, "refusals.md": refusals}


def write(folder: Path) -> None:
    """Bring the pages in `folder` up to date."""
    for name, make in PAGES.items():
        page = folder / name
        page.write_text(fill(page.read_text(encoding="utf-8"), make()), encoding="utf-8")


def _refused(rows: Iterable[Refusal]) -> str:
    cells = ((row.feature, row.reason, _CODE.sub(r"`\g<0>`", row.recipe)) for row in rows)
    return _table(("feature", "why", "instead"), cells)


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _option(flag: Flag) -> str:
    negated = f", `--no-{flag.option[2:]}`" if flag.default is True else ""
    return f"`{flag.option}`{negated}"


def _values(flag: Flag) -> str:
    if flag.choices:
        return ", ".join(f"`{choice}`" for choice in flag.choices)
    if isinstance(flag.default, bool):
        return "on or off"
    return f"{flag.min} or more" if isinstance(flag.default, int) else "text"


def _default(flag: Flag) -> str:
    if flag.default is None:
        return "none"
    if isinstance(flag.default, bool):
        return "on" if flag.default else "off"
    return f"`{flag.default}`"


if __name__ == "__main__":
    write(Path(sys.argv[1]))
