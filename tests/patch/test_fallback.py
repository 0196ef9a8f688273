"""Calls that a fused forward does not stand for run the original, with one warning, and give what it gives."""

import copy
import importlib
import warnings

import pytest
import torch
from torch import Tensor, nn

import flamingo_kernels as fk
from flamingo_kernels.patch.masks import of_dense
from tests.patch import foreign
from tests.patch.foreign import DIM_HEAD, HEADS, LOCATIONS, VISIBLE, B, Foreign, L, M, T, Tensors, additive, family
from tests.support.process import normal_process

pytestmark = normal_process
WITH_A_HOLE = VISIBLE.clone()
WITH_A_HOLE[1, 5, :] = torch.tensor([True, False, True]).repeat_interleave(L)


def runs_the_original(foreign: Foreign, module: nn.Module, message: str) -> None:
    """Twice, with one warning, and the same bits as the original."""
    patched = copy.deepcopy(module)
    fk.patch(patched)
    inputs = foreign.inputs()
    torch.manual_seed(0)  # of dropout
    with pytest.warns(RuntimeWarning, match=rf"runs its original forward: .*{message}"):
        actual = foreign.call(patched, inputs)
    torch.manual_seed(0)
    assert torch.equal(actual, foreign.call(module, inputs))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        foreign.call(patched, inputs)


@pytest.mark.parametrize("model", [foreign.idefics, foreign.mllama])
def test_a_mask_that_is_no_run_of_keys(model):
    with_a_hole = model(WITH_A_HOLE)
    runs_the_original(with_a_hole, with_a_hole.module(), "a mask that hides keys between visible ones")


def _idefics_with(mask: Tensor | None, gate: Tensor | None = None, **options: object) -> Foreign:
    gate = VISIBLE.any(-1).float() if gate is None else gate

    def call(module: nn.Module, i: Tensors) -> Tensor:
        return module(i["x"], image_hidden_states=i["media"], image_attention_mask=mask, cross_attention_gate=gate)

    base = foreign.idefics(**options)
    return Foreign(base.build, base.shapes, call)


def test_a_mask_that_weights_keys():
    weights = additive(VISIBLE, torch.float32) + torch.linspace(-1, 0, M * L)
    case = _idefics_with(weights)
    runs_the_original(case, case.module(), "values other than 0 and the lowest")


def test_a_row_of_minus_infinities():
    """The original may give anything there; where the gate zeroes the row, it does not matter."""
    hidden = torch.zeros(B, 1, T, M * L).masked_fill(~VISIBLE[:, None], float("-inf"))
    case = _idefics_with(hidden, torch.ones(B, T), attn_implementation="sdpa")
    runs_the_original(case, case.module(), "minus infinity in a row without a visible key")
    case = _idefics_with(hidden, attn_implementation="sdpa")
    module = case.module()
    expected = case.call(module, case.inputs())
    fk.patch(module)
    torch.testing.assert_close(case.call(module, case.inputs()), expected)


def test_no_mask():
    """Eager attention sees everything then, which is fused; sdpa of transformers is causal, which is not."""
    case = _idefics_with(None, attn_implementation="sdpa")
    runs_the_original(case, case.module(), "without a mask, sdpa of transformers is causal")
    case = _idefics_with(None)
    module = case.module()
    expected = case.call(module, case.inputs())
    fk.patch(module)
    torch.testing.assert_close(case.call(module, case.inputs()), expected)


def test_a_gate_that_opens_a_row_without_images():
    """Its softmax then spreads evenly over what is hidden."""
    case = _idefics_with(additive(VISIBLE, torch.float32), torch.ones(B, T))
    module = case.module()
    expected = case.call(module, case.inputs())
    fk.patch(module)
    torch.testing.assert_close(case.call(module, case.inputs()), expected)


@pytest.mark.parametrize("model", [foreign.idefics, foreign.mllama])
def test_dropout_in_training(model):
    case = model(dropout=0.3)
    module = case.module().train()
    runs_the_original(case, module, "dropout in training")
    expected = case.call(module.eval(), case.inputs())
    fk.patch(module)
    torch.testing.assert_close(case.call(module, case.inputs()), expected)


def test_hooks_on_a_module_that_would_not_be_called():
    case = family("open_flamingo", media_locations=LOCATIONS)
    for name in ("attn", "ff", "ff.2"):
        module = case.module()
        module.get_submodule(name).register_forward_hook(lambda _, __, out: out * 2)
        patched = copy.deepcopy(module)
        fk.patch(patched)
        with pytest.warns(RuntimeWarning, match="runs its original forward: .* hooks"):
            actual = case.call(patched, case.inputs())
        torch.testing.assert_close(actual, case.call(module, case.inputs()))


