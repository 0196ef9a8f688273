"""media_kv on Triton's kernels: see `_gpu/media_kv.py`."""

from functools import partial

from flamingo_kernels._gpu import media_kv
from flamingo_kernels.triton import _kernels

forward = partial(media_kv.forward, _kernels)
backward = partial(media_kv.backward, _kernels)
