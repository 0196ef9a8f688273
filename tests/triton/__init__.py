"""The Triton backend apart from what its ops compute: the interpreter tests use, and compilation for each chip."""
