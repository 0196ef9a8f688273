"""What fk.patch leaves as it was, what it refuses, and how it is undone."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

import flamingo_kernels as fk
from flamingo_kernels.patch.fused import Fused
from tests.patch import foreign, otter
from tests.patch.foreign import LOCATIONS, family
from tests.support.process import normal_process
from tests.support.public import public

pytestmark = normal_process

CASES = {
    "open_flamingo": family("open_flamingo", media_locations=LOCATIONS),
    "resampler": foreign.resampler("flamingo_pytorch"),
    "flamingo_mini": foreign.mini(),
    "idefics": foreign.idefics(),
    "mllama": foreign.mllama(),
}


@pytest.mark.parametrize("case", CASES)
def test_only_the_class_of_the_instance_changes(case):
    module, other = CASES[case].module(), CASES[case].module()
    kind, forward = type(module), type(module).forward
    before, parameters = dict(vars(module)), dict(module.named_parameters())
    handle = fk.patch(module)
    assert type(module) is not kind
    assert isinstance(module, kind)
    assert (type(module).__name__, type(module).__module__) == (kind.__name__, kind.__module__)
    assert all(x is parameters[name] for name, x in module.named_parameters())
    assert list(module.state_dict()) == list(other.state_dict())
    assert (type(other), kind.forward) == (kind, forward)

    handle.restore()
    assert type(module) is kind
    assert vars(module) == before
    assert not any(isinstance(part, Fused) for part in module.modules())


def test_what_was_patched_is_listed():
    block = CASES["open_flamingo"].module()
    assert fk.patch(block).patched == [("", "GatedCrossAttentionBlock"), ("attn", "MaskedCrossAttention")]
    model = nn.ModuleDict(
        {"text": nn.Linear(2, 2), "look": CASES["resampler"].module(), "read": nn.ModuleList([block])}
    )
    handle = fk.patch(model)
    assert handle.patched == [
        ("look", "PerceiverResampler"),
        ("read.0", "GatedCrossAttentionBlock"),
        ("read.0.attn", "MaskedCrossAttention"),
    ]
    assert repr(handle).startswith("Handle(look: PerceiverResampler, read.0: Gated")


def test_patching_again_changes_nothing_and_either_handle_restores():
    block = CASES["open_flamingo"].module()
    first = fk.patch(block)
    kind = type(block)
    second = fk.patch(block)
    assert type(block) is kind
    assert second.patched == first.patched
    second.restore()
    first.restore()  # nothing is left to do
    assert not isinstance(block, Fused)
    fk.patch(block)
    assert type(block) is kind


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_copies_and_pickles_are_patched(case, how):
    foreign, module = CASES[case], CASES[case].module()
    kind = type(module)
    fk.patch(module)
    if how == "deepcopy":
        other = copy.deepcopy(module)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(module))
    else:
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert type(other) is type(module)
    assert all(a is not b for a, b in zip(module.parameters(), other.parameters(), strict=True))
    inputs = foreign.inputs()
    assert torch.equal(foreign.call(module, inputs), foreign.call(other, inputs))
    fk.patch(other).restore()
    assert type(other) is kind
    assert isinstance(module, Fused)


def test_an_optimizer_goes_on():
    """Made before, stepping after; and a state dict goes in as it came out."""
    foreign, block = CASES["open_flamingo"], CASES["open_flamingo"].module()
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    fk.patch(block)
    before = copy.deepcopy(block.state_dict())
    foreign.call(block, foreign.inputs()).square().mean().backward()
    optimizer.step()
    assert all(not torch.equal(x, before[name]) for name, x in block.state_dict().items())
    block.load_state_dict(before)
    assert all(torch.equal(x, before[name]) for name, x in block.state_dict().items())


def test_hooks_of_the_block_and_of_what_it_calls_run():
    foreign, block = CASES["open_flamingo"], CASES["open_flamingo"].module()
    inputs = foreign.inputs()
    expected = foreign.call(block, inputs)
    called = []
    for name in ("", "attn.norm", "attn.to_q", "attn.to_kv", "attn.to_out", "ff.0", "ff.1", "ff.3"):
        block.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
    fk.patch(block)
    torch.testing.assert_close(foreign.call(block, inputs), expected)
    assert sorted(called) == sorted(["", "attn.norm", "attn.to_q", "attn.to_kv", "attn.to_out", "ff.0", "ff.1", "ff.3"])


class LowRank(nn.Module):
    """An adapter around a linear, as LoRA puts it there."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.down, self.up = nn.Linear(linear.in_features, 2), nn.Linear(2, linear.out_features)

    @property
    def weight(self) -> torch.Tensor:
        return self.linear.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.up(self.down(x))


