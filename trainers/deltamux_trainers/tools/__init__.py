"""Tools for trained adapters and for data: merge, convert, compose, compress, evaluate, check data."""
