"""norm_linear: every number of forward and backward within the error budget."""

from dataclasses import replace

import pytest
import torch

from tests.support.linear_cases import Case, check
from tests.support.process import DTYPES

pytestmark = pytest.mark.ops("norm_linear")
CASE = Case("norm_linear")
NORMS = [
    replace(CASE, norm=norm, affine=affine) for norm, affine in (("layer", 1), ("layer", 0), ("rms", 1), ("rms", 0))
]
SWEEP = [
    *(replace(CASE, rows=(rows,)) for rows in (1, 3, 63, 65, 127, 300)),
    *(replace(CASE, C=C) for C in (1, 65, 128, 200)),
    *(replace(CASE, N=N) for N in (1, 3, 130)),
    *(replace(CASE, rows=rows) for rows in ((), (1,), (2, 1, 3, 5))),
    replace(CASE, norm="rms", C=1, N=1),
    replace(CASE, rows=(300,), C=200, N=130),
    *NORMS,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SWEEP, ids=str)
def test_within_the_error_budget(backend, case, dtype):
    check(replace(case, dtype=dtype), backend.device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [CASE, *NORMS, replace(CASE, rows=(127,), C=65, N=130)], ids=str)
def test_wide_streams_beside_narrow_weights(backend, case, dtype):
    check(replace(case, dtype=dtype, streams=torch.float32), backend.device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("mean", [1000.0, -30.0])
def test_mean_far_from_zero(backend, norm, mean, dtype):
    """Where E(x²) - E(x)² would lose the variance."""
    check(replace(CASE, norm=norm, mean=mean, dtype=dtype), backend.device)
    if dtype in (torch.bfloat16, torch.float16):
        check(replace(CASE, norm=norm, mean=mean, dtype=dtype, streams=torch.float32), backend.device)