@pytest.mark.parametrize("case", ["open_flamingo", "idefics", "mllama"])
def test_adapters_are_called(case):
    """Put in before or after patching."""
    foreign, block = CASES[case], CASES[case].module()
    names = {"open_flamingo": ("attn.to_q", "attn.to_kv", "ff.3")}.get(case, ("cross_attn.q_proj", "cross_attn.v_proj"))
    fk.patch(block)
    for name in names:
        block.set_submodule(name, LowRank(block.get_submodule(name)))
    inputs = foreign.inputs()
    actual = foreign.call(block, inputs)
    fk.patch(block).restore()
    torch.testing.assert_close(actual, foreign.call(block, inputs))


def test_a_forward_put_on_an_inner_module_is_called():
    """As accelerate does, to bring weights in before it."""
    foreign, block = CASES["open_flamingo"], CASES["open_flamingo"].module()
    for name in ("attn.norm", "attn.to_q", "attn.to_kv", "attn.to_out", "ff.0", "ff.3"):
        module = block.get_submodule(name)
        module.forward = lambda x, original=module.forward: 2 * original(x)
    fk.patch(block)
    inputs = foreign.inputs()
    actual = foreign.call(block, inputs)
    fk.patch(block).restore()
    torch.testing.assert_close(actual, foreign.call(block, inputs))


def test_nothing_to_patch():
    with pytest.raises(
        ValueError, match=r"model holds nothing that can be patched, got Linear\. Supported: .*mllama: "
    ):
        fk.patch(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got dict"):
        fk.patch({})


def _replaced_forward() -> nn.Module:
    block = CASES["open_flamingo"].module()
    block.forward = block.forward
    return block


def _other_activation() -> nn.Module:
    block = CASES["open_flamingo"].module()
    block.ff[2] = nn.Tanh()
    return block


def _other_scale() -> nn.Module:
    resampler = foreign.resampler("otter").module()
    resampler.layers[1].scale = 1.0
    return resampler


def _own_forward() -> nn.Module:
    class Mine(public("open_flamingo").GatedCrossAttentionBlock):
        def forward(self, *args: object) -> None:
            return None

    return Mine(dim=8, dim_visual=8)


def _other_version() -> nn.Module:
    class MaskedCrossAttention(nn.Module):
        __module__ = "open_flamingo.src.helpers"

        def forward(self, x, media, locations):
            return x

    return MaskedCrossAttention()


def _other_attention() -> nn.Module:
    return foreign.mllama(attn_implementation="flex_attention").module()


REFUSED = {
    r"GatedCrossAttentionBlock\) .*forward has been replaced already, by hooks of accelerate": _replaced_forward,
    r"the activation Tanh, where GELU, ReLU, SiLU and SquaredReLU are supported": _other_activation,
    r"OtterPerceiverResampler\) .*scores are multiplied by 1\.0, where 8\*\*-0\.5 is supported": _other_scale,
    r"inside \(Mine\) of open_flamingo cannot be patched: its class has a forward of its own": _own_forward,
    r"takes \(x, media, locations\), where \(x, media, media_locations, use_cached_media\) or": _other_version,
    r"the attention flex_attention, where eager and sdpa are supported": _other_attention,
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused_and_nothing_is_patched(message):
    model = nn.ModuleDict({"fine": CASES["resampler"].module(), "inside": REFUSED[message]()})
    with pytest.raises(ValueError, match=message):
        fk.patch(model)
    assert not any(isinstance(part, Fused) for part in model.modules())


def test_nothing_foreign_is_imported():
    code = "import sys; sys.modules |= dict.fromkeys(['transformers', 'einops']); import flamingo_kernels"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_otter_with_xformers_is_refused(monkeypatch):
    """There it ignores media_locations."""
    block = family("otter").module()
    monkeypatch.setattr(otter, "XFORMERS_AVAIL", True, raising=False)
    with pytest.raises(ValueError, match="with xformers it attends to all media"):
        fk.patch(block)


def test_what_was_wrapped_since_is_not_restored():
    block = CASES["open_flamingo"].module()
    handle = fk.patch(block)
    block.attn.forward = block.attn.forward  # as accelerate does
    with pytest.raises(ValueError, match=r"attn \(MaskedCrossAttention\) has been wrapped since it was patched"):
        handle.restore()
    assert isinstance(block, Fused)
    del block.attn.forward
    handle.restore()
    assert not isinstance(block, Fused)