def test_one_warning_a_model():
    case = foreign.idefics(WITH_A_HOLE)
    model = nn.ModuleList([case.module(), case.module()])
    fk.patch(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for layer in model:
            case.call(layer, case.inputs())
    messages = [str(one.message) for one in caught if "flamingo_kernels" in str(one.message)]
    assert len(messages) == 1
    assert "patch: 0 (IdeficsGatedCrossAttentionLayer) runs its original forward: a mask that hides" in messages[0]


@pytest.mark.parametrize(
    ("case", "error"),
    [
        (family("open_flamingo", media_locations=LOCATIONS[:, 1:]), AssertionError),
        (foreign.mllama(VISIBLE[:, :, :-1]), RuntimeError),
    ],
)
def test_errors_are_those_of_the_original(case, error):
    module = case.module()
    with pytest.raises(error) as theirs:
        case.call(module, case.inputs())
    fk.patch(module)
    with pytest.warns(RuntimeWarning, match="original forward"), pytest.raises(error) as ours:
        case.call(module, case.inputs())
    assert str(ours.value) == str(theirs.value)


def test_a_mask_is_looked_at_once_for_all_layers(monkeypatch):
    looks = []
    module = importlib.import_module("flamingo_kernels.patch.transformers")
    monkeypatch.setattr(module, "of_dense", lambda *a: looks.append(1) or of_dense(*a))
    mask, gate = additive(VISIBLE, torch.float32), VISIBLE.any(-1).float()
    case = _idefics_with(mask, gate)
    model, inputs = nn.ModuleList([case.module(), case.module()]), case.inputs()
    expected = case.call(model[0], inputs)
    fk.patch(model)
    for layer in model:
        torch.testing.assert_close(case.call(layer, inputs), expected)
    assert len(looks) == 1
    mask[:, :, 12] = 0  # in place: another mask
    expected = case.call(fk_restored(model[0]), inputs)
    torch.testing.assert_close(case.call(model[1], inputs), expected)
    assert len(looks) == 2
    with torch.inference_mode():
        case.call(model[1], inputs)
        assert len(looks) == 3
    case.call(model[1], {name: x.requires_grad_() for name, x in inputs.items()}).sum().backward()


def fk_restored(module: nn.Module) -> nn.Module:
    module = copy.deepcopy(module)
    fk.patch(module).restore()
    return module


@pytest.mark.parametrize("case", ["open_flamingo", "mllama", "resampler"])
def test_compiles_into_one_graph(case):
    case = {
        "open_flamingo": family("open_flamingo", media_locations=LOCATIONS, latest=False),
        "mllama": foreign.mllama(),
        "resampler": foreign.resampler("open_flamingo"),
    }[case]
    module = case.module()
    fk.patch(module)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    results = []
    for run in (module, compiled):
        inputs = {name: x.requires_grad_() for name, x in case.inputs().items()}
        out = case.call(run, inputs)
        results.append([out, *torch.autograd.grad(out.square().sum(), [*inputs.values(), *module.parameters()])])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


def test_compiled_code_does_not_take_a_mask_that_is_no_run_of_keys():
    case = foreign.idefics(WITH_A_HOLE)
    module = case.module()
    fk.patch(module)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="a mask that hides keys between visible ones"):
        case.call(compiled, case.inputs())


def _cached(module: nn.Module, x: Tensor, media: Tensor | None, cache: object) -> Tensor:
    visible = VISIBLE[:, : x.shape[1]]
    mask, row = foreign.mllama_masks(visible, x.dtype)
    return module(x, media, mask, None, row, None, cache)


def test_mllama_with_a_cache():
    """Keys and values go into a dynamic cache and come out of it; another cache is left to the original."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    case = foreign.mllama()
    module = case.module()
    patched = copy.deepcopy(module)
    fk.patch(patched)
    x, media = case.inputs().values()
    config = foreign.mllama_config(num_hidden_layers=1)
    caches = [transformers.DynamicCache(), transformers.DynamicCache()]
    for tokens, states in ((T, media), (1, None), (3, None)):
        expected, actual = (
            _cached(m, x[:, :tokens], states, c) for m, c in zip((module, patched), caches, strict=True)
        )
        torch.testing.assert_close(actual, expected)
    keys = [cache.layers[0].keys for cache in caches]
    assert keys[1].shape == (B, 2, M * L, DIM_HEAD)
    torch.testing.assert_close(*keys)
    caches = [transformers.StaticCache(config=config, max_cache_len=M * L) for _ in "ab"]
    expected = _cached(module, x, media, caches[0])
    with pytest.warns(RuntimeWarning, match="a StaticCache, where DynamicCache is supported"):
        assert torch.equal(_cached(patched, x, media, caches[1]), expected)


def test_flamingo_mini_hands_keys_and_values_in():
    case = foreign.mini()
    module = case.module()
    patched = copy.deepcopy(module)
    fk.patch(patched)
    y, media = case.inputs().values()
    _, kv = module(y, media, LOCATIONS, output_kv=True)
    assert kv[0].shape == (B, HEADS, M * L, DIM_HEAD)
    for tokens in (1, 4):
        for block in ("block", "attention"):
            theirs, ours = (module, patched) if block == "block" else (module.attn, patched.attn)
            order = (media, LOCATIONS) if block == "block" else (LOCATIONS, media)
            expected = theirs(y[:, :tokens], *order, previous_kv=kv, output_kv=True)
            actual = ours(y[:, :tokens], *order, previous_kv=kv, output_kv=True)
            torch.testing.assert_close(actual, expected)
            assert theirs(y, *order)[1] is ours(y, *order)[1] is None
