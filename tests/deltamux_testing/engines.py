"""Options of the engines that tests start."""

from __future__ import annotations

OPTIONS = {"dtype": "float32", "max_model_len": 256, "kv_cache_gib": 0.25, "max_num_seqs": 16}
PROFILES = {
    "low-rank": {"LINEAR"},
    "bias": {"LINEAR"},
    "scale": {"ALL"},  # scales an input as well
    "bottleneck": {"ALL"},
    "prefix": {"BASE"},  # its keys and values are in the cache before the first step
    "soft-prompt": {"none", "BASE"},  # nothing to do once its virtual tokens are in the cache
    "everything": {"none"},  # three bottlenecks at one place have no kernels
}
"""The graphs that the steps of a request need, by its adapter."""
