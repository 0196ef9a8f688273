"""Every wrong argument of latent_attention: the error names the argument, what was expected and what came."""

import pytest
import torch

import flamingo_kernels as fk
from tests.support.latent_attention_cases import LatentCase, assert_identical, leaves_of, run_op

pytestmark = pytest.mark.ops("latent_attention")
Q = torch.zeros(4, 5, 6, 8)
MEDIA = torch.zeros(4, 12, 3, 8)
LATENTS = torch.zeros(4, 7, 3, 8)
LENGTHS = torch.full((4,), 12, dtype=torch.int32)

WRONG = [
    # no tensors, ranks
    ({"q": None}, TypeError, "q must be a tensor, got NoneType"),
    ({"k_media": [1.0]}, TypeError, "k_media must be a tensor, got list"),
    ({"v_latents": 1}, TypeError, "v_latents must be a tensor, got int"),
    ({"q": Q[0]}, ValueError, r"q must be of rank 4.*, got .*\[5, 6, 8\]"),
    ({"v_media": MEDIA.flatten(2)}, ValueError, r"v_media must be of rank 4.*, got .*\[4, 12, 24\]"),
    ({"k_latents": LATENTS[0]}, ValueError, r"k_latents must be of rank 4.*, got .*\[7, 3, 8\]"),
    # dtypes
    ({"q": Q.int()}, TypeError, "q must be of dtype float32, bfloat16, float16.*, got torch.int32"),
    ({"v_media": MEDIA.bool()}, TypeError, "v_media must be of dtype float32.*, got torch.bool"),
    ({"q": Q.bfloat16()}, TypeError, "k_media must be of q's dtype.*, got torch.float32"),
    ({"k_latents": LATENTS.half()}, TypeError, "k_latents must be of q's dtype.*, got torch.float16"),
    ({"v_latents": LATENTS.double()}, TypeError, "v_latents must be of q's dtype.*, got torch.float64"),
    # devices
    ({"v_media": MEDIA.to("meta")}, ValueError, "v_media must be on q's device.*, got meta"),
    ({"k_latents": LATENTS.to("meta")}, ValueError, "k_latents must be on q's device.*, got meta"),
    ({"media_lengths": LENGTHS.to("meta")}, ValueError, "media_lengths must be on q's device.*, got meta"),
    # shapes against each other
    ({"v_media": MEDIA[:, :11]}, ValueError, r"v_media must be of k_media's shape.*, got .*\[4, 11, 3, 8\]"),
    ({"v_latents": LATENTS[..., :4]}, ValueError, r"v_latents must be of k_latents's shape.*, got .*\[4, 7, 3, 4\]"),
    ({"q": Q[..., :7]}, ValueError, r"k_media must be of q's head dim.*, got .*\[4, 12, 3, 8\]"),
    (
        {"k_latents": LATENTS[..., :7], "v_latents": LATENTS[..., :7]},
        ValueError,
        r"k_latents must be of q's head dim.*, got .*\[4, 7, 3, 7\]",
    ),
    ({"q": Q[:, :, :4]}, ValueError, "k_media must be of a number of heads that divides q's"),
    (
        {"k_latents": LATENTS[:, :, :1], "v_latents": LATENTS[:, :, :1]},
        ValueError,
        r"k_latents must be of k_media's number of heads.*, got .*\[4, 7, 1, 8\]",
    ),
    ({"q": Q[:2]}, ValueError, r"k_media must be of q's number of rows.*, got .*\[4, 12, 3, 8\]"),
    (
        {"k_latents": LATENTS[:1], "v_latents": LATENTS[:1]},
        ValueError,
        r"k_latents must be of q's number of rows.*, got .*\[1, 7, 3, 8\]",
    ),
    # media_lengths
    ({"media_lengths": 12}, TypeError, "media_lengths must be a tensor, got int"),
    ({"media_lengths": [12] * 4}, TypeError, "media_lengths must be a tensor, got list"),
    ({"media_lengths": LENGTHS.float()}, TypeError, "media_lengths must be of dtype int32 or int64, got torch.float32"),
    ({"media_lengths": LENGTHS.bool()}, TypeError, "media_lengths must be of dtype int32 or int64, got torch.bool"),
    ({"media_lengths": LENGTHS[:3]}, ValueError, r"media_lengths must be of shape \[N\], got .*\[3\]"),
    ({"media_lengths": LENGTHS[:, None]}, ValueError, r"media_lengths must be of shape \[N\], got .*\[4, 1\]"),
    ({"media_lengths": LENGTHS[0]}, ValueError, r"media_lengths must be of shape \[N\], got .*\[\]"),
    # scale
    ({"softmax_scale": "0.5"}, TypeError, "softmax_scale must be a number, got str"),
    ({"softmax_scale": torch.tensor(0.5)}, TypeError, "softmax_scale must be a number, got a tensor"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_wrong_argument(backend, wrong, error, message):
    arguments = {"q": Q, "k_media": MEDIA, "v_media": MEDIA, "k_latents": LATENTS, "v_latents": LATENTS, **wrong}
    arguments = {
        name: x.to(backend.device) if isinstance(x, torch.Tensor) and x.device.type != "meta" else x
        for name, x in arguments.items()
    }
    with pytest.raises(error, match=f"^latent_attention: {message}"):
        fk.latent_attention(**arguments)


@pytest.mark.parametrize("value", [-1, 21, 2**31 - 1, -(2**31), 2**32, 2**32 + 5, -(2**32) + 5], ids=str)
@pytest.mark.parametrize("place", [0, 3])
def test_lengths_outside_of_the_media(backend, place, value):
    """On the CPU an error, that says which numbers; on a GPU, where looking would wait for it, clamped."""
    inputs = LatentCase(N=4, S=20, R=3, D=8, lengths="full").inputs(backend.device)
    lengths = inputs.media_lengths.long()
    lengths[place] = value
    if -(2**31) <= value < 2**31:
        lengths = lengths.int()
    inputs = inputs._replace(media_lengths=lengths)
    if backend.device == "cpu":
        with pytest.raises(ValueError, match=r"^latent_attention: media_lengths must lie within 0\.\.20, .*got "):
            run_op(inputs)
    else:
        assert_identical(run_op(inputs), run_op(inputs._replace(media_lengths=lengths.clamp(0, 20))))


@pytest.mark.parametrize("sizes", [{"S": 0}, {"S": 0, "latents": 0}, {"R": 0}, {"H": 0, "G": 0}, {"D": 0}], ids=str)
def test_lengths_are_checked_where_there_is_nothing_to_do(backend, sizes):
    if backend.device != "cpu":
        pytest.skip("clamped on a GPU")
    inputs = LatentCase(**{"S": 4, "R": 3, "D": 8, "lengths": "full", "scale": 1.0, **sizes}).inputs("cpu")
    with pytest.raises(ValueError, match=rf"within 0\.\.{inputs.k_media.shape[1]}"):
        run_op(inputs._replace(media_lengths=inputs.media_lengths + 1))


def test_backward_checks_the_lengths_too(backend):
    """It reads the lengths again, and they may have been written to since."""
    if backend.device != "cpu":
        pytest.skip("clamped on a GPU")
    inputs = LatentCase(S=20, R=3, D=8).inputs("cpu")
    tensors = inputs[:5]
    o, lse = fk.latent_attention(*tensors, media_lengths=inputs.media_lengths, return_lse=True)
    backward = torch.ops.flamingo_kernels.latent_attention_backward
    for wrong in (-1, 21):
        lengths = torch.full_like(inputs.media_lengths, wrong)
        with pytest.raises(ValueError, match=r"within 0\.\.20"):
            backward(inputs.do, *tensors, lengths, o, lse, inputs.scale, backend.name)


def test_writing_to_the_lengths_before_backward(backend):
    """Caught by autograd, which saved them."""
    inputs = LatentCase(S=20, R=3, D=8, lengths="one").inputs(backend.device)
    o = fk.latent_attention(*leaves_of(inputs), media_lengths=inputs.media_lengths)
    inputs.media_lengths.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()


def test_on_meta_tensors():
    """Shapes and dtypes without any kernel."""
    inputs = LatentCase(S=20, R=3, H=4, D=8, dtype=torch.bfloat16).inputs("cpu")
    tensors = [x.to("meta") for x in inputs[:5]]
    lengths = inputs.media_lengths.to("meta")
    o, lse = fk.latent_attention(*tensors, media_lengths=lengths, return_lse=True)
    assert (o.device.type, o.shape, o.dtype) == ("meta", inputs.q.shape, torch.bfloat16)
    assert (lse.device.type, lse.shape, lse.dtype) == ("meta", (2, 4, 3), torch.float32)
