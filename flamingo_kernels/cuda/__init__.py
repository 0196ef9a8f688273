"""CUDA C++ kernels, one module per op: allocation here, kernels in csrc/cuda. Importing this package loads no binary."""
