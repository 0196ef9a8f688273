"""What a compiled kernel takes of a chip, from its cubin; with the cuobjdump that Triton's wheel brings."""

import importlib.util
import pathlib
import re
import subprocess

MATRIX = re.compile(r"\b(HMMA|HGMMA|UTC\w*MMA)\b")  # mma.sync, wgmma, tcgen05
SPILL = re.compile(r"\b(STL|LDL)\b")  # stores to and loads from the stack


def functions(path: str | pathlib.Path) -> dict[str, dict[str, object]]:
    """By symbol, each kernel's registers, spills, number of matrix instructions, and code (SASS)."""
    usage, listing = (_cuobjdump(option, path) for option in ("-res-usage", "-sass"))
    codes = dict(re.findall(r"Function : (\S+)\n(.*?)(?=Function : |\Z)", listing, re.S))
    found = {}
    for name, registers, stack in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", usage):
        code = codes[name]
        spills = len(SPILL.findall(code)) + int(stack)
        matrix = len(MATRIX.findall(code))
        found[name] = {"registers": int(registers), "spills": spills, "matrix": matrix, "code": code}
    return found


def _cuobjdump(option: str, path: str | pathlib.Path) -> str:
    triton = pathlib.Path(importlib.util.find_spec("triton").origin).parent
    tool = triton / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run([tool, option, path], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr
