"""Short kernels for the tests of the interpreter: a body of PTX, with declarations and parameters put around it."""

import re

import numpy as np

from tests.ptx import Program

_BITS = {1: "rs", 2: "rs", 4: "r", 8: "rd"}


def run(body: str, *arguments, threads: int = 32, shared: int = 0, grid: tuple[int, ...] = (1,), seed=None) -> None:
    """Run a body that finds its thread's number in %r0, and in %rd<i> or %f<i> argument i, a pointer or a number.

    Registers to use besides: %p<20>, %rs<40>, %r10 to %r99, %f10 to %f99, %rd10 to %rd99.
    """
    parameters, loads = [], []
    for i, argument in enumerate(arguments):
        if isinstance(argument, float):
            kind, load = "f32", f"ld.param.f32 %f{i}, [p{i}];"
        elif isinstance(argument, int):
            kind, load = "u32", f"ld.param.s32 %rd{i}, [p{i}];"
        else:
            kind, load = "u64", f"ld.param.b64 %rd{i}, [p{i}];"
        parameters.append(f".param .{kind} p{i}")
        loads.append(load)
    ptx = f"""
.version 8.8
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 memory[];
.visible .entry snippet({", ".join(parameters)})
{{
    .reg .pred %p<20>;
    .reg .b16 %rs<40>;
    .reg .b32 %r<100>;
    .reg .f32 %f<100>;
    .reg .b64 %rd<100>;
    mov.u32 %r0, %tid.x;
    {" ".join(loads)}
    {body}
    ret;
}}
"""
    Program.parse(ptx).run(grid, arguments, threads=threads, shared_bytes=shared, seed=seed)


def compute(instruction: str, result: np.dtype, *operands: np.ndarray) -> np.ndarray:
    """What each lane gets from one instruction, written as "add.s32 $d, $0, $1".

    $0, $1, ... are registers with a lane's elements of the operands [32], $d one for the result; of np.bool_ they are
    predicates.
    """
    out = np.zeros(32, np.uint8 if result is np.bool_ else result)
    lines, names = [], {}
    for i, operand in enumerate(operands):
        size = 1 if operand.dtype == np.bool_ else operand.itemsize
        register = f"%{_BITS[size]}{20 + i}"
        lines += [f"mad.wide.u32 %rd30, %r0, {size}, %rd{i + 1};", f"ld.global.b{size * 8} {register}, [%rd30];"]
        if operand.dtype == np.bool_:
            lines.append(f"setp.ne.b16 %p{i}, {register}, 0;")
            register = f"%p{i}"
        names[str(i)] = register
    size = out.itemsize
    target = f"%{_BITS[size]}10"
    names["d"] = "%p10" if result is np.bool_ else target
    lines.append(re.sub(r"\$(\w)", lambda name: names[name[1]], instruction) + ";")
    if result is np.bool_:
        lines.append(f"selp.b16 {target}, 1, 0, %p10;")
    lines += [f"mad.wide.u32 %rd30, %r0, {size}, %rd0;", f"st.global.b{size * 8} [%rd30], {target};"]
    run("\n".join(lines), out, *(x.view(np.uint8) if x.dtype == np.bool_ else x for x in operands))
    return out.astype(np.bool_) if result is np.bool_ else out
