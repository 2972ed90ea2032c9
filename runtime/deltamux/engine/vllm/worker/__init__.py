"""The worker's process: vLLM's worker, with delta programs in place of LoRA."""
