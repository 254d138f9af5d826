"""Compile a kernel for a GPU that is not here, and read what it takes."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.resources.geometries import Geometry
from sglang_tri.kernels import compact_triton, score_triton, select_triton
from sglang_tri.kernels.backend import Traits

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
# Types of arguments that are neither int32 numbers nor pointers to int32.
_TYPES = {
    "rows": "*fp32",
    "moments": "*fp32",
    "scores": "*fp32",
    "key_pointers": "*i64",
    "pointers": "*i64",
    "key_scale": "*fp32",
    "centre": "*fp32",
    "weights": "*fp32",
    "frequencies": "*fp64",
    "positions": "*i64",
    **dict.fromkeys(("longest", "requests", "layers", "most", "has_earlier"), "i32"),
    **dict.fromkeys(("normalize", "set_layers"), "i32"),
}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Resources:
    """What one kernel takes on one target.

    Attributes:
        kernel, geometry, target: which.
        registers: per thread.
        shared: bytes of shared memory per program.
        local: bytes of stack and spilled registers per thread.
        text: PTX, or AMD's assembly.
        loop: instructions in the longest loop; 0 if there is none.
        warps: of a program.
        keys: that one pass of the loop scores; None in other kernels.
    """

    kernel: str
    geometry: str
    target: str
    registers: int
    shared: int
    local: int
    text: str
    loop: int
    warps: int
    keys: int | None

    @property
    def issued(self) -> float | None:
        """Instructions that each of a multiprocessor's 4 schedulers issues for 64 keys."""
        return self.loop * self.warps / 4 * 64 / self.keys if self.keys else None

    @property
    def loads(self) -> list[int]:
        """Bytes of each load from global memory that does not wait for a page index or a number."""
        if self.target.startswith("gfx"):
            words = re.findall(r"(?:global|buffer)_load_dwordx(\d)", self.text)
            return [4 * int(count) for count in words]
        direct = re.findall(r"ld\.global\S*\.v(\d)\.b(\d+)", self.text)
        through = re.findall(
            r"cp\.async\.c[ag]\.shared\.global[^,]*, \[[^]]*\], 0x(\w+)", self.text
        )
        return [int(n) * int(bits) // 8 for n, bits in direct] + [int(n, 16) for n in through]

    @property
    def matrix(self) -> str:
        """The instruction that multiplies matrices, or an empty string."""
        pattern = r"(wgmma\.mma_async|tcgen05\.mma|mma\.sync|v_mfma_\w+?)[._\s]"
        found = re.search(pattern, self.text)
        return found.group(1) if found else ""


def resources(kernel: str, geometry: Geometry, target: str) -> Resources:
    """Compile for `target`, one of `TARGETS`; needs no GPU."""
    gpu, traits = TARGETS[target]
    constants = dict(geometry.variants(traits)[kernel])
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    function = KERNELS[kernel]
    names = function.arg_names
    signature = {
        name: "constexpr" if name in constants else _TYPES.get(name, "*i32") for name in names
    }
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(function, signature, values)
    compiled = triton.compile(source, target=gpu, options=options)
    keys = constants["BLOCK"] if kernel.startswith("score") else None
    found = _amd(compiled) if target.startswith("gfx") else _nvidia(compiled)
    return Resources(kernel, geometry.name, target, *found, options["num_warps"], keys)


def _nvidia(compiled: Any) -> tuple[int, int, int, str, int]:
    """Registers, shared and local memory, text, instructions in the longest loop."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report, assembly = (
            subprocess.run(
                [str(_TOOLS / "cuobjdump"), what, file.name],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            for what in ("-res-usage", "-sass")
        )
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    local = numbers["STACK"] + numbers["LOCAL"]
    return numbers["REG"], compiled.metadata.shared, local, compiled.asm["ptx"], sass_loop(assembly)


def _amd(compiled: Any) -> tuple[int, int, int, str, int]:
    """As `_nvidia`."""
    text = compiled.asm["amdgcn"]
    names = "vgpr_count|vgpr_spill_count|sgpr_spill_count|private_segment_fixed_size"
    numbers = {name: int(value) for name, value in re.findall(rf"\.({names}):\s+(\d+)", text)}
    spilled = 4 * (numbers["vgpr_spill_count"] + numbers["sgpr_spill_count"])
    local = numbers["private_segment_fixed_size"] + spilled
    return numbers["vgpr_count"], compiled.metadata.shared, local, text, gcn_loop(text)


def sass_loop(assembly: str) -> int:
    """Instructions between the branch that leads back farthest and where it leads, both counted."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/ +([^;]+);", assembly)
    places = {int(address, 16): index for index, (address, _) in enumerate(lines)}
    longest = 0
    for index, (_, instruction) in enumerate(lines):
        target = re.search(r"\bBRA\b.* 0x([0-9a-f]+)", instruction)
        if target:
            longest = max(longest, index - places.get(int(target[1], 16), index) + 1)
    return longest if longest > 1 else 0


def gcn_loop(assembly: str) -> int:
    """The same of AMD's assembly."""
    places: dict[str, int] = {}
    count = longest = 0
    for line in assembly.splitlines():
        label = re.match(r"(\.LBB\w+):", line)
        if label:
            places[label[1]] = count
        if not re.match(r"\t[a-z]", line):
            continue
        count += 1
        target = re.search(r"s_c?branch\w*\s+(\.LBB\w+)", line)
        if target:
            longest = max(longest, count - places.get(target[1], count))
    return longest
