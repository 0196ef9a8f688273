"""Both modules give what the public Flamingo packages give with the same weights, in fp64 to rounding."""

import pytest
import torch
from torch import Tensor, nn

import flamingo_kernels as fk
from tests.nn.dense_flamingo import randomize
from tests.support.process import normal_process
from tests.support.public import public

pytestmark = normal_process
C, V, M, L, T, B, HEADS, DIM_HEAD = 24, 24, 3, 4, 17, 2, 4, 8


def _assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(
        ours, theirs, rtol=0, atol=64 * torch.finfo(torch.float64).eps * theirs.detach().abs().max().item()
    )


def _assert_same_gradients(ours: nn.Module, theirs: nn.Module, names: dict[str, str]) -> None:
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        _assert_close(parameter.grad, gradients[names[name]].reshape(parameter.shape))


def _copy_weights(ours: nn.Module, theirs: nn.Module, names: dict[str, str]) -> None:
    state = theirs.state_dict()
    assert sorted(names.values()) == sorted(state)
    ours.load_state_dict({name: state[their].reshape(ours.state_dict()[name].shape) for name, their in names.items()})


BLOCK_NAMES = {
    "attn_norm.weight": "attn.norm.weight",
    "attn_norm.bias": "attn.norm.bias",
    "to_q.weight": "attn.to_q.weight",
    "to_kv.weight": "attn.to_kv.weight",
    "to_out.weight": "attn.to_out.weight",
    "attn_gate": "attn_gate",
    "ff_norm.weight": "ff.0.weight",
    "ff_norm.bias": "ff.0.bias",
    "w_in.weight": "ff.1.weight",
    "w_out.weight": "ff.3.weight",
    "ff_gate": "ff_gate",
}
LAYER_NAMES = {
    "media_norm.weight": "0.norm_media.weight",
    "media_norm.bias": "0.norm_media.bias",
    "latent_norm.weight": "0.norm_latents.weight",
    "latent_norm.bias": "0.norm_latents.bias",
    "to_q.weight": "0.to_q.weight",
    "to_kv.weight": "0.to_kv.weight",
    "to_out.weight": "0.to_out.weight",
    "ff_norm.weight": "1.0.weight",
    "ff_norm.bias": "1.0.bias",
    "w_in.weight": "1.1.weight",
    "w_out.weight": "1.3.weight",
}


@pytest.mark.parametrize("attend", ["latest", "all"])
@pytest.mark.parametrize("package", ["flamingo_pytorch", "open_flamingo"])
def test_gated_block(package, attend):
    options = {"heads": HEADS, "dim_head": DIM_HEAD}
    wide = {} if package == "flamingo_pytorch" else {"dim_visual": V}
    theirs = public(package).GatedCrossAttentionBlock(
        dim=C, **wide, **options, only_attend_immediate_media=attend == "latest"
    )
    theirs = theirs.double()
    randomize(theirs)
    ours = fk.nn.GatedCrossAttentionBlock(C, V, **options, activation="gelu").double()
    _copy_weights(ours, theirs, BLOCK_NAMES)

    generator = torch.Generator().manual_seed(1)
    x = torch.randn(B, T, C, generator=generator, dtype=torch.float64)
    media = torch.randn(B, M, L, V, generator=generator, dtype=torch.float64)
    locations = torch.zeros(B, T, dtype=torch.bool)
    locations[:, [2, 7, 8]] = True
    intervals = fk.media_intervals(locations, L, M, attend=attend)
    # with "all", the packages let a token before the first media look at every media
    compared = slice(0, None) if attend == "latest" else slice(2, None)
    out = [ours(x, media, intervals)[:, compared], theirs(x, media, locations)[:, compared]]
    _assert_close(*out)
    do = torch.randn(out[0].shape, generator=generator, dtype=torch.float64)
    for each in out:
        each.backward(do)
    _assert_same_gradients(ours, theirs, BLOCK_NAMES)


