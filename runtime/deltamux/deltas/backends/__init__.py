"""The backends: each a table from ops to batches that run on one kind of device."""
