"""Tools beside training: merge, convert, compose, compress, evaluate, check data."""
