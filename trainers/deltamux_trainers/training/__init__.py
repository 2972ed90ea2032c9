"""The training loop: transformers' Trainer, its callbacks, and checkpoints that a run resumes from."""
