"""Triton kernels compiled for chips that are not there, and what their machine code says."""

import pathlib
import re
import subprocess
import tempfile
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB a block may have, by compute capability
_CUOBJDUMP = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_MATRIX = re.compile(r"\b(HMMA|HGMMA|UTC\w*MMA)\b")  # mma.sync, wgmma, tcgen05
_SPILL = re.compile(r"\b(STL|LDL)\b")  # stores to and loads from the stack


class Compiled(NamedTuple):
    """shared: bytes a block takes. registers, stack (bytes): per thread. matrix, spills: instructions in the code."""

    shared: int
    registers: int
    stack: int
    matrix: int
    spills: int


def compile_for(
    kernel: triton.JITFunction, arguments: dict[str, object], aligned: set[str], cc: int, options: dict[str, int]
) -> Compiled:
    """Compile a kernel for one compute capability, such as 80.

    arguments: for each parameter a Triton type ("*bf16", "i32"), or ("constexpr", value).
    aligned: parameters that a launch would find divisible by 16, as pointers and most strides are.
    """
    names = kernel.arg_names
    constexprs = {name: arguments[name][1] for name in names if isinstance(arguments[name], tuple)}
    signature = {name: "constexpr" if name in constexprs else arguments[name] for name in names}
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in aligned}
    source = ASTSource(kernel, signature, constexprs=constexprs, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", cc, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage, code = (_cuobjdump(option, cubin.name) for option in ("-res-usage", "-sass"))
    return Compiled(
        shared=compiled.metadata.shared,
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        stack=int(re.search(r"STACK:(\d+)", usage)[1]),
        matrix=len(_MATRIX.findall(code)),
        spills=len(_SPILL.findall(code)),
    )


def _cuobjdump(option: str, path: str) -> str:
    done = subprocess.run([_CUOBJDUMP, option, path], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr
