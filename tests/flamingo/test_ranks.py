"""Two ranks, with DDP and with FSDP2, train as one process does, through a checkpoint."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from flamingo import checkpoint
from tests.flamingo.ranks import STEPS, run
from tests.support.process import normal_process

pytestmark = normal_process


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run(
        [*command, "-m", "tests.flamingo.ranks", str(folder)],
        cwd=pathlib.Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_have_the_losses_of_one(two_ranks, tmp_path, parallel):
    expected = run(parallel, tmp_path)
    assert len(expected) == STEPS
    assert expected[-1][""] < expected[0][""]
    for rank in range(2):
        losses = json.loads((two_ranks / parallel / f"losses-{rank}.json").read_text())
        assert losses == [pytest.approx(step, rel=1e-9) for step in expected]
    weights, expected = (
        load_file(checkpoint.latest(folder) / checkpoint.WEIGHTS) for folder in (two_ranks / parallel, tmp_path)
    )
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-6, atol=1e-9)
