"""How much of what an eager block keeps for backward the fused one keeps, at the shapes of real models.

Counted on meta tensors, where full size costs nothing: what is kept follows from shapes and dtypes.
"""

import pytest
import torch
from torch import Tensor

import flamingo_kernels as fk
from benchmarks import bench_masked_cross_attention as attention
from benchmarks.bench_gated_block import fused_block, plain_block
from benchmarks.memory import saved_bytes
from benchmarks.shapes import LATENTS, SHAPES, Shape
from tests.support.process import normal_process

pytestmark = normal_process
NORM = ("norm.weight", "norm.bias")
IN_ORDER = [*(f"attn_{x}" for x in NORM), "to_q.weight", "to_kv.weight", "to_out.weight", "attn_gate"]
IN_ORDER += [*(f"ff_{x}" for x in NORM), "w_in.weight", "w_out.weight", "ff_gate"]  # as plain_block takes them


def kept(shape: Shape, dtype: torch.dtype, device: str) -> tuple[int, int]:
    """Bytes besides inputs and parameters: of the fused block, and of the public Flamingos' math in eager code."""
    with torch.device(device):
        where = attention.Setting(shape, torch.zeros(shape.rows, shape.tokens, dtype=torch.bool), 0)
        intervals = fk.Intervals(*torch.zeros(2, shape.rows, shape.tokens, dtype=torch.int32))
        block = fused_block(shape).to(dtype)
        x = torch.empty(shape.rows, shape.tokens, shape.width, dtype=dtype).requires_grad_()
        media = torch.empty(shape.rows, shape.media, LATENTS, shape.visual_width, dtype=dtype).requires_grad_()
    mask, blind = attention.dense_masks(where)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention.flamingo_attention(*(t.transpose(1, 2) for t in (q, k, v)), mask, blind).transpose(1, 2)

    leaves = (x, media, *map(block.get_parameter, IN_ORDER))
    ours, _ = saved_bytes(lambda x, media, *_: block(x, media, intervals), leaves)
    eager, _ = saved_bytes(lambda *leaves: plain_block(attend, shape.heads, shape.activation, *leaves), leaves)
    return ours, eager


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_meta_tensors_count_like_real_ones(activation):
    """In fp32. In 16 bits a LayerNorm on meta keeps its mean and 1/std in fp32, as on a GPU, where a CPU does not."""
    shape = Shape("small", 2, 11, 3, 2, 16, 24, 40, activation=activation)
    assert kept(shape, torch.float32, "meta") == kept(shape, torch.float32, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "most"), [("of3b", 0.4), ("shots32", 0.15)])
def test_the_fused_block_keeps_a_fraction(name, most, dtype):
    ours, eager = kept(SHAPES[name], dtype, "meta")
    assert ours <= most * eager, f"{ours} of {eager} bytes"
