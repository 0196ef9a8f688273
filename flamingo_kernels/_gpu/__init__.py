"""What the GPU backends share on the host.

The linear ops are written once: matmuls by torch, and between them the kernels that a backend hands in. `kernels.py`
says what it has to bring; `flamingo_kernels.triton.<op>` and `flamingo_kernels.cuda.<op>` are the op of this package on
their own kernels. For the attention ops there are checks of positions and the split of keys.
"""
