"""Helpers of tests, benchmarks and fuzzing: one file per subject, so that a test imports only what it uses."""
