"""The error budget (docs/design.md, section 5), in place of a magic tolerance.

    max|actual - exact| <= 2 · max|eager - exact| + c · eps(dtype) · max|exact|

exact: fp64. eager: plain PyTorch in the dtype under test.

A sum of terms that cancel is as wrong as its terms are rounded, however small it is itself. With `terms` the sum of
their absolute values, eps(accumulation dtype) · terms is therefore allowed on top. Where the exact value is zero
because the terms cancel entirely, so is c · eps(dtype) · terms, for they hold values that were stored in dtype.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

SLACK = {torch.bfloat16: 1, torch.float16: 1, torch.float32: 16, torch.float64: 64}


def assert_within_budget(
    name: str,
    actual: Tensor,
    exact: Tensor,
    eager: Sequence[Tensor],
    *,
    dtype: torch.dtype | None = None,
    terms: Tensor | None = None,
) -> None:
    """actual against exact (fp64), both of one shape, with the worst of the eager results as the measure.

    dtype: whose eps counts; that of `actual` unless given. terms: fp64, like exact; None where nothing cancels.
    Infinities of `exact` must be met exactly; everything else must be finite.
    """
    assert actual.shape == exact.shape, f"{name}: shape {list(actual.shape)}, expected {list(exact.shape)}"
    dtype = dtype or actual.dtype
    eps, slack = torch.finfo(dtype).eps, SLACK[dtype]
    actual = actual.detach().double()
    infinite = exact.isinf()
    assert torch.equal(actual[infinite], exact[infinite]), f"{name}: not infinite where the exact value is"
    assert actual[~infinite].isfinite().all(), f"{name}: not finite in {(~actual[~infinite].isfinite()).sum()} places"
    if actual[~infinite].numel() == 0:
        return
    error = _error(actual, exact)
    measure = max(_error(other.detach().double(), exact).max().item() for other in eager)
    assert measure < float("inf"), f"{name}: the eager result is not finite, so this case measures nothing"
    bound = 2 * measure + slack * eps * exact[~infinite].abs().max().item()
    allowed = torch.full_like(error, bound)
    if terms is not None:
        rounding = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        vanishes = exact.abs() <= 2**-40 * terms  # zero but for the rounding of fp64
        allowed += torch.where(vanishes, slack * eps, rounding) * terms
    worst = (error - allowed).argmax()
    assert (error <= allowed).all(), (
        f"{name} ({dtype}): error {error.flatten()[worst]:.3e} exceeds the budget {allowed.flatten()[worst]:.3e} "
        f"(eager error {measure:.3e}, largest value {exact[~infinite].abs().max():.3e}) at flat index {worst} "
        f"of {list(exact.shape)}: {actual.flatten()[worst]:.6e}, exactly {exact.flatten()[worst]:.6e}"
    )


def _error(actual: Tensor, exact: Tensor) -> Tensor:
    return torch.where(exact.isinf(), 0.0, (actual - exact).abs()).nan_to_num(nan=float("inf"), posinf=float("inf"))
