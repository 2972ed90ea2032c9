"""The fast path: from a compiled model to the CPU kernels, without Python."""
