"""What compilers make of the kernels for GPUs that are not here: no spills, wide loads."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.geometries import SHIPPED
from tests.kernels.resources import BEGIN, DOCUMENT, END, NAMES, TARGETS

ROOT = Path(__file__).parents[1]
# One process compiles for all of them.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("compiled")]
MATRIX = {
    "sm_80": {"mma.sync"},
    "sm_90": {"wgmma.mma_async", "mma.sync"},
    "sm_100": {"tcgen05.mma", "mma.sync"},
    "gfx942": {"v_mfma_f32"},
}
# Of page indices, which are not keys.
INDEX_BYTES = {"sm_80": 4, "sm_90": 4, "sm_100": 4, "gfx942": 8}
SCORES = ("score", "score, 2 buffers")
Found = list[dict[str, Any]]


FULL = pytest.param(NAMES, id="all", marks=pytest.mark.full)
SOME = pytest.param(["Qwen3-8B", "Qwen3-8B, fp8 e4m3"], id="some")


@pytest.fixture(scope="module", params=[SOME, FULL])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Compiled in a process of its own, which has no interpreter in place of the compiler."""
    folder = tmp_path_factory.mktemp("resources")
    command = [sys.executable, "-m", "tests.kernels.resources", "--json", str(folder / "json")]
    command += ["--only", *request.param]
    # SGLang, once imported, names another assembler than Triton's own.
    ours = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment = {**ours, "TRITON_CACHE_DIR": str(folder / "cache")}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    loaded: Found = json.loads((folder / "json").read_text())
    return loaded


def of(found: Found, kernel: str) -> Found:
    some = [one for one in found if one["kernel"] == kernel]
    assert {one["target"] for one in some} == set(TARGETS)
    return some


def test_nothing_spills(found: Found) -> None:
    assert len(SHIPPED) >= 12
    assert {one["geometry"] for one in found} <= {shape.name for shape in SHIPPED}
    assert [one for one in found if one["local"]] == []
    assert all(one["registers"] > 0 for one in found)


@pytest.mark.parametrize("kernel", SCORES)
def test_keys_are_loaded_16_bytes_at_a_time(found: Found, kernel: str) -> None:
    for one in of(found, kernel):
        assert set(one["loads"]) <= {16, INDEX_BYTES[one["target"]]}, one["geometry"]
        assert 16 in one["loads"]


@pytest.mark.parametrize("kernel", SCORES)
def test_keys_are_scored_by_tensor_cores(found: Found, kernel: str) -> None:
    for one in of(found, kernel):
        assert one["matrix"] in MATRIX[one["target"]]
    by_target = {
        one["target"]: one["matrix"]
        for one in found
        if one["geometry"] == "Qwen3-8B" and one["kernel"] == kernel
    }
    assert by_target["sm_90"] == "wgmma.mma_async"


def loads_under_way(one: dict[str, Any]) -> int:
    """Groups of loads that are not waited for when a tile's first product begins."""
    before = one["text"][: one["text"].index(one["matrix"])]
    return int(re.findall(r"cp\.async\.wait_group\s+(\d+)", before)[-1])


def test_two_buffers_load_the_next_keys_meanwhile(found: Found) -> None:
    single, double = (
        {
            (one["geometry"], one["target"]): loads_under_way(one)
            for one in of(found, kernel)
            if not one["target"].startswith("gfx")
        }
        for kernel in SCORES
    )
    assert min(double.values()) > 0
    assert single["Qwen3-8B", "sm_90"] == single["Qwen3-8B", "sm_80"] == 0


def test_two_buffers_take_fewer_instructions(found: Found) -> None:
    issued = {
        kernel: {(one["geometry"], one["target"]): one["issued"] for one in of(found, kernel)}
        for kernel in SCORES
    }
    single, double = issued.values()
    assert all(double[which] < single[which] for which in single)
    assert double["Qwen3-8B", "sm_100"] < single["Qwen3-8B", "sm_100"] / 3


def test_rows_are_copied_16_bytes_at_a_time_and_read_before_they_are_written(found: Found) -> None:
    for one in of(found, "compact"):
        text = one["text"]
        if one["target"] == "gfx942":
            load, barrier, store = "global_load_dwordx4", "s_barrier", "global_store_dwordx4"
        else:
            load, barrier, store = r"ld\.global\.v4\.b32", r"bar\.sync", r"st\.global\.v4\.b32"
        loads, barriers, stores = (
            [match.start() for match in re.finditer(name, text)] for name in (load, barrier, store)
        )
        assert loads
        assert stores
        assert any(loads[-1] < place < stores[0] for place in barriers)
        assert min(stores) > max(loads)


def test_the_last_to_arrive_sees_what_others_wrote(found: Found) -> None:
    """A barrier, then a count that releases what came before it and acquires the others'."""
    for one in of(found, "select"):
        if one["target"] == "gfx942":
            continue_at = one["text"].index("global_atomic_add")
            assert "s_barrier" in one["text"][:continue_at]
            continue
        counts = re.findall(r"atom\.\S*global\S*add\S*", one["text"])
        assert any("acq_rel" in count and "gpu" in count for count in counts)
        before = one["text"][: one["text"].index("acq_rel")]
        assert "bar.sync" in before[before.rindex("st.global") :]


def test_kernels_look_at_no_argument() -> None:
    """So that there is one variant for each set of constants, whatever a round's numbers are."""
    code = (
        "from tests.kernels.resources import KERNELS\n"
        "for kernel in KERNELS.values():\n"
        "    print(all(p.is_constexpr or p.do_not_specialize for p in kernel.params))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.split() == ["True"] * 4, result.stderr


@pytest.mark.parametrize("found", [FULL], indirect=True)
def test_the_table_in_the_documents_is_this_one(found: Found) -> None:
    """Registers may differ with the compiler's version; shapes and kernels may not."""
    table = DOCUMENT.read_text().split(BEGIN)[1].split(END)[0]
    listed = re.findall(
        r"^\| (score|score, 2 buffers|select|compact) \| ([^|]+) \|", table, re.MULTILINE
    )
    assert set(listed) == {(one["kernel"], one["geometry"]) for one in found}