@pytest.mark.parametrize("package", ["flamingo_pytorch", "open_flamingo"])
def test_resampler(package):
    options = {"depth": 2, "heads": HEADS, "dim_head": DIM_HEAD, "num_latents": 5}
    names = {"latents": "latents", "norm.weight": "norm.weight", "norm.bias": "norm.bias"}
    names |= {f"layers.{i}.{ours}": f"layers.{i}.{theirs}" for i in range(2) for ours, theirs in LAYER_NAMES.items()}
    helpers = public(package)
    if package == "flamingo_pytorch":
        frames, names["media_embeddings"] = 1, "media_pos_emb"
        theirs = helpers.PerceiverResampler(dim=V, **options, num_media_embeds=4)
        ours = fk.nn.PerceiverResampler(V, **options, max_media=4, activation="gelu")
    else:
        frames, names["media_embeddings"], names["frame_embeddings"] = 3, "media_time_embs", "frame_embs"
        theirs = helpers.PerceiverResampler(dim=V, **options, max_num_media=4, max_num_frames=5)
        ours = fk.nn.PerceiverResampler(V, **options, max_media=4, max_frames=5, activation="gelu")
    ours, theirs = ours.double(), theirs.double()
    randomize(theirs)
    _copy_weights(ours, theirs, names)

    generator = torch.Generator().manual_seed(2)
    x = torch.randn(B, M, frames, 6, V, generator=generator, dtype=torch.float64)
    out = [ours(x), theirs(x if package == "open_flamingo" else x.squeeze(2))]
    _assert_close(*out)
    do = torch.randn(out[0].shape, generator=generator, dtype=torch.float64)
    for each in out:
        each.backward(do)
    _assert_same_gradients(ours, theirs, names)


def test_llama_layer():
    """Llama 3.2's cross-attention layer as transformers computes it."""
    mllama = pytest.importorskip("transformers.models.mllama.modeling_mllama", reason="transformers is not installed")
    config = mllama.MllamaTextConfig(
        hidden_size=HEADS * DIM_HEAD, num_attention_heads=HEADS, num_key_value_heads=2, intermediate_size=40
    )
    config._attn_implementation = "eager"
    theirs = mllama.MllamaCrossAttentionDecoderLayer(config, layer_idx=0).double().eval()
    randomize(theirs)
    ours = fk.nn.GatedCrossAttentionBlock(
        HEADS * DIM_HEAD,
        HEADS * DIM_HEAD,
        heads=HEADS,
        dim_head=DIM_HEAD,
        kv_heads=2,
        ff_dim=40,
        activation="swiglu",
        norm="rms",
        qk_norm=True,
        skip_mlp_without_media=True,
    ).double()
    state = theirs.state_dict()
    ours.load_state_dict(
        {
            "attn_norm.weight": state["input_layernorm.weight"],
            "to_q.weight": state["cross_attn.q_proj.weight"],
            "to_kv.weight": torch.cat([state["cross_attn.k_proj.weight"], state["cross_attn.v_proj.weight"]]),
            "to_out.weight": state["cross_attn.o_proj.weight"],
            "q_norm.weight": state["cross_attn.q_norm.weight"],
            "k_norm.weight": state["cross_attn.k_norm.weight"],
            "attn_gate": state["cross_attn_attn_gate"],
            "ff_norm.weight": state["post_attention_layernorm.weight"],
            "w_in.weight": torch.cat([state["mlp.gate_proj.weight"], state["mlp.up_proj.weight"]]),
            "w_out.weight": state["mlp.down_proj.weight"],
            "ff_gate": state["cross_attn_mlp_gate"],
        }
    )

    generator = torch.Generator().manual_seed(3)
    x = torch.randn(B, T, HEADS * DIM_HEAD, generator=generator, dtype=torch.float64)
    media = torch.randn(B, M * L, HEADS * DIM_HEAD, generator=generator, dtype=torch.float64)
    locations = torch.zeros(B, T, dtype=torch.bool)
    locations[:, [2, 7, 8]] = True
    intervals = fk.media_intervals(locations, L, M, attend="group")
    key = torch.arange(M * L)
    visible = (key >= intervals.start[..., None]) & (key < intervals.end[..., None])
    sees = visible.any(-1, keepdim=True)
    # its mask is additive, and hides nothing from a token that sees nothing
    hidden = torch.zeros(B, 1, T, M * L, dtype=torch.float64).masked_fill((~visible & sees)[:, None], float("-inf"))
    expected = theirs(x, media, hidden, None, sees[:, None].double())
    out = ours(x, media, intervals)
    sees = sees.squeeze(-1)
    # transformers' RMSNorm is in fp32 whatever the input
    torch.testing.assert_close(out[sees], expected[sees], rtol=0, atol=8 * torch.finfo(torch.float32).eps)
    assert torch.equal(out[~sees], x[~sees])
