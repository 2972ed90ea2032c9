"""Training data: JSONL rows, their tokens and labels, and batches of them."""
