"""fk.convert_state_dict: with a converted state, fk.nn gives the foreign outputs; and states come back the same."""

import pytest
import torch
from torch import Tensor, nn

import flamingo_kernels as fk
from tests.nn.dense_flamingo import randomize
from tests.patch import foreign
from tests.patch.foreign import DIM_HEAD, HEADS, LOCATIONS, VISIBLE, B, C, Foreign, L, M, V
from tests.support.budget import assert_within_budget
from tests.support.process import normal_process

pytestmark = normal_process
BOTH = {"heads": HEADS, "dim_head": DIM_HEAD}
WIDE = HEADS * DIM_HEAD


def _block(dim: int, dim_visual: int, **options: object) -> fk.nn.GatedCrossAttentionBlock:
    return fk.nn.GatedCrossAttentionBlock(dim, dim_visual, **BOTH, **options)


def _in_transformers(**options: object) -> dict[str, object]:
    return {"norm": "rms", "activation": "swiglu", "ff_dim": 40, **options}


BLOCKS = {
    "open_flamingo": (foreign.family("open_flamingo", media_locations=LOCATIONS), _block(C, V, activation="gelu")),
    "otter": (foreign.family("otter", media_locations=LOCATIONS), _block(C, V, activation="gelu")),
    "flamingo_pytorch": (
        foreign.family("flamingo_pytorch", media_locations=LOCATIONS),
        _block(C, C, activation="gelu"),
    ),
    "flamingo_mini": (foreign.mini("sqrelu"), _block(C, V)),
    "idefics": (foreign.idefics(), _block(WIDE, V, **_in_transformers())),
    "idefics-vector-qk_norm": (
        foreign.idefics(alpha_type="vector", qk_layer_norms=True),
        _block(WIDE, V, **_in_transformers(gate="vector", qk_norm=True)),
    ),
    "mllama": (
        foreign.mllama(),
        _block(WIDE, WIDE, **_in_transformers(qk_norm=True, kv_heads=2, skip_mlp_without_media=True)),
    ),
}
RESAMPLERS = {
    "open_flamingo": (foreign.resampler("open_flamingo"), {"activation": "gelu"}),
    "open_flamingo-embeddings": (
        foreign.resampler("open_flamingo", max_num_media=4, max_num_frames=5),
        {"activation": "gelu", "max_media": 4, "max_frames": 5},
    ),
    "otter": (foreign.resampler("otter", max_num_frames=3), {"activation": "gelu", "max_frames": 3}),
    "flamingo_pytorch": (foreign.resampler("flamingo_pytorch"), {"activation": "gelu", "max_media": 4}),
    "flamingo_mini": (foreign.resampler("flamingo_mini", act="sqrelu"), {"max_frames": 4}),
    "idefics": (foreign.idefics_resampler(), {"activation": "relu"}),
}


def _package(case: str) -> str:
    return case.split("-")[0]


@pytest.mark.parametrize("case", BLOCKS)
def test_block(case):
    theirs, ours = BLOCKS[case]
    module, inputs = theirs.module(), theirs.inputs()
    ours.load_state_dict(fk.convert_state_dict(module.state_dict(), _package(case), "flamingo_kernels"))
    x, media = inputs.values()
    rows = torch.ones_like(LOCATIONS)
    if _package(case) in ("idefics", "mllama"):
        place = torch.arange(M * L)
        start = torch.where(VISIBLE, place, M * L).amin(-1)
        intervals = fk.Intervals(start.int(), (torch.where(VISIBLE, place, -1).amax(-1) + 1).int())
        if case == "mllama":  # whose tokens without images attend to all of them
            rows = VISIBLE.any(-1)
    else:
        intervals = fk.media_intervals(LOCATIONS, L, M)
    actual = ours(x, media, intervals)
    eager, exact = theirs.call(module, inputs), _exact(theirs, module)
    if case == "flamingo_mini":  # which also returns keys and values
        eager, exact = (out[: x.numel()].view(x.shape) for out in (eager, exact))
    assert_within_budget("out", actual[rows], exact[rows], [eager[rows]])


