"""What the parameters of blocks and resamplers are called, in each package.

Every table leads from the names of `fk.nn` to those of the package. Two names stand for the rows of one parameter, the
first above the second. "{}" is the number of a layer.
"""

from dataclasses import dataclass

Names = dict[str, str | tuple[str, str]]


@dataclass(frozen=True)
class Layout:
    """One module of one package.

    optional: what it may lack. rows: parameters that are [n, 1, V] there and [n, V] in `fk.nn`. gated: whether the
    feed-forward has two halves; None: either. scalar_gates: it has no gates per channel. one_width: media are as wide
    as text. grouped: there may be fewer key heads than query heads. ignored: constants that some versions keep.
    """

    names: Names
    optional: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    gated: bool | None = False
    scalar_gates: bool = True
    one_width: bool = False
    grouped: bool = False
    ignored: tuple[str, ...] = ()


def _norm(ours: str, theirs: str) -> Names:
    return {f"{ours}.{kind}": f"{theirs}.{kind}" for kind in ("weight", "bias")}


def _weights(**theirs: str | tuple[str, str]) -> Names:
    def named(name: str) -> str:
        return f"{name}.weight"

    return {named(our): tuple(map(named, x)) if isinstance(x, tuple) else named(x) for our, x in theirs.items()}


def _lucidrains_block(ff: str, attn_gate: str = "attn_gate", ff_gate: str = "ff_gate") -> Names:
    """The block that OpenFlamingo, Otter and flamingo-mini have of flamingo-pytorch."""
    return {
        **_norm("attn_norm", "attn.norm"),
        **_weights(to_q="attn.to_q", to_kv="attn.to_kv", to_out="attn.to_out"),
        "attn_gate": attn_gate,
        **_norm("ff_norm", f"{ff}.0"),
        **_weights(w_in=f"{ff}.1", w_out=f"{ff}.3"),
        "ff_gate": ff_gate,
    }


def _transformers_block(q_norm: str, k_norm: str, attn_gate: str, ff_gate: str) -> Names:
    return {
        **_weights(
            attn_norm="input_layernorm",
            to_q="cross_attn.q_proj",
            to_kv=("cross_attn.k_proj", "cross_attn.v_proj"),
            q_norm=f"cross_attn.{q_norm}",
            k_norm=f"cross_attn.{k_norm}",
            to_out="cross_attn.o_proj",
        ),
        "attn_gate": attn_gate,
        **_weights(ff_norm="post_attention_layernorm", w_in=("mlp.gate_proj", "mlp.up_proj"), w_out="mlp.down_proj"),
        "ff_gate": ff_gate,
    }


def _layers(theirs: str, names: Names) -> Names:
    """`names` of one layer, for all layers, which stand under `theirs`."""

    def inside(name: str) -> str:
        return f"{theirs}.{{}}.{name}"

    return {
        f"layers.{{}}.{our}": tuple(map(inside, x)) if isinstance(x, tuple) else inside(x) for our, x in names.items()
    }


def _lucidrains_layer(attn: str, ff: str, to_kv: str | tuple[str, str]) -> Names:
    kv = tuple(f"{attn}{name}" for name in to_kv) if isinstance(to_kv, tuple) else f"{attn}{to_kv}"
    return {
        **_norm("media_norm", f"{attn}norm_media"),
        **_norm("latent_norm", f"{attn}norm_latents"),
        **_weights(to_q=f"{attn}to_q", to_kv=kv, to_out=f"{attn}to_out"),
        **_norm("ff_norm", f"{ff}.0"),
        **_weights(w_in=f"{ff}.1", w_out=f"{ff}.3"),
    }


_LATENTS = {"latents": "latents", **_norm("norm", "norm")}
_OPEN_FLAMINGO = {"frame_embeddings": "frame_embs", "media_embeddings": "media_time_embs"}
_SPLIT_LAYER = _layers("layers", _lucidrains_layer("0.", "1", "to_kv"))

_OUR_BLOCK = (
    *("attn_norm.weight", "attn_norm.bias", "to_q.weight", "to_kv.weight", "q_norm.weight", "k_norm.weight"),
    *("to_out.weight", "attn_gate", "ff_norm.weight", "ff_norm.bias", "w_in.weight", "w_out.weight", "ff_gate"),
)
_QK_NORMS = ("q_norm.weight", "k_norm.weight")

BLOCKS = {
    "flamingo_kernels": Layout(
        {name: name for name in _OUR_BLOCK},
        optional=("attn_norm.bias", "ff_norm.bias", *_QK_NORMS),
        gated=None,
        scalar_gates=False,
        grouped=True,
    ),
    "open_flamingo": Layout(_lucidrains_block("ff")),
    "otter": Layout(_lucidrains_block("feed_forward")),
    "flamingo_pytorch": Layout(_lucidrains_block("ff"), one_width=True),
    "flamingo_mini": Layout(_lucidrains_block("ffw", "alpha_attn", "alpha_ffw")),
    "idefics": Layout(
        _transformers_block("q_layer_norm", "k_layer_norm", "alpha_cross_attn", "alpha_dense"),
        optional=_QK_NORMS,
        gated=True,
        scalar_gates=False,
        ignored=("cross_attn.rotary_emb.inv_freq",),
    ),
    "mllama": Layout(
        _transformers_block("q_norm", "k_norm", "cross_attn_attn_gate", "cross_attn_mlp_gate"),
        gated=True,
        one_width=True,
        grouped=True,
    ),
}

_OUR_LAYER = _lucidrains_layer("", "", "to_kv")  # for its keys
RESAMPLERS = {
    "flamingo_kernels": Layout(
        {
            **{name: name for name in ("latents", "frame_embeddings", "media_embeddings", *_norm("norm", ""))},
            **_layers("layers", {name: name for name in (*_OUR_LAYER, *_QK_NORMS)}),
        },
        optional=("frame_embeddings", "media_embeddings", *(f"layers.{{}}.{name}" for name in _QK_NORMS)),
        gated=None,
    ),
    "open_flamingo": Layout(
        _LATENTS | _OPEN_FLAMINGO | _SPLIT_LAYER, optional=tuple(_OPEN_FLAMINGO), rows=("media_embeddings",)
    ),
    "otter": Layout(
        _LATENTS | _OPEN_FLAMINGO | _layers("layers", _lucidrains_layer("", "feed_forward", "to_kv")),
        optional=tuple(_OPEN_FLAMINGO),
        rows=("media_embeddings",),
    ),
    "flamingo_pytorch": Layout(
        _LATENTS | {"media_embeddings": "media_pos_emb"} | _SPLIT_LAYER, rows=("media_embeddings",)
    ),
    "flamingo_mini": Layout(
        _LATENTS
        | {"frame_embeddings": "time_pos_emb"}
        | _layers("layers", _lucidrains_layer("0.", "1", ("to_k", "to_v"))),
        rows=("frame_embeddings",),
    ),
    "idefics": Layout(
        {
            "latents": "latents",
            **_norm("norm", "layer_norm"),
            **_layers(
                "blocks",
                {
                    **_norm("media_norm", "0.context_layer_norm"),
                    **_norm("latent_norm", "0.latents_layer_norm"),
                    **_weights(to_q="0.q_proj", to_kv=("0.k_proj", "0.v_proj"), to_out="0.output_proj"),
                    **_norm("ff_norm", "1.ln"),
                    **_weights(w_in="1.fc", w_out="1.c_proj"),
                },
            ),
        }
    ),
}
