"""Runs the C++ kernels under sanitizers: `python -m tests.sanitizers` (make sanitize), with GCC on Linux.

AddressSanitizer and UndefinedBehaviorSanitizer: the tests of the ops, on each instruction set that this machine has.
ThreadSanitizer: every op with several threads and from several callers at once, and those tests that compare numbers.
Both know what the matmuls of oneDNN and of ATen touch (include/ATen). Each is first shown to report the errors of
planted.cpp. There are no suppressions.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from tests.sanitizers.build import ROOT, build, runtime

OPTIONS = {
    "address": {
        # Python and torch keep memory until the process ends
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "halt_on_error=1 print_stacktrace=1",
    },
    # What code without instrumentation touches is not reported: torch's own threads, whose barriers are not seen.
    "thread": {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1 halt_on_error=1", "OMP_NUM_THREADS": "3"},
}
# Each planted error and what the report says of it; None: no report.
PLANTED = {
    "address": {
        "read_past_the_end": "heap-buffer-overflow",
        "write_past_a_piece_of_scratch": "use-after-poison",
        "matmul_past_the_end": "heap-buffer-overflow",
        "matmul_in_fp64_past_the_end": "heap-buffer-overflow",
        "copy_from_null": "null pointer",
        "signed_overflow": "signed integer overflow",
    },
    "thread": {
        "race_of_stores": "data race",
        "race_of_matmuls": "data race",
        "race_of_matmuls_in_fp64": "data race",
        "no_race": None,
    },
}
LEFT_OUT = (
    "reference-cpu",  # runs no C++ of ours
    "compile",  # would build Inductor's code, without the sanitizer; the kernels it calls are those of eager mode
    "export",  # the same
    # These start processes, which load the extension that was installed.
    "other_instruction_sets",  # each set has its turn here
    "environment_variable",
)


def _tests(which: str = "") -> list[str]:
    """A task of inside.py: the tests of the ops, or those that `which` names too."""
    wanted = " and ".join([*(f"not {name}" for name in LEFT_OUT), *([which] if which else [])])
    return ["tests", "tests/ops", "tests/intervals", "--capture=sys", "-k", wanted]


# On instruction sets below the machine's own: the tests that reach into the kernels. Large offsets are not theirs.
KERNELS = _tests("(numerics or layouts or nan or threads) and not offsets_past")
# With ThreadSanitizer, which cannot follow a fork where there are threads.
NUMERICS = _tests("(numerics or threads) and not forked")
CAPABILITIES = {"AVX512": ["avx2", "default"], "AVX2": ["default"]}


def main() -> int:
    return max(_sanitize(sanitizer) for sanitizer in sys.argv[1:] or OPTIONS)


def _sanitize(sanitizer: str) -> int:
    start = time.perf_counter()

    def say(what: str) -> None:
        print(f"{sanitizer}, {time.perf_counter() - start:.0f} s: {what}", flush=True)

    say("building")
    library, preload = build(sanitizer), runtime(sanitizer)
    for name, report in PLANTED[sanitizer].items():
        done = _inside(sanitizer, preload, library, ["planted", name], capture_output=True, text=True)
        seen = name in done.stderr and report in done.stderr if report else done.returncode == 0
        if not seen or bool(done.returncode) != bool(report):
            say(f"{name} was to give {report or 'no report'}, but gave\n{done.stdout}{done.stderr}")
            return 1
        say(f"{name} planted, {report or 'nothing'} reported")
    failed = 0
    for capability, task in _tasks(sanitizer):
        say(f"{task[0]}, {capability or 'all that this machine has'}")
        environment = {"ATEN_CPU_CAPABILITY": capability} if capability else {}
        failed += _inside(sanitizer, preload, library, task, environment).returncode != 0
    say("ERRORS found" if failed else "nothing found")
    return int(failed > 0)


def _tasks(sanitizer: str) -> list[tuple[str, list[str]]]:
    """What runs, each on an instruction set; "": the machine's own."""
    if sanitizer == "thread":
        return [("", ["stress"]), ("", NUMERICS)]
    others = CAPABILITIES.get(torch.backends.cpu.get_cpu_capability(), [])
    return [("", _tests()), *((other, KERNELS) for other in others)]


def _inside(
    sanitizer: str, preload: str, library: Path, task: list[str], more: dict[str, str] | None = None, **options
) -> subprocess.CompletedProcess:
    # Addresses in random places collide with those that ThreadSanitizer keeps for itself on some kernels.
    fixed_addresses = ["setarch", "-R"] if shutil.which("setarch") else []
    command = [*fixed_addresses, sys.executable, "-m", "tests.sanitizers.inside", str(library), *task]
    # Threads that spin while they wait make everything slow where there are more threads than cores.
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "LD_PRELOAD": preload, **OPTIONS[sanitizer]}
    return subprocess.run(command, cwd=ROOT, env={**environment, **(more or {})}, **options)


if __name__ == "__main__":
    raise SystemExit(main())