@pytest.mark.parametrize("case", RESAMPLERS)
def test_resampler(case):
    theirs, options = RESAMPLERS[case]
    module, inputs = theirs.module(), theirs.inputs()
    ours = fk.nn.PerceiverResampler(V, depth=2, num_latents=5, **BOTH, **options)
    ours.load_state_dict(fk.convert_state_dict(module.state_dict(), _package(case), "flamingo_kernels"))
    x = inputs["x"]
    if case == "flamingo_pytorch":
        x = x.unsqueeze(2)
    elif case == "flamingo_mini":
        x = x.unsqueeze(1)
    elif case == "idefics":
        x = x.view(B, M, 1, *x.shape[1:])
    expected = theirs.call(module, inputs)
    exact = _exact(theirs, module)
    assert_within_budget("out", ours(x).reshape(expected.shape), exact, [expected])


@pytest.mark.parametrize(
    ("package", "case"),
    [*((_package(case), BLOCKS[case]) for case in BLOCKS), *((_package(c), RESAMPLERS[c]) for c in RESAMPLERS)],
)
def test_there_and_back(package, case):
    state = case[0].module().state_dict()
    there = fk.convert_state_dict(state, package, "flamingo_kernels")
    assert_same(fk.convert_state_dict(there, "flamingo_kernels", package), state)
    assert_same(fk.convert_state_dict(state, package, package), state)


def test_from_package_to_package():
    state = BLOCKS["open_flamingo"][0].module().state_dict()
    for other in ("otter", "flamingo_mini"):
        there = fk.convert_state_dict(state, "open_flamingo", other)
        BLOCKS[other][0].build().load_state_dict(there)
        assert_same(fk.convert_state_dict(there, other, "open_flamingo"), state)


def test_nothing_is_copied_that_need_not_be():
    state = BLOCKS["open_flamingo"][0].module().state_dict()
    there = fk.convert_state_dict(state, "open_flamingo", "flamingo_kernels")
    assert {x.data_ptr() for x in there.values()} == {x.data_ptr() for x in state.values()}


def _whole(package: str, resampler: str, blocks: list[str]) -> dict[str, Tensor]:
    """A whole model's state, with the head of a language model in it."""
    state = {"lm_head.weight": torch.ones(3, 2)}
    for seed, (prefix, (theirs, _)) in enumerate(
        [*((prefix, BLOCKS[package]) for prefix in blocks), *([(resampler, RESAMPLERS[package])] if resampler else [])]
    ):
        module = theirs.build()
        randomize(module, seed)
        state |= {prefix + name: x for name, x in module.state_dict().items()}
    return state


def test_whole_models_into_the_package_flamingo():
    """In the order of layers, each block once."""
    for package, resampler, blocks in (
        ("open_flamingo", "perceiver.", [f"lang_encoder.model.layers.{i}.gated_cross_attn_layer." for i in (11, 3, 7)]),
        ("flamingo_pytorch", "perceiver_resampler.", [f"layers.{i}.1." for i in (11, 3, 7)]),
        ("flamingo_mini", "flamingo.resampler.", [f"flamingo.lm.h.{i}.xattn_block." for i in (11, 3, 7)]),
        ("idefics", "model.perceiver_resampler.", [f"model.gated_cross_attn_layers.{i}." for i in (2, 0, 1)]),
        ("mllama", "", [f"model.language_model.layers.{i}." for i in (11, 3, 7)]),
    ):
        state = _whole(package, resampler, blocks)
        if package == "open_flamingo":  # its blocks have two names each
            names = [name for name in state if ".layers." in name]
            again = ("lang_encoder.model.layers.", "lang_encoder.gated_cross_attn_layers.")
            state |= {name.replace(*again).replace("gated_cross_attn_layer.", ""): state[name] for name in names}
        ours = fk.convert_state_dict(state, package, "flamingo_kernels")
        assert {name.split(".")[0] for name in ours} == {"blocks", "lm_head", *(["resampler"] if resampler else [])}
        assert ours["lm_head.weight"] is state["lm_head.weight"]
        gate = {"flamingo_mini": "alpha_attn", "idefics": "alpha_cross_attn", "mllama": "cross_attn_attn_gate"}
        for number, place in enumerate((1, 2, 0)):
            theirs = state[blocks[place] + gate.get(package, "attn_gate")]
            assert torch.equal(ours[f"blocks.{number}.attn_gate"], theirs)
        if package == "idefics":
            assert_same(fk.convert_state_dict(ours, "flamingo_kernels", "idefics"), state)


