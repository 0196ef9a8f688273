"""Plain PyTorch: the specification of every op, on any device and in any dtype, fp64 included."""
