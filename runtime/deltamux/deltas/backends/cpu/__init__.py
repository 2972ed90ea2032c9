"""The CPU kernels of the ops' batches; tests compare each with the batch in torch."""
