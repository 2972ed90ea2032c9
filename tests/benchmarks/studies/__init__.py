"""One-off studies of speed, run by hand: `python -m benchmarks.studies.NAME` in tests/."""
