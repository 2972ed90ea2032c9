"""Where the batched form of an op runs: a backend is a table from ops to batches."""
