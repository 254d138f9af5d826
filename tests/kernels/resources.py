"""Compile the kernels for GPUs that need not be here; print what the compilers report.

python -m tests.kernels.resources
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sglang_tri.kernels import compact_triton, score_triton, select_triton
from sglang_tri.kernels.backend import Traits
from tests.kernels.geometries import SHIPPED, Geometry, everything

DOCUMENT = Path(__file__).parents[2] / "docs" / "kernels.md"
BEGIN, END = "<!-- resources -->", "<!-- end of resources -->"
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), Traits(fp8=False)),
    "sm_90": (GPUTarget("cuda", 90, 32), Traits()),
    "sm_100": (GPUTarget("cuda", 100, 32), Traits(tensor_memory=True)),
    "gfx942": (GPUTarget("hip", "gfx942", 64), Traits(warp=64)),
}
KERNELS = {
    "score": score_triton.score_kernel,
    "score, 2 buffers": score_triton.score_kernel,
    "select": select_triton.select_kernel,
    "compact": compact_triton.compact_kernel,
}
NAMES = [geometry.name for geometry in SHIPPED]
# Types of arguments that are no pointers to int32.
_TYPES = {
    "*fp32": ("rows", "moments", "scores", "key_scale", "centre", "weights"),
    "*fp64": ("frequencies",),
    "*i64": ("key_pointers", "pointers", "positions"),
    "i32": ("longest", "requests", "layers", "most", "has_earlier", "normalize", "set_layers"),
}
_TYPE_OF = {name: kind for kind, names in _TYPES.items() for name in names}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
Job = tuple[str, Geometry, str]
# What a kernel takes on a target, see `resources`.
Found = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="the whole matrix of shapes")
    parser.add_argument("--write", action="store_true", help="put the table into docs/kernels.md")
    parser.add_argument("--json", type=Path, help="write all results, with assembly, to this file")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the shapes in the table")
    options = parser.parse_args()
    found = list(compile_all(one for one in SHIPPED if one.name in (options.only or NAMES)))
    lines = table(found)
    print("\n".join(lines))
    if options.write:
        before, rest = DOCUMENT.read_text().split(BEGIN)
        DOCUMENT.write_text("\n".join([before + BEGIN, *lines, END + rest.split(END)[1]]))
    if options.json:
        options.json.write_text(json.dumps(found))
    if options.all:
        total = spilled = 0
        for one in compile_all(everything()):
            total += 1
            if one["local"]:
                spilled += 1
                print("{kernel}, {geometry}, {target}: {local} bytes per thread".format(**one))
        print(f"\nThe whole matrix: {spilled} of {total} kernels spill.")
    return int(any(one["local"] for one in found))


def compile_all(geometries: Iterable[Geometry]) -> Iterator[Found]:
    """Each kernel for each target, once for what it depends on."""
    jobs: dict[tuple[str, ...], Job] = {}
    for geometry, target in product(geometries, TARGETS):
        for kernel, constants in geometry.variants(TARGETS[target][1]).items():
            key = kernel, target, *sorted(map(str, constants.items()))
            jobs.setdefault(key, (kernel, geometry, target))
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(resources, jobs.values(), chunksize=4)


def resources(job: Job) -> Found:
    """Compile one kernel; needs no GPU.

    Returns:
        Which it is: `kernel`, `geometry`, `target`. `registers` per thread; `shared` memory of a
        program and `local` memory of a thread, stack and spilled registers, in bytes. `text`: PTX
        or AMD's assembly. `loads` and `matrix`, see there. `issued`: of a kernel that scores,
        instructions that each of a multiprocessor's 4 schedulers issues for 64 keys.
    """
    kernel, geometry, target = job
    gpu, traits = TARGETS[target]
    constants = dict(geometry.variants(traits)[kernel])
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    function = KERNELS[kernel]
    names = function.arg_names
    signature = {
        name: "constexpr" if name in constants else _TYPE_OF.get(name, "*i32") for name in names
    }
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(function, signature, values)
    compiled = triton.compile(source, target=gpu, options=options)
    taken, text, loop = (_amd if target.startswith("gfx") else _nvidia)(compiled)
    issued = None
    if kernel.startswith("score"):
        issued = loop * options["num_warps"] / 4 * 64 / constants["BLOCK"]
    return {
        "kernel": kernel,
        "geometry": geometry.name,
        "target": target,
        "shared": compiled.metadata.shared,
        "text": text,
        "loads": loads(text),
        "matrix": matrix(text),
        "issued": issued,
        **taken,
    }


def loads(text: str) -> list[int]:
    """Bytes of each load from global memory that does not wait for a page index or a number."""
    words = re.findall(r"(?:global|buffer)_load_dwordx(\d)", text)
    direct = re.findall(r"ld\.global\S*\.v(\d)\.b(\d+)", text)
    through = re.findall(r"cp\.async\.c[ag]\.shared\.global[^,]*, \[[^]]*\], 0x(\w+)", text)
    sizes = [4 * int(count) for count in words] + [int(n) * int(bits) // 8 for n, bits in direct]
    return sizes + [int(size, 16) for size in through]


def matrix(text: str) -> str:
    """The instruction that multiplies matrices, or an empty string."""
    pattern = r"(wgmma\.mma_async|tcgen05\.mma|mma\.sync|v_mfma_\w+?)[._\s]"
    found = re.search(pattern, text)
    return found[1] if found else ""


def _nvidia(compiled: Any) -> tuple[dict[str, int], str, int]:
    """Registers and local memory, PTX, and instructions in the longest loop."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report, assembly = (
            subprocess.run(
                [_TOOLS / "cuobjdump", what, file.name], capture_output=True, text=True, check=True
            ).stdout
            for what in ("-res-usage", "-sass")
        )
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    taken = {"registers": numbers["REG"], "local": numbers["STACK"] + numbers["LOCAL"]}
    loop = longest_loop(assembly, r"/\*([0-9a-f]{4,})\*/ +([^;]+);", r"\bBRA\b.* 0x([0-9a-f]+)")
    return taken, compiled.asm["ptx"], loop


