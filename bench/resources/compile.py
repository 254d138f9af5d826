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
    "sm_100": (GPUTarget("cuda", 100, 32), Traits()),
    "gfx942": (GPUTarget("hip", "gfx942", 64), Traits(warp=64)),
}
KERNELS = {
    "score": score_triton.score_kernel,
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
    """

    kernel: str
    geometry: str
    target: str
    registers: int
    shared: int
    local: int
    text: str

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
    if target.startswith("gfx"):
        return _amd(kernel, geometry.name, target, compiled)
    return _nvidia(kernel, geometry.name, target, compiled)


def _nvidia(kernel: str, geometry: str, target: str, compiled: Any) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(_TOOLS / "cuobjdump"), "-res-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    text = compiled.asm["ptx"]
    local = numbers["STACK"] + numbers["LOCAL"]
    shared = compiled.metadata.shared
    return Resources(kernel, geometry, target, numbers["REG"], shared, local, text)


def _amd(kernel: str, geometry: str, target: str, compiled: Any) -> Resources:
    text = compiled.asm["amdgcn"]
    names = "vgpr_count|vgpr_spill_count|sgpr_spill_count|private_segment_fixed_size"
    numbers = {name: int(value) for name, value in re.findall(rf"\.({names}):\s+(\d+)", text)}
    spilled = 4 * (numbers["vgpr_spill_count"] + numbers["sgpr_spill_count"])
    local = numbers["private_segment_fixed_size"] + spilled
    registers, shared = numbers["vgpr_count"], compiled.metadata.shared
    return Resources(kernel, geometry, target, registers, shared, local, text)
