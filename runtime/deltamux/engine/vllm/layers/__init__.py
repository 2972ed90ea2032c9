"""The worker's process: the modules of the loaded model, with deltas."""
