"""Compiled kernels behind the ops' batches; every one has a pure-torch twin that it is held against."""
