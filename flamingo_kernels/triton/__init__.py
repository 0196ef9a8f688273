"""Triton kernels, one module per op, loaded when an op first runs: importing this package imports no Triton."""
