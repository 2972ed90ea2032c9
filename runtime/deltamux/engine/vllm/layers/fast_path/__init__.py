"""The fast path of a compiled model to the CPU kernels, without Python; deleting this folder leaves the slow one."""
