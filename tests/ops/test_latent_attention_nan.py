"""latent_attention: a NaN or an infinity behind media_lengths goes nowhere, one that is seen goes to all latents."""

import pytest
import torch

from tests.support.latent_attention_cases import LatentCase, assert_identical, assert_right, run_op
from tests.support.process import DTYPES, pick

pytestmark = pytest.mark.ops("latent_attention")
NOT_FINITE = (float("nan"), float("inf"), float("-inf"))


@pytest.mark.parametrize("value", pick(NOT_FINITE, NOT_FINITE[:1]))
@pytest.mark.parametrize("dtype", pick(DTYPES, DTYPES[:2]), ids=str)
@pytest.mark.parametrize("lengths", ["zero", "one", "ragged"])
@pytest.mark.parametrize("S", [40, 200])
def test_what_is_hidden_reaches_nobody(backend, S, lengths, dtype, value):
    inputs = LatentCase(dtype=dtype, lengths=lengths, S=S, R=9, D=24, H=4).inputs(backend.device)
    hidden = (torch.arange(S, device=backend.device) >= inputs.media_lengths[:, None])[..., None, None]
    assert hidden.any()
    bad = {name: getattr(inputs, name).masked_fill(hidden, value) for name in ("k_media", "v_media")}
    assert_identical(run_op(inputs._replace(**bad)), run_op(inputs))


@pytest.mark.parametrize("dtype", pick(DTYPES, DTYPES[:2]), ids=str)
@pytest.mark.parametrize("name", ["k_media", "v_media", "k_latents", "v_latents"])
def test_what_is_seen_propagates(backend, name, dtype):
    """To the latents of its media, in the heads that read it, and to no other media and head."""
    inputs = LatentCase(dtype=dtype, lengths="full", S=40, R=9, D=16, H=4).inputs(backend.device)
    bad = getattr(inputs, name).clone()
    bad[1, 7, 1, 3] = float("nan")
    results, clean = run_op(inputs._replace(**{name: bad})), run_op(inputs)
    assert results.dq[1, :, 2:].isnan().all()
    if name.startswith("k"):
        assert results.o[1, :, 2:].isnan().all()
        assert results.lse[1, 2:].isnan().all()
    else:
        assert results.o[1, :, 2:, 3].isnan().all()
    mended = [got.clone() for got in results]
    for got, right in zip(mended, clean, strict=True):
        if got.ndim == 3:  # lse [N, H, R]
            got[1, 2:] = right[1, 2:]
        else:
            first = got.shape[2] // 2
            got[1, :, first:] = right[1, :, first:]
    assert_right(type(results)(*mended), inputs)
