"""A patched block or resampler gives what the original gives, outputs and gradients, within the error budget."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

import flamingo_kernels as fk
from tests.patch import foreign
from tests.patch.foreign import LOCATIONS, TOO_MANY, Foreign, Tensors, family, in_fp64, resampler
from tests.support.budget import assert_within_budget
from tests.support.process import normal_process

pytestmark = normal_process
LOSSES = 4
SHORT = foreign.locations([1, 2], [])  # of a prompt; use_cached_media takes it for text of any length

CASES = {
    **{
        f"{package}-{mode}": family(package, media_locations=LOCATIONS, latest=mode == "latest")
        for package in ("open_flamingo", "flamingo_pytorch", "otter")
        for mode in ("latest", "all")
    },
    "open_flamingo-too_many": family("open_flamingo", media_locations=TOO_MANY),
    "open_flamingo-all-too_many": family("open_flamingo", media_locations=TOO_MANY, latest=False),
    "flamingo_pytorch-no_locations": family("flamingo_pytorch"),
    "open_flamingo-cached": family("open_flamingo", media_locations=SHORT, use_cached_media=True),
    "open_flamingo-all-cached": family("open_flamingo", "GatedCrossAttentionBlock", SHORT, True, latest=False),
    "open_flamingo-attention": family("open_flamingo", "MaskedCrossAttention", media_locations=LOCATIONS),
    "open_flamingo-attention-all": family("open_flamingo", "MaskedCrossAttention", LOCATIONS, latest=False),
    "otter-next": family("otter", media_locations=LOCATIONS, attend_previous=False),
    "otter-all-next": family("otter", "GatedCrossAttentionBlock", LOCATIONS, False, latest=False),
    "flamingo_mini": foreign.mini(),
    "flamingo_mini-sqrelu-too_many": foreign.mini("sqrelu", TOO_MANY),
    "flamingo_mini-int_locations": foreign.mini("relu", LOCATIONS.long()),
    "idefics": foreign.idefics(),
    "idefics-sdpa-vector-qk_norm": foreign.idefics(
        attn_implementation="sdpa", alpha_type="vector", qk_layer_norms=True, rms_norm_eps=1e-3
    ),
    "idefics-gelu": foreign.idefics(hidden_act="gelu"),
    "mllama": foreign.mllama(),
    "mllama-sdpa": foreign.mllama(attn_implementation="sdpa", num_key_value_heads=4),
    "open_flamingo-resampler": resampler("open_flamingo"),
    "open_flamingo-resampler-embeddings": resampler("open_flamingo", max_num_media=4, max_num_frames=5),
    "flamingo_pytorch-resampler": resampler("flamingo_pytorch"),
    "otter-resampler": resampler("otter", max_num_frames=3),
    "flamingo_mini-resampler": resampler("flamingo_mini", act="sqrelu"),
    "idefics-resampler": foreign.idefics_resampler(),
    "idefics-resampler-qk_norm": foreign.idefics_resampler(qk_norm=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients(case, dtype):
    assert_equal(CASES[case], dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=["fp16", "fp64"])
@pytest.mark.parametrize("case", ["open_flamingo-all", "flamingo_mini-resampler", "mllama-sdpa"])
def test_other_dtypes(case, dtype):
    assert_equal(CASES[case], dtype)


@pytest.mark.parametrize("case", ["open_flamingo-all", "otter-latest", "flamingo_mini", "idefics", "mllama"])
def test_under_autocast(case):
    """bf16 text beside fp32 parameters, as a bf16 language model gives it, and fp32 text."""
    for text in (torch.bfloat16, torch.float32):
        foreign = CASES[case]
        autocast = Foreign(foreign.build, foreign.shapes, lambda m, i, f=foreign, t=text: _autocast(f, m, i, t))
        assert_equal(autocast, torch.float32, eps=torch.bfloat16)


def _autocast(foreign: Foreign, module: nn.Module, inputs: Tensors, text: torch.dtype) -> Tensor:
    if next(module.parameters()).dtype == torch.float64:
        return foreign.call(module, inputs)
    first = next(iter(inputs))
    with torch.autocast("cpu", torch.bfloat16):
        return foreign.call(module, inputs | {first: inputs[first].to(text)})


def assert_equal(foreign: Foreign, dtype: torch.dtype, eps: torch.dtype | None = None) -> None:
    module = foreign.module().to(dtype)
    patched = copy.deepcopy(module)
    fk.patch(patched)
    inputs = {name: x.to(dtype) for name, x in foreign.inputs().items()}
    expected, terms = _exact(foreign, in_fp64(module), inputs)
    for training in (True, False):  # which is the same to all of them
        eager = _results(foreign, module.train(training), inputs)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            actual = _results(foreign, patched.train(training), inputs)
        assert actual["out"].dtype == eager["out"].dtype
        for name, value in expected.items():
            assert_within_budget(name, actual[name], value, [eager[name]], dtype=eps, terms=terms.get(name))


def _exact(foreign: Foreign, module: nn.Module, inputs: Tensors) -> tuple[Tensors, Tensors]:
    """Results in fp64; and where a gradient cancels, as softmax does not see a bias of all keys, what it is made of."""
    norms = {name: part for name, part in module.named_modules() if name.endswith("k_layer_norm")}
    norms = {name: part for name, part in norms.items() if isinstance(part, nn.LayerNorm)}
    terms = {f"{name}.bias": [] for name in norms}
    hooks = [
        part.register_full_backward_hook(
            lambda _, __, dy, of=terms[f"{name}.bias"]: of.append(dy[0].abs().flatten(0, -2).sum(0))
        )
        for name, part in norms.items()
    ]
    results = _results(foreign, module, inputs)
    for hook in hooks:
        hook.remove()
    return results, {name: torch.stack(each) for name, each in terms.items()}


def _results(foreign: Foreign, module: nn.Module, inputs: Tensors) -> Tensors:
    """The output and, for a few losses, all gradients."""
    dtype = next(module.parameters()).dtype
    leaves = {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}
    out = foreign.call(module, leaves)
    generator = torch.Generator().manual_seed(2)
    named = leaves | dict(module.named_parameters())
    gradients = []
    for _ in range(LOSSES):
        do = torch.randn(out.shape, generator=generator).to(inputs[next(iter(inputs))].dtype).to(out.dtype)
        gradients.append(torch.autograd.grad(out, list(named.values()), do, retain_graph=True, materialize_grads=True))
    stacked = (torch.stack(each) for each in zip(*gradients, strict=True))
    return {"out": out.detach()} | dict(zip(named, stacked, strict=True))