def test_whole_model_from_open_flamingo_to_otter():
    state = _whole("open_flamingo", "perceiver.", ["lang_encoder.model.layers.3.gated_cross_attn_layer."])
    otter = fk.convert_state_dict(state, "open_flamingo", "otter")
    assert "lang_encoder.model.layers.3.gated_cross_attn_layer.feed_forward.1.weight" in otter
    assert "perceiver.layers.1.norm_media.bias" in otter
    assert_same(fk.convert_state_dict(otter, "otter", "open_flamingo"), state)


def _state(package: str) -> dict[str, Tensor]:
    return BLOCKS[package][0].module().state_dict()


def _resampler_state(package: str) -> dict[str, Tensor]:
    return RESAMPLERS[package][0].module().state_dict()


def _ours(**options: object) -> dict[str, Tensor]:
    return _block(C, C, **options).state_dict()


def _without(word: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x for name, x in state.items() if word not in name}


OURS = "flamingo_kernels"
REFUSED = {
    r"target must be one of .*mllama, got 'deepmind'": ("open_flamingo", "deepmind", _state),
    r"must be with a block or a resampler of mllama.*_attn_gate": ("mllama", "otter", lambda _: _state("otter")),
    r"block of open_flamingo has feed_forward\.0": ("open_flamingo", OURS, lambda _: _state("otter")),
    r"one with a gated activation, and those of open_flamingo are without": ("idefics", "open_flamingo", _state),
    r"one with a gated activation, and those of otter are without": (
        OURS,
        "otter",
        lambda _: _ours(activation="swiglu"),
    ),
    r"one without a gated activation, and those of idefics are with": (OURS, "idefics", lambda _: _ours()),
    r"has a gate per channel, which has no counterpart in otter": (OURS, "otter", lambda _: _ours(gate="vector")),
    r"has q_norm.weight, k_norm.weight .* no counterpart in otter": (OURS, "otter", lambda _: _ours(qk_norm=True)),
    r"no counterpart of attn\.norm\.bias, feed_forward\.0\.bias, .* otter": (
        OURS,
        "otter",
        lambda _: _ours(norm="rms"),
    ),
    r"fewer key heads than query heads.*open_flamingo": (OURS, "open_flamingo", lambda _: _ours(kv_heads=2)),
    r"fewer key heads than query heads.*idefics": ("mllama", "idefics", _state),
    r"media of another width than text, .* flamingo_pytorch": ("open_flamingo", "flamingo_pytorch", _state),
    r"resampler of open_flamingo has no counterpart in mllama": ("open_flamingo", "mllama", _resampler_state),
    r"no counterpart of time_pos_emb, which flamingo_mini has": ("open_flamingo", "flamingo_mini", _resampler_state),
    r"has frame_embeddings .* no counterpart in idefics": ("otter", "idefics", _resampler_state),
    r"has blocks\.0\.0\.q_layer_norm\.weight.*no counterpart": (
        *("idefics", OURS),
        lambda _: foreign.idefics_resampler(qk_norm=True).module().state_dict(),
    ),
    r"lacks cross_attn\.k_proj\.weight, cross_attn\.v_proj\.weight": (
        *("mllama", OURS),
        lambda package: _without("k_proj", _state(package)),
    ),
    r"whole model of idefics has no counterpart in mllama.*numbered by .* layers": (
        *("idefics", "mllama"),
        lambda package: _whole(package, "model.perceiver_resampler.", ["model.gated_cross_attn_layers.0."]),
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_has_no_counterpart_is_named(message):
    source, target, state = REFUSED[message]
    with pytest.raises(ValueError, match=message):
        fk.convert_state_dict(state(source), source, target)


def test_a_state_is_a_mapping():
    with pytest.raises(TypeError, match="state must be a mapping of names to tensors, got Linear"):
        fk.convert_state_dict(nn.Linear(1, 1), "otter", "flamingo_kernels")


def _exact(theirs: Foreign, module: nn.Module) -> Tensor:
    return theirs.call(foreign.in_fp64(module), {name: x.double() for name, x in theirs.inputs().items()})


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        assert torch.equal(actual[name], x), name
