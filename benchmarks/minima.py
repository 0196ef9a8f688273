"""The bytes that cannot be avoided: each tensor that must be read, and each that is written, once.

Of a Triton kernel, the tensors that it is there to read and write, sums in parts included. Of an op, what comes in and
what goes out, as if all between stayed on the chip. Attention's backward reads what its forward gave; δ and the runs of
its key blocks are between. A gradient that is another tensor as it stands (a residual's) costs nothing.
"""

from benchmarks.accounting import Launch

# Kernel -> what it reads -> what it writes. name:FLAG is a tensor where a constexpr is neither False nor "none".
_KERNELS = {
    "norm_fwd_kernel": "x branch:BRANCH gate:GATE weight:WEIGHT bias:BIAS -> y:BRANCH z copy:COPY",
    "norm_bwd_kernel": "dz x weight:WEIGHT bias:BIAS residual:RESIDUAL -> dx:DX z:Z part_weight:SUMS part_bias:SUMS",
    "activation_fwd_kernel": "h gate:GATED -> a",
    "activation_bwd_kernel": "da h gate:GATED -> dh:DH a:A part:SUMS",
    "gate_residual_fwd_kernel": "x residual:RESIDUAL gate:GATE -> y",
    "gate_bwd_kernel": "p weight gate -> p dgate",
    "row_sums_kernel": "part_a gate_a part_b gate_b part_c gate_c -> out_a out_b out_c",
    "media_kv_fwd_kernel": "weight scale bias -> folded offset",
    "media_kv_bwd_kernel": "p s weight scale bias -> p dscale:DSCALE dbias:DBIAS",
}
_KERNELS |= {f"wide_{name}": _KERNELS[name] for name in ("norm_fwd_kernel", "norm_bwd_kernel")}
ELEMENTWISE = tuple(_KERNELS)
# Op -> forward; backward. dx is the gradient of x, and as large.
_OPS = {
    "masked_cross_attention": "q k v start end -> y lse; dy q k v start end y lse -> dq dk dv",
    "latent_attention": (
        "q k_media v_media k_latents v_latents -> y lse; "
        "dy q k_media v_media k_latents v_latents y lse -> dq dk_media dv_media dk_latents dv_latents"
    ),
    "norm_linear": (
        "x norm_weight norm_bias weight -> y; dy x norm_weight norm_bias weight -> dx dnorm_weight dnorm_bias dweight"
    ),
    "linear_gate_residual": "x weight residual gate -> y; dy x weight gate -> dx dweight dgate",
    "gated_cross_attention": (
        "x norm_weight norm_bias w_q k v start end w_out gate -> y; "
        "dy x norm_weight norm_bias w_q k v start end w_out gate -> dx dnorm_weight dnorm_bias dw_q dk dv dw_out dgate"
    ),
    "gated_mlp": (
        "x norm_weight norm_bias w_in w_out gate -> y; "
        "dy x norm_weight norm_bias w_in w_out gate -> dx dnorm_weight dnorm_bias dw_in dw_out dgate"
    ),
}


def of_kernel(launch: Launch) -> int:
    """The least bytes of one launch of an elementwise kernel. Raises: KeyError for another kernel."""
    arguments = launch.arguments

    def side(names: str) -> int:
        tensors = (name.partition(":") for name in names.split())
        there = {arguments[name] for name, _, flag in tensors if not flag or arguments[flag] not in (False, "none")}
        return sum(block.bytes for block in there)

    return sum(map(side, _KERNELS[launch.name].split("->")))


def of_op(op: str, sizes: dict[str, int], read: dict[str, int]) -> tuple[int, int]:
    """The least bytes of an op, forward and backward.

    sizes: of its inputs, of y, and of lse where it has one. read: of inputs that need not be read whole, such as keys
    that nobody sees. An op without a line above (the modules, media_kv) reads all inputs in both passes, and gives y,
    then dx of each that is no interval.
    """
    inputs = [name for name in sizes if name not in ("y", "lse")]
    taking = [f"d{name}" for name in inputs if name not in ("start", "end")]
    every = f"{' '.join(inputs)} -> y; dy {' '.join(inputs)} -> {' '.join(taking)}"
    sizes = {f"d{name}": size for name, size in sizes.items()} | sizes | read
    forward, backward = (
        sum(sizes[name] for name in of_pass.replace("->", " ").split()) for of_pass in _OPS.get(op, every).split(";")
    )
    return forward, backward
