"""The linear ops on a GPU, written once: matmuls by torch, and between them the kernels that a backend hands in.

`kernels.py` says what a backend has to bring. `flamingo_kernels.triton.<op>` and `flamingo_kernels.cuda.<op>` are the
op of this package on their own kernels.
"""
