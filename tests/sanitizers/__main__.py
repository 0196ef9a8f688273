"""Runs the C++ kernels under sanitizers: `python -m tests.sanitizers` (make sanitize), with GCC on Linux.

AddressSanitizer and UndefinedBehaviorSanitizer: the tests of the ops. ThreadSanitizer: every op with several threads,
which knows what oneDNN's matmuls touch (include/ATen). Each is first shown to report the errors of planted.cpp.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tests.sanitizers.build import ROOT, build, runtime

OPTIONS = {
    "address": {
        # Python and torch keep memory until the process ends
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "halt_on_error=1 print_stacktrace=1",
    },
    # What code without instrumentation touches is not reported: torch's own threads, whose barriers are not seen.
    "thread": {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1 halt_on_error=1"},
}
# Each planted error and what the report says of it; None: no report.
PLANTED = {
    "address": {"read_past_the_end": "heap-buffer-overflow", "signed_overflow": "signed integer overflow"},
    "thread": {"race_of_stores": "data race", "race_of_matmuls": "data race", "no_race": None},
}
# The tests on the cpu backend; not those of what stands before the kernels, nor those that start processes.
TESTS = [
    "tests/ops",
    "--capture=sys",
    "-k",
    "not reference-cpu and not compile and not export and not errors",
    "-m",
    "not slow",
]
TASKS = {"address": ["tests", *TESTS], "thread": ["stress"]}


def main() -> int:
    return max(_sanitize(sanitizer) for sanitizer in TASKS)


def _sanitize(sanitizer: str) -> int:
    start = time.perf_counter()
    print(f"{sanitizer}: building", flush=True)
    library, preload = build(sanitizer), runtime(sanitizer)
    for name, report in PLANTED[sanitizer].items():
        done = _inside(sanitizer, preload, library, "planted", name, capture_output=True, text=True)
        seen = name in done.stderr and report in done.stderr if report else done.returncode == 0
        if not seen or bool(done.returncode) != bool(report):
            print(f"{sanitizer}: {name} was to give {report or 'no report'}, but gave\n{done.stdout}{done.stderr}")
            return 1
        print(f"{sanitizer}: {name} planted, {report or 'nothing'} reported", flush=True)
    code = _inside(sanitizer, preload, library, *TASKS[sanitizer]).returncode
    print(f"{sanitizer}: {'nothing' if code == 0 else 'ERRORS'} found, {time.perf_counter() - start:.0f} s", flush=True)
    return int(code != 0)


def _inside(sanitizer: str, preload: str, library: Path, *arguments: str, **options) -> subprocess.CompletedProcess:
    # Addresses in random places collide with those that ThreadSanitizer keeps for itself on some kernels.
    fixed_addresses = ["setarch", "-R"] if shutil.which("setarch") else []
    command = [*fixed_addresses, sys.executable, "-m", "tests.sanitizers.inside", str(library), *arguments]
    # Threads that spin while they wait make everything slow where there are more threads than cores.
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "LD_PRELOAD": preload, **OPTIONS[sanitizer]}
    return subprocess.run(command, cwd=ROOT, env=environment, **options)


if __name__ == "__main__":
    raise SystemExit(main())
