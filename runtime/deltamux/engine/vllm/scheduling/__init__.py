"""The engine core's process: vLLM's scheduler, with more adapters than device slots."""
