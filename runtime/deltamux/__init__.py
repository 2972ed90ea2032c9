"""deltamux: one base model, many deltas of different fine-tuning methods, served in one batch."""

__version__ = "0.1.0"
