"""Wrong kernels are reported, and right ones are not (planted/): plain, under ASan and UBSan, and under TSan."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cusim.build import HERE, VARIANTS, build, missing

if reason := missing():
    pytest.skip(f"the emulator cannot be built here: {reason}", allow_module_level=True)

SEEDS = ("0", "1", "2")
RIGHT = (
    *(
        "pipeline",
        "syncwarp",
        "syncwarp_of_halves",
        "blocks_write_their_own",
        "last_block",
        "atomics",
        "named_barriers",
    ),
    *("shuffles", "votes_and_reductions", "indices", "shared_memory_is_new_for_each_block", "copies"),
    *(
        "transposed_ldmatrix",
        "product_of_bf16",
        "product_of_fp16",
        "product_of_tf32",
        "arithmetic",
        "banks_and_sectors",
    ),
)
# What the emulator says itself, in every build.
FORBIDDEN = {
    "divergent_barrier": r"divergent barrier: threads wait at \S+forbidden.cu:\d+ and at \S+forbidden.cu:\d+",
    "barrier_of_some": r"__syncthreads",
    "barrier_and_shuffle": r"(?s)deadlock: 64 threads.*forbidden.cu:\d+ \(__syncthreads\).*\(shfl.idx\): threads 0 2 4",
    "barriers_of_different_size": r"deadlock: 32 threads|barrier 1 of (32|64) threads, where others wait for (32|64)",
    "barrier_of_half_a_warp": r"forbidden.cu:\d+: barrier 1 of 48 threads: whole warps",
    "barrier_that_is_not": r"forbidden.cu:\d+: barrier 16: there are 0 to 15",
    "divergent_shuffle": r"warp 0 diverged: .*forbidden.cu:\d+ \(shfl.bfly",
    "shuffle_with_exited_lanes": r"forbidden.cu:\d+: shfl.bfly: the mask .* have exited|exited, while .*\(shfl.bfly",
    "shuffle_from_outside_of_the_mask": r"forbidden.cu:\d+: shfl.idx reads lane 16, .* not in the mask 0000ffff",
    "shuffle_by_a_lane_outside_of_the_mask": r"forbidden.cu:\d+: shfl.idx: lane \d+ calls it, but is not in the mask",
    "ldmatrix_in_half_a_warp": r"forbidden.cu:\d+: ldmatrix: the mask .*exited|exited, while lanes .*\(ldmatrix\)",
    "misaligned_ldmatrix": r"forbidden.cu:\d+: ldmatrix: the row at shared address \d+ does not lie on 16 bytes",
    "ldmatrix_past_the_end": r"forbidden.cu:\d+: ldmatrix of 16 bytes at offset 496 of 496 bytes of shared memory",
    "cp_async_past_the_end": r"forbidden.cu:\d+: cp.async of 16 bytes at offset 496 of 496 bytes of shared memory",
    "misaligned_cp_async": r"forbidden.cu:\d+: cp.async from global memory of 16 bytes at 0x\w+8, which is not",
    "shared_address_of_something_else": r"forbidden.cu:\d+: the shared address of a pointer outside of shared memory",
    "misaligned_load": r"forbidden.cu:\d+: load of 16 bytes at 0x\w+8, which is not a multiple",
    "misaligned_store": r"forbidden.cu:\d+: store of 8 bytes at 0x\w+4, which is not a multiple",
    "too_many_threads": r"a block of 1025 x 1 x 1 threads: there can be 1 to 1024",
    "too_much_shared_memory": r"233472 bytes of shared memory",
    "pipeline_in_too_little_memory": r"pipeline.cu:\d+: cp.async of 16 bytes at offset \d+ of 20416 bytes",
}
WRONG = r"wrong result"  # because of the NaN in fresh shared memory and under copies in flight
# The other mistakes: by which build each is reported, and how.
REPORTED = {
    "pipeline_without_barrier_before_use": {"plain": WRONG, "asan": WRONG, "tsan": r"data race.*"},
    "pipeline_without_barrier_before_refill": {"plain": WRONG, "asan": WRONG, "tsan": r"data race.*"},
    "pipeline_with_wrong_wait": {"plain": WRONG, "asan": WRONG, "tsan": WRONG},
    "pipeline_past_the_end": {"asan": r"heap-buffer-overflow .*pipeline.cu:\d+"},
    "store_past_the_end": {"asan": r"heap-buffer-overflow .*forbidden.cu:\d+"},
    "load_of_a_freed_tensor": {"asan": r"heap-use-after-free .*forbidden.cu:\d+"},
    "store_behind_shared_memory": {
        "plain": r"block \(0, 0, 0\) wrote at offset 128 of its 128 bytes of shared memory",
        "asan": r"use-after-poison .*forbidden.cu:\d+",
    },
    "store_before_shared_memory": {
        "plain": r"block \(0, 0, 0\) wrote at offset -4 of its 128 bytes of shared memory",
        "asan": r"use-after-poison .*forbidden.cu:\d+",
    },
    "no_syncwarp": {"plain": WRONG, "asan": WRONG, "tsan": r"data race .*races.cu:\d+"},
    "blocks_write_one_word": {"tsan": r"data race .*races.cu:\d+"},
    "blocks_write_one_word_after_a_barrier": {"tsan": r"data race .*races.cu:\d+"},
    "last_block_without_fences": {"tsan": r"data race .*races.cu:\d+"},
    "named_barrier_missing": {"tsan": r"data race .*races.cu:\d+"},
}
NOT_A_MISTAKE_OF_RESULTS = ("pipeline_without_swizzle",)  # but of speed


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def program(variant: str) -> Path:
    return build("planted", sorted(HERE.glob("planted/*.c*")), variant, program=True)


def _run(program: Path, case: str, *seeds: str) -> subprocess.CompletedProcess:
    # Addresses in random places collide with those that ThreadSanitizer keeps for itself on some kernels.
    fixed_addresses = ["setarch", "-R"] if shutil.which("setarch") else []
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=0"}
    command = [*fixed_addresses, str(program), case, *seeds]
    return subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment, timeout=60)


def _counters(output: str) -> list[dict[str, int]]:
    """Of each seed."""
    per_seed = output.split("seed ")[1:]
    return [{name: int(value) for name, value in re.findall(r"^(\w+)=(\d+)$", part, re.M)} for part in per_seed]


def test_every_case_is_listed(program: Path) -> None:
    named = subprocess.run([program], capture_output=True, text=True).stdout.split()
    assert sorted(named) == sorted([*RIGHT, *FORBIDDEN, *REPORTED, *NOT_A_MISTAKE_OF_RESULTS])


@pytest.mark.parametrize("case", RIGHT)
def test_a_right_kernel_is_not_reported(program: Path, case: str) -> None:
    done = _run(program, case, *SEEDS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": right\n") == len(SEEDS)
    assert not done.stderr


@pytest.mark.parametrize("case", FORBIDDEN)
def test_what_cuda_forbids_is_an_error(program: Path, case: str) -> None:
    done = _run(program, case, *SEEDS)
    assert done.returncode == 2, done.stdout + done.stderr
    parts = done.stdout.split("seed ")[1:]
    assert len(parts) == len(SEEDS)
    for part in parts:
        assert re.search(FORBIDDEN[case], part), part
    assert not done.stderr


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("variant", "case"), [(variant, case) for case, by in REPORTED.items() for variant in by], indirect=["variant"]
)
def test_a_mistake_is_reported(program: Path, variant: str, case: str, seed: str) -> None:
    done = _run(program, case, seed)
    assert done.returncode != 0
    said = done.stdout + " ".join(re.findall(r"SUMMARY: .*", done.stderr))
    assert re.search(REPORTED[case][variant], said), done.stdout + done.stderr


def test_a_lost_swizzle_is_counted(program: Path) -> None:
    for counted in _counters(_run(program, "pipeline", *SEEDS).stdout):
        assert counted["ldmatrix_wavefronts"] == counted["ldmatrix_least"] == 4 * counted["ldmatrix"]
        assert counted["cp_async_wavefronts"] == counted["cp_async_least"] == counted["cp_async"] / 8
    lost = _run(program, "pipeline_without_swizzle", *SEEDS)
    assert lost.returncode == 0
    for counted in _counters(lost.stdout):
        assert counted["ldmatrix_wavefronts"] == 8 * counted["ldmatrix_least"]


def test_what_a_kernel_moves_is_counted(program: Path) -> None:
    rows, depth, products = 64 + 16, 256, 4 * 2 * (256 // 16)
    for counted in _counters(_run(program, "pipeline", *SEEDS).stdout):
        assert counted["global_bytes_read"] == rows * depth * 2 == 32 * counted["global_sectors_read"]
        assert counted["cp_async"] == rows * depth // 8
        assert counted["mma"] == counted["ldmatrix"] == products
        assert counted["blocks"] == counted["launches"] == 1
