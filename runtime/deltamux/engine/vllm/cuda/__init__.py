"""The worker's process on a device with Triton: static buffers, and CUDA graphs with deltas."""
