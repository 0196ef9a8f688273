"""The public functions: each owns its docstring, its checks and its registration with torch.library."""
