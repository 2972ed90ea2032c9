"""What PEFT's files have in common, whatever the method."""

from __future__ import annotations

PREFIX = "base_model.model."
"""Stands before every module's path in PEFT's tensor names."""

BOOKKEEPING = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "peft_version",
        "revision",
        "task_type",
    }
)
"""Keys of every adapter_config.json that change nothing that is served."""

CAUSAL_LM = {"task_type": "CAUSAL_LM", "inference_mode": True}
"""What an adapter_config.json must say so that PEFT attaches it to a causal model."""
