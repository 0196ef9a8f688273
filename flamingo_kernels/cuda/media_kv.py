"""media_kv on the kernels in CUDA C++: see `_gpu/media_kv.py`."""

from functools import partial

from flamingo_kernels._gpu import media_kv
from flamingo_kernels.cuda import _kernels

forward = partial(media_kv.forward, _kernels)
backward = partial(media_kv.backward, _kernels)