def _amd(compiled: Any) -> tuple[dict[str, int], str, int]:
    """As `_nvidia`, with AMD's assembly."""
    text = compiled.asm["amdgcn"]
    names = "vgpr_count|vgpr_spill_count|sgpr_spill_count|private_segment_fixed_size"
    numbers = {name: int(value) for name, value in re.findall(rf"\.({names}):\s+(\d+)", text)}
    spilled = 4 * (numbers["vgpr_spill_count"] + numbers["sgpr_spill_count"])
    local = numbers["private_segment_fixed_size"] + spilled
    loop = longest_loop(text, r"^(?:(\.LBB\w+):|\t([a-z].*))", r"s_c?branch\w*\s+(\.LBB\w+)")
    return {"registers": numbers["vgpr_count"], "local": local}, text, loop


def longest_loop(assembly: str, line: str, branch: str) -> int:
    """Instructions from where the branch that leads back farthest leads, up to it; 0 without loops.

    Args:
        line: a pattern for a label and an instruction, either of which may be empty.
        branch: a pattern for the label in a branch.
    """
    places: dict[str, int] = {}
    count = longest = 0
    for label, instruction in re.findall(line, assembly, re.MULTILINE):
        if label:
            places[label.lstrip("0")] = count
        if instruction:
            count += 1
            target = re.search(branch, instruction)
            if target:
                longest = max(longest, count - places.get(target[1].lstrip("0"), count))
    # A kernel may end in a branch to itself, which is never reached.
    return longest if longest > 1 else 0


def table(found: list[Found]) -> list[str]:
    """Markdown: for each kernel and shape what it takes, by target; see docs/kernels.md."""
    cells = {(one["kernel"], one["geometry"], one["target"]): _cell(one) for one in found}
    shapes = dict.fromkeys((kernel, shape) for kernel, shape, _ in cells)
    rows = [["kernel", "shape", *TARGETS]]
    for kernel, shape in sorted(shapes, key=lambda row: [*KERNELS].index(row[0])):
        rows.append([kernel, shape, *(cells[kernel, shape, target] for target in TARGETS)])
    head, *lines = [f"| {' | '.join(row)} |" for row in rows]
    return [head, "|" + "---|" * len(rows[0]), *lines]


def _cell(one: Found) -> str:
    issued = "" if one["issued"] is None else f" / {one['issued']:.0f}"
    spilled = f", {one['local']} bytes of local memory" if one["local"] else ""
    return f"{one['registers']} / {one['shared']}{issued}{spilled}"


if __name__ == "__main__":
    raise SystemExit(main())
