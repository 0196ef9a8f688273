"""The modules of a Flamingo on the fused ops."""
