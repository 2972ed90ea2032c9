"""What deltamux serves on each architecture of base: one row per architecture, held against transformers and PEFT."""
