"""CUDA C++ kernels, one module per op: allocation here, kernels in csrc/cuda. Importing it loads no binary."""
